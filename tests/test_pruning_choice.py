"""Pruning: which sparsity each layer gets: sensitivity, search, speed-aware allocation; and the order of channels."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import (
    CHOSEN,
    SIZES,
    assert_same,
    batches,
    one_thread,  # noqa: F401
    put_nan,
    small_model,
    snapshot,
    zeros,
)
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning import (
    FitConfig,
    LayerwisePruning,
    MagnitudePruning,
    Pruner,
    SearchConfig,
    SGDConfig,
    allocate_for_speed,
    fine_tune,
    measure_sensitivity,
    prune_,
    reorder_channels,
    reorder_inputs,
    search_sparsity,
)
from numbasparse.pruning.layers import Layer
from numbasparse.pruning.reorder import block_columns, similar_order

TESTS = Path(__file__).resolve().parent


# Speed-aware allocation


def brute_force(cost: Any, use: Any, budget: float, bins: int) -> float:
    """Return the least cost of all choices whose use, rounded up to parts of the budget, fits."""
    least = sum(min(table.values()) for table in use.values())
    spare = budget - least
    best = math.inf
    for choice in itertools.product(*(sorted(table) for table in use.values())):
        parts, total = 0, 0.0
        for name, sparsity in zip(use, choice, strict=True):
            above = use[name][sparsity] - min(use[name].values())
            parts += math.ceil(above / spare * bins - 1e-9) if spare else (bins + 1) * (above > 0)
            total += cost[name][sparsity]
        if parts <= bins:
            best = min(best, total)
    return best


tables = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(-5, 40)), min_size=1, max_size=4),
        min_size=layers,
        max_size=layers,
    )
)


@settings(max_examples=150, deadline=None)
@given(values=tables, budget=st.integers(-10, 120), bins=st.sampled_from([1, 7, 50, 1000]), reverse=st.booleans())
def test_allocation_is_the_best_of_all(values: Any, budget: int, bins: int, reverse: bool) -> None:
    levels = [0.0, 0.5, 0.8, 0.9]
    times = {f"l{i}": {levels[j]: float(t) for j, (t, _) in enumerate(x)} for i, x in enumerate(values)}
    losses = {f"l{i}": {levels[j]: float(c) for j, (_, c) in enumerate(x)} for i, x in enumerate(values)}
    cost, use = (losses, times) if reverse else (times, losses)
    limit: Any = {"max_time": float(budget)} if reverse else {"max_loss": float(budget)}
    if sum(min(table.values()) for table in use.values()) > budget:
        with pytest.raises(ValueError, match="cannot be met: the tables reach"):
            allocate_for_speed(times, losses, bins=bins, **limit)
        return
    got = allocate_for_speed(times, losses, bins=bins, **limit)
    assert (got.loss if not reverse else got.time) <= budget + 1e-9
    assert (got.time if not reverse else got.loss) == pytest.approx(brute_force(cost, use, budget, bins), abs=1e-9)
    assert got.time == pytest.approx(sum(times[name][s] for name, s in got.sparsities.items()))


def test_allocation_with_fine_bins_is_the_true_best() -> None:
    random = np.random.default_rng(5)
    levels = [0.0, 0.5, 0.8, 0.9, 0.95]
    times = {f"l{i}": dict(zip(levels, np.sort(random.random(5))[::-1].tolist(), strict=True)) for i in range(5)}
    losses = {f"l{i}": dict(zip(levels, np.sort(random.random(5)).tolist(), strict=True)) for i in range(5)}
    best = math.inf
    for choice in itertools.product(levels, repeat=5):
        if sum(losses[f"l{i}"][s] for i, s in enumerate(choice)) <= 2.0:
            best = min(best, sum(times[f"l{i}"][s] for i, s in enumerate(choice)))
    got = allocate_for_speed(times, losses, max_loss=2.0, bins=200_000)
    assert got.time == pytest.approx(best)
    assert got.loss <= 2.0
    model: Any = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(5)))
    sparsities = {str(i): got.sparsities[f"l{i}"] for i in range(5)}
    result = prune_(model, LayerwisePruning(sparsities))
    assert {x.name: x.sparsity for x in result.layers} == pytest.approx(sparsities, abs=1e-3)


def test_an_infinite_loss_is_never_chosen() -> None:
    got = allocate_for_speed({"a": {0.0: 9.0, 0.9: 1.0}}, {"a": {0.0: 0.0, 0.9: math.inf}}, max_loss=5.0)
    assert got.sparsities == {"a": 0.0}


GOOD: Any = {"a": {0.0: 1.0, 0.5: 0.5}}


@pytest.mark.parametrize(
    ("times", "losses", "options", "text"),
    [
        (GOOD, GOOD, {}, "exactly one of max_loss and max_time"),
        (GOOD, GOOD, {"max_loss": 1.0, "max_time": 1.0}, "exactly one of max_loss and max_time"),
        (GOOD, GOOD, {"max_loss": math.nan}, "max_loss must be finite"),
        (GOOD, GOOD, {"max_time": 0.1}, "max_time=0.1 cannot be met: the tables reach 0.5"),
        (GOOD, GOOD, {"max_time": 1.0, "bins": 0}, "bins must be an int"),
        ({}, {}, {"max_loss": 1.0}, "times has no layers"),
        (GOOD, {"b": GOOD["a"]}, {"max_loss": 1.0}, "only one of them has a, b"),
        (GOOD, {"a": {0.0: 1.0}}, {"max_loss": 1.0}, "must have the same sparsities"),
        ({"a": {0.0: -1.0}}, {"a": {0.0: 1.0}}, {"max_loss": 1.0}, "needs a time that is finite and not negative"),
        ({"a": {1.0: 1.0}}, {"a": {1.0: 1.0}}, {"max_loss": 1.0}, r"sparsity of 'a' must be in \[0, 1\)"),
        ({"a": {0.5: 1.0}}, {"a": {0.5: math.inf}}, {"max_loss": 1.0}, "no sparsity of finite loss"),
    ],
)
def test_bad_tables(times: Any, losses: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        allocate_for_speed(times, losses, **options)


# Sensitivity and search


def kept_share(model: nn.Module) -> float:
    """A value that says which layer matters: the second one ten times as much."""
    first, second = (1.0 - z / size for z, size in zip(zeros(model), SIZES, strict=True))
    return 90.0 + first + 10.0 * second


def test_sensitivity_is_measured_one_layer_at_a_time() -> None:
    model = small_model()
    before = snapshot(model)
    got = measure_sensitivity(model, kept_share, [0.0, 0.5, 0.75])
    assert got["2"] == pytest.approx({0.0: 0.0, 0.5: 0.5, 0.75: 0.75})
    assert got["6"] == pytest.approx({0.0: 0.0, 0.5: 5.0, 0.75: 7.5})
    assert_same(model, before)
    assert model.training


LEVELS = SearchConfig(levels=(0.25, 0.5, 0.75))


def test_search_finds_what_the_drop_allows() -> None:
    model = small_model()
    lines: list[dict[str, Any]] = []
    result = search_sparsity(model, kept_share, 3.0, config=LEVELS, tell=lines.append)
    # 0.75 of the first layer and 0.25 of the second cost 0.75 + 2.5; 0.5 and 0.25 cost 3.0.
    assert result.sparsities in ({"2": 0.5, "6": 0.25}, {"2": 0.75, "6": 0.0})
    assert result.accuracy == pytest.approx(kept_share(model))
    assert result.accuracy >= result.baseline - 3.0
    assert result.finished
    assert zeros(model) == [round(result.sparsities[n] * s) for n, s in zip(CHOSEN, SIZES, strict=True)]
    assert [line["event"] for line in lines[:3]] == ["start", "sensitivity", "sensitivity"]
    assert lines[-1]["event"] == "end"
    assert sum(line["event"] == "round" for line in lines) == result.rounds
    kept = [line for line in lines if line.get("kept")]
    assert [line["sparsity"] for line in kept] == sorted(line["sparsity"] for line in kept)
    assert all(line["accuracy"] >= result.baseline - 3.0 for line in kept)


def test_search_without_any_drop_leaves_the_model() -> None:
    model = small_model()
    before = snapshot(model)
    result = search_sparsity(model, kept_share, config=LEVELS)
    assert result.sparsities == {"2": 0.0, "6": 0.0}
    assert result.accuracy == result.baseline
    assert_same(model, before)


def learnt_model() -> tuple[Any, Callable[[nn.Module], float]]:
    from numbasparse.pruning import fit

    model = small_model(seed=2)
    fit(model, batches(), FitConfig(25, SGDConfig(lr=0.05), progress=False))

    def evaluate(model: nn.Module) -> float:
        return -sum(float(F.cross_entropy(model(x), y).detach()) for x, y in batches())

    return model, evaluate


def test_search_retrains() -> None:
    model, evaluate = learnt_model()
    retrain = fine_tune(batches(), FitConfig(6, SGDConfig(lr=0.05), rate="linear", progress=False))
    plain = search_sparsity(learnt_model()[0], evaluate, 0.2, config=LEVELS)
    result = search_sparsity(model, evaluate, 0.2, retrain=retrain, config=LEVELS)
    assert result.report.sparsity >= plain.report.sparsity
    assert result.report.sparsity > 0.5
    assert evaluate(model.eval()) == pytest.approx(result.accuracy)
    assert "2.weight_mask" not in model.state_dict()


class Interrupted:
    """Counts the calls of a function and stops the search at one of them."""

    def __init__(self, function: Callable[..., Any], stop: int) -> None:
        self.function, self.stop, self.calls = function, stop, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.function(*arguments)


@pytest.mark.parametrize("stop", [1, 3, 7, 8, 9, 11, 13])
def test_a_stopped_search_goes_on(tmp_path: Path, stop: int) -> None:
    straight = small_model()
    whole = Interrupted(kept_share, 0)
    expected = search_sparsity(straight, whole, 3.0, config=LEVELS)
    model = small_model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        search_sparsity(model, Interrupted(kept_share, stop), 3.0, config=LEVELS, folder=tmp_path)
    assert_same(model, before)
    log = tmp_path / "search.jsonl"
    if log.exists():
        log.write_bytes(log.read_bytes() + b'{"event": "rou')  # a line that a kill cut off
    rest = Interrupted(kept_share, 0)
    result = search_sparsity(model, rest, 3.0, config=LEVELS, folder=tmp_path)
    assert result == expected
    assert_same(model, snapshot(straight))
    assert rest.calls < whole.calls or stop == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines].count("end") == 1
    # A finished search gives its result again, without an evaluation.
    again = small_model()
    assert search_sparsity(again, Interrupted(kept_share, 1), 3.0, config=LEVELS, folder=tmp_path) == expected
    assert_same(again, snapshot(straight))
    assert len(list(tmp_path.glob("round-*"))) == 1


KILLED = """
import sys, time
from pathlib import Path
from test_pruning_choice import *
def slow(model):
    time.sleep(0.15)
    return kept_share(model)
