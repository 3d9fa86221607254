"""Max pooling: code of our own on a CPU, and on a GPU in NHWC and CHWN."""

from __future__ import annotations

import functools
from math import prod

import torch
from torch import Tensor, nn

from numbasparse.nn.plain import is_unnoticed, threads
from numbasparse.runtime import max_pool, memory
from numbasparse.runtime.cpu_max_pool import Pool, max_pool_job
from numbasparse.runtime.job import Job
from numbasparse.runtime.layouts import Layout, layout_of


class SeparableMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` first over rows, then over columns, with the same result.

    Float32 images in NCHW on the CPU are pooled by `runtime.cpu_max_pool`, images in NHWC and CHWN on a GPU by
    `runtime.max_pool`; torch's own would copy those in CHWN to NCHW first.  Where a gradient is asked for, in other
    cases, and with options that it does not know, it does what ``nn.MaxPool2d`` does.
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
        pool = self.as_pool(x) if is_unnoticed(x) else None
        return super().forward(x) if pool is None else _pooled(pool, x)

    def as_pool(self, x: Tensor) -> Pool | None:
        """The pooling of an image as code of ours has it, or None."""
        plain = self._plain(x) and x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
        if not plain or x.numel() == 0 or not self._fits(x):
            return None
        sizes = (_pair(value) for value in (self.kernel_size, self.stride, self.padding))
        return Pool(prod(x.shape[:-2]), x.shape[-2], x.shape[-1], *sizes)

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


def _pooled(pool: Pool, x: Tensor) -> Tensor:
    job, y = _job(pool), memory.empty_tensor((*x.shape[:-2], *pool.out))
    job.run(x.data_ptr(), y.data_ptr(), 0, threads())
    return y


@functools.lru_cache(maxsize=256)
def _job(pool: Pool) -> Job:
    return max_pool_job(pool)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
