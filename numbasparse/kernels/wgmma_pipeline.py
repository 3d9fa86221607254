"""What kernels for Hopper's sparse tensor cores have in common: jobs, the ring of stages, the steps and the rest.

A block computes a tile of output pixels, of some images, for 64 output channels.  It walks over the input channels, a
few at a time: an order to the copy engine brings their input tile, with its halo, into a ring of stages, and another
one the weight of that tile, in the order in which it is used.  What is computed is what `two_four` says: *steps*, each
a sparse ``wgmma`` of 64 output channels, 32 columns of the weight and all pixels of a tile, whose operand is an address
in the tile, so that nothing is copied or gathered; and the *rest*, where four neighbouring channels hold more than two
non-zeros, which is added to the same sums by ``mma.sync``.

One or two warpgroups compute the tile's pixels, each its share; or each has all pixels and 64 output channels of its
own (a *stack*), which halves the copies of tiles; or two take turns with the input channels, and add up their sums in
shared memory, so that one can wait while the other computes where there is no second block for a multiprocessor.
Blocks stay, and take one output tile after another: the warp that is the last to leave a stage orders the next copy
into it, which may be of the next output tile, so that copies go on while sums are stored.  In a cluster that is the
last warp of all its blocks, whose copy of a tile goes to all of them.

A warp of its own for the copies would leave the others too few registers: a quarter of a multiprocessor has them for
two warps of 255, or for three of 168, and nvJitLink ignores ``setmaxnreg`` in PTX (C7504).

Steps are read from a list with their weights, or the code knows them all.  Then a stage is left when the first steps of
the next job are under way; and where a weight leaves no rest, a job begins while the last steps of the one before are:
the tensor cores wait for nothing but full stages.

How a tile lies in shared memory, which is what activations in CHWN and in NHWC differ in, is a `Geometry`.

Values of a quantized weight may be stored as codes, which the threads decode on their way to the tensor cores: copies
and reads of weights are a fifth of what shared memory does.

The idea of sparse tensor cores for unstructured masks is that of Pool and Yu ("Channel Permutations for N:M
Sparsity", NeurIPS 2021), without loss; the pipeline is that of CUTLASS's warp-specialised kernels.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.kernels import cuda_reduce, two_four
from numbasparse.kernels.base import Config, CudaRunner
from numbasparse.kernels.cuda_fragments import reason_values, scale_of
from numbasparse.kernels.cuda_packed import Finish, PackedRunner, Size
from numbasparse.kernels.cuda_tiles import EstimatedKernel, device_function, locate, split_clocks
from numbasparse.kernels.wgmma_packing import Packed, pack
from numbasparse.kernels.wgmma_shape import (
    CHUNK_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    OFFSETS,
    Facts,
    Geometry,
    Shape,
    facts_of,
    reason_coded,
)
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_REGISTERS = 255
"""Of a thread, of which a multiprocessor has enough for 256."""
WINDOW = 0x3FFFF
"""Bits of an address of shared memory that a matrix descriptor holds; above is the number of the block in its cluster
(PTX ISA, "Matrix descriptor format")."""


# ---- code ---------------------------------------------------------------------------------------------------


def _code(shape: Shape) -> Callable[..., None]:
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    stages, cluster, works, turns, sums_at = shape.stages, shape.cluster, shape.works, shape.turns, shape.sums_at
    load_table, decode = _decoder(shape)
    shared_base, place_of, (nothing_held, begin, compute, keep), (numbers_of, begin_store, finish) = (
        ptx.shared_base(1024),
        locate(shape),
        _compute_every(shape) if shape.every else _compute(shape, decode),
        shape.geometry.finish(shape.split, shape.residual, shape.activation, shape.entries.scaled, shape.ahead),
    )
    (jobs_of, advance), (copy_first, copy_next) = _cursor(shape), _copies(shape)
    zeros, settle, load_job = (
        ptx.zeros(shape.geometry.sums),
        ptx.wgmma_settle(shape.geometry.sums),
        ptx.load_words("global", 4),
    )
    late, early, stack = shape.late, shape.early, shape.stack
    blob_bytes, tile_bytes = shape.blob_bytes, shape.geometry.tile_bytes
    store_sums, add_sums = ptx.store_sums(shape.geometry.sums), ptx.add_sums(shape.geometry.sums)
    stage_bytes = shape.stage_bytes

    def leave(base, blobs, slot, following, origin, wanted, lane):  # type: ignore[no-untyped-def]
        """A warp has done with a stage, which gets the job that follows, if one is wanted."""
        # Every lane has read the stage when the first one counts.
        ptx.warp_barrier()
        # Where nothing follows nobody counts, so that no block is asked which may have ended.
        if wanted and lane == 0:
            copy_next(base, slot, blobs, following, origin)

    leave = device_function(leave)

    def cuda_wgmma(y, residual, bias, scale, rows, blobs, jobs, ranges, table):  # type: ignore[no-untyped-def]
        base = i64(shared_base())
        values = load_table(table)
        thread = ptx.thread_index()
        group, within, warp, lane = thread >> 7, thread & 127, (thread >> 5) & 3, thread & 31
        # Of warpgroups that take turns, whose it is; of a stack, which 64 output channels are a warpgroup's own.
        turn, own = i32(0), i32(0)
        if turns > 1:
            turn, group = group, i32(0)
        if stack > 1:
            own, group = group, i32(0)
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
        # The stage that is left late, and what follows there.
        no_job = (u32(0), u32(0), u32(0), u32(0))
        left_slot, left_job, left_origin, left_wanted = slot, no_job, origin, False
        held = nothing_held()
        while work < works:
            sums = zeros()
            block, part, first_image, oy, ox, _, _ = place_of(work)
            numbers = numbers_of(rows, (block * stack + own) * i64(two_four.ROWS) + warp * 16, lane)
            # What is added to the sums comes while they are computed.
            if early:
                begun = begin_store(residual, numbers, part, first_image, oy, ox, group, lane)
            for number in range(jobs_of(ranges, work)[1]):
                following, after, wanted = load_job(job), origin, ahead < works
                own_slot, own_phase = slot, phase
                slot += i32(1)
                if slot == i32(stages):
                    slot = i32(0)
                    phase ^= i32(1)
                if turns == 1 or i32(number) % i32(turns) == turn:
                    ptx.mbarrier_wait(u32(base + 8 * own_slot), own_phase)
                    stage = base + HEAD_BYTES + own_slot * stage_bytes
                    blob = stage + tile_bytes + own * blob_bytes
                    sums, carried = begin(sums, held, stage, blob, group, within, warp, lane)
                    if late:
                        leave(base, blobs, left_slot, left_job, left_origin, left_wanted, lane)
                        left_slot, left_job, left_origin, left_wanted = own_slot, following, after, wanted
                    # What this waits for is read while steps are under way.
                    if wanted:
                        job, left, ahead, origin = advance(jobs, ranges, job, left, ahead, step, origin)
                    sums, held = compute(sums, carried, stage, blob, values, group, within, warp, lane)
                    if not late:
                        leave(base, blobs, own_slot, following, after, wanted, lane)
                elif wanted:
                    job, left, ahead, origin = advance(jobs, ranges, job, left, ahead, step, origin)
                # The next instructions want all lanes together.
                ptx.warp_barrier()
            if late:
                sums = settle(sums)
                keep(held, u32(base))
                leave(base, blobs, left_slot, left_job, left_origin, left_wanted, lane)
                left_wanted = False
            if turns > 1:
                place = u32(base + sums_at + within * 16)
                if turn == 1:
                    store_sums(sums, place)
                ptx.barrier()
                if turn == 0:
                    sums = add_sums(sums, place)
                # They have been read when the next ones are stored.
                ptx.barrier()
            if turn == 0:
                if not early:
                    begun = begin_store(residual, numbers, part, first_image, oy, ox, group, lane)
                finish(sums, begun, y, residual, bias, scale, numbers, part, first_image, oy, ox, group, lane)
            work += step
        # A block ends when all of its cluster have got their last tile.
        if cluster > 1:
            ptx.cluster_arrive_relaxed()
            ptx.cluster_wait()

    return cuda_wgmma


def _cursor(shape: Shape) -> tuple[Any, Any]:
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


def _copies(shape: Shape) -> tuple[Any, Any]:
    """Device functions: copy a job's tile and weight into an empty stage, and into one that a warp has left, if it was
    the last.  One thread of a warp runs them.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    stages, cluster, stack = shape.stages, shape.cluster, shape.stack
    warps, blob_bytes = 4 * shape.geometry.groups * stack, shape.blob_bytes
    stage_bytes, tile_bytes, copied = shape.stage_bytes, shape.geometry.tile_bytes, shape.geometry.copied_bytes
    boxes = shape.geometry.copy_tile(cluster)

    def copy_weight(base, slot, blobs, job):  # type: ignore[no-untyped-def]
        """Each block for itself: expect both copies and order the one of its own weight."""
        full, stage = u32(base + 8 * slot), u32(base + HEAD_BYTES + slot * stage_bytes)
        ptx.mbarrier_expect(full, i32(copied + job[2]))
        source, size = blobs + job[1] * i64(16), i32(job[2])
        if stack > 1:
            # The second blob has a place of its own.
            size = i32(job[3])
            ptx.copy_bulk(u32(stage + tile_bytes + blob_bytes), i64(source + size), i32(job[2] - job[3]), full)
        ptx.copy_bulk(u32(stage + tile_bytes), i64(source), size, full)

    def copy_tile(base, slot, channel, origin):  # type: ignore[no-untyped-def]
        """One for all blocks of a cluster; it may come before a block expects it: bytes are counted below zero too."""
        full, stage = u32(base + 8 * slot), u32(base + HEAD_BYTES + slot * stage_bytes)
        boxes(stage, channel, origin, full)

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


