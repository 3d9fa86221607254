"""Sparse convolution on any tensor cores: 16 output channels share the columns that any of them needs.

A block computes a tile of output pixels, of some images, for some groups of 16 output channels, which were chosen to
need few columns (channel and tap) together.  It walks over the input channels, a few at a time: their input tile, with
its halo, goes to shared memory as [row][column][channel][image], in a ring of stages.  A warp has one group, and all or
some rows of the tile.  A step of its work are 16 of its columns: ``ldmatrix`` gathers their rows of shared memory from
any 16 addresses, and ``mma.sync.m16n8k16`` multiplies them with a dense 16 x 16 piece of the weight, eight pixels or
images at a time.  The pieces come from the second cache straight into registers, two steps ahead, each used for all
columns of the tile.

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
``copy``
    ``"box"``: the copy engine brings a tile at one thread's order; blocks stay and take one output tile after another,
    and the warp that is the last to leave a stage orders the next copy into it (capability 9.0).  ``"async"``: every
    thread copies pieces that it does not wait for.  These go through the pipeline that gathers, and hold it up.
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
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.activations import Activation
from numbasparse.codegen.loops import compiled
from numbasparse.kernels import cuda_fragments, cuda_reduce, two_four
from numbasparse.kernels.base import Config, CudaRunner, Space, check_fields
from numbasparse.kernels.cpu_rows import coordinates
from numbasparse.kernels.cuda_fragments import coding_of, is_scaled, reason_values, scale_of
from numbasparse.kernels.cuda_packed import Finish, PackedRunner, Size
from numbasparse.kernels.cuda_tiles import (
    EstimatedKernel,
    OutputTiles,
    device_function,
    locate,
    parse_tile,
    register_cap,
    row_clocks,
    split_clocks,
)
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

ROWS = STEP = 16
"""Output channels of a group, and columns of a step."""
_AHEAD = 2
"""Steps whose weight is read before they are done."""
_CODES = 256
"""Places of a table: a code is a byte."""
_ALIGNED = 1024
"""Starts of stages: multiples of the swizzle's pattern."""


# ---- geometry -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a block's tile lies in shared memory, and who computes what.  Offsets in bytes.

    Attributes
    ----------
    batch, channels
        Images and input channels of a stage.
    tile_h, tile_w
        Output pixels of a block.
    part_h
        Rows of the tile of a warp.
    patch_h, patch_w
        Pixels of an input tile.
    row_bytes
        The images of one channel of one pixel.
    """

    batch: int
    channels: int
    tile_h: int
    tile_w: int
    part_h: int
    patch_h: int
    patch_w: int
    row_bytes: int

    @property
    def pixel_bytes(self) -> int:
        """The channels of one pixel."""
        return self.channels * self.row_bytes

    @property
    def tile_bytes(self) -> int:
        """Bytes that are copied into a stage."""
        return self.patch_h * self.patch_w * self.pixel_bytes

    def line(self, channel: Any, r: Any, s: Any, spec: ConvSpec) -> Any:
        """Row of shared memory of a stage's channel at tap (r, s)."""
        return (r * spec.dilation[0] * self.patch_w + s * spec.dilation[1]) * self.channels + channel

    @property
    def lines(self) -> int:
        """Rows of shared memory of a stage."""
        return self.patch_h * self.patch_w * self.channels

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
        channels=int(config["channels"]),
        tile_h=tile_h,
        tile_w=tile_w,
        part_h=tile_h // int(config["parts"]),
        patch_h=(tile_h - 1) * sh + (spec.r - 1) * dh + 1,
        patch_w=(tile_w - 1) * sw + (spec.s - 1) * dw + 1,
        row_bytes=2 * batch,
    )


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
    channels : int32, (blocks, jobs)
        First input channel of a stage's tile.
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
        """Stages of a block, of all parts of a split."""
        return self.channels.shape[1]


