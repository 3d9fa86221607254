"""What a sparse tensor core does with its operands, in NumPy: the definition that packed weights are tested against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from numbasparse.kernels import two_four


def opened(fragment: np.ndarray, metadata: np.ndarray, dtype: str) -> np.ndarray:
    """Matrix A of a sparse step, float32 (64, 32), from registers (128, 4) and metadata (64,), lane by lane."""
    dense = np.zeros((two_four.ROWS, two_four.STEP), np.float32)
    values = widened(fragment, dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for register in range(4):
            row = warp * 16 + g + 8 * (register % 2)
            for half in range(2):
                kept = 2 * t + half + 8 * (register // 2)
                quad = kept // 2
                # Quads 0 to 3 are described by lane 0 of the four, quads 4 to 7 by lane 1.
                word = int(metadata[(warp * 8 + g) * 2 + quad // 4]) >> (16 * (register % 2))
                place = word >> (4 * (quad % 4) + 2 * half) & 3
                dense[row, quad * 4 + place] += values[thread, register, half]
    return dense


def opened_dense(fragment: np.ndarray, dtype: str) -> np.ndarray:
    """Matrices A of four warps' ``mma.m16n8k8``, float32 (64, 8), from registers (128, 2)."""
    dense = np.zeros((two_four.ROWS, two_four.REST), np.float32)
    values = widened(fragment, dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for register in range(2):
            dense[warp * 16 + g + 8 * register, 2 * t : 2 * t + 2] = values[thread, register]
    return dense


def opened_deep(fragment: np.ndarray, dtype: str) -> np.ndarray:
    """Matrix A of one warp's ``mma.m16n8k16``, float32 (16, 16), from registers (32, 4), lane by lane."""
    dense = np.zeros((16, 16), np.float32)
    values = widened(fragment, dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            column = 2 * t + 8 * (register // 2)
            dense[g + 8 * (register % 2), column : column + 2] = values[lane, register]
    return dense


def widened(words: np.ndarray, dtype: str) -> np.ndarray:
    """The two 16-bit values of each 32-bit register, (..., 2), as float32."""
    halves = np.ascontiguousarray(words, np.uint32)[..., None].view(np.uint16)
    if dtype == "float16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def well_formed(metadata: np.ndarray) -> bool:
    """Whether the two places of every quad are different and ascend, as the instruction demands."""
    places = two_four.places(metadata).reshape(len(metadata), two_four.ROWS, two_four.QUADS, 2)
    return bool((places[..., 0] < places[..., 1]).all())


ROW_BYTES = {1: 128, 2: 64, 3: 32, 0: 16}
"""Bytes of a row of an MN-major operand, by the swizzle mode of its descriptor."""


def swizzled(address: np.ndarray, row_bytes: int) -> np.ndarray:
    """Where shared memory holds what has a linear address, in the mode for rows of so many bytes."""
    return address ^ (address >> 3 & (row_bytes - 16))


def operand(memory: np.ndarray, low: int, high: int, n: int) -> np.ndarray:
    """Matrix B, (32, n) of 16-bit words, that a descriptor of an MN-major operand means.

    ``memory`` are the bytes of shared memory from address 0.
    """
    mode = high >> 30 & 3
    row_bytes = ROW_BYTES[mode]
    start, leading, stride = 16 * (low & 0x3FFF), 16 * (low >> 16 & 0x3FFF), 16 * (high & 0x3FFF)
    assert start % (8 * row_bytes) == 0, "the base offset is not 0"
    n_stride, k_stride = (leading, stride) if mode else (stride, leading)
    k, column = np.arange(32)[:, None], 2 * np.arange(n)[None]
    linear = start + k // 8 * k_stride + k % 8 * row_bytes + column // row_bytes * n_stride + column % row_bytes
    return memory.view(np.uint16)[swizzled(linear, row_bytes) // 2]


def k_major_operand(memory: np.ndarray, low: int, high: int, n: int) -> np.ndarray:
    """The same, (32, n), of an operand whose k are neighbours."""
    row_bytes = ROW_BYTES[high >> 30 & 3]
    start, stride = 16 * (low & 0x3FFF), 16 * (high & 0x3FFF)
    assert start % row_bytes + 64 <= row_bytes, "a step's channels are in two rows"
    k, column = np.arange(32)[:, None], np.arange(n)[None]
    linear = start + column // 8 * stride + column % 8 * row_bytes + 2 * k
    return memory.view(np.uint16)[swizzled(linear, row_bytes) // 2]


def box(
    image: np.ndarray, origin: tuple[int, ...], shape: tuple[int, ...], every: tuple[int, ...] | None = None
) -> np.ndarray:
    """A box of an array, whose outside is zero; the outermost dimension first; of every so many-th value."""
    made = np.zeros(shape, image.dtype)
    steps = every or (1,) * len(shape)
    index = [start + step * np.arange(size) for start, size, step in zip(origin, shape, steps, strict=True)]
    inside = [(i >= 0) & (i < size) for i, size in zip(index, image.shape, strict=True)]
    made[np.ix_(*inside)] = image[np.ix_(*(i[there] for i, there in zip(index, inside, strict=True)))]
    return made


@dataclass(frozen=True)
class OutputTile:
    """One unit of work of a block: where its outputs are, and the first row and column of its input."""

    block: int
    part: int
    image: int
    oy: int
    ox: int
    corner: tuple[int, int]


def output_tiles(shape: Any) -> Iterator[OutputTile]:
    """All of a kernel's constants' tiles, in their order."""
    spec, g = shape.spec, shape.geometry
    down, across = shape.tiles
    for work in range(shape.works):
        pixels = work // shape.blocks // shape.split
        oy, ox = pixels % (across * down) // across * g.tile_h, pixels % across * g.tile_w
        corner = (oy * spec.stride[0] - spec.padding[0][0], ox * spec.stride[1] - spec.padding[1][0])
        part = work // shape.blocks % shape.split
        yield OutputTile(work % shape.blocks, part, pixels // (across * down) * g.batch, oy, ox, corner)


def store_tile(y: np.ndarray, sums: np.ndarray, rows: np.ndarray, tile: OutputTile, batch: int) -> None:
    """Write sums (rows of the tile, output channels, columns) to ``y`` (splits, K, OH, OW, N), each place once.

    ``rows`` are the output channels, -1 for none; what lies outside of ``y`` is not written.
    """
    _, _, out_h, out_w, images = y.shape
    lines, _, columns = sums.shape
    for row, k in enumerate(rows):
        for i in range(lines):
            for n in range(columns):
                at = (tile.part, k, tile.oy + i, tile.ox + n // batch, tile.image + n % batch)
                if k >= 0 and at[2] < out_h and at[3] < out_w and at[4] < images:
                    assert np.isnan(y[at])
                    y[at] = sums[i, row, n]
