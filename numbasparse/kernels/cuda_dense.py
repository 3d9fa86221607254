"""The vendor's dense convolution on NVIDIA GPUs (cuDNN through torch): always a candidate, and the fall-back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numbasparse.activations import Activation, in_torch
from numbasparse.kernels.base import Config, CudaKernel, CudaRunner, Space, check_fields
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, to_layout

if TYPE_CHECKING:
    import torch

    from numbasparse.spec import ConvSpec
    from numbasparse.weight import SparseWeight

_LAYOUTS = ("nchw", "nhwc")
_PRECISIONS = ("strict", "tf32")


def tf32_allowed() -> bool:
    """Whether the user lets float32 be computed with TF32's 10-bit mantissas.

    torch's own default is yes for convolutions and no for matrices.  Here float32 means float32 unless asked: by
    ``torch.set_float32_matmul_precision("high")`` or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``, and
    with convolutions not taken out (``torch.backends.cudnn.conv.fp32_precision = "ieee"``).
    """
    import torch

    backends: Any = torch.backends
    return all(part.fp32_precision == "tf32" for part in (backends.cuda.matmul, backends.cudnn.conv))


class _Runner(CudaRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation) -> None:
        import torch

        reason = cuda.reason_unavailable()
        if reason is not None:
            raise cuda.CudaError(reason)
        if not torch.backends.cudnn.is_available():
            raise cuda.CudaError("torch has no cuDNN here: install a CUDA build of torch that brings it")
        self.takes: Layout = "NHWC" if config["layout"] == "nhwc" else "NCHW"
        self.gives = self.takes
        device = torch.device("cuda", torch.cuda.current_device())
        dense = torch.from_numpy(weight.to_dense()).to(device, getattr(torch, spec.dtype))
        # cuDNN reads the layout off the strides, those of torch's memory formats.
        self._format = torch.channels_last if self.takes == "NHWC" else torch.contiguous_format
        self._weight = dense.to(memory_format=self._format)
        self._spec = spec
        self._activate = in_torch(activation, inplace=True)
        self._tf32 = config["precision"] == "tf32"
        self.nbytes = self._weight.nbytes

    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_layout: Layout | None = None,
    ) -> torch.Tensor:
        import torch
        from torch.nn import functional as F

        spec = self._spec
        (top, bottom), (left, right) = spec.padding
        if top != bottom or left != right:
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        x = x.contiguous(memory_format=self._format)
        # Not F.conv2d: its benchmark and TF32 settings belong to the process, these to the call.
        y = torch.cudnn_convolution(
            x,
            self._weight,
            padding=(top, left),
            stride=spec.stride,
            dilation=spec.dilation,
            groups=spec.groups,
            benchmark=True,
            deterministic=False,
            allow_tf32=self._tf32,
        )
        if bias is not None:
            y.add_(bias.view(1, -1, 1, 1))
        if residual is not None:
            y.add_(residual)
        y = self._activate(y)
        return to_layout(y, self.gives if out_layout is None else out_layout)


class CudaDense(CudaKernel):
    """cuDNN; ``layout`` is the memory order that it works in, ``precision`` whether float32 may be TF32."""

    name = "cuda_dense"
    is_dense = True
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        tf32 = spec.dtype == "float32" and tf32_allowed()
        return {"layout": _LAYOUTS, "precision": _PRECISIONS if tf32 else _PRECISIONS[:1]}

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = check_fields(config, {"layout": _LAYOUTS, "precision": _PRECISIONS})
        if reason is None and config["precision"] == "tf32":
            if spec.dtype != "float32":
                return f"TF32 is for float32, the dtype is {spec.dtype}"
            if not tf32_allowed():
                return "TF32 is not allowed here: torch.set_float32_matmul_precision('high') allows it"
        return reason

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return {"layout": "nchw" if spec.dtype == "float32" else "nhwc", "precision": "strict"}

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[Layout, Layout]:
        layout: Layout = "NHWC" if config["layout"] == "nhwc" else "NCHW"
        return layout, layout

    def ptx(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        return ()

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, config, activation)
