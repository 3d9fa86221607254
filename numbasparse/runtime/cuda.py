"""NVIDIA GPUs: facts of a device, kernels from Python functions, launches.  The only import of numba.cuda.

A kernel goes from a Python function to PTX (`compile_ptx`), to a cubin (`assemble`) and onto the device (`load`).
The first two need neither GPU nor driver, so that tests and worker processes can do them anywhere.  The cubin is
made by nvJitLink and not by the driver, which refuses the PTX of a toolkit newer than itself.

Devices, streams and memory are torch's: kernels run in its context, on its current stream, on its tensors.
NVVM of CUDA 13 compiles for compute capability 7.5 (Turing) and up; Volta is not supported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

__all__ = [
    "Cubin",
    "CudaError",
    "Device",
    "Function",
    "Ptx",
    "TensorMap",
    "array_arguments",
    "assemble",
    "assumed",
    "compile_ptx",
    "current",
    "current_stream",
    "load",
    "numba_cuda",
    "reason_unavailable",
]

Capability = tuple[int, int]

LOWEST: Capability = (7, 5)
"""Lowest compute capability that NVVM of CUDA 13 compiles for."""

_INSTALL = "pip install 'numbasparse[cuda]'"


class CudaError(RuntimeError):
    """Something of CUDA is missing or failed; the text says what, and what to do."""


# ---- what is there ------------------------------------------------------------------------------------------


def numba_cuda() -> Any:
    """The module ``numba.cuda`` of the package numba-cuda.

    Raises
    ------
    CudaError
        If it is not installed.
    """
    # NumPy 2.5 dropped it, numba-cuda 0.30 still takes it when imported.
    if not hasattr(np, "row_stack"):
        setattr(np, "row_stack", np.vstack)  # noqa: B010 - the linter would drop the plain assignment
    try:
        importlib.import_module("numba_cuda")
        return importlib.import_module("numba.cuda")
    except Exception as error:
        raise CudaError(f"numba-cuda cannot be imported ({_first_line(error)}): {_INSTALL}") from error


def _bindings(name: str) -> Any:
    """A module of the package cuda-bindings, which numba-cuda brings: ``driver``, ``nvjitlink`` or ``nvvm``."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except Exception as error:
        raise CudaError(f"cuda.bindings.{name} cannot be imported ({_first_line(error)}): {_INSTALL}") from error


def reason_unavailable() -> str | None:
    """Why kernels cannot run on a GPU here, and what to do; None where they can.  Never raises."""
    try:
        _toolchain()
        _require_torch()
        _facts(_torch().cuda.current_device())
    except CudaError as error:
        return str(error)
    except Exception as error:  # whatever a broken installation does
        return f"CUDA cannot be used ({type(error).__name__}: {_first_line(error)}); the CPU goes on working"
    return None


def reason_not_compiling() -> str | None:
    """Why kernels cannot even be compiled here (`compile_ptx`, `assemble`), and what to do; None where they can."""
    try:
        _toolchain()
    except CudaError as error:
        return str(error)
    return None


@functools.cache
def _toolchain() -> tuple[str, ...]:
    """Versions of all that takes part in making code.

    Raises
    ------
    CudaError
        If a part is missing.
    """
    numba_cuda()
    versions = [importlib.import_module(name).__version__ for name in ("numba", "numba_cuda")]
    for name in ("nvvm", "nvjitlink"):
        module = _bindings(name)
        try:
            versions.append(".".join(map(str, module.version())))
        except Exception as error:
            raise CudaError(f"the library {name} of CUDA is not found ({_first_line(error)}): {_INSTALL}") from error
    return tuple(versions)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CudaError(
            "torch is not installed: install it with CUDA, see https://pytorch.org/get-started/locally"
        ) from error


