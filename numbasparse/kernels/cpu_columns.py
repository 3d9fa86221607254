"""Pointwise (1x1, stride 1) sparse convolution on the CPU, one input channel after another.

The other kernels keep the sums of an output channel in registers and read an input for every non-zero, from the
second cache where a tile of all input channels is larger than the first.  Here a tile of one input channel stays in
registers while the non-zeros of its column pass by, and the sums of a range of output channels wait in the first cache:
a product costs a load and a store there, and every input is read once for each range.  It pays where there are fewer
output channels than input channels.

Channels of a range are taken in the order of their non-zeros, so that the loop's end is foreseen.

Search space
------------
``lanes``
    float32 lanes of a vector.
``vectors``
    Vectors of pixels of a tile.
``rows``
    Output channels of a range.
``prefetch``
    ``"next"`` fetches the next tile's input, channel by channel, while this one's is worked on.
``entries``
    For quantized weights: ``"coded"`` reads places in a table of values, 4 bytes with the output channel, ``"wide"``
    reads decoded values.

The order of work is that of an outer product (Buluc and Gilbert, "On the representation and multiplication of
hypersparse matrices", IPDPS 2008), with a dense accumulator.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import (
    ENTRY_BYTES,
    Entries,
    add_column,
    clear_vectors,
    finish_vectors,
    load_i32,
    load_i64,
)
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.kernels.cpu_rows import (
    coordinates,
    displacements_in_place,
    entries_of,
    lanes_in_place,
    most_packed_bytes,
    prefetch_choices,
    reason_not_in_place,
    reason_not_tiled,
    reason_unsupported,
    wide_entries,
    with_entries,
)
from numbasparse.kernels.cpu_runner import CpuRunner
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_MOST_VECTORS, _MOST = 8, 1 << 16
"""Of a tile; input channels and non-zeros of a column are 16 bits."""
_MOST_SUMS = 1 << 18
"""Bytes of the sums of a range: their offsets, divided by 4, are 16 bits of a coded entry."""

# Words of the parameter block (int64 each).
(
    _UNITS, _TILES, _RANGES, _ROWS, _K, _PIXELS, _STEP, _IN_IMAGE, _OUT_IMAGE,
    _ENTRIES, _COLUMNS, _FIRSTS, _STARTS, _SCALES, _TABLE, _ADDED, _WORDS,
) = range(17)  # fmt: skip


class _Runner(CpuRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        lanes, vectors, rows = (int(config[field]) for field in ("lanes", "vectors", "rows"))
        pixels, coded = spec.h * spec.w, entries_of(config) == "coded"
        row_bytes, step = 4 * lanes * vectors, min(lanes * vectors, pixels)
        packed = pack(weight, rows, row_bytes, coded)
        displacements = displacements_in_place(lanes, vectors, pixels)
        ahead = 4 * step if config["prefetch"] == "next" else 0
        self._code = functools.partial(_compiled, lanes, displacements, coded, ahead, activation)
        self._keep = packed
        self.nbytes = sum(array.nbytes for array in packed)
        words = self._words = np.zeros(_WORDS, np.int64)
        tiles, ranges = -(-pixels // step), -(-spec.k // rows)
        words[_UNITS], words[_TILES], words[_RANGES] = spec.n * tiles * ranges, tiles, ranges
        words[_ROWS], words[_K], words[_PIXELS], words[_STEP] = rows, spec.k, pixels, step
        words[_IN_IMAGE], words[_OUT_IMAGE] = 4 * spec.c * pixels, 4 * spec.k * pixels
        for i, array in enumerate(packed):
            words[_ENTRIES + i] = array.ctypes.data
        workspace = 128 + rows * row_bytes
        super().__init__(Job(self._code(False), words, workspace))

    def adding(self) -> Job:
        return Job(self._code(True), self._words.copy(), self.workspace, residual_at=_ADDED, from_output=True)


def pack(weight: SparseWeight, rows: int, row_bytes: int, coded: bool) -> tuple[np.ndarray, ...]:
    """A weight in the order in which ranges of output channels and their columns are worked on.

    Returns
    -------
    entries : int64 or uint32, (nnz + 1,)
        As `codegen.simd.add_column` has them; the last is not used.
    columns : uint32
        Of every column of every range that has non-zeros the input channel, and in the upper 16 bits their number.
    firsts : int32, (ranges + 1,)
        Columns of a range.
    starts : int64, (ranges,)
        First entry of every range.
    scales : float32, (K,)
        Factors of the output channels.
    table : float32
        Values of codes.
    """
    ranges = -(-weight.k // rows)
    entries = np.zeros(weight.nnz + 1, np.uint32 if coded else np.int64)
    columns, firsts = [], np.zeros(ranges + 1, np.int32)
    for number in range(ranges):
        some = slice(number * rows, min((number + 1) * rows, weight.k))
        begin, end = weight.indptr[some.start], weight.indptr[some.stop]
        k, c, _, _ = coordinates(weight, some)
        counts = np.bincount(c, minlength=weight.kernel_shape[0])
        used = np.flatnonzero(counts)
        used = used[np.argsort(counts[used], kind="stable")]
        place = np.zeros(len(counts), np.int64)
        place[used] = np.arange(len(used))
        order = np.argsort(place[c], kind="stable")
        offsets = ((k - some.start) * row_bytes)[order]
        if coded:
            assert weight.levels is not None
            assert weight.codes is not None
            entries[begin:end] = offsets // 4 | weight.levels.places(weight.codes[begin:end], k)[order] << 16
        else:
            entries[begin:end] = wide_entries(weight.data[begin:end][order], offsets)
        columns.append((used | counts[used] << 16).astype(np.uint32))
        firsts[number + 1] = firsts[number] + len(used)
    starts = weight.indptr[np.arange(ranges) * rows].astype(np.int64)
    scales, table = np.ones(weight.k, np.float32), np.zeros(1, np.float32)
    if coded and weight.levels is not None:
        scales, table = scales * weight.levels.scale, np.asarray(weight.levels.tables()[0], np.float32)
    return entries, np.concatenate(columns), firsts, starts, np.ascontiguousarray(scales), np.ascontiguousarray(table)


@functools.cache
def _compiled(
    lanes: int, displacements: tuple[int, ...], coded: bool, ahead: int, activation: Activation, residual: bool
) -> Code:
    """The kernel's entry for tiles of vectors at ``displacements``; the next tile lies ``ahead`` bytes behind."""
    add, clear = add_column(lanes, displacements, coded, ahead), clear_vectors(lanes)
    finish = finish_vectors(lanes, displacements, activation, residual)
    row_bytes, entry_bytes = 4 * lanes * len(displacements), ENTRY_BYTES["coded" if coded else "wide"]

    def cpu_columns(
        params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int
    ) -> None:
        units, tiles, ranges = load_i64(params), load_i64(params + 8 * _TILES), load_i64(params + 8 * _RANGES)
        rows, out_channels = load_i64(params + 8 * _ROWS), load_i64(params + 8 * _K)
        pixels, step = load_i64(params + 8 * _PIXELS), load_i64(params + 8 * _STEP)
        in_image, out_image = load_i64(params + 8 * _IN_IMAGE), load_i64(params + 8 * _OUT_IMAGE)
        entries, columns = load_i64(params + 8 * _ENTRIES), load_i64(params + 8 * _COLUMNS)
        firsts, starts = load_i64(params + 8 * _FIRSTS), load_i64(params + 8 * _STARTS)
        scales, table = load_i64(params + 8 * _SCALES), load_i64(params + 8 * _TABLE)
        added, plane = load_i64(params + 8 * _ADDED), 4 * pixels
        # A vector of the sums must not lie across two lines of the cache.
        sums = (arena + 127) // 64 * 64
        while True:
            unit = cpu.next_unit(counters, thread, threads, units)
            if unit < 0:
                return
            # Ranges of one tile follow one another: they read the same input.
            own, tile, n = unit % ranges, unit // ranges % tiles, unit // (ranges * tiles)
            # The last tile overlaps the one before rather than reaching outside.
            pixel = 4 * min(tile * step, pixels - step)
            first = own * rows
            count = min(rows, out_channels - first)
            clear(sums, sums + count * row_bytes)
            source, at = x + n * in_image + pixel, entries + entry_bytes * load_i64(starts + 8 * own)
            column, end = columns + 4 * load_i32(firsts + 4 * own), columns + 4 * load_i32(firsts + 4 * own + 4)
            while column < end:
                word = load_i32(column)
                limit = at + entry_bytes * (word >> 16 & 0xFFFF)
                add(source + (word & 0xFFFF) * plane, at, limit, sums, table)
                at = limit
                column += 4
            target = y + n * out_image + pixel + first * plane
            for row in range(count):
                k = 4 * (first + row)
                finish(sums + row * row_bytes, scales + k, bias + k, target + row * plane, added)

    return compile_c(cpu_columns, cpu.ENTRY_SIGNATURE, repr((lanes, displacements, coded, ahead, activation, residual)))


