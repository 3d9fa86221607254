"""Places in one block of memory for results that are in use at different times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Piece:
    """Bytes that are in use from the node of one number to that of another, both included."""

    nbytes: int
    first: int
    last: int
    offset: int = 0


def place(pieces: Sequence[Piece]) -> int:
    """Give each piece an offset, so that those in use at the same time do not overlap; returns the bytes of all.

    The largest first, each at the lowest offset where it fits.
    """
    placed: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (-p.nbytes, p.first)):
        others = [p for p in placed if p.first <= piece.last and piece.first <= p.last]
        offset = 0
        for other in sorted(others, key=lambda p: p.offset):
            if offset + piece.nbytes <= other.offset:
                break
            offset = max(offset, other.offset + other.nbytes)
        piece.offset = offset
        placed.append(piece)
    return max((p.offset + p.nbytes for p in placed), default=0)
