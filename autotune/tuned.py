"""The tuned file: what was chosen for every layer on one device, and the measurements behind it.

A file is JSON: ``format`` "numbasparse.tuned", ``version`` 1, ``device``, ``versions``, ``created``, and ``layers``
(see `Layer`). It is read with validation and nothing of it is used before it was checked:

- another format or version, another kind of device, vector width, architecture or compute capability, an unknown
  kernel or another version of a kernel: ValueError that names the file;
- another processor or GPU, system, thread count, driver or library version: a warning, since the choice runs but may
  not be best;
- a config is checked by its kernel at look-up, where spec and weight are known. One that does not pass is left out
  with a warning, and the look-up goes on as if the layer were not in the file.
"""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

import numbasparse
from autotune.measure import GpuTimes, default_threads
from autotune.space import dtype_on
from numbasparse.files import write_whole
from numbasparse.kernels import KERNELS
from numbasparse.plans import Choice, Measured
from numbasparse.runtime import cpu, cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

FORMAT = "numbasparse.tuned"
VERSION = 1

BUCKETS = (0.0, 50.0, 60.0, 70.0, 80.0, 85.0, 90.0, 93.0, 95.0, 97.0, 98.0, 99.0, 99.5)
"""Sparsities in per cent; a weight belongs to the nearest one."""

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Config = dict[str, int | str]

T = TypeVar("T")


class CpuDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="cpu"):
    """The CPU that was measured; `lanes` are float32 lanes of a vector."""

    processor: str
    lanes: Count
    threads: Count
    os: str
    arch: str

    kind: ClassVar[str] = "cpu"

    @property
    def label(self) -> str:
        return f"{self.processor}, {self.threads} thread{'s' * (self.threads != 1)}"


class CudaDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="cuda"):
    """The GPU that was measured; `capability` is the compute capability, for example "9.0"."""

    name: str
    capability: str
    multiprocessors: Count

    kind: ClassVar[str] = "cuda"

    @property
    def label(self) -> str:
        return f"{self.name}, compute capability {self.capability}"


Device = CpuDevice | CudaDevice

_KINDS = (CpuDevice.kind, CudaDevice.kind)


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Software that was measured; torch may not have been installed. The last three are of a GPU."""

    numbasparse: str
    numba: str
    llvmlite: str
    numpy: str
    torch: str | None
    numba_cuda: str | None = None
    driver: str | None = None
    cudnn: str | None = None


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel, its version and its config."""

    kernel: str
    version: int
    config: Config


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Median microseconds of a candidate; on a GPU with what `gpu` adds."""

    kernel: str
    config: Config
    median_us: NonNegative
    gpu: GpuTimes | None = None


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One problem, its choice and its measurements.

    Attributes
    ----------
    names
        Layers that have this problem.
    spec
        As of `ConvSpec.to_dict`.
    sparsity, bucket
        Fraction of zeros; the entry of `BUCKETS` in per cent.
    nnz, fingerprint
        Of the weight that was measured.
    median_us, spread_us
        Of the choice: median and interquartile range. On a GPU with a warm L2 cache, input and output in NCHW or in
        NHWC, whichever is better for the candidate, conversions counted: what the layer costs where it stands alone.
    dense_us
        Best dense convolution of torch: any layout, channels-last without conversion included.
    dense_choice_us
        Best dense candidate: input and output as for the sparse ones (on the CPU: NCHW).
    ratio
        ``dense_us / median_us``. The dense figures and the ratio are None without torch.
    trials
        How many candidates were measured.
    top
        The best of them, as re-timed; on a GPU also those that are best between neighbours which keep their layout.
    gpu
        Of the choice, on a GPU: its layouts and its other times.
    """

    names: list[str]
    spec: dict[str, Any]
    sparsity: Annotated[float, msgspec.Meta(ge=0, le=1)]
    bucket: float
    nnz: Count
    fingerprint: str
    choice: Chosen
    median_us: NonNegative
    spread_us: NonNegative
    dense_us: NonNegative | None
    dense_choice_us: NonNegative | None
    ratio: NonNegative | None
    trials: Count
    top: list[Measurement]
    gpu: GpuTimes | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    device: Device
    versions: Versions
    created: datetime
    layers: list[Layer]


