"""A team of threads that runs kernels and never waits for a thread that came late.

Why not numba's ``prange`` or OpenMP: both end a parallel region with a barrier over every thread.  After some
milliseconds without work the operating system often wakes the sleeping worker on the very core where the
caller waits for it, and the region lasts until the next scheduler tick (5.8 ms measured with libgomp, torch's
own convolutions included).  Here a worker *joins* a job if it comes in time.  Work is handed out unit by unit,
so the caller never waits for a thread that has not started: at worst it does the work alone.

A worker that wakes on the caller's core (Linux likes to put it there, and it then preempts the caller) moves
itself to another core first.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from numba import njit

from numbasparse.codegen.jit import compile_c
from numbasparse.codegen.simd import (
    atomic_load,
    atomic_store,
    call_address,
    compare_exchange,
    fetch_add,
    load_i64,
    relax,
    store_i64,
)

ENTRY_SIGNATURE = "void(" + ", ".join(["int64"] * 8) + ")"
"""A kernel's entry: (params, x, y, bias, arena, counters, thread, threads); all addresses but the last two."""

LINE = 64
"""Bytes of a cache line: counters of different threads live on different lines."""

MAX_THREADS = 256
_SPIN_SECONDS = 200e-6

# Layout of the control block, in bytes.  One line per group of words with the same writer.
_STATE, _DONE, _SLEEPERS = 0, 64, 128
_JOB = 192  # fn, params, x, y, threads, caller's core, bias
_HOST = 256  # lock, unlock, wait, broadcast, usleep (functions), mutex, condition, spin limit
_MOVE = 320  # sched_getcpu, sched_getaffinity, sched_setaffinity (functions; 0 where there are none)
_ARENAS = 384
_COUNTERS = _ARENAS + 8 * MAX_THREADS
_SIZE = _COUNTERS + LINE * MAX_THREADS

# state = generation << 20 | stop << 18 | open << 17 | joined
_JOINED, _OPEN, _STOP, _GENERATION = (1 << 17) - 1, 1 << 17, 1 << 18, 20

call_0, call_1, call_2 = call_address(0), call_address(1), call_address(2)
call_3, call_8 = call_address(3), call_address(8)


# --- machine code of the team ------------------------------------------------------------------------------


@njit
def this_core(move: int) -> int:
    """Number of the core that runs the caller, -1 where the system does not say."""
    sched_getcpu = load_i64(move)
    return call_0(sched_getcpu, ()) & 0xFFFFFFFF if sched_getcpu != 0 else -1


@njit
def step_aside(move: int, core: int, scratch: int) -> None:
    """If the calling thread runs on ``core``, move it to another; its allowed cores stay as they were.

    ``scratch`` is 256 free bytes for two core masks.
    """
    if core < 0 or this_core(move) != core:
        return
    if call_3(load_i64(move + 8), (0, 128, scratch)) & 0x80000000:
        return
    others = scratch + 128
    for word in range(16):
        bits = load_i64(scratch + 8 * word)
        if word == core // 64:
            bits &= ~(1 << (core % 64))
        store_i64(others + 8 * word, bits)
    call_3(load_i64(move + 16), (0, 128, others))
    call_3(load_i64(move + 16), (0, 128, scratch))


def _worker(control: int, thread: int) -> None:
    seen = 0
    while True:
        spins = 0
        limit = load_i64(control + _HOST + 56)
        state = atomic_load(control + _STATE)
        while True:
            state = atomic_load(control + _STATE)
            if state & _STOP:
                return
            fresh = (state & _OPEN) != 0 and (state >> _GENERATION) != seen
            if fresh and thread < load_i64(control + _JOB + 32):
                # The exchange fails if the job was closed or another began since: the words read are its own.
                if compare_exchange(control + _STATE, state, state + 1) == state:
                    break
                continue
            spins += 1
            if spins > limit:
                _sleep(control, state >> _GENERATION)
                spins = 0
            relax()
        seen = state >> _GENERATION
        job = control + _JOB
        arena = load_i64(control + _ARENAS + 8 * thread)
        step_aside(control + _MOVE, load_i64(job + 40), arena)
        call_8(
            load_i64(job),
            (
                load_i64(job + 8),
                load_i64(job + 16),
                load_i64(job + 24),
                load_i64(job + 48),
                arena,
                control + _COUNTERS,
                thread,
                load_i64(job + 32),
            ),
        )
        fetch_add(control + _DONE, 1)


