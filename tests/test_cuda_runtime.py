"""CUDA as a device, without a GPU: what is compiled, cached, refused, and how a launch passes its arguments."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from strategies import random_weight

from numbasparse.kernels import CudaKernel, kernels_for
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

REASON = cuda.reason_not_compiling()
compiles = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_capability = pytest.mark.parametrize("capability", cuda.CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
without_gpu = pytest.mark.skipif(cuda.reason_unavailable() is None, reason="there is a GPU")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "_ptx", {})
    return tmp_path


def scale(x, y, n):  # type: ignore[no-untyped-def]
    i = numba_cuda.grid(1)
    if i < n:
        y[i] = np.float32(x[i]) * np.float32(2)


def addresses(a, b):  # type: ignore[no-untyped-def]
    pass


def hungry(address, n):  # type: ignore[no-untyped-def]
    own = numba_cuda.local.array(40, np.float32)
    shared = numba_cuda.shared.array(300, np.float32)
    for i in range(40):
        own[i] = np.float32(n * i)
    shared[numba_cuda.threadIdx.x] = own[n % 40]
    numba_cuda.syncthreads()
    for i in range(n):
        own[i % 40] += shared[i]
    shared[numba_cuda.threadIdx.x] = own[address % 40]
    numba_cuda.syncthreads()


numba_cuda: Any = None
if REASON is None:
    numba_cuda = cuda.numba_cuda()

ARRAYS = ("float16[::1]", "float32[::1]", "int64")


def compile_scale(capability: tuple[int, int] = (9, 0), **options: Any) -> cuda.Ptx:
    return cuda.compile_ptx(scale, ARRAYS, "doubles", capability=capability, **{"threads": 128, **options})


# --- PTX -------------------------------------------------------------------------------------------------------


@compiles
@every_capability
def test_compile_and_assemble(capability: tuple[int, int]) -> None:
    ptx = compile_scale(capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx.text
    assert ".visible .entry scale(" in ptx.text
    assert ptx.text.count(".param .u64") == 15
    assert (ptx.entry, ptx.threads, ptx.key, ptx.capability) == ("scale", 128, "doubles", capability)
    cubin = cuda.assemble(ptx)
    assert cubin.image[:4] == b"\x7fELF"
    assert 0 < cubin.registers < 64
    assert (cubin.local_bytes, cubin.shared_bytes) == (0, 0)


@compiles
def test_integers_are_plain_parameters() -> None:
    ptx = cuda.compile_ptx(addresses, 2, "", capability=(8, 0), threads=32)
    header = ptx.text[ptx.text.index(".visible .entry") :]
    assert [line.split()[1] for line in header.splitlines() if ".param" in line] == [".u64", ".u64"]


@compiles
def test_launch_bounds() -> None:
    plain, two, capped = compile_scale(), compile_scale(min_blocks=2), compile_scale(max_registers=32)
    for ptx in (plain, two, capped):
        assert ".maxntid 128" in ptx.text
    assert ".minnctapersm 2" in two.text
    assert ".maxnreg 32" in capped.text
    assert ".minnctapersm" not in capped.text
    assert cuda.assemble(capped).registers <= 32
    assert len({plain.digest, two.digest, capped.digest}) == 3


@compiles
@every_capability
def test_resources_are_told(capability: tuple[int, int]) -> None:
    ptx = cuda.compile_ptx(hungry, 2, "", capability=capability, threads=128)
    cubin = cuda.assemble(ptx)
    assert cubin.shared_bytes == 1200
    assert cubin.local_bytes >= 160


@compiles
def test_refused_ptx() -> None:
    good = compile_scale()
    bad = cuda.Ptx(good.text.replace("ret;", "return;"), "scale", 128, "my config", (9, 0))
    with pytest.raises(cuda.CudaError, match=r"kernel my config cannot be assembled .*(?s:.*)line \d+"):
        cuda.assemble(bad)


@compiles
def test_refused_python() -> None:
    def wrong(x):  # type: ignore[no-untyped-def]
        x.abacus()

    with pytest.raises(cuda.CudaError, match=r"wrong \(my config\) cannot be compiled .* 9\.0: (?s:.*)abacus"):
        cuda.compile_ptx(wrong, 1, "my config", capability=(9, 0), threads=32)


def test_old_gpus() -> None:
    with pytest.raises(cuda.CudaError, match=r"compute capability 7\.0 is not supported, 7\.5"):
        cuda.compile_ptx(addresses, 2, "", capability=(7, 0), threads=32)


# --- caches ----------------------------------------------------------------------------------------------------


@compiles
def test_caches(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_scale()
    assert compile_scale() is first
    image = cuda.assemble(first)
    assert len(list(empty_cache.iterdir())) == 2

    def refuse(*_: Any) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_compile", refuse)
        patch.setattr(cuda, "_link", refuse)
        patch.setattr(cuda, "_ptx", {})
        assert compile_scale() == first
        assert cuda.assemble(first) == image
        for change in ({"threads": 64}, {"capability": (8, 0)}, {"min_blocks": 3}, {"fastmath": False}):
            with pytest.raises(AssertionError, match="made again"):
                compile_scale(**change)
    for path in empty_cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(cuda, "_ptx", {})
    assert compile_scale() == first
    assert cuda.assemble(first) == image


@compiles
def test_ptx_is_the_same_in_every_process(
    run_python: Callable[..., str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys
sys.path.insert(0, "tests")
import test_cuda_runtime as t
t.cuda.compile_ptx(t.addresses, 2, "", capability=(8, 0), threads=32)
print(t.compile_scale().digest)
"""
    assert run_python(code) == compile_scale().digest