def _decoder(shape: Shape) -> tuple[Any, Any]:
    """Device functions: ``(table)``, the values of codes for one thread, and ``(codes, values)``, those of a step."""
    from numba import types

    from numbasparse.codegen import ptx

    i64, form = types.int64, shape.entries.form
    load_four, nibbles, mask = ptx.load_words("global", 4), ptx.decode_nibbles(), ptx.mask_words()
    integers = ptx.decode_integers(shape.spec.dtype)

    def load_table(table):  # type: ignore[no-untyped-def]
        return load_four(i64(table)), load_four(i64(table + 16))

    def load_nothing(table):  # type: ignore[no-untyped-def]
        return table

    def decode_nibbles(codes, values):  # type: ignore[no-untyped-def]
        return nibbles(codes, values[0], values[1])

    def decode_flagged(codes, values):  # type: ignore[no-untyped-def]
        return mask(nibbles(codes[0], values[0], values[1]), codes[1])

    def decode_integers(codes, values):  # type: ignore[no-untyped-def]
        return integers(codes)

    def keep(codes, values):  # type: ignore[no-untyped-def]
        return codes

    load, decode = {
        "wide": (load_nothing, keep),
        "integers": (load_nothing, decode_integers),
        "flagged": (load_table, decode_flagged),
        "nibbles": (load_table, decode_nibbles),
    }[form]
    return device_function(load), device_function(decode)


