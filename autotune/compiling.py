"""Compiling ahead: worker processes fill the kernels' disk cache while the GPU measures.

A config of a GPU kernel takes 0.1 to 1 second to compile, and milliseconds to measure. The workers are interpreters of
their own, started with ``python -m autotune.compiling``: nothing is forked, so no CUDA context is copied, and the
caller's main module is not imported again, as `multiprocessing` would do. They need neither GPU nor driver, since they
are told the facts of the device. A compiler that crashes takes a worker with it, not the tuner.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import msgspec

from autotune.space import Candidate, LayerProblem
from numbasparse.kernels import KERNELS, CudaKernel
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_MOST_WORKERS = 12  # each holds a compiler: about 200 MB


class Compilers:
    """Worker processes, started when they are needed; a context manager.

    Parameters
    ----------
    device
        The GPU to compile for.
    workers
        How many; None leaves one core to the measuring process.
    """

    def __init__(self, device: cuda.Device, workers: int | None = None) -> None:
        self._device = device
        self._workers = min(_usable_cores() - 1, _MOST_WORKERS) if workers is None else workers
        self._threads = ThreadPoolExecutor(max(1, self._workers), thread_name_prefix="compile")
        self._own = threading.local()
        self._processes: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="numbasparse-weights-")
        self._futures: dict[tuple[Any, ...], Future[str | None]] = {}

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()

    def submit(self, problem: LayerProblem, candidates: Sequence[Candidate]) -> None:
        """Compile these in the background; those that were submitted before are not compiled again."""
        if self._workers < 1:
            return
        for candidate in candidates:
            key = (*problem.identity, candidate.key)
            if key not in self._futures and isinstance(KERNELS[candidate.kernel], CudaKernel):
                task = self._task(problem, candidate)
                self._futures[key] = self._threads.submit(self._run, task)

    def wait(self, problem: LayerProblem, candidate: Candidate) -> str | None:
        """Wait until a candidate is compiled, if it was submitted; the reason if the compiler crashed over it.

        Other failures are no reason: whoever prepares the candidate meets them with their full text.
        """
        future = self._futures.get((*problem.identity, candidate.key))
        return None if future is None else future.result()

    def forget(self, problem: LayerProblem) -> None:
        """Leave out what of a problem no worker has begun: the next one's would wait behind it."""
        own = [key for key in self._futures if key[:-1] == problem.identity]
        for key in own:
            if self._futures[key].cancel():
                del self._futures[key]

    def _task(self, problem: LayerProblem, candidate: Candidate) -> str:
        path = Path(self._folder.name, problem.weight.fingerprint)
        if not path.exists():
            problem.weight.save(path)
        task = {
            "weight": str(path),
            "spec": problem.spec.to_dict(),
            "activation": problem.activation or "none",
            "kernel": candidate.kernel,
            "config": candidate.config,
        }
        return json.dumps(task)

    def _run(self, task: str) -> str | None:
        """In a thread, which has a worker of its own: hand it the task, wait for its answer."""
        worker: subprocess.Popen[str] | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(task + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except OSError:
            answer = ""
        if answer:
            return None
        self._own.worker = None
        return f"its compilation ended a worker process with status {worker.wait()}"

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "autotune.compiling", json.dumps(msgspec.to_builtins(self._device))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._processes.append(process)
        return process


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- in a worker --------------------------------------------------------------------------------------------


def compile_candidate(task: dict[str, Any], weight: SparseWeight) -> None:
    """Put the machine code of a candidate into the disk cache."""
    kernel = KERNELS[task["kernel"]]
    assert isinstance(kernel, CudaKernel)
    for ptx in kernel.ptx(ConvSpec.from_dict(task["spec"]), weight, task["config"], task["activation"]):
        cuda.assemble(ptx)


def _answer(tasks: IO[str], answers: IO[str]) -> None:
    weights: dict[str, SparseWeight] = {}
    for line in tasks:
        task = json.loads(line)
        if task["weight"] not in weights:
            weights = {task["weight"]: SparseWeight.load(task["weight"])}
        failed = None
        try:
            compile_candidate(task, weights[task["weight"]])
        except Exception as error:  # the tuner meets it again, with all that it can do about it
            failed = f"{type(error).__name__}: {error}"
        answers.write(json.dumps({"failed": failed}) + "\n")
        answers.flush()


def _main() -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with cuda.assumed(msgspec.convert(json.loads(sys.argv[1]), cuda.Device)):
        _answer(sys.stdin, answers)


if __name__ == "__main__":
    _main()
