"""Which layers run in CHWN: the minimum cut against every assignment there is."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.choices import Choice, Measured
from numbasparse.nn.layout_choice import Layer, choose_together, least_time
from numbasparse.nn.native import Tracer
from numbasparse.spec import ConvSpec

conversion: Any = importlib.import_module("numbasparse.nn.convert")  # the function has the same name

DENSE = Choice("cuda_dense", {"layout": "nchw", "precision": "strict"})
OTHER = Choice("cuda_dense", {"layout": "nhwc", "precision": "strict"})
CHWN = Choice("cuda_direct", {"batch": 32})
BYTES = 4 * 32 * 8 * 16 * 16
"""Of every tensor here."""


def layer(dense_us: float, native_us: float, conversion_us: float, other_us: float = 1.0) -> Layer:
    """A layer whose two conversions cost the same; the dense kernel of the other plain layout must not be counted."""
    spec = ConvSpec.create((32, 8, 16, 16), (8, 8, 3, 3), padding=1)
    assert 4 * spec.n * spec.c * spec.h * spec.w == BYTES
    return Layer(
        spec,
        [
            Measured(CHWN, native_us, native_us + 2 * conversion_us),
            Measured(DENSE, dense_us, dense_us),
            Measured(OTHER, other_us, other_us),
        ],
    )


class Chain(nn.Module):
    """Five convolutions: a residual block in the middle, a function at the end that wants plain input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        y = torch.relu(y + self.c(self.act(self.b(y))))
        return F.softmax(self.e(self.d(y)), 1)


NAMES = "abcde"
READS = {"a": "x", "b": "a", "c": "ba", "d": "c", "e": "d"}
"""Which results each layer gets to see: its input, and what it adds to its own."""


def energy(chwn: frozenset[str], outputs: frozenset[str], layers: dict[str, Layer], convert_us: float) -> float:
    """What an assignment costs: layers on the side of CHWN, and those whose results are handed on so."""
    cost = 0.0
    for name in NAMES:
        own, dense, _ = layers[name].measured
        cost += own.native_us if name in chwn else dense.native_us
        if name in outputs and name not in chwn:
            return float("inf")
        cost += convert_us * (name in chwn and name not in outputs)
        for source in READS[name]:
            if source in outputs and name not in chwn:
                return float("inf")
            cost += convert_us * (name in chwn and source not in outputs)
    return float("inf") if "e" in outputs else cost


def subsets() -> list[frozenset[str]]:
    return [frozenset(s) for size in range(6) for s in itertools.combinations(NAMES, size)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(10, 60), st.integers(10, 60)), min_size=5, max_size=5), st.integers(0, 30))
def test_equals_the_best_of_all(times: list[tuple[int, int]], convert_us: int) -> None:
    layers = {name: layer(dense, own, convert_us) for name, (dense, own) in zip(NAMES, times, strict=True)}
    model = Chain()
    together = least_time(Tracer().trace(model), dict(model.named_modules()), layers, "NCHW")
    chosen = together.choices
    assert set(chosen) == set(NAMES)
    chwn = frozenset(name for name, choice in chosen.items() if choice == CHWN)
    assert {choice.kernel for choice in chosen.values()} <= {CHWN.kernel, DENSE.kernel}
    assert all(choice in (CHWN, DENSE) for choice in chosen.values())
    found = min(energy(chwn, outputs, layers, convert_us) for outputs in subsets())
    best = min(energy(c, o, layers, convert_us) for c in subsets() for o in subsets() if o <= c)
    assert found == pytest.approx(best, abs=0.06)
    assert together.us == pytest.approx(best, abs=0.2)


def test_neighbours_share_what_one_would_pay() -> None:
    """Each alone would lose 5 us for its two conversions; five together win."""
    layers = {name: layer(30.0, 25.0, 5.0) for name in NAMES}
    model = Chain()
    modules = dict(model.named_modules())
    graph = Tracer().trace(model)
    assert least_time(graph, modules, layers, "NCHW").choices == dict.fromkeys(NAMES, CHWN)
    alone = least_time(graph, modules, {"c": layers["c"]}, "NCHW")
    assert alone.choices == {"c": DENSE}


