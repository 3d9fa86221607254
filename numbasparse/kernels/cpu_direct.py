"""Direct sparse convolution on the CPU: tiles of output in registers, the input packed block by block.

The output is cut into tiles of some rows and vectors.  All accumulators of a tile stay in registers while the
non-zeros of an output channel pass by: each is one broadcast and one fused multiply-add per accumulator, with
the input vector as memory operand.  The input rows that a tile needs are packed, with their zero halo, for a
block of input channels at a time, so that the block stays in the first cache while every output channel reads
it.

Search space
------------
``lanes``
    float32 lanes of a vector.
``chunk``
    Lanes that are neighbours along the width.  A vector holds ``lanes / chunk`` such runs, each from another
    tile (another place or image), so that narrow images fill wide vectors.
``tile``
    Accumulators, as text: rows x vectors, for example ``"7x2"``.
``taps``
    ``"copied"``: the packed row is stored once for every kernel column, shifted, and every load is aligned.
    ``"shifted"``: it is stored once and loaded at the tap's offset, across cache lines for most taps: less to
    pack and less cache, more expensive loads.
``block_kb``
    KiB of input packed at a time (at least one channel).  With several blocks, partial sums go through memory
    in between.
``split``
    Ranges of output channels worked on separately, for more parallel units; each packs the input anew.
``prefetch``
    ``"next"`` fetches the next tile's input into the second cache while this tile's is packed: rows of a tile
    are too short for the hardware to see a stream.
``entries``
    For quantized weights: ``"coded"`` reads codes and looks their values up, ``"wide"`` reads decoded values:
    twice the memory, an instruction or two less for each non-zero.

The idea of lanes as separate tiles with aligned taps and of a register tile over the non-zero list follows the
direct sparse convolution of SkimCaffe (Park et al., arXiv 1608.01409).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from math import gcd

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import (
    PACK_SIGNATURE,
    ROWS_ARGUMENTS,
    Entries,
    call_address,
    load_i32,
    load_i64,
    mask_length,
    pack_function,
    store_i64,
)
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.kernels.cpu_rows import (
    PackedRows,
    compile_rows,
    entries_of,
    entry_choices,
    most_accumulators,
    pack_rows,
    prefetch_choices,
    reason_cut_too_much,
    reason_not_coded,
    reason_unsupported,
    with_entries,
    with_residual,
)
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

# Words of the parameter block (int64 each).
(
    _UNITS, _SPLITS, _RUNS, _BLOCKS, _BLOCK, _CHANNELS, _K, _H,
    _IN_PLANE, _OUT_PLANE, _OUT_PITCH, _PATCH_ROWS, _ROW_STEP, _ROW_STEP_BYTES, _CHANNEL_BYTES,
    _ENTRIES, _DECODER, _ROWS, _STARTS, _SEGMENTS, _CHANNEL_LIST, _RUN_TABLE, _MASKS, _ZERO_MASK,
    _PACK_CODE, _ROWS_CODE, _RUNS_PER_VECTOR,
    _OUTS_AT, _PACKED_AT, _PARTIAL_AT, _RESIDUAL, _WORDS,
) = range(32)  # fmt: skip

_MAX_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class Geometry:
    """How one tile of a spec lies in memory under a config.  Offsets in bytes unless said otherwise.

    Attributes
    ----------
    lanes, chunk, tile_h, tile_w
        As in the config.
    row_step
        Input rows from one packed row to the next (rows that no tap reads are left out).
    patch_rows
        Packed rows of a tile and channel.
    line_x
        For each vector of a packed row, the input column of its first lane, from the tile's first.
    tap_bytes : int64, (R, S)
        Offset of a tap's vector for accumulator (0, 0) within a packed channel.
    displacements
        Offset of each accumulator's vector from that of accumulator (0, 0), row-major.
    ahead
        Bytes (from, to) after a row's start that are fetched for the next tile.
    """

    lanes: int
    chunk: int
    tile_h: int
    tile_w: int
    row_step: int
    patch_rows: int
    line_x: tuple[int, ...]
    tap_bytes: np.ndarray
    displacements: tuple[int, ...]
    ahead: tuple[int, int]

    @property
    def vector_bytes(self) -> int:
        return 4 * self.lanes

    @property
    def channel_bytes(self) -> int:
        """Bytes of one packed input channel."""
        return self.patch_rows * len(self.line_x) * self.vector_bytes

    @property
    def aligned(self) -> bool:
        """Whether every input vector of every tap starts on a multiple of a vector's size."""
        return not (self.tap_bytes % self.vector_bytes).any()

    @classmethod
    def of(cls, spec: ConvSpec, config: Config) -> Geometry:
        lanes, chunk = int(config["lanes"]), int(config["chunk"])
        tile_h, tile_w = parse_tile(config["tile"])
        stride, dilation, size = spec.stride[0], spec.dilation[0], 4 * lanes
        step = gcd(stride if tile_h > 1 else 0, dilation if spec.r > 1 else 0) or 1
        line_x, column_bytes = (_copied if config["taps"] == "copied" else _shifted)(spec, lanes, chunk, tile_w)
        row_bytes = len(line_x) * size
        tap_rows = np.arange(spec.r, dtype=np.int64) * (dilation if spec.r > 1 else 0) // step * row_bytes
        y_step = stride // step if tile_h > 1 else 0
        next_tile = 4 * tile_w * lanes * spec.stride[1]
        return cls(
            lanes=lanes,
            chunk=chunk,
            tile_h=tile_h,
            tile_w=tile_w,
            row_step=step,
            patch_rows=((tile_h - 1) * stride + (spec.r - 1) * dilation) // step + 1,
            line_x=line_x,
            tap_bytes=tap_rows[:, None] + column_bytes[None, :],
            displacements=tuple(y * y_step * row_bytes + v * size for y in range(tile_h) for v in range(tile_w)),
            ahead=(next_tile, 2 * next_tile) if config["prefetch"] == "next" else (0, 0),
        )


