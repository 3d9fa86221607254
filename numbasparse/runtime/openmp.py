"""Run kernels on the threads of the OpenMP runtime that is already in the process (torch's).

``GOMP_parallel`` is the stable entry that compilers emit for a parallel region; GNU, LLVM and Intel runtimes
all export it.  Its closing barrier spins, and a worker woken after a pause often preempts the caller on its own
core: milliseconds are lost until the scheduler separates them.  So a worker moves off the caller's core first,
and no thread goes to the barrier before all have come to its door.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import Any

import numpy as np
from numba import njit

from numbasparse.codegen.jit import compile_c
from numbasparse.codegen.simd import (
    atomic_load,
    compare_exchange,
    fetch_add,
    load_i64,
    relax,
    store_i64,
)
from numbasparse.runtime.team import (
    LINE,
    MAX_THREADS,
    Arena,
    call_0,
    call_1,
    call_8,
    core_functions,
    step_aside,
)

# Control block, in bytes: the job, the C functions, the entered count, arenas and counters of each thread.
_JOB = 0  # entry, params, x, y, threads, caller's core, bias
_HOST = 64  # omp_get_thread_num, omp_get_num_threads, usleep, then those of `core_functions`
_MOVE = _HOST + 24
_FINISHED = 128
_ARENAS = 192
_COUNTERS = _ARENAS + 8 * MAX_THREADS
_SIZE = _COUNTERS + LINE * MAX_THREADS

_NAP_MICROSECONDS = 10
_LIBRARIES = ("libgomp", "libiomp5", "libomp")
_SPINS = 2000


@njit
def _meet(control: int) -> None:
    """Wait until every member of the region is here: none goes to the runtime's own barrier before all have come."""
    fetch_add(control + _FINISHED, 1)
    members = call_0(load_i64(control + _HOST + 8), ()) & 0xFFFFFFFF
    spins = 0
    while atomic_load(control + _FINISHED) < members:
        relax()
        spins += 1
        if spins > _SPINS:
            # Sleep, not sched_yield: a fair scheduler gives the core straight back after a yield.
            call_1(load_i64(control + _HOST + 16), (_NAP_MICROSECONDS,))


def _region(control: int) -> None:
    # C ints come back in the low half of the register.
    thread = call_0(load_i64(control + _HOST), ()) & 0xFFFFFFFF
    arena = load_i64(control + _ARENAS + 8 * thread)
    if thread != 0:
        step_aside(control + _MOVE, load_i64(control + _JOB + 40), arena)
    call_8(
        load_i64(control + _JOB),
        (
            load_i64(control + _JOB + 8),
            load_i64(control + _JOB + 16),
            load_i64(control + _JOB + 24),
            load_i64(control + _JOB + 48),
            arena,
            control + _COUNTERS,
            thread,
            load_i64(control + _JOB + 32),
        ),
    )
    _meet(control)
    if thread == 0:
        # Nobody claims units any more: the next call finds zeros, and its caller need not write them.
        for t in range(load_i64(control + _JOB + 32)):
            store_i64(control + _COUNTERS + LINE * t, 0)


# A series: each job's line of state (as in `team`: open, and how many joined), line of those done, and counters.
SERIES_WORDS = 8
"""Words of a job in the table: entry, params, x, y, bias."""
_OPEN, _JOINED = 1 << 17, (1 << 17) - 1


def _series(control: int) -> None:
    """Run a table's jobs one after the other; who comes to a job late goes on to the next, and nobody waits for it."""
    thread = call_0(load_i64(control + _HOST), ()) & 0xFFFFFFFF
    arena = load_i64(control + _ARENAS + 8 * thread)
    if thread != 0:
        step_aside(control + _MOVE, load_i64(control + _JOB + 40), arena)
    table, count = load_i64(control + _JOB), load_i64(control + _JOB + 8)
    states, threads = load_i64(control + _JOB + 16), load_i64(control + _JOB + 32)
    for index in range(count):
        job, state = table + 8 * SERIES_WORDS * index, states + (2 + threads) * LINE * index
        seen = atomic_load(state)
        while (seen & _OPEN) != 0 and compare_exchange(state, seen, seen + 1) != seen:
            seen = atomic_load(state)
        if (seen & _OPEN) != 0:
            call_8(
                load_i64(job),
                (
                    load_i64(job + 8),
                    load_i64(job + 16),
                    load_i64(job + 24),
                    load_i64(job + 32),
                    arena,
                    state + 2 * LINE,
                    thread,
                    threads,
                ),
            )
            # Every unit is taken: nobody need join any more.
            seen = atomic_load(state)
            while (seen & _OPEN) != 0 and compare_exchange(state, seen, seen - _OPEN) != seen:
                seen = atomic_load(state)
            fetch_add(state + LINE, 1)
        # The next job reads what this one wrote: wait for all who joined.
        spins = 0
        while atomic_load(state + LINE) != (atomic_load(state) & _JOINED):
            relax()
            spins += 1
            if spins > _SPINS:
                call_1(load_i64(control + _HOST + 16), (_NAP_MICROSECONDS,))
    _meet(control)


