"""Max pooling: on a CPU first over rows, then over columns; on a GPU by a kernel of our own in NHWC and CHWN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.runtime import max_pool
from numbasparse.runtime.layouts import Layout, layout_of


class SeparableMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` in two passes of ``torch.maximum``, with the same result.

    torch 2.13's own took 5 times as long for 3x3 with stride 2 on (1, 64, 112, 112), as long as ten of ResNet-50's
    sparse convolutions, and 4 to 11 times as long for 2x2 on VGG-16's images (two threads, AVX2).  On a GPU images in
    NHWC and CHWN are pooled by `runtime.max_pool`; torch's own would copy those in CHWN to NCHW first.  Where a
    gradient is asked for, in other cases, and with options that it does not know, it does what ``nn.MaxPool2d`` does.
    """

    @classmethod
    def of(cls, pool: nn.MaxPool2d) -> SeparableMaxPool2d:
        """Take over the options of a pool."""
        options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode)
        return cls(*options).train(pool.training)

    def forward(self, x: Tensor) -> Tensor:
        """Pool (N, C, H, W) or (C, H, W)."""
        layout = layout_of(x) if x.dim() == 4 and not x.is_contiguous() and not self.return_indices else None
        if layout is not None and self._known_to_kernel(x, layout):
            window = max_pool.Window(_pair(self.kernel_size), _pair(self.stride), _pair(self.padding))
            return max_pool.max_pool(x, layout, window)
        if layout == "CHWN":
            # To torch this is channels-last: C images whose N channels are innermost.
            swapped: Tensor = super().forward(x.transpose(0, 1))
            return swapped.transpose(0, 1)
        if not self._usable(x):
            return super().forward(x)
        (r, s), (down, right), (top, left) = (_pair(v) for v in (self.kernel_size, self.stride, self.padding))
        if top or left:
            x = F.pad(x, (left, left, top, top), value=float("-inf"))
        return _windows(_windows(x, -2, r, down), -1, s, right)

    def _usable(self, x: Tensor) -> bool:
        return self._plain(x) and x.is_cpu and x.is_floating_point() and x.is_contiguous() and self._fits(x)

    def _known_to_kernel(self, x: Tensor, layout: Layout) -> bool:
        """Whether a kernel of ours may run on it: it is a tensor of torch's current GPU, and nobody traces."""
        if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
            return False
        if x.device.index != torch.cuda.current_device() or not self._plain(x) or not self._fits(x):
            return False
        return max_pool.reason_unsupported(x, layout) is None

    def _plain(self, x: Tensor) -> bool:
        """Whether there is nothing to do but to find the largest."""
        kept = not (x.requires_grad and torch.is_grad_enabled())
        return kept and _pair(self.dilation) == (1, 1) and not self.ceil_mode and not self.return_indices

    def _fits(self, x: Tensor) -> bool:
        # What is too large or too small for the window has torch's own error.
        (r, s), (top, left) = _pair(self.kernel_size), _pair(self.padding)
        fits = x.dim() in (3, 4) and x.shape[-2] + 2 * top >= r and x.shape[-1] + 2 * left >= s
        return fits and 2 * top <= r and 2 * left <= s


def _windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Largest of each ``size`` neighbours along a dimension, every ``step``."""
    count = (x.shape[dim] - size) // step + 1
    length = (count - 1) * step + 1
    parts = [x.narrow(dim, i, length) for i in range(size)]
    parts = [part[..., ::step, :] if dim == -2 else part[..., ::step] for part in parts]
    largest = parts[0]
    for part in parts[1:]:
        largest = torch.maximum(largest, part)
    return largest.contiguous()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
