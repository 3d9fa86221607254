"""From NCHW or NHWC to CHWN on a GPU and back, as fast as memory allows: the kernel behind `layouts.to_layout`.

torch copies a permuted tensor element by element, which for these orders took eight times as long as the bytes need
(fp16, 32 images of 64 x 224 x 224). Here a tile of 32 x 32 goes through shared memory, so that both sides are read and
written in whole segments (Ruetsch and Micikevicius, "Optimizing Matrix Transpose in CUDA", 2009).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numbasparse.runtime import cuda

if TYPE_CHECKING:
    import torch

_TILE, _LINES = 32, 8
THREADS = _TILE * _LINES
"""Of a block: each moves four elements."""
_PITCH = _TILE + 1
"""Words from one row of the tile to the next: columns then are in different banks."""
SHARED_BYTES = 128 + 4 * _TILE * _PITCH


@dataclass(frozen=True)
class Matrices:
    """Several matrices to transpose, of ``rows`` x ``columns``; distances in elements.

    Columns of the input and rows of the output are neighbours in memory.
    """

    count: int
    rows: int
    columns: int
    in_row: int
    in_matrix: int
    out_column: int
    out_matrix: int

    @property
    def blocks(self) -> int:
        """Of a launch."""
        return self.count * -(-self.rows // _TILE) * -(-self.columns // _TILE)

    @classmethod
    def of(cls, n: int, c: int, h: int, w: int, source: str, target: str) -> Matrices | None:
        """What makes ``target`` of ``source``; None for orders that are none of these matrices."""
        image, pixels = c * h * w, h * w
        found = {
            ("NCHW", "CHWN"): cls(1, n, image, image, 0, n, 0),
            ("CHWN", "NCHW"): cls(1, image, n, n, 0, image, 0),
            ("NHWC", "CHWN"): cls(pixels, n, c, image, c, pixels * n, n),
            ("CHWN", "NHWC"): cls(pixels, c, n, pixels * n, n, image, c),
        }
        return found.get((source, target))


def transpose(x: torch.Tensor, out: torch.Tensor, matrices: Matrices) -> None:
    """Write ``out`` from ``x``, both of 2 or 4 bytes an element, on torch's current stream and device."""
    function = _loaded(x.element_size(), cuda.current())
    m = matrices
    sizes = (m.rows, m.columns, m.in_row, m.in_matrix, m.out_column, m.out_matrix)
    arguments = (out.data_ptr(), x.data_ptr(), *sizes)
    function.launch((m.blocks, 1, 1), THREADS, SHARED_BYTES, cuda.current_stream(), arguments)


@functools.cache
def _loaded(size: int, device: cuda.Device) -> cuda.Function:
    return cuda.load(ptx_of(size, device.capability))


def ptx_of(size: int, capability: cuda.Capability) -> cuda.Ptx:
    """The kernel for elements of 2 or 4 bytes: ``(out, x, ...)`` and the distances of `Matrices` but for the count."""
    return cuda.compile_ptx(_code(size), 8, str(size), capability=capability, threads=THREADS, fastmath=False)


def _code(size: int) -> Callable[..., None]:
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    u32, i64 = types.uint32, types.int64
    shared = ptx.shared_base(128)
    load, store = ptx.load_element(size), ptx.store_element(size)

    def cuda_transpose(out, x, rows, columns, in_row, in_matrix, out_column, out_matrix):  # type: ignore[no-untyped-def]
        tile = i64(shared())
        lane, line = ptx.thread_index() % _TILE, ptx.thread_index() // _TILE
        across = (columns + _TILE - 1) // _TILE
        down = (rows + _TILE - 1) // _TILE
        block = i64(ptx.block_x())
        column0, row0 = block % across * _TILE, block // across % down * _TILE
        matrix = block // (across * down)
        for i in range(line, _TILE, _LINES):
            row, column = row0 + i, column0 + lane
            if row < rows and column < columns:
                value = load(i64(x + (matrix * in_matrix + row * in_row + column) * size))
                ptx.store_shared_i32(u32(tile + 4 * (i * _PITCH + lane)), value)
        ptx.barrier()
        for i in range(line, _TILE, _LINES):
            row, column = row0 + lane, column0 + i
            if row < rows and column < columns:
                value = ptx.load_shared_i32(u32(tile + 4 * (lane * _PITCH + i)))
                store(i64(out + (matrix * out_matrix + column * out_column + row) * size), value)

    return cuda_transpose