class CpuColumns(Kernel):
    """Sparse matrix times the input, column by column; see the module's text."""

    name = "cpu_columns"
    device = "cpu"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        reason = reason_not_in_place(spec)
        if reason is not None:
            return reason
        if spec.groups > 1:
            return f"it knows one group of channels, got {spec.groups}"
        if spec.c > _MOST:
            return f"the number of an input channel has 16 bits, got {spec.c} channels"
        return reason_unsupported(spec, weight) or _reason_cut(weight, _most_rows(spec), "wide")

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        fields: dict[str, Any] = {"lanes": (4, 16), "vectors": (1, _MOST_VECTORS), "rows": (1, _MOST - 1)}
        config = with_entries(config)
        reason = check_fields(config, fields | {"prefetch": ("none", "next"), "entries": ("wide", "coded")})
        if reason is not None:
            return reason
        lanes, vectors = int(config["lanes"]), int(config["vectors"])
        reason = reason_not_tiled(lanes, vectors, spec.h * spec.w)
        if reason is not None:
            return reason
        if 4 * lanes * vectors * int(config["rows"]) > _MOST_SUMS:
            return f"the sums of {config['rows']} output channels exceed {_MOST_SUMS} bytes"
        if entries_of(config) == "coded" and (reason := _reason_not_coded(weight)) is not None:
            return reason
        return _reason_cut(weight, int(config["rows"]), entries_of(config))

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        lanes = lanes_in_place(spec)
        return {
            "lanes": (lanes,),
            "vectors": tuple(t for t in (1, 2, 3, 4, 6) if (t - 1) * lanes < spec.h * spec.w),
            "rows": tuple(sorted({_most_rows(spec), *(-(-spec.k // ranges) for ranges in (2, 4, 8, 16, 32))})),
            "prefetch": prefetch_choices(spec),
            **({} if weight.levels is None else {"entries": _entries(weight)}),
        }

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        pixels, first = spec.h * spec.w, cpu.cache_bytes()[0]

        def order(config: Config) -> tuple[Any, ...]:
            lanes, vectors, rows = (int(config[field]) for field in ("lanes", "vectors", "rows"))
            too_large = 4 * lanes * vectors * rows > 2 * first // 3
            # An entry takes as long as a vector or so by itself.
            clocks = -(-pixels // (lanes * vectors)) * (vectors + 1.2)
            fetches = config["prefetch"] == "next"
            return entries_of(config) != _entries(weight)[0], too_large, clocks, -rows, not fetches

        return min(self.configs(spec, weight, threads), key=order)

    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> Runner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)


def _most_rows(spec: ConvSpec) -> int:
    """Rows of a range whose sums, a vector each, have offsets."""
    return min(spec.k, _MOST_SUMS // (4 * lanes_in_place(spec)))


def _reason_cut(weight: SparseWeight, rows: int, entries: Entries) -> str | None:
    """Reason why ranges of so many rows take too much memory: every column of each has a word."""
    ranges = -(-weight.k // rows)
    columns = min(weight.nnz, ranges * weight.kernel_shape[0])
    size = ENTRY_BYTES[entries] * (weight.nnz + 1) + 4 * columns + 12 * ranges + 4 * weight.k
    most = most_packed_bytes(weight, entries)
    if size <= most:
        return None
    return f"ranges of {rows} output channels cut the rows into {columns} columns: {size} bytes, limit {most:.0f}"


def _entries(weight: SparseWeight) -> tuple[Entries, ...]:
    return ("wide",) if _reason_not_coded(weight) else ("coded", "wide")


def _reason_not_coded(weight: SparseWeight) -> str | None:
    if weight.levels is None:
        return "coded entries need a quantized weight, see SparseWeight.quantized"
    count = len(weight.levels.tables()[0])
    return None if count <= 1 << 16 else f"coded entries know {1 << 16} values, the weight has {count}"
