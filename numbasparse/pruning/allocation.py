"""Allocation: how many weights each layer keeps.

An allocation is a function ``(scores, sparsity) -> counts``: from the scores of every layer it says how many weights
each layer keeps. Which ones is then no question any more: the vectors of highest score, and of equal scores the one
that comes first in C order. No allocation leaves a layer without any weight, since an empty layer cuts the network in
two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numbasparse.pruning.vectors import VectorGrid


@dataclass(frozen=True)
class LayerScores:
    """What an allocation knows of a layer.

    Attributes
    ----------
    values : Tensor
        Score of every vector, (runs, columns); -inf for what is never kept, as where an earlier mask has pruned.
    grid : VectorGrid
        How the weight is cut into vectors.
    first, last : bool
        Whether the layer is the model's first convolution, and its last convolution or linear layer.
    """

    values: Tensor
    grid: VectorGrid
    first: bool = False
    last: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for length in self.grid.shape:
            size *= length
        return size

    @property
    def smallest(self) -> int:
        """Weights in the fullest vector: a layer that lives keeps at least so many."""
        return min(self.grid.vector, self.grid.group_rows)

    def without(self, vectors: Tensor) -> LayerScores:
        """Return the same with some vectors marked as never kept."""
        return replace(self, values=self.values.masked_fill(vectors, -torch.inf))

    def sizes(self) -> Tensor:
        """Return the weights in every vector, flat in C order."""
        return self.grid.sizes(self.values.device).expand(self.values.shape).flatten()


Allocation = Callable[[Mapping[str, LayerScores], float], dict[str, int]]
"""``({layer: scores}, sparsity) -> {layer: number of weights kept, at least one vector}``."""

LAST_LAYER_LIMIT = 0.8
"""Highest sparsity that uniform+ gives the last layer."""


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights are left at ``sparsity`` (rounded to the nearest)."""
    return size - round(sparsity * size)


def top_mask(scores: LayerScores, keep: int) -> Tensor:
    """Mark the vectors of highest score that hold at most ``keep`` weights together, and at least one vector.

    Returns
    -------
    Tensor
        bool, shape of the weight. Of equal scores the first in C order are taken: a stable sort, because top-k
        breaks ties differently on each device.
    """
    flat = scores.values.flatten()
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = scores.sizes()[order].cumsum(0) <= keep
    chosen[0] = True
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order] = chosen
    return scores.grid.expand(mask.view(scores.values.shape))