def _compute_every(shape: Shape) -> tuple[Any, Any, Any, Any]:
    """What `_compute` gives, where a job has every step; the last two are under way when it ends, if stages are left
    late and there is no rest.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    geometry, run, rest, late = shape.geometry, shape.geometry.run(), shape.rest, shape.late
    own_bytes, metadata_at, rest_at = geometry.group_bytes, HEADER_BYTES + run.metadata, HEADER_BYTES + run.nbytes
    first, others, settle = run.begin(), run.go_on(), ptx.wgmma_settle(geometry.sums)
    leftover, fetch = _leftover(shape)
    load_four = ptx.load_words("shared", 4)

    def places_of(stage, blob, group, within, warp, lane):  # type: ignore[no-untyped-def]
        """A thread's values and its metadata, and the descriptor of the pixels of its warpgroup."""
        operand = (stage + group * own_bytes) & WINDOW
        metadata = u32(blob + metadata_at + warp * 128 + lane * 4)
        return u32(blob + HEADER_BYTES + within * 16), metadata, u32(operand >> 4)

    places_of = device_function(places_of)

    def begin(sums, held, stage, blob, group, within, warp, lane):  # type: ignore[no-untyped-def]
        values, metadata, low = places_of(stage, blob, group, within, warp, lane)
        return first(sums, held, values, metadata, low)

    def compute(sums, carried, stage, blob, values, group, within, warp, lane):  # type: ignore[no-untyped-def]
        own, metadata, low = places_of(stage, blob, group, within, warp, lane)
        if not rest:
            sums, held = others(sums, carried, own, metadata, low)
            return (sums, held) if late else (settle(sums), held)
        header = load_four(u32(blob))
        fetched = fetch(blob + rest_at, within, warp, lane)
        sums, held = others(sums, carried, own, metadata, low)
        # Where no warp has a chunk, the steps under way go on.
        if header[2] != 0:
            sums = settle(sums)
            chunks = i32(header[2] >> u32(8 * warp) & u32(255))
            start = i64(stage + group * own_bytes)
            sums = leftover(sums, chunks, start, fetched, i64(blob + rest_at), within, warp, lane)
        return (sums, held) if late else (settle(sums), held)

    return run.nothing(), device_function(begin), device_function(compute), run.keep()