def _require_torch() -> None:
    """Let torch make its CUDA context; raise what it says where it cannot."""
    try:
        _torch().cuda.init()
    except (AssertionError, RuntimeError) as error:
        text = _first_line(error)
        advice = "install the CUDA build of torch" if "not compiled" in text else "see nvidia-smi"
        raise CudaError(f"torch cannot use CUDA ({text}): {advice}; the CPU goes on working") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- devices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Facts of one GPU.

    Attributes
    ----------
    index : int
        torch's number of the device; -1 for an assumed one.
    name : str
    capability : (int, int)
        Compute capability (major, minor).
    multiprocessors : int
    shared_per_block : int
        Bytes of shared memory that one block can have at most (with opt-in).
    shared_per_multiprocessor : int
        Bytes; each resident block takes 1 KiB more than it asks for (from capability 8.0 on).
    registers_per_multiprocessor : int
        32-bit registers.
    threads_per_multiprocessor : int
    l2_bytes : int
    clock_mhz : int
        Highest clock of the multiprocessors.
    memory_bytes : int
    driver : str
        Newest CUDA version that the driver knows, for example "13.0"; empty for an assumed device.
    """

    index: int
    name: str
    capability: Capability
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2_bytes: int
    clock_mhz: int
    memory_bytes: int
    driver: str


def _known(name: str, capability: Capability, processors: int, shared: int, threads: int, *rest: int) -> Device:
    l2_mib, clock, memory_gib = rest
    reserved = 0 if capability < (8, 0) else 1
    return Device(
        -1,
        name,
        capability,
        processors,
        (shared - reserved) << 10,
        shared << 10,
        1 << 16,
        threads,
        l2_mib << 20,
        clock,
        memory_gib << 30,
        "",
    )


# CUDA C++ Programming Guide, "Technical specifications per compute capability"; the rest from NVIDIA's data sheets.
_KNOWN = {
    device.capability: device
    for device in (
        _known("T4", (7, 5), 40, 64, 1024, 4, 1590, 16),
        _known("A100", (8, 0), 108, 164, 2048, 40, 1410, 40),
        _known("RTX 3090", (8, 6), 82, 100, 1536, 6, 1695, 24),
        _known("RTX 4090", (8, 9), 128, 100, 1536, 72, 2520, 24),
        _known("H100", (9, 0), 132, 228, 2048, 50, 1980, 80),
        _known("B200", (10, 0), 148, 228, 2048, 126, 1965, 180),
        _known("RTX 5090", (12, 0), 170, 100, 1536, 96, 2407, 32),
    )
}

CAPABILITIES: tuple[Capability, ...] = tuple(_KNOWN)
"""Compute capabilities that `assumed` knows a device of."""

_assumed: ContextVar[Device | None] = ContextVar("numbasparse_assumed_device", default=None)


@contextlib.contextmanager
def assumed(device: Capability | Device) -> Iterator[Device]:
    """Within the block, `current` gives a device that need not be there: for compiling without a GPU.

    Parameters
    ----------
    device : (int, int) or Device
        One of `CAPABILITIES`, which stands for a typical GPU of that kind, or the facts themselves.

    Raises
    ------
    ValueError
        If nothing is known of the capability.
    """
    if not isinstance(device, Device):
        if device not in _KNOWN:
            raise ValueError(f"expected a compute capability, one of {list(CAPABILITIES)}, or a Device, got {device!r}")
        device = _KNOWN[device]
    token = _assumed.set(replace(device, index=-1))
    try:
        yield replace(device, index=-1)
    finally:
        _assumed.reset(token)


def current() -> Device:
    """The assumed device within `assumed`, else torch's current one.

    Raises
    ------
    CudaError
        If there is none that can be used.
    """
    device = _assumed.get()
    if device is not None:
        return device
    _require_torch()
    return _facts(_torch().cuda.current_device())


@functools.cache
def _facts(index: int) -> Device:
    driver = _bindings("driver")
    handle = _checked(driver.cuDeviceGet(index), "find the GPU")
    names = driver.CUdevice_attribute

    def fact(name: str) -> int:
        attribute = getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_checked(driver.cuDeviceGetAttribute(attribute, handle), f"read {name}"))

    version = _checked(driver.cuDriverGetVersion(), "read the driver's version")
    device = Device(
        index=index,
        name=_torch().cuda.get_device_name(index),
        capability=(fact("COMPUTE_CAPABILITY_MAJOR"), fact("COMPUTE_CAPABILITY_MINOR")),
        multiprocessors=fact("MULTIPROCESSOR_COUNT"),
        shared_per_block=fact("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        shared_per_multiprocessor=fact("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        registers_per_multiprocessor=fact("MAX_REGISTERS_PER_MULTIPROCESSOR"),
        threads_per_multiprocessor=fact("MAX_THREADS_PER_MULTIPROCESSOR"),
        l2_bytes=fact("L2_CACHE_SIZE"),
        clock_mhz=fact("CLOCK_RATE") // 1000,
        memory_bytes=int(_checked(driver.cuDeviceTotalMem(handle), "read the memory's size")),
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )
    _check_capability(device.capability)
    _check_driver(device.driver)
    return device


def _check_capability(capability: Capability) -> None:
    if capability < LOWEST:
        raise CudaError(
            f"compute capability {capability[0]}.{capability[1]} is not supported, {LOWEST[0]}.{LOWEST[1]} (Turing) is "
            f"the lowest: CUDA 13 no longer compiles for older GPUs"
        )


def _check_driver(version: str) -> None:
    """A driver loads the cubins of every toolkit of its own major version, and of older ones."""
    linker = ".".join(map(str, _bindings("nvjitlink").version()))
    if int(version.split(".")[0]) < int(linker.split(".")[0]):
        raise CudaError(
            f"the driver knows CUDA up to {version}, the compiler here makes code for {linker}: update the NVIDIA "
            f"driver, or install the compiler of its version (pip install 'numba-cuda[cu{version.split('.')[0]}]')"
        )


# ---- from Python to PTX -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ptx:
    """A compiled kernel as text.

    Attributes
    ----------
    text : str
    entry : str
        Name of the entry, the same in every process.
    threads : int
        Threads of a block that it was compiled for.
    key : str
        Names kernel and config, for people.
    capability : (int, int)
        Compute capability that it is for.
    """

    text: str
    entry: str
    threads: int
    key: str
    capability: Capability

    @functools.cached_property
    def digest(self) -> str:
        """Tells it from every other kernel."""
        return hashlib.sha256(f"{self.capability} {self.text}".encode()).hexdigest()


_compile_lock = threading.RLock()
_ptx: dict[str, Ptx] = {}


def compile_ptx(
    function: Callable[..., None],
    arguments: int | Sequence[str],
    key: str,
    *,
    capability: Capability,
    threads: int,
    min_blocks: int = 1,
    max_registers: int | None = None,
    fastmath: bool = True,
) -> Ptx:
    """Compile a Python function to a kernel.  Needs neither GPU nor driver; cached in memory and on disk.

    Parameters
    ----------
    function
        In numba.cuda's subset of Python; returns nothing.
    arguments : int or sequence of str
        How many int64 parameters it has (addresses and sizes); or their types in numba's words, of which
        ``"float32[::1]"`` is an array and is launched with the six integers of `array_arguments`.
    key : str
        Names everything beside source text, versions and the other parameters that the code depends on.
    capability : (int, int)
    threads : int
        Threads of a block.
    min_blocks : int
        Blocks that are to fit on a multiprocessor at once: bounds the registers.
    max_registers : int, optional
        Registers of a thread at most, instead of that bound.
    fastmath : bool
        Approximate division and roots, denormals flushed to zero, and no care for NaN and infinity in comparisons.

    Raises
    ------
    CudaError
        If a part of the compiler is missing, the GPU too old, or the function cannot be compiled.
    """
    _check_capability(capability)
    name = f"{function.__module__}.{function.__qualname__}"
    facts = (name, key, arguments, capability, threads, min_blocks, max_registers, fastmath)
    digest = _digest(facts)
    with _compile_lock:
        found = _ptx.get(digest)
        if found is not None:
            return found
        made = _cached(digest + ".ptx", Ptx, lambda: _compile(function, *facts))
        _ptx[digest] = made
        return made


def _digest(facts: object) -> str:
    from numbasparse.codegen.jit import source_digest

    return hashlib.sha256(repr((facts, _toolchain(), source_digest())).encode()).hexdigest()


def _cached(name: str, kind: type[Any], make: Callable[[], Any]) -> Any:
    """A value of ``kind`` from the disk cache, or made and put there."""
    from numbasparse.codegen.jit import cache_directory, read_cached, write_cached

    path = cache_directory() / name
    body = read_cached(path)
    if body is not None:
        # What is there is whole, but a foreign file is made anew like a missing one.
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.msgpack.decode(body, type=kind)
    made = make()
    write_cached(path, msgspec.msgpack.encode(made))
    return made


def _compile(
    function: Callable[..., None],
    name: str,
    key: str,
    arguments: int | Sequence[str],
    capability: Capability,
    threads: int,
    min_blocks: int,
    max_registers: int | None,
    fastmath: bool,
) -> Ptx:
    from numba.core import sigutils

    kinds = ["int64"] * arguments if isinstance(arguments, int) else arguments
    args, _ = sigutils.normalize_signature(f"void({', '.join(kinds)})")
    # .minnctapersm and .maxnreg exclude each other (PTX ISA, "Performance-Tuning Directives").
    bounds: Any = (threads, min_blocks) if max_registers is None else threads
    try:
        module = numba_cuda()
        text, _ = module.compile(
            function,
            module.types.void(*args),
            device=False,
            abi="numba",
            cc=capability,
            fastmath=fastmath,
            opt=True,
            launch_bounds=bounds,
        )
    except CudaError:
        raise
    except Exception as error:
        raise CudaError(
            f"kernel {name} ({key}) cannot be compiled for compute capability {capability[0]}.{capability[1]}: {error}"
        ) from error
    entry = re.sub(r"\W", "_", function.__qualname__.rpartition(".")[2])
    return Ptx(_finished(text, entry, max_registers), entry, threads, key, capability)


def _finished(text: str, entry: str, max_registers: int | None) -> str:
    """PTX that is the same in every process: numba numbers the functions of a process in their names."""
    found = re.findall(r"\.visible \.entry (\w+)\(", text)
    if len(found) != 1:
        raise CudaError(f"expected PTX with one entry, got {found}")
    text = text.replace(found[0], entry)
    from numbasparse.codegen.ptx import MAP_PARAMETER, SHARED_SYMBOL

    if SHARED_SYMBOL in text:
        declaration = f".extern .shared .align 128 .b8 {SHARED_SYMBOL}[];\n\n.visible .entry"
        text = text.replace(".visible .entry", declaration, 1)
    if MAP_PARAMETER in text:
        # The copy engine reads the map where the launch put it (PTX ISA, "Tensor-map"): one more parameter.
        text = re.sub(r"\n\)\n", f",\n\t.param .align 64 .b8 {MAP_PARAMETER}[128]\n)\n", text, count=1)
    if any(name in text for name in _SPECIFIC):
        text = re.sub(r"^(\.target sm_\d+)\b", r"\1a", text, count=1, flags=re.MULTILINE)
    # Never read: it is where numba's CPU code keeps a function's globals.
    text = re.sub(r"^\.common \.global \.align 8 \.u64 _ZN08NumbaEnv\w+;\n", "", text, flags=re.MULTILINE)
    if max_registers is not None:
        text = re.sub(r"^(\.maxntid .*)$", rf"\1\n.maxnreg {max_registers}", text, count=1, flags=re.MULTILINE)
    return text


_SPECIFIC = ("wgmma.",)
"""Instructions that exist on one capability only, so that the target has to end with "a" (PTX ISA, ".target")."""


def array_arguments(address: int, size: int, itemsize: int) -> tuple[int, ...]:
    """What a contiguous one-dimensional array of numba is at a launch: seven integers.

    They are memory manager and parent (none), number of items, bytes of an item, address, shape and stride.
    """
    return 0, 0, size, itemsize, address, size, itemsize


# ---- from PTX to machine code -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cubin:
    """Machine code of a kernel.

    Attributes
    ----------
    image : bytes
        An ELF file that the driver loads.
    registers : int
        Of a thread.
    local_bytes : int
        Of a thread: spilled registers and arrays that found no place in registers.
    shared_bytes : int
        Static shared memory of a block.
    losses : tuple of str
        What the assembler could not do as the code asks, and says that it may cost speed.
    """

    image: bytes
    registers: int
    local_bytes: int
    shared_bytes: int
    losses: tuple[str, ...]


def assemble(ptx: Ptx) -> Cubin:
    """Translate PTX to machine code with nvJitLink.  Needs neither GPU nor driver; cached on disk.

    Raises
    ------
    CudaError
        If nvJitLink is missing or refuses the PTX.
    """
    return _cached(_digest(ptx.digest) + ".cubin", Cubin, lambda: _link(ptx))


def _link(ptx: Ptx) -> Cubin:
    linker = _bindings("nvjitlink")
    found = re.search(r"^\.target (sm_\w+)", ptx.text, flags=re.MULTILINE)
    target = found[1] if found else f"sm_{ptx.capability[0]}{ptx.capability[1]}"
    options = [f"-arch={target}", "-O3", "-verbose"]
    text = ptx.text.encode()
    handle = linker.create(len(options), options)
    try:
        linker.add_data(handle, linker.InputType.PTX, text, len(text), ptx.entry)
        linker.complete(handle)
        image = bytearray(linker.get_linked_cubin_size(handle))
        linker.get_linked_cubin(handle, image)
        log = bytearray(linker.get_info_log_size(handle))
        linker.get_info_log(handle, log)
    except linker.nvJitLinkError as error:
        log = bytearray(linker.get_error_log_size(handle))
        linker.get_error_log(handle, log)
        raise CudaError(f"kernel {ptx.key} cannot be assembled ({error}): {_text(log)}") from error
    finally:
        linker.destroy(handle)
    registers, stack = _resources(_text(log))
    shared = _section_bytes(bytes(image), f".nv.shared.{ptx.entry}")
    # From Hopper on the section holds the 1 KiB that every block takes beside its own (see `Device`).
    own = shared - 1024 if shared and ptx.capability >= (9, 0) else shared
    losses = tuple(line for line in _text(log).splitlines() if "Potential Performance Loss" in line)
    return Cubin(bytes(image), registers, stack, own, losses)


def _text(log: bytearray) -> str:
    return log.decode(errors="replace").strip("\0\n ")


def _resources(log: str) -> tuple[int, int]:
    """Registers and bytes of stack, from the linker's words on the (only) entry."""
    found = re.search(r"used (\d+) registers,.* (\d+) stack,", log)
    if found is None:
        raise CudaError(f"nvJitLink does not tell what a kernel takes: {log!r}")
    return int(found[1]), int(found[2])


