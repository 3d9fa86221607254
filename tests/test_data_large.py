"""The networks of the pruning benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import fashion_large


@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 20), ("vgg16", 13)])
def test_networks(name: str, convolutions: int) -> None:
    torch.manual_seed(0)
    model = fashion_large.build(name)
    assert not model.training
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    with torch.inference_mode():
        assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("name", list(fashion_large.NETWORKS))
def test_every_layer_can_be_found_and_replaced(name: str) -> None:
    traced = torch.fx.symbolic_trace(fashion_large.build(name))
    modules = dict(traced.named_modules())
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    convolutions = [target for target in called if isinstance(modules[target], nn.Conv2d)]
    assert len(convolutions) == len(set(convolutions))
    assert len(convolutions) == sum(isinstance(module, nn.Conv2d) for module in modules.values())


def test_seed_decides_the_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(fashion_large.build("resnet18").state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stages.1.0.conv1.weight"], other["stages.1.0.conv1.weight"])


def test_unknown_network() -> None:
    with pytest.raises(ValueError, match="network must be one of 'resnet18', 'vgg16', got 'alexnet'"):
        fashion_large.build("alexnet")
