"""A picture in overlapping tiles: which windows to read, and what of each result to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True)
class Span:
    """A window along one axis, in pixels: ``start:stop`` is read, ``keep_start:keep_stop`` of it is kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class Tile:
    """A window of a picture."""

    rows: Span
    columns: Span

    def read(self, picture: npt.NDArray[Value]) -> npt.NDArray[Value]:
        """Return the window of a picture (H, W, ...), as a view."""
        return picture[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def write(self, result: npt.NDArray[Value], out: npt.NDArray[Value], scale: int) -> None:
        """Put what is kept of a window's result, ``scale`` times as large, into the large picture ``out``."""
        kept = result[_inside(self.rows, scale), _inside(self.columns, scale)]
        out[_kept(self.rows, scale), _kept(self.columns, scale)] = kept


def tiles(height: int, width: int, size: int, overlap: int) -> list[Tile]:
    """Cut a picture into windows of one size, row by row.

    What is kept of the windows covers the picture once, without gaps. Around it each window has ``overlap`` pixels
    more on every side, or ends with the picture. So with an ``overlap`` of at least the network's receptive field the
    results are those of the whole picture: where a window ends with the picture, the network pads both alike.
    All windows have the same size, for which kernels are chosen and compiled once: those at the right and the bottom
    begin earlier than they had to.

    Parameters
    ----------
    height, width : int
        Of the picture, 1 or more.
    size : int
        Height and width of what is kept of a window (less in the last row and column), 1 or more.
    overlap : int
        Pixels more on each side, 0 or more.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """
    if min(height, width, size) < 1 or overlap < 0:
        raise ValueError(
            f"expected height, width and size of 1 or more and overlap of 0 or more, got {height}, {width}, {size} "
            f"and {overlap}"
        )
    return [Tile(row, column) for row in _spans(height, size, overlap) for column in _spans(width, size, overlap)]


def _spans(length: int, size: int, overlap: int) -> list[Span]:
    window = min(length, size + 2 * overlap)
    found = []
    for keep in range(0, length, size):
        start = max(0, min(keep - overlap, length - window))
        found.append(Span(start, start + window, keep, min(length, keep + size)))
    return found


def _inside(span: Span, scale: int) -> slice:
    return slice((span.keep_start - span.start) * scale, (span.keep_stop - span.start) * scale)


def _kept(span: Span, scale: int) -> slice:
    return slice(span.keep_start * scale, span.keep_stop * scale)
