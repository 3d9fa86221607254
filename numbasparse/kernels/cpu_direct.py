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
    KiB of packed input that a tile reads at a time (at least one channel).  With several blocks, partial sums go
    through memory in between.
``patch_kb``
    KiB for what is packed at once, and its partial sums: as many tiles side by side as fit, then whole rows of
    tiles, at least one tile.  They share their halo, and long rows are what the hardware's prefetching sees.  More
    than ``block_kb`` lies in the second cache, from where each tile brings its own part to the first.
``split``
    Ranges of output channels worked on separately, for more parallel units; each packs the input anew.
``prefetch``
    ``"next"`` fetches the next patch's input into the second cache while this one's is packed: rows of a tile
    are too short for the hardware to see a stream.  ``"channel"`` fetches the next channel's: its rows are in
    the cache only until they are packed, which suits images whose planes fall on the same lines of a cache.
``entries``
    For quantized weights: ``"coded"`` reads codes and looks their values up, ``"wide"`` reads decoded values:
    twice the memory, an instruction or two less for each non-zero.

The idea of lanes as separate tiles with aligned taps and of a register tile over the non-zero list follows the
direct sparse convolution of SkimCaffe (Park et al., arXiv 1608.01409).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import (
    PACK_SIGNATURE,
    ROWS_ARGUMENTS,
    Ahead,
    Entries,
    PackedLayout,
    call_address,
    load_i32,
    load_i64,
    mask_length,
    pack_function,
    store_i64,
)
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.kernels.cpu_patches import Geometry, Tiling, estimate, parse_tile
from numbasparse.kernels.cpu_rows import (
    PackedRows,
    compile_rows,
    entries_of,
    entry_choices,
    lane_choices,
    most_accumulators,
    pack_rows,
    prefetch_choices,
    reason_cut_too_much,
    reason_not_coded,
    reason_unsupported,
    with_entries,
)
from numbasparse.kernels.cpu_runner import CpuRunner
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

# Words of the parameter block (int64 each).
(
    _UNITS, _SPLITS, _RUNS, _BLOCKS, _BLOCK, _CHANNELS, _K, _H,
    _IN_PLANE, _OUT_PLANE, _OUT_PITCH, _PATCH_ROWS, _ROW_STEP, _ROW_STEP_BYTES, _CHANNEL_BYTES,
    _ENTRIES, _DECODER, _ROWS, _STARTS, _SEGMENTS, _CHANNEL_LIST, _RUN_TABLE, _MASKS, _ZERO_MASK,
    _PACK_CODE, _ROWS_CODE, _RUNS_PER_VECTOR,
    _OUTS_AT, _PACKED_AT, _PARTIAL_AT, _RESIDUAL, _TILES, _TILE_TABLE, _TILE_PARTIALS, _WORDS,
) = range(35)  # fmt: skip

_MAX_WORKSPACE = 64 << 20