class _Kind(msgspec.Struct, frozen=True):
    kind: str


class _Head(msgspec.Struct, frozen=True):
    format: str
    version: int
    device: _Kind | None = None


def bucket_of(sparsity: float) -> float:
    """The entry of `BUCKETS` nearest to a sparsity, given as a fraction."""
    return min(BUCKETS, key=lambda b: (abs(b - 100.0 * sparsity), b))


def steps(a: float, b: float) -> int:
    """How many buckets lie between two."""
    return abs(BUCKETS.index(a) - BUCKETS.index(b))


def this_device(threads: int | None = None, kind: str = "cpu") -> Device:
    """The CPU of this process, or its current GPU.

    Raises
    ------
    RuntimeError
        If it is a GPU that is asked for and none is usable.
    """
    if kind == "cuda":
        facts = cuda.current()
        return CudaDevice(facts.name, ".".join(map(str, facts.capability)), facts.multiprocessors)
    return CpuDevice(
        processor=cpu.processor_name(),
        lanes=cpu.vector_lanes(),
        threads=default_threads() if threads is None else threads,
        os=platform.system(),
        arch=platform.machine(),
    )


def these_versions(kind: str = "cpu") -> Versions:
    """The software of this process, as far as it matters to a kind of device."""
    versions = Versions(
        numbasparse=numbasparse.__version__,
        numba=metadata.version("numba"),
        llvmlite=metadata.version("llvmlite"),
        numpy=metadata.version("numpy"),
        torch=_version_or_none("torch"),
    )
    if kind == "cpu":
        return versions
    from torch.backends import cudnn

    version: int | None = cudnn.version()
    return msgspec.structs.replace(
        versions,
        numba_cuda=_version_or_none("numba-cuda"),
        driver=cuda.current().driver,
        cudnn=None if version is None else str(version),
    )