def test_a_model_may_run_in_channels_last() -> None:
    """Where that saves more than it costs to convert the model's input."""
    model = Chain()
    arguments = Tracer().trace(model), dict(model.named_modules())
    for gain, plain, choice in ((0.5, "NCHW", DENSE), (2.0, "NHWC", OTHER)):
        layers = {name: layer(30.0, 100.0, 5.0, 30.0 - gain) for name in NAMES}
        together = choose_together(*arguments, layers, "NCHW")
        assert (together.plain, together.choices) == (plain, dict.fromkeys(NAMES, choice))
    kept = choose_together(*arguments, {name: layer(30.0, 100.0, 5.0, 40.0) for name in NAMES}, "NHWC")
    assert (kept.plain, kept.choices) == ("NHWC", dict.fromkeys(NAMES, OTHER))


def test_kernels_for_another_layout_pay_for_conversions() -> None:
    """Whatever they cost alone, which is in the layout that they like best."""
    model = Chain()
    arguments = Tracer().trace(model), dict(model.named_modules())
    spec, pixels = layer(1, 1, 1).spec, Choice("cuda_wgmma_nhwc", {"batch": 1})
    for conversion, choice in ((1.0, pixels), (9.0, DENSE)):
        measured = [
            Measured(pixels, 15.0, 15.0),
            Measured(DENSE, 30.0, 30.0),
            Measured(CHWN, 99.0, 99 + 2 * conversion),
        ]
        assert least_time(*arguments, {"c": Layer(spec, measured)}, "NCHW").choices == {"c": choice}
    # None was converted: what is usual.
    measured = [Measured(pixels, 15.0, 15.0), Measured(DENSE, 16.0, 16.0)]
    assert least_time(*arguments, {"c": Layer(spec, measured)}, "NCHW").choices == {"c": DENSE}


def test_what_is_not_decided() -> None:
    model = Chain()
    modules, graph = dict(model.named_modules()), Tracer().trace(model)
    assert least_time(graph, modules, {}, "NCHW").choices == {}
    plain = Layer(layer(1, 1, 1).spec, [Measured(DENSE, 10.0, 10.0)])
    assert least_time(graph, modules, {"a": plain}, "NCHW").choices == {"a": DENSE}
    # Only a kernel for CHWN was measured: the dense ones failed.
    only = Layer(plain.spec, [Measured(CHWN, 50.0, 60.0)])
    assert least_time(graph, modules, {"a": only}, "NCHW").choices == {"a": CHWN}

    class Twice(Chain):
        def forward(self, x: Tensor) -> Any:
            return self.a(self.a(x))

    model = Twice()
    graph = Tracer().trace(model)
    assert choose_together(graph, dict(model.named_modules()), {"a": layer(30.0, 10.0, 1.0)}, "NCHW").choices == {}


class Viewing(nn.Module):
    """What reads its tensors in the order of NCHW, or in any."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.conv, self.views = nn.Conv2d(8, 8, 3, padding=1), views

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(y.size(0), -1) if self.views else y.flatten(1)


@pytest.mark.parametrize(("views", "plain"), [(False, "NHWC"), (True, "NCHW")])
def test_channels_last_only_where_a_model_can(views: bool, plain: str) -> None:
    model, x = Viewing(views), torch.randn(32, 8, 16, 16)
    decisions = {"conv": conversion._Decision(False, "", measured=layer(30.0, 100.0, 5.0, 1.0))}
    found, made = conversion._decide_together(model, decisions, x)
    assert found == plain
    assert made["conv"].gives == plain
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) == (plain == "NHWC")
    assert model(x).shape == (32, 2048)
