"""Sparse matrix times a few vectors on the CPU: 1x1 convolutions of hardly any pixels, as linear layers are.

With one pixel there are no neighbours for the lanes of a vector to hold, so they hold the non-zeros of an output
channel instead: 16 values, and the 16 inputs that they belong to, by a gather.  The weight is read once and in order,
in chunks of values and 16-bit places, 6 bytes for each non-zero: for layers larger than the caches, as the first
linear layer of VGG-16, memory is the bound.  Inputs are taken in blocks that stay in the first cache; a unit of work is
a range of output channels, whose sums wait in scratch memory from block to block.

Search space
------------
``lanes``
    float32 lanes of a vector.
``rows``
    Output channels of a unit of work.
``block``
    Input channels of a block, at most 65,536.
``entries``
    For quantized weights: ``"coded"`` reads bytes and looks their values up by a second gather, ``"wide"`` reads
    decoded values.

The layout is that of ELLPACK cut into chunks, row by row (Bell and Garland, "Implementing sparse matrix-vector
multiplication on throughput-oriented processors", SC 2009).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import clear_f32, finish_sums, gather_dot, load_i32, load_i64
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.kernels.cpu_rows import entries_of, reason_unsupported, with_entries
from numbasparse.kernels.cpu_runner import CpuRunner
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_MOST_VECTORS = 4
"""Vectors whose sums are kept at once."""
_MOST_BLOCK = 1 << 16
"""Places are 16 bits."""

# Words of the parameter block (int64 each).
(
    _UNITS, _ROWS, _K, _BLOCKS, _BLOCK_BYTES, _STREAM, _STARTS, _COUNTS, _TABLES, _SCALES, _TABLE, _PLANE, _ADDED,
    _WORDS,
) = range(14)  # fmt: skip


class _Runner(CpuRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        lanes, rows, block = (int(config[field]) for field in ("lanes", "rows", "block"))
        pixels, coded = spec.h * spec.w, entries_of(config) == "coded"
        packed = pack(weight, lanes, rows, block, coded)
        vectors = [(n, pixel) for n in range(spec.n) for pixel in range(pixels)]
        places = tuple(4 * (n * spec.c * pixels + pixel) for n, pixel in vectors)
        targets = tuple(4 * (n * spec.k * pixels + pixel) for n, pixel in vectors)
        self._code = functools.partial(_compiled, lanes, places, targets, pixels, coded, activation)
        self._keep = packed
        self.nbytes = sum(array.nbytes for array in packed)
        words = self._words = np.zeros(_WORDS, np.int64)
        words[_UNITS], words[_ROWS], words[_K] = -(-spec.k // rows), rows, spec.k
        words[_BLOCKS], words[_BLOCK_BYTES] = -(-spec.c // block), 4 * block * pixels
        for i, array in enumerate(packed):
            words[_STREAM + i] = array.ctypes.data
        words[_PLANE] = 4 * pixels
        workspace = 64 + 4 * rows * len(vectors)
        super().__init__(Job(self._code(False), words, workspace))

    def adding(self) -> Job:
        return Job(self._code(True), self._words.copy(), self.workspace, residual_at=_ADDED, from_output=True)


def pack(weight: SparseWeight, lanes: int, rows: int, block: int, coded: bool) -> tuple[np.ndarray, ...]:
    """A weight in the order in which units, blocks and rows are worked on.

    Returns
    -------
    stream : uint8
        Chunks of `gather_dot`; a row of a block begins with a chunk.  One more chunk is there and not used.
    starts : int64, (units,)
        First byte of every unit.
    counts : int32
        Non-zeros of every row of every block, in the order of the stream.
    tables : int32, (K,)
        Byte in ``table`` of what code 0 of a row stands for.
    scales : float32, (K,)
        Factors of the rows.
    table : float32
        Values of codes.
    """
    blocks, units = -(-weight.shape[1] // block), -(-weight.k // rows)
    ranges = _ranges(weight, rows)
    counts = np.concatenate([_counted(weight, rows, block, some) for some in ranges])
    first = np.concatenate([[0], np.cumsum(-(-counts // lanes))])
    value_bytes = 1 if coded else 4
    stream = np.zeros((int(first[-1]) + 1, (value_bytes + 2) * lanes), np.uint8)
    values = stream[:, : value_bytes * lanes].view(np.uint8 if coded else np.float32)
    places, data = stream[:, value_bytes * lanes :].view(np.uint16), weight.codes if coded else weight.data
    assert data is not None
    for some in ranges:
        piece, place = _pieces(weight, rows, block, some)
        order = np.argsort(piece, kind="stable")
        there = slice(some.start * blocks, some.stop * blocks)
        within = np.arange(len(piece)) - np.repeat(np.cumsum(counts[there]) - counts[there], counts[there])
        at, lane = np.repeat(first[:-1][there], counts[there]) + within // lanes, within % lanes
        values[at, lane] = data[weight.indptr[some.start] : weight.indptr[some.stop]][order]
        places[at, lane] = place[order]
    starts = first[np.arange(units) * rows * blocks] * stream.shape[1]
    ones, nothing = np.ones(weight.k, np.float32), np.zeros(weight.k, np.int32)
    own: tuple[np.ndarray, ...] = (nothing, ones, np.zeros(1, np.float32))
    if coded and weight.levels is not None:
        begin = (4 * weight.levels.places(0, np.arange(weight.k))).astype(np.int32)
        own = (nothing + begin, ones * weight.levels.scale, np.asarray(weight.levels.tables()[0], np.float32))
    return (
        stream.ravel(),
        starts.astype(np.int64),
        counts.astype(np.int32),
        *(np.ascontiguousarray(array) for array in own),
    )


_AT_ONCE = 1 << 15
"""Non-zeros that are packed together: what that takes beside the packed weight is small, and stays so."""


def _ranges(weight: SparseWeight, rows: int) -> list[range]:
    """Rows of whole units, cut so that each range has about `_AT_ONCE` non-zeros."""
    each = max(1, _AT_ONCE * weight.k // max(1, weight.nnz) // rows) * rows
    return [range(row, min(row + each, weight.k)) for row in range(0, weight.k, each)]


def _pieces(weight: SparseWeight, rows: int, block: int, own: range) -> tuple[np.ndarray, np.ndarray]:
    """Of the non-zeros of some rows their piece (a row of a block), counted from the first, and place in the block."""
    blocks = -(-weight.shape[1] // block)
    begin, end = weight.indptr[own.start], weight.indptr[own.stop]
    k = np.repeat(np.arange(own.start, own.stop), np.diff(weight.indptr[own.start : own.stop + 1]))
    column, place = np.divmod(weight.indices[begin:end].astype(np.int64), block)
    # Units have all of their rows but the last one, so that a place in the order follows from unit, block and row.
    unit, row = np.divmod(k, rows)
    size = np.minimum(rows, weight.k - unit * rows)
    return (unit * rows - own.start) * blocks + column * size + row, place


def _counted(weight: SparseWeight, rows: int, block: int, own: range) -> np.ndarray:
    """Non-zeros of the pieces of some rows."""
    blocks = -(-weight.shape[1] // block)
    return np.bincount(_pieces(weight, rows, block, own)[0], minlength=len(own) * blocks)


@functools.cache
def _compiled(
    lanes: int,
    places: tuple[int, ...],
    targets: tuple[int, ...],
    stride: int,
    coded: bool,
    activation: Activation,
    residual: bool,
) -> Code:
    """The kernel's entry for vectors that begin at ``places`` and whose results go to ``targets``."""
    dot, finish = gather_dot(lanes, places, stride, coded), finish_sums(activation, targets, residual)
    vectors, chunk = len(places), (3 if coded else 6) * lanes

    def cpu_vector(
        params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int
    ) -> None:
        units, rows, out_channels = load_i64(params), load_i64(params + 8 * _ROWS), load_i64(params + 8 * _K)
        blocks, block_bytes = load_i64(params + 8 * _BLOCKS), load_i64(params + 8 * _BLOCK_BYTES)
        stream, starts = load_i64(params + 8 * _STREAM), load_i64(params + 8 * _STARTS)
        counts, plane = load_i64(params + 8 * _COUNTS), load_i64(params + 8 * _PLANE)
        tables, scales = load_i64(params + 8 * _TABLES), load_i64(params + 8 * _SCALES)
        table, added, sums = load_i64(params + 8 * _TABLE), load_i64(params + 8 * _ADDED), arena + 64
        while True:
            unit = cpu.next_unit(counters, thread, threads, units)
            if unit < 0:
                return
            first = unit * rows
            count = min(rows, out_channels - first)
            for i in range(count * vectors):
                clear_f32(sums + 4 * i)
            at, piece = stream + load_i64(starts + 8 * unit), counts + 4 * first * blocks
            for b in range(blocks):
                inputs = x + b * block_bytes
                for row in range(count):
                    entries = load_i32(piece)
                    own_table = table + load_i32(tables + 4 * (first + row))
                    dot(at, entries, inputs, sums + 4 * vectors * row, own_table)
                    at += (entries + lanes - 1) // lanes * chunk
                    piece += 4
            for row in range(count):
                k = first + row
                finish(sums + 4 * vectors * row, scales + 4 * k, bias + 4 * k, y + k * plane, added)

    key = repr((lanes, places, targets, stride, coded, activation, residual))
    return compile_c(cpu_vector, cpu.ENTRY_SIGNATURE, key)


