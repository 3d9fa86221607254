"""`numbasparse.nn.enlarging.interpolate` is torch's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.nn import convert
from numbasparse.nn.enlarging import interpolate
from numbasparse.nn.native import Tracer
from numbasparse.pruning import MagnitudePruning, prune_


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2},
        {"scale_factor": 3.0, "mode": "nearest"},
        {"scale_factor": 1},
        {"scale_factor": 1.5},
        {"scale_factor": (2.0, 3.0)},
        {"size": (7, 9)},
        {"scale_factor": 2.0, "mode": "bilinear", "align_corners": False},
        {"scale_factor": 2.0, "recompute_scale_factor": True},
    ],
)
@pytest.mark.parametrize("shape", [(1, 3, 5, 6), (2, 1, 400, 400), (0, 3, 4, 4)])
def test_equals_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x = torch.randn(shape)
    if 0 in shape and options.get("mode") == "bilinear":
        return
    for given in (x, x.double(), x.contiguous(memory_format=torch.channels_last)):
        made, expected = interpolate(given, **options), F.interpolate(given, **options)
        assert made.stride() == expected.stride()
        assert torch.equal(made, expected)
    wanted = x[:1].clone().requires_grad_()
    if wanted.numel():
        found = torch.autograd.grad(interpolate(wanted, **options).square().sum(), wanted)[0]
        assert torch.equal(found, torch.autograd.grad(F.interpolate(wanted, **options).square().sum(), wanted)[0])


class Net(nn.Module):
    """All of it in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(F.interpolate(F.relu(self.first(x)), scale_factor=2.0, mode="nearest")))


def test_converted_models_call_it() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    prune_(net, MagnitudePruning(sparsity=0.9, scope="layer"))
    x = torch.randn(1, 4, 6, 7)
    converted = convert(net, None, x)
    graph = Tracer().trace(converted)
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [interpolate]
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), net(x))
    program = torch.export.export(converted, (x,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), net(x))
