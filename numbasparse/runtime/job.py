"""A call of machine code on the CPU: what `numbasparse.runtime.cpu.run` and `run_series` run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from numbasparse.codegen.jit import Code
from numbasparse.runtime import cpu


@dataclass(frozen=True)
class Job:
    """An entry of `numbasparse.runtime.cpu.ENTRY_SIGNATURE` with its parameter block.

    Attributes
    ----------
    code
        Holds the entry.
    words : int64
        The parameter block; what its addresses point to is kept by whoever made it.
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

    def run(self, x: int, y: int, bias: int, threads: int) -> None:
        """Do the work on memory at these addresses."""
        cpu.run(self.code.address, self.params, x, y, bias, threads, self.workspace)

    def add(self, residual: int, y: int) -> None:
        """Say where the residual and the output are."""
        self.words[self.residual_at] = residual - y if self.from_output else residual