def _section_bytes(image: bytes, name: str) -> int:
    """Size of a section of a 64-bit ELF file (System V ABI, "Sections"); 0 where there is none."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names = struct.unpack_from("<3H", image, 0x3A)
    sections = [struct.unpack_from("<II4Q", image, table + i * entry_size) for i in range(count)]
    first_name = sections[names][4]
    for number, _, _, _, _, size in sections:
        start = first_name + number
        if image[start : image.index(b"\0", start)] == name.encode():
            return size
    return 0


# ---- on the device ------------------------------------------------------------------------------------------


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a call to the driver."""
    if result[0] != 0:
        raise CudaError(f"cannot {what}: {_error_text(result[0])}")
    return result[1] if len(result) > 1 else None


_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free tensors or use a smaller batch",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "fewer threads or registers are needed",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the code was made for another GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an earlier kernel wrote out of bounds, and CUDA is lost to this process: start anew",
    "CUDA_ERROR_LAUNCH_FAILED": "an earlier kernel failed, and CUDA is lost to this process: start anew",
}


def _error_text(code: Any) -> str:
    driver = _bindings("driver")
    name = driver.CUresult(code).name
    words = driver.cuGetErrorString(code)[1]
    text = f"{name} ({words.decode() if words else 'no description'})"
    return f"{text}: {_ADVICE[name]}" if name in _ADVICE else text


