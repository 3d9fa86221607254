"""Weights as the kernels for Hopper's sparse tensor cores read them: jobs, and a blob of bytes for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from numbasparse.kernels import two_four
from numbasparse.kernels.cuda_fragments import coding_of
from numbasparse.kernels.wgmma_shape import (
    CHUNK_BYTES,
    HEADER_BYTES,
    NIBBLES,
    OFFSETS,
    Entries,
    Geometry,
    Shape,
)
from numbasparse.weight import SparseWeight


@dataclass(frozen=True)
class Packed:
    """A weight cut for the blocks of a config.

    Attributes
    ----------
    blobs : uint8
        One behind another, what a job multiplies its tile by: int32 numbers of steps and of chunks, for each 16 rows
        uint8 the number of chunks that have any of them, and 4 bytes of nothing; of every step its values (2048 bytes
        of `two_four.fragments`, or what `Entries` says), 256 bytes of `two_four.Steps.metadata`, one of
        `Geometry.words` and 12 bytes of nothing; of every chunk of the rest 1024 bytes of `two_four.fragments` and its
        `Geometry.offsets`.  Where each job has every step, the values of all come first and then their metadata, as
        `codegen.ptx.StepRun` says.
    jobs : int32, (jobs, 4)
        First input channel of the tile, start of the blob in units of 16 bytes, bytes of the blob, 0; of a stack the
        blobs of its blocks lie one behind another, and the last two numbers are bytes of both and of the first.
    ranges : int32, (blocks, splits, 2)
        What a block does: its first job and its number of jobs, which is the same in all blocks of a cluster.
    rows : int32, (blocks of 64 output channels, 64)
        Output channel of every row, -1 where there is none.
    table : uint8, (32,)
        Of 16 values the lower bytes, then the upper ones.
    """

    blobs: np.ndarray
    jobs: np.ndarray
    ranges: np.ndarray
    rows: np.ndarray
    table: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them, in the order of the kernel's parameters."""
        return self.rows, self.blobs, self.jobs, self.ranges, self.table

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays)