def series_states(jobs: int, threads: int) -> np.ndarray:
    """What `OpenMP.run_series` needs in the beginning for so many jobs, int64; it changes it."""
    states = np.zeros((jobs, 2 + threads, LINE // 8), np.int64)
    states[:, 0, 0] = _OPEN
    return states


class _Caller(threading.local):
    """Control block and scratch of one calling thread: OpenMP gives every caller a team of its own."""

    def __init__(self) -> None:
        self._block = np.zeros(_SIZE + LINE, np.uint8)
        self.control = -(-self._block.ctypes.data // LINE) * LINE
        self.words: Any = (ctypes.c_int64 * (_SIZE // 8)).from_address(self.control)
        self.arenas: list[Arena] = []
        self._reserved = (0, 0)

    def reserve(self, threads: int, workspace: int) -> None:
        most_threads, most = self._reserved
        if threads <= most_threads and workspace <= most:
            return
        threads, workspace = max(threads, most_threads), max(workspace, most)
        for t in range(threads):
            if t == len(self.arenas):
                self.arenas.append(Arena())
            if self.arenas[t].size < workspace:
                self.words[_ARENAS // 8 + t] = self.arenas[t].reserve(workspace)
        # Behind the last one: memory may have run out.
        self._reserved = (threads, workspace)


class OpenMP:
    """The OpenMP runtime of the process, as a way to run a kernel's entry on several threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        functions = (
            library.omp_get_thread_num,
            library.omp_get_num_threads,
            ctypes.CDLL(None).usleep,
        )
        self._host = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions] + core_functions()
        self._region = compile_c(_region, "void(int64)", "region")
        self._series = compile_c(_series, "void(int64)", "series")
        self._sched_getcpu = ctypes.CDLL(None).sched_getcpu
        self._caller = _Caller()

    def run(self, entry: int, params: int, x: int, y: int, bias: int, threads: int, workspace: int) -> None:
        """Run a kernel's entry on up to ``threads`` threads; returns when the result is complete."""
        words = self._prepared(threads, workspace)
        words[0:7] = [entry, params, x, y, threads, self._sched_getcpu(), bias]
        self._parallel(self._region.address, self._caller.control, threads, 0)

    def run_series(self, table: int, count: int, states: int, threads: int, workspace: int) -> None:
        """Run jobs one after the other in one parallel region; returns when all results are complete.

        Parameters
        ----------
        table : address of int64 (count, `SERIES_WORDS`)
            Entry, params, x, y and bias of each job.
        states : address
            Of a fresh copy of `series_states`.
        """
        words = self._prepared(threads, workspace)
        words[0:6] = [table, count, states, 0, threads, self._sched_getcpu()]
        self._parallel(self._series.address, self._caller.control, threads, 0)

    def _prepared(self, threads: int, workspace: int) -> Any:
        """The caller's control block, ready for a region."""
        caller = self._caller
        caller.reserve(threads, workspace)
        words = caller.words
        if words[_HOST // 8] == 0:
            words[_HOST // 8 : _HOST // 8 + len(self._host)] = self._host
        words[_FINISHED // 8] = 0
        return words


_runtime: OpenMP | None = None
_searched_with_torch = False
_usable = sys.platform.startswith("linux")


def loaded() -> OpenMP | None:
    """The OpenMP runtime that torch brought into this process, or None (no torch, a forked child, not Linux)."""
    global _runtime, _searched_with_torch
    if _runtime is None and _usable and not _searched_with_torch and "torch" in sys.modules:
        _searched_with_torch = True
        library = _find()
        if library is not None:
            _runtime = OpenMP(library)
    return _runtime


def _find() -> ctypes.CDLL | None:
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    # torch's own copy first: it is the one whose threads are warm.
    for path in sorted(paths, key=lambda p: "/torch/" not in p):
        if os.path.basename(path).startswith(_LIBRARIES):
            library = ctypes.CDLL(path)
            if hasattr(library, "GOMP_parallel"):
                return library
    return None


def _forget() -> None:
    """A forked child has none of the runtime's threads, and the runtime would wait for them forever."""
    global _runtime, _usable
    _runtime, _usable = None, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
