"""Sparse convolution on any tensor cores: 16 output channels share the columns that any of them needs.

A block computes a tile of output pixels, of some images, for some groups of 16 output channels, which were chosen to
need few columns (channel and tap) together.  It walks over the input channels that it needs, a few at a time: their
input tile, with its halo, goes to shared memory as [channel][row][column][image] by asynchronous copies, in a ring of
stages.  A warp has one group, and all or some rows of the tile.  A step of its work are 16 of its columns:
``ldmatrix`` gathers their rows of shared memory from any 16 addresses, and ``mma.sync.m16n8k16`` multiplies them with
a dense 16 x 16 piece of the weight, eight pixels or images at a time.  The pieces come from the second cache straight
into registers, two steps ahead, each used for all columns of the tile.

Bound: a row that is gathered serves 16 output channels, so that shared memory feeds 1024 multiply-adds a clock and
multiprocessor, whatever is zero in the columns kept: of unstructured masks at 98 % zeros a group keeps about a quarter
of its columns, at 90 % four fifths.  Masks pruned in vectors of 16 output channels keep exactly what was not pruned.

The 16 rows of a step are in all eight banks of 16 bytes twice, where its group's columns allow: `order_banks`.

Since zeros are multiplied, an infinity in the input reaches outputs that it does not belong to, as NaN.

Search space
------------
``batch``
    Images of a block: the width of a row of shared memory, of activations in CHWN.
``tile``
    Output pixels of a block, as text: rows x columns.
``warps``
    Groups of output channels of a block.
``parts``
    Warps that share a group, each with its own rows of the tile.
``channels``, ``stages``
    Input channels of a stage, and stages of the ring.
``split``
    Blocks that share the input channels of one tile; a second kernel adds up their sums.
``entries``
    ``"wide"``: 16-bit values.  ``"coded"``, for quantized weights: bytes, the place of the value in a table in shared
    memory; half of the weight's traffic.  A channel's scale comes at the end.

Sharing gathered columns between vectors of outputs is the idea of Chen et al. ("Efficient tensor core-based GPU kernels
for structured sparsity", SC 2021); here the vectors are any rows that are alike.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.activations import Activation
from numbasparse.kernels import cuda_fragments, cuda_reduce, two_four
from numbasparse.kernels.base import Config, CudaKernel, CudaRunner, Space, check_fields
from numbasparse.kernels.cpu_rows import coordinates
from numbasparse.kernels.cuda_fragments import device_function, reason_values
from numbasparse.kernels.cuda_packed import Finish, PackedRunner, Size
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

ROWS = STEP = 16
"""Output channels of a group, and columns of a step."""
_AHEAD = 2
"""Steps whose weight is read before they are done."""
_CODES = 256
"""Places of a table: a code is a byte."""


# ---- geometry -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a block's tile lies in shared memory, and who computes what.  Offsets in bytes.

    Attributes
    ----------
    batch
        Images.
    tile_h, tile_w
        Output pixels of a block.
    part_h
        Rows of the tile of a warp.
    patch_h, patch_w
        Pixels of an input tile.
    pixel_bytes
        The images of a pixel: a row of shared memory.
    """

    batch: int
    tile_h: int
    tile_w: int
    part_h: int
    patch_h: int
    patch_w: int
    pixel_bytes: int

    @property
    def pitch(self) -> int:
        """Rows of shared memory from a channel to the next: an odd number, so that channels are in all banks."""
        return self.patch_h * self.patch_w | 1

    @property
    def channel_bytes(self) -> int:
        return self.pitch * self.pixel_bytes

    @property
    def columns(self) -> int:
        """Columns of the sums of a warp, in one row of its tile."""
        return self.tile_w * self.batch

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.part_h * self.columns // 2


