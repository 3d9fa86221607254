"""Max pooling of images in NCHW on the CPU, as a job: first over rows, then over columns, a row of outputs at a time.

torch's own looks at one window after the other, without vectors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import f32_pointer, load_i64
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job

# Words of the parameter block.
_PLANES, _H, _W, _OUT_H, _OUT_W, _TOP, _LEFT, _LENGTH = range(8)
_LEAST = np.float32("-inf")


@dataclass(frozen=True)
class Pool:
    """One pooling of images: planes (N * C), their size, and the window's size, stride and padding.

    Padding is at most half of the window, and a window fits into the padded image.
    """

    planes: int
    h: int
    w: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        (r, s), (down, right), (top, left) = self.size, self.stride, self.padding
        return (self.h + 2 * top - r) // down + 1, (self.w + 2 * left - s) // right + 1


def max_pool_job(pool: Pool) -> Job:
    """The pooling of float32 planes in C order, as a job: the largest of each window, NaN where there is one."""
    (top, left), (out_h, out_w) = pool.padding, pool.out
    # A row between borders that are never the largest; the last window may end behind the image.
    length = max(left + pool.w, (out_w - 1) * pool.stride[1] + pool.size[1])
    words = np.array([pool.planes, pool.h, pool.w, out_h, out_w, top, left, length], np.int64)
    return Job(_compiled(*pool.size, *pool.stride), words, 4 * length)


@functools.cache
def _compiled(r: int, s: int, down: int, right: int) -> Code:
    """The entry for a window of r x s: loops over so few are unrolled, and the loops around them vectorized."""

    def max_pool(params, x, y, bias, arena, counters, thread, threads):  # type: ignore[no-untyped-def]
        height, width = load_i64(params + 8 * _H), load_i64(params + 8 * _W)
        out_h, out_w = load_i64(params + 8 * _OUT_H), load_i64(params + 8 * _OUT_W)
        top, left = load_i64(params + 8 * _TOP), load_i64(params + 8 * _LEFT)
        whole = f32_pointer(arena)
        for i in range(load_i64(params + 8 * _LENGTH)):
            whole[i] = _LEAST
        row = f32_pointer(arena + 4 * left)
        while True:
            plane = cpu.next_unit(counters, thread, threads, load_i64(params + 8 * _PLANES))
            if plane < 0:
                return
            for oy in range(out_h):
                for i in range(width):
                    largest = _LEAST
                    for dy in range(r):
                        # What is outside is as its neighbour inside, which every window there has too.
                        iy = min(max(oy * down - top + dy, 0), height - 1)
                        value = f32_pointer(x + 4 * (plane * height + iy) * width)[i]
                        # Of a NaN and a number the NaN: comparisons with it are false.
                        largest = largest if largest > value or largest != largest else value
                    row[i] = largest
                target = f32_pointer(y + 4 * (plane * out_h + oy) * out_w)
                for ox in range(out_w):
                    largest = whole[ox * right]
                    for dx in range(1, s):
                        value = whole[ox * right + dx]
                        largest = largest if largest > value or largest != largest else value
                    target[ox] = largest

    return compile_c(max_pool, cpu.ENTRY_SIGNATURE, repr((r, s, down, right)))
