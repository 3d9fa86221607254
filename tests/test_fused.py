"""Dense convolutions that compute what follows them: the same results, in models too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from numbasparse import SparseWeight
from numbasparse.kernels import KERNELS
from numbasparse.nn import conversion_report, convert, load, save
from numbasparse.nn import convert as convert_function
from numbasparse.nn.fused import FusedConv2d, worth_fusing
from numbasparse.plans import Choice
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec


class Block(nn.Module):
    """As in ResNet: a sparse 3x3 between dense ones, the last with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.middle, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.last, self.norm3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.first(x)))
        y = self.relu(self.norm2(self.middle(y)))
        y = self.norm3(self.last(y))
        y += x
        return self.relu(y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


def pruned_model() -> nn.Module:
    torch.manual_seed(0)
    model = Model().eval()
    for block in model.blocks:
        block.middle.weight.data *= torch.rand_like(block.middle.weight) < 0.1
        for norm in (block.norm, block.norm2, block.norm3):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_same_as_one_by_one(activation: str, with_residual: bool) -> None:
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    fused = FusedConv2d.of(conv, activation)
    assert fused.state_dict().keys() == conv.state_dict().keys()
    x = torch.randn(2, 6, 9, 9)
    y = conv(x)
    residual = torch.randn_like(y) if with_residual else None
    y = y if residual is None else y + residual
    expected = {"none": y, "relu": y.relu(), "silu": torch.nn.functional.silu(y)}[activation]
    torch.testing.assert_close(fused(x, residual), expected)


def test_not_worth_it_on_a_cpu() -> None:
    assert not worth_fusing(nn.Conv2d(6, 8, 3), "NHWC")
    converted = convert(pruned_model(), None, torch.randn(1, 8, 8, 8))
    assert not any(isinstance(m, FusedConv2d) for m in converted.modules())


def fused_model(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> nn.Module:
    """Converted as on a GPU."""
    import sys

    room = sys.modules[convert_function.__module__]
    monkeypatch.setattr(room, "worth_fusing", lambda conv, plain: type(conv) is nn.Conv2d)
    return convert(pruned_model(), None, x)


def test_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 8, 8)
    converted: Any = fused_model(monkeypatch, x)
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), pruned_model()(x), rtol=1e-4, atol=1e-4)
    fused = {name: m for name, m in converted.named_modules() if isinstance(m, FusedConv2d)}
    assert {name: m.activation for name, m in fused.items()} == {
        "stem.0": "relu",
        "blocks.0.first": "relu",
        "blocks.0.last": "relu",
        "blocks.1.first": "relu",
        "blocks.1.last": "relu",
    }
    report = {record.name: record for record in conversion_report(converted)}
    assert report["blocks.1.last"].residual
    assert report["blocks.1.last"].decision == "dense"
    calls = [n for n in converted.blocks[1].graph.nodes if n.op == "call_module"]
    assert [str(n.target) for n in calls if len(n.args) == 2] == ["last"]
    assert not any(n.op in ("call_function", "call_method") for n in converted.blocks[1].graph.nodes)


def test_saved_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = torch.randn(1, 8, 8, 8)
    converted = fused_model(monkeypatch, x)
    save(converted, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), converted(x))
    assert sum(isinstance(m, FusedConv2d) for m in loaded.modules()) == 5


@pytest.mark.gpu
@pytest.mark.skipif(cuda.reason_unavailable() is not None, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
def test_cudnn_computes_it(kernel_size: int, stride: int, with_residual: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(kernel_size)
    conv = nn.Conv2d(16, 24, kernel_size, stride, kernel_size // 2).cuda().to(dtype, memory_format=torch.channels_last)
    fused = FusedConv2d.of(conv, "relu")
    x = torch.randn(3, 16, 15, 13, device="cuda").to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        y = copy.deepcopy(conv).double()(x.double())
        residual = torch.randn_like(y).to(dtype).contiguous(memory_format=torch.channels_last)
        given = residual if with_residual else None
        assert fused._fuses(x, given)
        expected = (y + residual.double() if with_residual else y).relu()
        found = fused(x, given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


class Tuned:
    """Chooses a sparse kernel for the layers in the middle of blocks."""

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str) -> Choice:
        if "middle" in name:
            return Choice("cuda_direct", KERNELS["cuda_direct"].default(spec, weight, 1))
        return Choice("cuda_dense", {"layout": "nhwc", "precision": "strict"})


@pytest.mark.gpu
@pytest.mark.skipif(cuda.reason_unavailable() is not None, reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    model = pruned_model().cuda().to(torch.float16, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 8, 8, device="cuda").to(torch.float16, memory_format=torch.channels_last)
    converted = convert(model, Tuned(), x)
    assert sum(isinstance(m, FusedConv2d) and m.activation == "relu" for m in converted.modules()) == 5
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(converted(x).double(), expected, rtol=2e-2, atol=2e-2)
