"""When a function on images may take a shorter way than torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_plain(x: Tensor) -> bool:
    """Whether it is a batch of images on the CPU of which no gradient is asked, and nobody traces this."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() == 4
        and x.is_cpu
        and not (torch.is_grad_enabled() and x.requires_grad)
    )
