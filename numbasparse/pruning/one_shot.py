"""Pruning at once: from the weights alone, or with data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from numbasparse.pruning.criteria import PruningConfig
from numbasparse.pruning.layers import Layer, LayerFilter, select_layers, weights_of
from numbasparse.pruning.masks import check_config, check_finite, compute_masks, mask_of, set_masked
from numbasparse.pruning.summary import PruningReport, count

Batch = Any
"""A Tensor of inputs, or a sequence ``(inputs, targets, ...)``."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs, targets) -> scalar``."""


class DataPruningConfig(Protocol):
    """What ``prune_with_data_`` asks of a config."""

    @property
    def sparsity(self) -> float:
        """Fraction of weights to set to zero, in [0, 1)."""

    def new_weights(
        self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        """Return the pruned weight of every layer; the model is as before when it returns or raises."""


def prune_(model: nn.Module, config: PruningConfig, filter: LayerFilter | None = None) -> PruningReport:
    """Prune a model at once and in place: set its least important weights to zero.

    No mask or hook is left on the model. Everything is checked and computed before the first weight changes:
    after an error the model is as it was. Every chosen layer keeps at least one vector, so ``scope="layer"``
    misses the sparsity in a layer with very few weights; the total of ``scope="global"`` is exact up to one vector.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    config : PruningConfig
        For example ``MagnitudePruning(sparsity=0.9, scope="global")``.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.

    Returns
    -------
    PruningReport
        Sparsity of the chosen layers.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen, a weight is NaN or infinite, or fewer weights than layers would be kept.
    """
    check_config(config)
    layers = select_layers(model, filter)
    masks = compute_masks(layers, config, config.sparsity)
    weights = weights_of(layers)
    set_masked(weights, masks)
    return count(weights)


def prune_with_data_(
    model: nn.Module,
    batches: Iterable[Batch],
    config: DataPruningConfig,
    filter: LayerFilter | None = None,
    *,
    loss: Loss = nn.functional.cross_entropy,
) -> PruningReport:
    """Prune a model at once and in place, with calibration data.

    The model runs in eval mode; its mode is put back. After an error the model is as it was.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    batches : iterable
        Calibration data, moved to the model's device: Tensors of inputs, or ``(inputs, targets)`` for
        configs that need a loss. A few hundred images are usual; one works too, with a warning where it leaves
        directions of the inputs unseen.
    config : DataPruningConfig
        ``OBSPruning(sparsity=0.9)`` or ``FirstOrderPruning(sparsity=0.9)``.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.
    loss : callable
        ``(outputs, targets) -> scalar``; used by first-order criteria only.

    Returns
    -------
    PruningReport
        Sparsity of the chosen layers.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen or one never runs, there is no batch, a weight, an input or a gradient is NaN or infinite,
        the sparsity would empty a layer, or a ``Pruner`` is at work on the model.
    """
    if isinstance(config, type) or not hasattr(config, "new_weights"):
        raise TypeError(
            f"config must be a config that uses data, like OBSPruning(sparsity=0.9), got {config!r}; "
            "for those that need none call prune_(model, config)"
        )
    layers = select_layers(model, filter)
    check_finite(layers)
    busy = [name for name, layer in layers.items() if mask_of(layer.module) is not None]
    if busy:
        raise ValueError(f"layer {busy[0]!r} is being pruned: call pruner.finish() or fold_masks(model) first")
    # A generator could be read once only, and some configs read the data several times.
    batches = list(batches) if isinstance(batches, Iterator) else batches
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        new = config.new_weights(model, layers, batches, loss)
    finally:
        for module, mode in modes.items():
            module.training = mode
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(new[name])
    return count(weights_of(layers))
