"""First-order criterion: gradient times weight, over batches of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.criteria import ScopedPruning
from numbasparse.pruning.layers import Layer, Layers
from numbasparse.pruning.masks import masks_from_scores


@dataclass(frozen=True)
class FirstOrderPruning(ScopedPruning):
    """Set the weights to zero whose removal changes the loss least to first order, ``|gradient * weight|``.

    Use it with ``prune_with_data_``: the scores of all batches are added. Parameters and errors are those of
    `ScopedPruning`.

    Notes
    -----
    Source: Mozer and Smolensky, "Skeletonization", NIPS 1988; with several batches as in Molchanov, Mallya, Tyree,
    Frosio and Kautz, "Importance estimation for neural network pruning", CVPR 2019, arXiv 1906.10771.
    """

    def new_weights(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Iterable[Any],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Return the pruned weight of every layer; see ``prune_with_data_``."""
        scores = gradient_scores(model, dict(layers), batches, loss)
        with torch.no_grad():
            masks = masks_from_scores(layers, scores, self, self.sparsity)
            return {name: layer.weight.masked_fill(~masks[name], 0.0) for name, layer in layers.items()}


def gradient_scores(
    model: nn.Module, layers: Layers, batches: Iterable[Any], loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return ``sum over batches of |gradient * weight|`` of every layer; the weights' ``grad`` is not touched.

    Raises
    ------
    TypeError
        If a batch is not ``(inputs, targets)``.
    ValueError
        If there is no batch, a weight does not act on the loss, or a score is NaN or infinite.
    """
    weights = [layer.weight for layer in layers.values()]
    frozen = [name for name, layer in layers.items() if not layer.weight.requires_grad]
    if frozen:
        raise ValueError(
            f"the weight of layer {frozen[0]!r} has requires_grad=False: first-order scores need gradients"
        )
    sums = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    seen = False
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"first-order pruning needs batches of (inputs, targets), got {type(batch).__name__}")
        inputs, targets = (x.to(weights[0].device) for x in batch[:2])
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model(inputs), targets), weights, allow_unused=True)
        missing = [name for name, gradient in zip(layers, gradients, strict=True) if gradient is None]
        if missing:
            raise ValueError(f"the loss does not depend on layer {missing[0]!r}: let the filter leave it out")
        for total, gradient, weight in zip(sums, gradients, weights, strict=True):
            total += (gradient * weight.detach()).abs()
        seen = True
    if not seen:
        raise ValueError("batches has no batches: expected at least one of (inputs, targets)")
    for name, total in zip(layers, sums, strict=True):
        if not torch.isfinite(total).all():
            raise ValueError(f"gradients of layer {name!r} are NaN or infinite: check the data and the loss")
    return dict(zip(layers, sums, strict=True))