def geometry_of(spec: ConvSpec, config: Config) -> Geometry:
    """The geometry of a config whose fields have been checked."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch = int(config["batch"])
    (sh, sw), (dh, dw) = spec.stride, spec.dilation
    return Geometry(
        batch=batch,
        tile_h=tile_h,
        tile_w=tile_w,
        part_h=tile_h // int(config["parts"]),
        patch_h=(tile_h - 1) * sh + (spec.r - 1) * dh + 1,
        patch_w=(tile_w - 1) * sw + (spec.s - 1) * dw + 1,
        pixel_bytes=2 * batch,
    )


def parse_tile(text: int | str) -> tuple[int, int]:
    """Rows and columns of "2x4"; (0, 0) for any other text."""
    rows, _, columns = str(text).partition("x")
    good = rows.isdecimal() and columns.isdecimal() and len(rows) < 4 and len(columns) < 4
    return (int(rows), int(columns)) if good else (0, 0)


# ---- packing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A weight cut for the blocks of a config.

    Attributes
    ----------
    steps : uint8, (steps + 2, bytes)
        Of every step what 32 lanes hold of its 16 x 16 values (16 bytes each, `two_four.fragments`, or their 8 codes,
        a byte each in that order), and the offset of each column's row in the input tile, int32 (16,).  The steps of a
        warp lie one behind another.  Two more are read and not used.
    counts : int32, (blocks, groups, jobs)
        Steps of a warp for each stage's tile.
    firsts : int32, (blocks, groups, splits)
        First step of a warp.
    channels : int32, (blocks, jobs, channels)
        Input channels of a stage's tile; where there are fewer, one of them again.
    rows : int32, (blocks, groups * 16)
        Output channel of every row, -1 where there is none.
    """

    steps: NDArray[np.uint8]
    counts: NDArray[np.int32]
    firsts: NDArray[np.int32]
    channels: NDArray[np.int32]
    rows: NDArray[np.int32]

    @property
    def jobs(self) -> int:
        return self.channels.shape[1]


