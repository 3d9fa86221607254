"""Speed-aware allocation: the sparsity of each layer, from tables of times and losses.

Tables are plain data, ``{layer: {sparsity: value}}``: times as a tuner measured them (``autotune.time_tables``), losses
as ``measure_sensitivity`` or anything else gives them; both add up over layers.

Source: Frantar and Alistarh, "SPDY: accurate pruning with speedup guarantees", ICML 2022, arXiv 2201.13096, section
3.2 (dynamic programming over a discretised budget).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numbasparse.pruning.criteria import check_sparsity

Table = Mapping[str, Mapping[float, float]]
"""``{layer: {sparsity: value}}``."""


@dataclass(frozen=True)
class SpeedAllocation:
    """Chosen sparsities; give them to ``LayerwisePruning``.

    Attributes
    ----------
    sparsities : dict of str to float
        Sparsity of every layer of the tables.
    time, loss : float
        Their sums over layers, in the tables' units.
    """

    sparsities: dict[str, float]
    time: float
    loss: float


def allocate_for_speed(
    times: Table, losses: Table, *, max_loss: float | None = None, max_time: float | None = None, bins: int = 10_000
) -> SpeedAllocation:
    """Choose every layer's sparsity: least time within a loss, or least loss within a time.

    Parameters
    ----------
    times, losses : mapping of str to mapping of float to float
        Of the same layers at the same sparsities. Times are not negative; losses may be (pruning that helps), and
        infinite ones are never chosen.
    max_loss, max_time : float
        Exactly one of them: the budget that the sum over layers may not exceed.
    bins : int
        Parts that the budget is cut into. What a choice uses is rounded up to whole parts, so the budget is always
        kept; the result is the best among choices whose rounded use fits, and off from the true best by at most one
        part per layer.

    Raises
    ------
    ValueError
        If the tables differ in layers or sparsities, hold bad numbers, or no choice fits the budget.

    Notes
    -----
    Time ``O(layers * sparsities * bins)``.
    """
    if (max_loss is None) == (max_time is None):
        raise ValueError(f"give exactly one of max_loss and max_time, got {max_loss!r} and {max_time!r}")
    budget, what = (max_loss, "max_loss") if max_loss is not None else (max_time, "max_time")
    if budget is None or not math.isfinite(budget):
        raise ValueError(f"{what} must be finite, got {budget!r}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an int of 1 or more, got {bins!r}")
    options = _options(times, losses)
    cost, use = (times, losses) if max_loss is not None else (losses, times)
    chosen = _choose(
        [np.array([cost[name][s] for s in levels]) for name, levels in options.items()],
        [np.array([use[name][s] for s in levels]) for name, levels in options.items()],
        budget,
        bins,
        what,
    )
    sparsities = {name: levels[index] for (name, levels), index in zip(options.items(), chosen, strict=True)}
    return SpeedAllocation(
        sparsities,
        math.fsum(times[name][s] for name, s in sparsities.items()),
        math.fsum(losses[name][s] for name, s in sparsities.items()),
    )


def _options(times: Table, losses: Table) -> dict[str, list[float]]:
    """Return the sparsities of every layer that may be chosen, ascending."""
    if not times:
        raise ValueError("times has no layers")
    if set(times) != set(losses):
        odd = sorted(set(times) ^ set(losses))
        raise ValueError(f"times and losses must have the same layers, but only one of them has {', '.join(odd)}")
    options = {}
    for name in times:
        if set(times[name]) != set(losses[name]):
            raise ValueError(
                f"times and losses of layer {name!r} must have the same sparsities, got {sorted(times[name])} and "
                f"{sorted(losses[name])}"
            )
        for sparsity, time in times[name].items():
            check_sparsity(sparsity, f"sparsity of {name!r}")
            if not (math.isfinite(time) and time >= 0) or math.isnan(losses[name][sparsity]):
                raise ValueError(
                    f"layer {name!r} at sparsity {sparsity:g} needs a time that is finite and not negative and a loss "
                    f"that is not NaN, got {time!r} and {losses[name][sparsity]!r}"
                )
        options[name] = sorted(s for s in times[name] if math.isfinite(losses[name][s]))
        if not options[name]:
            raise ValueError(f"layer {name!r} has no sparsity of finite loss: include 0.0, the dense layer")
    return options


def _choose(
    costs: Sequence[NDArray[np.float64]],
    uses: Sequence[NDArray[np.float64]],
    budget: float,
    bins: int,
    what: str,
) -> list[int]:
    """Return the option of each layer: least total cost, total use within the budget."""
    # Each layer uses at least its least option: only what is above counts, and may not be negative.
    least = math.fsum(float(use.min()) for use in uses)
    spare = budget - least
    if spare < 0:
        raise ValueError(f"{what}={budget:g} cannot be met: the tables reach {least:g} at the least")
    parts = [_in_parts(use - use.min(), spare, bins) for use in uses]
    # best[b]: least cost of the layers so far that use exactly b parts.
    best = np.full(bins + 1, np.inf)
    best[0] = 0.0
    picks = np.zeros((len(costs), bins + 1), np.int32)
    for layer, (cost, part) in enumerate(zip(costs, parts, strict=True)):
        reached = np.full(bins + 1, np.inf)
        for option in range(len(cost)):
            if part[option] > bins:
                continue
            with_it = np.full(bins + 1, np.inf)
            with_it[part[option] :] = best[: bins + 1 - part[option]] + cost[option]
            better = with_it < reached
            reached[better], picks[layer, better] = with_it[better], option
        best = reached
    # Of equal costs the one that uses least.
    at = int(best.argmin())
    chosen = []
    for layer in reversed(range(len(costs))):
        option = int(picks[layer, at])
        chosen.append(option)
        at -= int(parts[layer][option])
    return chosen[::-1]


def _in_parts(use: NDArray[np.float64], spare: float, bins: int) -> NDArray[np.int64]:
    """Return uses in parts of the budget, rounded up; one beyond it where they are more than all."""
    if spare == 0.0:
        return np.where(use > 0, bins + 1, 0).astype(np.int64)
    # Values that are whole parts up to rounding errors stay so.
    parts = np.ceil(np.minimum(use / spare * bins, bins + 1) - 1e-9)
    return parts.astype(np.int64)
