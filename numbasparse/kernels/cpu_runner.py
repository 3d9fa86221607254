"""What the CPU kernels' runners have in common: a packed weight as a call of machine code."""

from __future__ import annotations

from abc import abstractmethod

from numbasparse.kernels.base import Runner
from numbasparse.runtime import cpu
from numbasparse.runtime.job import Job


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
            job.run(x, y, bias, threads)
        else:
            cpu.run(self._entry, self._params, x, y, bias, threads, self.workspace)
