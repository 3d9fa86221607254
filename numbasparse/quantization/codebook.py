"""Codebook (non-linear) quantization: levels where the weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from numbasparse.levels import CodebookLevels, Floats, check_bits
from numbasparse.quantization.kmeans import kmeans
from numbasparse.quantization.linear import check_choice


@dataclass(frozen=True)
class CodebookQuantization:
    """Round non-zero weights to the 2**bits entries of a codebook found by exact k-means.

    Zeros take no entry and stay zero.

    Parameters
    ----------
    bits : int
        2 to 8.
    granularity : {"layer", "channel_group"}
        One codebook for the layer, or one for each ``group`` neighbouring output channels.
    group : int, optional
        Output channels that share a codebook; for ``"channel_group"`` only, and needed there. The last group
        is smaller if ``group`` does not divide their number.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Fewer different values than entries are kept exactly; entries left over repeat the last. Source: Han, Mao and
    Dally, "Deep compression", 2015, arXiv 1510.00149, with the optimal clusters in place of Lloyd's algorithm.
    """

    bits: int = 4
    granularity: Literal["layer", "channel_group"] = "layer"
    group: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice("granularity", self.granularity, ("layer", "channel_group"))
        if self.granularity == "layer":
            if self.group is not None:
                raise ValueError(f"group is for granularity='channel_group' only, got group={self.group!r}")
        elif isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"granularity='channel_group' needs group, an int of 1 or more, got {self.group!r}")

    def fit(self, values: Floats, channels: NDArray[np.integer], k: int) -> CodebookLevels:
        """Find the codebooks for the non-zero values of a weight; parameters as `LinearQuantization.fit`."""
        group = self.group or 0
        bounds = np.searchsorted(channels, np.arange(group, k, group) if group else [])
        tables = [self._fit_table(table) for table in np.split(values, bounds)]
        return CodebookLevels(self.bits, np.stack(tables), group)

    def _fit_table(self, values: Floats) -> Floats:
        centres = kmeans(values, 1 << self.bits) if len(values) else np.zeros(1, np.float32)
        return np.pad(centres, (0, (1 << self.bits) - len(centres)), mode="edge")
