"""Large arrays on the CPU in memory that is kept when they are freed.

Memory that malloc maps for a large array goes back to the system when the array is freed, and every page of the next
one is a page fault again: in a network with large images that takes nearly as long as the sparse convolutions. Here
blocks are kept and used again, and asked for in huge pages, which also need fewer entries of the translation cache.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SMALLEST = 1 << 20
"""Bytes from which on arrays come from here: smaller ones are kept by malloc itself."""
KEPT = 1 << 30
"""Bytes of blocks that are kept while nothing uses them, at most."""
_GRAIN = 1 << 21
"""Sizes are multiples of it: a huge page."""
_ROOM = 2.0
"""How many times the size asked for a block may have."""


class Blocks:
    """Blocks of memory that are not in use.  Safe to use from several threads."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._lock = threading.Lock()
        self._free: list[tuple[int, int, mmap.mmap]] = []  # by size; the second is a serial number, so that all differ
        self._serial = 0
        # Filled by destructors, which may run anywhere, also while this thread holds the lock.
        self._returned: deque[mmap.mmap] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks that are kept."""
        with self._lock:
            self._collect()
            return sum(size for size, _, _ in self._free)

    def take(self, nbytes: int) -> mmap.mmap:
        """A block of at least so many bytes; its content is anything."""
        size = -(-nbytes // _GRAIN) * _GRAIN
        with self._lock:
            self._collect()
            place = bisect.bisect_left(self._free, (size,))
            if place < len(self._free) and self._free[place][0] <= _ROOM * size:
                # The last one that came back of that size: what of it is in a cache is of use.
                last = bisect.bisect_right(self._free, (self._free[place][0], self._serial + 1)) - 1
                return self._free.pop(last)[2]
        return _new_block(size)

    def give(self, block: mmap.mmap) -> None:
        """Take a block back."""
        self._returned.append(block)

    def clear(self) -> None:
        """Give all that is not in use back to the system."""
        with self._lock:
            self._collect()
            self._free.clear()

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._serial += 1
            bisect.insort(self._free, (len(block), self._serial, block))
        total = sum(size for size, _, _ in self._free)
        while total > self.kept:
            oldest = min(range(len(self._free)), key=lambda i: self._free[i][1])
            total -= self._free.pop(oldest)[0]


def _new_block(size: int) -> mmap.mmap:
    # Private: a forked process must not write into what its parent has.  (Windows has no flags and no forks.)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        block = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"no memory for an array of {size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


blocks = Blocks(KEPT)
"""Those of the process."""


class _Owner:
    """What an array keeps alive: gives the block back when the last array on it is gone."""

    def __init__(self, block: mmap.mmap, shape: Sequence[int]) -> None:
        self._block = block
        address = np.frombuffer(block, np.uint8).__array_interface__["data"]
        self.__array_interface__ = {
            "shape": tuple(shape),
            "typestr": "<f4" if sys.byteorder == "little" else ">f4",
            "data": (address[0], False),
            "version": 3,
        }

    def __del__(self) -> None:
        blocks.give(self._block)


def empty(shape: Sequence[int]) -> np.ndarray:
    """A float32 array in C order whose content is anything, like ``np.empty``."""
    nbytes = 4 * prod(shape)
    if nbytes < SMALLEST:
        return np.empty(shape, np.float32)
    return np.asarray(_Owner(blocks.take(nbytes), shape))


def empty_tensor(shape: Sequence[int]) -> torch.Tensor:
    """A float32 tensor on the CPU, contiguous, whose content is anything, like ``torch.empty``."""
    return tensor_maker(shape)()


def tensor_maker(shape: Sequence[int]) -> Callable[[], torch.Tensor]:
    """What makes tensors like `empty_tensor`: for who makes many of one shape."""
    import torch

    if 4 * prod(shape) < SMALLEST:
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        # Half of what ``torch.empty`` takes.
        return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=torch.float32)
    made: Any = torch.from_numpy
    return lambda: made(empty(shape))