@njit
def _sleep(control: int, generation: int) -> None:
    host = control + _HOST
    mutex = load_i64(host + 40)
    call_1(load_i64(host), (mutex,))
    fetch_add(control + _SLEEPERS, 1)
    while True:
        state = atomic_load(control + _STATE)
        if state & _STOP or (state >> _GENERATION) != generation:
            break
        call_2(load_i64(host + 16), (load_i64(host + 48), mutex))
    fetch_add(control + _SLEEPERS, -1)
    call_1(load_i64(host + 8), (mutex,))


@njit
def _wake(control: int) -> None:
    host = control + _HOST
    if atomic_load(control + _SLEEPERS) > 0:
        call_1(load_i64(host), (load_i64(host + 40),))
        call_1(load_i64(host + 24), (load_i64(host + 48),))
        call_1(load_i64(host + 8), (load_i64(host + 40),))


def _launch(control: int, entry: int, params: int, x: int, y: int, bias: int, threads: int) -> None:
    job = control + _JOB
    store_i64(job, entry)
    store_i64(job + 8, params)
    store_i64(job + 16, x)
    store_i64(job + 24, y)
    store_i64(job + 32, threads)
    store_i64(job + 40, this_core(control + _MOVE))
    store_i64(job + 48, bias)
    for t in range(threads):
        store_i64(control + _COUNTERS + LINE * t, 0)
    atomic_store(control + _DONE, 0)
    generation = (atomic_load(control + _STATE) >> _GENERATION) + 1
    atomic_store(control + _STATE, (generation << _GENERATION) | _OPEN)
    _wake(control)
    arena = load_i64(control + _ARENAS)
    call_8(entry, (params, x, y, bias, arena, control + _COUNTERS, 0, threads))
    # Every unit is taken: close the job, then wait only for those who joined and still work on their last.
    joined = fetch_add(control + _STATE, -_OPEN) & _JOINED
    spins = 0
    while atomic_load(control + _DONE) != joined:
        relax()
        spins += 1
        if spins > 1000:
            # A joined worker may wait for this very core: let it run.
            call_1(load_i64(control + _HOST + 32), (10,))


def _spin(count: int) -> None:
    for _ in range(count):
        relax()


@njit
def next_unit(counters: int, thread: int, threads: int, units: int) -> int:
    """Claim a unit: first from the thread's own range (its caches know it), then from the others'.

    Returns -1 when all ``units`` are taken.
    """
    for s in range(threads):
        v = (thread + s) % threads
        low = v * units // threads
        high = (v + 1) * units // threads
        unit = low + fetch_add(counters + LINE * v, 1)
        if unit < high:
            return unit
    return -1


# --- the team ------------------------------------------------------------------------------------------------


