"""Whole models on a GPU: layouts chosen for all layers together, and models captured as graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import numbasparse.nn
from numbasparse.choices import Choice, Measured
from numbasparse.kernels import KERNELS
from numbasparse.nn import SparseConv2d, capture, convert
from numbasparse.nn.fused import FusedConv2d
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import layout_of
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

REASON = cuda.reason_unavailable()


def needs_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=str(REASON))(test))


class Net(nn.Module):
    """A dense layer, a residual block, pooling between sparse layers, a linear layer that wants plain input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Conv2d(64, 64, 3, padding=1, bias=i % 2 == 0) for i in range(4))
        self.norm, self.act, self.pool = nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc = nn.Linear(64 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.pool(self.act(self.c(self.act(self.norm(self.b(self.a(x))) + x))))
        return self.fc(torch.flatten(self.act(self.d(x)), 1))


class Tuned:
    """A tuned file in which CHWN is best, but for a layer alone; dense layers take 20 us, or what they do in NHWC."""

    def __init__(self, name: str, nhwc_us: float = 20.0) -> None:
        self.name, self.us = name, {"nchw": 20.0, "nhwc": nhwc_us}

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice:
        return Choice("cuda_dense", {"layout": "nhwc", "precision": "strict"})

    def measured(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> list[Measured]:
        dense = [
            Measured(Choice("cuda_dense", {"layout": layout, "precision": "strict"}), us, us)
            for layout, us in self.us.items()
        ]
        if weight.sparsity < 0.5:
            return dense
        own = KERNELS[self.name]
        config = next(c for c in own.suggest(spec, weight, 1, 500) if own.layouts(spec, c)[0] == "CHWN")  # type: ignore[attr-defined]
        return [*dense, Measured(Choice(self.name, config), 10, 25)]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.a, model.b, model.c, model.d):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.1)
    return model


pytestmark = pytest.mark.usefixtures("strict")


@needs_gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("cuda_direct", torch.float32), ("cuda_wgmma", torch.float16)])
def test_layers_share_a_layout(net: nn.Module, name: str, dtype: torch.dtype, last: bool) -> None:
    if name == "cuda_wgmma" and cuda.current().capability != (9, 0):
        pytest.skip("needs an H100 or H200")
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(32, 3, 8, 8).to("cuda", dtype).contiguous(memory_format=order)
    model = net.to("cuda", dtype).to(memory_format=order)
    converted = convert(model, Tuned(name), x)
    sparse = {n: m for n, m in converted.named_modules() if isinstance(m, SparseConv2d)}
    assert {n: m.out_layout for n, m in sparse.items()} == {
        "a": "CHWN",
        "b": "CHWN",
        "c": "CHWN",
        "d": "NHWC" if last else "NCHW",
    }
    seen: list[Tensor] = []
    handle = converted.get_submodule("pool").register_forward_hook(lambda m, args, y: seen.append(y))
    tolerance = 1e-3 if dtype is torch.float32 else 3e-2
    with torch.inference_mode():
        expected = model.double()(x.double()).to(dtype)
        torch.testing.assert_close(converted(x), expected, rtol=tolerance, atol=tolerance)
        assert layout_of(seen[0]) == "CHWN"
        handle.remove()
        captured = capture(converted, x)
        numbasparse.nn.clear_cache()  # the graph keeps what it uses
        for _ in range(2):
            torch.cuda.empty_cache()
            junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
            other = torch.randn_like(x)
            expected = model(other.double()).to(dtype)
            torch.testing.assert_close(captured(other), expected, rtol=tolerance, atol=tolerance)
            del junk
        with pytest.raises(ValueError, match=r"input 0 must be \(32, 3, 8, 8\)"):
            captured(x[:16])
        with pytest.raises(TypeError, match="expected 1 tensors"):
            captured(x, x)


@needs_gpu
def test_a_model_in_nchw_may_run_in_channels_last(net: nn.Module) -> None:
    """Where that is faster: its dense layers are fused then too."""
    x = torch.randn(32, 3, 8, 8).to("cuda", torch.float16)
    model = net.to("cuda", torch.float16)
    converted = convert(model, Tuned("cuda_direct", nhwc_us=5.0), x)
    assert not any(isinstance(m, SparseConv2d) for m in converted.modules())
    assert all(isinstance(converted.get_submodule(name), FusedConv2d) for name in ("stem", "a", "b", "c", "d"))
    seen: list[Tensor] = []
    converted.get_submodule("stem").register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.inference_mode():
        expected = model.double()(x.double()).to(x.dtype)
        torch.testing.assert_close(converted(x), expected, rtol=3e-2, atol=3e-2)
    assert layout_of(seen[0]) == "NHWC"


def test_capture_wants_a_gpu(net: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"captured with tensors on the CPU or on one GPU as examples, got \['meta'\]"):
        capture(net, torch.randn(1, 3, 8, 8, device="meta"))
    with pytest.raises(TypeError, match="got \\[\\]"):
        capture(net)
