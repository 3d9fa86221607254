"""Patches and tiles of `cpu_direct`: how a spec's input is cut and packed under a config, and what that costs.

A patch is what is packed at once; the tiles of it, each of which fits the registers, share its halo.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from numbasparse.codegen.simd import Ahead, mask_length
from numbasparse.kernels.base import Config
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec

_LINE = 64
"""Bytes of a cache line."""


@dataclass(frozen=True)
class Columns:
    """The vectors of one packed row.

    Attributes
    ----------
    line_x
        For each, the input column of its first lane, from the patch's first.
    places
        For each, the vector of the packed row that it becomes.
    pitch
        Vectors from one packed row to the next.
    tap_bytes : int64, (S,)
        Offset of a tap's vector for the first accumulator.
    """

    line_x: tuple[int, ...]
    places: tuple[int, ...]
    pitch: int
    tap_bytes: np.ndarray

    @classmethod
    def of(cls, spec: ConvSpec, config: Config, width: int, spread: bool) -> Columns:
        """Of ``width`` vectors of outputs.

        ``spread`` makes distances odd multiples of cache lines: the tile's part of many rows, taps and channels
        then falls on all lines of the first cache alike.
        """
        lanes, chunk = int(config["lanes"]), int(config["chunk"])
        return (_copied if config["taps"] == "copied" else _shifted)(spec, lanes, chunk, width, spread)


def _copied(spec: ConvSpec, lanes: int, chunk: int, width: int, spread: bool) -> Columns:
    """One aligned copy of the row for each kernel column."""
    stride, dilation = spec.stride[1], spec.dilation[1]
    pitch = _odd(width, lanes) if spread else width
    return Columns(
        line_x=tuple(s * dilation + v * chunk * stride for s in range(spec.s) for v in range(width)),
        places=tuple(s * pitch + v for s in range(spec.s) for v in range(width)),
        pitch=_odd(spec.s * pitch, lanes) if spread else spec.s * pitch,
        tap_bytes=np.arange(spec.s, dtype=np.int64) * pitch * 4 * lanes,
    )


def _shifted(spec: ConvSpec, lanes: int, chunk: int, width: int, spread: bool) -> Columns:
    """One copy of the row for each phase of the stride; taps start at their own float within it."""
    stride, dilation = spec.stride[1], spec.dilation[1]
    first = [s * dilation for s in range(spec.s)]
    line_x: list[int] = []
    tap_bytes = np.zeros(spec.s, np.int64)
    for phase in sorted({x % stride for x in first}):
        members = [s for s, x in enumerate(first) if x % stride == phase]
        reach = max(first[s] // stride for s in members)
        start = len(line_x) * 4 * lanes
        for s in members:
            tap_bytes[s] = start + first[s] // stride * 4
        vectors = -(-(width * lanes + reach) // lanes)
        line_x += [phase + stride * lanes * v for v in range(vectors)]
    pitch = _odd(len(line_x), lanes) if spread else len(line_x)
    return Columns(tuple(line_x), tuple(range(len(line_x))), pitch, tap_bytes)


def _odd(vectors: int, lanes: int) -> int:
    """The least number of vectors from ``vectors`` on that is an odd number of cache lines."""
    per_line = max(1, _LINE // (4 * lanes))
    lines = -(-vectors // per_line)
    return (lines | 1) * per_line


@dataclass(frozen=True)
class Geometry:
    """How the tiles of a patch lie in memory under a config.  Offsets in bytes unless said otherwise.

    Attributes
    ----------
    lanes, chunk, tile_h, tile_w
        As in the config.
    block
        Input channels packed at once, at most.
    patch_h, patch_w
        Output rows and vectors of a patch.
    row_step
        Input rows from one packed row to the next (rows that no tap reads are left out).
    patch_rows
        Packed rows of a patch and channel.
    columns
        The vectors of a packed row.
    tap_bytes : int64, (R, S)
        Offset of a tap's vector for accumulator (0, 0) of the first tile within a packed channel.
    displacements
        Offset of each accumulator's vector from that of accumulator (0, 0), row-major.
    tiles : int64, (tiles of a patch, 2)
        Offset of each tile's vectors from those of the first within a packed channel, and of its outputs.
    ahead
        What is fetched ahead while a row is packed.
    """

    lanes: int
    chunk: int
    tile_h: int
    tile_w: int
    block: int
    patch_h: int
    patch_w: int
    row_step: int
    patch_rows: int
    columns: Columns
    tap_bytes: np.ndarray
    displacements: tuple[int, ...]
    tiles: np.ndarray
    ahead: Ahead

    @property
    def vector_bytes(self) -> int:
        return 4 * self.lanes

    @property
    def channel_bytes(self) -> int:
        """Bytes of one packed input channel."""
        return self.patch_rows * self.columns.pitch * self.vector_bytes

    @property
    def aligned(self) -> bool:
        """Whether every input vector of every tap starts on a multiple of a vector's size."""
        return not (self.tap_bytes % self.vector_bytes).any()

    @classmethod
    def of(cls, spec: ConvSpec, config: Config) -> Geometry:
        lanes, chunk = int(config["lanes"]), int(config["chunk"])
        tile_h, tile_w = parse_tile(config["tile"])
        block, (patch_h, patch_w) = _block_and_patch(spec, config)
        spread = (patch_h, patch_w) != (tile_h, tile_w)
        columns = Columns.of(spec, config, patch_w, spread)
        stride, size = spec.stride[0], 4 * lanes
        step, rows = _packed_rows(spec, patch_h)
        row_bytes = columns.pitch * size
        tap_rows = np.arange(spec.r, dtype=np.int64) * (spec.dilation[0] if spec.r > 1 else 0) // step * row_bytes
        down = (stride // step if patch_h > 1 else 0) * row_bytes
        starts = [(int(y), int(v)) for y in starts_of(patch_h, tile_h) for v in starts_of(patch_w, tile_w)]
        return cls(
            lanes=lanes,
            chunk=chunk,
            tile_h=tile_h,
            tile_w=tile_w,
            block=block,
            patch_h=patch_h,
            patch_w=patch_w,
            row_step=step,
            patch_rows=rows,
            columns=columns,
            tap_bytes=tap_rows[:, None] + columns.tap_bytes[None, :],
            displacements=tuple(y * down + v * size for y in range(tile_h) for v in range(tile_w)),
            tiles=np.array([(y * down + v * size, 4 * (y * spec.out_w + v * chunk)) for y, v in starts], np.int64),
            ahead=_ahead(spec, config, patch_w * lanes),
        )


def parse_tile(text: int | str) -> tuple[int, int]:
    """Rows and vectors of a tile written as ``"7x2"``; (0, 0) for any other text."""
    parts = str(text).split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 4 for p in parts):
        return 0, 0
    return int(parts[0]), int(parts[1])


