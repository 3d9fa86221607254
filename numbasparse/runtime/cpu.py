"""The CPU as a device: vector width, caches, thread count, and `run`, which brings a kernel to its threads."""

from __future__ import annotations

import functools

import numpy as np

from numbasparse.runtime import openmp
from numbasparse.runtime.openmp import SERIES_WORDS, series_states
from numbasparse.runtime.team import ENTRY_SIGNATURE, MAX_THREADS, next_unit, team

__all__ = [
    "ENTRY_SIGNATURE",
    "MAX_THREADS",
    "SERIES_WORDS",
    "cache_bytes",
    "get_num_threads",
    "next_unit",
    "processor_name",
    "run",
    "run_series",
    "series_states",
    "set_num_threads",
    "vector_lanes",
    "vector_registers",
]


@functools.cache
def vector_lanes() -> int:
    """float32 lanes of the widest vector that the host runs well: 16 (AVX-512), 8 (AVX2 with FMA) or 4."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl") and features.get("avx512dq"):
        return 16
    if features.get("avx2") and features.get("fma"):
        return 8
    return 4


@functools.cache
def vector_registers() -> int:
    """Architectural vector registers at `vector_lanes` width."""
    import platform

    return 32 if vector_lanes() == 16 or platform.machine().lower() in ("aarch64", "arm64") else 16


@functools.cache
def cache_bytes() -> tuple[int, int]:
    """Bytes of a core's L1 data and L2 cache (32 KiB and 1 MiB where the system does not say)."""
    sizes = {}
    for index in range(5):
        base = f"/sys/devices/system/cpu/cpu0/cache/index{index}/"
        try:
            with open(base + "type") as kind, open(base + "level") as level, open(base + "size") as size:
                if kind.read().strip() in ("Data", "Unified"):
                    sizes[int(level.read())] = int(size.read().strip().rstrip("K")) * 1024
        except (OSError, ValueError):
            continue
    return sizes.get(1, 32 << 10), sizes.get(2, 1 << 20)


@functools.cache
def processor_name() -> str:
    """Marketing name of the processor, as the system tells it."""
    import platform

    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


_threads: int | None = None


def set_num_threads(count: int) -> None:
    """Set how many threads calls with NumPy arrays use (torch callers use ``torch.get_num_threads()``)."""
    global _threads
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_THREADS:
        raise ValueError(f"expected a thread count from 1 to {MAX_THREADS}, got {count!r}")
    _threads = count


def get_num_threads() -> int:
    """Threads for NumPy callers: `set_num_threads`, else numba's ``NUMBA_NUM_THREADS`` (all usable cores)."""
    return _threads if _threads is not None else _default_threads()


@functools.cache
def _default_threads() -> int:
    from numba.core import config

    return max(1, min(int(vars(config)["NUMBA_NUM_THREADS"]), MAX_THREADS))


def run(entry: int, params: int, x: int, y: int, bias: int, threads: int, workspace: int) -> None:
    """Run a kernel's entry on up to ``threads`` threads, each with ``workspace`` bytes of scratch.

    Where an OpenMP runtime is loaded (torch brings one), its threads are used: they may spin for milliseconds
    after an operation of torch, and a second team beside them would fight for the same cores.  Elsewhere the
    package's own `team` runs the kernel.  Returns when the result is complete; safe from any thread.
    """
    if threads > 1:
        runtime = openmp.loaded()
        if runtime is not None:
            runtime.run(entry, params, x, y, bias, threads, workspace)
            return
    team().run(entry, params, x, y, bias, threads, workspace)


def run_series(table: np.ndarray, states: np.ndarray, threads: int, workspace: int) -> None:
    """Run jobs one after the other, each on the results of those before, as `run` would run each.

    Parameters
    ----------
    table : int64, (jobs, SERIES_WORDS)
        Entry, params, x, y and bias of each.
    states : int64
        A fresh copy of what `series_states` gave for so many jobs and threads.
    """
    runtime = openmp.loaded() if threads > 1 else None
    if runtime is not None:
        runtime.run_series(table.ctypes.data, len(table), states.ctypes.data, threads, workspace)
        return
    for entry, params, x, y, bias in table[:, :5].tolist():
        team().run(entry, params, x, y, bias, threads, workspace)
