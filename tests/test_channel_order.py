"""The order of input channels that breaks few quads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbasparse import SparseWeight
from numbasparse.channel_order import order_channels, order_quads, over_two


def counted(patterns: np.ndarray) -> int:
    """What is over two, counted one by one."""
    return sum(
        max(0, int(patterns[c : c + 4, row].sum()) - 2)
        for c in range(0, len(patterns), 4)
        for row in range(patterns.shape[1])
    )


@given(st.integers(1, 24), st.integers(0, 70), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_it_is_an_order_and_not_worse(channels: int, rows: int, density: float, seed: int) -> None:
    patterns = np.random.default_rng(seed).random((channels, rows)) < density
    order = order_quads(patterns)
    assert sorted(order.tolist()) == list(range(channels))
    assert over_two(patterns) == counted(patterns)
    assert counted(patterns[order]) <= counted(patterns)
    assert np.array_equal(order_quads(patterns), order)


@pytest.mark.parametrize(
    ("channels", "rows", "density", "share"),
    [(64, 576, 0.2, 0.5), (128, 1152, 0.1, 0.1), (256, 2304, 0.05, 0.0), (100, 900, 0.05, 0.0)],
)
def test_random_masks_lose_most_of_their_rest(channels: int, rows: int, density: float, share: float) -> None:
    patterns = np.random.default_rng(0).random((channels, rows)) < density
    before = counted(patterns)
    assert before > 10
    assert counted(patterns[order_quads(patterns)]) <= share * before


def test_dense_channels_are_spread() -> None:
    """Sixteen channels that are always there, one behind another, and 48 that are never."""
    patterns = np.zeros((64, 40), bool)
    patterns[8:24] = True
    assert counted(patterns[order_quads(patterns)]) == 0
    # Nothing helps where all are dense; and four of a kind are no worse than before.
    assert np.array_equal(order_quads(np.ones((16, 9), bool)), np.arange(16))


def test_what_is_left_comes_last() -> None:
    """Of 32 channels twelve are dense in some rows, so that quads must break; those are the last ones."""
    rng = np.random.default_rng(1)
    patterns = rng.random((32, 300)) < 0.02
    patterns[:20, :4] = True
    ordered = patterns[order_quads(patterns)]
    broken = [counted(ordered[c : c + 4]) > 0 for c in range(0, 32, 4)]
    assert 0 < sum(broken) < 8
    assert broken == sorted(broken)


def test_channels_of_a_group_stay_together() -> None:
    rng = np.random.default_rng(2)
    dense = rng.standard_normal((24, 16, 3, 3)) * (rng.random((24, 16, 3, 3)) < 0.3)
    order = order_channels(SparseWeight.from_dense(dense.astype(np.float32), groups=2))
    assert sorted(order[:16].tolist()) == list(range(16))
    assert sorted(order[16:].tolist()) == list(range(16, 32))
    own = (dense[12:] != 0).transpose(1, 0, 2, 3).reshape(16, -1)
    assert counted(own[order[16:] - 16]) < counted(own)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels and rows, got shape \(3,\)"):
        order_quads(np.zeros(3, bool))
