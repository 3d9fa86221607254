"""Dense convolutions on a GPU whose bias, residual and ReLU cuDNN computes where it writes their result."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from numbasparse.activations import check_activation, in_torch
from numbasparse.runtime.layouts import Layout, has_layout

_DTYPES = (torch.float16, torch.bfloat16)
_Conv = TypeVar("_Conv", bound=nn.Conv2d)


class FusedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with an activation, and a residual that is added before it.

    For 16-bit values, ReLU, and a weight or an input in channels-last, these are part of cuDNN's convolution (torch's
    operators ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``), with the process's own cuDNN settings.
    torch itself passes over the whole result for each: once for the bias, once for the sum, once for the activation.
    For anything else, and where a gradient is asked for, it does what torch does.

    Attributes
    ----------
    activation : str
        "none" or its name, see `numbasparse.activations`.
    """

    def __init__(self, *args: Any, activation: str = "none", **options: Any) -> None:
        super().__init__(*args, **options)
        self.activation: str = check_activation(activation)

    @classmethod
    def of(cls, conv: nn.Conv2d, activation: str = "none") -> FusedConv2d:
        """Take over a convolution's options and parameters."""
        made = empty_like(conv, cls)
        made.weight, made.bias, made.activation = conv.weight, conv.bias, check_activation(activation)
        return made.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve (N, C, H, W) or (C, H, W), add ``residual``, activate."""
        if self._fuses(x, residual):
            padding: Any = self.padding
            x = x.contiguous(memory_format=torch.channels_last)
            given = (self.bias, self.stride, padding, self.dilation, self.groups)
            if residual is None:
                return torch.cudnn_convolution_relu(x, self.weight, *given)
            return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *given)
        y = super().forward(x)
        return in_torch(self.activation)(y if residual is None else y + residual)

    def _fuses(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether cuDNN computes it all."""
        if not x.is_cuda or x.dim() != 4 or self.activation != "relu" or not _known_to_cudnn(self):
            return False
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        if torch.is_autocast_enabled("cuda") or not torch.backends.cudnn.is_available():
            return False
        if residual is not None and (residual.dtype != x.dtype or residual.shape != self._out_shape(x)):
            return False
        in_channels_last = has_layout(x, "NHWC") or has_layout(self.weight, "NHWC")
        return self.weight.dtype == x.dtype and in_channels_last

    def _out_shape(self, x: Tensor) -> tuple[int, ...]:
        assert not isinstance(self.padding, str)
        sizes = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return (x.shape[0], self.out_channels, *sizes)


def empty_like(conv: nn.Conv2d, kind: type[_Conv]) -> _Conv:
    """A convolution of that kind with another one's options, and parameters that hold nothing."""
    return kind(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )


def worth_fusing(conv: nn.Module, plain: Layout) -> bool:
    """Whether cuDNN has such convolutions: of a dense layer of a model whose layout is ``plain``."""
    return type(conv) is nn.Conv2d and conv.weight.is_cuda and plain == "NHWC" and _known_to_cudnn(conv)


def _known_to_cudnn(conv: nn.Conv2d) -> bool:
    """Whether its options and the type of its weight are such as cuDNN computes with what follows."""
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zeros and conv.groups == 1 and conv.weight.dtype in _DTYPES