def parse_tile(text: int | str) -> tuple[int, int]:
    """Rows and vectors of a tile written as ``"7x2"``; (0, 0) for any other text."""
    parts = str(text).split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 4 for p in parts):
        return 0, 0
    return int(parts[0]), int(parts[1])


def _copied(spec: ConvSpec, lanes: int, chunk: int, tile_w: int) -> tuple[tuple[int, ...], np.ndarray]:
    """One aligned copy of the row for each kernel column."""
    stride, dilation = spec.stride[1], spec.dilation[1]
    line_x = tuple(s * dilation + v * chunk * stride for s in range(spec.s) for v in range(tile_w))
    return line_x, np.arange(spec.s, dtype=np.int64) * tile_w * 4 * lanes


def _shifted(spec: ConvSpec, lanes: int, chunk: int, tile_w: int) -> tuple[tuple[int, ...], np.ndarray]:
    """One copy of the row for each phase of the stride; taps start at their own float within it."""
    stride, dilation = spec.stride[1], spec.dilation[1]
    first = [s * dilation for s in range(spec.s)]
    line_x: list[int] = []
    column_bytes = np.zeros(spec.s, np.int64)
    for phase in sorted({x % stride for x in first}):
        members = [s for s, x in enumerate(first) if x % stride == phase]
        reach = max(first[s] // stride for s in members)
        start = len(line_x) * 4 * lanes
        for s in members:
            column_bytes[s] = start + first[s] // stride * 4
        vectors = -(-(tile_w * lanes + reach) // lanes)
        line_x += [phase + stride * lanes * v for v in range(vectors)]
    return tuple(line_x), column_bytes


@dataclass(frozen=True)
class Tiling:
    """Where the runs of all tiles lie.

    Attributes
    ----------
    table : int64, (runs, 4)
        For each run: byte offset of its first input element, its first input row, byte offset of its masks,
        byte offset of its first output element.
    masks : int32
        Per tile column and vector of a packed row: negative where the input column exists.
    valid
        Output columns of a tile that exist.
    """

    table: np.ndarray
    masks: np.ndarray
    valid: int

    @classmethod
    def of(cls, spec: ConvSpec, geometry: Geometry) -> Tiling:
        width = geometry.tile_w * geometry.chunk
        y0 = _starts(spec.out_h, geometry.tile_h)
        x0 = _starts(spec.out_w, width)
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
        return cls(np.ascontiguousarray(table, np.int64), masks, min(width, spec.out_w))


def _starts(size: int, tile: int) -> np.ndarray:
    """First elements of tiles that cover ``size``; the last one overlaps rather than reaching outside."""
    count = -(-size // tile)
    return np.minimum(np.arange(count) * tile, max(size - tile, 0))


def _masks(spec: ConvSpec, geometry: Geometry, first: np.ndarray) -> np.ndarray:
    stride = spec.stride[1]
    length = mask_length(geometry.chunk, stride)
    step = stride if stride > 2 else 1
    x = first[:, None, None] + np.array(geometry.line_x)[None, :, None] + step * np.arange(length)
    return np.where((x >= 0) & (x < spec.w), -1, 0).astype(np.int32)


class _Runner(Runner):
    def __init__(self, spec: ConvSpec, geometry: Geometry, packed: PackedRows, activation: Activation) -> None:
        tiling = Tiling.of(spec, geometry)
        runs_per_vector = geometry.lanes // geometry.chunk
        zero_mask = np.zeros(len(geometry.line_x) * mask_length(geometry.chunk, spec.stride[1]), np.int32)
        self._rows_code = functools.partial(_rows_code, geometry, tiling.valid, activation, packed.form)
        rows_code = self._rows_code(False)
        displacements = tuple(4 * x for x in geometry.line_x)
        pack_code = _pack_code(geometry.lanes, geometry.chunk, spec.stride[1], displacements, geometry.ahead)
        self._code = _entry_code()
        self._keep = (tiling, packed, zero_mask, rows_code, pack_code)
        self.nbytes = packed.nbytes
        words = self._words = np.zeros(_WORDS, np.int64)
        groups = -(-len(tiling.table) // runs_per_vector)
        words[_UNITS], words[_SPLITS] = groups * packed.splits, packed.splits
        words[_RUNS], words[_RUNS_PER_VECTOR] = len(tiling.table), runs_per_vector
        words[_BLOCKS], words[_BLOCK], words[_CHANNELS] = packed.blocks, packed.block, len(packed.channels)
        words[_K], words[_H] = spec.k, spec.h
        words[_IN_PLANE], words[_OUT_PLANE] = 4 * spec.h * spec.w, 4 * spec.out_h * spec.out_w
        words[_OUT_PITCH] = 4 * spec.out_w
        words[_PATCH_ROWS], words[_ROW_STEP] = geometry.patch_rows, geometry.row_step
        words[_ROW_STEP_BYTES] = 4 * geometry.row_step * spec.w
        words[_CHANNEL_BYTES] = geometry.channel_bytes
        arrays = (packed.entries, packed.decoder, packed.rows, packed.starts, packed.segments, packed.channels)
        for i, array in enumerate((*arrays, tiling.table, tiling.masks, zero_mask)):
            words[_ENTRIES + i] = array.ctypes.data
        words[_PACK_CODE], words[_ROWS_CODE] = pack_code.address, rows_code.address
        # Scratch: the table of packed rows, output addresses, the packed block, partial sums.
        outs_at = 16 * geometry.patch_rows * runs_per_vector
        packed_at = -(-(outs_at + 8 * (runs_per_vector + 1)) // 64) * 64
        partial_at = -(-(packed_at + packed.block * geometry.channel_bytes) // 64) * 64
        rows = -(-spec.k // packed.splits) + 1 if packed.blocks > 1 else 0
        words[_OUTS_AT], words[_PACKED_AT], words[_PARTIAL_AT] = outs_at, packed_at, partial_at
        self.workspace = partial_at + rows * len(geometry.displacements) * geometry.vector_bytes
        self._address = words.ctypes.data

    def run(self, x: int, y: int, bias: int, threads: int, residual: int = 0) -> None:
        if residual:
            words = with_residual(self._words, {_RESIDUAL: residual, _ROWS_CODE: self._rows_code(True).address})
            cpu.run(self._code.address, words.ctypes.data, x, y, bias, threads, self.workspace)
        else:
            cpu.run(self._code.address, self._address, x, y, bias, threads, self.workspace)


def _rows_code(geometry: Geometry, valid: int, activation: Activation, entries: Entries, residual: bool) -> Code:
    g = geometry
    return compile_rows(
        lanes=g.lanes,
        rows=g.tile_h,
        columns=g.tile_w,
        displacements=g.displacements,
        chunk=g.chunk,
        valid=valid,
        aligned=g.aligned,
        activation=activation,
        entries=entries,
        residual=residual,
    )


@functools.cache
def _pack_code(lanes: int, chunk: int, stride: int, displacements: tuple[int, ...], ahead: tuple[int, int]) -> Code:
    function = pack_function(lanes, chunk, stride, displacements, ahead)
    return compile_c(function, PACK_SIGNATURE, repr((lanes, chunk, stride, displacements, ahead)))


@functools.cache
def _entry_code() -> Code:
    return compile_c(_entry, cpu.ENTRY_SIGNATURE, "")


_call_pack, _call_rows = call_address(8), call_address(ROWS_ARGUMENTS)


def _entry(params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int) -> None:
    """Work on units (a vector of runs, a range of output channels) until none is left."""
    units, splits = load_i64(params + 8 * _UNITS), load_i64(params + 8 * _SPLITS)
    blocks, block = load_i64(params + 8 * _BLOCKS), load_i64(params + 8 * _BLOCK)
    channels, runs = load_i64(params + 8 * _CHANNELS), load_i64(params + 8 * _RUNS)
    height, out_channels = load_i64(params + 8 * _H), load_i64(params + 8 * _K)
    in_plane, out_plane = load_i64(params + 8 * _IN_PLANE), load_i64(params + 8 * _OUT_PLANE)
    pitch, runs_per_vector = load_i64(params + 8 * _OUT_PITCH), load_i64(params + 8 * _RUNS_PER_VECTOR)
    patch_rows, row_step = load_i64(params + 8 * _PATCH_ROWS), load_i64(params + 8 * _ROW_STEP)
    row_step_bytes, channel_bytes = load_i64(params + 8 * _ROW_STEP_BYTES), load_i64(params + 8 * _CHANNEL_BYTES)
    entries, decoder = load_i64(params + 8 * _ENTRIES), load_i64(params + 8 * _DECODER)
    rows = load_i64(params + 8 * _ROWS)
    starts, segments = load_i64(params + 8 * _STARTS), load_i64(params + 8 * _SEGMENTS)
    channel_list, table = load_i64(params + 8 * _CHANNEL_LIST), load_i64(params + 8 * _RUN_TABLE)
    masks, zero_mask = load_i64(params + 8 * _MASKS), load_i64(params + 8 * _ZERO_MASK)
    pack_code, rows_code = load_i64(params + 8 * _PACK_CODE), load_i64(params + 8 * _ROWS_CODE)
    outs = arena + load_i64(params + 8 * _OUTS_AT)
    packed = arena + load_i64(params + 8 * _PACKED_AT)
    partials = arena + load_i64(params + 8 * _PARTIAL_AT)
    store_i64(outs + 8 * runs_per_vector, load_i64(params + 8 * _RESIDUAL) - y)
    while True:
        unit = cpu.next_unit(counters, thread, threads, units)
        if unit < 0:
            return
        group, split = unit // splits, unit % splits
        # Where each packed row comes from; rows outside of the image have an all-zero mask.
        for p in range(runs_per_vector):
            run = table + 32 * min(group * runs_per_vector + p, runs - 1)
            source, row, mask = load_i64(run), load_i64(run + 8), masks + load_i64(run + 16)
            for i in range(patch_rows):
                at = arena + 16 * (i * runs_per_vector + p)
                store_i64(at, source + i * row_step_bytes)
                store_i64(at + 8, mask if 0 <= row + i * row_step < height else zero_mask)
            store_i64(outs + 8 * p, y + load_i64(run + 24))
        base = (split * out_channels + splits - 1) // splits
        for b in range(blocks):
            segment = segments + 16 * (b * splits + split)
            if load_i32(segment) == load_i32(segment + 16):
                continue
            first = channel_list + 4 * b * block
            count = min(block, channels - b * block)
            _call_pack(pack_code, (packed, x, first, count, in_plane, arena, patch_rows, channel_bytes))
            for role in range(4):
                low, high = load_i32(segment + 4 * role), load_i32(segment + 4 * role + 4)
                if low < high:
                    where = (packed, low, high, entries, decoder, rows, starts, partials)
                    _call_rows(rows_code, (role, *where, base, bias, outs, out_plane, pitch))


class CpuDirect(Kernel):
    """Direct sparse convolution of any spec on the CPU; see the module's text."""

    name = "cpu_direct"
    device = "cpu"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return reason_unsupported(spec, weight)

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        config = with_entries(config)
        reason = check_fields(
            config,
            {
                "lanes": (4, 16),
                "chunk": (2, 16),
                "tile": (),
                "taps": ("copied", "shifted"),
                "block_kb": (1, _MAX_WORKSPACE >> 10),
                "split": (1, 256),
                "prefetch": ("none", "next"),
                "entries": ("wide", "coded"),
            },
        )
        return reason or _check_values(flat(spec), weight, config)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        spec, lanes = flat(spec), cpu.vector_lanes()
        chunks = [c for c in (lanes, lanes // 2, lanes // 4) if c >= 4]
        tiles = sorted({tile for c in chunks for tile in _tiles(spec, lanes, c)[:_TILES_TRIED]})
        return {
            "lanes": (lanes,),
            "chunk": tuple(chunks),
            "tile": tuple(f"{h}x{w}" for h, w in tiles),
            "taps": ("copied", "shifted") if spec.s > 1 else ("shifted",),
            "block_kb": _block_sizes(weight.density),
            "split": tuple(p for p in (1, threads) if p <= spec.k) if _few_units(spec, lanes, threads) else (1,),
            "prefetch": prefetch_choices(spec),
            **_entries(weight),
        }

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        spec, lanes = flat(spec), cpu.vector_lanes()
        chunks = [c for c in (lanes, lanes // 2, lanes // 4) if c >= 4]
        ranked = [(_score(spec, lanes, c, *t), c, t) for c in chunks for t in _tiles(spec, lanes, c)[:1]]
        _, chunk, (tile_h, tile_w) = max(ranked)
        shifted = chunk == lanes and (weight.density < 0.06 or spec.s == 1)
        sizes = _block_sizes(weight.density)
        config: Config = {
            "lanes": lanes,
            "chunk": chunk,
            "tile": f"{tile_h}x{tile_w}",
            "taps": "shifted" if shifted else "copied",
            "block_kb": sizes[1],
            "split": min(threads, spec.k) if _few_units(spec, lanes, threads) else 1,
            "prefetch": prefetch_choices(spec)[-1],
            **{name: choices[0] for name, choices in _entries(weight).items()},
        }
        # Small blocks cut many short rows: then larger ones, up to all channels at once.
        for size in (*sizes[1:], _MAX_WORKSPACE >> 10):
            config["block_kb"] = size
            if self.check(spec, weight, config) is None:
                break
        return config

    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> Runner:
        self.require(spec, weight, config)
        spec = flat(spec)
        geometry = Geometry.of(spec, config)
        block, entries = _block_channels(geometry, config), entries_of(config)
        packed = pack_rows(weight, geometry.channel_bytes, geometry.tap_bytes, block, int(config["split"]), entries)
        return _Runner(spec, geometry, packed, activation)


_TILES_TRIED = 5


def flat(spec: ConvSpec) -> ConvSpec:
    """A pointwise convolution as one long row, so that tiles need not end where image rows do."""
    if not spec.is_pointwise or spec.is_padded or spec.stride != (1, 1):
        return spec
    return dataclasses.replace(spec, h=1, w=spec.h * spec.w)


def _check_values(spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
    lanes, chunk, split = int(config["lanes"]), int(config["chunk"]), int(config["split"])
    tile_h, tile_w = parse_tile(config["tile"])
    if lanes not in (4, 8, 16) or chunk not in (2, 4, 8, 16) or chunk > lanes:
        return f"lanes must be 4, 8 or 16 and chunk a power of two from 2 to lanes, got {lanes} and {chunk}"
    if config["taps"] == "shifted" and chunk != lanes:
        return f"shifted taps need chunk == lanes, got {chunk} and {lanes}"
    if not 1 <= tile_h * tile_w <= 28:
        return f"tile must be like '7x2' with 1 to 28 accumulators, got {config['tile']!r}"
    if tile_h > spec.out_h:
        return f"tile of {tile_h} rows exceeds the output's height {spec.out_h}"
    if (tile_w - 1) * chunk >= spec.out_w:
        return f"tile of {tile_w} vectors has vectors beyond the output's width {spec.out_w}"
    if split > spec.k:
        return f"split {split} exceeds the {spec.k} output channels"
    geometry = Geometry.of(spec, config)
    workspace = _block_channels(geometry, config) * geometry.channel_bytes
    if workspace > _MAX_WORKSPACE or geometry.channel_bytes > _MAX_WORKSPACE:
        return f"a block takes {workspace} bytes, the limit is {_MAX_WORKSPACE}"
    entries = entries_of(config)
    if entries == "coded" and (reason := reason_not_coded(weight, workspace)) is not None:
        return reason
    return reason_cut_too_much(weight, _block_channels(geometry, config), split, entries)


def _entries(weight: SparseWeight) -> dict[str, tuple[Entries, ...]]:
    """The parameter ``entries``, where there is a choice."""
    return {} if weight.levels is None else {"entries": entry_choices(weight, _MAX_WORKSPACE)}


def _block_channels(geometry: Geometry, config: Config) -> int:
    return max(1, (int(config["block_kb"]) << 10) // geometry.channel_bytes)


def _block_sizes(density: float) -> tuple[int, ...]:
    """KiB of packed input worth trying: parts of the first cache; the second too where little is computed."""
    first, second = cpu.cache_bytes()
    kb = first >> 10
    sizes = [max(1, kb * 45 // 100), max(1, kb * 70 // 100), max(1, kb * 95 // 100), 2 * kb]
    if density < 0.06:
        sizes = [*sizes[1:], 4 * kb, max(8 * kb, (second >> 10) // 2)]
    return tuple(sizes)


def _score(spec: ConvSpec, lanes: int, chunk: int, tile_h: int, tile_w: int) -> float:
    """Share of useful work, times that of FMAs among the loads, less what packing the halo costs."""
    runs = spec.n * -(-spec.out_h // tile_h) * -(-spec.out_w // (tile_w * chunk))
    vectors = -(-runs * chunk // lanes)
    accumulators = tile_h * tile_w
    useful = spec.n * spec.out_h * spec.out_w / (vectors * accumulators * lanes)
    halo = (tile_h + (spec.r - 1) / spec.stride[0]) / tile_h
    # Below eight accumulators the sets in turn need twice the broadcasts for the same work.
    return useful * accumulators / (accumulators + 1.2) / (0.9 + 0.1 * halo)


def _tiles(spec: ConvSpec, lanes: int, chunk: int) -> list[tuple[int, int]]:
    """Tiles by falling `_score`."""
    most = most_accumulators()
    tiles = [
        (h, w)
        for h in range(1, min(spec.out_h, most) + 1)
        for w in range(1, most // h + 1)
        if (w - 1) * chunk < spec.out_w
    ]
    return sorted(tiles, key=lambda t: (-_score(spec, lanes, chunk, *t), t))


def _few_units(spec: ConvSpec, lanes: int, threads: int) -> bool:
    """Whether tiles alone give the threads too little to share evenly."""
    vectors = spec.n * spec.out_h * spec.out_w / lanes
    return threads > 1 and vectors / most_accumulators() < 6 * threads
