"""What ``numbasparse prune`` does."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from numbasparse.pruning import CubicSchedule, MagnitudePruning, Pruner, SGDConfig, print_report, prune_, retrain


def _config(sparsity: float, scope: str) -> MagnitudePruning:
    return MagnitudePruning(sparsity=sparsity, scope=cast(Literal["global", "layer"], scope))


def prune_at_once(model: nn.Module, sparsity: float, scope: str) -> None:
    """Prune in place and print the report."""
    print_report(prune_(model, _config(sparsity, scope)))


def prune_gradually(
    model: nn.Module, batches: Any, sparsity: float, scope: str, *, epochs: int, lr: float, device: str
) -> None:
    """Prune in place over the first half of a retraining, and print the report."""
    if callable(batches) and not hasattr(batches, "__iter__"):
        batches = batches()
    try:
        steps = len(batches) * epochs
    except TypeError:
        raise TypeError(
            f"the training batches must have a length (a list or a DataLoader), got {type(batches).__name__}"
        ) from None
    schedule = CubicSchedule(begin_step=0, end_step=max(1, steps // 2), every=max(1, steps // 100))
    pruner = Pruner(model, _config(sparsity, scope), schedule=schedule)
    pruner.begin()
    retrain(model, batches, pruner=pruner, epochs=epochs, optimizer=SGDConfig(lr=lr), device=device)
    report = pruner.finish()
    model.to("cpu")
    print_report(report)
