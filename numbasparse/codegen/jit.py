"""Compile numba functions to C function pointers, cached on disk under a key that we choose.

numba's own ``cache=True`` hashes the pickled closure of a function, and pickled intrinsics differ from
process to process, so a kernel made by a factory would never be found again.  Here the caller names what the
code depends on (its tile parameters); the key adds our sources, the versions and the processor.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core import serialize, sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult

from numbasparse.files import write_whole

_PACKAGE = Path(__file__).resolve().parent.parent
# Rooms whose text ends up in machine code: a change in any of them makes every cached object stale.
_SOURCES = ("codegen", "kernels", "runtime")

# Inline assembly (pause, address barriers) needs the assembler's parser, which numba leaves out.
llvmlite.binding.initialize_native_asmparser()

_compile_lock = threading.RLock()
_warned_unwritable = False


def cache_directory() -> Path:
    """Directory of the compiled code: ``$NUMBASPARSE_CACHE_DIR``, else the platform's user cache."""
    chosen = os.environ.get("NUMBASPARSE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("numbasparse", appauthor=False)) / "kernels"


@functools.cache
def source_digest() -> str:
    """Hex digest over the text of every module that takes part in code generation."""
    digest = hashlib.sha256()
    for room in _SOURCES:
        for path in sorted((_PACKAGE / room).glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _ObjectCache(NullCache):
    """One file of object code per key; anything unreadable is compiled again, never trusted."""

    def __init__(self, key: str) -> None:
        self._key = key

    def _path(self, sig: Any, codegen: Any) -> Path:
        facts = (
            self._key,
            str(sig),
            codegen.magic_tuple(),
            numba.__version__,
            llvmlite.__version__,
            sys.version_info[:3],
            source_digest(),
        )
        return cache_directory() / (hashlib.sha256(repr(facts).encode()).hexdigest() + ".nbc")

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        body = read_cached(self._path(sig, target_context.codegen()))
        return None if body is None else CompileResult._rebuild(target_context, *pickle.loads(body))

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        write_cached(self._path(sig, data.codegen), serialize.dumps(data._reduce()))


def read_cached(path: Path) -> bytes | None:
    """What `write_cached` put there; None where there is nothing, or nothing whole."""
    try:
        payload = path.read_bytes()
    except OSError:
        return None
    digest, body = payload[:32], payload[32:]
    return body if hashlib.sha256(body).digest() == digest else None


def write_cached(path: Path, body: bytes) -> None:
    """Write a file of the cache; one that cannot be written costs time, so it warns once and goes on."""
    global _warned_unwritable
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        if not _warned_unwritable:
            _warned_unwritable = True
            warnings.warn(
                f"cannot write the kernel cache {path.parent} ({error.strerror}): kernels are compiled again in "
                "every process; set NUMBASPARSE_CACHE_DIR to a writable directory",
                RuntimeWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class Code:
    """A compiled C function.  The address is valid as long as this object lives."""

    address: int
    owner: CFunc


def compile_c(function: Callable[..., Any], signature: str, key: str) -> Code:
    """Compile ``function`` to a C function pointer.

    Parameters
    ----------
    function
        Python function in numba's nopython subset.  It must not raise.
    signature
        For example ``"void(int64, int64)"``.
    key
        Names everything beside source text, versions and processor that the machine code depends on.

    """
    cfunc: Any = CFunc(
        function,
        sigutils.normalize_signature(signature),
        locals={},
        # numpy's error model: an integer division in an index must not carry a zero check that raises.
        options={"error_model": "numpy", "boundscheck": False},
    )
    cfunc._cache = _ObjectCache(f"{function.__module__}.{function.__qualname__}:{key}")
    with _compile_lock:
        cfunc.compile()
    assert cfunc.address is not None
    return Code(cfunc.address, cfunc)
