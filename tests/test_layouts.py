from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import _ORDER, LAYOUTS, Layout, empty, has_layout, layout_of, to_layout
from numbasparse.runtime.transpose import Matrices, ptx_of

REASON = cuda.reason_unavailable()

SHAPE = (2, 3, 4, 5)
shapes = st.tuples(*[st.integers(1, 4)] * 4)


def test_orders() -> None:
    x = torch.arange(120).reshape(SHAPE)
    n, _, h, w = SHAPE
    assert to_layout(x, "NCHW").data_ptr() == x.data_ptr()
    assert to_layout(x, "NHWC").stride() == x.contiguous(memory_format=torch.channels_last).stride()
    assert to_layout(x, "CHWN").stride() == (1, h * w * n, w * n, n)


@given(shapes, st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_there_and_back(shape: tuple[int, ...], first: Layout, second: Layout) -> None:
    x = torch.rand(shape)
    there = to_layout(x, first)
    assert has_layout(there, first)
    assert layout_of(there) is not None
    back = to_layout(there, second)
    assert has_layout(back, second)
    assert torch.equal(back, x)
    assert to_layout(there, first).data_ptr() == there.data_ptr()
    made = empty(shape, first, dtype=torch.float16, device="cpu")
    assert (made.shape, made.dtype) == (x.shape, torch.float16)
    assert has_layout(made, first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of(layout: Layout) -> None:
    assert layout_of(to_layout(torch.rand(SHAPE), layout)) == layout


def test_no_layout() -> None:
    assert layout_of(torch.rand(2, 3, 4, 10)[..., ::2]) is None
    assert layout_of(torch.rand(2, 3, 5, 4).transpose(2, 3)) is None
    assert layout_of(torch.rand(1, 3, 4, 5).expand(2, 3, 4, 5)) is None


def test_ambiguous_sizes_are_nchw() -> None:
    x = torch.rand(1, 3, 4, 5)
    assert layout_of(to_layout(x, "CHWN")) == "NCHW"
    assert to_layout(x, "CHWN").data_ptr() == x.data_ptr()


# ---- the kernel -----------------------------------------------------------------------------------------------

PAIRS = [("NCHW", "CHWN"), ("CHWN", "NCHW"), ("NHWC", "CHWN"), ("CHWN", "NHWC")]
"""Orders that have a kernel."""


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, 7)] * 4), st.sampled_from(PAIRS))
def test_matrices_are_those_of_the_orders(shape: tuple[int, ...], pair: tuple[Layout, Layout]) -> None:
    """What the kernel writes where, by its own formula."""
    x = torch.arange(math.prod(shape)).reshape(shape)
    source, expected = to_layout(x, pair[0]), to_layout(x, pair[1])
    m = Matrices.of(*shape, *pair)
    assert m is not None
    flat, out = source.permute(_ORDER[pair[0]]).reshape(-1), torch.full((x.numel(),), -1)
    for matrix, row, column in itertools.product(range(m.count), range(m.rows), range(m.columns)):
        to = matrix * m.out_matrix + column * m.out_column + row
        assert out[to] == -1
        out[to] = flat[matrix * m.in_matrix + row * m.in_row + column]
    assert torch.equal(out, expected.permute(_ORDER[pair[1]]).reshape(-1))
    assert Matrices.of(*shape, "NCHW", "NHWC") is None


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
@pytest.mark.parametrize("size", [2, 4])
def test_transposing_compiles(size: int, capability: tuple[int, int]) -> None:
    made = ptx_of(size, capability)
    assert ".f64" not in made.text
    assert ".local" not in made.text


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("shape", [(32, 64, 14, 14), (8, 3, 37, 41), (33, 70, 5, 3), (2, 1, 1, 9), (128, 2, 130, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_to_layout_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for source, target in itertools.product(LAYOUTS, LAYOUTS):
        given_ = to_layout(x, source).cuda()
        assert has_layout(given_, source)
        made = to_layout(given_, target)
        assert has_layout(made, target)
        assert torch.equal(made.cpu(), x)
    graph = torch.cuda.CUDAGraph()
    images = x.cuda()
    with torch.cuda.graph(graph):
        made = to_layout(images, "CHWN")
    images.copy_(2 * x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(made.cpu(), 2 * x)
