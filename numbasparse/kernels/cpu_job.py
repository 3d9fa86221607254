"""A packed weight on the CPU as a call of machine code: what the CPU kernels' runners have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from numbasparse.codegen.jit import Code
from numbasparse.kernels.base import Runner
from numbasparse.runtime import cpu


@dataclass(frozen=True)
class Job:
    """An entry of `numbasparse.runtime.cpu.ENTRY_SIGNATURE` with its parameter block.

    Attributes
    ----------
    code
        Holds the entry.
    words : int64
        The parameter block; what its addresses point to is kept by the runner.
    workspace
        Scratch bytes of each thread.
    residual_at
        Word that says where the residual is; -1 if the code adds none.
    from_output
        Whether it says so as a distance from the output, not as an address.
    """

    code: Code
    words: np.ndarray
    workspace: int
    residual_at: int = -1
    from_output: bool = False

    @property
    def params(self) -> int:
        """Address of the parameter block."""
        address: int = self.words.ctypes.data
        return address

    def add(self, residual: int, y: int) -> None:
        """Say where the residual and the output are."""
        self.words[self.residual_at] = residual - y if self.from_output else residual


class CpuRunner(Runner):
    """A runner whose work is one `Job`.  Subclasses call ``__init__`` when their parameter block is complete."""

    def __init__(self, plain: Job) -> None:
        self._plain = plain
        self._entry, self._params = plain.code.address, plain.params
        self.workspace = plain.workspace

    @abstractmethod
    def adding(self) -> Job:
        """A job of its own that adds a residual: several threads may call a runner at once."""

    def job(self, residual: bool) -> Job:
        """The work as a job, with a residual to say the place of or without one."""
        return self.adding() if residual else self._plain

    def run(self, x: int, y: int, bias: int, threads: int, residual: int = 0) -> None:
        if residual:
            job = self.adding()
            job.add(residual, y)
            cpu.run(job.code.address, job.params, x, y, bias, threads, self.workspace)
        else:
            cpu.run(self._entry, self._params, x, y, bias, threads, self.workspace)