def pack(weight: SparseWeight, shape: Shape) -> Packed:
    """Cut a weight into blocks of 64 output channels and tiles of input channels, and write their steps.

    A tile with more steps or chunks than there is room for is copied again for the others; where each job has every
    step, with zeros the second time.
    """
    geometry, form, split, together = shape.geometry, shape.entries.form, shape.split, shape.cluster * shape.stack
    spec, rows = geometry.spec, _filled_up(geometry.row_blocks(weight), shape.stack)
    per_block = -(-spec.c_per_group // geometry.channels)
    if form == "wide":
        values, data = np.zeros(1, np.float32), weight.data
    else:
        values, places = coding_of(weight)
        data = places.astype(np.float32)
    steps, rest = _steps(data, weight, geometry, rows, per_block, shape.every)
    if form != "wide":
        rest = replace(rest, values=values[rest.values.astype(np.int64)])
    live = _live(np.diff(steps.first), per_block, together)
    pieces, ranges = _pieces(np.diff(steps.first), np.diff(rest.first), shape.room, live, split, together)
    block, tile = np.divmod(pieces[:, 0], per_block)
    group = block // (len(rows) // spec.groups)
    if shape.every:
        units, counts = _every_unit(steps, shape, pieces), np.ones(len(pieces), np.int64)
    else:
        units, counts = _units(steps, geometry, shape.entries, values), pieces[:, 1]
    blobs, starts, sizes = _blobs(units, counts, _chunks(rest, geometry), rest, pieces)
    jobs = np.zeros((len(pieces), 4), np.int32)
    jobs[:, 0] = group * spec.c_per_group + tile * geometry.channels
    jobs[:, 1], jobs[:, 2] = starts // 16, sizes
    if shape.stack == 2:
        blobs, jobs, ranges = _paired(blobs, jobs, ranges)
    return Packed(blobs, jobs, ranges, rows, _table(values, form, spec.dtype))


def _filled_up(rows: np.ndarray, stack: int) -> np.ndarray:
    """Blocks of rows, and as many without any as stacks need to be whole."""
    return np.pad(rows, ((0, -len(rows) % stack), (0, 0)), constant_values=-1)


def _paired(blobs: np.ndarray, jobs: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blobs, jobs and ranges of two blocks as those of one, which take the same tiles together."""
    first, second = (_numbers(own) for own in (ranges[::2], ranges[1::2]))
    both, pieces = np.stack([first, second], axis=1).ravel(), [blobs[:0]]
    for begin, size in zip(16 * jobs[both, 1].astype(np.int64), jobs[both, 2], strict=True):
        pieces.append(blobs[begin : begin + size])
    made = jobs[first]
    made[:, 2], made[:, 3] = jobs[first, 2] + jobs[second, 2], jobs[first, 2]
    made[:, 1] = (np.cumsum(made[:, 2], dtype=np.int64) - made[:, 2]) // 16
    counts = ranges[::2, :, 1]
    starts = np.cumsum(counts).reshape(counts.shape) - counts
    return np.concatenate(pieces), made, np.stack([starts, counts], axis=2).astype(np.int32)


def _numbers(ranges: np.ndarray) -> np.ndarray:
    """Jobs of blocks, in their order."""
    return np.concatenate([np.arange(first, first + count) for first, count in ranges.reshape(-1, 2)])


def _table(values: np.ndarray, form: str, dtype: str) -> np.ndarray:
    """`Packed.table` of values behind a zero."""
    listed = {"nibbles": values, "flagged": values[1:]}.get(form, values[:1])
    words = np.zeros(NIBBLES, np.uint16)
    words[: len(listed)] = two_four.narrow(listed, dtype)
    return np.concatenate([words & 0xFF, words >> 8]).astype(np.uint8)


def _steps(
    data: np.ndarray, weight: SparseWeight, geometry: Geometry, rows: np.ndarray, per_block: int, once: bool
) -> tuple[two_four.Steps, two_four.Rest]:
    """Steps of every block and tile of input channels; part ``block * per_block + tile``.  ``data`` is not zero."""
    spec = geometry.spec
    place = np.empty(spec.k, np.int64)
    place[rows[rows >= 0]] = np.flatnonzero(rows.ravel() >= 0)
    block, row = np.divmod(place, two_four.ROWS)
    k, column = weight.rows, weight.indices
    # Of every column of a weight's matrix, and then of every non-zero.
    tile = np.arange(spec.c_per_group * spec.r * spec.s) // (spec.r * spec.s) // geometry.channels
    part = (block * per_block)[k] + tile[column]
    return geometry.cover(part, row[k], column, data, len(rows) * per_block, once)


def _live(counts: np.ndarray, per_block: int, cluster: int) -> list[np.ndarray]:
    """Of every block the parts that it works on: those with steps, in it or in another block of its cluster."""
    tiles = np.any(counts.reshape(-1, cluster, per_block) > 0, axis=1)
    return [np.flatnonzero(tiles[block // cluster]) + block * per_block for block in range(len(tiles) * cluster)]


def _pieces(
    steps: np.ndarray, chunks: np.ndarray, room: tuple[int, int], live: list[np.ndarray], split: int, cluster: int
) -> tuple[np.ndarray, np.ndarray]:
    """Jobs, int64 (jobs, 3): their part and how many steps and chunks of it they have; and the ranges.

    Blocks of a cluster take the same tiles together, as often as the one with the largest weight must.
    """
    often = np.maximum(1, np.maximum(-(-steps // room[0]), -(-chunks // max(1, room[1]))))
    pieces: list[tuple[int, int, int]] = []
    ranges = np.zeros((len(live), split, 2), np.int32)
    per_block = len(steps) // max(1, len(live))
    for block, every in enumerate(live):
        leader = block // cluster * cluster
        for number, parts in enumerate(np.array_split(every, split)):
            start = len(pieces)
            for part in parts:
                tile = part - block * per_block
                times = int(often[[(leader + i) * per_block + tile for i in range(cluster)]].max())
                left, rest = int(steps[part]), int(chunks[part])
                for _ in range(times):
                    now = min(left, room[0]), min(rest, room[1])
                    pieces.append((part, *now))
                    left, rest = left - now[0], rest - now[1]
            ranges[block, number] = start, len(pieces) - start
    return np.array(pieces, np.int64).reshape(-1, 3), ranges


def _blobs(
    units: np.ndarray, counts: np.ndarray, chunks: np.ndarray, rest: two_four.Rest, pieces: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blobs of all jobs, their starts and their sizes in bytes: of the bytes of units, so many of a job (its steps,
    or one with all of them), and of those of chunks.

    Jobs are in the order of their parts, and a part is some job's: so are steps and chunks in their order.
    """
    rest_counts = pieces[:, 2]
    sizes = HEADER_BYTES + counts * units.shape[1] + rest_counts * CHUNK_BYTES
    starts = np.cumsum(sizes) - sizes
    lines = np.zeros((int(sizes.sum()) // 16, 16), np.uint8)
    lines[starts // 16, :8] = _as_bytes(pieces[:, 1:].astype(np.int32))
    lines[starts // 16, 8:12] = _own_chunks(rest, rest_counts)
    first = starts + HEADER_BYTES
    _place(lines, first, counts, units)
    _place(lines, first + counts * units.shape[1], rest_counts, chunks)
    return lines.ravel(), starts, sizes


def _own_chunks(rest: two_four.Rest, counts: np.ndarray) -> np.ndarray:
    """Of every job and 16 rows how many of its chunks, from the first, have values: uint8 (jobs, 4)."""
    job = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(rest.count) - np.repeat(np.cumsum(counts) - counts, counts)
    there = rest.values.reshape(rest.count, 4, 16 * two_four.REST).any(axis=2)
    own = np.zeros((len(counts), 4), np.uint8)
    np.maximum.at(own, job, ((within + 1)[:, None] * there).astype(np.uint8))
    return own


def _place(lines: np.ndarray, starts: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
    """Write rows of bytes into lines of 16 bytes: of every job its count, one behind another from its start on."""
    if not len(rows):
        return
    width = rows.shape[1]
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = (np.repeat(starts, counts) + within * width) // 16
    lines[at[:, None] + np.arange(width // 16)] = rows.reshape(len(rows), -1, 16)


def _units(steps: two_four.Steps, geometry: Geometry, entries: Entries, values: np.ndarray) -> np.ndarray:
    """Of every step its bytes; ``values`` are those that codes stand for."""
    units = np.zeros((steps.count, entries.unit_bytes), np.uint8)
    if entries.form == "wide":
        units[:, : entries.metadata] = _as_bytes(two_four.fragments(steps.values, geometry.spec.dtype))
    else:
        units[:, : entries.metadata] = _as_bytes(_codes(two_four.lanes(steps.values), entries, values))
    units[:, entries.metadata : entries.word] = _as_bytes(steps.metadata)
    units[:, entries.word :].view(np.int32)[:, 0] = geometry.words(steps)
    return units


def _every_unit(steps: two_four.Steps, shape: Shape, pieces: np.ndarray) -> np.ndarray:
    """Of every job all its steps as one row of bytes, `Shape.steps_bytes`; those that a part lacks are zeros."""
    octets = shape.geometry.all_octets()
    every, parts = len(octets), len(steps.first) - 1
    place = np.full(int(octets.max()) + 1, -1)
    place[octets] = np.arange(every)
    part = np.repeat(np.arange(parts), np.diff(steps.first))
    at = part * every + place[steps.columns[:, 0]]
    values = np.zeros((parts * every, two_four.ROWS, two_four.STEP // 2), np.float32)
    metadata = np.full((parts, every + every % 2, 4, 8, 2), _NO_PLACES, np.uint32)
    values[at] = steps.values
    metadata.reshape(parts, -1, two_four.ROWS)[part, place[steps.columns[:, 0]]] = steps.metadata
    # Of two steps a row's words lie side by side: (part, pair, warp, row, step, word).
    metadata = metadata.reshape(parts, -1, 2, 4, 8, 2).transpose(0, 1, 3, 4, 2, 5)
    own = _as_bytes(two_four.fragments(values, shape.spec.dtype)).reshape(parts, -1)
    rows = np.concatenate([own, _as_bytes(metadata)], axis=1)
    # The second job of a part has only chunks.
    again = np.flatnonzero(pieces[1:, 0] == pieces[:-1, 0]) + 1
    made = rows[pieces[:, 0]]
    made[again, : own.shape[1]] = 0
    return made


_NO_PLACES = 0x44444444
"""Metadata of quads that are empty: two different places of each."""


def _codes(places: np.ndarray, entries: Entries, values: np.ndarray) -> np.ndarray:
    """Codes of the places of values, (steps, 128, 8), as bytes (steps, 128, 4 * lane_words)."""
    places = places.astype(np.uint8)
    if entries.form == "integers":
        return (values + 128).astype(np.uint8)[places]
    if entries.form == "nibbles":
        return places[:, :, ::2] | places[:, :, 1::2] << 4
    there, codes = (places != 0).astype(np.uint8), np.maximum(places, 1) - 1
    # `ptx.mask_words` wants flags in the upper bits of bytes.
    flags = there[:, :, :4] << 7 | there[:, :, 4:] << 6
    return np.concatenate([codes[:, :, ::2] | codes[:, :, 1::2] << 4, flags], axis=2)


def _chunks(rest: two_four.Rest, geometry: Geometry) -> np.ndarray:
    chunks = np.zeros((rest.count, CHUNK_BYTES), np.uint8)
    chunks[:, :OFFSETS] = _as_bytes(two_four.fragments(rest.values, geometry.spec.dtype))
    chunks[:, OFFSETS:] = _as_bytes(geometry.offsets(rest))
    return chunks


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Everything but the first dimension as bytes."""
    return np.ascontiguousarray(array).reshape(len(array), int(np.prod(array.shape[1:]))).view(np.uint8)
