from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numbasparse.runtime.layouts import LAYOUTS, Layout, empty, has_layout, layout_of, to_layout

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
