"""Fixtures: memory with guard pages, a fresh interpreter, the package's own threads."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numbasparse.kernels import KERNELS
from numbasparse.runtime import cuda, openmp

ROOT = Path(__file__).resolve().parent.parent
_PAGE = mmap.PAGESIZE
_SENTINEL = 0xA5


class Guarded:
    """A C-ordered array between two pages that no one may touch.

    It lies at the ``"start"`` of its pages or at their ``"end"``: there the next byte is forbidden and the process
    dies at once. The bytes left over on the other side hold a sentinel, which `check` looks at.
    """

    def __init__(self, shape: tuple[int, ...], at: str, dtype: str = "float32") -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pages = -(-size // _PAGE)
        region = mmap.mmap(-1, (pages + 2) * _PAGE)
        self._inside = np.frombuffer(region, np.uint8)[_PAGE:-_PAGE]
        self._inside[:] = _SENTINEL
        first = 0 if at == "start" else pages * _PAGE - size
        self._outside = (slice(0, first), slice(first + size, None))
        self.array = self._inside[first : first + size].view(dtype).reshape(shape)
        if os.name == "posix":
            libc = ctypes.CDLL(None, use_errno=True)
            begin = self._inside.ctypes.data
            for address in (begin - _PAGE, begin + pages * _PAGE):
                assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), 0) == 0

    def check(self) -> None:
        """Assert that nothing around the array was written."""
        for outside in self._outside:
            assert (self._inside[outside] == _SENTINEL).all(), "bytes beside the array were overwritten"


@pytest.fixture(scope="session")
def guarded() -> type[Guarded]:
    return Guarded


@pytest.fixture(autouse=True)
def kernels_in_order() -> Iterator[None]:
    """The table's order is the order of preference; a test that took a kernel out would put it back at the end."""
    before = dict(KERNELS)
    yield
    if list(KERNELS) != list(before):
        KERNELS.clear()
        KERNELS.update(before)


@pytest.fixture
def own_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide torch's OpenMP runtime, so that several threads means the package's own team."""
    monkeypatch.setattr(openmp, "loaded", lambda: None)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run code in a new interpreter; returns what it printed. A failure or any word on stderr fails the test."""

    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            # Python 3.12 warns of every fork in a process with threads; the tests fork on purpose.
            [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", code],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"exit {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    return run


@pytest.fixture
def strict() -> Iterator[None]:
    """No TF32 in torch's own convolutions."""
    import torch

    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture
def a_hopper() -> Iterator[None]:
    """An H100 to think of where there is none."""
    if cuda.reason_unavailable() is None and cuda.current().capability == (9, 0):
        yield
    else:
        with cuda.assumed((9, 0)):
            yield
