"""Sparse convolution on Hopper's sparse tensor cores: any mask in 2:4 form, taps as addresses into an input tile.

A block computes a tile of output pixels, of some images, for 64 output channels.  It walks over the input channels, a
few at a time: one order to the copy engine brings their input tile, with its halo, as [row][column][channel][image],
into a ring of stages.  There the channels of a pixel are eight rows of shared memory that the tensor cores read as
eight k of an operand; other pixels are other n, and other taps are other starts.  So a step of the work, one sparse
``wgmma`` of 64 output channels, 32 columns of the weight (four times eight neighbouring channels of some tap) and all
pixels of a tile, needs an address and a distance, nothing is copied or gathered, and what is computed is what
`two_four.cover_steps` says.  The rest, where four neighbouring channels hold more than two non-zeros, is added to the
same sums by ``mma.sync``, which takes its rows from any address.

The weight of a tile, in the order in which it is used, comes with it, by another order to the copy engine.  One or two
warpgroups compute the tile's rows, each its share.  Blocks stay, and take one output tile after another: the warp that
is the last to leave a stage orders the next copy into it, which may be of the next output tile, so that copies go on
while sums are stored.  In a cluster that is the last warp of all its blocks, whose copy of a tile goes to all of them.

A warp of its own for the copies would leave the others too few registers: a quarter of a multiprocessor has them for
two warps of 255, or for three of 168, and nvJitLink ignores ``setmaxnreg`` in PTX (C7504).

Bound: each sparse ``wgmma`` reads its 32 x n operand from shared memory as fast as that can give, so that the tensor
cores and shared memory are both full, and every other use of shared memory (copies into it, the rest) adds to it.
Zeros make it faster up to about 90 %; beyond, a step takes as long whatever its columns hold.

Since zeros are multiplied, an infinity in the input reaches outputs that it does not belong to, as NaN.

Search space
------------
``batch``
    Images of a block: the width of a row of shared memory, of activations in CHWN.
``tile``
    Output pixels of a block, as text: rows x columns.  A row is one ``wgmma``, of columns * batch of n.
``channels``, ``stages``
    Input channels of a stage, and stages of the ring.
``split``
    Blocks that share the input channels of one tile; a second kernel adds up their sums.
``cluster``
    Blocks of different output channels that get their input tile from one copy: as many times less is read from the
    second cache.
``groups``
    Warpgroups of a block.  Blocks of one may be two on a multiprocessor, so that one stores while the other computes.

The idea of sparse tensor cores for unstructured masks is that of Pool and Yu ("Channel Permutations for N:M
Sparsity", NeurIPS 2021), without loss; the pipeline is that of CUTLASS's warp-specialised kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, exp
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.kernels import cuda_fragments, cuda_reduce, two_four
from numbasparse.kernels.base import Config, CudaKernel, CudaRunner, Space, check_fields
from numbasparse.kernels.cuda_fragments import reason_values
from numbasparse.kernels.cuda_packed import Finish, PackedRunner, Size
from numbasparse.kernels.cuda_tiles import (
    OutputTiles,
    device_function,
    locate,
    parse_tile,
    ranked,
    row_clocks,
    split_clocks,
)
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_REGISTERS = 255
"""Of a thread, of which a multiprocessor has enough for 256."""
_WINDOW = 0x3FFFF
"""Bits of an address of shared memory that a matrix descriptor holds; above is the number of the block in its cluster
(PTX ISA, "Matrix descriptor format")."""
_HEAD_BYTES = 1024
"""Of shared memory: the barriers, and so much that the stages are aligned to the swizzle's pattern."""
UNIT_BYTES, CHUNK_BYTES, HEADER_BYTES = 2320, 1152, 16
"""Of a step in a blob, of a chunk of the rest, and of what is before them."""
_METADATA, _WORD, _OFFSETS = 2048, 2304, 1024
"""Where a step has its metadata and its word, and a chunk the offsets of its rows."""


