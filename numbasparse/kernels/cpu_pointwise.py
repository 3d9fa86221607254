"""Pointwise (1x1, stride 1) sparse convolution on the CPU, reading the input where it lies.

A 1x1 convolution is the product of a sparse matrix (K x C) with the input as a matrix (C x pixels).  A tile is
``vectors`` vectors of consecutive pixels of one image; the accumulators of an output channel stay in registers
while its non-zeros pass by, and each non-zero's input is read straight from the caller's array: nothing is
packed.  `cpu_direct` also runs these specs, with packing, which pays where pixels are few or channels many.

Search space
------------
``lanes``
    float32 lanes of a vector.
``vectors``
    Accumulators.
``block``
    Input channels before the next output channel's turn: keeps the tile's part of the input in cache.
``split``
    Ranges of output channels worked on separately.
``prefetch``
    ``"next"`` fetches the next tile's input into the second cache first: a tile's part of a channel is too
    short for the hardware to see a stream.
``entries``
    For quantized weights: ``"coded"`` reads codes and looks their values up, ``"wide"`` reads decoded values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import (
    ROWS_ARGUMENTS,
    Entries,
    call_address,
    load_i32,
    load_i64,
    prefetch,
    store_i64,
)
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.kernels.cpu_rows import (
    PackedRows,
    balanced_block,
    compile_rows,
    displacements_in_place,
    entries_of,
    entry_choices,
    lane_choices,
    lanes_in_place,
    most_accumulators,
    pack_rows,
    prefetch_choices,
    reason_cut_too_much,
    reason_not_coded,
    reason_not_in_place,
    reason_not_tiled,
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
    _UNITS, _SPLITS, _TILES, _BLOCKS, _BLOCK, _K, _PIXELS, _IN_IMAGE, _OUT_IMAGE,
    _ENTRIES, _DECODER, _ROWS, _STARTS, _SEGMENTS, _BASES, _CHANNELS, _CHANNEL_LIST, _ROWS_CODE, _TILE_PIXELS,
    _RESIDUAL, _WORDS,
) = range(21)  # fmt: skip


class _Runner(CpuRunner):
    def __init__(self, spec: ConvSpec, config: Config, packed: PackedRows, activation: Activation) -> None:
        lanes, vectors, pixels = int(config["lanes"]), int(config["vectors"]), spec.h * spec.w
        tile = min(vectors * lanes, pixels)
        tiles = -(-pixels // tile)
        # With several blocks, the offsets of a block's entries count from its first channel.
        first = packed.channels[:: packed.block].astype(np.int64) if len(packed.channels) else np.zeros(1, np.int64)
        bases = first * 4 * pixels
        self._code = _entry_code()
        shape = (lanes, vectors, min(pixels, vectors * lanes), activation, packed.form)
        self._rows_code = functools.partial(_rows_code, *shape)
        rows_code = self._rows_code(False)
        self._keep = (packed, bases, rows_code)
        self.nbytes = packed.nbytes
        words = self._words = np.zeros(_WORDS, np.int64)
        words[_UNITS], words[_SPLITS], words[_TILES] = spec.n * tiles * packed.splits, packed.splits, tiles
        words[_BLOCKS], words[_BLOCK], words[_K] = packed.blocks, packed.block, spec.k
        words[_PIXELS], words[_IN_IMAGE], words[_OUT_IMAGE] = pixels, 4 * spec.c * pixels, 4 * spec.k * pixels
        arrays = (packed.entries, packed.decoder, packed.rows, packed.starts, packed.segments, bases)
        for i, array in enumerate(arrays):
            words[_ENTRIES + i] = array.ctypes.data
        words[_CHANNELS] = len(packed.channels) if config["prefetch"] == "next" else 0
        words[_CHANNEL_LIST], words[_ROWS_CODE] = packed.channels.ctypes.data, rows_code.address
        words[_TILE_PIXELS] = tile
        rows = -(-spec.k // packed.splits) + 1 if packed.blocks > 1 else 0
        workspace = 64 + rows * vectors * 4 * lanes
        super().__init__(Job(self._code, words, workspace))

    def adding(self) -> Job:
        words = self._words.copy()
        words[_ROWS_CODE] = self._rows_code(True).address
        return Job(self._code, words, self.workspace, residual_at=_RESIDUAL)


def _rows_code(lanes: int, vectors: int, pixels: int, activation: Activation, entries: Entries, residual: bool) -> Code:
    """The inner loop for a tile of ``vectors``, in images of ``pixels``."""
    displacements = displacements_in_place(lanes, vectors, pixels)
    return compile_rows(
        lanes=lanes,
        rows=1,
        columns=vectors,
        displacements=displacements,
        chunk=lanes,
        valid=vectors * lanes,
        aligned=False,
        activation=activation,
        entries=entries,
        residual=residual,
        out_displacements=displacements,
    )


@functools.cache
def _entry_code() -> Code:
    return compile_c(_entry, cpu.ENTRY_SIGNATURE, "")


_call_rows = call_address(ROWS_ARGUMENTS)


def _entry(params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int) -> None:
    """Work on units (an image's tile, a range of output channels) until none is left."""
    units, splits = load_i64(params + 8 * _UNITS), load_i64(params + 8 * _SPLITS)
    tiles, blocks = load_i64(params + 8 * _TILES), load_i64(params + 8 * _BLOCKS)
    out_channels, image = load_i64(params + 8 * _K), load_i64(params + 8 * _PIXELS)
    in_image, out_image = load_i64(params + 8 * _IN_IMAGE), load_i64(params + 8 * _OUT_IMAGE)
    entries, decoder = load_i64(params + 8 * _ENTRIES), load_i64(params + 8 * _DECODER)
    rows = load_i64(params + 8 * _ROWS)
    starts, segments = load_i64(params + 8 * _STARTS), load_i64(params + 8 * _SEGMENTS)
    bases, rows_code = load_i64(params + 8 * _BASES), load_i64(params + 8 * _ROWS_CODE)
    channels, channel_list = load_i64(params + 8 * _CHANNELS), load_i64(params + 8 * _CHANNEL_LIST)
    step = load_i64(params + 8 * _TILE_PIXELS)
    plane, partials = 4 * image, arena + 64
    store_i64(arena + 8, load_i64(params + 8 * _RESIDUAL) - y)
    while True:
        unit = cpu.next_unit(counters, thread, threads, units)
        if unit < 0:
            return
        split, tile, n = unit % splits, unit // splits % tiles, unit // (splits * tiles)
        # The last tile overlaps the one before rather than reaching outside.
        pixel = 4 * min(tile * step, image - step)
        source = x + n * in_image + pixel
        store_i64(arena, y + n * out_image + pixel)
        # Without a wish to fetch ahead, the list is empty.
        for c in range(channels if split == 0 else 0):
            row = source + load_i32(channel_list + 4 * c) * plane + 4 * step
            for byte in range(0, 4 * step, 64):
                prefetch(row + byte)
        base = (split * out_channels + splits - 1) // splits
        for b in range(blocks):
            segment = segments + 16 * (b * splits + split)
            inputs = source + load_i64(bases + 8 * b)
            for role in range(4):
                low, high = load_i32(segment + 4 * role), load_i32(segment + 4 * role + 4)
                if low < high:
                    where = (inputs, low, high, entries, decoder, rows, starts, partials)
                    _call_rows(rows_code, (role, *where, base, bias, arena, plane, 0))


class CpuPointwise(Kernel):
    """Sparse matrix times the input in place; see the module's text."""

    name = "cpu_pointwise"
    device = "cpu"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        reason = reason_not_in_place(spec)
        if reason is not None:
            return reason
        if 4 * spec.c * spec.h * spec.w >= 2**31:
            return "one image exceeds 32-bit offsets"
        return reason_unsupported(spec, weight)

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        ranges: dict[str, Any] = {"lanes": (4, 16), "vectors": (1, 28), "block": (1, 1 << 20), "split": (1, 256)}
        fields = ranges | {"prefetch": ("none", "next"), "entries": ("wide", "coded")}
        config = with_entries(config)
        reason = check_fields(config, fields) or reason_not_tiled(
            int(config["lanes"]), int(config["vectors"]), spec.h * spec.w
        )
        if reason is not None:
            return reason
        if int(config["split"]) > spec.k:
            return f"split {config['split']} exceeds the {spec.k} output channels"
        entries = entries_of(config)
        if entries == "coded" and (reason := reason_not_coded(weight, _reach(spec))) is not None:
            return reason
        return reason_cut_too_much(weight, int(config["block"]), int(config["split"]), entries)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        lanes = lanes_in_place(spec)
        choices = tuple(choice for choice in lane_choices() if choice <= lanes) or (lanes,)
        vectors = {t for choice in choices for t in _tiles(spec, choice)[:_TILES_TRIED]}
        first, second = cpu.cache_bytes()
        blocks = {balanced_block(spec.c, max(1, size // (4 * lanes * 8))) for size in (first, 2 * first, second // 2)}
        few = spec.n * spec.h * spec.w / (lanes * most_accumulators()) < 6 * threads
        return {
            "lanes": choices,
            "vectors": tuple(sorted(vectors)),
            "block": tuple(sorted(blocks | {spec.c})),
            "split": tuple(p for p in (1, threads) if p <= spec.k) if few and threads > 1 else (1,),
            "prefetch": prefetch_choices(spec),
            **_entries(spec, weight),
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
        """Tiles by their share of useful work, for vectors of each width, with ever smaller blocks."""
        space = self.space(spec, weight, threads)
        entries: Entries = _entries(spec, weight).get("entries", ("wide",))[0]
        split = int(space["split"][-1])
        sizes = [int(block) for block in space["block"]]
        if weight.density <= 0.12:
            sizes.reverse()
        # To look at a size takes time: no more than can be suggested.
        valid_sizes = (size for size in sizes if reason_cut_too_much(weight, size, split, entries) is None)
        blocks = list(itertools.islice(valid_sizes, count))
        rest = {
            "split": split,
            "prefetch": space["prefetch"][-1],
            **({"entries": entries} if "entries" in space else {}),
        }
        tiles = [
            (int(lanes), vectors)
            for several in zip(*(_tiles(spec, int(lanes))[:_TILES_TRIED] for lanes in space["lanes"]), strict=False)
            for lanes, vectors in zip(space["lanes"], several, strict=True)
        ]
        # One tile with every block, and one block with every tile, in turns.
        pairs = sorted(itertools.product(range(len(blocks)), range(len(tiles))), key=lambda pair: (sum(pair), pair))
        return [
            {"lanes": tiles[t][0], "vectors": tiles[t][1], "block": blocks[b], **rest}
            for b, t in itertools.islice(pairs, count)
        ]

    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> Runner:
        self.require(spec, weight, config)
        plane = 4 * spec.h * spec.w
        block, split, entries = int(config["block"]), int(config["split"]), entries_of(config)
        packed = pack_rows(weight, plane, np.zeros((1, 1), np.int64), block, split, entries, in_place=True)
        return _Runner(spec, config, packed, activation)


def _entries(spec: ConvSpec, weight: SparseWeight) -> dict[str, tuple[Entries, ...]]:
    """The parameter ``entries``, where there is a choice."""
    return {} if weight.levels is None else {"entries": entry_choices(weight, _reach(spec))}


def _reach(spec: ConvSpec) -> int:
    """Bytes below which offsets stay: a block's used channels may lie anywhere in the image."""
    return 4 * spec.c * spec.h * spec.w


_TILES_TRIED = 5


def _tiles(spec: ConvSpec, lanes: int) -> list[int]:
    """Numbers of vectors by falling share of useful work times that of FMAs among the loads."""
    pixels = spec.h * spec.w
    choices = [t for t in range(1, most_accumulators() + 1) if (t - 1) * lanes < pixels]

    def score(t: int) -> float:
        return pixels / (-(-pixels // (t * lanes)) * t * lanes) * t / (t + 1.2)

    return sorted(choices, key=lambda t: (-score(t), t))
