"""What ``numbasparse prune`` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
from torch import nn

from numbasparse.pruning import (
    ACDCSchedule,
    CubicSchedule,
    FitConfig,
    MagnitudePruning,
    OBSPruning,
    Pruner,
    SGDConfig,
    fit,
    print_report,
    prune_,
    prune_with_data_,
    recalibrate_batch_norm_,
    reorder_inputs,
)


@dataclass(frozen=True)
class Retraining:
    """The command's options for pruning with retraining."""

    schedule: str
    epochs: int
    lr: float
    device: str
    checkpoint: str | None


def prune_at_once(model: nn.Module, config: MagnitudePruning) -> None:
    """Prune in place and print the report."""
    print_report(prune_(model, config))


def reorder_and_report(model: nn.Module) -> None:
    """Order input channels in place, and print what became of every layer."""
    result = reorder_inputs(model)
    click.echo(f"input channels of {len(result.applied)} layers re-ordered")
    for name, reason in result.reasons.items():
        click.echo(f"{name or '(model)'} left: {reason}")


def prune_with_calibration(model: nn.Module, batches: Any, config: OBSPruning, device: str) -> None:
    """Prune in place with data and no retraining, measure batch statistics anew, and print the report."""
    batches = _opened(batches)
    model.to(device)
    report = prune_with_data_(model, batches, config)
    recalibrate_batch_norm_(model, batches)
    model.to("cpu")
    print_report(report)


def prune_with_retraining(model: nn.Module, batches: Any, config: MagnitudePruning, options: Retraining) -> None:
    """Prune in place while retraining, and print the report."""
    batches = _opened(batches)
    try:
        steps = len(batches) * options.epochs
    except TypeError:
        raise TypeError(
            f"the training batches must have a length (a list or a DataLoader), got {type(batches).__name__}"
        ) from None
    pruner = Pruner(model, config, schedule=_schedule(options.schedule, steps))
    pruner.begin()
    training = FitConfig(options.epochs, optimizer=SGDConfig(lr=options.lr), checkpoint=options.checkpoint)
    fit(model, batches, training, pruner=pruner, device=options.device)
    report = pruner.finish()
    model.to("cpu")
    print_report(report)


def _opened(batches: Any) -> Any:
    """Return the batches, calling a function that makes them."""
    return batches() if callable(batches) and not hasattr(batches, "__iter__") else batches


def _schedule(name: str, steps: int) -> CubicSchedule | ACDCSchedule:
    """Return a schedule over so many steps: sparsity rises over the first half, or alternates up to 85 %."""
    if name == "acdc":
        phase = max(1, steps // 20)
        return ACDCSchedule(steps // 10, max(1, steps * 85 // 100, steps // 10 + 1), phase, phase)
    return CubicSchedule(begin_step=0, end_step=max(1, steps // 2), every=max(1, steps // 100))