def allocate_layer(scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
    """Give every layer the same sparsity, and at least one vector.

    Parameters
    ----------
    scores : mapping of str to LayerScores
        Scores of each layer.
    sparsity : float
        In [0, 1).

    Returns
    -------
    dict of str to int
        Weights kept in each layer.
    """
    return {name: max(score.smallest, kept_count(score.size, sparsity)) for name, score in scores.items()}


def allocate_global(scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
    """Rank the vectors of all layers together.

    The best vector of each layer is kept first; the rest of the budget goes to the highest scores wherever they are.
    The total is exact up to one vector. Of equal scores, those of earlier layers are kept.

    Parameters
    ----------
    scores : mapping of str to LayerScores
        Scores of each layer; dtypes and devices may differ.
    sparsity : float
        In [0, 1), of all layers together.

    Returns
    -------
    dict of str to int
        Weights kept in each layer.

    Raises
    ------
    ValueError
        If not even one vector per layer may be kept.
    """
    keep = _total_kept(scores, sparsity)
    device = next(iter(scores.values())).values.device
    ranked = torch.cat([_first_best(score.values).to(device) for score in scores.values()])
    sizes = torch.cat([score.sizes().to(device) for score in scores.values()])
    order = torch.sort(ranked, descending=True, stable=True).indices
    chosen = torch.zeros_like(sizes)
    chosen[order] = torch.where(sizes[order].cumsum(0) <= keep, sizes[order], 0)
    parts = chosen.split([score.values.numel() for score in scores.values()])
    counts = torch.stack([part.sum() for part in parts]).tolist()
    return dict(zip(scores, counts, strict=True))


def _total_kept(scores: Mapping[str, LayerScores], sparsity: float) -> int:
    """Return the number of weights kept in all layers, or raise if it is too small for one vector each."""
    size = sum(score.size for score in scores.values())
    keep, least = kept_count(size, sparsity), sum(score.smallest for score in scores.values())
    if keep < least:
        one = "one each" if least == len(scores) else f"one vector each ({least} weights)"
        raise ValueError(
            f"sparsity {sparsity:g} keeps {keep} of {size} weights, but the {len(scores)} chosen layers "
            f"need at least {one}: lower the sparsity or choose fewer layers"
        )
    return keep


def _first_best(values: Tensor) -> Tensor:
    """Return the flat scores with the best entry raised to infinity, so that it is always kept."""
    flat = values.flatten().clone()
    flat[flat.argmax()] = torch.inf
    return flat


def allocate_lamp(scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
    """Rank the vectors of all layers together by their LAMP score.

    The square of a score is divided by the sum of the squares in its layer that are at least as large (layer-adaptive
    magnitude pruning). The best vector of a layer has LAMP score 1, so every layer lives.

    Parameters, returns and errors are those of `allocate_global`.

    Notes
    -----
    Source: Lee, Park, Mo, Ahn and Shin, "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021,
    arXiv 2010.07611, equation 2.
    """
    return allocate_global(
        {name: replace(score, values=_lamp(score.values)) for name, score in scores.items()}, sparsity
    )


def _lamp(values: Tensor) -> Tensor:
    flat = values.flatten()
    dead = torch.isneginf(flat)
    squares = flat.masked_fill(dead, 0.0).double().square()
    order = torch.sort(squares, descending=True, stable=True).indices
    # Of the sums over entries at least as large; the tiny number is for layers of zeros alone.
    # On the CPU, because a GPU adds floats in a new order each time: masks would not be the same again.
    sums = squares[order].cpu().cumsum(0).clamp_min(torch.finfo(torch.float64).tiny).to(squares.device)
    result = torch.empty_like(squares)
    result[order] = squares[order] / sums
    return result.masked_fill(dead, -torch.inf).view(values.shape)


def allocate_uniform_plus(scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
    """Give every layer the same sparsity, but keep the first convolution dense and the last layer above 20 %.

    The sparsity of the other layers is raised until the total is met.

    Parameters and returns are those of `allocate_global`.

    Raises
    ------
    ValueError
        If the other layers cannot make up for the first and the last.

    Notes
    -----
    Source: Gale, Elsen and Hooker, "The state of sparsity in deep neural networks", 2019, arXiv 1902.09574,
    section 5.
    """
    keep = _total_kept(scores, sparsity)
    density = 1.0 - sparsity
    free = {name for name, score in scores.items() if not score.first}
    counts = {name: float(score.size) for name, score in scores.items() if score.first}
    for _ in range(2):  # the second turn is for a last layer that the first would make too sparse
        size = sum(scores[name].size for name in free)
        if not size:
            break
        density = (keep - sum(counts.values())) / size
        ends = [name for name in free if scores[name].last and density < 1.0 - LAST_LAYER_LIMIT]
        if not ends:
            break
        counts.update({name: (1.0 - LAST_LAYER_LIMIT) * scores[name].size for name in ends})
        free.difference_update(ends)
    counts.update({name: density * scores[name].size for name in free})
    if any(counts[name] < scores[name].smallest for name in free) or sum(counts.values()) > keep + 0.5:
        raise ValueError(
            f"scope 'uniform+' cannot reach sparsity {sparsity:g}: the dense first convolution and the last layer at "
            f"{LAST_LAYER_LIMIT:.0%} leave too little for the other layers; lower the sparsity, use another scope or "
            "let the filter leave these layers out"
        )
    return _rounded(counts, scores, keep)


def allocate_erk(scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
    """Give each layer a density in proportion to ``(sum of its weight's dimensions) / (their product)``.

    Layers that this would make denser than dense are kept whole, and the others thinned until the total is met
    (Erdos-Renyi-Kernel).

    Parameters, returns and errors are those of `allocate_global`.

    Notes
    -----
    Source: Evci, Gale, Menick, Castro and Elsen, "Rigging the lottery: making all tickets winners", ICML 2020,
    arXiv 1911.11134, section 3.
    """
    keep = _total_kept(scores, sparsity)
    raw = {name: sum(score.grid.shape) / score.size for name, score in scores.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in scores if name not in dense]
        left = keep - sum(scores[name].size for name in dense)
        weight = sum(raw[name] * scores[name].size for name in free)
        scale = left / weight if free else 0.0
        full = [name for name in free if raw[name] * scale >= 1.0]
        if not full:
            break
        dense.update(full)
    counts = {name: score.size * (1.0 if name in dense else raw[name] * scale) for name, score in scores.items()}
    return _rounded(counts, scores, keep)


def _rounded(counts: Mapping[str, float], scores: Mapping[str, LayerScores], keep: int) -> dict[str, int]:
    """Round counts so that they add up to ``keep``: the largest fractions go up."""
    whole = {name: max(scores[name].smallest, int(count)) for name, count in counts.items()}
    rest = keep - sum(whole.values())
    for name in sorted(counts, key=lambda name: int(counts[name]) - counts[name]):
        if rest <= 0:
            break
        if whole[name] < scores[name].size:
            whole[name] += 1
            rest -= 1
    return whole


ALLOCATIONS: dict[str, Allocation] = {
    "global": allocate_global,
    "layer": allocate_layer,
    "uniform+": allocate_uniform_plus,
    "erk": allocate_erk,
    "lamp": allocate_lamp,
}
"""The scopes a config can name."""
