"""Threads: right results from many callers, after fork, with and without torch, and a clean end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from numbasparse import SparseWeight, get_num_threads, plan, set_num_threads
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.plans import Plan
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def problem(c: int = 6, k: int = 8, size: int = 20, threads: int = 3, seed: int = 0) -> tuple[Plan, np.ndarray]:
    rng = np.random.default_rng(seed)
    spec = ConvSpec.create((2, c, size, size), (k, c, 3, 3), 1, 1)
    dense = rng.standard_normal(spec.weight_shape) * (rng.random(spec.weight_shape) < 0.2)
    config = {"lanes": 8, "chunk": 8, "tile": "2x2", "taps": "shifted", "block_kb": 4, "split": 2, "prefetch": "none"}
    made = plan(
        spec,
        SparseWeight.from_dense(dense.astype(np.float32)),
        config={"kernel": "cpu_direct", "config": config},
        threads=threads,
    )
    return made, dense.astype(np.float32)


def right(made: Plan, dense: np.ndarray, seed: int) -> bool:
    x = np.random.default_rng(seed).standard_normal(made.spec.x_shape).astype(np.float32)
    out = np.full(made.spec.out_shape, np.nan, np.float32)
    made(x, out=out)
    return bool(np.abs(out - conv2d_reference(x, dense, None, made.spec)).max() < 1e-4)


@pytest.fixture(params=["openmp", "own"])
def team(request: pytest.FixtureRequest) -> str:
    if request.param == "own":
        request.getfixturevalue("own_team")
    else:
        pytest.importorskip("torch")
    return request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = cpu._threads
    yield
    cpu._threads = before


def test_thread_count(restore_threads: None) -> None:
    assert 1 <= get_num_threads() <= cpu.MAX_THREADS
    set_num_threads(3)
    assert get_num_threads() == 3
    made, _ = problem(threads=3)
    assert plan(made.spec, SparseWeight.from_dense(np.ones(made.spec.weight_shape, np.float32))).threads == 3


@pytest.mark.parametrize("bad", [0, -1, 257, 1.0, "2", None, True])
def test_bad_thread_count(bad: object, restore_threads: None) -> None:
    before = get_num_threads()
    with pytest.raises(ValueError, match="expected a thread count from 1 to 256"):
        set_num_threads(bad)  # type: ignore[arg-type]
    assert get_num_threads() == before
    if bad is not None:
        with pytest.raises(ValueError, match="threads must be from 1 to 256"):
            problem(threads=bad)  # type: ignore[arg-type]


def test_concurrent_calls_of_one_plan(team: str) -> None:
    made, dense = problem()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda seed: right(made, dense, seed), range(160)))


def test_concurrent_calls_of_different_plans(team: str) -> None:
    """Different needs of scratch memory and numbers of threads."""
    several = [problem(3 + i, 4 + 3 * i, 17 + 2 * i, 1 + i % 4, i) for i in range(6)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: right(*several[i % 6], i), range(180)))


def test_short_lived_callers(team: str) -> None:
    made, dense = problem()
    results: list[bool] = []
    for i in range(20):
        caller = threading.Thread(target=lambda i=i: results.append(right(made, dense, i)))  # type: ignore[misc]
        caller.start()
        caller.join()
    assert results == [True] * 20


def test_calls_after_pauses(team: str) -> None:
    """Workers sleep between the calls, or are just about to."""
    rng = np.random.default_rng(0)
    made, dense = problem()
    for i in range(60):
        assert right(made, dense, i)
        time.sleep(float(rng.choice([0, 1e-4, 2e-4, 3e-4, 1e-3, 0.05])))


def test_more_threads_than_work(team: str) -> None:
    spec = ConvSpec(1, 1, 4, 4, 1, 1, 1)
    made = plan(spec, SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32)), config="cpu_pointwise", threads=16)
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    for _ in range(20):
        np.testing.assert_array_equal(made(x), x)


# --- whole processes -------------------------------------------------------------------------------------------

START = """
import os, sys, threading, time
import numpy as np
import numbasparse
numbasparse.set_num_threads(3)
w = np.zeros((8, 6, 3, 3), np.float32); w[:, ::2, 1] = 0.5
weight = numbasparse.SparseWeight.from_dense(w)
x = np.random.default_rng(0).standard_normal((2, 6, 20, 20)).astype(np.float32)
def run():
    return numbasparse.conv2d(x, weight, padding=1, config="cpu_direct")
s = np.pad(x[:, ::2], ((0, 0), (0, 0), (0, 0), (1, 1))).sum(1)
expected = 0.5 * (s[..., :-2] + s[..., 1:-1] + s[..., 2:])[:, None]
def check():
    y = run()
    assert y.shape == (2, 8, 20, 20) and np.abs(y - expected).max() < 1e-5
"""
CHILD = """
child = os.fork()
if child == 0:
    for _ in range(5):
        check()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
check()
"""
IMPORTS = {"own": "", "openmp": "import torch\n"}


@pytest.fixture(params=["own", "openmp"])
def start(request: pytest.FixtureRequest) -> str:
    if request.param == "openmp":
        pytest.importorskip("torch")
    return IMPORTS[request.param] + START


def test_threads_that_are_used(start: str, run_python) -> None:  # type: ignore[no-untyped-def]
    code = f"""{start}
from numbasparse.runtime import openmp, team
check()
time.sleep(0.02)
check()
if "torch" in sys.modules:
    assert (openmp.loaded() is not None) == sys.platform.startswith("linux")
else:
    assert openmp.loaded() is None
    assert sum(t.name.startswith("numbasparse-") for t in threading.enumerate()) == (2 if os.name == "posix" else 0)
print("torch" in sys.modules)
"""
    assert run_python(code) == str("import torch" in start)


def test_exit_right_after_a_call(start: str, run_python) -> None:  # type: ignore[no-untyped-def]
    run_python(f"{start}\nfor _ in range(50): check()\n")


def test_exit_while_another_thread_calls(run_python) -> None:  # type: ignore[no-untyped-def]
    code = f"""{START}
check()
def forever():
    while True:
        run()
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
"""
    run_python(code)


@linux
def test_fork_after_calls(start: str, run_python) -> None:  # type: ignore[no-untyped-def]
    assert run_python(f"{start}\ncheck()\n{CHILD}\nprint('ok', flush=True)") == "ok"


@linux
def test_fork_before_calls(start: str, run_python) -> None:  # type: ignore[no-untyped-def]
    run_python(f"{start}\n{CHILD}")


def test_torch_imported_later(run_python) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torch")
    run_python(f"{START}\ncheck()\nimport torch\ncheck()\ntorch.set_num_threads(2)\ncheck()\n")


def test_thread_count_of_the_environment(run_python) -> None:  # type: ignore[no-untyped-def]
    code = "import numbasparse; print(numbasparse.get_num_threads())"
    assert run_python(code, NUMBA_NUM_THREADS="1") == "1"