class CpuVector(Kernel):
    """Sparse matrix times a few vectors; see the module's text."""

    name = "cpu_vector"
    device = "cpu"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        if not spec.is_pointwise or spec.is_padded or (spec.out_h, spec.out_w) != (spec.h, spec.w):
            return "only 1x1 kernels that take every pixel and no padding are products with vectors"
        if spec.groups > 1:
            return f"it knows one group of channels, got {spec.groups}"
        if spec.n * spec.h * spec.w > _MOST_VECTORS:
            return f"at most {_MOST_VECTORS} vectors are multiplied at once, got {spec.n * spec.h * spec.w}"
        return reason_unsupported(spec, weight)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        vectors = spec.n * spec.h * spec.w
        first, second = cpu.cache_bytes()
        blocks = {min(spec.c, _MOST_BLOCK, max(16, size // (4 * vectors))) for size in (first // 2, first, second)}
        # At least four units for each thread, so that none waits long for the last one.
        most = max(1, spec.k // (4 * threads))
        return {
            "lanes": tuple(lanes for lanes in (4, 8, 16) if cpu.vector_lanes() // 2 <= lanes <= cpu.vector_lanes()),
            "rows": tuple(rows for rows in (1, 4, 16, 64, 256) if rows <= most) or (1,),
            "block": tuple(sorted(blocks)),
            **({} if weight.levels is None else {"entries": ("coded", "wide")}),
        }

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        fields: dict[str, Any] = {"lanes": (4, 16), "rows": (1, 1 << 16), "block": (1, _MOST_BLOCK)}
        config = with_entries(config)
        reason = check_fields(config, fields | {"entries": ("wide", "coded")})
        if reason is not None:
            return reason
        if config["lanes"] not in (4, 8, 16):
            return f"lanes must be 4, 8 or 16, got {config['lanes']}"
        if entries_of(config) == "coded" and weight.levels is None:
            return "coded entries need a quantized weight, see SparseWeight.quantized"
        return None

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        space = self.space(spec, weight, threads)
        # Rows are cut by blocks: where few of a row lie in one, a chunk is mostly empty, and the largest is best.
        lanes = cpu.vector_lanes()
        whole = [b for b in space["block"] if weight.density * int(b) >= 4 * lanes] or [space["block"][-1]]
        rows = max(int(rows) for rows in space["rows"] if int(rows) <= 64)
        entries: Config = {} if weight.levels is None else {"entries": "coded"}
        return {"lanes": lanes, "rows": rows, "block": whole[0], **entries}

    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> Runner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)
