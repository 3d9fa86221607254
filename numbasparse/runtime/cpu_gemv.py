"""A dense matrix times one vector on the CPU, as a job: what a linear layer is to one picture.

Bound by memory: every weight is read once.
"""

from __future__ import annotations

import functools

import numpy as np

from numbasparse.codegen.jit import Code, compile_c
from numbasparse.codegen.simd import f32_pointer, load_i64
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job

_ROWS, _COLUMNS, _WEIGHT = range(3)
_ROWS_OF_A_UNIT = 8
_SUMS = 64
"""Partial sums of a row, side by side: as many as a few vectors hold."""


def gemv_job(rows: int, columns: int, weight: int) -> Job:
    """The product as a job: x is float32 (columns,), y and bias (rows,); ``weight`` the address of (rows, columns)."""
    return Job(_compiled(), np.array([rows, columns, weight], np.int64), 4 * _SUMS)


@functools.cache
def _compiled() -> Code:
    return compile_c(_gemv, cpu.ENTRY_SIGNATURE, "")


def _gemv(params: int, x: int, y: int, bias: int, arena: int, counters: int, thread: int, threads: int) -> None:
    """Work on units of some rows until none is left."""
    rows, columns = load_i64(params + 8 * _ROWS), load_i64(params + 8 * _COLUMNS)
    weight = load_i64(params + 8 * _WEIGHT)
    vector, out, added, sums = f32_pointer(x), f32_pointer(y), f32_pointer(bias), f32_pointer(arena)
    units = (rows + _ROWS_OF_A_UNIT - 1) // _ROWS_OF_A_UNIT
    whole = columns // _SUMS * _SUMS
    while True:
        unit = cpu.next_unit(counters, thread, threads, units)
        if unit < 0:
            return
        for row in range(unit * _ROWS_OF_A_UNIT, min(rows, (unit + 1) * _ROWS_OF_A_UNIT)):
            line = f32_pointer(weight + 4 * row * columns)
            for i in range(_SUMS):
                sums[i] = np.float32(0)
            for start in range(0, whole, _SUMS):
                for i in range(_SUMS):
                    sums[i] += line[start + i] * vector[start + i]
            total = added[row]
            for i in range(_SUMS):
                total += sums[i]
            for i in range(whole, columns):
                total += line[i] * vector[i]
            out[row] = total
