"""Criteria: how much each weight matters, and the configs that name them.

A criterion is a function ``weight -> scores``: it takes a weight tensor and returns a tensor of the same shape, larger
where a weight matters more. Scores must be finite. A vector of V weights scores their mean. Everything else (how many
weights each layer keeps, the masks, the schedule) is written against that function alone. Criteria that need data have
configs of their own, see `numbasparse.pruning.first_order` and `numbasparse.pruning.obs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from numbasparse.pruning.allocation import ALLOCATIONS, Allocation, LayerScores, kept_count
from numbasparse.pruning.vectors import check_vector

Criterion = Callable[[Tensor], Tensor]
"""``weight -> scores`` of the same shape, larger where the weight matters more."""

Scope = Literal["global", "layer", "uniform+", "erk", "lamp"]


class Placement(Protocol):
    """What is asked of a config once every weight has a score."""

    @property
    def sparsity(self) -> float:
        """Fraction of weights to set to zero, in [0, 1)."""

    @property
    def vector(self) -> int:
        """Output channels that share a column's fate."""

    @property
    def two_of_four(self) -> bool:
        """Whether at most two of every four neighbouring input channels are kept."""

    @property
    def allocation(self) -> Allocation:
        """How many weights each layer keeps."""


class PruningConfig(Placement, Protocol):
    """What ``prune_`` and ``Pruner`` ask of a config."""

    @property
    def criterion(self) -> Criterion:
        """Which weights matter."""


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


def check_scope(scope: object) -> None:
    """Raise ``ValueError`` if no allocation has this name."""
    if scope not in ALLOCATIONS:
        known = ", ".join(repr(name) for name in ALLOCATIONS)
        raise ValueError(f"scope must be one of {known}, got {scope!r}")


@dataclass(frozen=True)
class ScopedPruning:
    """What every config with a scope has in common; use one of the configs made from it.

    Parameters
    ----------
    sparsity : float
        Fraction of weights to set to zero, in [0, 1).
    scope : {"global", "layer", "uniform+", "erk", "lamp"}
        How the weights kept are spread over the chosen layers. ``"global"``: the highest scores wherever they are, so
        that layers with many small weights become sparser than others; ``"layer"``: every layer the same sparsity;
        ``"uniform+"``: so, but the model's first convolution dense and its last layer at most 80 % sparse;
        ``"erk"``: small layers denser, by their dimensions; ``"lamp"``: as global, by scores made comparable over
        layers. See `numbasparse.pruning.allocation` for the sources.
    vector : {1, 2, 4, 8, 16}
        Granularity: so many successive output channels share a column's fate. See `numbasparse.pruning.vectors`.
    two_of_four : bool
        Keep at most two of every four neighbouring input channels, at each place of the kernel. Sparse tensor cores
        are fastest with such masks, which at 90 % zeros differ in one kept weight of a hundred from others. On a
        schedule this is decided at its end, and the model may become a little sparser than asked for (by 0.1 points at
        90 %, 0.7 at 80 %), as it may with scopes that would keep more than half of a layer. The sparsity must be at
        least 0.5. See `numbasparse.pruning.vectors`.

    Raises
    ------
    ValueError
        If ``sparsity`` is not a number in [0, 1), or less than ``two_of_four`` leaves, or if ``scope``, ``vector`` or
        ``two_of_four`` is not known.
    """

    sparsity: float
    scope: Scope = "global"
    vector: int = 1
    two_of_four: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        check_scope(self.scope)
        object.__setattr__(self, "vector", check_vector(self.vector))
        if not isinstance(self.two_of_four, bool):
            raise ValueError(f"two_of_four must be True or False, got {self.two_of_four!r}")
        if self.two_of_four and self.sparsity < 0.5:
            raise ValueError(f"two_of_four keeps half of the weights at most: sparsity {self.sparsity:g} is below 0.5")

    @property
    def allocation(self) -> Allocation:
        """The allocation that ``scope`` names."""
        return ALLOCATIONS[self.scope]


@dataclass(frozen=True)
class MagnitudePruning(ScopedPruning):
    """Set the weights of smallest magnitude to zero; with ``scope="lamp"`` this is LAMP.

    Parameters and errors are those of `ScopedPruning`.
    """

    @property
    def criterion(self) -> Criterion:
        """`magnitude`."""
        return magnitude


@dataclass(frozen=True)
class LayerwisePruning:
    """Set the weights of smallest magnitude to zero, each layer at a sparsity of its own.

    Parameters
    ----------
    sparsities : mapping of str to float
        Sparsity in [0, 1) of every chosen layer, by qualified name; layers not named stay dense.
    vector : {1, 2, 4, 8, 16}
        Granularity, as in `ScopedPruning`.

    Raises
    ------
    ValueError
        If no layer is named or a value is out of its range; when used, if a named layer is not among those chosen.
    """

    sparsities: Mapping[str, float] = field(hash=False)
    vector: int = 1

    def __post_init__(self) -> None:
        if not self.sparsities:
            raise ValueError("sparsities names no layer: expected at least one {layer: sparsity}")
        checked = {name: check_sparsity(value, f"sparsity of {name!r}") for name, value in self.sparsities.items()}
        object.__setattr__(self, "sparsities", checked)
        object.__setattr__(self, "vector", check_vector(self.vector))

    @property
    def two_of_four(self) -> bool:
        """No: layers that are not named stay dense."""
        return False

    @property
    def sparsity(self) -> float:
        """The highest sparsity of a layer; on a schedule's way to it, every layer is as far as it."""
        return max(self.sparsities.values())

    @property
    def criterion(self) -> Criterion:
        """`magnitude`."""
        return magnitude

    @property
    def allocation(self) -> Allocation:
        """Each layer its own."""
        return self._allocate

    def _allocate(self, scores: Mapping[str, LayerScores], sparsity: float) -> dict[str, int]:
        unknown = [name for name in self.sparsities if name not in scores]
        if unknown:
            raise ValueError(
                f"sparsities names {', '.join(map(repr, unknown))}, but the chosen layers are "
                f"{', '.join(map(repr, scores))}: correct the names or pass a filter that chooses them"
            )
        done = sparsity / self.sparsity if self.sparsity else 0.0
        targets = {name: self.sparsities.get(name, 0.0) * done for name in scores}
        return {name: max(x.smallest, kept_count(x.size, targets[name])) for name, x in scores.items()}