# --- devices ---------------------------------------------------------------------------------------------------


@every_capability
def test_assumed(capability: tuple[int, int]) -> None:
    with cuda.assumed(capability) as device:
        assert cuda.current() == device
        assert (device.capability, device.index) == (capability, -1)
        assert 48 << 10 < device.shared_per_block <= device.shared_per_multiprocessor
        with cuda.assumed(device) as again:
            assert again == device
        assert cuda.current() == device


def test_nothing_known() -> None:
    with (
        pytest.raises(ValueError, match=r"expected a compute capability, one of \[\(7, 5\)"),
        cuda.assumed((3, 5)),
    ):
        pass


@compiles
def test_nothing_is_loaded_onto_an_assumed_device() -> None:
    with cuda.assumed((9, 0)), pytest.raises(cuda.CudaError, match=r"kernel doubles .* \(H100\) is only assumed"):
        cuda.load(compile_scale())


@without_gpu
def test_without_gpu() -> None:
    reason = cuda.reason_unavailable()
    assert reason is not None
    assert "the CPU goes on working" in reason
    with pytest.raises(cuda.CudaError, match="torch cannot use CUDA"):
        cuda.current()
    if REASON is None:
        with pytest.raises(cuda.CudaError, match="torch cannot use CUDA"):
            cuda.load(compile_scale())


@pytest.fixture
def fresh_toolchain() -> Iterator[None]:
    cuda._toolchain.cache_clear()
    yield
    cuda._toolchain.cache_clear()


