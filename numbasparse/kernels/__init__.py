"""The kernels' table: the only place that lists them.  Adding a kernel is one file and one line here."""

from __future__ import annotations

from numbasparse.kernels.base import (
    Config,
    ConfigError,
    CudaKernel,
    CudaRunner,
    Kernel,
    Runner,
    TorchRunner,
)
from numbasparse.kernels.cpu_columns import CpuColumns
from numbasparse.kernels.cpu_direct import CpuDirect
from numbasparse.kernels.cpu_pointwise import CpuPointwise
from numbasparse.kernels.cpu_vector import CpuVector
from numbasparse.kernels.cuda_dense import CudaDense
from numbasparse.kernels.cuda_direct import CudaDirect
from numbasparse.kernels.cuda_mma import CudaMma
from numbasparse.kernels.cuda_simple import CudaSimple
from numbasparse.kernels.cuda_wgmma import CudaWgmma
from numbasparse.kernels.cuda_wgmma_nhwc import CudaWgmmaNhwc
from numbasparse.kernels.dense import Dense

__all__ = [
    "KERNELS",
    "Config",
    "ConfigError",
    "CudaKernel",
    "CudaRunner",
    "Kernel",
    "Runner",
    "TorchRunner",
    "kernel",
    "kernels_for",
]

# For each device in the order of preference for problems that nobody tuned.
_TABLE: tuple[Kernel, ...] = (
    CpuVector(),
    CpuPointwise(),
    CpuColumns(),
    CpuDirect(),
    Dense(),
    CudaDirect(),
    CudaSimple(),
    CudaWgmma(),
    CudaWgmmaNhwc(),
    CudaMma(),
    CudaDense(),
)
KERNELS: dict[str, Kernel] = {k.name: k for k in _TABLE}


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return KERNELS[name]
    except (KeyError, TypeError):
        raise ValueError(f"expected a kernel's name, one of {sorted(KERNELS)}, got {name!r}") from None


def kernels_for(device: str) -> list[Kernel]:
    """Kernels that run on a kind of device (``"cpu"`` or ``"cuda"``)."""
    return [k for k in KERNELS.values() if k.device == device]
