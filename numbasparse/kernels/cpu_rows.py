"""What the CPU kernels share: their packed weight form, limits, and rules of the register tile.

The packed form holds the non-zeros of each output channel, by blocks of input channels. Of a quantized weight it
holds the codes: the kernels look their values up, and no other form of the weight is kept. The config's parameter
``entries`` says so: ``"coded"``, or ``"wide"`` for decoded values, which every weight has.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np

from numbasparse.activations import Activation
from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import (
    ENTRIES_AFTER,
    ENTRY_BYTES,
    OFFSET_BITS,
    ROWS_SIGNATURE,
    Entries,
    RowKernel,
    rows_function,
)
from numbasparse.kernels.base import Config
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

ONLY, FIRST, MIDDLE, LAST = range(4)
"""What a block is to a row: its only one, or the first, one between, the last of several."""


@dataclass(frozen=True)
class PackedRows:
    """Rows (output channels) of a sparse weight, cut at blocks of input channels.

    Attributes
    ----------
    form
        Form of the entries.
    entries : int64 or uint32, (nnz + ENTRIES_AFTER,)
        ``"wide"``: byte offset of the input vector in the low half, bits of the float32 value in the high half.
        Otherwise a quarter of that offset in the low 24 bits, the code in the high 8.
    decoder : float32
        What codes stand for, as `codegen.simd.rows_function` has it: nothing, a table, or the channels' headers
        and then their tables.
    rows, starts : int32, (pieces,) and (pieces + 1,)
        Output channel of each piece of a row, and where its entries begin.
    segments : int32, (blocks * splits * 4 + 1,)
        Pieces of block b, split p and role j (`ONLY` ...) are ``segments[(b * splits + p) * 4 + j]`` and on.
    channels : int32
        Input channels that have any non-zero; block b covers ``block`` of them.
    block, blocks, splits
        Channels of a block, number of blocks, number of ranges that the output channels are cut into.
    """

    form: Entries
    entries: np.ndarray
    decoder: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    segments: np.ndarray
    channels: np.ndarray
    block: int
    blocks: int
    splits: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.entries, self.decoder, self.rows, self.starts, self.segments, self.channels)
        return sum(a.nbytes for a in arrays)


def accumulator_sets(accumulators: int) -> int:
    """Sets of accumulators used in turn: an FMA takes 4 cycles and two start per cycle, so eight are in flight."""
    return 1 if accumulators >= 8 else 2 if accumulators >= 4 else 4


@functools.cache
def compile_rows(
    *,
    lanes: int,
    rows: int,
    columns: int,
    displacements: tuple[int, ...],
    chunk: int,
    valid: int,
    aligned: bool,
    activation: Activation,
    entries: Entries,
    residual: bool,
    out_displacements: tuple[int, ...] = (),
) -> Code:
    """The inner loop in its four roles (`ONLY` ...) as one function of `rows_function`'s arguments."""
    kernels = [
        RowKernel(
            lanes=lanes,
            rows=rows,
            columns=columns,
            displacements=displacements,
            chunk=chunk,
            valid=valid,
            sets=accumulator_sets(rows * columns),
            aligned=aligned,
            activation=activation,
            start="bias" if role in (ONLY, FIRST) else "resume",
            finish="store" if role in (ONLY, LAST) else "spill",
            out_displacements=out_displacements,
            entries=entries,
            residual=residual,
        )
        for role in range(4)
    ]
    return compile_c(rows_function(kernels), ROWS_SIGNATURE, repr(kernels))


def reason_unsupported(spec: ConvSpec, weight: SparseWeight) -> str | None:
    """Limits of 32-bit offsets and tables, shared by the CPU kernels."""
    if weight.nnz >= 2**31:
        return f"the weight has {weight.nnz} non-zeros, the limit is 2**31"
    if 4 * spec.n * max(spec.c * spec.h * spec.w, spec.k * spec.out_h * spec.out_w) >= 2**47:
        return "input or output exceeds the address space"
    return None


