"""Vector code by itself, and the cache of compiled code."""

from __future__ import annotations

import ctypes
import itertools
import pathlib
import re
import warnings
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from conftest import Guarded
from numba.core.ccallback import CFunc

from numbasparse.codegen import jit, simd
from numbasparse.codegen.jit import Code, cache_directory, compile_c
from numbasparse.codegen.simd import (
    PACK_SIGNATURE,
    PackedLayout,
    atomic_load,
    atomic_store,
    call_address,
    compare_exchange,
    fetch_add,
    load_i32,
    load_i64,
    mask_length,
    pack_function,
    prefetch,
    relax,
    store_i64,
)


def call(code: Code, *args: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(args))(code.address)(*args)


# --- packing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "chunk", "stride"),
    [(4, 4, 1), (8, 8, 1), (16, 16, 1), (8, 2, 1), (8, 4, 2), (16, 16, 2), (8, 8, 3), (16, 4, 4), (4, 2, 5)],
)
@pytest.mark.parametrize("at", ["start", "end"])
def test_pack_reads_nothing_outside(lanes: int, chunk: int, stride: int, at: str) -> None:
    """Runs start before the row, within it, and end behind it; the row's neighbours are forbidden memory."""
    displacements = (0, 4, 4 * stride * chunk)
    layout = PackedLayout(tuple(displacements), tuple(range(len(displacements))), len(displacements))
    code = compile_c(pack_function(lanes, chunk, stride, layout), PACK_SIGNATURE, f"test{lanes, chunk, stride}")
    width, runs, length = 29, lanes // chunk, mask_length(chunk, stride)
    channels, rows = np.array([2, 0], np.int32), 2
    memory = Guarded((3, width), at)
    x = memory.array
    x[...] = np.random.default_rng(0).standard_normal(x.shape)
    step = stride if stride > 2 else 1
    for first in range(-chunk * stride - 3, width + 2):
        starts = [[first + 5 * run + row for run in range(runs)] for row in range(rows)]
        masks = np.zeros((rows, runs, 3, length), np.int32)
        table = np.zeros((rows, runs, 2), np.int64)
        expected = np.zeros((2, rows, 3, lanes), np.float32)
        for row, run in itertools.product(range(rows), range(runs)):
            start = starts[row][run]
            table[row, run] = 4 * start, masks[row, run].ctypes.data
            for i, d in enumerate(displacements):
                place = start + d // 4 + step * np.arange(length)
                masks[row, run, i] = np.where((place >= 0) & (place < width), -1, 0)
                place = start + d // 4 + stride * np.arange(chunk)
                inside = (place >= 0) & (place < width)
                for c, channel in enumerate(channels):
                    values = np.where(inside, x[channel, np.clip(place, 0, width - 1)], 0)
                    expected[c, row, i, run * chunk : (run + 1) * chunk] = values
        packed = Guarded((2 + 1, rows, 3, lanes), "end")
        packed.array[...] = np.nan
        channel_bytes = rows * 3 * lanes * 4
        call(
            code,
            packed.array.ctypes.data,
            x.ctypes.data,
            channels.ctypes.data,
            2,
            4 * width,
            table.ctypes.data,
            rows,
            channel_bytes,
        )
        np.testing.assert_array_equal(packed.array[:2], expected)
        assert np.isnan(packed.array[2]).all()
        packed.check()


# --- scalars, atomics, calls -----------------------------------------------------------------------------------

_call_2 = call_address(2)


def _scalars(a: int, compare: int) -> None:
    store_i64(a + 8, load_i64(a) + load_i32(a + 4))
    store_i64(a + 16, fetch_add(a + 24, 5))
    store_i64(a + 32, compare_exchange(a + 40, 7, 70))
    store_i64(a + 48, compare_exchange(a + 56, 7, 70))
    atomic_store(a + 64, atomic_load(a + 24) * 2)
    store_i64(a + 72, _call_2(compare, (3, 4)))
    relax()
    prefetch(a)
    prefetch(0)  # an address that does not exist is ignored


def test_scalars_and_atomics() -> None:
    words = np.zeros(10, np.int64)
    words[0], words[3], words[5], words[7] = -3, 10, 7, 8
    product = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(lambda p, q: p * q)
    address = ctypes.cast(product, ctypes.c_void_p).value
    assert address is not None
    call(compile_c(_scalars, "void(int64, int64)", "test"), words.ctypes.data, address)
    assert words.tolist() == [-3, -4, 10, 15, 7, 70, 8, 8, 30, 12]


