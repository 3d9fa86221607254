"""Exact k-means of numbers (one dimension)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_PLACES = 1 << 24
"""Most points times clusters: the table of the dynamic programme has an int32 for each (64 MiB)."""


def kmeans(values: NDArray[np.floating], k: int) -> NDArray[np.float32]:
    """Return the ``k`` centres that minimize the sum of squared distances to the nearest centre.

    Parameters
    ----------
    values : ndarray of float, (n,)
        Finite.
    k : int
        At least 1.

    Returns
    -------
    ndarray, float32, (m,)
        Centres, rising strictly; m is k, or the number of different values if there are fewer.

    Notes
    -----
    The optimum, not a local one: clusters of sorted numbers are intervals, and the best last cut of the first i
    numbers never moves left as i grows, so that dynamic programming with divide and conquer takes
    O(k n log n) for n different values (Wang and Song, "Ckmeans.1d.dp", The R Journal 2011; Gronlund et al.,
    "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017, arXiv 1701.07204). With more
    than 2**24 / k different values (a million at 4 bits), they are first joined into that many narrow intervals
    of equal width; cuts are then exact up to such a width.
    """
    different, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    if len(different) <= k:
        return different.astype(np.float32)
    weights = counts.astype(np.float64)
    # Squares of numbers far from zero would cancel: count from the middle.
    middle = float(np.average(different, weights=weights))
    points, weights = _joined(different - middle, weights, _MOST_PLACES // k)
    sums = _prefix(points * weights)
    cuts = _cuts()(_prefix(weights), sums, _prefix(points * points * weights), k)
    mass = _prefix(weights)
    centres = np.diff(sums[cuts]) / np.diff(mass[cuts]) + middle
    return np.unique(centres.astype(np.float32))


def _joined(points: NDArray[np.float64], weights: NDArray[np.float64], most: int) -> tuple[Any, Any]:
    """Points and weights, joined to at most ``most`` means of intervals of equal width."""
    if len(points) <= most:
        return points, weights
    width = (points[-1] - points[0]) / most
    place = np.minimum(((points - points[0]) / width).astype(np.int64), most - 1)
    mass = np.bincount(place, weights, most)
    used = mass > 0
    return np.bincount(place, weights * points, most)[used] / mass[used], mass[used]


def _prefix(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(values)))


@cache
def _cuts() -> Callable[..., NDArray[np.int64]]:
    """The dynamic programme, compiled when it is first needed."""
    import numba

    compiled: Any = numba.njit(cache=True, error_model="numpy")(_optimal_cuts)
    return compiled


def _optimal_cuts(
    mass: NDArray[np.float64], sums: NDArray[np.float64], squares: NDArray[np.float64], k: int
) -> NDArray[np.int64]:
    """Cut n points into k intervals of least squared error; returns the k + 1 bounds.

    The arguments are prefix sums, (n + 1,), of the points' weights, of weights times points and of weights times
    squared points. ``last[c, i]`` is where the last of c + 1 clusters of the first i points begins.
    """
    n = len(mass) - 1
    last = np.zeros((k, n + 1), np.int32)
    before = np.zeros(n + 1)
    for i in range(1, n + 1):
        before[i] = squares[i] - sums[i] * sums[i] / mass[i]
    cost = np.empty(n + 1)
    # Ranges still to be done: first and last i, first and last possible cut. Each halves the one it came from.
    stack = np.empty((128, 4), np.int64)
    for c in range(1, k):
        stack[0] = c + 1, n, c, n - 1
        depth = 1
        while depth:
            depth -= 1
            low, high, cut_low, cut_high = stack[depth]
            i = (low + high) // 2
            best, where = np.inf, cut_low
            for j in range(cut_low, min(cut_high, i - 1) + 1):
                part = sums[i] - sums[j]
                error = before[j] + squares[i] - squares[j] - part * part / (mass[i] - mass[j])
                if error < best:
                    best, where = error, j
            cost[i] = best
            last[c, i] = where
            if i < high:
                stack[depth] = i + 1, high, where, cut_high
                depth += 1
            if low < i:
                stack[depth] = low, i - 1, cut_low, where
                depth += 1
        before[c + 1 :] = cost[c + 1 :]
    cuts = np.empty(k + 1, np.int64)
    cuts[k] = n
    for c in range(k - 1, -1, -1):
        cuts[c] = last[c, cuts[c + 1]]
    return cuts
