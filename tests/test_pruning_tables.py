"""Time tables: made from tuned files, and measured; then used to choose sparsities."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")

import torch
from test_pruning import (
    one_thread,  # noqa: F401
    small_model,
    snapshot,
)
from torch import nn

from autotune import TunedModel, measure_time_tables, time_tables
from autotune.tuned import Chosen, Layer, these_versions, this_device
from numbasparse.pruning import allocate_for_speed, measure_sensitivity
from numbasparse.spec import ConvSpec


def layer(names: list[str], us: float, dense: float | None, h: int = 8) -> Layer:
    spec = ConvSpec.create((1, 4, h, h), (4, 4, 1, 1)).to_dict()
    choice = Chosen("dense", 1, {})
    return Layer(names, spec, 0.5, 50.0, 8, "x", choice, us, 0.0, dense, dense, None, 1, [])


def tuned(*layers: Layer, threads: int = 1) -> TunedModel:
    return TunedModel(layers, this_device(threads), these_versions())


def test_tables_from_tuned_files() -> None:
    files = {
        0.9: tuned(layer(["a", "b"], 2.0, 9.0), layer(["b"], 0.5, 1.0, 4), layer(["c"], 1.0, 5.0)),
        0.5: tuned(layer(["a", "b"], 5.0, 8.0), layer(["b"], 0.75, 1.5, 4), layer(["only here"], 1.0, 5.0)),
    }
    assert time_tables(files) == {"a": {0.0: 8.0, 0.5: 5.0, 0.9: 2.0}, "b": {0.0: 9.5, 0.5: 5.75, 0.9: 2.5}}
    # A file of the dense model goes before the dense figures of the others; without torch there are none.
    files[0.0] = tuned(layer(["a", "b"], 7.0, None))
    assert time_tables(files)["a"] == {0.0: 7.0, 0.5: 5.0, 0.9: 2.0}
    assert time_tables({0.9: tuned(layer(["a"], 2.0, None))}) == {"a": {0.9: 2.0}}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "tuned has no files"),
        ({90: tuned(layer(["a"], 1.0, 1.0))}, r"sparsities must be in \[0, 1\), got 90"),
        ({0.5: tuned(layer(["a"], 1.0, 1.0)), 0.9: tuned(layer(["b"], 1.0, 1.0))}, "no layer is in all"),
        ({0.5: tuned(layer(["a"], 1.0, 1.0)), 0.9: tuned(layer(["a"], 1.0, 1.0), threads=2)}, "different devices"),
    ],
)
def test_files_that_do_not_fit_together(files: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        time_tables(files)


def test_measured_tables_choose_sparsities() -> None:
    model = small_model()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the machine was busy")
        times = measure_time_tables(
            model, torch.randn(1, 3, 12, 12), [0.5, 0.95], vector=4, trials=2, threads=1, progress=False
        )
    assert list(times) == ["2", "6"]
    assert all(list(table) == [0.0, 0.5, 0.95] for table in times.values())
    assert all(us > 0 for table in times.values() for us in table.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def evaluate(model: nn.Module) -> float:
        return -float((model.get_submodule("2").get_parameter("weight") == 0).float().mean())

    losses = measure_sensitivity(model, evaluate, [0.0, 0.5, 0.95])
    chosen = allocate_for_speed(times, losses, max_loss=0.6)
    assert chosen.sparsities["2"] in (0.0, 0.5)
    assert chosen.time <= min(times["2"][0.0], times["2"][0.5]) + min(times["6"].values()) + 1e-9