def _compute(shape: Shape, decode: Any) -> tuple[Any, Any, Any, Any]:
    """Device functions: ``() -> held``; ``(sums, held, stage, blob, group, within, warp, lane) -> (sums, carried)``
    begins a job; ``(sums, carried, stage, blob, values, group, within, warp, lane) -> (sums, held)`` adds what the tile
    and the weight of its stage give to the sums of a warpgroup, see `_decoder`; ``(held, any address)`` comes behind
    the wait for all steps.  ``held`` is what steps under way read: `codegen.ptx.StepRun`.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    geometry, entries = shape.geometry, shape.entries
    own_bytes, unit_bytes, lane_bytes = geometry.group_bytes, entries.unit_bytes, 4 * entries.lane_words
    metadata_at, word_at = entries.metadata, entries.word
    multiply, (leftover, fetch) = geometry.multiply(), _leftover(shape)
    wait_two, settle = ptx.wgmma_wait(2), ptx.wgmma_settle(geometry.sums)
    load_own, load_one = ptx.load_words("shared", entries.lane_words), ptx.load_words("shared", 1)
    load_four = ptx.load_words("shared", 4)

    def load(unit, own, metadata):  # type: ignore[no-untyped-def]
        """The weight of a step for one thread, and its word."""
        return load_own(u32(unit + own)), load_one(u32(unit + metadata)), i32(load_one(u32(unit + word_at)))

    load = device_function(load)

    def step(sums, weight, values, operand, following, own, metadata):  # type: ignore[no-untyped-def]
        """Order a step, and read the weight of one that follows."""
        sums = multiply(sums, decode(weight[0], values), weight[1], weight[2], operand)
        loaded = load(following, own, metadata)
        wait_two()
        return sums, loaded

    step = device_function(step)

    def nothing_held():  # type: ignore[no-untyped-def]
        return i32(0)

    def keep(held, low):  # type: ignore[no-untyped-def]
        pass

    def begin(sums, held, stage, blob, group, within, warp, lane):  # type: ignore[no-untyped-def]
        return sums, i32(0)

    def compute(sums, carried, stage, blob, values, group, within, warp, lane):  # type: ignore[no-untyped-def]
        lane_at, metadata = within * lane_bytes, metadata_at + ((warp * 8 + (lane >> 2)) * 2 + (lane & 1)) * 4
        own, unit = stage + group * own_bytes, blob + HEADER_BYTES
        operand = own & WINDOW
        header = load_four(u32(blob))
        steps, chunks = header[0], header[2] >> u32(8 * warp) & u32(255)
        remaining = i32(steps)
        rest = unit + i32(steps) * unit_bytes
        fetched = fetch(rest, within, warp, lane)
        w0 = load(unit, lane_at, metadata)
        w1 = load(unit + unit_bytes, lane_at, metadata)
        # Nothing but wgmma may write sums in this loop, or ptxas waits for each before the next (C7515).  A step's
        # weight is read two steps ahead, since reads queue behind the tensor cores' own of shared memory, and two steps
        # are under way when the next is ordered: five sets of registers.
        while remaining > 0:
            sums, w2 = step(sums, w0, values, operand, unit + 2 * unit_bytes, lane_at, metadata)
            if remaining == 1:
                break
            sums, w3 = step(sums, w1, values, operand, unit + 3 * unit_bytes, lane_at, metadata)
            if remaining == 2:
                break
            sums, w4 = step(sums, w2, values, operand, unit + 4 * unit_bytes, lane_at, metadata)
            if remaining == 3:
                break
            sums, w0 = step(sums, w3, values, operand, unit + 5 * unit_bytes, lane_at, metadata)
            if remaining == 4:
                break
            sums, w1 = step(sums, w4, values, operand, unit + 6 * unit_bytes, lane_at, metadata)
            unit += i64(5 * unit_bytes)
            remaining -= i32(5)
        sums = settle(sums)
        return leftover(sums, i32(chunks), own, fetched, rest, within, warp, lane), i32(0)

    return device_function(nothing_held), device_function(begin), device_function(compute), device_function(keep)


def _leftover(shape: Shape) -> tuple[Any, Any]:
    """Device functions: chunks of the rest for the rows of a warpgroup, whose first input row is at ``own``; and what
    reads a thread's share of a chunk, which is done one chunk ahead.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i64, u32 = types.int64, types.uint32
    mma, lane_start = shape.geometry.rest_mma(), shape.geometry.lane_start()
    load_two, load_one = ptx.load_words("shared", 2), ptx.load_words("shared", 1)

    def fetch(chunk, within, warp, lane):  # type: ignore[no-untyped-def]
        offset = load_one(u32(chunk + OFFSETS + (warp * 8 + (lane & 7)) * 4))
        return load_two(u32(chunk + within * 8)), offset

    fetch = device_function(fetch)

    def leftover(sums, count, own, fetched, chunk, within, warp, lane):  # type: ignore[no-untyped-def]
        start = own + lane_start(lane)
        for _ in range(count):
            chunk += i64(CHUNK_BYTES)
            following = fetch(chunk, within, warp, lane)
            sums = mma(sums, fetched[0], u32(start + fetched[1]))
            fetched = following
        return sums

    return device_function(leftover), fetch