search_sparsity(small_model(), slow, 3.0, config=LEVELS, folder=Path(sys.argv[1]))
"""


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=TESTS, env=env)
    end = time.monotonic() + 100
    while not list(tmp_path.glob("round-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    model, straight = small_model(), small_model()
    expected = search_sparsity(straight, kept_share, 3.0, config=LEVELS)
    assert search_sparsity(model, kept_share, 3.0, config=LEVELS, folder=tmp_path) == expected
    assert_same(model, snapshot(straight))


def test_rounds_can_be_limited_and_the_search_taken_up(tmp_path: Path) -> None:
    model = small_model()
    part = search_sparsity(
        model, kept_share, 3.0, config=SearchConfig((0.25, 0.5, 0.75), max_rounds=1), folder=tmp_path
    )
    assert (part.rounds, part.finished) == (1, False)
    model = small_model()
    result = search_sparsity(model, kept_share, 3.0, config=LEVELS, folder=tmp_path)
    assert result == search_sparsity(small_model(), kept_share, 3.0, config=LEVELS)


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    search_sparsity(small_model(), kept_share, 3.0, config=LEVELS, folder=tmp_path)
    model = small_model(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="holds another search: its model was"):
        search_sparsity(model, kept_share, 3.0, config=LEVELS, folder=tmp_path)
    with pytest.raises(ValueError, match=r"its max_drop was 3.0, now it is 2.0"):
        search_sparsity(small_model(), kept_share, 2.0, config=LEVELS, folder=tmp_path)
    (tmp_path / "search.jsonl").write_text("no log\n")
    with pytest.raises(ValueError, match="is not the log of a search"):
        search_sparsity(model, kept_share, 3.0, config=LEVELS, folder=tmp_path)
    assert_same(model, before)


def fails_at(call: int, value: Any) -> Callable[[nn.Module], Any]:
    calls = itertools.count(1)

    def evaluate(model: nn.Module) -> Any:
        if next(calls) < call:
            return kept_share(model)
        if isinstance(value, Exception):
            raise value
        return value

    return evaluate


@pytest.mark.parametrize("call", [1, 4, 8, 10])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "evaluate returned nan: expected a finite number"),
        ("high", "evaluate must return a number"),
        (ValueError("no data"), "no data"),
        (None, "evaluate must return a number"),
    ],
)
def test_an_evaluate_that_fails_leaves_the_model_as_it_was(call: int, value: Any, text: str) -> None:
    model = small_model()
    model[3].eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        search_sparsity(model, fails_at(call, value), 5.0, config=LEVELS)
    assert_same(model, before)
    assert model.training
    assert not model[3].training


def test_a_retraining_that_fails_leaves_the_model_as_it_was() -> None:
    model = small_model()
    before = snapshot(model)

    def forgets(model: Any, pruner: Pruner) -> None:
        with torch.no_grad():
            model[2].weight.add_(1.0)

    with pytest.raises(RuntimeError, match=r"call pruner\.step"):
        search_sparsity(model, kept_share, 5.0, retrain=forgets, config=LEVELS)
    assert_same(model, before)

    def raises(model: Any, pruner: Pruner) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        search_sparsity(model, kept_share, 5.0, retrain=raises, config=LEVELS)
    assert_same(model, before)


def test_bad_arguments_of_a_search() -> None:
    model = small_model()
    for drop in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_drop must be finite and not negative"):
            search_sparsity(model, kept_share, drop)
    with pytest.raises(TypeError, match="must be callable"):
        search_sparsity(model, 0.9)  # type: ignore[arg-type]
    for levels in ((), (0.0, 0.5), (0.5, 0.5), (0.9, 0.5)):
        with pytest.raises(ValueError, match="levels must be ascending"):
            SearchConfig(levels)
    with pytest.raises(ValueError, match="max_rounds"):
        SearchConfig(max_rounds=0)
    with pytest.raises(ValueError, match="cannot be shared by the rounds"):
        fine_tune(batches(), FitConfig(1, checkpoint="x"))
    put_nan(model)
    with pytest.raises(ValueError, match="layer '6' has 1 NaN"):
        search_sparsity(model, kept_share)


# Order of channels


class Net(nn.Module):
    """A chain with everything that moves along, a residual block and a grouped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.activation = nn.PReLU(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.res = nn.Conv2d(12, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 4, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.second(self.activation(self.depthwise(x)))
        x = torch.relu(x + self.res(x))
        x = self.third(self.grouped(x).relu())
        x = torch.flatten(F.adaptive_avg_pool2d(torch.cumsum(F.silu(x), 1), 2) * 1.0, 1)
        return self.out(F.relu(self.head(x)))


class Chain(Net):
    """The same without what cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.second(self.activation(self.depthwise(x)))
        x = self.third(self.grouped(torch.relu(self.res(x))).relu())
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return self.out(F.relu(self.head(x)))


def whole_numbers(model: Any, zeros_share: float = 0.7) -> Any:
    """Fill a model with small whole numbers, so that all sums are exact."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=random))
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand(module.weight.shape, generator=random) > zeros_share)
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
                module.running_var.fill_(4.0)
                module.running_mean.copy_(torch.randint(-2, 3, module.running_mean.shape, generator=random))
            if isinstance(module, nn.PReLU):
                module.weight.copy_(torch.randint(-2, 3, module.weight.shape, generator=random))
    return model.eval()


def convolutions(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups != module.in_channels


def test_a_chain_is_reordered_to_the_same_bits() -> None:
    model = whole_numbers(Chain())
    x = torch.randint(-3, 4, (3, 4, 9, 9)).float()
    before, expected = snapshot(model), model(x)
    assert expected.abs().max() < 2**22, "sums must be exact"
    assert expected.unique().numel() > 4
    pruner = Pruner(model, MagnitudePruning(0.3), filter=convolutions)  # of weights, 70 % are zero anyway
    pruner.begin()
    result = reorder_channels(model, convolutions, vector=4)
    # "res" feeds a grouped layer, whose inputs cannot move freely.
    assert set(result.applied) == {"stem", "second", "grouped", "third"}
    assert set(result.left) == {"res"}
    assert "'grouped' (Conv2d), which cannot follow" in result.reasons["res"]
    assert "res: left" in str(result)
    assert torch.equal(model(x), expected)
    assert any(not torch.equal(order, torch.arange(len(order))) for order in result.applied.values())
    order = result.applied["stem"]
    assert torch.equal(model.stem.weight.detach(), before["stem.weight"][order])
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"][order])
    assert torch.equal(model.depthwise.bias.detach(), before["depthwise.bias"][order])
    # Channels of a group stay in it.
    assert result.applied["grouped"].view(2, 4).sort(1).values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    pruner.finish()
    assert torch.equal(model(x), expected)


def test_residuals_and_unknown_functions_are_left() -> None:
    model = whole_numbers(Net())
    x = torch.randint(-3, 4, (3, 4, 9, 9)).float()
    expected = model(x)
    result = reorder_channels(model, convolutions)
    assert set(result.applied) == {"stem", "grouped"}
    assert "'grouped' (Conv2d), which cannot follow" in result.reasons["second"]
    assert "'grouped' (Conv2d), which cannot follow" in result.reasons["res"]
    assert "'cumsum'" in result.reasons["third"]
    assert torch.equal(model(x), expected)
    for name, order in result.left.items():
        assert sorted(order.tolist()) == list(range(model.get_submodule(name).out_channels))


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else x


class Residual(nn.Module):
    """A stream that three layers write and three read, one of them with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 9, 3)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.second(F.relu(self.first(x)))))
        x = x * self.gate(F.adaptive_max_pool2d(x, 1))
        return self.head(torch.flatten(F.adaptive_max_pool2d(self.last(x), 1), 1))


def left_over(module: nn.Conv2d) -> int:
    """What is over two of four neighbouring input channels, counted one by one."""
    weight = module.weight.detach().numpy()
    fours = [weight[k, c : c + 4, r, s] for k, r, s in np.ndindex(len(weight), *weight.shape[2:])
             for c in range(0, weight.shape[1], 4)]  # fmt: skip
    return sum(max(0, np.count_nonzero(four) - 2) for four in fours)


def test_inputs_are_reordered_along_a_residual_stream() -> None:
    model = whole_numbers(Residual(), zeros_share=0.7)
    x = torch.randint(-3, 4, (2, 3, 7, 7)).float()
    before, expected = snapshot(model), model(x)
    assert expected.abs().max() < 2**22, "sums must be exact"
    assert expected.unique().numel() > 3
    kept = reorder_channels(copy.deepcopy(model), convolutions)
    assert "a residual sum" in kept.reasons["stem"]
    assert "a residual sum" in kept.reasons["second"]
    names = ("first", "second", "gate", "last")
    overs = {name: left_over(model.get_submodule(name)) for name in names}
    pruner = Pruner(model, MagnitudePruning(0.3), filter=convolutions)  # of weights, 70 % are zero anyway
    pruner.begin()
    result = reorder_inputs(model, convolutions)
    assert set(result.applied) == set(names)
    assert set(result.left) <= {"stem"}
    assert torch.equal(model(x), expected)
    assert sum(left_over(model.get_submodule(name)) for name in names) < 0.6 * sum(overs.values())
    # Whoever reads the stream has one order, and so has whoever writes it.
    order = result.applied["first"]
    assert torch.equal(order, result.applied["last"])
    assert not torch.equal(order, torch.arange(16))
    assert torch.equal(model.stem.weight.detach(), before["stem.weight"][order])
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"][order])
    assert torch.equal(model.last.weight.detach(), before["last.weight"][:, order])
    pruner.finish()
    assert torch.equal(model(x), expected)


def test_inputs_that_cannot_be_reordered_are_left() -> None:
    model = whole_numbers(Net(), zeros_share=0.4)
    x = torch.randint(-3, 4, (3, 4, 9, 9)).float()
    expected = model(x)
    result = reorder_inputs(model, convolutions)
    assert set(result.applied) == {"second"}
    assert result.reasons["stem"] == "it is the model's input"
    assert "'grouped' writes them in groups" in result.reasons["third"]
    assert "'grouped' (Conv2d), which cannot follow" in result.reasons["res"]
    assert torch.equal(model(x), expected)
    assert "torch.fx cannot trace" in reorder_inputs(Dynamic()).reasons["b"]
    thin = whole_numbers(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)), zeros_share=0.99)
    nothing = reorder_inputs(thin)
    assert not nothing.applied
    assert not nothing.left


def test_a_left_order_serves_an_epilogue() -> None:
    layer = whole_numbers(nn.Sequential(nn.Conv2d(4, 10, 3)))
    result = reorder_channels(layer)
    assert result.reasons["0"] == "its output is the model's output"
    order = result.left["0"]
    x = torch.randint(-3, 4, (2, 4, 5, 5)).float()
    rows = F.conv2d(x, layer[0].weight[order], layer[0].bias[order])
    out = torch.empty_like(rows)
    out[:, order] = rows
    assert torch.equal(out, layer(x))


def test_models_that_cannot_be_traced_or_share_are_left() -> None:
    result = reorder_channels(Dynamic())
    assert not result.applied
    assert "torch.fx cannot trace" in result.reasons["a"]
    twice: Any = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    twice[2].weight = twice[0].weight
    assert "shares a parameter" in reorder_channels(twice).reasons["0"]
    again = nn.Conv2d(4, 4, 1)
    assert "is called 2 times" in reorder_channels(nn.Sequential(again, again)).reasons["0"]
    with pytest.raises(ValueError, match="vector must be"):
        reorder_channels(small_model(), vector=0)


def test_similar_rows_become_neighbours() -> None:
    torch.manual_seed(0)
    kinds = (torch.rand(4, 3, 3, 3) < 0.3).float()
    layer = nn.Conv2d(3, 32, 3, bias=False)
    with torch.no_grad():
        layer.weight.mul_(kinds[torch.arange(32) % 4])  # rows of four patterns, one after the other
    record = Layer("", layer, False, False)
    mixed = block_columns(record, 8)
    order = similar_order(record, 8)
    assert sorted(order.tolist()) == list(range(32))
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order])
    assert block_columns(record, 8) == int(kinds.sum())
    assert mixed == 4 * int((kinds.sum(0) > 0).sum())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 12), vector=st.integers(1, 9), seed=st.integers(0, 5))
def test_order_is_a_permutation(rows: int, columns: int, vector: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows)
    prune_(layer, MagnitudePruning(0.5, "layer"), filter=lambda module, name: True)
    order = similar_order(Layer("", layer, False, False), vector)
    assert sorted(order.tolist()) == list(range(rows))