class Arena:
    """Scratch memory of one thread, page-aligned, grown to the largest need seen."""

    def __init__(self) -> None:
        self.size = 0
        self._memory = np.empty(0, np.uint8)
        self.address = 0

    def reserve(self, size: int) -> int:
        size = max(size, 4096)
        if size > self.size:
            self._memory = np.empty(size + 4096, np.uint8)
            self.address = -(-self._memory.ctypes.data // 4096) * 4096
            self.size = size
        return self.address


def c_function(address: int, count: int) -> Callable[..., None]:
    """ctypes entry of a compiled function of int64 arguments; a call releases the GIL."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(address)


class _Serial(threading.local):
    """What a calling thread needs to run a kernel alone."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.counters = np.zeros(LINE // 8 * 2, np.int64)


def core_functions() -> list[int]:
    """Addresses of sched_getcpu, sched_getaffinity, sched_setaffinity; zeros where the system has none."""
    if not sys.platform.startswith("linux"):
        return [0, 0, 0]
    libc = ctypes.CDLL(None)
    functions = (libc.sched_getcpu, libc.sched_getaffinity, libc.sched_setaffinity)
    return [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions]


class Team:
    """Threads that run kernels together; one job at a time, a second caller runs its job alone.

    Threads spin for 0.2 ms after their last job, then sleep on a condition variable until the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serial = _Serial()
        self._workers: list[threading.Thread] = []
        self._block = np.zeros(_SIZE + LINE, np.uint8)
        self._control = -(-self._block.ctypes.data // LINE) * LINE
        self._arenas: list[Arena] = []
        self._code = [
            compile_c(_launch, "void(int64, int64, int64, int64, int64, int64, int64)", "launch"),
            compile_c(_worker, "void(int64, int64)", "worker"),
            compile_c(_spin, "void(int64)", "spin"),
        ]
        self._launch = c_function(self._code[0].address, 7)
        self._can_thread = self._prepare_host()

    def _prepare_host(self) -> bool:
        """Fill in the C library's functions; False where it has none (then every job runs alone)."""
        libc = ctypes.CDLL(None) if os.name == "posix" else None
        if libc is None:
            return False
        self._mutex = ctypes.create_string_buffer(256)
        self._condition = ctypes.create_string_buffer(256)
        libc.pthread_mutex_init(self._mutex, None)
        libc.pthread_cond_init(self._condition, None)
        names = (
            "pthread_mutex_lock",
            "pthread_mutex_unlock",
            "pthread_cond_wait",
            "pthread_cond_broadcast",
            "usleep",
        )
        words = [ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0 for name in names]
        words += [ctypes.addressof(self._mutex), ctypes.addressof(self._condition), self._spin_limit()]
        for i, word in enumerate(words):
            self._word(_HOST + 8 * i).value = word
        for i, word in enumerate(core_functions()):
            self._word(_MOVE + 8 * i).value = word
        return True

    def _spin_limit(self) -> int:
        spin = c_function(self._code[2].address, 1)
        start = time.perf_counter()
        spin(20_000)
        return max(1, int(_SPIN_SECONDS * 20_000 / max(time.perf_counter() - start, 1e-6)))

    def _word(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._control + offset)

    def run(self, entry: int, params: int, x: int, y: int, bias: int, threads: int, workspace: int) -> None:
        """Run a kernel's entry on up to ``threads`` threads, each with ``workspace`` bytes of scratch.

        Returns when the result is complete.  Safe to call from any thread.
        """
        if threads > 1 and self._can_thread and self._lock.acquire(blocking=False):
            try:
                self._prepare(threads, workspace)
                self._launch(self._control, entry, params, x, y, bias, threads)
            finally:
                self._lock.release()
            return
        self.run_alone(entry, params, x, y, bias, workspace)

    def run_alone(self, entry: int, params: int, x: int, y: int, bias: int, workspace: int) -> None:
        """Run a kernel's entry in the calling thread."""
        serial = self._serial
        arena = serial.arena.reserve(workspace)
        serial.counters[:] = 0
        entry_function(entry)(params, x, y, bias, arena, serial.counters.ctypes.data, 0, 1)

    def _prepare(self, threads: int, workspace: int) -> None:
        for t in range(len(self._arenas), threads):
            self._arenas.append(Arena())
            if t > 0:
                worker = threading.Thread(
                    target=c_function(self._code[1].address, 2),
                    args=(self._control, t),
                    name=f"numbasparse-{t}",
                    daemon=True,
                )
                worker.start()
                self._workers.append(worker)
        for t in range(threads):
            arena = self._arenas[t]
            if arena.size < workspace:
                # Nobody works now: the lock is held and the last job was waited for.
                self._word(_ARENAS + 8 * t).value = arena.reserve(workspace)

    def stop(self) -> None:
        """End the threads (at exit: compiled code must not run while the interpreter frees it)."""
        with self._lock:
            state = self._word(_STATE)
            state.value = ((state.value >> _GENERATION) + 1 << _GENERATION) | _STOP
            if self._workers:
                libc = ctypes.CDLL(None)
                libc.pthread_mutex_lock(self._mutex)
                libc.pthread_cond_broadcast(self._condition)
                libc.pthread_mutex_unlock(self._mutex)
            for worker in self._workers:
                worker.join(timeout=5)
            self._workers.clear()
            self._can_thread = False


@functools.lru_cache(maxsize=4096)
def entry_function(address: int) -> Callable[..., None]:
    return c_function(address, 8)


_team: Team | None = None
_team_lock = threading.Lock()


def team() -> Team:
    """The process's team, made on first use (and made anew in a forked child, which has no threads)."""
    global _team
    if _team is None:
        with _team_lock:
            if _team is None:
                _team = Team()
                atexit.register(_team.stop)
    return _team


def _forget_team() -> None:
    global _team, _team_lock
    if _team is not None:
        atexit.unregister(_team.stop)
    _team, _team_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
