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

from numbasparse.codegen.jit import compile_c
from numbasparse.codegen.simd import (
    atomic_load,
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
    fetch_add(control + _FINISHED, 1)
    members = call_0(load_i64(control + _HOST + 8), ()) & 0xFFFFFFFF
    spins = 0
    while atomic_load(control + _FINISHED) < members:
        relax()
        spins += 1
        if spins > _SPINS:
            # Sleep, not sched_yield: a fair scheduler gives the core straight back after a yield.
            call_1(load_i64(control + _HOST + 16), (_NAP_MICROSECONDS,))
    if thread == 0:
        # Nobody claims units any more: the next call finds zeros, and its caller need not write them.
        for t in range(load_i64(control + _JOB + 32)):
            store_i64(control + _COUNTERS + LINE * t, 0)


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
        self._sched_getcpu = ctypes.CDLL(None).sched_getcpu
        self._caller = _Caller()

    def run(self, entry: int, params: int, x: int, y: int, bias: int, threads: int, workspace: int) -> None:
        """Run a kernel's entry on up to ``threads`` threads; returns when the result is complete."""
        caller = self._caller
        caller.reserve(threads, workspace)
        words = caller.words
        if words[_HOST // 8] == 0:
            words[_HOST // 8 : _HOST // 8 + len(self._host)] = self._host
        words[0:7] = [entry, params, x, y, threads, self._sched_getcpu(), bias]
        words[_FINISHED // 8] = 0
        self._parallel(self._region.address, caller.control, threads, 0)


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