def reason_not_in_place(spec: ConvSpec) -> str | None:
    """Reason why an image cannot be read where it lies, a vector of pixels at a time."""
    if not spec.is_pointwise or spec.is_padded or spec.stride != (1, 1):
        return "only 1x1 kernels with stride 1 and no padding are read in place"
    if spec.h * spec.w < 4:
        return f"an image of {spec.h * spec.w} pixels is narrower than the narrowest vector"
    return None


def reason_not_tiled(lanes: int, vectors: int, pixels: int) -> str | None:
    """Reason why an image that is read in place has no tile of so many vectors."""
    if lanes not in (4, 8, 16) or lanes > pixels:
        return f"lanes must be 4, 8 or 16 and at most the image's {pixels} pixels, got {lanes}"
    if (vectors - 1) * lanes >= pixels:
        return f"{vectors} vectors exceed the image's {pixels} pixels"
    return None


def lane_choices() -> tuple[int, ...]:
    """Lanes worth a try, the host's own first.

    Cores with 512-bit vectors have 32 registers of 256 bits too. Some read half a line as fast as a whole one: then
    narrower vectors waste less where an image ends, and fewer of them lie across two lines.
    """
    lanes = cpu.vector_lanes()
    return (lanes, lanes // 2) if lanes == 16 else (lanes,)


def lanes_in_place(spec: ConvSpec) -> int:
    """Lanes of the host's vectors, or fewer in a small image."""
    lanes = cpu.vector_lanes()
    while lanes > spec.h * spec.w:
        lanes //= 2
    return lanes


def displacements_in_place(lanes: int, vectors: int, pixels: int) -> tuple[int, ...]:
    """Bytes from the first pixel of a tile to each of its vectors.

    In a small image the last vector overlaps the one before: nothing outside is read or written.
    """
    last = min((vectors - 1) * lanes, pixels - lanes)
    return tuple(4 * min(t * lanes, last) for t in range(vectors))


def most_accumulators() -> int:
    """Vector registers less one for the broadcast value and one to spare; configs know at most 28."""
    return min(28, cpu.vector_registers() - 2)


def prefetch_choices(spec: ConvSpec) -> tuple[str, ...]:
    """Fetching ahead is worth a try where the input exceeds half of the second cache."""
    return ("none", "next") if 8 * spec.n * spec.c * spec.h * spec.w > cpu.cache_bytes()[1] else ("none",)


def balanced_block(channels: int, block: int) -> int:
    """The smallest block that needs no more blocks than ``block`` does."""
    blocks = -(-channels // min(block, channels))
    return -(-channels // blocks)


def coordinates(
    weight: SparseWeight, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Output channel, input channel (over all groups), kernel row and kernel column of every non-zero of some rows."""
    per_group, height, width = weight.kernel_shape
    first, last, _ = rows.indices(weight.k)
    indptr = weight.indptr[first : last + 1]
    k = np.repeat(np.arange(first, last), np.diff(indptr))
    index = weight.indices[indptr[0] : indptr[-1]].astype(np.int64)
    group = k // (weight.k // weight.groups)
    return k, index // (height * width) + group * per_group, index // width % height, index % width


_AT_ONCE = 1 << 15
"""Non-zeros that are worked on at once, or one row: a large weight needs little memory besides its packed form."""


def _some_rows(weight: SparseWeight) -> Iterator[slice]:
    """Ranges of rows that together are all."""
    first = 0
    while first < weight.k:
        last = int(np.searchsorted(weight.indptr, weight.indptr[first] + _AT_ONCE, side="right")) - 1
        last = min(max(last, first + 1), weight.k)
        yield slice(first, last)
        first = last


def _used_channels(weight: SparseWeight) -> tuple[np.ndarray, np.ndarray]:
    """Input channels that any non-zero reads, and the place of every channel among them."""
    used = np.zeros(weight.kernel_shape[0] * weight.groups, bool)
    for rows in _some_rows(weight):
        used[coordinates(weight, rows)[1]] = True
    return np.flatnonzero(used), np.cumsum(used) - 1


def _piece_lengths(weight: SparseWeight, place: np.ndarray, block: int, blocks: int) -> np.ndarray:
    """Non-zeros of every row in every block of used channels, (blocks, K)."""
    counts = np.zeros((blocks, weight.k), np.int64)
    for rows in _some_rows(weight):
        k, c, _, _ = coordinates(weight, rows)
        count = rows.stop - rows.start
        cell = place[c] // block * count + (k - rows.start)
        counts[:, rows] = np.bincount(cell, minlength=blocks * count).reshape(blocks, count)
    return counts


_cuts: weakref.WeakKeyDictionary[SparseWeight, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()
_SMALL = 4096


def entry_choices(weight: SparseWeight, reach: int) -> tuple[Entries, ...]:
    """Forms of entries for a weight, the default first, where offsets stay below ``reach`` bytes."""
    return ("coded", "wide") if reason_not_coded(weight, reach) is None else ("wide",)


def reason_not_coded(weight: SparseWeight, reach: int) -> str | None:
    """Reason why entries cannot hold codes, or None; offsets stay below ``reach`` bytes."""
    if weight.levels is None:
        return "coded entries need a quantized weight, see SparseWeight.quantized"
    limit = 4 << OFFSET_BITS
    if reach > limit:
        return f"offsets of coded entries stay below {limit} bytes, these reach {reach}"
    return None


def with_entries(config: Config) -> Config:
    """The config with its ``entries``, which may be left out for wide ones."""
    return {"entries": "wide", **config}


def entries_of(config: Config) -> Entries:
    """The ``entries`` of a config that has been checked."""
    return cast(Entries, with_entries(config)["entries"])


def reason_cut_too_much(weight: SparseWeight, block: int, splits: int, entries: Entries) -> str | None:
    """Reason why blocks of ``block`` channels take too much memory, or None.

    Every piece of a row has a number and a start, and every block and split its segments.  With several blocks,
    the packed form may take at most 1.3 times its entries and row pointers (and 4 KiB).  One block is always
    allowed.  What codes stand for does not count.
    """
    entry_bytes = ENTRY_BYTES[entries]
    known = _cuts.setdefault(weight, {})
    if block not in known:
        known[block] = _count_pieces(weight, block)
    blocks, pieces = known[block]
    size = (
        entry_bytes * (weight.nnz + ENTRIES_AFTER)
        + 8 * pieces
        + 16 * blocks * splits
        + 4 * weight.kernel_shape[0] * weight.groups
    )
    most = most_packed_bytes(weight, entries)
    if blocks == 1 or size <= most:
        return None
    return f"{blocks} blocks of {block} channels cut the rows into {pieces} pieces: {size} bytes, limit {most:.0f}"


def most_packed_bytes(weight: SparseWeight, entries: Entries) -> float:
    """What a packed weight may take: 1.3 times its entries and row pointers, and 4 KiB."""
    return 1.3 * (ENTRY_BYTES[entries] * weight.nnz + 4 * (weight.k + 1)) + _SMALL


def _count_pieces(weight: SparseWeight, block: int) -> tuple[int, int]:
    """Blocks, and pieces of rows, that blocks of ``block`` used channels make."""
    channels, place = _used_channels(weight)
    block = balanced_block(max(len(channels), 1), block)
    present = _piece_lengths(weight, place, block, max(1, -(-len(channels) // block))) > 0
    return len(present), int(np.maximum(present.sum(axis=0), 1).sum())


def pack_rows(
    weight: SparseWeight,
    channel_bytes: int,
    tap_bytes: np.ndarray,
    block: int,
    splits: int,
    entries: Entries,
    in_place: bool = False,
) -> PackedRows:
    """Cut the rows of ``weight`` at blocks of input channels and sort the pieces for the inner loop.

    Parameters
    ----------
    channel_bytes
        Bytes of one packed input channel.
    tap_bytes : int64, (R, S)
        Byte offset of each tap within a packed channel.
    block
        Input channels of a block, at most; blocks are made equal.
    splits
        Ranges of output channels that different threads may take.
    entries
        ``"wide"`` or ``"coded"``.
    in_place
        Channels lie where the caller has them, not packed: offsets count from a block's first used channel.
    """
    channels, place = _used_channels(weight)
    block = balanced_block(max(len(channels), 1), block)
    blocks = max(1, -(-len(channels) // block))
    counts = _piece_lengths(weight, place, block, blocks)
    # An empty row still has to write its bias: it counts as a row of the first block with no entries.
    present = counts > 0
    present[0] |= ~present.any(axis=0)
    piece_block, piece_row = np.nonzero(present)
    role = _roles(present)[piece_block, piece_row]
    length = counts[piece_block, piece_row]
    split = piece_row * splits // weight.k
    # Neighbours of similar length keep the loop's exit branch predictable.
    order = np.lexsort((piece_row, length, role, split, piece_block))
    starts = np.concatenate(([0], np.cumsum(length[order])))
    rank = np.empty((blocks, weight.k), np.int64)
    rank[piece_block[order], piece_row[order]] = np.arange(len(order))
    form, decoder = _decoder(weight) if entries == "coded" else (entries, np.zeros(0, np.float32))
    values = weight.data if form == "wide" else weight.codes
    assert values is not None
    packed = np.zeros(weight.nnz + ENTRIES_AFTER, np.int64 if form == "wide" else np.uint32)
    for rows in _some_rows(weight):
        k, c, r, s = coordinates(weight, rows)
        position = place[c]
        channel = c - channels[position // block * block] if in_place else position % block
        piece = rank[position // block, k]
        sequence = np.argsort(piece, kind="stable")
        piece = piece[sequence]
        # All entries of a piece are here: they go to its start and on.
        target = starts[piece] + np.arange(len(piece)) - np.searchsorted(piece, piece)
        offsets = (channel * channel_bytes + tap_bytes[r, s])[sequence]
        own = values[weight.indptr[rows.start] : weight.indptr[rows.stop]][sequence]
        packed[target] = wide_entries(own, offsets) if form == "wide" else _coded(own, offsets)
    bucket = ((piece_block * splits + split) * 4 + role)[order]
    return PackedRows(
        form=form,
        entries=packed,
        decoder=decoder,
        rows=piece_row[order].astype(np.int32),
        starts=starts.astype(np.int32),
        segments=np.searchsorted(bucket, np.arange(blocks * splits * 4 + 1)).astype(np.int32),
        channels=channels.astype(np.int32),
        block=block,
        blocks=blocks,
        splits=splits,
    )


def wide_entries(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 with byte offsets in their low halves and the bits of float32 values in their high ones."""
    bits = values.view(np.uint32).astype(np.uint64)
    return (offsets.astype(np.uint64) | bits << np.uint64(32)).view(np.int64)


def _coded(codes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return (offsets // 4).astype(np.uint32) | codes.astype(np.uint32) << np.uint32(OFFSET_BITS)


def _decoder(weight: SparseWeight) -> tuple[Entries, np.ndarray]:
    """Form of the entries, and what their codes stand for, as `PackedRows.decoder`."""
    levels = weight.levels
    assert levels is not None
    table, first = levels.tables()
    if len(levels.scale) == len(first) == 1:
        return "coded", levels.codebook(weight.k)[0]
    channels = np.arange(weight.k)
    headers = np.empty((weight.k, 2), np.int32)
    headers[:, 0] = headers.nbytes + 4 * levels.places(0, channels)
    headers[:, 1] = levels.scale.view(np.int32)
    return "scaled", np.concatenate((headers.view(np.float32).ravel(), table))


def _roles(present: np.ndarray) -> np.ndarray:
    """For each (block, row): is this block the row's only, first, middle or last one."""
    blocks = len(present)
    first = present.argmax(axis=0)
    last = blocks - 1 - present[::-1].argmax(axis=0)
    index = np.arange(blocks)[:, None]
    role = np.full(present.shape, MIDDLE)
    role[index == last] = LAST
    role[index == first] = FIRST
    role[(index == first) & (index == last)] = ONLY
    return role
