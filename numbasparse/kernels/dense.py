"""The vendor's dense convolution (oneDNN through torch): always a candidate, and the fall-back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numbasparse.activations import Activation, in_torch
from numbasparse.kernels.base import Config, Kernel, Space, TorchRunner, check_fields

if TYPE_CHECKING:
    import torch

    from numbasparse.spec import ConvSpec
    from numbasparse.weight import SparseWeight


class _Runner(TorchRunner):
    def __init__(self, spec: ConvSpec, weight: SparseWeight, layout: str, activation: Activation) -> None:
        import torch

        self._format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        dense = torch.from_numpy(weight.to_dense())
        self._weight = dense.to(memory_format=self._format)
        self._matrix = dense.view(spec.k, spec.c) if is_linear(spec) else None
        self._spec = spec
        self._activate = in_torch(activation, inplace=True)
        self.nbytes = dense.numel() * 4

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        from torch.nn import functional as F

        spec = self._spec
        if self._matrix is not None:
            # As nn.Linear computes it: oneDNN's convolution takes ten times as long on one pixel.
            vectors = x.reshape(spec.n, spec.c) if spec.w == 1 else x.reshape(spec.c, spec.w).t()
            y = F.linear(vectors, self._matrix, bias)
            y = (y if spec.w == 1 else y.t()).reshape(spec.out_shape)
            if residual is not None:
                y = y.add_(residual)
            return self._activate(y).contiguous()
        (top, bottom), (left, right) = spec.padding
        if top != bottom or left != right:
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        x = x.contiguous(memory_format=self._format)
        y = F.conv2d(x, self._weight, bias, spec.stride, (top, left), spec.dilation, spec.groups)
        if residual is not None:
            y.add_(residual)
        y = self._activate(y)
        return y.contiguous()


def is_linear(spec: ConvSpec) -> bool:
    """Whether a problem is that of a linear layer: a 1x1 kernel on one pixel, or on one image of one row."""
    few = spec.h == 1 and (spec.w == 1 or spec.n == 1)
    return few and spec.groups == 1 and spec.is_pointwise and not spec.is_padded and spec.out_w == spec.w


class Dense(Kernel):
    """Dense convolution of torch; ``layout`` is the memory order that it works in (conversion included)."""

    name = "dense"
    device = "cpu"
    is_dense = True
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        try:
            import torch  # noqa: F401
        except ImportError:
            return "torch is not installed (pip install 'numbasparse[torch]')"
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {"layout": ("nchw",) if is_linear(spec) else ("nchw", "nhwc")}

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        return check_fields(config, {"layout": ("nchw", "nhwc")})

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return {"layout": "nchw"}

    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> TorchRunner:
        self.require(spec, weight, config)
        return _Runner(spec, weight, str(config["layout"]), activation)
