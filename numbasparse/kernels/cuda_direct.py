"""Direct sparse convolution on CUDA cores: input tiles in shared memory, output tiles in registers.

A block computes a tile of output pixels, of some images, for some output channels.  It walks over the input
channels that have any non-zero for it, a few at a time: the input tile of those channels (with its halo) and the
non-zeros go to shared memory, in a ring of stages, while the stages before are worked on.  Each warp holds the
sums of some output channels for the whole tile in registers.  A non-zero is an offset into the tile and a value,
the same for all lanes: every lane loads the vectors at ``offset + displacement`` and adds them to its sums, so
that a load of 4 bytes of shared memory feeds one multiply-add, or ``share`` of them.

Bound: shared memory gives 128 bytes per clock and multiprocessor, that is 32 float32 multiply-adds (times
``share``) of the 128 that the arithmetic could do.

Search space
------------
``batch``
    Images of a block.  1: lanes are pixels, of activations in NCHW.  More: lanes are images, and then pixels, of
    activations in CHWN, in which the images of a pixel are neighbours.
``vector``
    Values of one load.
``tile``
    Output pixels of a block, as text: rows x columns.
``warps``
    Warps with different output channels.
``parts``
    Warps that share output channels, each with its own rows of the tile.
``rows``
    Output channels of a warp.
``share``
    Output channels whose non-zeros are merged into one list, with zeros where one has none, so that a loaded value
    serves all of them: for low sparsity and for masks pruned in vectors.
``channels``, ``stages``
    Input channels of a stage, and stages of the ring.
``copy``
    ``"box"``: the copy engine brings the tile of a channel, its zeros too, at one thread's order (capability 9.0).
    ``"async"``: every thread copies pieces that it does not wait for (8.0).  ``"plain"``: through registers.
``split``
    Blocks that share the input channels of one tile; a second kernel adds up their sums.
``entries``
    ``"wide"``: float32 values.  ``"coded"``, for quantized weights: the place of the value in a table in shared
    memory beside the offset, together 4 bytes; a channel's scale comes at the end.

The idea is that of Escoin (Chen, arXiv 1802.10280) and of Pietron and Zurek (arXiv 2112.15445).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from numbasparse.activations import Activation
from numbasparse.kernels import cuda_reduce
from numbasparse.kernels.base import Config, ConfigError, CudaRunner, Space, check_fields
from numbasparse.kernels.cpu_rows import coordinates
from numbasparse.kernels.cuda_packed import Finish, PackedRunner, Size
from numbasparse.kernels.cuda_tiles import EstimatedKernel, OutputTiles, device_function, parse_tile, register_cap
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LAST, _EMPTY = 1 << 31, 1 << 30
_CODED_OFFSETS = 1 << 18
_CODED_PLACES = 1 << 12
_BARRIER_BYTES = 128
_SPARE_REGISTERS = 26
"""Registers beside sums and loaded values: addresses, the entry in work and the next, loop counters."""


@dataclass(frozen=True)
class Geometry:
    """How a block's tile lies in shared memory, and who computes what.  Offsets in bytes.

    Attributes
    ----------
    size
        Bytes of a value.
    pixels_y, pixels_x
        Lanes of a warp along the rows and columns of the tile.
    lanes_n
        Lanes along the batch.
    patch_h, patch_w
        Pixels of an input tile; a row may be wider than needed, as the copy engine asks.
    lead
        Columns of an input tile before the first that is needed.
    tile_h, tile_w, part_h
        Output pixels of a block, and rows of a part.
    displacements
        Input offset of each vector of a lane, from its first.
    out
        (rows, columns) of each vector of a lane, from its first.
    """

    size: int
    pixels_y: int
    pixels_x: int
    lanes_n: int
    patch_h: int
    patch_w: int
    lead: int
    tile_h: int
    tile_w: int
    part_h: int
    pixel_bytes: int
    displacements: tuple[int, ...]
    out: tuple[tuple[int, int], ...]

    @property
    def channel_bytes(self) -> int:
        """Bytes of one channel of the input tile, a multiple of 128 for the copy engine."""
        return -(-self.patch_h * self.patch_w * self.pixel_bytes // 128) * 128


def geometry_of(spec: ConvSpec, config: Config) -> Geometry | str:
    """The geometry, or the reason why there is none."""
    box = config["copy"] == "box"
    return _geometry(spec, int(config["batch"]), int(config["vector"]), int(config["parts"]), config["tile"], box)


@functools.lru_cache(4096)
def _geometry(spec: ConvSpec, batch: int, vector: int, parts: int, tile: int | str, box: bool) -> Geometry | str:
    tile_h, tile_w = parse_tile(tile)
    size = _BYTES[spec.dtype]
    if batch % vector or 32 % (batch // vector):
        return f"batch / vector must divide the 32 lanes, got {batch} / {vector}"
    lanes_n = batch // vector
    pixels = 32 // lanes_n
    pixels_x = gcd(pixels, tile_w)
    pixels_y = pixels // pixels_x
    if tile_h % (pixels_y * parts):
        return f"{parts} parts of {pixels_y} x {pixels_x} lanes do not divide a tile of {tile_h} x {tile_w}"
    (sh, sw), (dh, dw) = spec.stride, spec.dilation
    patch_w = (tile_w - 1) * sw + (spec.s - 1) * dw + 1
    pixel = batch * size
    lead = 0
    if box and pixel % 16:
        # The copy engine stops the kernel (illegal instruction) where a row of a box starts between 16 bytes.
        align = 16 // pixel
        if tile_w * sw % align:
            return f"the copy engine needs tiles that start at multiples of {align} columns, got {tile_w} times {sw}"
        lead = -spec.padding[1][0] % align
        patch_w = -(-(lead + patch_w) // align) * align
    part_h = tile_h // parts
    out = tuple((y, x) for y in range(0, part_h, pixels_y) for x in range(0, tile_w, pixels_x))
    return Geometry(
        size=size,
        pixels_y=pixels_y,
        pixels_x=pixels_x,
        lanes_n=lanes_n,
        patch_h=(tile_h - 1) * sh + (spec.r - 1) * dh + 1,
        patch_w=patch_w,
        lead=lead,
        tile_h=tile_h,
        tile_w=tile_w,
        part_h=part_h,
        pixel_bytes=pixel,
        displacements=tuple((y * sh * patch_w + x * sw) * pixel for y, x in out),
        out=out,
    )


# ---- packing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A weight cut for the blocks of a config.

    A *chunk* is what one block reads in one step: for each warp the offset of its stream within the chunk (int32,
    padded to 16 bytes), then the streams.

    Attributes
    ----------
    streams : uint8
        All chunks, each a multiple of 16 bytes.
    steps_table : int32, (blocks, steps, 4 + channels)
        Of each step: offset of its chunk in units of 16 bytes, bytes of the chunk, number of its input channels, 0,
        and the channels, negative where there is none.
    rows : int32, (blocks, warps * rows)
        Output channel of each row of sums, negative where there is none.
    steps
        Steps of the block that has the most.
    chunk_bytes
        Bytes of the largest chunk.
    """

    streams: np.ndarray
    steps_table: np.ndarray
    rows: np.ndarray
    steps: int
    chunk_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (self.streams, self.steps_table, self.rows))