# ---- geometry -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a block's tile lies in shared memory, and who computes what.  Offsets in bytes.

    Attributes
    ----------
    groups
        Warpgroups.
    batch, channels
        Images and input channels of a stage.
    tile_h, tile_w
        Output pixels of a block.
    patch_h, patch_w
        Pixels of an input tile.
    row_bytes
        The images of one channel of one pixel.
    pixel_bytes
        The channels of one pixel.
    octets
        Groups of eight channels from the first tap's first to the last tap's last: what a step can start from.
    """

    groups: int
    batch: int
    channels: int
    tile_h: int
    tile_w: int
    patch_h: int
    patch_w: int
    row_bytes: int
    pixel_bytes: int
    octets: int

    @property
    def rows(self) -> int:
        """Rows of the tile of a warpgroup."""
        return self.tile_h // self.groups

    @property
    def n(self) -> int:
        """Columns of one ``wgmma``."""
        return self.tile_w * self.batch

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.rows * self.n // 2

    @property
    def tile_bytes(self) -> int:
        """Bytes that a copy brings."""
        return self.patch_h * self.patch_w * self.pixel_bytes

    def octet(self, c: Any, r: Any, s: Any, spec: ConvSpec) -> Any:
        """Octet of channel c of a stage at tap (r, s)."""
        pixel = r * spec.dilation[0] * self.patch_w + s * spec.dilation[1]
        return pixel * (self.channels // 8) + c // 8


def geometry_of(spec: ConvSpec, config: Config) -> Geometry:
    """The geometry of a config whose fields have been checked."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, channels = int(config["batch"]), int(config["channels"])
    (sh, sw), (dh, dw) = spec.stride, spec.dilation
    patch_h = (tile_h - 1) * sh + (spec.r - 1) * dh + 1
    patch_w = (tile_w - 1) * sw + (spec.s - 1) * dw + 1
    pixel_bytes = 2 * batch * channels
    return Geometry(
        groups=int(config["groups"]),
        batch=batch,
        channels=channels,
        tile_h=tile_h,
        tile_w=tile_w,
        patch_h=patch_h,
        patch_w=patch_w,
        row_bytes=2 * batch,
        pixel_bytes=pixel_bytes,
        octets=((spec.r - 1) * dh * patch_w + (spec.s - 1) * dw + 1) * (channels // 8),
    )


@functools.lru_cache(maxsize=4096)
def expected_work(spec: ConvSpec, geometry: Geometry, density: float) -> tuple[int, float]:
    """Steps and chunks of a tile, if its zeros are random.

    Every octet has a non-zero. Of the four places of a quad those over two make the rest; sixteen rows share a column
    of it, and four times sixteen the chunks.
    """
    channels = range(0, min(geometry.channels, spec.c_per_group), 8)
    needed = tuple(geometry.octet(c, r, s, spec) for r in range(spec.r) for s in range(spec.s) for c in channels)
    once, columns = two_four.steps_to_cover(needed, geometry.octets), 8 * len(needed)
    over = 16 * columns / 4 * (4 * density**3 * (1 - density) + 2 * density**4)
    chunks = max(1.0 - exp(-4 * over), 1.1 * over / two_four.REST)
    return (once, chunks) if chunks < once else (2 * once, 0.0)


# ---- packing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A weight cut for the blocks of a config.

    Attributes
    ----------
    blobs : uint8
        One behind another, what a job multiplies its tile by: int32 numbers of steps and of chunks and 8 bytes of
        nothing; of every step 2048 bytes of `two_four.fragments`, 256 of `two_four.Steps.metadata`, an int32 with the
        start (bits 0-13) and the distance between octets (14-27) in units of 16 bytes, and 12 bytes of nothing; of
        every chunk of the rest 1024 bytes of `two_four.fragments` and the offset of every row in the input tile, int32
        (4, 8).
    jobs : int32, (jobs, 4)
        First input channel of the tile, start of the blob in units of 16 bytes, bytes of the blob, 0.
    ranges : int32, (blocks, splits, 2)
        What a block does: its first job and its number of jobs, which is the same in all blocks of a cluster.
    rows : int32, (blocks, 64)
        Output channel of every row, -1 where there is none.
    """

    blobs: np.ndarray
    jobs: np.ndarray
    ranges: np.ndarray
    rows: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (self.blobs, self.jobs, self.ranges, self.rows))


def pack(spec: ConvSpec, weight: SparseWeight, config: Config) -> Packed:
    """Cut a weight into blocks of 64 output channels and tiles of input channels, and write their steps."""
    geometry, split = geometry_of(spec, config), int(config["split"])
    rows = _row_blocks(spec, weight)
    per_block = -(-spec.c_per_group // geometry.channels)
    steps, rest = _steps(spec, weight, geometry, rows, per_block)
    live = _live(np.diff(steps.first), per_block, int(config["cluster"]))
    room = _room(spec, geometry, weight.density)
    pieces, ranges = _pieces(np.diff(steps.first), np.diff(rest.first), room, live, split, int(config["cluster"]))
    block, tile = np.divmod(pieces[:, 0], per_block)
    group = block // (len(rows) // spec.groups)
    blobs, starts, sizes = _blobs(spec, steps, rest, geometry, pieces)
    jobs = np.zeros((len(pieces), 4), np.int32)
    jobs[:, 0] = group * spec.c_per_group + tile * geometry.channels
    jobs[:, 1], jobs[:, 2] = starts // 16, sizes
    return Packed(blobs, jobs, ranges, rows)


def _room(spec: ConvSpec, geometry: Geometry, density: float) -> tuple[int, int]:
    """Steps and chunks for which a stage has room.  A tile with more is copied again for what does not fit."""
    steps, chunks = expected_work(spec, geometry, density)
    return steps, ceil(chunks) + 1


def _row_blocks(spec: ConvSpec, weight: SparseWeight) -> np.ndarray:
    """Output channels of each block, (blocks, 64): rows of similar columns together, no group with another."""
    blocks = []
    width = spec.c_per_group * spec.r * spec.s
    for g in range(spec.groups):
        start = g * spec.k_per_group
        indptr = weight.indptr[start : start + spec.k_per_group + 1]
        indices = weight.indices[indptr[0] : indptr[-1]]
        made = two_four.order_rows(indptr - indptr[0], indices.astype(np.int32), width)
        blocks.append(np.where(made >= 0, made + start, -1))
    return np.concatenate(blocks).astype(np.int32)


def _steps(
    spec: ConvSpec, weight: SparseWeight, geometry: Geometry, rows: np.ndarray, per_block: int
) -> tuple[two_four.Steps, two_four.Rest]:
    """Steps of every block and tile of input channels; part ``block * per_block + tile``."""
    place = np.empty(spec.k, np.int64)
    place[rows[rows >= 0]] = np.flatnonzero(rows.ravel() >= 0)
    block, row = np.divmod(place, two_four.ROWS)
    # Of every column of a weight's matrix, and then of every non-zero.
    c, tap = np.divmod(np.arange(spec.c_per_group * spec.r * spec.s), spec.r * spec.s)
    tile, channel = np.divmod(c, geometry.channels)
    octet = geometry.octet(channel, tap // spec.s, tap % spec.s, spec)
    k, column = np.repeat(np.arange(spec.k), np.diff(weight.indptr)), weight.indices
    part = (block * per_block)[k] + tile[column]
    parts = len(rows) * per_block
    return two_four.cover_steps(part, row[k], octet[column], (channel % 8)[column], weight.data, parts, geometry.octets)


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
    often = np.maximum(1, np.maximum(-(-steps // room[0]), -(-chunks // room[1])))
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
    spec: ConvSpec, steps: two_four.Steps, rest: two_four.Rest, geometry: Geometry, pieces: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blobs of all jobs, their starts and their sizes in bytes.

    Jobs are in the order of their parts, and a part is some job's: so are steps and chunks in their order.
    """
    counts, rest_counts = pieces[:, 1], pieces[:, 2]
    sizes = HEADER_BYTES + counts * UNIT_BYTES + rest_counts * CHUNK_BYTES
    starts = np.cumsum(sizes) - sizes
    lines = np.zeros((int(sizes.sum()) // 16, 16), np.uint8)
    lines[starts // 16, :8] = _as_bytes(pieces[:, 1:].astype(np.int32))
    first = starts + HEADER_BYTES
    _place(lines, first, counts, _units(steps, geometry, spec.dtype))
    _place(lines, first + counts * UNIT_BYTES, rest_counts, _chunks(rest, geometry, spec.dtype))
    return lines.ravel(), starts, sizes


def _place(lines: np.ndarray, starts: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
    """Write rows of bytes into lines of 16 bytes: of every job its count, one behind another from its start on."""
    if not len(rows):
        return
    width = rows.shape[1]
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = (np.repeat(starts, counts) + within * width) // 16
    lines[at[:, None] + np.arange(width // 16)] = rows.reshape(len(rows), -1, 16)


def _units(steps: two_four.Steps, geometry: Geometry, dtype: str) -> np.ndarray:
    units = np.zeros((steps.count, UNIT_BYTES), np.uint8)
    units[:, :_METADATA] = _as_bytes(two_four.fragments(steps.values, dtype))
    units[:, _METADATA:_WORD] = _as_bytes(steps.metadata)
    # Octets are eight rows, in units of 16 bytes.
    placed = (steps.columns * (8 * geometry.row_bytes // 16)).astype(np.int64)
    units[:, _WORD:].view(np.int32)[:, 0] = placed[:, 0] | placed[:, 1] << 14
    return units


def _chunks(rest: two_four.Rest, geometry: Geometry, dtype: str) -> np.ndarray:
    chunks = np.zeros((rest.count, CHUNK_BYTES), np.uint8)
    chunks[:, :_OFFSETS] = _as_bytes(two_four.fragments(rest.values, dtype))
    chunks[:, _OFFSETS:] = _as_bytes((rest.columns * geometry.row_bytes).astype(np.int32))
    return chunks


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Everything but the first dimension as bytes."""
    return np.ascontiguousarray(array).reshape(len(array), int(np.prod(array.shape[1:]))).view(np.uint8)


# ---- code ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape(OutputTiles):
    """All constants of the kernel's code: what the compiled code depends on, and nothing else."""

    spec: ConvSpec
    geometry: Geometry
    room: tuple[int, int]
    stages: int
    split: int
    cluster: int
    blocks: int
    activation: str
    residual: bool

    @property
    def stage_bytes(self) -> int:
        """An input tile and behind it a blob, up to the next multiple of 1024."""
        blob = HEADER_BYTES + self.room[0] * UNIT_BYTES + self.room[1] * CHUNK_BYTES
        return -(-(self.geometry.tile_bytes + blob) // 1024) * 1024

    @property
    def shared_bytes(self) -> int:
        """Behind the last stage is room for the steps that are read ahead of the last one."""
        return 1024 + _HEAD_BYTES + self.stages * self.stage_bytes + 2 * UNIT_BYTES

    @property
    def threads(self) -> int:
        return 128 * self.geometry.groups

    def resident(self, device: cuda.Device) -> int:
        """Blocks that are on a multiprocessor at once."""
        return min(2 // self.geometry.groups, device.shared_per_multiprocessor // (self.shared_bytes + 1024))

    def grid(self, device: cuda.Device) -> tuple[int, int, int]:
        """As many blocks as are on the device at once, a multiple of the cluster; fewer where there is less work."""
        # Clusters lie within the 16 or 18 multiprocessors of a part of the GPU, of which those of four leave some out.
        usable = device.multiprocessors if self.cluster < 4 else device.multiprocessors * 16 // 17
        most = usable * self.resident(device) // self.cluster * self.cluster
        return min(most, self.works), 1, 1


def _code(shape: _Shape) -> Callable[..., None]:
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    stages, cluster, works = shape.stages, shape.cluster, shape.works
    shared_base, place_of, compute, (numbers_of, finish) = (
        ptx.shared_base(1024),
        locate(shape),
        _compute(shape),
        _finish(shape),
    )
    (jobs_of, advance), (copy_first, copy_next) = _cursor(shape), _copies(shape)
    zeros, load_job = ptx.zeros(shape.geometry.sums), ptx.load_words("global", 4)
    own_lines, stage_bytes = shape.geometry.rows, shape.stage_bytes

    def cuda_wgmma(y, residual, bias, rows, blobs, jobs, ranges):  # type: ignore[no-untyped-def]
        base = i64(shared_base())
        thread = ptx.thread_index()
        group, within, warp, lane = thread >> 7, thread & 127, (thread >> 5) & 3, thread & 31
        # For each stage 8 bytes of barrier; behind them 4 that count the warps that have left it; behind these 4 that
        # count the blocks, those in the first block of a cluster.
        if thread == 0:
            for i in range(stages):
                ptx.mbarrier_init(u32(base + 8 * i), i32(1))
                ptx.store_shared_i32(u32(base + 8 * stages + 4 * i), i32(0))
                ptx.store_shared_i32(u32(base + 12 * stages + 4 * i), i32(0))
            ptx.mbarrier_init_fence()
        if cluster > 1:
            ptx.cluster_arrive()
            ptx.cluster_wait()
        else:
            ptx.barrier()
        work, step = ptx.block_x(), ptx.grid_x()
        # What is to be copied next: a job, how many follow it for its output tile, which that is, and where.
        origin = (work, work, work)
        job, left, ahead, origin = advance(jobs, ranges, i64(jobs), i32(0), work - step, step, origin)
        for i in range(stages):
            if ahead < works:
                if thread == 0:
                    copy_first(base, i, blobs, load_job(job), origin)
                job, left, ahead, origin = advance(jobs, ranges, job, left, ahead, step, origin)
        slot, phase = i32(0), i32(0)
        while work < works:
            sums = zeros()
            block, part, first_image, oy, ox, _, _ = place_of(work)
            numbers = numbers_of(rows, block * i64(two_four.ROWS) + warp * 16, lane)
            for _ in range(jobs_of(ranges, work)[1]):
                following = load_job(job)
                ptx.mbarrier_wait(u32(base + 8 * slot), phase)
                stage = base + _HEAD_BYTES + slot * stage_bytes
                sums = compute(sums, stage, group, within, warp, lane)
                # Every lane has read the stage when the first one counts.
                ptx.warp_barrier()
                # Where nothing follows nobody counts, so that no block is asked which may have ended.
                if ahead < works:
                    if lane == 0:
                        copy_next(base, slot, blobs, following, origin)
                    job, left, ahead, origin = advance(jobs, ranges, job, left, ahead, step, origin)
                # The next instructions want all lanes together.
                ptx.warp_barrier()
                slot += i32(1)
                if slot == i32(stages):
                    slot = i32(0)
                    phase ^= i32(1)
            finish(sums, y, residual, bias, bias, numbers, part, first_image, oy + group * own_lines, ox, lane)
            work += step
        # A block ends when all of its cluster have got their last tile.
        if cluster > 1:
            ptx.cluster_arrive_relaxed()
            ptx.cluster_wait()

    return cuda_wgmma


def _cursor(shape: _Shape) -> tuple[Any, Any]:
    """Device functions: the jobs of an output tile, and the step from a job to the one that a block does next."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, i64 = types.int32, types.int64
    blocks, split, works, place_of = shape.blocks, shape.split, shape.works, locate(shape)

    def jobs_of(ranges, work):  # type: ignore[no-untyped-def]
        """First job, and number of jobs."""
        own = ranges + (work % blocks * split + work // blocks % split) * i64(8)
        return ptx.load_global_i32(i64(own)), ptx.load_global_i32(i64(own + 4))

    jobs_of = device_function(jobs_of)

    def advance(jobs, ranges, job, left, work, step, origin):  # type: ignore[no-untyped-def]
        """The next job, how many follow it for its output tile, the tile, and image, row and column of its input.

        Behind the last one the tile is one that there is not, and the job is any.
        """
        job += i64(16)
        left -= i32(1)
        if left < 0:
            work += step
            # An output tile without weights has no jobs.
            while work < works:
                first, count = jobs_of(ranges, work)
                if count > 0:
                    job, left = jobs + first * i64(16), count - i32(1)
                    break
                work += step
            if work >= works:
                job = i64(jobs)
            _, _, image, _, _, top, start = place_of(work)
            origin = (image, top, start)
        return job, left, work, origin

    return jobs_of, device_function(advance)


def _copies(shape: _Shape) -> tuple[Any, Any]:
    """Device functions: copy a job's tile and weight into an empty stage, and into one that a warp has left, if it was
    the last.  One thread of a warp runs them.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    stages, cluster, warps = shape.stages, shape.cluster, 4 * shape.geometry.groups
    stage_bytes, tile_bytes, every = shape.stage_bytes, shape.geometry.tile_bytes, (1 << shape.cluster) - 1

    def copy_weight(base, slot, blobs, job):  # type: ignore[no-untyped-def]
        """Each block for itself: expect both copies and order the one of its own weight."""
        full, stage = u32(base + 8 * slot), u32(base + _HEAD_BYTES + slot * stage_bytes)
        ptx.mbarrier_expect(full, i32(tile_bytes + job[2]))
        ptx.copy_bulk(u32(stage + tile_bytes), i64(blobs + job[1] * i64(16)), i32(job[2]), full)

    def copy_tile(base, slot, channel, origin):  # type: ignore[no-untyped-def]
        """One for all blocks of a cluster; it may come before a block expects it: bytes are counted below zero too."""
        full, stage = u32(base + 8 * slot), u32(base + _HEAD_BYTES + slot * stage_bytes)
        tensor_map = ptx.tensor_map_address()
        image, top, left = i32(origin[0]), i32(origin[1]), i32(origin[2])
        if cluster > 1:
            ptx.copy_box_to_cluster(stage, tensor_map, image, channel, left, top, full, i32(every))
        else:
            ptx.copy_box(stage, tensor_map, image, channel, left, top, full)

    copy_weight, copy_tile = device_function(copy_weight), device_function(copy_tile)

    def copy_first(base, slot, blobs, job, origin):  # type: ignore[no-untyped-def]
        copy_weight(base, slot, blobs, job)
        if cluster == 1 or ptx.cluster_rank() == 0:
            copy_tile(base, slot, i32(job[0]), origin)

    def copy_next(base, slot, blobs, job, origin):  # type: ignore[no-untyped-def]
        before = ptx.count_shared(u32(base + 8 * stages + 4 * slot), i32(1))
        if before % warps != warps - 1:
            return
        # The sign of a count is 0, but ptxas does not know: it would bring the channel into a uniform register as soon
        # as it is asked for, and wait for it there.
        channel = i32(job[0]) + (before >> 31)
        last = True
        if cluster > 1:
            blocks_left = ptx.cluster_address(u32(base + 12 * stages + 4 * slot), i32(0))
            last = ptx.count_in_cluster(blocks_left, i32(1)) % cluster == cluster - 1
        if last:
            copy_tile(base, slot, channel, origin)
        copy_weight(base, slot, blobs, job)

    return device_function(copy_first), device_function(copy_next)


def _compute(shape: _Shape) -> Any:
    """Device function: a warpgroup adds what the tile and the weight of a stage give to its sums."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    geometry, tile_bytes = shape.geometry, shape.geometry.tile_bytes
    own_rows = geometry.rows * shape.spec.stride[0] * geometry.patch_w * geometry.pixel_bytes
    multiply, (leftover, fetch) = _multiply(shape), _leftover(shape)
    wait_two, settle = ptx.wgmma_wait(2), ptx.wgmma_settle(geometry.sums)
    load_four, load_two, load_one = (ptx.load_words("shared", n) for n in (4, 2, 1))

    def load(unit, values, metadata):  # type: ignore[no-untyped-def]
        """The weight of a step for one thread, and its word."""
        return load_four(u32(unit + values)), load_one(u32(unit + metadata)), i32(load_one(u32(unit + _WORD)))

    load = device_function(load)

    def step(sums, weight, operand, following, values, metadata):  # type: ignore[no-untyped-def]
        """Order a step, and read the weight of one that follows."""
        sums = multiply(sums, weight[0], weight[1], weight[2], operand)
        loaded = load(following, values, metadata)
        wait_two()
        return sums, loaded

    step = device_function(step)

    def compute(sums, stage, group, within, warp, lane):  # type: ignore[no-untyped-def]
        values, metadata = within * 16, _METADATA + ((warp * 8 + (lane >> 2)) * 2 + (lane & 1)) * 4
        own, unit = stage + group * own_rows, stage + tile_bytes + HEADER_BYTES
        operand = own & _WINDOW
        steps, chunks = load_two(u32(stage + tile_bytes))
        remaining = i32(steps)
        rest = unit + i32(steps) * UNIT_BYTES
        fetched = fetch(rest, within, warp, lane)
        w0 = load(unit, values, metadata)
        w1 = load(unit + UNIT_BYTES, values, metadata)
        # Nothing but wgmma may write sums in this loop, or ptxas waits for each before the next (C7515).  A step's
        # weight is read two steps ahead, since reads queue behind the tensor cores' own of shared memory, and two steps
        # are under way when the next is ordered: five sets of registers.
        while remaining > 0:
            sums, w2 = step(sums, w0, operand, unit + 2 * UNIT_BYTES, values, metadata)
            if remaining == 1:
                break
            sums, w3 = step(sums, w1, operand, unit + 3 * UNIT_BYTES, values, metadata)
            if remaining == 2:
                break
            sums, w4 = step(sums, w2, operand, unit + 4 * UNIT_BYTES, values, metadata)
            if remaining == 3:
                break
            sums, w0 = step(sums, w3, operand, unit + 5 * UNIT_BYTES, values, metadata)
            if remaining == 4:
                break
            sums, w1 = step(sums, w4, operand, unit + 6 * UNIT_BYTES, values, metadata)
            unit += i64(5 * UNIT_BYTES)
            remaining -= i32(5)
        sums = settle(sums)
        return leftover(sums, i32(chunks), own, fetched, rest, within, warp, lane)

    return device_function(compute)


def _multiply(shape: _Shape) -> Any:
    """Device function: a step for the rows of a warpgroup, whose first input row is at ``stage``."""
    from numba import types

    from numbasparse.codegen import ptx

    g, spec = shape.geometry, shape.spec
    u32 = types.uint32
    row = spec.stride[0] * g.patch_w * g.pixel_bytes // 16
    wgmma = ptx.sparse_wgmma(g.rows, g.n, row, spec.dtype)
    descriptor = ptx.matrix_descriptor(g.row_bytes, spec.stride[1] * g.pixel_bytes)
    low_word, high_word, k_high = descriptor.low, descriptor.high, descriptor.k_high

    def multiply(sums, values, metadata, word, stage):  # type: ignore[no-untyped-def]
        low, high = (stage >> 4) + (word & 0x3FFF) + low_word, high_word
        distance = (word >> 14) & 0x3FFF
        if k_high:
            return wgmma(sums, values, metadata, u32(low), u32(high + distance))
        return wgmma(sums, values, metadata, u32(low + (distance << 16)), u32(high))

    return device_function(multiply)


def _leftover(shape: _Shape) -> tuple[Any, Any]:
    """Device functions: chunks of the rest for the rows of a warpgroup, whose first input row is at ``own``; and what
    reads a thread's share of a chunk, which is done one chunk ahead.
    """
    from numba import types

    from numbasparse.codegen import ptx

    g, spec = shape.geometry, shape.spec
    i64, u32 = types.int64, types.uint32
    row, column = spec.stride[0] * g.patch_w * g.pixel_bytes, spec.stride[1] * g.pixel_bytes
    displacements = [
        i * row + n // g.batch * column + n % g.batch * 2 for i in range(g.rows) for n in range(0, g.n, 32)
    ]
    # Lanes of an eight that is not of the first pixel's images are at another pixel.
    eights, pixel = g.batch // 8, column
    mma = ptx.gathered_mma(displacements, ptx.SWIZZLES[g.row_bytes].mask, spec.dtype)
    load_two, load_one = ptx.load_words("shared", 2), ptx.load_words("shared", 1)

    def fetch(chunk, within, warp, lane):  # type: ignore[no-untyped-def]
        offset = load_one(u32(chunk + _OFFSETS + (warp * 8 + (lane & 7)) * 4))
        return load_two(u32(chunk + within * 8)), offset

    fetch = device_function(fetch)

    def leftover(sums, count, own, fetched, chunk, within, warp, lane):  # type: ignore[no-untyped-def]
        eight = lane >> 3
        start = own + eight // eights * pixel + eight % eights * 16
        for _ in range(count):
            chunk += i64(CHUNK_BYTES)
            following = fetch(chunk, within, warp, lane)
            sums = mma(sums, fetched[0], u32(start + fetched[1]))
            fetched = following
        return sums

    return device_function(leftover), fetch


def _finish(shape: _Shape) -> tuple[Any, Any]:
    """Device functions for the sums of a warpgroup: see `cuda_fragments.finish`."""
    g = shape.geometry
    return cuda_fragments.finish(shape.spec, g.rows, g.tile_w, g.batch, shape.split, shape.residual, shape.activation)


@functools.cache
def _compile(shape: _Shape, capability: tuple[int, int]) -> tuple[cuda.Ptx, cuda.Ptx | None]:
    """PTX of the kernel, and of the second one of a split."""
    cuda.numba_cuda()  # prepares NumPy for it, before codegen.ptx imports it
    main = cuda.compile_ptx(
        _code(shape),
        7,
        repr(shape),
        capability=capability,
        threads=shape.threads,
        max_registers=_REGISTERS,
        fastmath=False,
    )
    if shape.split == 1:
        return main, None
    return main, cuda_reduce.reduce_ptx(
        shape.spec, shape.split, True, False, shape.residual, shape.activation, capability
    )


def _shape(spec: ConvSpec, config: Config, density: float, activation: str = "none", residual: bool = False) -> _Shape:
    blocks = spec.groups * -(-spec.k_per_group // two_four.ROWS)
    stages, split, cluster = (int(config[f]) for f in ("stages", "split", "cluster"))
    geometry = geometry_of(spec, config)
    room = _room(spec, geometry, density)
    return _Shape(spec, geometry, room, stages, split, cluster, blocks, activation, residual)


# ---- the kernel ---------------------------------------------------------------------------------------------


class _Runner(PackedRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        packed = pack(spec, weight, config)
        make = functools.partial(_shape, spec, config, weight.density, activation)
        arrays = (packed.rows, packed.blobs, packed.jobs, packed.ranges)
        super().__init__(spec, arrays, "CHWN", int(config["split"]), make, _compile)

    def _size(self, shape: _Shape) -> Size:
        return shape.grid(self._facts), shape.threads, shape.shared_bytes

    def _start(self, main: cuda.Function, shape: _Shape, size: Size, x: int, finish: Finish, stream: int) -> None:
        tensor_map = self._map(x, functools.partial(_tensor_map, shape))
        arguments = (*finish[:3], *self._pointers)
        main.launch(*size, stream, arguments, cluster=shape.cluster, tensor_map=tensor_map)


def _tensor_map(shape: _Shape, address: int) -> cuda.TensorMap:
    g = shape.geometry
    return cuda_fragments.tensor_map(shape.spec, address, (g.batch, g.channels, g.patch_w, g.patch_h))


class CudaWgmma(CudaKernel):
    """Sparse tensor cores of Hopper; see the module's text."""

    name = "cuda_wgmma"
    version = 2

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        capability = cuda.current().capability
        if capability != (9, 0):
            return f"its instructions exist on compute capability 9.0 only, this GPU is {capability[0]}.{capability[1]}"
        if spec.n % 8:
            return f"the copy engine needs a batch of a multiple of 8, got {spec.n}"
        return reason_values(spec, weight)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {
            "batch": tuple(b for b in (64, 32, 16, 8) if b <= max(8, spec.n)),
            "tile": _TILES,
            "channels": (8, 16, 24, 32, 48, 64, 128, 256),
            "stages": (2, 3, 4),
            "split": (1, 2, 4, 8),
            "cluster": (1, 2),
            "groups": (1, 2),
        }

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = check_fields(config, _FIELDS)
        if reason is not None:
            return reason
        return _reason_shape(spec, config) or _reason_resources(spec, config, weight.density)

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return self.suggest(spec, weight, threads, 1)[0]

    def suggest(self, spec: ConvSpec, weight: SparseWeight, threads: int, count: int) -> list[Config]:
        space, device = self.space(spec, weight, threads), cuda.current()
        found = ranked(self, spec, weight, space, lambda config: estimate(spec, weight, config, device))
        return found[:count] or [dict(_FALLBACK)]

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[layouts.Layout, layouts.Layout]:
        return "CHWN", "CHWN"

    def ptx(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        shape = _shape(spec, config, weight.density, activation)
        return tuple(p for p in _compile(shape, cuda.current().capability) if p is not None)

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)


_FIELDS: dict[str, Any] = {
    "batch": (8, 64),
    "tile": (),
    "channels": (8, 256),
    "stages": (2, 8),
    "split": (1, 64),
    "cluster": (1, 8),
    "groups": (1, 2),
}
_TILES = (
    "1x4",
    "1x7",
    "1x8",
    "1x16",
    "2x1",
    "2x2",
    "2x4",
    "2x7",
    "2x8",
    "2x14",
    "2x16",
    "4x2",
    "4x4",
    "4x7",
    "4x8",
    "4x14",
    "8x2",
    "8x4",
    "8x8",
)
_FALLBACK: Config = {"batch": 8, "tile": "2x4", "channels": 8, "stages": 2, "split": 1, "cluster": 1, "groups": 1}
"""Small enough for most problems."""


def _reason_shape(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the instructions cannot have such operands."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, channels = int(config["batch"]), int(config["channels"])
    if not 1 <= tile_h <= 256 or not 1 <= tile_w <= 256:
        return f"tile must be a text like '2x4', got {config['tile']!r}"
    if batch not in (8, 16, 32, 64):
        return f"batch must be 8, 16, 32 or 64, got {batch}"
    if channels % 8:
        return f"channels must be a multiple of 8, got {channels}"
    groups = int(config["groups"])
    if tile_h % groups:
        return f"{groups} warpgroups cannot share the rows of a tile of {tile_h}"
    n = tile_w * batch
    if n > 256 or n % 32:
        return f"columns * batch must be a multiple of 32 up to 256, got {n}"
    geometry = geometry_of(spec, config)
    if geometry.sums > 128:
        return f"{geometry.sums} sums exceed a thread's registers, at most 128 fit"
    if max(geometry.patch_h, geometry.patch_w) > 256:
        return "a box has at most 256 values along a dimension"
    return None


def _reason_resources(spec: ConvSpec, config: Config, density: float) -> str | None:
    """Reason why a block does not fit a multiprocessor."""
    device, tiles = cuda.current(), int(config["stages"]) * geometry_of(spec, config).tile_bytes
    if tiles > device.shared_per_block:  # before its steps are counted, which may take long where tiles are large
        return f"{tiles} bytes of shared memory exceed a block's {device.shared_per_block}"
    shape = _shape(spec, config, density)
    if shape.shared_bytes > device.shared_per_block:
        return f"{shape.shared_bytes} bytes of shared memory exceed a block's {device.shared_per_block}"
    tiles = -(-spec.c_per_group // shape.geometry.channels)
    if shape.split > tiles:
        return f"{shape.split} splits exceed the {tiles} tiles of {shape.geometry.channels} channels"
    blocks = shape.blocks // spec.groups
    if blocks % shape.cluster:
        return f"a cluster of {shape.cluster} does not divide the {blocks} blocks of output channels of a group"
    if shape.works >= 1 << 30:
        return "there are too many tiles of outputs"
    return None


_BULK_BYTES_PER_CLOCK, _COPY_CLOCKS = 20.0, 700.0
"""Of the copy engine, for what is in one piece; and until the first bytes come (benchmarks/copy_engine.py).  A box for
a cluster takes a fifth longer, and all that its blocks save is lost by waiting for each other."""
_SHARED_BYTES_PER_CLOCK = 128.0
_JOB_CLOCKS, _START_CLOCKS, _CHUNK_CLOCKS = 500.0, 4000.0, 100.0
_STORE_CLOCKS = 24.0
"""Of trading, finishing and storing eight rows of 64 bytes by a warp."""


def estimate(spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device) -> float:
    """Clocks that a config may take: the slower of shared memory (or the tensor cores) and the copy engine."""
    shape = _shape(spec, config, weight.density)
    g = shape.geometry
    steps, chunks = expected_work(spec, g, weight.density)
    operand, blob = 64 * g.n * g.tile_h, steps * UNIT_BYTES + chunks * CHUNK_BYTES
    shared = ((steps + chunks) * operand + g.tile_bytes + (1 + g.groups) * blob) / _SHARED_BYTES_PER_CLOCK
    compute = shared + chunks * _CHUNK_CLOCKS / g.groups + _JOB_CLOCKS
    row = row_clocks(g.row_bytes) * (1.0 if shape.cluster == 1 else 1.3)
    copy = g.patch_h * g.patch_w * g.channels * row + blob / _BULK_BYTES_PER_CLOCK
    jobs = ceil(ceil(spec.c_per_group / g.channels) / shape.split)
    stores = g.groups * 4 * g.sums / 8 * _STORE_CLOCKS
    each, waves = shape.resident(device), ceil(shape.works / shape.grid(device)[0])
    if waves == 1:
        each = min(each, ceil(shape.works / device.multiprocessors))
    # A stage is filled while the others are computed.  Blocks share the copy engine and shared memory.
    job = max(each * shared, each * copy, (compute + copy + _COPY_CLOCKS) / shape.stages, compute)
    exposed = stores if each == 1 else 0.0
    clocks = _START_CLOCKS + copy + waves * (jobs * job + exposed)
    return clocks + split_clocks(spec, shape.split, device)
