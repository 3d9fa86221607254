"""The benchmark of pruning: jobs, results that survive an interruption, and the trainer."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import pruning_report
import pruning_train
from pruning_pool import Job, Pool, Results

from numbasparse.pruning import CubicSchedule, MagnitudePruning, Pruner
from numbasparse.quantization import CodebookQuantization, Quantizer


def count(job: Job, device: torch.device, emit: Any) -> None:
    for value in range(job.parameters["n"]):
        emit({"value": value, "at": time.time()})


def fail(job: Job, device: torch.device, emit: Any) -> None:
    emit({"value": 0})
    raise ValueError("as planned")


def die(job: Job, device: torch.device, emit: Any) -> None:
    os._exit(7)


def sleep(job: Job, device: torch.device, emit: Any) -> None:
    emit({"value": 1})
    time.sleep(60)


def values(results: Results, name: str) -> list[int]:
    return [row["value"] for row in results.rows if row["job"] == name]


def test_jobs_fail_alone_and_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    jobs = [
        Job("late", count, {"n": 1}, after=("dies",)),
        Job("dies", die),
        Job("fails", fail),
        Job("counts", count, {"n": 3}),
    ]
    results = Results(path, {"run": 0})
    assert Pool(["cpu"], results, 120.0).run(jobs) == ["dies", "fails"]
    assert (values(results, "counts"), values(results, "late"), values(results, "fails")) == ([0, 1, 2], [0], [0])
    assert "exit code 7" in results.errors["dies"]
    assert "ValueError: as planned" in results.errors["fails"]

    again = Results(tmp_path / "other.json", {"run": 1}, earlier=path)
    assert Pool(["cpu"], again, 120.0).run([Job("fails", count, {"n": 2}), jobs[3]]) == []
    assert (values(again, "counts"), values(again, "fails")) == ([0, 1, 2], [0, 1])
    assert {row["run"] for row in again.rows if row["job"] == "counts"} == {0}
    content = json.loads((tmp_path / "other.json").read_text())
    assert content["runs"] == [{"run": 0}, {"run": 1}]
    assert content["rows"] == again.rows


def test_time_is_up(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {})
    pool = Pool(["cpu"], results, 120.0)

    def soon(job: Job, row: dict[str, Any], add: Any = results.row) -> None:
        add(job, row)
        pool.end = time.monotonic()

    results.row = soon  # type: ignore[method-assign]
    assert pool.run([Job("sleeps", sleep), Job("waits", count, {"n": 1})]) == ["sleeps", "waits"]
    assert values(results, "sleeps") == [1]
    assert not any(worker.process.is_alive() for worker in pool.workers)


def images(count: int = 64) -> pruning_train.Images:
    """Two classes that a mean tells apart."""
    torch.manual_seed(0)
    y = torch.arange(count) % 2
    return pruning_train.Images(torch.randn(count, 1, 28, 28) + 2.0 * y.view(-1, 1, 1, 1), y)


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 8, 3, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 2))


RECIPE = pruning_train.Recipe(lr=0.1, batch=16)


def test_training_learns_prunes_and_quantizes() -> None:
    data, model = images(), network()
    pruner = Pruner(model, MagnitudePruning(0.75), CubicSchedule(2, 10, every=2))
    pruner.begin()
    loss = pruning_train.train(model, data, epochs=6, recipe=RECIPE, pruner=pruner)
    assert pruner.finish().sparsity == 0.75
    assert loss < 0.5
    assert pruning_train.accuracy(model, data, batch=50) == 1.0

    quantizer = Quantizer(model, CodebookQuantization(2))
    quantizer.begin()
    pruning_train.train(model, data, epochs=1, steps=2, recipe=RECIPE, quantizer=quantizer, teacher=network())
    (layer,) = quantizer.finish().layers
    weight = model[3].weight
    assert len(weight.unique()) <= 5
    assert (weight == 0).float().mean() >= 0.75
    assert layer.bits == 2


def test_divergence_is_an_error() -> None:
    data = images()
    data.x[:] = torch.nan
    with pytest.raises(RuntimeError, match="training diverged: the mean loss of the last epoch is nan"):
        pruning_train.train(network(), data, epochs=1, recipe=RECIPE)


def test_learning_rate_is_a_triangle() -> None:
    rates = [pruning_train.triangle(done, 0.25) for done in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert pruning_train.triangle(0.25, 0.0) == 0.75


def test_report_says_what_was_reached(tmp_path: Path) -> None:
    def row(sparsity: float, value: float, **more: Any) -> dict[str, Any]:
        common = {"group": "core", "network": "vgg16", "judged_by": "test", "sparsity": sparsity, "accuracy": value}
        return {**common, "method": "longer", "epochs": 30, **more}

    rows = [row(0.0, 0.95), row(0.0, 0.94), row(0.0, 0.5, method="dense")]
    rows += [row(0.9, 0.944, method="codebook, retrained", quantization="codebook", bits=4)]
    rows += [row(0.98, 0.942, method="codebook, retrained", quantization="codebook", bits=4)]
    # A shorter training of a sparsity that has a longer one.
    rows += [row(0.9, 0.3, method="codebook, retrained", quantization="codebook", bits=4, epochs=5)]
    assert pruning_report.trainings(rows, "core") == [30]
    # A longer one, of one sparsity only.
    more = [row(0.98, 0.95, epochs=50), row(0.0, 0.95, epochs=50)]
    assert pruning_report.trainings(rows + more, "core") == [30, 50]
    assert {r["epochs"] for r in pruning_report.widest(rows + more, "core")} == {30}
    assert pruning_report.spread([0.95, 0.94]) == "94.50 ± 0.71 (2)"
    first, second = pruning_report.aims(rows)
    assert "-0.10 points" in first
    assert first.endswith("NOT reached")
    assert "-0.30 points" in second
    assert second.endswith(": reached")
    lines = pruning_report.networks(rows)
    assert any(line.startswith("| dense | 50.00 (1) | 94.50 ± 0.71 (2) |") for line in lines)
    pruning_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_can_be_reported() -> None:
    content = json.loads((pruning_report.RESULTS / "pruning.json").read_text())
    assert len(pruning_report.report(content)) > 10
