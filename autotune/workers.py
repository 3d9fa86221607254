"""Several processes of this machine that tune together: each runs the same command on its own GPU or cores.

They meet in the storage alone (`autotune.study`), so that any of them may die: the others measure what it left, and the
last to look exports everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

VARIABLE = "NUMBASPARSE_WORKER"
"""Environment variable that tells a process which worker it is: "number/count"."""


@dataclass(frozen=True)
class Place:
    """Where one worker runs: on a GPU (its number as the driver counts), or on some cores."""

    gpu: str | None
    cores: frozenset[int]


def own_number() -> tuple[int, int]:
    """Number of this process among its workers, and their count; (0, 1) if it is alone.

    Raises
    ------
    ValueError
        If the environment variable holds something else than "number/count".
    """
    text = os.environ.get(VARIABLE, "0/1")
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"{VARIABLE} must be 'number/count' with number < count, got {text!r}")
    return int(number), int(count)


def places(kind: str, count: int, threads: int | None) -> list[Place]:
    """A place for each worker: one GPU each, or ``threads`` cores each, which no other has.

    Raises
    ------
    ValueError
        If there are not as many, or on a CPU ``threads`` is not given: workers that share cores would disturb each
        other's times.
    """
    cores = sorted(_cores())
    if kind == "cuda":
        gpus = _gpus()
        if count > len(gpus):
            raise ValueError(f"{count} workers need {count} GPUs, one each; this process sees {len(gpus)}")
        return [Place(gpu, frozenset(cores)) for gpu in gpus[:count]]
    if threads is None or count * threads > len(cores):
        wanted = "a number of threads" if threads is None else f"{count} x {threads} cores"
        raise ValueError(
            f"{count} workers on a CPU need {wanted}, as times of workers that share cores mean nothing; this process "
            f"has {len(cores)} cores: give threads of at most {len(cores) // count} or fewer workers"
        )
    return [Place(None, frozenset(cores[i * threads : (i + 1) * threads])) for i in range(count)]


def run_together(command: Sequence[str], where: Sequence[Place]) -> list[int]:
    """Run a command once in every place at the same time; returns the exit statuses, negative for a signal.

    An interrupt ends all of them.
    """
    processes = [_start(command, number, len(where), place) for number, place in enumerate(where)]
    try:
        return [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise


def _start(command: Sequence[str], number: int, count: int, place: Place) -> subprocess.Popen[bytes]:
    own = {VARIABLE: f"{number}/{count}"} | ({} if place.gpu is None else {"CUDA_VISIBLE_DEVICES": place.gpu})
    before = _cores()
    # A child inherits the cores that its parent may use when it starts: so they are its own from the first import on.
    _use(place.cores)
    try:
        return subprocess.Popen(list(command), env=os.environ | own)
    finally:
        _use(before)


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _use(cores: frozenset[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def this_command() -> list[str]:
    """The command that this process runs, without the option ``--workers``."""
    arguments, skipped = [], False
    for argument in sys.argv[1:]:
        if skipped or argument.startswith("--workers="):
            skipped = False
        elif argument == "--workers":
            skipped = True
        else:
            arguments.append(argument)
    return [sys.executable, "-m", "numbasparse", *arguments]
