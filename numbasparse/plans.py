"""Plans: a kernel, its config, its packed weight and its compiled code for one spec, ready to be called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numbasparse.activations import check_activation
from numbasparse.choices import (
    DENSE_ABOVE,
    DENSE_ABOVE_CUDA,
    LINEAR_DENSE_ABOVE,
    Choice,
    Chooser,
    ConfigLike,
    Measured,
    check_float,
    check_kind,
    default_choice,
    dense_above,
    is_tensor,
    parse_device,
    resolve,
)
from numbasparse.cpu_plans import Plan
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch


def plan(
    spec: ConvSpec,
    weight: SparseWeight,
    *,
    device: str = "cpu",
    config: ConfigLike = None,
    activation: str | None = None,
    threads: int | None = None,
) -> Plan:
    """Pack ``weight`` and compile a kernel for ``spec``.

    Parameters
    ----------
    spec
        The problem; its weight shape must be the weight's.
    device
        ``"cpu"``, ``"cuda"`` (torch's current GPU) or a certain GPU, as ``"cuda:1"``, on which the weight is packed.
        On a GPU the dtype of the spec is that of the activations in memory; sums are in float32.
    config
        Which kernel and config (see `ConfigLike`); None takes `default_choice`.
    activation
        None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"leaky_relu(SLOPE)"``, applied to the output.
    threads
        How many threads at most; None takes `numbasparse.runtime.cpu.get_num_threads`.  Means nothing on a GPU.

    Raises
    ------
    ValueError
        For shapes that do not match, an unknown device, kernel, parameter or activation.
    numbasparse.runtime.cuda.CudaError
        If there is no usable GPU.
    """
    kind, _ = parse_device(device)
    spec.check_weight_shape(weight.shape)
    if weight.groups != spec.groups:
        raise ValueError(f"weight has groups={weight.groups}, the spec has groups={spec.groups}")
    count = cpu.get_num_threads() if threads is None else _check_threads(threads)
    name = check_activation(activation)
    if kind == "cuda":
        from numbasparse.cuda_plans import cuda_plan

        return cuda_plan(spec, weight, device, config, name)
    choice = resolve(config, spec, weight, count, kind)
    check_kind(choice, kind)
    return Plan(spec, weight, choice, name, count)


def device_and_dtype(x: torch.Tensor) -> tuple[str, str]:
    """What a plan for a tensor outside of the host's memory is made for: device as in "cuda:0", and spec's dtype.

    Raises
    ------
    ValueError
        If it is on no GPU of NVIDIA's.
    TypeError
        If its dtype is none of `DTYPES`.
    """
    if not x.is_cuda:
        raise ValueError(f"x is on device {x.device}: only the CPU and NVIDIA GPUs are supported, call x.cpu()")
    dtype = str(x.dtype).removeprefix("torch.")
    check_float(dtype)
    return f"cuda:{x.get_device()}", dtype


def _check_threads(threads: int) -> int:
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= cpu.MAX_THREADS:
        raise ValueError(f"threads must be from 1 to {cpu.MAX_THREADS}, got {threads!r}")
    return threads


__all__ = [
    "DENSE_ABOVE",
    "DENSE_ABOVE_CUDA",
    "LINEAR_DENSE_ABOVE",
    "Choice",
    "Chooser",
    "ConfigLike",
    "Measured",
    "Plan",
    "check_activation",
    "default_choice",
    "dense_above",
    "device_and_dtype",
    "is_tensor",
    "parse_device",
    "plan",
    "resolve",
]