@functools.cache
def compile_shape(shape: Shape, capability: tuple[int, int]) -> tuple[cuda.Ptx, cuda.Ptx | None]:
    """PTX of the kernel, and of the second one of a split."""
    cuda.numba_cuda()  # prepares NumPy for it, before codegen.ptx imports it
    main = cuda.compile_ptx(
        _code(shape),
        9,
        repr(shape),
        capability=capability,
        threads=shape.threads,
        max_registers=_REGISTERS,
        fastmath=False,
    )
    if shape.split == 1:
        return main, None
    return main, cuda_reduce.reduce_ptx(
        shape.spec,
        shape.split,
        shape.geometry.layout,
        shape.entries.scaled,
        shape.residual,
        shape.activation,
        capability,
    )


# ---- the kernel ---------------------------------------------------------------------------------------------


class _Runner(PackedRunner):
    def __init__(self, spec: ConvSpec, packed: Packed, scale: np.ndarray, make: Callable[..., Shape]) -> None:
        shape = make()
        layout, split = shape.geometry.layout, shape.split
        super().__init__(
            spec, packed.arrays, layout, split, make, compile_shape, scale if shape.entries.scaled else None
        )

    def _size(self, shape: Shape) -> Size:
        return shape.grid(self._facts), shape.threads, shape.shared_bytes

    def _start(self, main: cuda.Function, shape: Shape, size: Size, x: int, finish: Finish, stream: int) -> None:
        tensor_map = self._map(x, shape.geometry.tensor_map)
        arguments = (*finish, *self._pointers)
        main.launch(*size, stream, arguments, cluster=shape.cluster, tensor_map=tensor_map)