def pack(spec: ConvSpec, weight: SparseWeight, config: Config, geometry: Geometry) -> Packed:
    """Cut a weight into blocks of output channels and steps of input channels, and write their streams."""
    warps, rows, share, per_step = (int(config[f]) for f in ("warps", "rows", "share", "channels"))
    order = _row_order(weight, warps, rows, share)
    blocks = order.shape[0]
    k, c, r, s = coordinates(weight)
    place = np.empty(weight.k, np.int64)
    place[order[order >= 0]] = np.flatnonzero(order.ravel() >= 0)
    block, row = np.divmod(place[k], warps * rows)

    used, index = np.unique(block * spec.c + c, return_inverse=True)
    used_block, used_channel = np.divmod(used, spec.c)
    first = np.searchsorted(used_block, np.arange(blocks))
    slot = np.arange(len(used)) - first[used_block]
    steps = max(1, -(-int(slot.max() + 1) // per_step)) if len(used) else 1
    channels = np.full((blocks, steps, per_step), -1, np.int32)
    channels[used_block, slot // per_step, slot % per_step] = used_channel

    step, within = np.divmod(slot[index], per_step)
    (dh, dw) = spec.dilation
    offset = within * geometry.channel_bytes + (r * dh * geometry.patch_w + s * dw) * geometry.pixel_bytes
    lists = rows // share
    which = ((block * steps + step) * warps + row // rows) * lists + row % rows // share
    count = blocks * steps * warps * lists
    entries, values, starts = _merge(which, offset, row % share, weight.data, count, share)
    if config["entries"] == "coded":
        assert weight.levels is not None
        assert weight.codes is not None
        own = weight.levels.places(weight.codes, k).astype(np.float32)
        _, places, _ = _merge(which, offset, row % share, own, count, share)
        words = entries.astype(np.uint32)[:, None] | places.astype(np.uint32) << np.uint32(18)
    else:
        words = np.concatenate([entries.astype(np.uint32)[:, None], values.view(np.uint32)], axis=1)
    streams, chunks = _chunks(words, starts, blocks * steps, warps, lists)
    live = (channels >= 0).sum(axis=2, keepdims=True).reshape(-1, 1)
    table = np.concatenate([chunks, live, 0 * live, channels.reshape(blocks * steps, per_step)], axis=1)
    return Packed(
        streams=streams,
        steps_table=table.astype(np.int32).reshape(blocks, steps, -1),
        rows=order.astype(np.int32),
        steps=steps,
        chunk_bytes=int(chunks[:, 1].max()),
    )


def _row_order(weight: SparseWeight, warps: int, rows: int, share: int) -> np.ndarray:
    """Output channels of each block, (blocks, warps * rows), -1 where there is none.

    Neighbours stay in one block, since a block reads the union of their input channels.  Within a block, groups
    of ``share`` rows are dealt to the warps by length, the longest first and back and forth, so that no warp
    waits long for another.
    """
    per_block = warps * rows
    blocks = -(-weight.k // per_block)
    order = np.full((blocks, per_block), -1)
    order.ravel()[: weight.k] = np.arange(weight.k)
    length = np.zeros(blocks * per_block, np.int64)
    length[: weight.k] = np.diff(weight.indptr)
    units = order.reshape(blocks, per_block // share, share)
    longest = np.argsort(-length.reshape(blocks, -1, share).sum(axis=2), axis=1, kind="stable")
    dealt = np.take_along_axis(units, longest[:, :, None], axis=1).reshape(blocks, rows // share, warps, share)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
    return dealt.transpose(0, 2, 1, 3).reshape(blocks, per_block)


def _merge(
    which: np.ndarray, offset: np.ndarray, place: np.ndarray, data: np.ndarray, count: int, share: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of ``count`` lists: their offsets with marks, values (entries, share), and where each list starts.

    Entries of equal list and offset are one, with a value for each of ``share`` rows.
    """
    span = int(offset.max()) + 1 if len(offset) else 1
    keys, inverse = np.unique(which * span + offset, return_inverse=True)
    list_of = keys // span
    empty = np.setdiff1d(np.arange(count), list_of, assume_unique=False)
    all_lists = np.concatenate([list_of, empty])
    entries = np.concatenate([keys % span, np.full(len(empty), _EMPTY)])
    values = np.zeros((len(all_lists), share), np.float32)
    values[inverse, place] = data
    order = np.argsort(all_lists, kind="stable")
    entries, values = entries[order], values[order]
    starts = np.searchsorted(all_lists[order], np.arange(count + 1))
    entries[starts[1:] - 1] |= _LAST
    return entries, values, starts


def _chunks(words: np.ndarray, starts: np.ndarray, count: int, warps: int, lists: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of all chunks, and (offset / 16, bytes) of each."""
    words = np.ascontiguousarray(words, np.uint32).reshape(len(words), -1)
    entry = words.shape[1]
    head = -(-warps // 4) * 4
    first = starts[:-1].reshape(count, warps * lists)[:, ::lists]
    begin, end = starts[: -1 : warps * lists], starts[warps * lists :: warps * lists]
    size = head + (end - begin) * entry
    size = -(-size // 4) * 4
    at = np.concatenate([[0], np.cumsum(size)])
    out = np.zeros(at[-1], np.uint32)
    for number in range(count):
        base = at[number]
        out[base : base + warps] = 4 * (head + (first[number] - begin[number]) * entry)
        body = words[begin[number] : end[number]].ravel()
        out[base + head : base + head + len(body)] = body
    return out.view(np.uint8), np.stack([at[:-1] // 4, size * 4], axis=1).astype(np.int32)


# ---- code ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape(OutputTiles):
    """All constants of the kernel's code: what the compiled code depends on, and nothing else."""

    spec: ConvSpec
    geometry: Geometry
    batch: int
    vector: int
    warps: int
    parts: int
    rows: int
    share: int
    channels: int
    stages: int
    copy: str
    split: int
    table_values: int
    blocks: int
    stream_bytes: int
    activation: str
    scaled: bool
    residual: bool

    @property
    def coded(self) -> bool:
        return self.table_values > 0

    @property
    def stage_bytes(self) -> int:
        return self.channels * self.geometry.channel_bytes + self.stream_bytes

    @property
    def table_bytes(self) -> int:
        """Table of values, and the table of steps or, for copies by threads, the place of every piece of a channel."""
        last = self.most_steps * self.step_words if self.copy == "box" else self.pieces
        return -(-4 * (self.table_values + last) // 128) * 128

    @property
    def step_words(self) -> int:
        """Words of a step in the table of steps."""
        return 4 + self.channels

    @property
    def most_steps(self) -> int:
        """Steps of a block at most."""
        spec, rows = self.spec, self.warps * self.rows
        groups = min(spec.groups, 1 if spec.groups == 1 else (rows - 1) // spec.k_per_group + 2)
        steps = -(-spec.c_per_group * groups // self.channels)
        return -(-steps // self.split)

    @property
    def shared_bytes(self) -> int:
        return 128 + _BARRIER_BYTES + self.table_bytes + self.stages * self.stage_bytes

    @property
    def piece_bytes(self) -> int:
        """Bytes that a thread copies at once: as much as is aligned in memory and in a pixel."""
        if self.batch == 1:
            return self.geometry.size
        return gcd(gcd(16, self.batch * self.geometry.size), self.spec.n * self.geometry.size)

    @property
    def pieces(self) -> int:
        g = self.geometry
        return g.patch_h * g.patch_w * g.pixel_bytes // self.piece_bytes

    @property
    def consumers(self) -> int:
        return self.warps * self.parts

    @property
    def threads(self) -> int:
        return 32 * self.consumers

    @property
    def grid(self) -> tuple[int, int, int]:
        across, down = self.tiles
        # Blocks of the same pixels are neighbours in time: the second cache serves their tiles.
        return self.blocks * across * down * -(-self.spec.n // self.batch), self.split, 1

    @property
    def sums(self) -> int:
        return self.rows * len(self.geometry.out) * self.vector


def _ring_code(shape: _Shape) -> Callable[..., None]:
    """The kernel for ``copy="box"``: the warp that is the last to leave a stage orders the next copies into it."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    locate, finish = _locate(shape), _finish(shape)
    shared_base = ptx.shared_base(128)
    gather = _gather(shape)
    zeros = ptx.zeros(shape.sums)
    stages, consumers, warps, threads = shape.stages, shape.consumers, shape.warps, shape.threads
    stage_bytes, channel_bytes = shape.stage_bytes, shape.geometry.channel_bytes
    box_bytes = shape.geometry.patch_h * shape.geometry.patch_w * shape.geometry.pixel_bytes
    per_step, words, own_place = shape.channels, shape.step_words, _own_place(shape)
    by_batch, table_values, lead = shape.batch > 1, shape.table_values, shape.geometry.lead
    steps_at = _BARRIER_BYTES + 4 * table_values
    first_stage = _BARRIER_BYTES + shape.table_bytes

    def order(streams, base, number, slot, lane, image, top, left):  # type: ignore[no-untyped-def]
        """Order the copies of a step into a stage: each lane one channel, and the first the chunk."""
        step = base + steps_at + 4 * words * number
        live = ptx.load_shared_i32(u32(step + 8))
        full = u32(base + 8 * slot)
        stage = base + first_stage + slot * stage_bytes
        if lane == 0:
            size = ptx.load_shared_i32(u32(step + 4))
            source = streams + i64(ptx.load_shared_i32(u32(step))) * 16
            ptx.mbarrier_expect(full, i32(live * box_bytes + size))
            ptx.copy_bulk(u32(stage + per_step * channel_bytes), i64(source), size, full)
        # No byte arrives before it is expected.
        ptx.warp_barrier()
        for j in range(lane, live, 32):
            c = ptx.load_shared_i32(u32(step + 16 + 4 * j))
            origin = ptx.tensor_map_address()
            to = u32(stage + j * channel_bytes)
            if by_batch:
                ptx.copy_box(to, origin, i32(image), i32(left), i32(top), c, full)
            else:
                ptx.copy_box(to, origin, i32(left), i32(top), c, i32(image), full)

    order = device_function(order)

    def cuda_direct(y, residual, bias, scale, table, codebook, streams, step_table, steps):  # type: ignore[no-untyped-def]
        base = i64(shared_base())
        thread = ptx.thread_index()
        warp = thread >> 5
        lane = thread & 31
        block, image, top, left, first, count = locate(steps)
        # For each stage 8 bytes of barrier, and behind them 4 bytes that count the warps that have left it.
        if thread < stages:
            ptx.mbarrier_init(u32(base + 8 * thread), i32(1))
            ptx.store_shared_i32(u32(base + 8 * stages + 4 * thread), i32(0))
            ptx.mbarrier_init_fence()
        for v in range(thread, table_values, threads):
            ptx.store_shared_i32(u32(base + _BARRIER_BYTES + 4 * v), ptx.load_global_i32(i64(codebook + 4 * v)))
        own_steps = step_table + (block * steps + first) * i64(4 * words)
        for v in range(thread, count * words, threads):
            ptx.store_shared_i32(u32(base + steps_at + 4 * v), ptx.load_global_i32(i64(own_steps + 4 * v)))
        ptx.barrier()
        if warp == 0:
            for i in range(min(stages, count)):
                order(streams, base, i, i, lane, image, top, left - lead)
        sums = zeros()
        own = own_place(warp // warps, lane)
        for i in range(count):
            slot, turn = i % stages, i // stages
            ptx.mbarrier_wait(u32(base + 8 * slot), i32(turn & 1))
            stage = base + first_stage + slot * stage_bytes
            chunk = stage + per_step * channel_bytes
            stream = chunk + ptx.load_shared_i32(u32(chunk + 4 * (warp % warps)))
            sums = gather(sums, u32(stream), u32(base + _BARRIER_BYTES), u32(stage + own))
            if i + stages < count:
                # Every lane has read the stage when the first one counts.
                ptx.warp_barrier()
                last = 0
                if lane == 0:
                    before = ptx.count_shared(u32(base + 8 * stages + 4 * slot), i32(1))
                    last = 1 if before == consumers * (turn + 1) - 1 else 0
                if ptx.warp_any(i32(last)):
                    order(streams, base, i + stages, slot, lane, image, top, left - lead)
        finish(sums, y, residual, bias, scale, table, block, image, top, left, warp, lane)

    return cuda_direct


def _threads_code(shape: _Shape) -> Callable[..., None]:
    """The kernel whose threads copy the tiles themselves: ``copy="async"`` and ``"plain"``."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    locate, finish = _locate(shape), _finish(shape)
    shared_base = ptx.shared_base(128)
    gather = _gather(shape)
    zeros = ptx.zeros(shape.sums)
    warps, stages, threads, table_values = shape.warps, shape.stages, shape.threads, shape.table_values
    stage_bytes, channel_bytes = shape.stage_bytes, shape.geometry.channel_bytes
    per_step, own_place, pieces, piece_bytes = shape.channels, _own_place(shape), shape.pieces, shape.piece_bytes
    words, pieces_at = shape.step_words, _BARRIER_BYTES + 4 * table_values
    first_stage = _BARRIER_BYTES + shape.table_bytes
    source, plane = _source(shape), _plane_bytes(shape)
    asynchronous = shape.copy == "async"
    if asynchronous:
        copy = {2: ptx.copy_plain(2), 4: ptx.copy_async_4, 8: ptx.copy_async_8, 16: ptx.copy_async_16}[piece_bytes]
        copy_chunk = ptx.copy_async_16
    else:
        copy, copy_chunk = ptx.copy_plain(piece_bytes), ptx.copy_plain(16)
    wait = ptx.copy_wait(stages - 1)

    def fill(x, streams, step_table, base, block, number, slot, steps, thread):  # type: ignore[no-untyped-def]
        """Start the copies of a step into a stage."""
        step = step_table + (block * steps + number) * i64(4 * words)
        stage = base + first_stage + slot * stage_bytes
        start = i64(ptx.load_global_i32(i64(step))) * 16
        size = ptx.load_global_i32(i64(step + 4))
        for v in range(thread, size >> 4, threads):
            copy_chunk(u32(stage + per_step * channel_bytes + 16 * v), i64(streams + start + 16 * v), i32(16))
        for v in range(thread, pieces, threads):
            # -1: the piece lies outside of the image, and is filled with zeros.
            place = ptx.load_shared_i32(u32(base + pieces_at + 4 * v))
            for j in range(per_step):
                c = ptx.load_global_i32(i64(step + 16 + 4 * j))
                if c >= 0:
                    inside = i32(piece_bytes) if place >= 0 else i32(0)
                    where = x + i64(c) * plane + (i64(place) if place >= 0 else i64(0))
                    copy(u32(stage + j * channel_bytes + piece_bytes * v), i64(where), inside)

    fill = device_function(fill)

    def cuda_direct(x, y, residual, bias, scale, table, codebook, streams, step_table, steps):  # type: ignore[no-untyped-def]
        base = i64(shared_base())
        thread = ptx.thread_index()
        warp = thread >> 5
        lane = thread & 31
        block, image, top, left, first, count = locate(steps)
        for v in range(thread, pieces, threads):
            ptx.store_shared_i32(u32(base + pieces_at + 4 * v), i32(source(v, image, top, left)))
        for i in range(thread, table_values, threads):
            ptx.store_shared_i32(u32(base + _BARRIER_BYTES + 4 * i), ptx.load_global_i32(i64(codebook + 4 * i)))
        ptx.barrier()
        for i in range(stages - 1):
            if i < count:
                fill(x, streams, step_table, base, block, first + i, i, steps, thread)
            if asynchronous:
                ptx.copy_commit()
        sums = zeros()
        own = own_place(warp // warps, lane)
        for i in range(count):
            ahead = i + stages - 1
            if ahead < count:
                fill(x, streams, step_table, base, block, first + ahead, ahead % stages, steps, thread)
            if asynchronous:
                # An empty group too: the number of groups tells which stage is there.
                ptx.copy_commit()
                wait()
            ptx.barrier()
            stage = base + first_stage + (i % stages) * stage_bytes
            chunk = stage + per_step * channel_bytes
            stream = chunk + ptx.load_shared_i32(u32(chunk + 4 * (warp % warps)))
            sums = gather(sums, u32(stream), u32(base + _BARRIER_BYTES), u32(stage + own))
            ptx.barrier()
        finish(sums, y, residual, bias, scale, table, block, image, top, left, warp, lane)

    return cuda_direct


def _gather(shape: _Shape) -> Any:
    from numbasparse.codegen import ptx

    lists = shape.rows // shape.share
    return ptx.gather_fma(lists, shape.share, shape.geometry.displacements, shape.vector, shape.spec.dtype, shape.coded)


def _locate(shape: _Shape) -> Any:
    """Device function: block of output channels, first image, first input row and column, range of steps."""
    from numbasparse.codegen import ptx

    g, spec = shape.geometry, shape.spec
    down, across = shape.tiles
    blocks, batch, split = shape.blocks, shape.batch, shape.split
    step_y, step_x = g.tile_h * spec.stride[0], g.tile_w * spec.stride[1]
    pad_y, pad_x = spec.padding[0][0], spec.padding[1][0]

    def locate(steps):  # type: ignore[no-untyped-def]
        index = ptx.block_x()
        block = index % blocks
        tile = index // blocks % (across * down)
        image = index // (blocks * across * down) * batch
        each = (steps + split - 1) // split
        first = ptx.block_y() * each
        count = max(0, min(each, steps - first))
        return block, image, tile // across * step_y - pad_y, tile % across * step_x - pad_x, first, count

    return device_function(locate)


def _own_place(shape: _Shape) -> Any:
    """Device function: offset of a lane's first vector in a channel of the input tile."""
    g, spec = shape.geometry, shape.spec
    lanes_n, pixels_x, part_h, patch_w, pixel = g.lanes_n, g.pixels_x, g.part_h, g.patch_w, g.pixel_bytes
    lead_bytes = g.lead * pixel
    vector_bytes = shape.vector * g.size
    sh, sw = spec.stride

    def own_place(part, lane):  # type: ignore[no-untyped-def]
        n, p = lane % lanes_n, lane // lanes_n
        y = part * part_h + p // pixels_x
        return (y * sh * patch_w + p % pixels_x * sw) * pixel + lead_bytes + n * vector_bytes

    return device_function(own_place)


def _plane_bytes(shape: _Shape) -> int:
    """Bytes from an input channel to the next."""
    spec = shape.spec
    return spec.h * spec.w * shape.geometry.size * (spec.n if shape.batch > 1 else 1)


def _source(shape: _Shape) -> Any:
    """Device function: where piece v of an input tile lies in its channel, in bytes, or -1 if outside."""
    g, spec = shape.geometry, shape.spec
    piece, pixel, patch_w = shape.piece_bytes, g.pixel_bytes, g.patch_w
    n, c, h, w, size, batch = spec.n, spec.c, spec.h, spec.w, g.size, shape.batch

    def source(v, image, top, left):  # type: ignore[no-untyped-def]
        at = v * piece
        row, rest = at // (patch_w * pixel), at % (patch_w * pixel)
        y, x = top + row, left + rest // pixel
        within = image * size + rest % pixel
        if y < 0 or y >= h or x < 0 or x >= w or within >= n * size:
            return -1
        if batch > 1:
            return (y * w + x) * n * size + within
        return image * c * h * w * size + (y * w + x) * size

    return device_function(source)


def _finish(shape: _Shape) -> Any:
    """Device function that stores a warp's sums, or adds nothing to them and stores them for `cuda_reduce`."""
    from numba import types

    from numbasparse.codegen import ptx

    g, spec = shape.geometry, shape.spec
    split, warps, rows, vector, batch = shape.split, shape.warps, shape.rows, shape.vector, shape.batch
    dtype = "float32" if split > 1 else spec.dtype
    size = ptx.element_bytes(dtype)
    n, k, out_h, out_w = spec.n, spec.k, spec.out_h, spec.out_w
    pixel = n * size if batch > 1 else size
    strides = (out_h * out_w * pixel, out_w * pixel, pixel)
    last = ptx.Finish(bias=True, scaled=shape.scaled, residual=shape.residual, activation=shape.activation)
    nothing = ptx.Finish(bias=False, scaled=False, residual=False, activation="none")
    store = ptx.store_rows(rows, g.out, vector, dtype, nothing if split > 1 else last, strides, (out_h, out_w))
    lanes_n, pixels_x, part_h = g.lanes_n, g.pixels_x, g.part_h
    (sh, sw), pad_y, pad_x = spec.stride, spec.padding[0][0], spec.padding[1][0]
    image_bytes, total = k * out_h * out_w * size, n * k * out_h * out_w * size
    i32, i64 = types.int32, types.int64

    def finish(sums, y, residual, bias, scale, table, block, image, top, left, warp, lane):  # type: ignore[no-untyped-def]
        inner, p = lane % lanes_n * vector, lane // lanes_n
        oy = (top + pad_y) // sh + warp // warps * part_h + p // pixels_x
        ox = (left + pad_x) // sw + p % pixels_x
        at = i64(oy) * strides[1] + i64(ox) * strides[2]
        if batch > 1:
            at += (image + inner) * i64(size)
            if image + inner >= n:
                oy = i64(out_h)
        else:
            at += image * i64(image_bytes)
        if split > 1:
            at += ptx.block_y() * i64(total)
        own = table + (block * warps + warp % warps) * i64(4 * rows)
        store(sums, y + at, residual + at, bias, scale, own, i32(oy), i32(ox))

    return device_function(finish)


@functools.cache
def _compile(shape: _Shape, capability: tuple[int, int]) -> tuple[cuda.Ptx, cuda.Ptx | None]:
    """PTX of the kernel, and of the second one of a split."""
    cuda.numba_cuda()  # prepares NumPy for it, before codegen.ptx imports it
    box = shape.copy == "box"
    code = (_ring_code if box else _threads_code)(shape)
    main = cuda.compile_ptx(
        code,
        9 if box else 10,
        repr(shape),
        capability=capability,
        threads=shape.threads,
        max_registers=register_cap(shape.threads),
        fastmath=False,
    )
    if shape.split == 1:
        return main, None
    layout: layouts.Layout = "CHWN" if shape.batch > 1 else "NCHW"
    reduce = cuda_reduce.reduce_ptx(
        shape.spec, shape.split, layout, shape.scaled, shape.residual, shape.activation, capability
    )
    return main, reduce


def _stream_bytes(chunk_bytes: int, share: int) -> int:
    """Bytes of a stage for a chunk and the entry that is read after it.

    Rounded up so that masks of similar sparsity share their code.
    """
    return -(-(chunk_bytes + 4 * (1 + share)) // 1024) * 1024


def _shape(
    spec: ConvSpec,
    weight: SparseWeight,
    config: Config,
    geometry: Geometry,
    chunk_bytes: int,
    activation: str = "none",
    residual: bool = False,
) -> _Shape:
    coded = config["entries"] == "coded"
    warps, rows, share = int(config["warps"]), int(config["rows"]), int(config["share"])
    return _Shape(
        spec=spec,
        geometry=geometry,
        batch=int(config["batch"]),
        vector=int(config["vector"]),
        warps=warps,
        parts=int(config["parts"]),
        rows=rows,
        share=share,
        channels=int(config["channels"]),
        stages=int(config["stages"]),
        copy=str(config["copy"]),
        split=int(config["split"]),
        table_values=len(_table(weight)) if coded else 0,
        blocks=-(-spec.k // (warps * rows)),
        stream_bytes=_stream_bytes(chunk_bytes, share),
        activation=activation,
        scaled=coded and weight.levels is not None and bool((weight.levels.scale != 1).any()),
        residual=residual,
    )


# ---- the kernel ---------------------------------------------------------------------------------------------


def _packed_shape(
    spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation
) -> tuple[Packed, Callable[..., _Shape]]:
    """The packed weight, and what makes the constants of its code with or without a residual."""
    geometry = geometry_of(spec, config)
    assert isinstance(geometry, Geometry)
    packed = pack(spec, weight, config, geometry)
    make = functools.partial(_shape, spec, weight, config, geometry, packed.chunk_bytes, activation)
    needed, device = make().shared_bytes, cuda.current()
    if needed > device.shared_per_block:
        raise ConfigError(
            f"kernel 'cuda_direct' cannot run config {config} for {spec.key}: it needs {needed} bytes of shared "
            f"memory, a block has {device.shared_per_block}"
        )
    return packed, make


class _Runner(PackedRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        packed, make = _packed_shape(spec, weight, config, activation)
        self._steps = packed.steps
        scale = np.ones(1) if weight.levels is None else weight.levels.scale
        super().__init__(
            spec,
            (packed.streams, packed.steps_table, packed.rows, _table(weight)),
            "CHWN" if int(config["batch"]) > 1 else "NCHW",
            int(config["split"]),
            make,
            _compile,
            np.broadcast_to(scale, spec.k),
        )

    def _size(self, shape: _Shape) -> Size:
        return shape.grid, shape.threads, shape.shared_bytes

    def _start(self, main: cuda.Function, shape: _Shape, size: Size, x: int, finish: Finish, stream: int) -> None:
        streams, steps_table, rows, table = self._pointers
        arguments = (*finish, rows, table, streams, steps_table, self._steps)
        if shape.copy == "box":
            main.launch(*size, stream, arguments, tensor_map=self._map(x, functools.partial(_tensor_map, shape)))
        else:
            main.launch(*size, stream, (x, *arguments))


def _tensor_map(shape: _Shape, address: int) -> cuda.TensorMap:
    spec, g = shape.spec, shape.geometry
    if shape.batch > 1:
        sizes: tuple[int, ...] = (spec.n, spec.w, spec.h, spec.c)
        box: tuple[int, ...] = (shape.batch, g.patch_w, g.patch_h, 1)
    else:
        sizes, box = (spec.w, spec.h, spec.c, spec.n), (g.patch_w, g.patch_h, 1, 1)
    strides = [g.size * int(np.prod(sizes[:i], dtype=np.int64)) for i in (1, 2, 3)]
    return cuda.TensorMap(address, spec.dtype, sizes, strides, box)


def _table(weight: SparseWeight) -> np.ndarray:
    """The values that a quantized weight's codes stand for, before the scale; one zero for any other weight."""
    return np.zeros(1, np.float32) if weight.levels is None else np.asarray(weight.levels.tables()[0], np.float32)


class CudaDirect(EstimatedKernel):
    """Direct sparse convolution on CUDA cores; see the module's text."""

    name = "cuda_direct"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        if spec.dtype not in _BYTES:
            return f"activations must be of {', '.join(_BYTES)}, got {spec.dtype}"
        if spec.dtype == "bfloat16" and cuda.current().capability < (8, 0):
            return "bfloat16 needs compute capability 8.0"
        if spec.n * spec.h * spec.w * _BYTES[spec.dtype] >= 2**31:
            return "a channel of the input (all images) has 2 GiB or more"
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        batches = [b for b in (32, 16, 8) if spec.n >= b][:2]
        if spec.n < 32:
            batches.append(1)
        return {
            "batch": tuple(batches),
            "vector": _VECTORS,
            "tile": _tiles(spec, batches),
            "warps": (4, 8, 16),
            "parts": (1,),
            "rows": (1, 2, 4, 8),
            "share": (1, 2, 4) if weight.density > 0.07 else (1,),
            "channels": (4, 8, 16),
            "stages": (2, 3),
            "copy": _copies(spec, batches),
            "split": (1, 2, 4, 8),
            "entries": ("wide",) if weight.levels is None else ("wide", "coded"),
        }

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = check_fields(config, _FIELDS)
        if reason is not None:
            return reason
        return _reason_shape(spec, config) or _reason_entries(weight, config) or _reason_resources(spec, weight, config)

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        # Merged lists multiply with zeros, so an infinity would reach outputs that it does not belong to: only a
        # tuner takes them.  The rest of what is left out matters little.
        space = dict(self.space(spec, weight, threads))
        space |= {"share": (1,), "stages": space["stages"][:1], "channels": space["channels"][1:]}
        found = self.ranked(spec, weight, self.valid(spec, weight, space))
        found = found or self.ranked(spec, weight, self.configs(spec, weight, threads))
        return next((config for config in found if config["share"] == 1), self.fallback)

    @property
    def fallback(self) -> Config:
        return dict(_FALLBACK)

    def estimator(self, spec: ConvSpec, weight: SparseWeight) -> Callable[[Config], float]:
        device = cuda.current()
        return lambda config: _estimate(spec, weight, config, device)

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[layouts.Layout, layouts.Layout]:
        layout: layouts.Layout = "CHWN" if int(config["batch"]) > 1 else "NCHW"
        return layout, layout

    def ptx(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        _, make = _packed_shape(spec, weight, config, activation)
        return tuple(p for p in _compile(make(), cuda.current().capability) if p is not None)

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)


_FIELDS: dict[str, Any] = {
    "batch": (1, 128),
    "vector": (1, 8),
    "tile": (),
    "warps": (1, 31),
    "parts": (1, 8),
    "rows": (1, 32),
    "share": (1, 8),
    "channels": (1, 64),
    "stages": (1, 8),
    "copy": ("box", "async", "plain"),
    "split": (1, 64),
    "entries": ("wide", "coded"),
}

_FALLBACK: Config = {
    "batch": 1,
    "vector": 1,
    "tile": "4x8",
    "warps": 4,
    "parts": 1,
    "rows": 4,
    "share": 1,
    "channels": 1,
    "stages": 2,
    "copy": "plain",
    "split": 1,
    "entries": "wide",
}
"""Small enough for any problem and GPU."""


def _reason_shape(spec: ConvSpec, config: Config) -> str | None:
    """Reason why lanes, tile and copies do not fit the problem."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, vector, copy = int(config["batch"]), int(config["vector"]), config["copy"]
    size = _BYTES[spec.dtype]
    if not 1 <= tile_h <= 256 or not 1 <= tile_w <= 256:
        return f"tile must be a text like '4x8', got {config['tile']!r}"
    if batch & (batch - 1) or vector & (vector - 1) or vector * size > 16:
        return f"batch and vector must be powers of two and a vector at most 16 bytes, got {batch} and {vector}"
    if vector > 1 and spec.n % vector:
        return f"vectors of {vector} images need a batch that is a multiple, got {spec.n}"
    geometry = geometry_of(spec, config)
    if isinstance(geometry, str):
        return geometry
    if int(config["rows"]) % int(config["share"]):
        return f"share must divide rows, got {config['share']} and {config['rows']}"
    capability = cuda.current().capability
    if (copy == "async" and capability < (8, 0)) or (copy == "box" and capability < (9, 0)):
        return f"copy {copy!r} needs a newer GPU than compute capability {capability[0]}.{capability[1]}"
    row = spec.n * size if batch > 1 else spec.w * size
    if copy == "box":
        if row % 16:
            return f"the copy engine needs rows of a multiple of 16 bytes, got {row}: use copy 'async'"
        if max(geometry.patch_h, geometry.patch_w, batch) > 256:
            return "a box has at most 256 values along a dimension"
    return None


def _reason_entries(weight: SparseWeight, config: Config) -> str | None:
    if config["entries"] == "coded":
        if weight.levels is None:
            return "coded entries need a quantized weight"
        if len(_table(weight)) > _CODED_PLACES:
            return f"the weight's codes stand for {len(_table(weight))} values, coded entries know {_CODED_PLACES}"
        if config["share"] != 1:
            return "coded entries have one value: share must be 1"
    return None


def _reason_resources(spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
    """Reason why a block does not fit a multiprocessor.  The exact size of the streams is known when packed."""
    geometry = geometry_of(spec, config)
    assert isinstance(geometry, Geometry)
    share, rows, per_step = (int(config[f]) for f in ("share", "rows", "channels"))
    block_rows = int(config["warps"]) * rows
    expected = block_rows // share * (_kept(weight, share) * min(per_step, spec.c_per_group) * spec.r * spec.s + 1)
    chunk = int(1.2 * expected) * (4 if config["entries"] == "coded" else 4 * (1 + share)) + 256
    shape = _shape(spec, weight, config, geometry, chunk)
    device = cuda.current()
    loaded = len(geometry.out) * shape.vector
    needed = shape.sums + min(loaded, 16) + _SPARE_REGISTERS
    if shape.threads > 1024:
        return f"a block has at most 1024 threads, got {shape.threads}"
    if needed > register_cap(shape.threads):
        return f"{needed} registers of {shape.threads} threads exceed a multiprocessor's"
    if shape.shared_bytes > device.shared_per_block:
        return f"{shape.shared_bytes} bytes of shared memory exceed a block's {device.shared_per_block}"
    if shape.coded and shape.channels * geometry.channel_bytes >= _CODED_OFFSETS:
        return "the tile of a step is too large for coded offsets"
    if shape.split > max(1, -(-spec.c_per_group // per_step)):
        return f"{shape.split} splits exceed the steps of {per_step} of {spec.c_per_group} channels"
    if shape.grid[0] >= 2**31:
        return "the grid is too large"
    return None


def _copies(spec: ConvSpec, batches: list[int]) -> tuple[str, ...]:
    """The best way to copy that the GPU has, and the next best where the copy engine cannot take every layout."""
    capability = cuda.current().capability
    if capability < (9, 0):
        return ("async",) if capability >= (8, 0) else ("plain",)
    rows = [spec.n if batch > 1 else spec.w for batch in batches]
    return ("box",) if all(row * _BYTES[spec.dtype] % 16 == 0 for row in rows) else ("box", "async")


def _kept(weight: SparseWeight, share: int) -> float:
    """Share of columns that any of ``share`` rows needs, as if their places were independent."""
    return 1.0 - (1.0 - weight.density) ** share


def _tiles(spec: ConvSpec, batches: list[int]) -> tuple[str, ...]:
    """Tiles worth trying: for each number of images the best few, of little left over and little halo."""
    chosen: dict[str, None] = {}
    for batch in batches:
        chosen |= dict.fromkeys(_tiles_of(spec, batch)[:_TILES])
    return tuple(chosen) or ("4x8",)


def _tiles_of(spec: ConvSpec, batch: int) -> list[str]:
    """Tiles of 4 to 128 pixels whose lanes fit, the best first."""
    found = []
    # What a tile of 4 rows and 8 columns wastes is allowed.
    allowed = max(1.34, _waste(spec, 4, 8))
    for h in (1, 2, 4, 7, 8, 14, 16):
        for w in (1, 2, 4, 7, 8, 14, 16, 28, 32):
            lanes = {32 * vector // batch for vector in _VECTORS if 32 * vector >= batch >= vector}
            fits = any(h % (n // gcd(n, w)) == 0 for n in lanes)
            if fits and 4 <= h * w <= 128 and max(h, w) <= 8 * min(h, w) and _waste(spec, h, w) <= allowed:
                halo = (h * spec.stride[0] + spec.r) * (w * spec.stride[1] + spec.s) / (h * w)
                found.append((_waste(spec, h, w) * halo, f"{h}x{w}"))
    return [name for _, name in sorted(found)]


def _waste(spec: ConvSpec, h: int, w: int) -> float:
    """Pixels that tiles of ``h`` rows and ``w`` columns compute, for each of the output."""
    return -(-spec.out_h // h) * h * -(-spec.out_w // w) * w / (spec.out_h * spec.out_w)


_TILES = 7
_VECTORS = (1, 4)
_L2_BYTES_PER_CLOCK = 28.0
"""What a multiprocessor gets from the second cache while all ask (measured with cp.async on an H100: 24)."""
_STEP_CLOCKS, _START_CLOCKS = 250.0, 3000.0
_INSTRUCTIONS_PER_CLOCK, _ENTRY_INSTRUCTIONS = 2.7, 10
"""Of a multiprocessor, which could start four (measured 2.1 to 2.8); those of an entry beside loads and sums."""


def _estimate(spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device) -> float:
    """Clocks that a config may take: the slower of shared memory and the second cache, in whole waves of blocks."""
    geometry = geometry_of(spec, config)
    assert isinstance(geometry, Geometry)
    shape = _shape(spec, weight, config, geometry, 4096)
    share, split = shape.share, shape.split
    entries = weight.nnz / shape.blocks / share * _kept(weight, share) / max(weight.density, 1e-9) / split
    wavefronts = max(1.0, len(geometry.out) * shape.vector * geometry.size / 4) + (1.0 if share == 1 else 2.0)
    vectors, values = len(geometry.out), len(geometry.out) * shape.vector
    widened = 0 if geometry.size == 4 else values
    instructions = values * share + vectors + widened + _ENTRY_INSTRUCTIONS
    work = entries * shape.parts * max(wavefronts, instructions / _INSTRUCTIONS_PER_CLOCK)
    channels = min(spec.c, spec.c_per_group * -(-spec.groups // shape.blocks)) / split
    loading = channels * geometry.channel_bytes / _L2_BYTES_PER_CLOCK
    steps = channels / shape.channels
    by_shared = device.shared_per_multiprocessor // (shape.shared_bytes + 1024)
    registers = -(-(shape.sums + 16 + _SPARE_REGISTERS) // 8) * 8
    by_registers = 4 * (device.registers_per_multiprocessor // 4 // (registers * 32)) // shape.consumers
    resident = max(1, min(by_shared, by_registers, device.threads_per_multiprocessor // shape.threads))
    warps = min(resident, -(-shape.grid[0] * split // device.multiprocessors)) * shape.consumers
    # Fitted to an H100: four warps take 1.4 times as long as sixteen.
    hidden = 1.0 + 0.4 * (4.0 / warps) ** 2.2
    each = max(work * hidden, loading) + steps * _STEP_CLOCKS / resident / (shape.stages - 0.5)
    blocks = shape.grid[0] * split
    waves = -(-blocks // (device.multiprocessors * resident)) * resident
    waves = min(waves, -(-blocks // device.multiprocessors))
    extra = 0.0 if split == 1 else 3000.0 + split * spec.n * spec.k * spec.out_h * spec.out_w * 8 / 132 / 20
    return _START_CLOCKS + waves * each + extra