@compiles
@pytest.mark.usefixtures("fresh_toolchain")
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("torch", "torch is not installed: install it with CUDA"),
        ("numba_cuda", r"numba-cuda cannot be imported .*: pip install 'numbasparse\[cuda\]'"),
        ("cuda.bindings.nvjitlink", r"nvjitlink cannot be imported .*: pip install"),
        ("cuda.bindings.nvvm", r"nvvm cannot be imported .*: pip install"),
    ],
)
def test_missing_parts(monkeypatch: pytest.MonkeyPatch, module: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    reason = cuda.reason_unavailable()
    assert reason is not None
    with pytest.raises(cuda.CudaError, match=words):
        raise cuda.CudaError(reason)


@compiles
@pytest.mark.usefixtures("fresh_toolchain")
def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise RuntimeError("libnvvm.so not found\nsearched everywhere")

    monkeypatch.setattr(cuda._bindings("nvvm"), "version", version)
    assert cuda.reason_not_compiling() == (
        "the library nvvm of CUDA is not found (libnvvm.so not found): pip install 'numbasparse[cuda]'"
    )


@compiles
@pytest.mark.parametrize("text", ["Found no NVIDIA driver on your system.", "The NVIDIA driver is too old (12040)."])
def test_words_of_torch(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    import torch

    def init() -> None:
        raise RuntimeError(text + "\nPlease visit a web site.")

    monkeypatch.setattr(torch.cuda, "init", init)
    reason = cuda.reason_unavailable()
    assert reason == f"torch cannot use CUDA ({text.rstrip('.')}): see nvidia-smi; the CPU goes on working"


@compiles
def test_old_driver() -> None:
    cuda._check_driver("13.0")
    cuda._check_driver("14.1")
    with pytest.raises(cuda.CudaError, match=r"the driver knows CUDA up to 12\.8, .*: update .*numba-cuda\[cu12\]"):
        cuda._check_driver("12.8")


def test_cpu_without_cuda(run_python: Callable[..., str]) -> None:
    code = """
import sys
for name in ("numba_cuda", "cuda", "cuda.bindings"):
    sys.modules[name] = None
import numpy as np
import numbasparse
x = np.ones((1, 2, 3, 3), np.float32)
y = numbasparse.conv2d(x, np.ones((4, 2, 3, 3), np.float32))
try:
    numbasparse.plan(numbasparse.ConvSpec.create(x.shape, (4, 2, 3, 3)), numbasparse.SparseWeight.from_dense(
        np.ones((4, 2, 3, 3), np.float32)), device="cuda")
except RuntimeError as error:
    print(y.ravel().tolist(), str(error)[:60])
"""
    assert (
        run_python(code) == "[18.0, 18.0, 18.0, 18.0] device 'cuda' cannot be used: numba-cuda cannot be imported"[:86]
    )


# --- launches, with a driver in the place of the real one ------------------------------------------------------


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201


class FakeDriver:
    CUresult = Result

    def __init__(self, *results: Result) -> None:
        self.results = list(results)
        self.launches: list[tuple[Any, ...]] = []
        self.contexts: list[Any] = []

    def cuLaunchKernel(self, handle: Any, *rest: Any) -> tuple[Result]:
        *sizes, parameters, _ = rest
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
        self.launches.append((handle, *sizes, [pointers[i][0] for i in range(3)]))
        return (self.results.pop(0) if self.results else Result.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: Any) -> tuple[Result]:
        self.contexts.append(context)
        return (Result.CUDA_SUCCESS,)

    def cuGetErrorString(self, code: int) -> tuple[Result, bytes]:
        return Result.CUDA_SUCCESS, b"some words"


def function(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> cuda.Function:
    monkeypatch.setattr(cuda, "_bindings", lambda name: driver)
    made = object.__new__(cuda.Function)
    fields = SimpleNamespace(
        ptx=cuda.Ptx("", "scale", 128, "my config", (9, 0)),
        registers=40,
        _handle="handle",
        _context="context",
        _driver=driver,
        _launch_kernel=driver.cuLaunchKernel,
    )
    vars(made).update(vars(fields))
    return made


def test_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    kernel = function(monkeypatch, driver)
    kernel.launch((5, 6, 7), 128, 1000, 42, (1 << 60, -3, 9))
    kernel.launch((1, 1, 1), 32, 0, 0, (1, 2, 3))
    assert driver.launches == [
        ("handle", 5, 6, 7, 128, 1, 1, 1000, 42, [1 << 60, -3, 9]),
        ("handle", 1, 1, 1, 32, 1, 1, 0, 0, [1, 2, 3]),
    ]


def test_launch_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = function(monkeypatch, FakeDriver(Result.CUDA_ERROR_INVALID_VALUE, Result.CUDA_ERROR_OUT_OF_MEMORY))
    words = (
        r"kernel scale \(my config\) cannot be launched with grid \(5, 1, 1\), 64 threads, 99 bytes .* 40 registers: "
        r"CUDA_ERROR_INVALID_VALUE \(some words\)"
    )
    with pytest.raises(cuda.CudaError, match=words):
        kernel.launch((5, 1, 1), 64, 99, 0, (1, 2, 3))
    with pytest.raises(cuda.CudaError, match="free tensors or use a smaller batch"):
        kernel.launch((5, 1, 1), 64, 99, 0, (1, 2, 3))
    kernel.launch((5, 1, 1), 64, 99, 0, (1, 2, 3))


def test_a_new_thread_enters_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(Result.CUDA_ERROR_INVALID_CONTEXT)
    function(monkeypatch, driver).launch((1, 1, 1), 32, 0, 0, (1, 2, 3))
    assert driver.contexts == ["context"]
    assert len(driver.launches) == 2


def test_threads_have_their_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    kernel = function(monkeypatch, driver)
    together = threading.Barrier(2)
    original = driver.cuLaunchKernel

    def slow(*args: Any) -> Any:
        together.wait(10)  # both have written their arguments
        return original(*args)

    kernel._launch_kernel = slow
    threads = [threading.Thread(target=kernel.launch, args=((i, 1, 1), 32, 0, 0, (i, i + 1, i + 2))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted((launch[1], launch[-1]) for launch in driver.launches) == [(0, [0, 1, 2]), (1, [1, 2, 3])]


# --- every kernel of the table ---------------------------------------------------------------------------------

SPECS = {
    "float32": ConvSpec.create((8, 16, 14, 14), (16, 16, 3, 3), 1, 1),
    "float16": ConvSpec.create((1, 16, 14, 14), (16, 16, 1, 1), dtype="float16"),
}


@compiles
@every_capability
@pytest.mark.parametrize("name", [k.name for k in kernels_for("cuda")])
def test_default_configs_compile(name: str, capability: tuple[int, int]) -> None:
    """Nothing in float64, nothing spilled to local memory."""
    chosen = next(k for k in kernels_for("cuda") if k.name == name)
    assert isinstance(chosen, CudaKernel)
    dtype = "float16" if capability in ((8, 0), (12, 0)) else "float32"
    spec = SPECS[dtype]
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    with cuda.assumed(capability):
        reason = chosen.supports(spec, weight)
        if reason is not None:
            pytest.skip(reason)
        config = chosen.default(spec, weight, 1)
        assert chosen.check(spec, weight, config) is None
        made = chosen.ptx(spec, weight, config, "relu")
    assert chosen.is_dense or made
    for ptx in made:
        assert ".f64" not in ptx.text
        assert ".local" not in ptx.text
        assert cuda.assemble(ptx).local_bytes == 0