class TensorMap:
    """What the copy engine must know of an array: where it is, its sizes, and the box that one copy takes.

    Parameters
    ----------
    address : int
        Of the first value; a multiple of 16.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    sizes, box : sequence of int
        Values along each dimension, the innermost first: of the array, and of a box (at most 256).
    strides : sequence of int
        Bytes from one to the next along all dimensions but the innermost; multiples of 16.
    swizzle : int
        Bytes of a box's rows whose 16-byte pieces change places (see `codegen.ptx.Swizzle`): 128, 64 or 32; 0 or 16
        for none.
    every : sequence of int, optional
        Along each dimension a box takes every so many-th value, from its first; at most 8, and then ``box`` times it
        is at most 256.

    Raises
    ------
    CudaError
        If the driver refuses.

    Notes
    -----
    CUDA driver API, ``cuTensorMapEncodeTiled``; capability 9.0 and up.  What a box has outside of the array is zero.
    """

    def __init__(
        self,
        address: int,
        dtype: str,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int = 0,
        every: Sequence[int] | None = None,
    ) -> None:
        driver = _bindings("driver")
        kinds = driver.CUtensorMapDataType
        rank = len(sizes)
        every = every or [1] * rank
        mode = f"{swizzle}B" if swizzle > 16 else "NONE"
        result = driver.cuTensorMapEncodeTiled(
            getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}"),
            rank,
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size * step) for size, step in zip(box, every, strict=True)],
            [driver.cuuint32_t(step) for step in every],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{mode}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        self._map = _checked(result, f"describe an array of {list(sizes)} {dtype} with boxes of {list(box)}")
        self.pointer = int(self._map.getPtr())


