"""Sensitivity: what a model loses when one layer alone is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.criteria import LayerwisePruning, check_sparsity
from numbasparse.pruning.layers import Layer, LayerFilter, select_layers
from numbasparse.pruning.masks import compute_masks, set_masked

Evaluate = Callable[[nn.Module], Any]
"""``model -> number``, higher is better; called in eval mode without gradients."""


def measure_sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    sparsities: Sequence[float],
    *,
    vector: int = 1,
    filter: LayerFilter | None = None,
) -> dict[str, dict[float, float]]:
    """Measure what each layer's pruning costs, one layer and one sparsity at a time, without retraining.

    Parameters
    ----------
    model : nn.Module
        As before when this returns or raises.
    evaluate : callable
        ``model -> number``, higher is better: an accuracy, or minus a loss.
    sparsities : sequence of float
        In [0, 1).
    vector : {1, 2, 4, 8, 16}
        Granularity.
    filter : callable, optional
        Chooses the layers; ``default_filter`` if not given.

    Returns
    -------
    dict of str to dict of float to float
        ``{layer: {sparsity: value of the model as it is - value with the layer pruned}}``, a table of losses for
        ``allocate_for_speed``.

    Raises
    ------
    ValueError
        If ``evaluate`` gives NaN or no number, or an argument is out of its range.
    """
    levels = [check_sparsity(value, "sparsities") for value in sparsities]
    layers = select_layers(model, filter)
    dense = evaluated(model, evaluate)
    return {
        name: {s: dense - evaluate_pruned(model, layer, s, vector, evaluate) for s in levels}
        for name, layer in layers.items()
    }


def evaluate_pruned(model: nn.Module, layer: Layer, sparsity: float, vector: int, evaluate: Evaluate) -> float:
    """Return a model's value with one layer pruned; its weight is put back."""
    config = LayerwisePruning({layer.name: sparsity}, vector)
    mask = compute_masks({layer.name: layer}, config, sparsity)
    kept = layer.weight.detach().clone()
    try:
        set_masked({layer.name: layer.weight}, mask)
        return evaluated(model, evaluate)
    finally:
        layer.weight.data.copy_(kept)


def evaluated(model: nn.Module, evaluate: Evaluate) -> float:
    """Return a model's value, evaluated in eval mode without gradients; the modes are put back.

    Raises
    ------
    ValueError
        If the value is NaN or infinite, or not a number.
    """
    with eval_mode(model), torch.no_grad():
        value = evaluate(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"evaluate must return a number (higher is better), got {value!r}") from None
    if not math.isfinite(value):
        raise ValueError(
            f"evaluate returned {value}: expected a finite number (higher is better); check its data and the model"
        )
    return float(value)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module's mode back."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
