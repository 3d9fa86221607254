"""Tuned models for the tests of reports, made without measuring anything."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from autotune.measure import GpuTimes
from autotune.tuned import Chosen, CpuDevice, CudaDevice, Device, Layer, TunedModel, Versions, bucket_of
from numbasparse.kernels import KERNELS
from numbasparse.spec import ConvSpec

SPEC = ConvSpec(2, 16, 14, 14, 32, 3, 3, padding=((1, 1), (1, 1)))
CPU = CpuDevice("A processor & kin", 8, 2, "Linux", "x86_64")
GPU = CudaDevice("NVIDIA H100 80GB HBM3", "9.0", 132)
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CONFIG: dict[str, int | str] = {"lanes": 8, "tile": "14x1"}


def layer(name: str, sparsity: float = 0.9, us: float = 50.0, dense_us: float | None = 100.0, **changes: Any) -> Layer:
    """A layer of `SPEC` on the CPU."""
    fields: dict[str, Any] = {
        "names": [name],
        "spec": SPEC.to_dict(),
        "sparsity": sparsity,
        "bucket": bucket_of(sparsity),
        "nnz": round((1.0 - sparsity) * 32 * 16 * 9),
        "fingerprint": "f" * 32,
        "choice": Chosen("cpu_direct", KERNELS["cpu_direct"].version, CONFIG),
        "median_us": us,
        "spread_us": 1.5,
        "dense_us": dense_us,
        "dense_choice_us": dense_us,
        "ratio": None if dense_us is None or us == 0.0 else dense_us / us,
        "trials": 7,
        "top": [],
    }
    return Layer(**(fields | changes))


def gpu_layer(name: str) -> Layer:
    """A layer of `SPEC` on a GPU."""
    choice = Chosen("cuda_direct", KERNELS["cuda_direct"].version, {"tile": 8})
    times = GpuTimes("NCHW", "CHWN", "CHWN", 20.0, 60.0, 30.0)
    return layer(name, choice=choice, gpu=times)


def model(*layers: Layer, device: Device = CPU) -> TunedModel:
    """A tuned model of these layers."""
    cuda = {"numba_cuda": "0.30.0", "driver": "13.0", "cudnn": "91900"} if device.kind == "cuda" else {}
    return TunedModel(layers, device, Versions("0.1.0", "0.68.1", "0.50.0", "2.4.6", "2.13.0", **cuda), CREATED)