def _version_or_none(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class TunedModel:
    """Choices for the layers of a model on one device; a `numbasparse.plans.Chooser`.

    Made by `autotune.tune`, `autotune.tune_layers` or `load`.

    Attributes
    ----------
    device, versions, created
        What was measured, and when.
    layers
        See `Layer`.
    fingerprint
        Hex digest of device and choices: equal for files that choose alike, on every machine.
    """

    def __init__(
        self, layers: Iterable[Layer], device: Device, versions: Versions, created: datetime | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.device = device
        self.versions = versions
        self.created = datetime.now(UTC).replace(microsecond=0) if created is None else created
        self.fingerprint = _fingerprint(device, self.layers)
        self._by_spec: dict[ConvSpec, list[Layer]] = {}
        self._by_image: dict[ConvSpec, list[tuple[int, Layer]]] = {}
        for layer in self.layers:
            spec = self._key(ConvSpec.from_dict(layer.spec))
            self._by_spec.setdefault(spec, []).append(layer)
            self._by_image.setdefault(spec.with_batch(1), []).append((spec.n, layer))

    def __repr__(self) -> str:
        return f"TunedModel({len(self.layers)} layers, {self.device.label})"

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice | None:
        """The choice for a problem, or None where nothing is known of it.

        The first of these whose kernel can run it:

        1. a layer of that name with that spec, whose sparsity bucket is at most one step away;
        2. any layer with that spec, the nearest bucket, at most one step away;
        3. a layer with that spec but for the batch size, of the same bucket, the nearest batch size.

        A layer that was tuned with this very weight goes before others that are as near. The spec's dtype does
        not matter on the CPU, where kernels compute in float32; on a GPU only float64 is another name of float32.
        """
        bucket = bucket_of(weight.sparsity)
        for layer in self._same_spec(spec, weight, bucket, name):
            reason = self._unusable(layer, spec, weight)
            if reason is None:
                return Choice(layer.choice.kernel, dict(layer.choice.config))
            warnings.warn(
                f"the tuned choice of layer {', '.join(layer.names)} for {spec.key} is left out: {reason}",
                stacklevel=2,
            )
        for layer in self._other_batches(spec, bucket):
            if self._unusable(layer, spec, weight) is None:
                return Choice(layer.choice.kernel, dict(layer.choice.config))
        return None

    def measured(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> list[Measured]:
        """What was measured for a problem on a GPU and can run it: of the layer from which `choice` has its answer."""
        for layer in self._same_spec(spec, weight, bucket_of(weight.sparsity), name):
            found = [
                Measured(Choice(m.kernel, dict(m.config)), m.gpu.native_us, m.median_us)
                for m in layer.top
                if m.gpu is not None and self._reason_unusable(m.kernel, m.config, spec, weight) is None
            ]
            if found:
                return found
        return []

    def _same_spec(self, spec: ConvSpec, weight: SparseWeight, bucket: float, name: str | None) -> Iterator[Layer]:
        near = [layer for layer in self._by_spec.get(self._key(spec), ()) if steps(layer.bucket, bucket) <= 1]

        def order(layer: Layer) -> tuple[Any, ...]:
            other_weight = layer.fingerprint != weight.fingerprint
            far = abs(layer.sparsity - weight.sparsity)
            return name not in layer.names, steps(layer.bucket, bucket), other_weight, far

        yield from sorted(near, key=order)

    def _other_batches(self, spec: ConvSpec, bucket: float) -> Iterator[Layer]:
        found = self._by_image.get(self._key(spec).with_batch(1), ())
        others = [(n, layer) for n, layer in found if n != spec.n and layer.bucket == bucket]
        for _, layer in sorted(others, key=lambda pair: abs(math.log(pair[0] / spec.n))):
            yield layer

    def _key(self, spec: ConvSpec) -> ConvSpec:
        return replace(spec, dtype=dtype_on(self.device.kind, spec.dtype))

    def _unusable(self, layer: Layer, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return self._reason_unusable(layer.choice.kernel, layer.choice.config, spec, weight)

    def _reason_unusable(self, name: str, config: Config, spec: ConvSpec, weight: SparseWeight) -> str | None:
        kernel = KERNELS.get(name)
        if kernel is None:
            return f"kernel {name!r} is unknown"
        spec = self._key(spec)
        return kernel.supports(spec, weight) or kernel.check(spec, weight, dict(config))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; an older one at ``path`` is replaced only by a complete one.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        file = _File(FORMAT, VERSION, self.device, self.versions, self.created, list(self.layers))
        write_whole(path, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, to_run: bool = True) -> TunedModel:
        """Read a file of `save`, checking everything before use.

        Parameters
        ----------
        path
        to_run
            False to look at the file only: then it may be of any device and of other versions of libraries.

        Raises
        ------
        OSError
            If the file cannot be read; FileNotFoundError if there is none.
        ValueError
            If it is truncated, corrupt, no tuned file, or made for another device, vector width, compute capability
            or version of a kernel; the text names the file.
        """
        blob = Path(path).read_bytes()
        try:
            file = _parse(blob, to_run)
        except ValueError as error:
            raise ValueError(f"cannot use {os.fspath(path)!r} as a tuned file: {error}") from None
        if to_run:
            _warn_of_differences(file, path)
        return cls(file.layers, file.device, file.versions, file.created)


load = TunedModel.load


def _fingerprint(device: Device, layers: Iterable[Layer]) -> str:
    choices = [[layer.names, layer.spec, layer.bucket, layer.fingerprint, layer.choice] for layer in layers]
    return blake2b(msgspec.json.encode([device, choices], order="deterministic"), digest_size=16).hexdigest()


# ---- checks of a file ---------------------------------------------------------------------------------------


def _parse(blob: bytes, to_run: bool) -> _File:
    head = _decode(blob, _Head)
    if head.format != FORMAT:
        raise ValueError(f"its format is {head.format!r}, expected {FORMAT!r}")
    if head.version != VERSION:
        raise ValueError(f"its version is {head.version}, but this package reads only version {VERSION}")
    if head.device is not None and head.device.kind not in _KINDS:
        raise ValueError(f"it was made for a device of kind {head.device.kind!r}, expected one of {list(_KINDS)}")
    file = _decode(blob, _File)
    if to_run:
        _check_device(file.device)
    for number, layer in enumerate(file.layers):
        try:
            _check_layer(layer, file.device.kind)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error} (layers[{number}], {', '.join(layer.names)})") from None
    return file


def _decode(blob: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(blob, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON, or truncated or corrupt ({error})") from None


def _check_device(device: Device) -> None:
    if isinstance(device, CudaDevice):
        _check_gpu(device)
        return
    here = this_device()
    assert isinstance(here, CpuDevice)
    if device.arch.lower() != here.arch.lower():
        raise ValueError(f"it was made for architecture {device.arch!r}, this is {here.arch!r}: tune again here")
    if device.lanes != here.lanes:
        raise ValueError(
            f"it was made for vectors of {device.lanes} float32 lanes ({device.processor}), this processor has "
            f"{here.lanes} ({here.processor}): tune again here"
        )


def _check_gpu(device: CudaDevice) -> None:
    try:
        here = this_device(kind="cuda")
    except RuntimeError as error:
        raise ValueError(f"it was made for a GPU ({device.label}), and there is none to use here: {error}") from None
    assert isinstance(here, CudaDevice)
    if device.capability != here.capability:
        raise ValueError(
            f"it was made for compute capability {device.capability} ({device.name}), this GPU has {here.capability} "
            f"({here.name}): tune again here"
        )


def _check_layer(layer: Layer, kind: str) -> None:
    spec = ConvSpec.from_dict(layer.spec)
    size = spec.k * spec.c_per_group * spec.r * spec.s
    if layer.nnz > size:
        raise ValueError(f"nnz is {layer.nnz}, but the weight has only {size} places")
    if layer.bucket != bucket_of(layer.sparsity):
        raise ValueError(f"bucket is {layer.bucket}, but sparsity {layer.sparsity} belongs to another")
    _check_finite(layer)
    kernel = KERNELS.get(layer.choice.kernel)
    if kernel is None:
        raise ValueError(f"kernel {layer.choice.kernel!r} is unknown, there are {', '.join(sorted(KERNELS))}")
    if kernel.device != kind:
        raise ValueError(f"kernel {kernel.name!r} runs on device {kernel.device!r}, the file is for {kind!r}")
    if layer.choice.version != kernel.version:
        raise ValueError(
            f"it was made with version {layer.choice.version} of kernel {kernel.name!r}, installed is version "
            f"{kernel.version}: tune again"
        )


def _check_finite(layer: Layer) -> None:
    figures = [layer.median_us, layer.spread_us, layer.dense_us, layer.dense_choice_us, layer.ratio]
    figures += [measured.median_us for measured in layer.top]
    for times in (layer.gpu, *(measured.gpu for measured in layer.top)):
        figures += [] if times is None else [times.native_us, times.cold_us, times.native_cold_us]
    if not all(figure is None or math.isfinite(figure) for figure in figures):
        raise ValueError("a time is not finite")


def _warn_of_differences(file: _File, path: str | os.PathLike[str]) -> None:
    kind = file.device.kind
    pairs = ((file.device, this_device(kind=kind)), (file.versions, these_versions(kind)))
    differences = [
        f"{name} {old!r} then, {new!r} now"
        for then, now in pairs
        for name, old, new in ((field, getattr(then, field), getattr(now, field)) for field in then.__struct_fields__)
        if old != new
    ]
    if differences:
        warnings.warn(
            f"{os.fspath(path)!r} was tuned under other circumstances ({'; '.join(differences)}): its choices run, "
            "but may not be the best",
            stacklevel=3,
        )