class _Runner(CpuRunner):
    def __init__(self, spec: ConvSpec, geometry: Geometry, packed: PackedRows, activation: Activation) -> None:
        tiling = Tiling.of(spec, geometry)
        runs_per_vector = geometry.lanes // geometry.chunk
        zero_mask = np.zeros(len(geometry.columns.line_x) * mask_length(geometry.chunk, spec.stride[1]), np.int32)
        self._rows_code = functools.partial(_rows_code, geometry, tiling.valid, activation, packed.form)
        rows_code = self._rows_code(False)
        displacements = tuple(4 * x for x in geometry.columns.line_x)
        layout = PackedLayout(displacements, geometry.columns.places, geometry.columns.pitch)
        pack_code = _pack_code(geometry.lanes, geometry.chunk, spec.stride[1], layout, geometry.ahead)
        self._code = _entry_code()
        self._keep = (tiling, geometry, packed, zero_mask, rows_code, pack_code)
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
        words[_TILES], words[_TILE_TABLE] = len(geometry.tiles), geometry.tiles.ctypes.data
        # Scratch: the table of packed rows, output addresses, the packed block, partial sums of each tile.
        outs_at = 16 * geometry.patch_rows * runs_per_vector
        packed_at = -(-(outs_at + 8 * (runs_per_vector + 1)) // 64) * 64
        partial_at = -(-(packed_at + packed.block * geometry.channel_bytes) // 64) * 64
        rows = -(-spec.k // packed.splits) + 1 if packed.blocks > 1 else 0
        words[_OUTS_AT], words[_PACKED_AT], words[_PARTIAL_AT] = outs_at, packed_at, partial_at
        words[_TILE_PARTIALS] = rows * len(geometry.displacements) * geometry.vector_bytes
        workspace = partial_at + len(geometry.tiles) * int(words[_TILE_PARTIALS])
        super().__init__(Job(self._code, words, workspace))

    def adding(self) -> Job:
        words = self._words.copy()
        words[_ROWS_CODE] = self._rows_code(True).address
        return Job(self._code, words, self.workspace, residual_at=_RESIDUAL)


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
def _pack_code(lanes: int, chunk: int, stride: int, layout: PackedLayout, ahead: Ahead) -> Code:
    function = pack_function(lanes, chunk, stride, layout, ahead)
    return compile_c(function, PACK_SIGNATURE, repr((lanes, chunk, stride, layout, ahead)))


@functools.cache
def _entry_code() -> Code:
    return compile_c(_entry, cpu.ENTRY_SIGNATURE, "")


_call_pack, _call_rows = call_address(8), call_address(ROWS_ARGUMENTS)


def _entry(params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int) -> None:
    """Work on units (a vector of runs' patches, a range of output channels) until none is left."""
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
    tiles, tile_table = load_i64(params + 8 * _TILES), load_i64(params + 8 * _TILE_TABLE)
    tile_partials = load_i64(params + 8 * _TILE_PARTIALS)
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
        base = (split * out_channels + splits - 1) // splits
        for b in range(blocks):
            segment = segments + 16 * (b * splits + split)
            if load_i32(segment) == load_i32(segment + 16):
                continue
            first = channel_list + 4 * b * block
            count = min(block, channels - b * block)
            _call_pack(pack_code, (packed, x, first, count, in_plane, arena, patch_rows, channel_bytes))
            for t in range(tiles):
                source = packed + load_i64(tile_table + 16 * t)
                target = y + load_i64(tile_table + 16 * t + 8)
                for p in range(runs_per_vector):
                    run = table + 32 * min(group * runs_per_vector + p, runs - 1)
                    store_i64(outs + 8 * p, target + load_i64(run + 24))
                for role in range(4):
                    low, high = load_i32(segment + 4 * role), load_i32(segment + 4 * role + 4)
                    if low < high:
                        where = (source, low, high, entries, decoder, rows, starts, partials + t * tile_partials)
                        _call_rows(rows_code, (role, *where, base, bias, outs, out_plane, pitch))


class CpuDirect(Kernel):
    """Direct sparse convolution of any spec on the CPU; see the module's text."""

    name = "cpu_direct"
    device = "cpu"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return reason_unsupported(spec, weight)

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        config = _complete(config)
        reason = check_fields(
            config,
            {
                "lanes": (4, 16),
                "chunk": (2, 16),
                "tile": (),
                "taps": ("copied", "shifted"),
                "block_kb": (1, _MAX_WORKSPACE >> 10),
                "split": (1, 256),
                "patch_kb": (0, _MAX_WORKSPACE >> 10),
                "prefetch": ("none", "next", "channel"),
                "entries": ("wide", "coded"),
            },
        )
        return reason or _check_values(flat(spec), weight, config)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        spec, lanes = flat(spec), cpu.vector_lanes()
        pairs = [(every, chunk) for every in lane_choices() for chunk in _chunks(every)]
        tiles = sorted({tile for pair in pairs for tile in _tiles(spec, *pair)[:_TILES_TRIED]})
        return {
            "lanes": lane_choices(),
            "chunk": tuple(dict.fromkeys(chunk for _, chunk in pairs)),
            "tile": tuple(f"{h}x{w}" for h, w in tiles),
            # Lanes of several chunks take copied taps, those of 1x1 kernels too.
            "taps": ("copied", "shifted"),
            "block_kb": _block_sizes(weight.density),
            "patch_kb": _patch_sizes(spec),
            "split": tuple(p for p in (1, threads) if p <= spec.k) if _few_units(spec, lanes, threads) else (1,),
            "prefetch": _prefetch_choices(spec),
            **_entries(weight),
        }

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return self.suggest(spec, weight, threads, 1)[0]

    def suggest(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        threads: int,
        count: int,
        valid: Sequence[Config] | None = None,
    ) -> list[Config]:
        """The tile of the best `_score`, unless `estimate` finds others much better; then its next ones.

        Where narrower vectors are worth a try too, theirs are every second: `estimate` does not know which are faster.
        """
        by_lanes = [_ranked(spec, weight, threads, lanes) for lanes in lane_choices()]
        mixed = itertools.chain.from_iterable(itertools.zip_longest(*by_lanes))
        fitting = (self._fitted(spec, weight, config) for config in mixed if config is not None)
        return list(itertools.islice(fitting, count))

    def _fitted(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> Config:
        """The config with larger blocks, up to all channels at once, where small ones cut many short rows."""
        for size in (*_block_sizes(weight.density)[1:], _MAX_WORKSPACE >> 10):
            config = {**config, "block_kb": size}
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
        spec, config = flat(spec), _complete(config)
        geometry = Geometry.of(spec, config)
        packed = pack_rows(
            weight,
            geometry.channel_bytes,
            geometry.tap_bytes,
            geometry.block,
            int(config["split"]),
            entries_of(config),
        )
        return _Runner(spec, geometry, packed, activation)


_TILES_TRIED = 5


def flat(spec: ConvSpec) -> ConvSpec:
    """A pointwise convolution as one long row, so that tiles need not end where image rows do."""
    if not spec.is_pointwise or spec.is_padded or spec.stride != (1, 1):
        return spec
    return dataclasses.replace(spec, h=1, w=spec.h * spec.w)


def _complete(config: Config) -> Config:
    """The config with what may be left out: patches of one tile, wide entries."""
    return with_entries({"patch_kb": 0, **config})


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
    workspace = geometry.block * geometry.channel_bytes
    if workspace > _MAX_WORKSPACE or geometry.channel_bytes > _MAX_WORKSPACE:
        return f"a block takes {workspace} bytes, the limit is {_MAX_WORKSPACE}"
    entries = entries_of(config)
    if entries == "coded" and (reason := reason_not_coded(weight, workspace)) is not None:
        return reason
    return reason_cut_too_much(weight, geometry.block, split, entries)


def _entries(weight: SparseWeight) -> dict[str, tuple[Entries, ...]]:
    """The parameter ``entries``, where there is a choice."""
    return {} if weight.levels is None else {"entries": entry_choices(weight, _MAX_WORKSPACE)}


_MUCH_BETTER = 0.85


def _ranked(spec: ConvSpec, weight: SparseWeight, threads: int, lanes: int) -> list[Config]:
    """Configs for vectors of so many lanes, the best first."""
    usual, *others = _candidates(spec, weight, threads, lanes)
    others = [found for found in sorted(others, key=lambda found: found[0]) if found[1] != usual[1]]
    better = bool(others) and others[0][0] < _MUCH_BETTER * usual[0]
    return [config for _, config in (*others[:better], usual, *others[better:])]


def _chunks(lanes: int) -> list[int]:
    return [chunk for chunk in (lanes, lanes // 2, lanes // 4) if chunk >= 4]


def _candidates(spec: ConvSpec, weight: SparseWeight, threads: int, lanes: int) -> Iterator[tuple[float, Config]]:
    """Configs of the better tiles, with their `estimate`; the first is of the best one."""
    spec = flat(spec)
    split = min(threads, spec.k) if _few_units(spec, lanes, threads) else 1
    chunks = _chunks(lanes)

    def candidate(chunk: int, tile: tuple[int, int], taps: str, patch_kb: int) -> tuple[float, Config]:
        config: Config = {
            "lanes": lanes,
            "chunk": chunk,
            "tile": f"{tile[0]}x{tile[1]}",
            "taps": taps,
            "block_kb": _block_sizes(weight.density)[1],
            "patch_kb": patch_kb,
            "split": split,
            "prefetch": _prefetch_choices(spec)[-1],
            **{name: choices[0] for name, choices in _entries(weight).items()},
        }
        return estimate(spec, weight.nnz, Geometry.of(spec, config), split), config

    _, chunk, tile = max((_score(spec, lanes, c, *t), c, t) for c in chunks for t in _tiles(spec, lanes, c)[:1])
    shifted = chunk == lanes and (weight.density < 0.06 or spec.s == 1)
    yield candidate(chunk, tile, "shifted" if shifted else "copied", 0)
    for chunk in chunks:
        taps = ("copied", "shifted")[spec.s == 1 : 2 if chunk == lanes else 1]
        for choice in itertools.product(_tiles(spec, lanes, chunk)[:_TILES_TRIED], taps, _patch_sizes(spec)):
            yield candidate(chunk, *choice)


def _patch_sizes(spec: ConvSpec) -> tuple[int, ...]:
    """KiB worth trying: parts of the second cache, where an image has more."""
    second = cpu.cache_bytes()[1] >> 10
    return tuple(dict.fromkeys((0, second // 4, second // 2))) if _beyond_second_cache(spec) else (0,)


def _prefetch_choices(spec: ConvSpec) -> tuple[str, ...]:
    return (*prefetch_choices(spec), "channel") if _beyond_second_cache(spec) else ("none",)


def _beyond_second_cache(spec: ConvSpec) -> bool:
    return len(prefetch_choices(spec)) > 1


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