def pack(spec: ConvSpec, weight: SparseWeight, config: Config) -> Packed:
    """Cut a weight into blocks of groups of output channels and tiles of input channels, and write its steps."""
    g, groups = geometry_of(spec, config), int(config["warps"])
    per_job, split = int(config["channels"]), int(config["split"])
    order = groups_of(weight)
    blocks = -(-len(order) // groups)
    rows = np.full((blocks * groups, ROWS), -1, np.int32)
    rows[: len(order)] = order
    place = np.empty(weight.k, np.int64)
    place[rows[rows >= 0]] = np.flatnonzero(rows.ravel() >= 0)

    k, c, r, s = coordinates(weight)
    group, row = np.divmod(place[k], ROWS)
    used, index = np.unique(group // groups * spec.c + c, return_inverse=True)
    used_block, used_channel = np.divmod(used, spec.c)
    slot = np.arange(len(used)) - np.searchsorted(used_block, used_block)
    jobs = max(1, -(-int(slot.max(initial=0) + 1) // per_job))
    channels = np.zeros((blocks, jobs, per_job), np.int32)
    channels[used_block, slot // per_job, slot % per_job] = used_channel

    job, within = np.divmod(slot[index], per_job)
    line = within * g.pitch + r * spec.dilation[0] * g.patch_w + s * spec.dilation[1]
    columns, column = np.unique((group * jobs + job) * (per_job * g.pitch) + line, return_inverse=True)
    which, line = np.divmod(columns, per_job * g.pitch)
    starts = np.searchsorted(which, np.arange(blocks * groups * jobs + 1))
    counts = -(-np.diff(starts) // STEP)
    first = np.concatenate([[0], np.cumsum(counts)])
    at = first[which] * STEP + order_banks(starts, line)

    total = int(first[-1])
    values = np.zeros((total, ROWS, STEP), np.float32 if config["entries"] == "wide" else np.uint8)
    entries = weight.data if config["entries"] == "wide" else coding_of(weight)[1]
    values[at[column] // STEP, row, at[column] % STEP] = entries
    # A step's places without a column read the row of its first one, and multiply it with zeros.
    offsets = np.full((total, STEP), -1, np.int32)
    offsets.ravel()[at] = line * g.pixel_bytes
    offsets = np.where(offsets < 0, offsets[:, :1], offsets)
    each = -(-jobs // split)
    firsts = first[:-1].reshape(blocks, groups, jobs)[:, :, : each * split : each]
    firsts = np.concatenate([firsts, np.zeros((blocks, groups, split - firsts.shape[2]), np.int64)], axis=2)
    return Packed(
        steps=_written(values, offsets, spec.dtype),
        counts=counts.reshape(blocks, groups, jobs).astype(np.int32),
        firsts=firsts.astype(np.int32),
        channels=channels,
        rows=rows.reshape(blocks, groups * ROWS),
    )


_orders: weakref.WeakKeyDictionary[SparseWeight, NDArray[np.int32]] = weakref.WeakKeyDictionary()
_shares: weakref.WeakKeyDictionary[SparseWeight, float] = weakref.WeakKeyDictionary()


def groups_of(weight: SparseWeight) -> NDArray[np.int32]:
    """Output channels in groups that need few columns together, (groups, 16), -1 where there is none."""
    found = _orders.get(weight)
    if found is None:
        indptr, indices, width = _columns(weight)
        found = _orders[weight] = two_four.order_rows(indptr, indices, width, ROWS)
    return found


def kept_share(weight: SparseWeight) -> float:
    """Columns that the groups need, as a share of all that their conv groups have."""
    found = _shares.get(weight)
    if found is None:
        order = groups_of(weight)
        indptr, indices, width = _columns(weight)
        group = np.empty(weight.k, np.int64)
        group[order[order >= 0]] = np.flatnonzero(order.ravel() >= 0) // ROWS
        cells = np.repeat(group, np.diff(indptr)) * width + indices
        found = _shares[weight] = len(np.unique(cells)) / max(1, len(order) * (width // weight.groups))
    return found


def _columns(weight: SparseWeight) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """CSR matrix of a weight over the columns of all conv groups."""
    width = int(np.prod(weight.kernel_shape))
    group = np.repeat(np.arange(weight.k) // (weight.k // weight.groups), np.diff(weight.indptr))
    return weight.indptr.astype(np.int32), (weight.indices + group * width).astype(np.int32), width * weight.groups


def order_banks(starts: NDArray[np.int64], line: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of every column in its list, so that eight neighbours are in different banks where that is possible.

    Parameters
    ----------
    starts : (lists + 1,)
        Columns of list i are ``starts[i]`` up to ``starts[i + 1]``.
    line
        Row of shared memory of every column: with the swizzle rows are in the same banks if they are equal modulo 8.

    Returns
    -------
    place : (columns,)
        In the list, from 0 on.  Of the banks with the most columns left each eight takes one.
    """
    return two_four.compiled(_order_banks)(starts, line)


def _order_banks(starts: Any, line: Any) -> Any:
    place = np.empty(len(line), np.int64)
    for i in range(len(starts) - 1):
        begin, end = starts[i], starts[i + 1]
        left = np.zeros(8, np.int64)
        for at in range(begin, end):
            left[line[at] % 8] += 1
        # For each bank the next place that it takes: places are dealt eight by eight.
        places = np.empty((8, end - begin), np.int64)
        taken = np.zeros(8, np.int64)
        for number in range(end - begin):
            if number % 8 == 0:
                used = np.zeros(8, np.int64)
            best = -1
            for bank in range(8):
                # Fewest of this eight first, then the most left.
                if left[bank] > 0 and (
                    best < 0 or used[bank] < used[best] or (used[bank] == used[best] and left[bank] > left[best])
                ):
                    best = bank
            places[best, taken[best]] = number
            taken[best] += 1
            used[best] += 1
            left[best] -= 1
        taken[:] = 0
        for at in range(begin, end):
            bank = line[at] % 8
            place[at] = places[bank, taken[bank]]
            taken[bank] += 1
    return place


_codings: weakref.WeakKeyDictionary[SparseWeight, tuple[NDArray[np.float32], NDArray[np.int64]]] = (
    weakref.WeakKeyDictionary()
)


def coding_of(weight: SparseWeight) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values of a quantized weight, before the scale, behind a zero; and the place of each non-zero's among them."""
    found = _codings.get(weight)
    if found is None:
        assert weight.levels is not None
        assert weight.codes is not None
        table, first = weight.levels.tables()
        start = first if len(first) == 1 else np.repeat(first, np.diff(weight.indptr))
        values, places = np.unique(np.asarray(table, np.float32)[weight.codes + start], return_inverse=True)
        found = _codings[weight] = np.concatenate([np.zeros(1, np.float32), values]), places.reshape(-1) + 1
    return found


def _written(values: np.ndarray, offsets: NDArray[np.int32], dtype: str) -> NDArray[np.uint8]:
    """Steps as bytes, and two more."""
    count, coded = len(values), values.dtype == np.uint8
    whole = np.zeros((-(-count // 4) * 4, ROWS, STEP), values.dtype)
    whole[:count] = values
    if coded:
        lanes = two_four.lanes(whole.reshape(-1, 4 * ROWS, STEP)).reshape(-1, 32 * 8)
    else:
        lanes = two_four.fragments(whole.reshape(-1, 4 * ROWS, STEP), dtype).reshape(-1, 32 * 4).view(np.uint8)
    made = np.zeros((count + _AHEAD, lanes.shape[1] + 4 * STEP), np.uint8)
    made[:count, : lanes.shape[1]] = lanes[:count]
    made[:count, lanes.shape[1] :] = np.ascontiguousarray(offsets).view(np.uint8)
    return made


# ---- code ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """All constants of the kernel's code: what the compiled code depends on, and nothing else."""

    spec: ConvSpec
    geometry: Geometry
    groups: int
    parts: int
    channels: int
    stages: int
    split: int
    blocks: int
    jobs: int
    coded: bool
    scaled: bool
    activation: str
    residual: bool

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.parts

    @property
    def registers(self) -> int:
        """Of a thread at most: so few that blocks of 512 threads fit, or several smaller ones, where sums are few."""
        by_threads = 65536 // (128 * -(-self.threads // 128)) // 8 * 8
        return min(by_threads, 128 if self.geometry.sums <= 64 else 255)

    @property
    def pieces(self) -> int:
        """Pieces of 16 bytes of a channel of the input tile."""
        return self.geometry.patch_h * self.geometry.patch_w * self.geometry.pixel_bytes // 16

    @property
    def side(self) -> int:
        """Threads that copy pieces of the same channel: so many that few of all have nothing to do."""
        choices = [side for side in (4, 8, 16, 32, 64, 128, 256) if self.threads % side == 0]

        def rounds(side: int) -> int:
            return -(-self.pieces // side) * -(-self.channels // (self.threads // side))

        return min(choices, key=lambda side: (rounds(side), -side))

    @property
    def own_jobs(self) -> int:
        """Jobs of a block of a split at most."""
        return -(-self.jobs // self.split)

    @property
    def channels_at(self) -> int:
        """Where the numbers of input channels are, behind the places of pieces."""
        return 4 * self.pieces

    @property
    def table_at(self) -> int:
        return self.channels_at + 4 * self.own_jobs * self.channels

    @property
    def stages_at(self) -> int:
        table = 2 * _CODES if self.coded else 0
        return -(-(self.table_at + table) // 128) * 128

    @property
    def stage_bytes(self) -> int:
        return -(-self.channels * self.geometry.channel_bytes // 128) * 128

    @property
    def shared_bytes(self) -> int:
        return 128 + self.stages_at + self.stages * self.stage_bytes

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.spec.out_h // self.geometry.tile_h), -(-self.spec.out_w // self.geometry.tile_w)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of the same pixels are neighbours in time: the second cache serves their tiles."""
        down, across = self.tiles
        return self.blocks * down * across * -(-self.spec.n // self.geometry.batch), self.split, 1

    @property
    def step_bytes(self) -> int:
        return (32 * 8 if self.coded else 32 * 16) + 4 * STEP


def _code(shape: _Shape) -> Callable[..., None]:
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, groups, threads, stages = shape.geometry, shape.groups, shape.threads, shape.stages
    locate, fill, compute = _locate(shape), _fill(shape), _compute(shape)
    numbers_of, finish = cuda_fragments.finish(
        shape.spec, g.part_h, g.tile_w, g.batch, shape.split, shape.residual, shape.activation, shape.scaled
    )
    shared_base, zeros, source, load = ptx.shared_base(128), ptx.zeros(g.sums), _source(shape), _load(shape)
    wait = ptx.copy_wait(stages - 2)
    pieces, jobs, split, own_jobs = shape.pieces, shape.jobs, shape.split, shape.own_jobs
    per_job, channels_at, table_at = shape.channels, shape.channels_at, shape.table_at
    stages_at, stage_bytes, step_bytes = shape.stages_at, shape.stage_bytes, shape.step_bytes
    own_rows = g.part_h * shape.spec.stride[0] * g.patch_w * g.pixel_bytes
    # Lanes from 16 on give the rows of the next eight columns: of the same pixel, or of the next one.
    next_eight = 16 if g.batch > 8 else shape.spec.stride[1] * g.pixel_bytes
    part_h, table_words, lane_bytes = g.part_h, _CODES // 2 if shape.coded else 0, 8 if shape.coded else 16

    def cuda_mma(x, y, residual, bias, scale, rows, steps, counts, firsts, channels, table):  # type: ignore[no-untyped-def]
        # Everything that is not an address in global memory has 32 bits: sums leave few registers.
        base = i32(shared_base())
        thread = ptx.thread_index()
        warp, lane = thread >> 5, thread & 31
        group, part = i32(warp % groups), i32(warp // groups)
        block, image, _, _, top, left = locate()
        first = i32(ptx.block_y() * own_jobs)
        count = i32(max(0, min(own_jobs, jobs - first)))
        for v in range(thread, i32(pieces), i32(threads)):
            ptx.store_shared_i32(u32(base + 4 * v), i32(source(v, image, top, left)))
        own_channels = channels + (block * jobs + first) * i64(4 * per_job)
        for v in range(thread, i32(count * per_job), i32(threads)):
            ptx.store_shared_i32(u32(base + channels_at + 4 * v), ptx.load_global_i32(i64(own_channels + 4 * v)))
        for v in range(thread, i32(table_words), i32(threads)):
            ptx.store_shared_i32(u32(base + table_at + 4 * v), ptx.load_global_i32(i64(table + 4 * v)))
        own_counts = counts + ((block * groups + group) * jobs + first) * i64(4)
        begin = ptx.load_global_i32(i64(firsts + ((block * groups + group) * split + ptx.block_y()) * i64(4)))
        # Of this lane; offsets of rows lie behind the values.
        step = steps + begin * i64(step_bytes) + lane * i64(lane_bytes)
        w0 = load(step, lane)
        w1 = load(step + step_bytes, lane)
        following = ptx.load_global_i32(i64(own_counts)) if count > 0 else i32(0)
        ptx.barrier()
        for i in range(i32(stages - 1)):
            if i < count:
                fill(x, base, i, i32(base + stages_at + i * stage_bytes))
            ptx.copy_commit()
        sums = zeros()
        own = i32(base + stages_at + part * own_rows + (lane >> 4) * next_eight)
        stage, filled = i32(0), i32((stages - 1) * stage_bytes)
        for i in range(count):
            # An empty group too: the number of groups tells which stage is there.  When all have come here, nobody
            # reads the stage before any more.
            wait()
            ptx.barrier()
            if i32(i + stages - 1) < count:
                fill(x, base, i32(i + stages - 1), i32(base + stages_at + filled))
            ptx.copy_commit()
            remaining = following
            own_counts += i64(4)
            if i32(i + 1) < count:
                following = ptx.load_global_i32(i64(own_counts))
            sums, w0, w1, step = compute(sums, w0, w1, step, remaining, base, i32(own + stage))
            filled = stage
            stage = i32(stage + stage_bytes)
            if stage == i32(stages * stage_bytes):
                stage = i32(0)
        # Computed again, so that nothing of it takes a register until here.
        thread = ptx.thread_index()
        warp, lane = thread >> 5, thread & 31
        block, image, oy, ox, _, _ = locate()
        numbers = numbers_of(rows, (block * groups + warp % groups) * i64(16), lane)
        oy += warp // groups * part_h
        finish(sums, y, residual, bias, scale, numbers, ptx.block_y(), image, oy, ox, lane)

    return cuda_mma


def _load(shape: _Shape) -> Any:
    """Device function: what a lane needs of a step: its values or codes, and the offset of its row."""
    from numba import types

    from numbasparse.codegen import ptx

    i64 = types.int64
    words = 2 if shape.coded else 4
    load_values, load_offset = ptx.load_words("global", words), ptx.load_words("global", 1)

    def load(step, lane):  # type: ignore[no-untyped-def]
        offset = load_offset(i64(step + (32 * 4 * words + (lane & 15) * 4 - lane * (4 * words))))
        return load_values(i64(step)), offset

    return device_function(load)


def _compute(shape: _Shape) -> Any:
    """Device function: a warp adds what its columns of a stage's tile give to its sums."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, spec, coded = shape.geometry, shape.spec, shape.coded
    row, column = spec.stride[0] * g.patch_w * g.pixel_bytes, spec.stride[1] * g.pixel_bytes
    displacements = [
        i * row + n // g.batch * column + n % g.batch * 2 for i in range(g.part_h) for n in range(0, g.columns, 16)
    ]
    mma = ptx.gathered_mma_deep(displacements, ptx.SWIZZLES[g.pixel_bytes].mask, spec.dtype)
    load, decode = _load(shape), ptx.decode_bytes(2)
    step_bytes, table_at = shape.step_bytes, shape.table_at

    def compute(sums, w0, w1, step, remaining, base, start):  # type: ignore[no-untyped-def]
        lane = ptx.thread_index() & 31
        for _ in range(remaining):
            w2 = load(i64(step + 2 * step_bytes), lane)
            values = decode(w0[0], u32(base + table_at)) if coded else w0[0]
            sums = mma(sums, values, u32(start + i32(w0[1])))
            w0, w1 = w1, w2
            step += i64(step_bytes)
        return sums, w0, w1, step

    return device_function(compute)


def _fill(shape: _Shape) -> Any:
    """Device function: start the copies of a job's input tile into a stage."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, spec = shape.geometry, shape.spec
    side, pieces, per_job, channels_at = shape.side, shape.pieces, shape.channels, shape.channels_at
    others, channel_bytes, mask = shape.threads // side, g.channel_bytes, ptx.SWIZZLES[g.pixel_bytes].mask
    plane = spec.h * spec.w * spec.n * 2

    def fill(x, base, number, stage):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        numbers = i32(base + channels_at + number * (4 * per_job))
        for j in range(i32(thread // side), i32(per_job), i32(others)):
            source = x + ptx.load_shared_i32(u32(numbers + 4 * j)) * i64(plane)
            to = i32(stage + j * channel_bytes)
            for v in range(i32(thread % side), i32(pieces), i32(side)):
                # -1: the piece lies outside of the image, and is filled with zeros.
                place = ptx.load_shared_i32(u32(base + 4 * v))
                linear = i32(to + 16 * v)
                target = linear ^ (linear >> 3 & mask)
                ptx.copy_async_16(u32(target), i64(source + max(place, i32(0))), i32(16) if place >= 0 else i32(0))

    return device_function(fill)


def _locate(shape: _Shape) -> Any:
    """Device function: block of output channels, first image, first output row and column, and first input ones."""
    from numbasparse.codegen import ptx

    g, spec = shape.geometry, shape.spec
    down, across = shape.tiles
    blocks, batch, tile_h, tile_w = shape.blocks, g.batch, g.tile_h, g.tile_w
    (sh, sw), pad_y, pad_x = spec.stride, spec.padding[0][0], spec.padding[1][0]

    def locate():  # type: ignore[no-untyped-def]
        index = ptx.block_x()
        tile = index // blocks % (across * down)
        image = index // (blocks * across * down) * batch
        oy, ox = tile // across * tile_h, tile % across * tile_w
        return index % blocks, image, oy, ox, oy * sh - pad_y, ox * sw - pad_x

    return device_function(locate)


def _source(shape: _Shape) -> Any:
    """Device function: where piece v of an input tile lies in its channel, in bytes, or -1 if outside."""
    g, spec = shape.geometry, shape.spec
    eights, patch_w, n, h, w = g.batch // 8, g.patch_w, spec.n, spec.h, spec.w

    def source(v, image, top, left):  # type: ignore[no-untyped-def]
        pixel, first = v // eights, image + v % eights * 8
        y, x = top + pixel // patch_w, left + pixel % patch_w
        if y < 0 or y >= h or x < 0 or x >= w or first >= n:
            return -1
        return ((y * w + x) * n + first) * 2

    return device_function(source)


@functools.cache
def _compile(shape: _Shape, capability: tuple[int, int]) -> tuple[cuda.Ptx, cuda.Ptx | None]:
    """PTX of the kernel, and of the second one of a split."""
    cuda.numba_cuda()  # prepares NumPy for it, before codegen.ptx imports it
    main = cuda.compile_ptx(
        _code(shape),
        11,
        repr(shape),
        capability=capability,
        threads=shape.threads,
        max_registers=shape.registers,
        fastmath=False,
    )
    if shape.split == 1:
        return main, None
    return main, cuda_reduce.reduce_ptx(
        shape.spec, shape.split, True, shape.scaled, shape.residual, shape.activation, capability
    )


def _shape(
    spec: ConvSpec,
    weight: SparseWeight,
    config: Config,
    jobs: int,
    activation: str = "none",
    residual: bool = False,
) -> _Shape:
    coded = config["entries"] == "coded"
    groups = int(config["warps"])
    return _Shape(
        spec=spec,
        geometry=geometry_of(spec, config),
        groups=groups,
        parts=int(config["parts"]),
        channels=int(config["channels"]),
        stages=int(config["stages"]),
        split=int(config["split"]),
        blocks=-(-spec.k // (groups * ROWS)),
        jobs=jobs,
        coded=coded,
        scaled=coded and weight.levels is not None and bool((weight.levels.scale != 1).any()),
        activation=activation,
        residual=residual,
    )


# ---- the kernel ---------------------------------------------------------------------------------------------


class _Runner(PackedRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        packed = pack(spec, weight, config)
        make = functools.partial(_shape, spec, weight, config, packed.jobs, activation)
        table = np.zeros(_CODES, np.float32)
        if config["entries"] == "coded":
            table[: len(coding_of(weight)[0])] = coding_of(weight)[0]
        arrays = (
            packed.rows,
            packed.steps,
            packed.counts,
            packed.firsts,
            packed.channels,
            two_four.narrow(table, spec.dtype),
        )
        scale = np.ones(1) if weight.levels is None else weight.levels.scale
        super().__init__(spec, arrays, "CHWN", int(config["split"]), make, _compile, np.broadcast_to(scale, spec.k))

    def _size(self, shape: _Shape) -> Size:
        return shape.grid, shape.threads, shape.shared_bytes

    def _start(self, main: cuda.Function, shape: _Shape, size: Size, x: int, finish: Finish, stream: int) -> None:
        main.launch(*size, stream, (x, *finish, *self._pointers))


class CudaMma(CudaKernel):
    """Gathered columns on any tensor cores; see the module's text."""

    name = "cuda_mma"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        capability = cuda.current().capability
        if capability < (8, 0):
            return f"its instructions need compute capability 8.0, this GPU is {capability[0]}.{capability[1]}"
        if spec.n % 8:
            return f"copies of 16 bytes need a batch of a multiple of 8, got {spec.n}"
        if spec.n * spec.h * spec.w * 2 >= 2**31:
            return "a channel of the input (all images) has 2 GiB or more"
        return reason_values(spec, weight)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {
            "batch": tuple(b for b in (64, 32, 16, 8) if b <= max(8, spec.n))[:2],
            "tile": _TILES,
            "warps": tuple(w for w in (4, 8, 16) if w == 4 or w * ROWS < 2 * spec.k),
            "parts": (1, 2, 4),
            "channels": (8, 16, 32, 64),
            "stages": (2, 3),
            "split": (1, 2, 4, 8),
            "entries": ("wide",) if _reason_coded(weight) else ("wide", "coded"),
        }

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = check_fields(config, _FIELDS)
        if reason is not None:
            return reason
        if config["entries"] == "coded" and _reason_coded(weight) is not None:
            return _reason_coded(weight)
        return _reason_shape(spec, config) or _reason_resources(spec, weight, config)

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return self.suggest(spec, weight, threads, 1)[0]

    def suggest(self, spec: ConvSpec, weight: SparseWeight, threads: int, count: int) -> list[Config]:
        space, device, kept = self.space(spec, weight, threads), cuda.current(), kept_share(weight)
        ranked = []
        for number, values in enumerate(itertools.product(*space.values())):
            config = dict(zip(space, values, strict=True))
            if self.check(spec, weight, config) is None:
                ranked.append((estimate(spec, weight, config, device, kept), number, config))
        return [config for _, _, config in sorted(ranked)][:count] or [dict(_FALLBACK)]

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[layouts.Layout, layouts.Layout]:
        return "CHWN", "CHWN"

    def ptx(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        shape = _shape(spec, weight, config, pack(spec, weight, config).jobs, activation)
        return tuple(p for p in _compile(shape, cuda.current().capability) if p is not None)

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)


_FIELDS: dict[str, Any] = {
    "batch": (8, 64),
    "tile": (),
    "warps": (1, 32),
    "parts": (1, 8),
    "channels": (1, 256),
    "stages": (2, 8),
    "split": (1, 64),
    "entries": ("wide", "coded"),
}
_TILES = ("1x4", "1x7", "1x8", "2x2", "2x4", "2x7", "2x8", "4x2", "4x4", "4x7", "4x8", "7x7", "8x4", "8x8")
_FALLBACK: Config = {
    "batch": 8,
    "tile": "1x4",
    "warps": 1,
    "parts": 1,
    "channels": 1,
    "stages": 2,
    "split": 1,
    "entries": "wide",
}
"""Small enough for most problems."""


def _reason_coded(weight: SparseWeight) -> str | None:
    if weight.levels is None:
        return "coded entries need a quantized weight"
    if len(coding_of(weight)[0]) > _CODES:
        return f"the weight has {len(coding_of(weight)[0])} values with zero, coded entries know {_CODES}"
    return None


def _reason_shape(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the instructions cannot have such operands."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, parts = int(config["batch"]), int(config["parts"])
    if not 1 <= tile_h <= 256 or not 1 <= tile_w <= 256:
        return f"tile must be a text like '2x4', got {config['tile']!r}"
    if batch not in (8, 16, 32, 64):
        return f"batch must be 8, 16, 32 or 64, got {batch}"
    if tile_h % parts:
        return f"{parts} parts cannot share the rows of a tile of {tile_h}"
    if tile_w * batch % 32:
        return f"columns * batch must be a multiple of 32, got {tile_w * batch}"
    return None


def _reason_resources(spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
    """Reason why a block does not fit a multiprocessor."""
    jobs = -(-spec.c // int(config["channels"]))
    shape, device = _shape(spec, weight, config, jobs), cuda.current()
    if shape.threads > 1024:
        return f"a block has at most 1024 threads, got {shape.threads}"
    if shape.geometry.sums + _SPARE_REGISTERS > shape.registers:
        return f"{shape.geometry.sums} sums of {shape.threads} threads exceed a multiprocessor's registers"
    if shape.shared_bytes > device.shared_per_block:
        return f"{shape.shared_bytes} bytes of shared memory exceed a block's {device.shared_per_block}"
    if shape.split > -(-spec.c_per_group // shape.channels):
        return f"{shape.split} splits exceed the jobs of {shape.channels} of {spec.c_per_group} channels"
    if shape.grid[0] >= 2**31:
        return "the grid is too large"
    return None


_SPARE_REGISTERS = 50
"""Registers beside the sums: weights of three steps, gathered rows, addresses."""
_SHARED_BYTES_PER_CLOCK, _L2_BYTES_PER_CLOCK = 128.0, 26.0
_JOB_CLOCKS, _START_CLOCKS, _REACHED = 250.0, 4000.0, 0.75
"""Of a job beside its work, and of a launch; what is reached of shared memory's bound."""


def estimate(spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device, kept: float) -> float:
    """Clocks that a config may take: the slower of shared memory and the second cache, in whole waves of blocks."""
    jobs = -(-spec.c // int(config["channels"]))
    shape = _shape(spec, weight, config, jobs)
    g = shape.geometry
    # Channels of all conv groups that a block meets.
    reached = min(spec.c, spec.c_per_group * -(-spec.groups // shape.blocks))
    own_jobs = -(-reached // shape.channels) / shape.split
    columns = kept * spec.c_per_group * spec.r * spec.s / shape.split
    # Half of a step is empty at the end of a job.
    steps = columns / STEP + 0.5 * own_jobs
    groups = min(shape.groups, -(-spec.k // ROWS))
    gathered = groups * shape.parts * steps * (g.part_h * g.columns * 2 * STEP + shape.step_bytes)
    tile = reached / shape.split * g.patch_h * g.patch_w * g.pixel_bytes
    shared = (gathered / _REACHED + tile) / _SHARED_BYTES_PER_CLOCK
    fetched = (tile + groups * steps * shape.step_bytes) / _L2_BYTES_PER_CLOCK
    by_shared = device.shared_per_multiprocessor // (shape.shared_bytes + 1024)
    resident = max(1, min(by_shared, 65536 // (shape.registers * shape.threads), 2048 // shape.threads))
    blocks = shape.grid[0] * shape.split
    each = min(resident, -(-blocks // device.multiprocessors))
    # Few warps hide little of what they wait for.
    hidden = 1.0 + 0.5 * (4.0 / (each * shape.groups * shape.parts)) ** 1.5
    # Blocks beside each other hide what a block waits for at its start, its end and between jobs.
    clocks = max(shared * hidden, fetched) + (own_jobs * _JOB_CLOCKS + 1500.0) / each
    waves = -(-blocks // (device.multiprocessors * each)) * each
    out = spec.n * spec.k * spec.out_h * spec.out_w
    extra = 0.0 if shape.split == 1 else 3000.0 + shape.split * out * 8 / device.multiprocessors / 20
    return _START_CLOCKS + waves * clocks + extra
