"""Schedules: the sparsity after each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from numbasparse.pruning.criteria import check_sparsity


class Schedule(Protocol):
    """What ``Pruner`` asks of a schedule."""

    @property
    def initial(self) -> float:
        """Sparsity at the schedule's first step."""

    @property
    def end_step(self) -> int:
        """Step from which on the sparsity is final."""

    def sparsity_at(self, step: int, final: float) -> float:
        """Return the sparsity after ``step`` optimizer steps; where it falls, pruned weights may come back."""


def _check_steps(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int (optimizer steps), got {value!r}")


def _check_range(begin_step: int, end_step: int) -> None:
    if not 0 <= begin_step < end_step:
        raise ValueError(
            "begin_step and end_step must satisfy 0 <= begin_step < end_step, got "
            f"begin_step={begin_step}, end_step={end_step}"
        )


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity that rises fast at first and slowly near its end.

    At step t between ``begin_step`` t0 and ``end_step`` t1 the sparsity is
    ``final + (initial - final) * (1 - (t - t0) / (t1 - t0)) ** 3``, with t rounded down to the last update;
    before t0 it is 0, from t1 on it is ``final``.

    Parameters
    ----------
    begin_step, end_step : int
        In optimizer steps, ``0 <= begin_step < end_step``. Step 0 is before the first optimizer step.
    every : int
        Steps between two updates of the masks. The last update is at ``end_step`` whatever ``every`` is.
    initial : float
        Sparsity at ``begin_step``, in [0, 1).

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017, arXiv 1710.01878, equation 1.
    """

    begin_step: int
    end_step: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, ("begin_step", "end_step", "every"))
        _check_range(self.begin_step, self.end_step)
        if self.every < 1:
            raise ValueError(f"every must be 1 or more optimizer steps, got {self.every}")
        object.__setattr__(self, "initial", check_sparsity(self.initial, "initial"))

    def sparsity_at(self, step: int, final: float) -> float:
        """Return the sparsity after ``step`` optimizer steps on the way to ``final``."""
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return final
        done = (step - self.begin_step) // self.every * self.every
        left = 1.0 - done / (self.end_step - self.begin_step)
        return final + (self.initial - final) * left**3


@dataclass(frozen=True)
class ACDCSchedule:
    """Alternating compressed and dense phases (AC/DC).

    Dense up to ``begin_step`` (warm-up); then in turns ``compressed_steps`` at the final sparsity and ``dense_steps``
    with every weight free; from ``end_step`` on compressed for good. Each compressed phase starts with new masks from
    the weights as they are then; within it the masks stay.

    Parameters
    ----------
    begin_step, end_step : int
        In optimizer steps, ``0 <= begin_step < end_step``. Step 0 is before the first optimizer step.
    compressed_steps, dense_steps : int
        Lengths of the phases, 1 or more. The paper takes 5 epochs each, the first tenth of training as warm-up and
        the last 15 % compressed.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Source: Peste, Iofinova, Vladu and Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural
    networks", NeurIPS 2021, arXiv 2106.12379. Give ``Pruner`` the optimizer, so that momentum gathered by pruned
    weights is dropped when they come back.
    """

    begin_step: int
    end_step: int
    compressed_steps: int
    dense_steps: int

    def __post_init__(self) -> None:
        _check_steps(self, ("begin_step", "end_step", "compressed_steps", "dense_steps"))
        _check_range(self.begin_step, self.end_step)
        if min(self.compressed_steps, self.dense_steps) < 1:
            raise ValueError(
                "compressed_steps and dense_steps must be 1 or more optimizer steps, got "
                f"{self.compressed_steps} and {self.dense_steps}"
            )

    @property
    def initial(self) -> float:
        """Dense at first."""
        return 0.0

    def sparsity_at(self, step: int, final: float) -> float:
        """Return 0 in dense phases and ``final`` in compressed ones."""
        if step < self.begin_step:
            return 0.0
        phase = (step - self.begin_step) % (self.compressed_steps + self.dense_steps)
        return final if step >= self.end_step or phase < self.compressed_steps else 0.0
