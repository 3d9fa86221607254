"""Linear quantization: evenly spaced levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from numbasparse.levels import Floats, LinearLevels, check_bits, short_scale

Range = Literal["minmax", "percentile", "mse"]

_MSE_PARTS = np.linspace(0.2, 1.0, 81)
"""Parts of the full range that ``range="mse"`` tries."""


@dataclass(frozen=True)
class LinearQuantization:
    """Round weights to evenly spaced levels, ``scale * (code - zero)``; zero is one of them.

    Parameters
    ----------
    bits : int
        2 to 8.
    symmetric : bool
        Codes -2**(bits-1) .. 2**(bits-1) - 1 around zero (stored with 2**(bits-1) added); the largest magnitude
        of the range gets code 2**(bits-1) - 1. Otherwise affine: codes 0 .. 2**bits - 1 spread over the range
        from the least to the greatest weight, both extended to zero, whose code is a whole number.
    granularity : {"tensor", "channel"}
        One scale for the layer, or one for each output channel.
    range : {"minmax", "percentile", "mse"}
        Weights beyond the range get its last level. ``"minmax"`` is all weights; ``"percentile"`` leaves out
        ``100 - percentile`` percent of the non-zero weights: the largest in magnitude, or if affine half at each
        end; ``"mse"`` takes the part of the full range, from 20 to 100 % in steps of 1 %, with the least squared
        error of the non-zero weights.
    percentile : float
        In (50, 100], for ``range="percentile"``.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Scales are cut to 16 significant bits, so that levels are exact in float32. Weights that lie on such levels
    already keep their values exactly, whatever the range: quantizing twice is quantizing once. Source of the
    schemes: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018,
    arXiv 1806.08342.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Literal["tensor", "channel"] = "tensor"
    range: Range = "minmax"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r}")
        check_choice("granularity", self.granularity, ("tensor", "channel"))
        check_choice("range", self.range, ("minmax", "percentile", "mse"))
        check_percentile(self.percentile)

    def fit(self, values: Floats, channels: NDArray[np.integer], k: int) -> LinearLevels:
        """Choose the levels for the non-zero values of a weight.

        Parameters
        ----------
        values : ndarray, float32, (nnz,)
        channels : ndarray of int, (nnz,)
            Output channel of each value, not falling.
        k : int
            Output channels.
        """
        if self.granularity == "tensor":
            tables = [values]
        else:
            tables = np.split(values, np.searchsorted(channels, np.arange(1, k)))
        fitted = [self._fit_table(table) for table in tables]
        scale, zero = (np.array(part) for part in zip(*fitted, strict=True))
        return LinearLevels(self.bits, scale.astype(np.float32), zero.astype(np.uint8))

    def _fit_table(self, values: Floats) -> tuple[float, int]:
        """Scale and zero for values that share them."""
        if len(values) == 0:
            return 1.0, 1 << (self.bits - 1) if self.symmetric else 0
        found = self._present(values)
        if found is not None:
            return found
        low, high = self._extent(values)
        if self.range != "mse":
            return self._spread(low, high)
        candidates = [self._spread(low * part, high * part) for part in _MSE_PARTS]
        return min(candidates, key=lambda levels: self._squared_error(values, *levels))

    def _present(self, values: Floats) -> tuple[float, int] | None:
        """Scale and zero of the levels on which all values lie already, or None."""
        different = np.unique(values)
        if len(different) > 1 << self.bits:
            return None
        least, greatest = float(different[0]), float(different[-1])
        magnitude = max(-least, greatest)
        # Of all whole numbers of steps to the largest magnitude, the fewest that put every value on a step.
        scales = short_scale(magnitude / np.arange(1, 1 << self.bits))
        codes = different / scales[:, None]
        fits = (codes == np.rint(codes)).all(axis=1)
        if not fits.any():
            return None
        first = int(np.argmax(fits))
        zero = self._zero_for(int(codes[first, 0]), int(codes[first, -1]))
        return None if zero is None else (float(scales[first]), zero)

    def _zero_for(self, least: int, greatest: int) -> int | None:
        """The code of zero if the codes of all values shall be 0 to 2**bits - 1, or None."""
        zero = 1 << (self.bits - 1) if self.symmetric else max(0, -least)
        return zero if zero + least >= 0 and zero + greatest < 1 << self.bits else None

    def _extent(self, values: Floats) -> tuple[float, float]:
        """Least and greatest weight that get a level of their own, zero between them."""
        if self.range != "percentile":
            low, high = float(values.min()), float(values.max())
        elif self.symmetric:
            high = float(np.percentile(np.abs(values).astype(np.float64), self.percentile))
            low = -high
        else:
            outside = (100.0 - self.percentile) / 2
            low, high = (float(x) for x in np.percentile(values.astype(np.float64), (outside, 100.0 - outside)))
        return min(low, 0.0), max(high, 0.0)

    def _spread(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero of levels over a range."""
        if self.symmetric:
            half = 1 << (self.bits - 1)
            return float(short_scale(np.array([max(-low, high) / (half - 1)]))[0]), half
        most = (1 << self.bits) - 1
        step = float(short_scale(np.array([(high - low) / most]))[0])
        zero = min(max(round(-low / step), 0), most)
        # Rounding zero may have moved an end outwards, beyond float32.
        step = min(step, float(np.finfo(np.float32).max) / max(zero, most - zero))
        return float(short_scale(np.array([step]))[0]), zero

    def _squared_error(self, values: Floats, scale: float, zero: int) -> float:
        codes = np.clip(np.rint(values / np.float32(scale)), -zero, (1 << self.bits) - 1 - zero)
        difference = values.astype(np.float64) - codes.astype(np.float64) * scale
        return float(np.dot(difference, difference))


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_percentile(value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (50, 100]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 50.0 < value <= 100.0:
        raise ValueError(f"percentile must be a number in (50, 100], got {value!r}")
