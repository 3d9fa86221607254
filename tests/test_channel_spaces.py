"""Which layers must agree on an order of channels: random networks compute the same when their channels have moved."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
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
        kind = draw.choice([*modules, *["convolution"] * 3, "relu", "scalar", "sum", "sum", *["concatenation"] * 2])
        if draw.random() < 0.1:
            kind = draw.choice(["product", "every second", "mean of channels"])
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
    ((last, offset),) = spaces.read_by("last")
    assert offset == 0
    assert "joins different channels" in last.reason
    assert [space.reason for space, _ in spaces.read_by("many")] == ["it is the model's input"]


class Concatenated(nn.Module):
    """Two layers' channels side by side; those of the second are an output of the model too, if ``both``."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 1)
        self.norm, self.last, self.head = nn.BatchNorm2d(20), nn.Conv2d(20, 6, 3), nn.Linear(4 * 20, 5)

    def forward(self, x: Tensor) -> Any:
        right = self.right(x)
        x = F.relu(self.norm(torch.cat([self.left(x), right], dim=1)))
        features = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))
        return (self.last(x), features, right) if self.both else (self.last(x), features)


@pytest.mark.parametrize("both", [False, True])
def test_concatenations_move_part_by_part(both: bool) -> None:
    torch.manual_seed(0)
    model = Concatenated(both).double().eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.last.weight.data *= torch.rand_like(model.last.weight) < 0.5
    before, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        result = reorder_inputs(model, convolutions)
        torch.testing.assert_close(model(x), before(x), rtol=1e-9, atol=1e-9)
    order = result.applied["last"]
    assert sorted(order[:8].tolist()) == list(range(8))
    assert sorted(order[8:].tolist()) == list(range(8, 20))
    assert order[:8].tolist() != list(range(8))
    assert (order[8:].tolist() == list(range(8, 20))) == both
    assert torch.equal(model.last.weight, before.last.weight[:, order])
    assert torch.equal(model.norm.running_mean, before.norm.running_mean[order])
    assert torch.equal(model.left.weight, before.left.weight[order[:8]])
    spaces = ChannelSpaces(before)
    assert [offset for _, offset in spaces.read_by("last")] == [0, 8]
    assert spaces.read_by("last")[1][0].reason == ("its output is the model's output" if both else "")


def test_concatenations_that_are_not_of_known_channels_stay() -> None:
    """Of rows; and with the model's input, whose channels nobody writes."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(torch.cat([x, x], 2))

    class WithInput(Rows):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.first(x), x], 1))

    for model in (Rows(), WithInput()):
        assert "not known to treat channels alike" in ChannelSpaces(model).written_by("first").reason
