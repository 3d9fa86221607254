"""One instruction each: what tensor copies and tensor cores do is what `tensor_emulation` says, on a GPU that has them.

Without one the kernels are assembled, so that an operand of a wrong kind is found anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compare import on_hopper
from tensor_emulation import box, k_major_operand, opened, opened_deep, opened_dense, operand, swizzled, widened

from numbasparse.kernels import two_four
from numbasparse.runtime import cuda

N, H, W, C = 72, 5, 9, 40
"""Of the array that is copied from, in the order of memory C, H, W, N."""
PIXELS = 8


pytestmark = pytest.mark.usefixtures("a_hopper")


def compiled(code: Callable[..., None], arguments: int, key: object) -> cuda.Ptx:
    return cuda.compile_ptx(code, arguments, repr(key), capability=(9, 0), threads=128, fastmath=False)


HEAD = 1024


def arrival(row_bytes: int) -> tuple[Any, Any]:
    """Device functions that bring a box [1][PIXELS][32][row_bytes] to shared memory, and say where it is."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32 = types.int32, types.uint32
    shared = ptx.shared_base(1024)
    size = PIXELS * 32 * row_bytes

    def arrive(n, c, w, h):  # type: ignore[no-untyped-def]
        base = types.int64(shared())
        if ptx.thread_index() == 0:
            ptx.mbarrier_init(u32(base), i32(1))
            ptx.mbarrier_init_fence()
            ptx.mbarrier_expect(u32(base), i32(size))
            ptx.copy_box(u32(base + HEAD), ptx.tensor_map_address(), i32(n), i32(c), i32(w), i32(h), u32(base))
        ptx.barrier()
        ptx.mbarrier_wait(u32(base), i32(0))
        return base + HEAD

    return cuda.numba_cuda().jit(device=True, inline=True)(arrive), size