def pack(spec: ConvSpec, weight: SparseWeight, config: Config) -> Packed:
    """Cut a weight into blocks of groups of output channels and tiles of input channels, and write its steps."""
    g, groups, split = geometry_of(spec, config), int(config["warps"]), int(config["split"])
    order = groups_of(weight)
    blocks = -(-len(order) // groups)
    rows = np.full((blocks * groups, ROWS), -1, np.int32)
    rows[: len(order)] = order
    place = np.empty(weight.k, np.int64)
    place[rows[rows >= 0]] = np.flatnonzero(rows.ravel() >= 0)

    k, c, r, s = coordinates(weight)
    group, row = np.divmod(place[k], ROWS)
    # Tiles of channels that a block needs are its jobs, as many in every part of a split.
    tiles = -(-spec.c // g.channels)
    used, index = np.unique(group // groups * tiles + c // g.channels, return_inverse=True)
    used_block, used_tile = np.divmod(used, tiles)
    number = np.arange(len(used)) - np.searchsorted(used_block, used_block)
    each = max(1, -(-int(number.max(initial=0) + 1) // split))
    jobs = each * split
    channels = np.zeros((blocks, jobs), np.int32)
    channels[used_block, number] = used_tile * g.channels

    job, line = number[index], g.line(c % g.channels, r, s, spec)
    columns, column = np.unique((group * jobs + job) * g.lines + line, return_inverse=True)
    which, line = np.divmod(columns, g.lines)
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
    offsets.ravel()[at] = line * g.row_bytes
    offsets = np.where(offsets < 0, offsets[:, :1], offsets)
    return Packed(
        steps=_written(values, offsets, spec.dtype),
        counts=counts.reshape(blocks, groups, jobs).astype(np.int32),
        firsts=first[:-1].reshape(blocks, groups, split, each)[..., 0].astype(np.int32),
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
    group = weight.rows // (weight.k // weight.groups)
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
    return compiled(_order_banks)(starts, line)


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
class _Shape(OutputTiles):
    """All constants of the kernel's code: what the compiled code depends on, and nothing else."""

    spec: ConvSpec
    geometry: Geometry
    groups: int
    parts: int
    stages: int
    split: int
    blocks: int
    jobs: int
    box: bool
    coded: bool
    scaled: bool
    activation: str
    residual: bool

    @property
    def warps(self) -> int:
        return self.groups * self.parts

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def registers(self) -> int:
        """Of a thread at most: so few that blocks of 512 threads fit, or several smaller ones, where sums are few."""
        return min(register_cap(self.threads), 128 if self.geometry.sums <= 64 else 255)

    @property
    def own_jobs(self) -> int:
        """Jobs of an output tile and part of a split."""
        return self.jobs // self.split

    @property
    def pieces(self) -> int:
        """Pieces of 16 bytes of a channel of the input tile."""
        return self.geometry.patch_h * self.geometry.patch_w * self.geometry.row_bytes // 16

    @property
    def side(self) -> int:
        """Threads that copy pieces of the same channel: so many that few of all have nothing to do."""
        choices = [side for side in (4, 8, 16, 32, 64, 128, 256) if self.threads % side == 0]

        def rounds(side: int) -> int:
            return -(-self.pieces // side) * -(-self.geometry.channels // (self.threads // side))

        return min(choices, key=lambda side: (rounds(side), -side))

    @property
    def channels_at(self) -> int:
        """Where the first channels of jobs are, behind the places of pieces, if threads copy."""
        return 4 * self.pieces

    @property
    def table_at(self) -> int:
        """Where values of codes are, behind barriers (8 bytes of each stage) and counts of warps (4), or those."""
        return -(-12 * self.stages // 16) * 16 if self.box else self.channels_at + 4 * self.own_jobs

    @property
    def stages_at(self) -> int:
        table = 2 * _CODES if self.coded else 0
        return -(-(self.table_at + table) // _ALIGNED) * _ALIGNED

    @property
    def stage_bytes(self) -> int:
        return -(-self.geometry.tile_bytes // _ALIGNED) * _ALIGNED

    @property
    def shared_bytes(self) -> int:
        return _ALIGNED + self.stages_at + self.stages * self.stage_bytes

    def resident(self, device: cuda.Device) -> int:
        """Blocks that are on a multiprocessor at once."""
        by_shared = device.shared_per_multiprocessor // (self.shared_bytes + 1024)
        by_registers = device.registers_per_multiprocessor // (self.registers * self.threads)
        return max(1, min(by_shared, by_registers, device.threads_per_multiprocessor // self.threads))

    def grid(self, device: cuda.Device) -> tuple[int, int, int]:
        """A block for each output tile, or as many as are on the device at once, if they stay."""
        most = device.multiprocessors * self.resident(device)
        return min(most, self.works) if self.box else self.works, 1, 1

    @property
    def step_bytes(self) -> int:
        return (32 * 8 if self.coded else 32 * 16) + 4 * STEP


def _ring_code(shape: _Shape) -> Callable[..., None]:
    """The kernel for ``copy="box"``: blocks stay, and copies run ahead into their next output tile."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, groups, stages, works, own_jobs = shape.geometry, shape.groups, shape.stages, shape.works, shape.own_jobs
    warps, stages_at, stage_bytes = shape.warps, shape.stages_at, shape.stage_bytes
    compute, order, finish = _compute(shape), _order(shape), _finish(shape)
    shared_base, zeros, fill_table, steps_of = (
        ptx.shared_base(_ALIGNED),
        ptx.zeros(g.sums),
        _fill_table(shape),
        _steps_of(shape),
    )
    own = _own_place(shape)

    def cuda_mma(y, residual, bias, scale, rows, steps, counts, firsts, channels, table):  # type: ignore[no-untyped-def]
        # Everything that is not an address in global memory has 32 bits: sums leave few registers.
        base = i32(shared_base())
        thread = ptx.thread_index()
        # For each stage 8 bytes of barrier, and behind them 4 bytes that count the warps that have left it.
        if thread < stages:
            ptx.mbarrier_init(u32(base + 8 * thread), i32(1))
            ptx.store_shared_i32(u32(base + 8 * stages + 4 * thread), i32(0))
            ptx.mbarrier_init_fence()
        fill_table(table, base)
        ptx.barrier()
        work, stride = ptx.block_x(), ptx.grid_x()
        # The output tile and job that is copied next.
        ahead, job = work, i32(0)
        for slot in range(i32(stages)):
            if ahead < works:
                if thread == 0:
                    order(base, slot, ahead, job, channels)
                job += i32(1)
                if job == i32(own_jobs):
                    ahead, job = i32(ahead + stride), i32(0)
        group, place = i32((thread >> 5) % groups), i32(base + stages_at + own(thread))
        slot, phase = i32(0), i32(0)
        while work < works:
            sums = zeros()
            step, own_counts, w0, w1, following = steps_of(work, group, thread & 31, steps, counts, firsts)
            for _ in range(i32(own_jobs)):
                remaining = following
                own_counts += i64(4)
                # One more is read behind the last, and not used.
                following = ptx.load_global_i32(i64(own_counts))
                ptx.mbarrier_wait(u32(base + 8 * slot), phase)
                sums, w0, w1, step = compute(sums, w0, w1, step, remaining, base, i32(place + slot * stage_bytes))
                # Every lane has read the stage when the first one counts.
                ptx.warp_barrier()
                # Where nothing follows nobody counts.
                if ahead < works:
                    if ptx.thread_index() & 31 == 0:
                        before = ptx.count_shared(u32(base + 8 * stages + 4 * slot), i32(1))
                        if before % warps == warps - 1:
                            order(base, slot, ahead, job, channels)
                    job += i32(1)
                    if job == i32(own_jobs):
                        ahead, job = i32(ahead + stride), i32(0)
                # The next instructions want all lanes together.
                ptx.warp_barrier()
                slot += i32(1)
                if slot == i32(stages):
                    slot = i32(0)
                    phase ^= i32(1)
            finish(sums, y, residual, bias, scale, rows, work)
            work = i32(work + stride)

    return cuda_mma


def _threads_code(shape: _Shape) -> Callable[..., None]:
    """The kernel for ``copy="async"``: a block for each output tile, whose threads copy."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, groups, threads, stages = shape.geometry, shape.groups, shape.threads, shape.stages
    place_of, fill, compute, finish = locate(shape), _fill(shape), _compute(shape), _finish(shape)
    shared_base, zeros, source, steps_of = (
        ptx.shared_base(_ALIGNED),
        ptx.zeros(g.sums),
        _source(shape),
        _steps_of(shape),
    )
    wait, fill_table, own = ptx.copy_wait(stages - 2), _fill_table(shape), _own_place(shape)
    pieces, jobs, own_jobs, channels_at = shape.pieces, shape.jobs, shape.own_jobs, shape.channels_at
    stages_at, stage_bytes = shape.stages_at, shape.stage_bytes

    def cuda_mma(x, y, residual, bias, scale, rows, steps, counts, firsts, channels, table):  # type: ignore[no-untyped-def]
        # Everything that is not an address in global memory has 32 bits: sums leave few registers.
        base = i32(shared_base())
        thread = ptx.thread_index()
        block, part, image, _, _, top, left = place_of(ptx.block_x())
        for v in range(thread, i32(pieces), i32(threads)):
            ptx.store_shared_i32(u32(base + 4 * v), i32(source(v, image, top, left)))
        own_channels = channels + (block * jobs + part * own_jobs) * i64(4)
        for v in range(thread, i32(own_jobs), i32(threads)):
            ptx.store_shared_i32(u32(base + channels_at + 4 * v), ptx.load_global_i32(i64(own_channels + 4 * v)))
        fill_table(table, base)
        group = i32((thread >> 5) % groups)
        step, own_counts, w0, w1, following = steps_of(ptx.block_x(), group, thread & 31, steps, counts, firsts)
        ptx.barrier()
        for i in range(i32(stages - 1)):
            if i < own_jobs:
                fill(x, base, i, i32(base + stages_at + i * stage_bytes))
            ptx.copy_commit()
        sums = zeros()
        place = i32(base + stages_at + own(thread))
        stage, filled = i32(0), i32((stages - 1) * stage_bytes)
        for i in range(i32(own_jobs)):
            # An empty group too: the number of groups tells which stage is there.  When all have come here, nobody
            # reads the stage before any more.
            wait()
            ptx.barrier()
            if i32(i + stages - 1) < own_jobs:
                fill(x, base, i32(i + stages - 1), i32(base + stages_at + filled))
            ptx.copy_commit()
            remaining = following
            own_counts += i64(4)
            # One more is read behind the last, and not used.
            following = ptx.load_global_i32(i64(own_counts))
            sums, w0, w1, step = compute(sums, w0, w1, step, remaining, base, i32(place + stage))
            filled = stage
            stage = i32(stage + stage_bytes)
            if stage == i32(stages * stage_bytes):
                stage = i32(0)
        finish(sums, y, residual, bias, scale, rows, ptx.block_x())

    return cuda_mma


def _own_place(shape: _Shape) -> Any:
    """Device function: where in a stage a thread's rows of the input begin."""
    g, spec, groups = shape.geometry, shape.spec, shape.groups
    own_rows = g.part_h * spec.stride[0] * g.patch_w * g.pixel_bytes
    # Lanes from 16 on give the rows of the next eight columns: of the same pixel, or of the next one.
    next_eight = 16 if g.batch > 8 else spec.stride[1] * g.pixel_bytes

    def own(thread):  # type: ignore[no-untyped-def]
        return (thread >> 5) // groups * own_rows + ((thread & 31) >> 4) * next_eight

    return device_function(own)


def _fill_table(shape: _Shape) -> Any:
    """Device function: bring the values of codes to shared memory."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    words, table_at, threads = _CODES // 2 if shape.coded else 0, shape.table_at, shape.threads

    def fill_table(table, base):  # type: ignore[no-untyped-def]
        for v in range(ptx.thread_index(), i32(words), i32(threads)):
            ptx.store_shared_i32(u32(base + table_at + 4 * v), ptx.load_global_i32(i64(table + 4 * v)))

    return device_function(fill_table)


def _steps_of(shape: _Shape) -> Any:
    """Device function: of a group and output tile the address of a lane's first step, that of the numbers of steps,
    what the lane holds of the first two steps, and the first number.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i64 = types.int64
    groups, blocks, split, jobs, own_jobs = shape.groups, shape.blocks, shape.split, shape.jobs, shape.own_jobs
    step_bytes, lane_bytes, load = shape.step_bytes, 8 if shape.coded else 16, _load(shape)

    def steps_of(work, group, lane, steps, counts, firsts):  # type: ignore[no-untyped-def]
        own, part = work % blocks * groups + group, work // blocks % split
        own_counts = counts + (own * jobs + part * own_jobs) * i64(4)
        begin = ptx.load_global_i32(i64(firsts + (own * split + part) * i64(4)))
        following = ptx.load_global_i32(i64(own_counts))
        step = steps + begin * i64(step_bytes) + lane * i64(lane_bytes)
        return step, own_counts, load(step, lane), load(i64(step + step_bytes), lane), following

    return device_function(steps_of)


def _order(shape: _Shape) -> Any:
    """Device function: one thread's order to copy a job's input tile into a stage."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    place_of, jobs, own_jobs, tile_bytes = locate(shape), shape.jobs, shape.own_jobs, shape.geometry.tile_bytes
    stages_at, stage_bytes = shape.stages_at, shape.stage_bytes

    def order(base, slot, work, job, channels):  # type: ignore[no-untyped-def]
        block, part, image, _, _, top, left = place_of(work)
        channel = ptx.load_global_i32(i64(channels + (block * jobs + part * own_jobs + job) * i64(4)))
        full = u32(base + 8 * slot)
        ptx.mbarrier_expect(full, i32(tile_bytes))
        to, tensor_map = u32(base + stages_at + slot * stage_bytes), ptx.tensor_map_address()
        ptx.copy_box(to, tensor_map, i32(image), channel, i32(left), i32(top), full)

    return device_function(order)


def _fill(shape: _Shape) -> Any:
    """Device function: start the copies of a job's input tile into a stage, by all threads."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    g, spec = shape.geometry, shape.spec
    side, pieces, channels, channels_at = shape.side, shape.pieces, g.channels, shape.channels_at
    others, row_bytes, pixel_bytes, mask = (
        shape.threads // side,
        g.row_bytes,
        g.pixel_bytes,
        ptx.SWIZZLES[g.row_bytes].mask,
    )
    plane, every, eights = spec.h * spec.w * spec.n * 2, spec.c, g.batch // 8

    def fill(x, base, number, stage):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        first = ptx.load_shared_i32(u32(base + channels_at + 4 * number))
        for j in range(i32(thread // side), i32(min(channels, every - first)), i32(others)):
            source = x + i32(first + j) * i64(plane)
            to = i32(stage + j * row_bytes)
            for v in range(i32(thread % side), i32(pieces), i32(side)):
                # -1: the piece lies outside of the image, and is filled with zeros.
                place = ptx.load_shared_i32(u32(base + 4 * v))
                linear = i32(to + v // eights * pixel_bytes + v % eights * 16)
                target = linear ^ (linear >> 3 & mask)
                ptx.copy_async_16(u32(target), i64(source + max(place, i32(0))), i32(16) if place >= 0 else i32(0))

    return device_function(fill)


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


def _load(shape: _Shape) -> Any:
    """Device function: what a lane needs of a step: its values or codes, and the offset of its row."""
    from numba import types

    from numbasparse.codegen import ptx

    i64 = types.int64
    words = 2 if shape.coded else 4
    load_values, load_offset = ptx.load_words("global", words), ptx.load_words("global", 1)

    def load(step, lane):  # type: ignore[no-untyped-def]
        # Offsets lie behind the values of all lanes.
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
    mma = ptx.gathered_mma(displacements, ptx.SWIZZLES[g.row_bytes].mask, spec.dtype, STEP)
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


def _finish(shape: _Shape) -> Any:
    """Device function: finish and store a warp's sums of an output tile; see `cuda_fragments.finish`."""
    from numba import types

    from numbasparse.codegen import ptx

    i64 = types.int64
    g, groups, place_of = shape.geometry, shape.groups, locate(shape)
    numbers_of, store = cuda_fragments.finish(
        shape.spec, g.part_h, g.tile_w, g.batch, shape.split, shape.residual, shape.activation, shape.scaled
    )
    part_h = g.part_h

    def finish(sums, y, residual, bias, scale, rows, work):  # type: ignore[no-untyped-def]
        # Computed here, so that nothing of it takes a register before.
        warp, lane = ptx.thread_index() >> 5, ptx.thread_index() & 31
        block, part, image, oy, ox, _, _ = place_of(work)
        numbers = numbers_of(rows, (block * groups + warp % groups) * i64(16), lane)
        store(sums, y, residual, bias, scale, numbers, part, image, oy + warp // groups * part_h, ox, lane)

    return device_function(finish)


@functools.cache
def _compile(shape: _Shape, capability: tuple[int, int]) -> tuple[cuda.Ptx, cuda.Ptx | None]:
    """PTX of the kernel, and of the second one of a split."""
    cuda.numba_cuda()  # prepares NumPy for it, before codegen.ptx imports it
    main = cuda.compile_ptx(
        (_ring_code if shape.box else _threads_code)(shape),
        10 if shape.box else 11,
        repr(shape),
        capability=capability,
        threads=shape.threads,
        max_registers=shape.registers,
        fastmath=False,
    )
    if shape.split == 1:
        return main, None
    return main, cuda_reduce.reduce_ptx(
        shape.spec, shape.split, "CHWN", shape.scaled, shape.residual, shape.activation, capability
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
        stages=int(config["stages"]),
        split=int(config["split"]),
        blocks=-(-spec.k // (groups * ROWS)),
        jobs=jobs,
        box=config["copy"] == "box",
        coded=coded,
        scaled=coded and is_scaled(weight),
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
            np.append(packed.counts, np.int32(0)),  # one more is read and not used
            packed.firsts,
            packed.channels,
            two_four.narrow(table, spec.dtype),
        )
        super().__init__(spec, arrays, "CHWN", int(config["split"]), make, _compile, scale_of(weight))

    def _size(self, shape: _Shape) -> Size:
        return shape.grid(self._facts), shape.threads, shape.shared_bytes

    def _start(self, main: cuda.Function, shape: _Shape, size: Size, x: int, finish: Finish, stream: int) -> None:
        arguments = (*finish, *self._pointers)
        if shape.box:
            main.launch(*size, stream, arguments, tensor_map=self._map(x, functools.partial(_tensor_map, shape)))
        else:
            main.launch(*size, stream, (x, *arguments))


def _tensor_map(shape: _Shape, address: int) -> cuda.TensorMap:
    """Boxes of an input in CHWN: see `cuda_fragments.tensor_map`."""
    g = shape.geometry
    return cuda_fragments.tensor_map(shape.spec, address, (g.batch, g.channels, g.patch_w, g.patch_h))


class CudaMma(EstimatedKernel):
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
            "channels": (8, 16, 32, 64, 128),
            "stages": (2, 3, 4),
            "copy": ("box",) if cuda.current().capability >= (9, 0) else ("async",),
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

    @property
    def fallback(self) -> Config:
        return dict(_FALLBACK)

    def estimator(self, spec: ConvSpec, weight: SparseWeight) -> Callable[[Config], float]:
        device, kept = cuda.current(), kept_share(weight)
        return lambda config: _estimate(spec, weight, config, device, kept)

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
    "copy": ("box", "async"),
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
    "copy": "async",
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
    if config["copy"] == "box":
        if cuda.current().capability < (9, 0):
            return "copy 'box' needs compute capability 9.0"
        if max(geometry_of(spec, config).patch_h, geometry_of(spec, config).patch_w) > 256:
            return "a box has at most 256 values along a dimension"
    return None


def _reason_resources(spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
    """Reason why a block does not fit a multiprocessor."""
    shape, device = _shape(spec, weight, config, _jobs(spec, config)), cuda.current()
    if shape.threads > 1024:
        return f"a block has at most 1024 threads, got {shape.threads}"
    if shape.geometry.sums + _SPARE_REGISTERS > shape.registers:
        return f"{shape.geometry.sums} sums of {shape.threads} threads exceed a multiprocessor's registers"
    if shape.shared_bytes > device.shared_per_block:
        return f"{shape.shared_bytes} bytes of shared memory exceed a block's {device.shared_per_block}"
    channels = shape.geometry.channels
    if shape.split > -(-spec.c_per_group // channels):
        return f"{shape.split} splits exceed the jobs of {channels} of {spec.c_per_group} channels"
    if shape.works >= 1 << 30:
        return "there are too many tiles of outputs"
    return None


def _jobs(spec: ConvSpec, config: Config) -> int:
    """Jobs of a block that needs all channels."""
    split, tiles = int(config["split"]), -(-spec.c // int(config["channels"]))
    return -(-tiles // split) * split


_SPARE_REGISTERS = 50
"""Registers beside the sums: weights of three steps, gathered rows, addresses."""
_GATHER, _STEP = 1.6, 1.65
"""Clocks of shared memory for each 128 bytes that are gathered (some meet in a bank) or read of a step."""
_ASYNC_BYTES_PER_CLOCK, _L2_BYTES_PER_CLOCK = 17.8, 23.5
_JOB_CLOCKS, _START_CLOCKS, _BLOCK_CLOCKS = 845.0, 730.0, 3656.0
"""Of a job beside its work, of a launch, and of a block at its start and end.  All fitted to runs on an H200."""


def _estimate(spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device, kept: float) -> float:
    """Clocks that a config may take: the slower of shared memory, copies and the second cache, in waves of blocks."""
    shape = _shape(spec, weight, config, _jobs(spec, config))
    g = shape.geometry
    # Channels of all conv groups that a block meets.
    reached = min(spec.c, spec.c_per_group * -(-spec.groups // shape.blocks))
    jobs = -(-reached // g.channels) / shape.split
    # Half of a step is empty at the end of a job.
    steps = kept * spec.c_per_group * spec.r * spec.s / shape.split / STEP + 0.5 * jobs
    groups = min(shape.groups, -(-spec.k // ROWS))
    each_step = _GATHER * g.part_h * g.columns * 2 * STEP + _STEP * shape.step_bytes
    gather, tile = groups * shape.parts * steps * each_step / 128, jobs * g.tile_bytes
    fetch = (tile + groups * steps * shape.step_bytes) / _L2_BYTES_PER_CLOCK
    if shape.box:
        copy = jobs * g.lines * row_clocks(g.row_bytes)
        work = max(gather, copy, fetch)
    else:
        work = max(gather + tile / _ASYNC_BYTES_PER_CLOCK, fetch)
    each = min(shape.resident(device), -(-shape.works // device.multiprocessors))
    waves = -(-shape.works // (device.multiprocessors * each)) * each
    exposed = jobs * _JOB_CLOCKS + (_BLOCK_CLOCKS if not shape.box else _BLOCK_CLOCKS / 2)
    extra = split_clocks(spec, shape.split, device)
    return _START_CLOCKS + waves * (work + exposed / each) + extra
