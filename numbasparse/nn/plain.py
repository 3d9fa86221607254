"""When a function on images may take a shorter way than torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from numbasparse.runtime import cpu


def is_plain(x: Tensor) -> bool:
    """Whether it is a batch of images on the CPU of which no gradient is asked, and nobody traces this."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() == 4
        and x.is_cpu
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def threads() -> int:
    """As many as torch has, or as our own code knows."""
    return min(torch.get_num_threads(), cpu.MAX_THREADS)


def is_unnoticed(x: Tensor) -> bool:
    """Whether nothing records, transforms or stands in for operators, and the tensor is torch's own."""
    return (
        not torch.compiler.is_compiling()  # first: what compiles cannot ask for the rest
        and type(x) is Tensor
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.autograd._profiler_enabled()
    )