class WgmmaKernel(EstimatedKernel):
    """What the kernels share; each has a `Geometry`, a space and an estimate of its own."""

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        capability = cuda.current().capability
        if capability != (9, 0):
            return f"its instructions exist on compute capability 9.0 only, this GPU is {capability[0]}.{capability[1]}"
        return self.reason_spec(spec) or reason_values(spec, weight)

    @staticmethod
    def entries(weight: SparseWeight) -> tuple[str, ...]:
        """How a weight may be stored."""
        return ("wide",) if reason_coded(weight) else ("wide", "coded")

    @abstractmethod
    def reason_spec(self, spec: ConvSpec) -> str | None:
        """Reason why no config can run it."""

    @abstractmethod
    def reason_config(self, spec: ConvSpec, config: Config) -> str | None:
        """Reason why a config is none, or why the instructions cannot have its operands."""

    @abstractmethod
    def geometry(self, spec: ConvSpec, config: Config) -> Geometry:
        """Of a config to which `reason_config` has no objection."""

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = self.reason_config(spec, config)
        if reason is None and config["entries"] == "coded":
            reason = reason_coded(weight)
        if reason is not None:
            return reason
        make = functools.partial(self.shape, spec, config, facts_of(weight, config))
        return _reason_resources(self.geometry(spec, config), make, int(config["stages"]))

    @abstractmethod
    def shape(
        self, spec: ConvSpec, config: Config, facts: Facts, activation: str = "none", residual: bool = False
    ) -> Shape:
        """The constants of the code, of a config whose fields have been checked."""

    @abstractmethod
    def estimate(self, spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device) -> float:
        """Clocks that a config may take."""

    def pack(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> Packed:
        """The weight as a config's kernel reads it."""
        return pack(weight, self.shape(spec, config, facts_of(weight, config)))

    def estimator(self, spec: ConvSpec, weight: SparseWeight) -> Callable[[Config], float]:
        device = cuda.current()
        return lambda config: self.estimate(spec, weight, config, device)

    def ptx(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
        residual: bool = False,
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        shape = self.shape(spec, config, facts_of(weight, config), activation, residual)
        return tuple(p for p in compile_shape(shape, cuda.current().capability) if p is not None)

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        self.require(spec, weight, config)
        make = functools.partial(self.shape, spec, config, facts_of(weight, config), activation)
        return self.runner(spec, self.pack(spec, weight, config), scale_of(weight), make)

    def runner(self, spec: ConvSpec, packed: Packed, scale: np.ndarray, make: Callable[..., Shape]) -> CudaRunner:
        """Of a packed weight, factors of its output channels, and what makes the constants of the code."""
        return _Runner(spec, packed, scale, make)


def _reason_resources(geometry: Geometry, make: Callable[[], Shape], stages: int) -> str | None:
    """Reason why a block does not fit a multiprocessor."""
    spec, device, tiles = geometry.spec, cuda.current(), stages * geometry.tile_bytes
    if tiles > device.shared_per_block:  # before its steps are counted, which may take long where tiles are large
        return f"{tiles} bytes of shared memory exceed a block's {device.shared_per_block}"
    shape = make()
    if shape.stages % shape.turns:
        # A warpgroup tells a stage's copies apart by their parity, so it must see all of them within an output tile.
        return f"{shape.turns} warpgroups that take turns need as many stages, or twice as many, got {shape.stages}"
    if shape.groups > 2:
        return f"at most 2 warpgroups have registers enough, got {shape.groups}"
    if shape.shared_bytes > device.shared_per_block:
        return f"{shape.shared_bytes} bytes of shared memory exceed a block's {device.shared_per_block}"
    tiles = -(-spec.c_per_group // geometry.channels)
    if shape.split > tiles:
        return f"{shape.split} splits exceed the {tiles} tiles of {geometry.channels} channels"
    blocks = shape.blocks // spec.groups
    if blocks % shape.cluster:
        return f"a cluster of {shape.cluster} does not divide the {blocks} blocks of output channels of a group"
    if shape.works >= 1 << 30:
        return "there are too many tiles of outputs"
    return None


_SHARED_BYTES_PER_CLOCK = 128.0
_BULK_BYTES_PER_CLOCK, _L2_BYTES_PER_CLOCK = 60.0, 21.9
"""Of the copy engine, for what is in one piece; and of all that a multiprocessor copies, while the others do too."""
_START_CLOCKS, _STEP_CLOCKS, _COLUMN_CLOCKS, _TURN_CLOCKS = 4200.0, 72.0, 2.27, 495.0
"""Of a warpgroup by itself: everything before the first job, a step at least, a column of a chunk, and handing sums
over."""
_LISTED_CLOCKS, _EVERY_CLOCKS = 780.0, 464.0
"""A job beside steps and rest; where stages are left late, jobs follow one another at once."""
_TOGETHER = 2.66
"""What takes time together takes nearly as long as the slowest: the exponent of a norm."""


def clocks(
    shape: Shape, steps: float, chunks: float, operand: float, copy: float, stores: float, device: cuda.Device
) -> float:
    """Clocks that a kernel may take.

    Warpgroups by themselves, shared memory (or the tensor cores), the copy engine and the second cache all have their
    part. The constants are a fit to 478 measured times of `cuda_wgmma_nhwc`, which they meet to 8 % (standard
    deviation): those of tensor_nhwc.json, tensor_nhwc_*_listed.json, tensor_nhwc_turns.json, tensor_every_step.json and
    tensor_two_of_four.json in benchmarks/results.

    Parameters
    ----------
    steps, chunks
        Of a job.
    operand
        Bytes of shared memory that a step (or a chunk) reads, of all warpgroups.
    copy, stores
        Clocks that the copy engine takes for a job, and that an output tile takes to be stored.
    """
    spec, g = shape.spec, shape.geometry
    unit_bytes = shape.stack * shape.steps_bytes(1024) / 1024
    blob = steps * unit_bytes + shape.stack * chunks * CHUNK_BYTES
    shared = ((steps + chunks) * operand + g.tile_bytes + (1 + g.groups) * blob) / _SHARED_BYTES_PER_CLOCK
    step = max(_STEP_CLOCKS, (operand + (1 + g.groups) * unit_bytes) / _SHARED_BYTES_PER_CLOCK)
    between = 0.0 if shape.late and not shape.rest else _EVERY_CLOCKS if shape.every else _LISTED_CLOCKS
    alone = steps * step + chunks * _COLUMN_CLOCKS * 2 * g.sums + between
    copy += blob / _BULK_BYTES_PER_CLOCK
    jobs = ceil(ceil(spec.c_per_group / g.channels) / shape.split)
    each, waves = shape.resident(device), ceil(shape.works / shape.grid(device)[0])
    if waves == 1:
        each = min(each, ceil(shape.works / device.multiprocessors))
    # Blocks share all but their warpgroups.  A stage is filled while the others are computed.
    together = (shared, copy / (shape.stages - 1), (blob + g.copied_bytes) / _L2_BYTES_PER_CLOCK)
    parts = (alone / shape.turns, *(each * part for part in together))
    job = sum(part**_TOGETHER for part in parts) ** (1 / _TOGETHER)
    exposed = stores if each == 1 else 0.0
    if shape.turns > 1:
        exposed += _TURN_CLOCKS + 3 * 512 * g.sums / _SHARED_BYTES_PER_CLOCK
    return _START_CLOCKS + copy + waves * (jobs * job + exposed) + split_clocks(spec, shape.split, device)
