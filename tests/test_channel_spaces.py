"""Which layers must agree on an order of channels: random networks compute the same when their channels have moved."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning import reorder_channels, reorder_inputs
from numbasparse.pruning.channel_spaces import ChannelSpaces


class Gate(nn.Module):
    """Weighs channels by what is in all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(F.adaptive_avg_pool2d(x, 1)))


class RandomNetwork(nn.Module):
    """Operations on what some operations before have made; most treat channels alike, a few do not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.inputs = draw.choice([3, 8])
        self.calls: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        self.layers = nn.ModuleList()
        widths = [self.inputs]
        for _ in range(draw.randint(4, 14)):
            source = max(0, len(widths) - 1 - draw.choice([0, 0, 0, 1, 2]))
            widths.append(self._add(draw, widths, source))
        self.head = nn.Linear(4 * widths[-1], 5) if draw.random() < 0.5 else None

    def _add(self, draw: random.Random, widths: list[int], source: int) -> int:
        """Add an operation; returns how many channels it makes."""
        width = widths[source]
        modules: dict[str, Callable[[], nn.Module]] = {
            "convolution": lambda: nn.Conv2d(width, draw.choice([8, 12, 16]), draw.choice([1, 3]), padding="same"),
            "depthwise": lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
            "normalization": lambda: nn.BatchNorm2d(width),
            "prelu": lambda: nn.PReLU(width),
            "pooling": lambda: nn.AvgPool2d(3, 1, 1),
            "gate": lambda: Gate(width),
        }
        kind = draw.choice([*modules, *["convolution"] * 3, "relu", "scalar", "sum", "sum"])
        if draw.random() < 0.1:
            kind = draw.choice(["concatenation", "product", "every second", "mean of channels"])
        if kind in modules:
            layer = modules[kind]()
            self.layers.append(layer)
            self.calls.append((layer, (source,)))
            return int(getattr(layer, "out_channels", width))
        fitting = [i for i, other in enumerate(widths) if other in (width, 1)]
        other = draw.choice(fitting) if kind in ("sum", "product") else draw.randrange(len(widths))
        functions: dict[str, tuple[Callable[..., Any], tuple[int, ...], int]] = {
            "relu": (F.relu, (source,), width),
            "scalar": (lambda x: x * 0.5 + 1, (source,), width),
            "sum": (lambda x, y: x + y, (source, other), width),
            "product": (torch.mul, (source, other), width),
            "concatenation": (lambda x, y: torch.cat([x, y], 1), (source, other), width + widths[other]),
            "every second": (lambda x: x[:, ::2], (source,), -(-width // 2)),
            "mean of channels": (lambda x: x.mean(1, keepdim=True), (source,), 1),
        }
        function, sources, made = functions[kind]
        self.calls.append((function, sources))
        return made

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for function, sources in self.calls:
            values.append(function(*[values[i] for i in sources]))
        last = values[-1]
        return last if self.head is None else self.head(torch.flatten(F.adaptive_avg_pool2d(last, 2), 1))


def convolutions(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d)


def test_random_networks_compute_the_same() -> None:
    moved = {"inputs": 0, "outputs": 0}
    for seed in range(120):
        torch.manual_seed(seed)
        model = RandomNetwork(seed).double().eval()
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            continue
        for module in model.modules():
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if value.is_floating_point():
                    value.data.uniform_(0.5, 2)
            if isinstance(module, nn.Conv2d):
                module.weight.data *= torch.rand_like(module.weight) < 0.5
        x = torch.randn(2, model.inputs, 6, 6).double()
        with torch.no_grad():
            expected = model(x)
            for kind, reorder in (("inputs", reorder_inputs), ("outputs", reorder_channels)):
                other = copy.deepcopy(model)
                moved[kind] += len(reorder(other, convolutions).applied)
                torch.testing.assert_close(other(x), expected, rtol=1e-9, atol=1e-9, msg=f"seed {seed}, {kind}")
    assert min(moved.values()) > 30


def test_sums_of_different_channels_stay() -> None:
    """A map of one channel is added to all of eight."""

    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many, self.one, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.many(x) + self.one(x))

    spaces = ChannelSpaces(Broadcast())
    for space in (spaces.written_by("many"), spaces.written_by("one")):
        assert "joined with another in 'add' that has other channels" in space.reason
    assert "joins different channels" in spaces.read_by("last").reason
    assert spaces.read_by("many").reason == "it is the model's input"
