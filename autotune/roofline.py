"""Where layers stand under the roofline: FLOP of the non-zeros against the bytes that must be moved.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from autotune.tuned import CpuDevice, Device, Layer, this_device
from numbasparse.spec import ConvSpec

_INDEX_BYTES = 4
"""Of a non-zero's column in the canonical weight."""

_DATA_SHEETS = {"NVIDIA H100 80GB HBM3": (66_900.0, 3_350.0), "NVIDIA H200": (66_900.0, 4_800.0)}
"""float32 GFLOP/s without tensor cores, GB/s of memory. Source: NVIDIA's data sheets of the H100 SXM and H200 SXM."""


@dataclass(frozen=True)
class Peak:
    """What a device can do at most: float32 GFLOP/s, GB/s of memory, and where the two figures come from."""

    gflops: float
    gbytes: float
    source: str

    def __post_init__(self) -> None:
        for value, what in ((self.gflops, "GFLOP/s"), (self.gbytes, "GB/s")):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a peak must be a positive number of {what}, got {value}")

    def at(self, intensity: float) -> float:
        """The roof in GFLOP/s over an intensity in FLOP/byte."""
        return min(self.gflops, intensity * self.gbytes)


@dataclass(frozen=True)
class Place:
    """A layer: FLOP/byte and GFLOP/s of its non-zeros."""

    name: str
    intensity: float
    gflops: float


def places(layers: Iterable[Layer]) -> list[Place]:
    """The place of every layer that has non-zeros and a time, by the first of its names.

    FLOP: two for each non-zero at each output position (those that meet padding are counted). Bytes: input, output
    and the weight's values and columns, each once: what a convolution moves at least with nothing in a cache.
    """
    return [place_of(layer) for layer in layers if has_place(layer)]


def has_place(layer: Layer) -> bool:
    """Whether a layer has non-zeros and a time."""
    return bool(layer.nnz and _us(layer))


def place_of(layer: Layer) -> Place:
    """The place of one layer, whose time must not be 0; on a GPU by its time without conversions of layout."""
    spec = ConvSpec.from_dict(layer.spec)
    itemsize = np.dtype(spec.dtype).itemsize
    flop = 2.0 * layer.nnz * spec.n * spec.out_h * spec.out_w
    moved = itemsize * (math.prod(spec.x_shape) + math.prod(spec.out_shape)) + (itemsize + _INDEX_BYTES) * layer.nnz
    return Place(layer.names[0], flop / moved, flop / _us(layer) * 1e-3)


def _us(layer: Layer) -> float:
    return layer.median_us if layer.gpu is None else layer.gpu.native_us


def parse_peak(text: str) -> Peak:
    """A peak stated as ``"GFLOP/s,GB/s"``, for example ``"66900,3350"``.

    Raises
    ------
    ValueError
        If it is no pair of positive numbers.
    """
    try:
        gflops, gbytes = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected a peak as 'GFLOP/s,GB/s' like '66900,3350', got {text!r}") from None
    return Peak(gflops, gbytes, "as stated by the caller")


def known_peak(device: Device) -> Peak | None:
    """The peak by the maker's data sheet, or None for a device that is not listed."""
    found = None if isinstance(device, CpuDevice) else _DATA_SHEETS.get(device.name)
    return None if found is None else Peak(*found, "by the maker's data sheet, float32 without tensor cores")


def measure_peak(device: Device) -> Peak:
    """Measure the CPU's peak: torch's float32 matrix product and copy, with the threads of the tuned file.

    Takes about a second; the best of several calls counts.

    Raises
    ------
    ValueError
        If `device` is a GPU, or not the CPU of this process.
    """
    if not isinstance(device, CpuDevice):
        raise ValueError(f"the peak of a GPU is not measured ({device.label}): state it as GFLOP/s,GB/s")
    here = this_device(device.threads)
    if device != here:
        raise ValueError(f"the tuned file is of {device.label}, this is {here.label}: state the peak as GFLOP/s,GB/s")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(device.threads)
    try:
        return Peak(_product_gflops(), _copy_gbytes(), "measured here: torch's matrix product and copy")
    finally:
        torch.set_num_threads(before)


def _product_gflops() -> float:
    import torch

    size = 1536
    a, out = torch.ones(size, size), torch.empty(size, size)
    return 2e-9 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=out))


def _copy_gbytes() -> float:
    """Bytes read and bytes written, of arrays beyond every cache."""
    import torch

    a, out = torch.ones(1 << 26), torch.empty(1 << 26)
    return 2e-9 * a.nbytes / _best_seconds(lambda: out.copy_(a))


def _best_seconds(call: Callable[[], object], count: int = 6) -> float:
    call()
    best = math.inf
    for _ in range(count):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