class _Parameters:
    """Memory for the parameters of a launch: ``count`` int64 and the addresses of each, and of a tensor map."""

    def __init__(self, count: int) -> None:
        self._values = ctypes.create_string_buffer(8 * max(count, 1))
        first = ctypes.addressof(self._values)
        self._addresses = (ctypes.c_void_p * (count + 1))(*(first + 8 * i for i in range(count)))
        self._count = count
        self.address = ctypes.addressof(self._addresses)
        self.pack: Callable[..., None] = functools.partial(struct.Struct(f"{count}q").pack_into, self._values, 0)

    def add_map(self, tensor_map: TensorMap) -> None:
        """Put a tensor map after the others; a kernel that has none does not read it."""
        self._addresses[self._count] = tensor_map.pointer


class _ByThread(threading.local):
    """Each thread's own parameters, by their count: the driver reads them before a launch returns."""

    def __init__(self) -> None:
        self.by_count: dict[int, _Parameters] = {}


_parameters = _ByThread()


class Function:
    """A kernel on a device, ready to be launched from any thread.

    It stays loaded until the process ends, since a captured graph may hold it.

    Attributes
    ----------
    ptx : Ptx
    registers : int
        Of a thread.
    local_bytes : int
        Of a thread; more than 0 means spilled registers.
    static_shared : int
        Bytes of a block.
    """

    def __init__(self, ptx: Ptx, handle: Any, context: Any, device: Device) -> None:
        driver = _bindings("driver")
        self.ptx = ptx
        self._handle = handle
        self._context = context
        self._driver = driver
        self._launch_kernel = driver.cuLaunchKernel
        names = driver.CUfunction_attribute

        def fact(name: str) -> int:
            attribute = getattr(names, f"CU_FUNC_ATTRIBUTE_{name}")
            return int(_checked(driver.cuFuncGetAttribute(attribute, handle), f"read {name}"))

        self.registers = fact("NUM_REGS")
        self.local_bytes = fact("LOCAL_SIZE_BYTES")
        self.static_shared = fact("SHARED_SIZE_BYTES")
        most = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # More than 48 KiB has to be asked for (CUDA C++ Programming Guide, "Shared memory").
        _checked(
            driver.cuFuncSetAttribute(handle, most, device.shared_per_block - self.static_shared),
            f"allow kernel {ptx.key} its shared memory",
        )

    def max_blocks(self, threads: int, shared: int) -> int:
        """Blocks of ``threads`` threads and ``shared`` bytes of dynamic shared memory that a multiprocessor holds."""
        result = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._handle, threads, shared)
        return int(_checked(result, f"read the occupancy of kernel {self.ptx.key}"))

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[int],
        cluster: int = 1,
        tensor_map: TensorMap | None = None,
    ) -> None:
        """Start the kernel on a stream; returns at once.

        Parameters
        ----------
        grid : (int, int, int)
            Blocks in x, y and z.
        threads : int
            Threads of a block, in x.
        shared : int
            Bytes of dynamic shared memory.
        stream : int
            `current_stream`.
        arguments : sequence of int
            Values of the int64 parameters: addresses must stay valid until the kernel has run, which torch's
            allocator sees to for tensors used on their own stream.
        cluster : int
            Blocks, in x, that share a cluster (compute capability 9.0 and up).
        tensor_map : TensorMap, optional
            For a kernel that uses one.

        Raises
        ------
        CudaError
            If the driver refuses; also with the error of an earlier kernel.
        """
        count = len(arguments)
        parameters = _parameters.by_count.get(count)
        if parameters is None:
            parameters = _parameters.by_count[count] = _Parameters(count)
        parameters.pack(*arguments)
        if tensor_map is not None:
            parameters.add_map(tensor_map)
        error = self._start(grid, threads, shared, stream, parameters.address, cluster)
        if error != 0 and error == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # A thread that has not touched CUDA yet has no context.
            _checked(self._driver.cuCtxSetCurrent(self._context), "enter torch's CUDA context")
            error = self._start(grid, threads, shared, stream, parameters.address, cluster)
        if error != 0:
            raise CudaError(
                f"kernel {self.ptx.entry} ({self.ptx.key}) cannot be launched with grid {grid}, {threads} threads, "
                f"{shared} bytes of shared memory, {self.registers} registers: {_error_text(error)}"
            )

    def _start(
        self, grid: tuple[int, int, int], threads: int, shared: int, stream: int, parameters: int, cluster: int
    ) -> Any:
        x, y, z = grid
        if cluster == 1:
            return self._launch_kernel(self._handle, x, y, z, threads, 1, 1, shared, stream, parameters, 0)[0]
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(stream)
        config.attrs = [attribute]
        config.numAttrs = 1
        return driver.cuLaunchKernelEx(config, self._handle, parameters, 0)[0]


