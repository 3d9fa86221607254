"""Max pooling in two passes gives exactly what torch gives."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from numbasparse.nn import convert
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.runtime import cuda, max_pool
from numbasparse.runtime.layouts import Layout, layout_of, to_layout


@st.composite
def pools(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options of a pool, and an image that holds at least one window."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    stride = draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 3)))
    sizes = tuple(draw(st.integers(max(1, k - 2 * p), 12)) for k, p in zip(kernel, padding, strict=True))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": draw(st.booleans())}
    return options, (*draw(st.sampled_from([(), (1,), (3,)])), 2, *sizes)


@settings(deadline=None, max_examples=150)
@given(pools(), st.integers(0, 99))
def test_equals_torch(pool: tuple[dict[str, Any], tuple[int, ...]], seed: int) -> None:
    options, shape = pool
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[seed % x.numel()] = (float("nan"), float("-inf"), float("inf"), 0.0)[seed % 4]
    plain = nn.MaxPool2d(**options)
    y, expected = SeparableMaxPool2d.of(plain)(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous()


def test_what_it_leaves_to_torch() -> None:
    x = torch.randint(0, 3, (1, 2, 7, 7)).float().requires_grad_()
    plain = nn.MaxPool2d(3, 2, 1)
    ours = SeparableMaxPool2d.of(plain)
    ties = [torch.autograd.grad(pool(x).sum(), x)[0] for pool in (ours, plain)]
    assert torch.equal(*ties)  # torch gives the gradient to one of equal values
    last = x.detach().contiguous(memory_format=torch.channels_last)
    assert ours(last).is_contiguous(memory_format=torch.channels_last)
    for pool in (nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, return_indices=True)):
        torch.testing.assert_close(SeparableMaxPool2d.of(pool)(x.detach()), pool(x.detach()))
    for bad in (x[:, :, :1, :1].detach(), x.detach()[0, 0]):
        with pytest.raises((RuntimeError, IndexError)):
            SeparableMaxPool2d(4)(bad)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        SeparableMaxPool2d(2, padding=2)(x.detach())
    assert SeparableMaxPool2d(2)(torch.empty(0, 2, 4, 4)).shape == (0, 2, 2, 2)


@pytest.mark.parametrize(
    "options", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}]
)
def test_keeps_chwn(options: dict[str, Any]) -> None:
    x = torch.randn(5, 3, 9, 8)
    plain = nn.MaxPool2d(**options)
    y = SeparableMaxPool2d.of(plain)(to_layout(x, "CHWN"))
    assert layout_of(y) == "CHWN"
    torch.testing.assert_close(y, plain(x), rtol=0, atol=0)


def test_convert_replaces_pools_but_not_those_with_hooks() -> None:
    conv = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        conv.weight.masked_fill_(torch.rand_like(conv.weight) < 0.8, 0.0)
    model = nn.Sequential(conv, nn.MaxPool2d(2), nn.MaxPool2d(2, 1)).eval()
    model[2].register_forward_hook(lambda *_: None)
    x = torch.randn(1, 2, 9, 9)
    converted = convert(model, None, x)
    assert [type(m) for m in converted] == [type(converted[0]), SeparableMaxPool2d, nn.MaxPool2d]
    assert type(convert(model, fuse=False)[1]) is nn.MaxPool2d
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(converted, (x,)).module()
    again = convert(nn.Sequential(converted, conv_of(3)), None, x)
    with torch.inference_mode():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)
        assert again(x).shape[1] == 3


def conv_of(channels: int) -> nn.Conv2d:
    made = nn.Conv2d(channels, channels, 1)
    nn.init.eye_(made.weight.data.view(channels, channels))
    return made


WINDOWS = [
    max_pool.Window((2, 2), (2, 2), (0, 0)),
    max_pool.Window((3, 3), (2, 2), (1, 1)),
    max_pool.Window((3, 2), (1, 3), (1, 0)),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_code_for_gpus(window: max_pool.Window, dtype: str) -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        with cuda.assumed(capability):
            ptx = max_pool.ptx_of(dtype, window, capability)
            assert ".f64" not in ptx.text
            assert ".local" not in ptx.text
            assert "max.NaN" in ptx.text
            assert cuda.assemble(ptx).local_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(cuda.reason_unavailable() is not None, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["NHWC", "CHWN"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 9, 12), (16, 24, 7, 7), (24, 8, 30, 5), (8, 64, 64, 64)], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], window: max_pool.Window, layout: Layout, dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    x.view(-1)[::97] = float("nan")
    x.view(-1)[::13] = float("-inf")
    x = to_layout(x, layout)
    assert max_pool.reason_unsupported(x, layout) is None
    pool = nn.MaxPool2d(window.size, window.stride, window.padding)
    y = SeparableMaxPool2d.of(pool)(x)
    assert layout_of(y) == layout
    torch.testing.assert_close(y, pool(x.contiguous()), rtol=0, atol=0, equal_nan=True, check_stride=False)
