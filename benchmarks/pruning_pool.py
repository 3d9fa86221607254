"""Many training jobs on all GPUs of a machine, within a given time; every result is written as it comes."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from numbasparse.files import write_whole

Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Job:
    """One unit of work: ``function(job, device, emit)`` computes rows and hands each to ``emit``.

    Jobs go to other processes: the function must be one of a module, the parameters plain values. A job waits for those
    named by ``after`` to end, as far as they are to do at all.
    """

    name: str
    function: Callable[[Job, torch.device, Emit], None]
    parameters: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


class Results:
    """A results file, written whole after every row.

    Rows of an earlier run are kept. A job that ended well is listed under ``done`` and is not run again; rows of
    one that did not are dropped when it starts anew.

    Parameters
    ----------
    path : Path
        Where to write.
    run : dict
        Describes this run (device, versions, settings); appended to the file's ``runs``.
    earlier : Path, optional
        Read instead if there is nothing at ``path`` yet.
    """

    def __init__(self, path: Path, run: Row, earlier: Path | None = None) -> None:
        self.path = path
        source = next((p for p in (path, earlier) if p is not None and p.exists()), None)
        content: Row = json.loads(source.read_text()) if source else {}
        self.runs: list[Row] = [*content.get("runs", []), run]
        self.rows: list[Row] = content.get("rows", [])
        self.done: dict[str, float] = content.get("done", {})
        self.errors: dict[str, str] = {}

    def start(self, job: Job) -> None:
        self.rows = [row for row in self.rows if row["job"] != job.name]

    def row(self, job: Job, row: Row) -> None:
        self.rows.append({"job": job.name, "run": len(self.runs) - 1, **row})
        self.write()

    def finish(self, job: Job, seconds: float) -> None:
        self.done[job.name] = seconds
        self.write()

    def fail(self, job: Job, error: str) -> None:
        self.errors[job.name] = error
        self.write()

    def write(self) -> None:
        content = {"runs": self.runs, "rows": self.rows, "done": self.done, "errors": self.errors}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())


def _work(device: str, parent: Connection) -> None:
    """Do the jobs that come until None comes; an exception ends a job, not the worker."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.set_num_threads(4)
        torch.cuda.set_device(where)
        torch.backends.cudnn.benchmark = True
    while (job := parent.recv()) is not None:
        try:
            job.function(job, where, lambda row: parent.send(("row", row)))
            message = ("done", None)
        except Exception:
            message = ("error", traceback.format_exc())
        if where.type == "cuda":
            # After a fault on the device every later call fails: then this raises, and the process ends.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        parent.send(message)


class _Worker:
    """A process on a device, and the job that it does."""

    def __init__(self, device: str) -> None:
        context = mp.get_context("spawn")
        self.device = device
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(device, theirs), daemon=True)
        self.process.start()
        # With our copy of its end closed, the death of the process ends the pipe.
        theirs.close()
        self.job: Job | None = None
        self.began = 0.0

    def give(self, job: Job | None) -> None:
        self.job, self.began = job, time.monotonic()
        self.pipe.send(job)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()


class Pool:
    """Runs jobs in their order, one worker for each entry of ``devices``, until all have ended or time is up.

    When time is up the workers are stopped where they are; what they emitted is kept. A worker that dies is
    replaced, and its job counts as failed.
    """

    def __init__(self, devices: Sequence[str], results: Results, seconds: float) -> None:
        self.results = results
        self.end = time.monotonic() + seconds
        self.workers = [_Worker(device) for device in devices]
        self.todo: list[Job] = []
        self.total = 0

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Return the names of jobs that did not end well: failed, stopped or never begun."""
        self.todo = [job for job in jobs if job.name not in self.results.done]
        self.total = len(self.todo)
        self._say(f"{self.total} jobs to do of {len(jobs)}, {len(self.workers)} workers")
        for worker in self.workers:
            self._next(worker)
        while any(worker.job for worker in self.workers) and time.monotonic() < self.end:
            for pipe in wait([worker.pipe for worker in self.workers if worker.job], timeout=1.0):
                self._hear(next(worker for worker in self.workers if worker.pipe is pipe))
        for worker in self.workers:
            worker.stop()
        left = [job.name for job in jobs if job.name not in self.results.done]
        self._say(f"{len(jobs) - len(left)} of {len(jobs)} jobs done; not done: {', '.join(left) or 'none'}")
        return left

    def _next(self, worker: _Worker) -> None:
        """Give a worker that is free the first job that need not wait, if there is one."""
        worker.job = None
        unfinished = {job.name for job in self.todo} | {other.job.name for other in self.workers if other.job}
        job = next((job for job in self.todo if unfinished.isdisjoint(job.after)), None)
        if job is not None:
            self.todo.remove(job)
            self.results.start(job)
            worker.give(job)

    def _hear(self, worker: _Worker) -> None:
        """Take one message of a worker."""
        job = worker.job
        assert job is not None
        try:
            kind, value = worker.pipe.recv()
        except EOFError:
            worker.process.join(timeout=10)
            kind, value = "error", f"the worker ended with exit code {worker.process.exitcode}"
            self.workers[self.workers.index(worker)] = worker = _Worker(worker.device)
        if kind == "row":
            self.results.row(job, value)
            self._say(job.name, *(f"{k}={v}" for k, v in value.items() if not isinstance(v, (list, dict))))
            return
        if kind == "done":
            seconds = round(time.monotonic() - worker.began, 1)
            self.results.finish(job, seconds)
            self._say(job.name, f"done in {seconds} s on {worker.device}")
        else:
            self.results.fail(job, value)
            self._say(job.name, "FAILED:", value)
        worker.job = None
        for free in [other for other in self.workers if not other.job]:
            self._next(free)

    def _say(self, *words: str) -> None:
        print(f"[{len(self.todo)} waiting, {self.end - time.monotonic():.0f} s left]", *words, flush=True)