@functools.cache
def copying(row_bytes: int) -> cuda.Ptx:
    """Kernel ``(out, n, c, w, h)`` that writes the words of a box as they lie in shared memory."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, size = arrival(row_bytes)
    store = ptx.store_finished("float32", ptx.Finish(False, False, False, "none"))
    i64, f32 = types.int64, types.float32

    def copying(out, n, c, w, h):  # type: ignore[no-untyped-def]
        tile = arrive(n, c, w, h)
        for i in range(ptx.thread_index(), size // 2, 128):
            word = ptx.load_shared_i32(types.uint32(tile + i // 2 * 4))
            half = (word >> (16 * (i & 1))) & 0xFFFF
            store(i64(out + 4 * i), f32(half), i64(0), i64(0), i64(0), i64(0))

    return compiled(copying, 5, row_bytes)


@functools.cache
def multiplying(row_bytes: int, n: int, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, metadata, start, distance, rows)``: one sparse step of a tile's pixels, a matrix."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(row_bytes)
    wgmma, settle, zeros = ptx.sparse_wgmma((0,), n, dtype), ptx.wgmma_settle(n // 2), ptx.zeros(n // 2)
    d = ptx.matrix_descriptor(row_bytes, 32 * row_bytes)
    low_word, high_word, k_high = d.low, d.high, d.k_high
    write = writing(n)
    load_four, load_one = ptx.load_words("global", 4), ptx.load_words("global", 1)
    u32, i64 = types.uint32, types.int64

    def multiplying(out, values, metadata, start, distance, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        lane = thread & 31
        a = load_four(i64(values + thread * 16))
        place = ((thread >> 5) * 8 + (lane >> 2)) * 2 + (lane & 1)
        m = load_one(i64(metadata + place * 4))
        low, high = (tile >> 4) + start + low_word, high_word
        if k_high:
            high = high + distance
        else:
            low = low + (distance << 16)
        write(settle(wgmma(zeros(), a, m, u32(low), u32(high))), out, rows)

    return compiled(multiplying, 6, (row_bytes, n, dtype))


EIGHTS = 10
"""Rows of shared memory from eight n to the next eight, of operands whose k are neighbours."""


@functools.cache
def stepping(row_bytes: int, n: int, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, metadata, start, rows)``: one sparse step of rows of a tile that hold k, a matrix."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(row_bytes)
    wgmma, settle = ptx.sparse_wgmma((0,), n, dtype, k_major=True), ptx.wgmma_settle(n // 2)
    zeros, high = ptx.zeros(n // 2), ptx.k_major_descriptor(row_bytes, EIGHTS * row_bytes)
    write = writing(n)
    load_four, load_one = ptx.load_words("global", 4), ptx.load_words("global", 1)
    u32, i64 = types.uint32, types.int64

    def stepping(out, values, metadata, start, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        lane = thread & 31
        a = load_four(i64(values + thread * 16))
        place = ((thread >> 5) * 8 + (lane >> 2)) * 2 + (lane & 1)
        m = load_one(i64(metadata + place * 4))
        write(settle(wgmma(zeros(), a, m, u32((tile >> 4) + start), u32(high))), out, rows)

    return compiled(stepping, 5, (row_bytes, n, dtype))


LONGEST = 5
"""Steps of a run, at most."""


def run_of(row_bytes: int, n: int, dtype: str, steps: int) -> Any:
    """So many steps whose operands begin at different rows and halves."""
    from numbasparse.codegen import ptx

    words = tuple((2 * i * row_bytes + i % (row_bytes // 64) * 64) // 16 for i in range(steps))
    return ptx.StepRun(words, (0,), n, dtype, ptx.k_major_descriptor(row_bytes, EIGHTS * row_bytes))


@functools.cache
def running(row_bytes: int, n: int, dtype: str, steps: int) -> cuda.Ptx:
    """Kernel ``(out, packed, rows)``: steps of `run_of`, whose weights come to shared memory behind the tile."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, size = arrival(row_bytes)
    run = run_of(row_bytes, n, dtype, steps)
    first, others, settle, zeros = run.begin(), run.go_on(), ptx.wgmma_settle(n // 2), ptx.zeros(n // 2)
    nothing, keep = run.nothing(), run.keep()
    write, metadata, nbytes = writing(n), run.metadata, run.nbytes
    i32, u32, i64 = types.int32, types.uint32, types.int64

    def running(out, packed, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        at = tile + size
        for i in range(thread, nbytes // 4, 128):
            ptx.store_shared_i32(u32(at + 4 * i), i32(ptx.load_global_i32(i64(packed + 4 * i))))
        ptx.barrier()
        own, word = u32(at + thread * 16), u32(at + metadata + thread * 4)
        sums, carried = first(zeros(), nothing(), own, word, u32(tile >> 4))
        sums, held = others(sums, carried, own, word, u32(tile >> 4))
        sums = settle(sums)
        keep(held, u32(tile))
        write(sums, out, rows)

    return compiled(running, 3, (row_bytes, n, dtype, steps))


@functools.cache
def pairs(row_bytes: int, n: int, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, offsets, rows)``: four pairs of k of rows of a tile, a matrix."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(row_bytes)
    mma = ptx.pair_mma([(0, n // 8)], EIGHTS * row_bytes, ptx.SWIZZLES[row_bytes].mask, dtype)
    zeros, write = ptx.zeros(n // 2), writing(n)
    load_two, load_one = ptx.load_words("global", 2), ptx.load_words("global", 1)
    u32, i64 = types.uint32, types.int64

    def pairs(out, values, offsets, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        warp, lane = thread >> 5, thread & 31
        offset = load_one(i64(offsets + (warp * 4 + (lane & 3)) * 4))
        start = tile + offset + (lane >> 2) * row_bytes
        write(mma(zeros(), load_two(i64(values + thread * 8)), u32(start)), out, rows)

    return compiled(pairs, 4, (row_bytes, n, dtype))


@functools.cache
def storing(dtype: str, out_dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, offsets, residual, bias)``: 64 channels of 3 rows of 8 pixels, of which one is 5 wide."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(64)
    mma = ptx.pair_mma([(0, 3)], EIGHTS * 64, ptx.SWIZZLES[64].mask, dtype)
    size = ptx.element_bytes(out_dtype)
    finish = None if out_dtype == "float32" else ptx.Finish(bias=True, scaled=False, residual=True, activation="relu")
    places, strides = tuple((0, i, 0) for i in range(3)), (0, 320 * size, 64 * size)
    columns = ptx.ColumnStore(places, out_dtype, finish, strides, (1, 3, 5), ahead=2)
    load, store = columns.begin(), columns.store()
    zeros = ptx.zeros(12)
    load_two, load_one = ptx.load_words("global", 2), ptx.load_words("global", 1)
    u32, i32, i64 = types.uint32, types.int32, types.int64

    def storing(out, values, offsets, residual, bias):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        warp, lane = thread >> 5, thread & 31
        start = tile + load_one(i64(offsets + (warp * 4 + (lane & 3)) * 4)) + (lane >> 2) * 64
        sums = mma(zeros(), load_two(i64(values + thread * 8)), u32(start))
        row = warp * 16 + 4 * (lane >> 3) + ((lane >> 2) & 1)
        both = ptx.load_global_f32(i64(bias + 4 * row)), ptx.load_global_f32(i64(bias + 4 * (row + 2)))
        at = (lane >> 2) * i64(64 * size) + (warp * 16 + (lane & 3) * 4) * i64(size)
        origin = (i32(0), i32(0), i32(lane >> 2))
        begun = load(i64(residual + at), i32(1), origin)
        store(sums, begun, i64(out + at), i64(residual + at), i32(1), both, both, origin)

    return compiled(storing, 5, (dtype, out_dtype))


@functools.cache
def gathering(row_bytes: int, n: int, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, offsets, rows)``: gathered rows of a tile, a matrix."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(row_bytes)
    pixel = 32 * row_bytes
    displacements = [2 * j // row_bytes * pixel + 2 * j % row_bytes for j in range(0, n, 32)]
    eights = row_bytes // 16
    mma = ptx.gathered_mma(displacements, ptx.SWIZZLES[row_bytes].mask, dtype)
    zeros, write = ptx.zeros(n // 2), writing(n)
    load_two = ptx.load_words("global", 2)
    u32, i64 = types.uint32, types.int64

    def gathering(out, values, offsets, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        lane = thread & 31
        a = load_two(i64(values + thread * 8))
        offset = ptx.load_global_i32(i64(offsets + ((thread >> 5) * 8 + (lane & 7)) * 4))
        eight = lane >> 3
        own = tile + eight // eights * pixel + eight % eights * 16
        write(mma(zeros(), a, u32(own + offset)), out, rows)

    return compiled(gathering, 4, (row_bytes, n, dtype))


@functools.cache
def gathering_deep(row_bytes: int, n: int, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, codes, table, offsets, rows)``: 16 gathered rows, and weights that are bytes of a table."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, spare = arrival(row_bytes)
    pixel = 32 * row_bytes
    displacements = [2 * j // row_bytes * pixel + 2 * j % row_bytes for j in range(0, n, 16)]
    next_eight = 16 if row_bytes > 16 else pixel
    mma, decode = ptx.gathered_mma(displacements, ptx.SWIZZLES[row_bytes].mask, dtype, 16), ptx.decode_bytes(2)
    zeros, write = ptx.zeros(n // 2), writing(n)
    load_two = ptx.load_words("global", 2)
    i32, u32, i64 = types.int32, types.uint32, types.int64

    def gathering_deep(out, codes, table, offsets, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        lane = thread & 31
        # Behind the tile is room for the table.
        own_table = tile + spare
        ptx.store_shared_i32(u32(own_table + thread * 4), i32(ptx.load_global_i32(i64(table + thread * 4))))
        ptx.barrier()
        a = decode(load_two(i64(codes + thread * 8)), u32(own_table))
        offset = ptx.load_global_i32(i64(offsets + ((thread >> 5) * 16 + (lane & 15)) * 4))
        write(mma(zeros(), a, u32(tile + (lane >> 4) * next_eight + offset)), out, rows)

    return compiled(gathering_deep, 5, (row_bytes, n, dtype))


@functools.cache
def decoding(form: str, dtype: str) -> cuda.Ptx:
    """Kernel ``(out, codes, flags, table)``: the eight 16-bit values of codes of 128 threads, as whole numbers."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    nibbles, mask, integers = ptx.decode_nibbles(), ptx.mask_words(), ptx.decode_integers(dtype)
    store = ptx.store_finished("float32", ptx.Finish(False, False, False, "none"))
    load_one, load_two, load_four = (ptx.load_words("global", n) for n in (1, 2, 4))
    i64, f32 = types.int64, types.float32

    def of_nibbles(codes, flags, table, thread):  # type: ignore[no-untyped-def]
        values = nibbles(load_one(i64(codes + 4 * thread)), load_four(i64(table)), load_four(i64(table + 16)))
        return mask(values, load_one(i64(flags + 4 * thread)))

    def of_integers(codes, flags, table, thread):  # type: ignore[no-untyped-def]
        return integers(load_two(i64(codes + 8 * thread)))

    jit = cuda.numba_cuda().jit(device=True, inline=True)
    decode = jit({"nibbles": of_nibbles, "integers": of_integers}[form])

    def decoding(out, codes, flags, table):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        values = decode(codes, flags, table, thread)
        for i in range(4):
            for half in range(2):
                at = i64(out + (thread * 8 + 2 * i + half) * 4)
                store(at, f32(values[i] >> (16 * half) & 0xFFFF), i64(0), i64(0), i64(0), i64(0))

    return compiled(decoding, 4, (form, dtype))


@functools.cache
def finishing(dtype: str) -> cuda.Ptx:
    """Kernel ``(out, values, offsets, rows, residual, bias)``: gathered rows of 64 columns, finished and narrowed."""
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    arrive, _ = arrival(64)
    mma = ptx.gathered_mma([0, 2048], ptx.SWIZZLES[64].mask, dtype)
    zeros = ptx.zeros(32)
    finish = ptx.Finish(bias=True, scaled=False, residual=True, activation="relu")
    store = ptx.store_finished_fragments([(0, 0, 0), (0, 1, 0)], dtype, finish, (128, 0, 64, 2), (1, 2, 32))
    load_two = ptx.load_words("global", 2)
    i32, u32, i64 = types.int32, types.uint32, types.int64

    def finishing(out, values, offsets, rows, residual, bias):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        tile = arrive(0, 0, 0, 0)
        lane, warp = thread & 31, thread >> 5
        a = load_two(i64(values + thread * 8))
        offset = ptx.load_global_i32(i64(offsets + (warp * 8 + (lane & 7)) * 4))
        sums = mma(zeros(), a, u32(tile + offset + (lane >> 3) * 16))
        n, own = (lane & 3) * 8, rows + 4 * (warp * 16 + (lane >> 2))
        first, second = ptx.load_global_i32(i64(own)), ptx.load_global_i32(i64(own + 32))
        shifts = (
            ptx.load_global_f32(i64(bias + 4 * max(first, 0))),
            ptx.load_global_f32(i64(bias + 4 * max(second, 0))),
        )
        store(sums, i64(out + 2 * n), i64(residual + 2 * n), (first, second), shifts, shifts, i32(0), i32(0), i32(n))

    return compiled(finishing, 6, dtype)


def writing(n: int) -> Any:
    """Device function ``(sums, out, rows)``: a matrix of 64 x n, whose row numbers are at ``rows``."""
    from numba import types

    from numbasparse.codegen import ptx

    places = [(0, j, 0) for j in range(n // 8)]
    store = ptx.store_fragments(places, (4 * n, 0, 32, 4), (1, n // 8, 8))
    i32, i64 = types.int32, types.int64

    def write(sums, out, rows):  # type: ignore[no-untyped-def]
        thread = ptx.thread_index()
        own, column = (thread >> 5) * 16 + ((thread & 31) >> 2), 2 * (thread & 3)
        numbers = (ptx.load_global_i32(i64(rows + 4 * own)), ptx.load_global_i32(i64(rows + 4 * own + 32)))
        store(sums, i64(out + 4 * column), numbers, i32(0), i32(0), i32(column))

    return cuda.numba_cuda().jit(device=True, inline=True)(write)


ROWS = [128, 64, 32, 16]
SHAPES = [(128, 256), (128, 64), (64, 128), (32, 64), (16, 32)]
"""Bytes of a row, and columns of the operand."""
DTYPES = ["float16", "bfloat16"]


@pytest.mark.parametrize("row_bytes", ROWS)
def test_assembled(row_bytes: int) -> None:
    n = dict(reversed(SHAPES))[row_bytes]
    for ptx, word in (
        (copying(row_bytes), "cp.async.bulk.tensor.4d"),
        (multiplying(row_bytes, n, "float16"), f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32.f16.f16"),
        (multiplying(row_bytes, n, "bfloat16"), "k32.f32.bf16.bf16"),
        (finishing("float16"), "shfl.sync.bfly.b32"),
        (gathering(row_bytes, n, "bfloat16"), "ldmatrix.sync.aligned.m8n8.x4.trans"),
        (gathering_deep(row_bytes, n, "bfloat16"), "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        (stepping(max(64, row_bytes), n, "float16"), "0, p, 1, 1, 0;"),
        (running(max(64, row_bytes), n, "float16", LONGEST), "1, p, 1, 1, 0;"),
        (pairs(max(64, row_bytes), n, "float16"), "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"),
        (decoding("nibbles", "float16"), "prmt.b32"),
        (decoding("integers", "float16"), "sub.f16x2"),
        (decoding("integers", "bfloat16"), "0f4B000080"),
        (storing("bfloat16", "bfloat16"), "movmatrix.sync.aligned.m8n8.trans.b16"),
        (storing("float16", "float32"), "st.global.v4.b32"),
    ):
        assert word in ptx.text
        cubin = cuda.assemble(ptx)
        assert (cubin.local_bytes, cubin.losses) == (0, ())


def test_descriptors() -> None:
    from numbasparse.codegen import ptx

    made = ptx.matrix_descriptor(128, 4096)
    assert (made.low, made.high, made.k_high) == (256 << 16, 1 << 30, True)
    made = ptx.matrix_descriptor(16, 512)
    assert (made.low, made.high, made.k_high) == (0, 32, False)
    with pytest.raises(ValueError, match="multiple of 16 bytes under 256 KiB, got 262144"):
        ptx.matrix_descriptor(64, 1 << 18)
    assert ptx.k_major_descriptor(64, 640) == 2 << 30 | 40
    with pytest.raises(ValueError, match="multiple of 16 bytes under 256 KiB, got 8"):
        ptx.k_major_descriptor(64, 8)


# --- on a GPU ------------------------------------------------------------------------------------------------


class Run:
    """An array on the GPU, its tensor map, and what is in shared memory after its box was copied there."""

    def __init__(self, row_bytes: int, dtype: str = "float16") -> None:
        import torch

        self.row_bytes = row_bytes
        rng = np.random.default_rng(row_bytes)
        values = rng.integers(-8, 9, (C, H, W, N)).astype(np.float32)
        self.words = two_four.narrow(values, dtype)
        self.x = torch.from_numpy(self.words.view(np.int16)).cuda()
        pixel, row = 2 * N, 2 * N * W
        self.map = cuda.TensorMap(
            self.x.data_ptr(), dtype, (N, C, W, H), (row * H, pixel, row), (row_bytes // 2, 32, PIXELS, 1), row_bytes
        )

    def launch(self, ptx: cuda.Ptx, size: int, *arguments: Any) -> np.ndarray:
        """Run a kernel; tensors among the arguments are passed by address.  Returns float32 (size,)."""
        import torch

        out = torch.full((size,), torch.nan, device="cuda")
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (out, *arguments)]
        shared = 1024 + HEAD + PIXELS * 32 * self.row_bytes + 512 + LONGEST * (2048 + 512)
        cuda.load(ptx).launch((1, 1, 1), 128, shared, cuda.current_stream(), values, tensor_map=self.map)
        torch.cuda.synchronize()
        return out.cpu().numpy()

    def memory(self, n: int = 0, c: int = 0, w: int = 0, h: int = 0) -> np.ndarray:
        """Bytes of shared memory with the box at 0, by the rules of `tensor_emulation`."""
        copied = box(self.words.transpose(1, 2, 0, 3), (h, w, c, n), (1, PIXELS, 32, self.row_bytes // 2)).ravel()
        memory = np.zeros(2 * copied.size, np.uint8)
        memory.view(np.uint16)[swizzled(2 * np.arange(copied.size), self.row_bytes) // 2] = copied
        return memory


def some_pairs(rng: np.random.Generator, row_bytes: int) -> np.ndarray:
    """Offsets of four pairs of k for each warp."""
    row, pair = rng.integers(0, 9, (4, 4)), rng.integers(0, row_bytes // 4, (4, 4))
    return (row_bytes * row + 4 * pair).astype(np.int32)


def of_pairs(run: Run, offsets: np.ndarray, n: int, dtype: str) -> np.ndarray:
    """The operands of `pairs`, (4, 8, n)."""
    column = np.arange(n)
    linear = offsets[..., None] + (column // 8 * EIGHTS + column % 8) * run.row_bytes
    b = run.memory().view(np.uint16)[swizzled(linear, run.row_bytes)[..., None] // 2 + np.arange(2)]
    values = widened(np.ascontiguousarray(b).view(np.uint32), dtype).reshape(b.shape)
    return values.transpose(0, 1, 3, 2).reshape(4, 8, n)


def to_gpu(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32)).cuda()


@on_hopper
@pytest.mark.parametrize("row_bytes", ROWS)
@pytest.mark.parametrize("origin", [(0, 0, 0, 0), (8, 8, 1, 2), (64, 16, -1, 1), (0, 0, -2, -1), (16, 24, 4, 4)])
def test_boxes_are_swizzled(row_bytes: int, origin: tuple[int, int, int, int]) -> None:
    run = Run(row_bytes)
    expected = run.memory(*origin).view(np.uint16)
    found = run.launch(copying(row_bytes), expected.size, *origin)
    np.testing.assert_array_equal(found, expected)


def a_step(dtype: str, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Registers and metadata of a sparse step."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(-4, 5, (64, 32)).astype(np.float32) * (rng.random((64, 32)) < 0.2)
    row, column = np.nonzero(dense)
    steps, _ = two_four.cover_steps(0 * row, row, column // 8, column % 8, dense[row, column], 1, 4)
    return two_four.fragments(steps.values, dtype)[0], steps.metadata[0]


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "distance"), [(0, 1), (1, 1), (0, 0), (2, 2)])
@pytest.mark.parametrize(("row_bytes", "n"), SHAPES)
def test_sparse_wgmma(row_bytes: int, n: int, start: int, distance: int, dtype: str) -> None:
    from numbasparse.codegen import ptx

    run, (values, metadata) = Run(row_bytes, dtype), a_step(dtype)
    unit = 8 * row_bytes // 16
    rows = np.arange(64, dtype=np.int32)
    made = multiplying(row_bytes, n, dtype)
    arguments = (to_gpu(values), to_gpu(metadata), start * unit, distance * unit, to_gpu(rows))
    found = run.launch(made, 64 * n, *arguments).reshape(64, n)
    d = ptx.matrix_descriptor(row_bytes, 32 * row_bytes)
    low = d.low + start * unit + (0 if d.k_high else distance * unit << 16)
    b = operand(run.memory(), low, d.high + d.k_high * distance * unit, n)
    expected = opened(values, metadata, dtype) @ widened(b.view(np.uint32), dtype).reshape(b.shape)
    np.testing.assert_array_equal(found, expected)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("row_bytes", "n"), SHAPES)
def test_gathered_mma(row_bytes: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(n)
    run = Run(row_bytes, dtype)
    dense = rng.integers(-4, 5, (1, 64, 8)).astype(np.float32)
    values = two_four.fragments(dense, dtype)[0]
    offsets = (row_bytes * rng.integers(0, 64, (4, 8))).astype(np.int32)
    rows = np.arange(64, dtype=np.int32)
    found = run.launch(gathering(row_bytes, n, dtype), 64 * n, to_gpu(values), to_gpu(offsets), to_gpu(rows))
    column = 2 * np.arange(n)
    linear = offsets[..., None] + column // row_bytes * 32 * row_bytes + column % row_bytes
    b = run.memory().view(np.uint16)[swizzled(linear, row_bytes) // 2]
    b_values = widened(np.ascontiguousarray(b).view(np.uint32), dtype).reshape(b.shape)
    expected = opened_dense(values, dtype).reshape(4, 16, 8) @ b_values
    np.testing.assert_array_equal(found.reshape(64, n), expected.reshape(64, n))


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("row_bytes", "n"), SHAPES)
def test_gathered_mma_deep(row_bytes: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(n)
    run = Run(row_bytes, dtype)
    table = rng.integers(-4, 5, 256).astype(np.float32)
    codes = rng.integers(0, 256, (1, 64, 16)).astype(np.uint8)
    offsets = (row_bytes * rng.integers(0, 64, (4, 16))).astype(np.int32)
    rows = np.arange(64, dtype=np.int32)
    lanes, halves = two_four.lanes(codes)[0], two_four.narrow(table, dtype)
    arguments = (to_gpu(lanes.view(np.uint32)), to_gpu(halves.view(np.uint32)), to_gpu(offsets), to_gpu(rows))
    found = run.launch(gathering_deep(row_bytes, n, dtype), 64 * n, *arguments)
    column = 2 * np.arange(n)
    linear = offsets[..., None] + column // row_bytes * 32 * row_bytes + column % row_bytes
    b = run.memory().view(np.uint16)[swizzled(linear, row_bytes) // 2]
    b_values = widened(np.ascontiguousarray(b).view(np.uint32), dtype).reshape(b.shape)
    fragments = two_four.fragments(table[codes], dtype)[0].reshape(4, 32, 4)
    for warp in range(4):
        np.testing.assert_array_equal(opened_deep(fragments[warp], dtype), table[codes[0, 16 * warp : 16 * warp + 16]])
    expected = table[codes].reshape(4, 16, 16) @ b_values
    np.testing.assert_array_equal(found.reshape(64, n), expected.reshape(64, n))


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_integers(dtype: str) -> None:
    codes = np.random.default_rng(0).permutation(np.tile(np.arange(256), 4)).astype(np.uint8)
    made, nothing = decoding("integers", dtype), to_gpu(np.zeros(1, np.int32))
    found = Run(128, dtype).launch(made, codes.size, to_gpu(codes.view(np.uint32)), nothing, nothing)
    np.testing.assert_array_equal(found, two_four.narrow(codes.astype(np.float32) - 128, dtype))


@on_hopper
def test_decoded_nibbles() -> None:
    rng = np.random.default_rng(0)
    codes, there = rng.integers(0, 16, (128, 8)), rng.integers(0, 2, (128, 8))
    table = rng.integers(0, 1 << 16, 16)
    words = (codes << 4 * np.arange(8)).sum(axis=1).astype(np.uint32)
    flags = (there << [7, 15, 23, 31, 6, 14, 22, 30]).sum(axis=1).astype(np.uint32)
    halves = np.concatenate([table & 0xFF, table >> 8]).astype(np.uint8)
    made = decoding("nibbles", "float16")
    found = Run(128, "float16").launch(made, 1024, to_gpu(words), to_gpu(flags), to_gpu(halves))
    np.testing.assert_array_equal(found.reshape(128, 8), table[codes] * there)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_finished_fragments(dtype: str) -> None:
    rng = np.random.default_rng(3)
    run = Run(64, dtype)
    dense = rng.integers(-4, 5, (1, 64, 8)).astype(np.float32)
    values = two_four.fragments(dense, dtype)[0]
    offsets = (64 * rng.integers(0, 64, (4, 8))).astype(np.int32)
    residual, bias = rng.integers(-9, 10, (64, 64)).astype(np.float32), rng.integers(-9, 10, 64).astype(np.float32)
    rows = rng.permutation(64).astype(np.int32)
    rows[5] = -1
    arguments = (to_gpu(values), to_gpu(offsets), to_gpu(rows), to_gpu(two_four.narrow(residual, dtype)), to_gpu(bias))
    # 64 x 64 halves are 2048 words, whose start is NaN.
    found = widened(run.launch(finishing(dtype), 2048, *arguments).view(np.uint32), dtype).reshape(64, 64)
    linear = offsets[..., None] + np.arange(64) // 32 * 2048 + np.arange(64) % 32 * 2
    b = np.ascontiguousarray(run.memory().view(np.uint16)[swizzled(linear, 64) // 2])
    sums = opened_dense(values, dtype).reshape(4, 16, 8) @ widened(b.view(np.uint32), dtype).reshape(b.shape)
    for i, k in enumerate(rows):
        if k >= 0:
            expected = np.maximum(sums.reshape(64, 64)[i] + bias[k] + residual[k], 0)[None]
            rounded = widened(two_four.narrow(expected, dtype).view(np.uint32), dtype).reshape(-1)
            np.testing.assert_array_equal(found[k], rounded)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(9))
@pytest.mark.parametrize(("row_bytes", "n", "half"), [(128, 128, 0), (128, 40, 1), (64, 64, 0), (64, 8, 0)])
def test_sparse_wgmma_of_neighbouring_k(row_bytes: int, n: int, half: int, row: int, dtype: str) -> None:
    from numbasparse.codegen import ptx

    run, (values, metadata) = Run(row_bytes, dtype), a_step(dtype)
    start = (row * row_bytes + 64 * half) // 16
    rows = np.arange(64, dtype=np.int32)
    arguments = (to_gpu(values), to_gpu(metadata), start, to_gpu(rows))
    found = run.launch(stepping(row_bytes, n, dtype), 64 * n, *arguments).reshape(64, n)
    b = k_major_operand(run.memory(), start, ptx.k_major_descriptor(row_bytes, EIGHTS * row_bytes), n)
    expected = opened(values, metadata, dtype) @ widened(b.view(np.uint32), dtype).reshape(b.shape)
    np.testing.assert_array_equal(found, expected)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [3, 4, LONGEST])
@pytest.mark.parametrize(("row_bytes", "n"), [(128, 128), (128, 40), (64, 56)])
def test_step_run(row_bytes: int, n: int, steps: int, dtype: str) -> None:
    """Of every second step the metadata are those of lanes 2 and 3 of four."""
    from numbasparse.codegen import ptx

    run, made = Run(row_bytes, dtype), [a_step(dtype, seed) for seed in range(steps)]
    metadata = np.zeros((-(-steps // 2), 4, 8, 2, 2), np.uint32)
    for i, (_, words) in enumerate(made):
        metadata[i // 2, :, :, i % 2] = words.reshape(4, 8, 2)
    packed = np.concatenate([*(values.ravel() for values, _ in made), metadata.ravel()])
    rows = np.arange(64, dtype=np.int32)
    found = run.launch(running(row_bytes, n, dtype, steps), 64 * n, to_gpu(packed), to_gpu(rows)).reshape(64, n)
    high, expected = ptx.k_major_descriptor(row_bytes, EIGHTS * row_bytes), np.zeros((64, n), np.float32)
    for word, (values, words) in zip(run_of(row_bytes, n, dtype, steps).words, made, strict=True):
        b = k_major_operand(run.memory(), word, high, n)
        expected += opened(values, words, dtype) @ widened(b.view(np.uint32), dtype).reshape(b.shape)
    np.testing.assert_array_equal(found, expected)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("row_bytes", "n"), [(128, 128), (128, 40), (64, 56)])
def test_pair_mma(row_bytes: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(n)
    run = Run(row_bytes, dtype)
    dense = rng.integers(-4, 5, (1, 64, 8)).astype(np.float32)
    values = two_four.fragments(dense, dtype)[0]
    offsets = some_pairs(rng, row_bytes)
    rows = np.arange(64, dtype=np.int32)
    found = run.launch(pairs(row_bytes, n, dtype), 64 * n, to_gpu(values), to_gpu(offsets), to_gpu(rows))
    expected = opened_dense(values, dtype).reshape(4, 16, 8) @ of_pairs(run, offsets, n, dtype)
    np.testing.assert_array_equal(found.reshape(64, n), expected.reshape(64, n))


@on_hopper
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_columns(dtype: str, narrow: bool) -> None:
    rng = np.random.default_rng(3)
    run = Run(64, dtype)
    dense = rng.integers(-4, 5, (1, 64, 8)).astype(np.float32)
    values = two_four.fragments(dense, dtype)[0]
    offsets = some_pairs(rng, 64)
    residual, bias = rng.integers(-9, 10, (3, 5, 64)).astype(np.float32), rng.integers(-9, 10, 64).astype(np.float32)
    arguments = (to_gpu(values), to_gpu(offsets), to_gpu(two_four.narrow(residual, dtype)), to_gpu(bias))
    size = residual.size
    raw = run.launch(storing(dtype, dtype if narrow else "float32"), size // (2 if narrow else 1), *arguments)
    products = (opened_dense(values, dtype).reshape(4, 16, 8) @ of_pairs(run, offsets, 24, dtype)).reshape(64, 3, 8)
    # Of each 16 rows those of the four channels that a lane stores: 2 q, 2 q + 1, 2 q + 8, 2 q + 9.
    order = np.arange(64).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).ravel()
    expected = products[order].transpose(1, 2, 0)[:, :5]
    if narrow:
        found = widened(raw.view(np.uint32), dtype).reshape(residual.shape)
        expected = np.maximum(expected + bias + residual, 0)
        expected = widened(two_four.narrow(expected, dtype).view(np.uint32), dtype).reshape(expected.shape)
    else:
        found = raw.reshape(residual.shape)
    np.testing.assert_array_equal(found, expected)
