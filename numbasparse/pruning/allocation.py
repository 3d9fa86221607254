"""Allocation: how many weights each layer keeps.

An allocation is a function ``(scores, sparsity) -> counts``: from the scores of every layer it says how many
weights each layer keeps. Which ones is then no question any more: the highest scores, and of equal scores the
one that comes first in the flat (C order) weight. No allocation leaves a layer without any weight, since an
empty layer cuts the network in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]
"""``({layer: scores}, sparsity) -> {layer: number of weights kept, at least 1}``."""


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights are left at ``sparsity`` (rounded to the nearest)."""
    return size - round(sparsity * size)


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Mark the ``keep`` highest scores.

    Parameters
    ----------
    scores : Tensor
        Any shape; no NaN.
    keep : int
        Number of entries to mark, 0 to ``scores.numel()``.

    Returns
    -------
    Tensor
        bool, shape of ``scores``, with exactly ``keep`` entries true. Of equal scores the first in C order are
        taken: a stable sort, because top-k breaks ties differently on each device.
    """
    if keep >= scores.numel():
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask.view(scores.shape)


def allocate_layer(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Give every layer the same sparsity, and at least one weight.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Scores of each layer, any shape.
    sparsity : float
        In [0, 1).

    Returns
    -------
    dict of str to int
        Weights kept in each layer.
    """
    return {name: max(1, kept_count(score.numel(), sparsity)) for name, score in scores.items()}


def allocate_global(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Rank the weights of all layers together.

    The best weight of each layer is kept first; the rest of the budget goes to the highest scores wherever
    they are. The total is exact. Of equal scores, those of earlier layers are kept.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Scores of each layer, any shape; dtypes and devices may differ.
    sparsity : float
        In [0, 1), of all layers together.

    Returns
    -------
    dict of str to int
        Weights kept in each layer.

    Raises
    ------
    ValueError
        If fewer weights are to be kept than there are layers.
    """
    sizes = [score.numel() for score in scores.values()]
    keep = kept_count(sum(sizes), sparsity)
    if keep < len(sizes):
        raise ValueError(
            f"sparsity {sparsity:g} keeps {keep} of {sum(sizes)} weights, but the {len(sizes)} chosen layers "
            "need at least one each: lower the sparsity or choose fewer layers"
        )
    device = next(iter(scores.values())).device
    ranked = torch.cat([_first_best(score).to(device) for score in scores.values()])
    kept = top_mask(ranked, keep).split(sizes)
    counts = torch.stack([part.sum() for part in kept]).tolist()
    return dict(zip(scores, counts, strict=True))


def _first_best(scores: Tensor) -> Tensor:
    """Return the flat scores with the best entry raised to infinity, so that it is always kept."""
    flat = scores.flatten().clone()
    flat[flat.argmax()] = torch.inf
    return flat


ALLOCATIONS: dict[str, Allocation] = {"global": allocate_global, "layer": allocate_layer}
"""The scopes a config can name."""
