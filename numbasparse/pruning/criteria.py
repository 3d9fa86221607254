"""Criteria: how much each weight matters, and the configs that name them.

A criterion is a function ``weight -> scores``: it takes a weight tensor and returns a tensor of the same
shape, larger where a weight matters more. Scores must be finite. Everything else (how many weights each
layer keeps, the masks, the schedule) is written against that function alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from numbasparse.pruning.allocation import ALLOCATIONS, Allocation

Criterion = Callable[[Tensor], Tensor]
"""``weight -> scores`` of the same shape, larger where the weight matters more."""

Scope = Literal["global", "layer"]


class PruningConfig(Protocol):
    """What ``prune_`` and ``Pruner`` ask of a config."""

    @property
    def sparsity(self) -> float:
        """Fraction of weights to set to zero, in [0, 1)."""

    @property
    def criterion(self) -> Criterion:
        """Which weights matter."""

    @property
    def allocation(self) -> Allocation:
        """How many weights each layer keeps."""


def magnitude(weight: Tensor) -> Tensor:
    """Score every weight by its absolute value.

    Parameters
    ----------
    weight : Tensor
        Any shape, any floating dtype.

    Returns
    -------
    Tensor
        ``abs(weight)``, same shape and dtype, detached from autograd.

    Notes
    -----
    Source: Han, Pool, Tran and Dally, "Learning both weights and connections for efficient neural
    networks", 2015, arXiv 1506.02626.
    """
    return weight.detach().abs()


def check_sparsity(value: object, what: str = "sparsity") -> float:
    """Return ``value`` as a float in [0, 1), or raise ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number in [0, 1), got {value!r} ({type(value).__name__})")
    if math.isnan(value) or not 0.0 <= value < 1.0:
        hint = f"; for {value:g} % pass {value / 100:g}" if 1.0 < value < 100.0 else ""
        raise ValueError(f"{what} must be in [0, 1), got {value!r}: it is the fraction of weights set to zero{hint}")
    return float(value)


@dataclass(frozen=True)
class MagnitudePruning:
    """Set the weights of smallest magnitude to zero.

    Parameters
    ----------
    sparsity : float
        Fraction of weights to set to zero, in [0, 1).
    scope : {"global", "layer"}
        ``"global"`` ranks the weights of all chosen layers together, so that layers with many small weights
        become sparser than others; ``"layer"`` gives every layer the same sparsity.

    Raises
    ------
    ValueError
        If ``sparsity`` is not a number in [0, 1) or ``scope`` is not known.
    """

    sparsity: float
    scope: Scope = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        if self.scope not in ALLOCATIONS:
            known = ", ".join(repr(name) for name in ALLOCATIONS)
            raise ValueError(f"scope must be one of {known}, got {self.scope!r}")

    @property
    def criterion(self) -> Criterion:
        return magnitude

    @property
    def allocation(self) -> Allocation:
        return ALLOCATIONS[self.scope]