# --- the cache -------------------------------------------------------------------------------------------------


def _add_one(address: int) -> None:
    store_i64(address, load_i64(address) + 1)


def run_add_one(key: str = "key") -> None:
    word = np.array([41], np.int64)
    call(compile_c(_add_one, "void(int64)", key), word.ctypes.data)
    assert word[0] == 42


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever something is really compiled."""
    seen: list[str] = []
    original = CFunc._compile_uncached

    def counted(self: Any) -> Any:
        seen.append(self.__name__)
        return original(self)

    monkeypatch.setattr(CFunc, "_compile_uncached", counted)
    return seen


def test_cache_hits(cache: pathlib.Path, compiled: list[str]) -> None:
    run_add_one()
    run_add_one()
    assert len(compiled) == 1
    run_add_one("another")
    assert len(compiled) == 2
    assert len(list(cache.iterdir())) == 2
    assert {p.suffix for p in cache.iterdir()} == {".nbc"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "short", "directory"])
def test_damaged_cache_is_compiled_again(cache: pathlib.Path, compiled: list[str], damage: str) -> None:
    run_add_one()
    (file,) = cache.iterdir()
    payload = bytearray(file.read_bytes())
    payload[-10] ^= 1
    if damage == "directory":
        file.unlink()
        file.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_add_one()
        assert len(compiled) == 2
        return
    contents = {"flip": bytes(payload), "truncate": bytes(payload[:-1]), "empty": b"", "short": bytes(payload[:20])}
    file.write_bytes(contents[damage])
    run_add_one()
    assert len(compiled) == 2
    run_add_one()
    assert len(compiled) == 2, "the damaged file was not replaced"


def test_unwritable_cache_warns_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, compiled: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(jit, "_warned_unwritable", False)
    with pytest.warns(RuntimeWarning, match="cannot write the kernel cache .*set NUMBASPARSE_CACHE_DIR"):
        run_add_one()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_add_one()
    assert len(compiled) == 2


def test_changed_sources_miss(cache: pathlib.Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_add_one()
    monkeypatch.setattr(jit, "source_digest", lambda: "changed")
    run_add_one()
    assert len(compiled) == 2


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", "/somewhere")
    assert cache_directory() == pathlib.Path("/somewhere")
    monkeypatch.delenv("NUMBASPARSE_CACHE_DIR")
    assert "numbasparse" in cache_directory().parts


def test_second_process_does_not_compile(tmp_path: pathlib.Path, run_python) -> None:  # type: ignore[no-untyped-def]
    code = """
import numpy as np
from numba.core.ccallback import CFunc
import numbasparse
compiled, original = [], CFunc._compile_uncached
def counted(self):
    compiled.append(1)
    return original(self)
CFunc._compile_uncached = counted
numbasparse.set_num_threads(2)
w = numbasparse.SparseWeight.from_dense(np.ones((2, 3, 3, 3), np.float32))
for config in ("cpu_direct", "cpu_direct"):
    y = numbasparse.conv2d(np.ones((1, 3, 9, 9), np.float32), w, config=config)
    assert (y == 27).all() and y.shape == (1, 2, 7, 7)
print(len(compiled))
"""
    first, second = (int(run_python(code, NUMBASPARSE_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert first > 0
    assert second == 0


@pytest.mark.parametrize("entries", ["wide", "coded", "scaled"])
def test_the_row_kernel_compiles_to_arm_vectors(
    entries: simd.Entries, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four lanes become NEON multiply-adds; the code is generated here, and run nowhere."""
    # Code read back from the disk cache carries no LLVM text: compile it anew.
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", str(tmp_path))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no Arm target")
    kernels = [
        simd.RowKernel(4, 4, 2, tuple(range(0, 256, 32)), 4, 8, 1, True, "relu", start, finish, entries=entries)
        for start, finish in (("bias", "store"), ("bias", "spill"), ("resume", "spill"), ("resume", "store"))
    ]
    code = jit.compile_c(simd.rows_function(kernels), simd.ROWS_SIGNATURE, f"for Arm, {entries}")
    text = code.owner._library.get_llvm_str()
    text = re.sub(r"^target (triple|datalayout).*$", "", text, flags=re.MULTILINE)
    module = llvm.parse_assembly(f'target triple = "aarch64-unknown-linux-gnu"\n{text}')
    assembly = target.create_target_machine(cpu="cortex-a72").emit_assembly(module)
    assert assembly.count("fmla\tv") >= 8 * len(kernels)