_load_lock = threading.RLock()
_functions: dict[tuple[int, str], Function] = {}


def load(ptx: Ptx) -> Function:
    """Bring a kernel onto torch's current device; the same object for the same kernel.

    Raises
    ------
    CudaError
        If there is no GPU, it is of another compute capability, its memory is full, or a graph is being captured.
    """
    device = current()
    if device.index < 0:
        raise CudaError(f"kernel {ptx.key} cannot be loaded: the device ({device.name}) is only assumed")
    key = (device.index, ptx.digest)
    with _load_lock:
        found = _functions.get(key)
        if found is None:
            found = _functions[key] = _load(ptx, device)
        return found


def _load(ptx: Ptx, device: Device) -> Function:
    if ptx.capability != device.capability:
        raise CudaError(f"kernel {ptx.key} was compiled for {ptx.capability}, {device.name} is {device.capability}")
    if _torch().cuda.is_current_stream_capturing():
        raise CudaError(
            f"kernel {ptx.key} is not loaded yet, and nothing can be loaded while a CUDA graph is captured: call the "
            f"convolution once before the capture"
        )
    driver = _bindings("driver")
    cubin = assemble(ptx)
    handle = _checked(driver.cuDeviceGet(device.index), "find the GPU")
    context = _checked(driver.cuDevicePrimaryCtxRetain(handle), "enter torch's CUDA context")
    _checked(driver.cuCtxSetCurrent(context), "enter torch's CUDA context")
    module = _checked(driver.cuModuleLoadData(cubin.image), f"load kernel {ptx.key}")
    entry = _checked(driver.cuModuleGetFunction(module, ptx.entry.encode()), f"find kernel {ptx.key}")
    return Function(ptx, entry, context, device)


def current_stream() -> int:
    """The driver's handle of torch's current stream on the current device."""
    torch = _torch()
    # torch.cuda.current_stream() makes an object, which takes longer than a launch; torch's own compiler calls this.
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
