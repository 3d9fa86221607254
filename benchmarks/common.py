"""What every benchmark shares: the environment's description, interleaved timing, and the results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Nothing is mapped for one array (a threshold above 32 MiB would be ignored), and what is freed stays.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 28)}


def fair_malloc() -> None:
    """Start the process anew with a malloc that keeps large blocks.

    Otherwise every large output is fresh memory whose page faults are timed too, on whichever side allocates.
    """
    if any(os.environ.get(name) != value for name, value in _MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})


def environment() -> dict[str, Any]:
    """Device and versions, as every results file carries them."""
    from numbasparse.runtime import cpu

    names = ("numbasparse", "numba", "llvmlite", "numpy", "scipy", "torch", "optuna")
    return {
        "processor": cpu.processor_name(),
        "vector_lanes": cpu.vector_lanes(),
        "cores": os.cpu_count(),
        "l1_l2_bytes": cpu.cache_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "malloc": {name: os.environ.get(name) for name in _MALLOC},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def interleaved(
    functions: dict[Any, Callable[[], Any]], seconds: float, block: int = 4, rounds: int = 5
) -> dict[Any, list[float]]:
    """Time functions in turns: in each round, a short block of calls of each, the first of them untimed.

    Runs for ``seconds``, but at least ``rounds`` rounds.  Returns all times in seconds.
    """
    times: dict[Any, list[float]] = {key: [] for key in functions}
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < seconds:
        for key, function in functions.items():
            function()
            for _ in range(block):
                begin = time.perf_counter()
                function()
                times[key].append(time.perf_counter() - begin)
        done += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in microseconds."""
    ordered = sorted(times)
    quarter = max(1, len(ordered) // 4)
    return {
        "median_us": round(statistics.median(ordered) * 1e6, 2),
        "low_quartile_us": round(ordered[quarter - 1] * 1e6, 2),
        "high_quartile_us": round(ordered[-quarter] * 1e6, 2),
        "min_us": round(ordered[0] * 1e6, 2),
        "count": len(ordered),
    }


def geometric_mean(values: list[float]) -> float:
    """Geometric mean of positive numbers."""
    return statistics.geometric_mean(values)


def write(name: str, content: dict[str, Any]) -> Path:
    """Write a results file beside and rename it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    return path
