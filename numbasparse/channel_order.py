"""An order of input channels in which a mask has at most two non-zeros among almost every four neighbours.

Sparse tensor cores multiply with such masks as they are; what is over two of a *quad* (four neighbouring channels, the
first of which is a multiple of four, of one output channel and tap) is a rest that costs extra.  The order of a layer's
input channels is free where whoever writes them can write them in any order: it is that of output channels of the layer
before.  Of random masks of 256 -> 256 channels of 3x3 the order found leaves 4 % of what was over two at 90 %
zeros, and nothing at 95 %.

Choosing among orders to lose little in an N:M form is known from Pool and Yu, "Channel permutations for N:M sparsity"
(NeurIPS 2021), who keep the largest weights by it; here nothing is lost, so that only counts matter.  The search is
threshold accepting (Dueck and Scheuer, Journal of Computational Physics 90, 1990): simulated annealing that takes every
step that is not worse by more than a falling threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.codegen.loops import compiled, population
from numbasparse.weight import SparseWeight

QUAD = 4
_MOST_SWAPS = 4_000_000
"""That are looked at: half a second for 512 channels of 512 x 3 x 3 weights on one core."""
_BROKEN = 3
"""A quad that breaks costs as much as so many non-zeros more: where a whole tile has no rest, kernels need not stop."""


def order_channels(weight: SparseWeight) -> NDArray[np.int64]:
    """Order of a weight's input channels that breaks few quads.

    Returns
    -------
    int64, (C,)
        The channel that comes first, and so on; those of each conv group stay together.  A weight whose dense form is
        ``w[:, order]`` (of one group) with an input ``x[:, order]`` gives what it gave before.
    """
    channels, r, s = weight.kernel_shape
    per_group = weight.k // weight.groups
    patterns = (weight.to_dense() != 0).reshape(weight.groups, per_group, channels, r * s)
    orders = [
        order_quads(np.moveaxis(own, 1, 0).reshape(channels, -1)) + number * channels
        for number, own in enumerate(patterns)
    ]
    return np.concatenate(orders)


def order_quads(patterns: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Order of channels in which few quads hold more than two of a row.

    Parameters
    ----------
    patterns : bool, (channels, rows)
        Where a channel is not zero; a row may be a tap of an output channel, of any layer that reads these channels.

    Returns
    -------
    int64, (channels,)
        Quads that hold too many come last, so that kernels meet them in few tiles.  Equal input gives equal output;
        where no order is found in which less is over two, it is the given one.

    Raises
    ------
    ValueError
        If ``patterns`` has not two dimensions.
    """
    if patterns.ndim != 2:
        raise ValueError(f"patterns must have two dimensions, channels and rows, got shape {patterns.shape}")
    channels = len(patterns)
    whole = -(-channels // QUAD) * QUAD
    bits = np.zeros((whole, max(1, -(-patterns.shape[1] // 64)) * 64), np.bool_)
    bits[:channels, : patterns.shape[1]] = patterns
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    order = np.arange(whole)
    left, before = compiled(_search)(words, order, channels, min(_MOST_SWAPS, 64 * channels**2), _BROKEN)
    if left.sum() >= before:
        return np.arange(channels)
    # The quad that is not full stays the last one.
    left[channels // QUAD :] = np.iinfo(np.int64).max
    return order.reshape(-1, QUAD)[np.argsort(left, kind="stable")].ravel()[:channels]


def over_two(patterns: NDArray[np.bool_]) -> int:
    """Count what is over two in quads of patterns (channels, rows) as they are."""
    channels, rows = patterns.shape
    whole = np.zeros((-(-channels // QUAD) * QUAD, rows), np.int64)
    whole[:channels] = patterns
    return int(np.maximum(whole.reshape(len(whole) // QUAD, QUAD, rows).sum(axis=1) - 2, 0).sum())


def _search(words: Any, order: Any, channels: int, swaps: int, broken: int) -> Any:
    """Swap the first ``channels`` places of an order until it is good; what is over two in each of its quads, and how
    much was at first.

    ``words`` are 64 rows each: uint64 (places, words).
    """

    def over(quad: Any) -> Any:
        a, b, c, d = order[4 * quad], order[4 * quad + 1], order[4 * quad + 2], order[4 * quad + 3]
        total = 0
        for w in range(words.shape[1]):
            both, one = words[a, w] & words[b, w], words[a, w] | words[b, w]
            other_both, other_one = words[c, w] & words[d, w], words[c, w] | words[d, w]
            # Three or four of the four; and those that have four once more.
            total += population(both & other_one | other_both & one) + population(both & other_both)
        return total

    quads = len(order) // 4
    left = np.empty(quads, np.int64)
    for quad in range(quads):
        left[quad] = over(quad)
    before = total = left.sum()
    # A swap changes two quads by about the square root of what they hold.
    highest = 0.7 * np.sqrt(total / max(1, quads))
    state = np.uint64(0x9E3779B97F4A7C15)
    for number in range(swaps):
        if total == 0:
            break
        # xorshift64* (Vigna, ACM TOMS 42, 2016): equal on every machine.
        state ^= state >> np.uint64(12)
        state ^= state << np.uint64(25)
        state ^= state >> np.uint64(27)
        drawn = state * np.uint64(0x2545F4914F6CDD1D)
        i = np.int64((drawn >> np.uint64(32)) % np.uint64(channels))
        j = np.int64((drawn & np.uint64(0xFFFFFFFF)) % np.uint64(channels))
        first, second = i // 4, j // 4
        if first == second or left[first] + left[second] == 0:
            continue
        order[i], order[j] = order[j], order[i]
        new_first, new_second = over(first), over(second)
        more = new_first + new_second - left[first] - left[second]
        bad = (1 if new_first > 0 else 0) + (1 if new_second > 0 else 0)
        bad -= (1 if left[first] > 0 else 0) + (1 if left[second] > 0 else 0)
        remaining = 1.0 - number / swaps
        if more + broken * bad <= highest * remaining * remaining:
            left[first], left[second] = new_first, new_second
            total += more
        else:
            order[i], order[j] = order[j], order[i]
    return left, before


_HELPERS = ("population",)