def _packed_rows(spec: ConvSpec, height: int) -> tuple[int, int]:
    """Input rows from one packed row to the next, and packed rows, for ``height`` rows of outputs."""
    stride, dilation = spec.stride[0], spec.dilation[0]
    step = gcd(stride if height > 1 else 0, dilation if spec.r > 1 else 0) or 1
    return step, ((height - 1) * stride + (spec.r - 1) * dilation) // step + 1


def _ahead(spec: ConvSpec, config: Config, width: int) -> Ahead:
    """What to fetch ahead for patches of ``width`` outputs."""
    row = 4 * width * spec.stride[1]
    if config["prefetch"] == "next":
        return Ahead(row, 2 * row)
    if config["prefetch"] == "channel":
        return Ahead(0, row, channels=1)
    return Ahead()


# ---- patches ------------------------------------------------------------------------------------------------

_MORE_TILES = 1.1
"""How many times the tiles of an image a cut into patches may make."""
_FEWEST_PATCHES = 16
"""So many patches are left for the threads."""


def _block_and_patch(spec: ConvSpec, config: Config) -> tuple[int, tuple[int, int]]:
    """Channels of a block, and the largest patch that fits into ``patch_kb``: a tile if none does.

    A patch is first as much of a row as fits, in equal parts, then several rows of tiles.
    """
    tile, chunk = parse_tile(config["tile"]), int(config["chunk"])
    block = max(1, min(spec.c, (int(config["block_kb"]) << 10) // _channel_bytes(spec, config, tile)))
    vectors, across, down = spec.out_w // chunk, -(-spec.out_w // (tile[1] * chunk)), -(-spec.out_h // tile[0])
    if not int(config["patch_kb"]) or vectors < tile[1] or spec.out_h < tile[0]:
        return block, tile

    def fits(patch: tuple[int, int]) -> bool:
        return _patch_bytes(spec, config, patch, block) <= int(config["patch_kb"]) << 10

    patch = tile
    for parts in range(1, across):
        width = max(-(-vectors // parts), tile[1])
        cut = -(-spec.out_w // (width * chunk)) * -(-width // tile[1])
        if cut <= _MORE_TILES * across and fits((tile[0], width)):
            patch = tile[0], width
            break
    if patch[1] != vectors:
        return block, patch
    for count in range(2, spec.n * down // _FEWEST_PATCHES + 1):
        height = count * tile[0]
        if height > spec.out_h or not fits((height, vectors)):
            break
        patches = -(-spec.out_h // height)
        if count * patches <= _MORE_TILES * down and spec.n * patches >= _FEWEST_PATCHES:
            patch = height, vectors
    return block, patch


def _patch_bytes(spec: ConvSpec, config: Config, patch: tuple[int, int], block: int) -> int:
    """Bytes of a block's packed input and of the partial sums between blocks."""
    tile = parse_tile(config["tile"])
    tiles = -(-patch[0] // tile[0]) * -(-patch[1] // tile[1])
    channels = -(-spec.k // int(config["split"])) if block < spec.c else 0
    return block * _channel_bytes(spec, config, patch) + tiles * channels * tile[0] * tile[1] * 4 * int(config["lanes"])


def _channel_bytes(spec: ConvSpec, config: Config, patch: tuple[int, int]) -> int:
    spread = patch != parse_tile(config["tile"])
    return _packed_rows(spec, patch[0])[1] * Columns.of(spec, config, patch[1], spread).pitch * 4 * int(config["lanes"])


def starts_of(size: int, part: int) -> np.ndarray:
    """First elements of parts that cover ``size``; the last one overlaps rather than reaching outside."""
    count = -(-size // part)
    return np.minimum(np.arange(count) * part, max(size - part, 0))


@dataclass(frozen=True)
class Tiling:
    """Where the runs of all patches lie.

    Attributes
    ----------
    table : int64, (runs, 4)
        For each run: byte offset of its first input element, its first input row, byte offset of its masks,
        byte offset of its first output element.
    masks : int32
        Per patch column and vector of a packed row: negative where the input column exists.
    valid
        Output columns of a tile that exist.
    """

    table: np.ndarray
    masks: np.ndarray
    valid: int

    @classmethod
    def of(cls, spec: ConvSpec, geometry: Geometry) -> Tiling:
        width = geometry.patch_w * geometry.chunk
        y0 = starts_of(spec.out_h, geometry.patch_h)
        x0 = starts_of(spec.out_w, width)
        top, left = spec.padding[0][0], spec.padding[1][0]
        n, y, x = (a.ravel() for a in np.meshgrid(np.arange(spec.n), y0, x0, indexing="ij"))
        column = np.tile(np.arange(len(x0)), spec.n * len(y0))
        row_in, column_in = y * spec.stride[0] - top, x * spec.stride[1] - left
        masks = _masks(spec, geometry, x0 * spec.stride[1] - left)
        table = np.stack(
            [
                4 * (n * spec.c * spec.h * spec.w + row_in * spec.w + column_in),
                row_in,
                column * (masks.nbytes // len(x0)),
                4 * (n * spec.k * spec.out_h * spec.out_w + y * spec.out_w + x),
            ],
            axis=1,
        )
        valid = min(geometry.tile_w * geometry.chunk, spec.out_w)
        return cls(np.ascontiguousarray(table, np.int64), masks, valid)


def _masks(spec: ConvSpec, geometry: Geometry, first: np.ndarray) -> np.ndarray:
    stride = spec.stride[1]
    length = mask_length(geometry.chunk, stride)
    step = stride if stride > 2 else 1
    x = first[:, None, None] + np.array(geometry.columns.line_x)[None, :, None] + step * np.arange(length)
    return np.where((x >= 0) & (x < spec.w), -1, 0).astype(np.int32)


# ---- what it costs ------------------------------------------------------------------------------------------

# Cycles, fitted to times of 3x3 layers of 256 x 256 pixels on a processor with two 256-bit units (Zen 3).
_FMA, _ENTRY, _PIECE, _PARTIAL = 0.82, 2.0, 25.0, 2.0
_PACK, _FETCH_ROW, _FETCH_LINE = 2.0, 10.0, 4.2
_CROSSING, _CACHED = 0.35, 0.25


def estimate(spec: ConvSpec, nnz: int, geometry: Geometry, split: int) -> float:
    """Cycles of one core for a whole layer with ``nnz`` non-zeros: for comparing configs, not for predicting times."""
    g = geometry
    runs = spec.n * len(starts_of(spec.out_h, g.patch_h)) * len(starts_of(spec.out_w, g.patch_w * g.chunk))
    runs_per_vector, accumulators = g.lanes // g.chunk, len(g.displacements)
    patches = -(-runs // runs_per_vector)
    blocks = -(-spec.c // g.block)
    # Vectors that do not start on a multiple of their size: a share of their loads reads two cache lines.
    crossing = 0.0 if g.aligned else g.vector_bytes / _LINE * (spec.s - 1) / spec.s
    entries = nnz * (accumulators * _FMA * (1 + _CROSSING * crossing) + _ENTRY)
    pieces = min(nnz, spec.k * blocks) * (_PIECE + (accumulators * _PARTIAL if blocks > 1 else 0))
    rows = g.patch_rows * runs_per_vector
    lines = ((g.patch_w * g.chunk - 1) * spec.stride[1] + (spec.s - 1) * spec.dilation[1] + 1) * 4 / _LINE + 1
    cached = 4 * spec.n * spec.c * spec.h * spec.w <= cpu.cache_bytes()[1]
    fetch = rows * (_FETCH_ROW + _FETCH_LINE * lines) * (_CACHED if cached else 1)
    packing = spec.c * split * (rows * len(g.columns.line_x) * _PACK + fetch)
    return patches * (len(g.tiles) * (entries + pieces) + packing)
