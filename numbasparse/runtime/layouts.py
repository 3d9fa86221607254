"""Layouts of an activation: the order of (N, C, H, W) in memory, carried by a tensor's strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Layout = Literal["NCHW", "NHWC", "CHWN"]
"""Slowest to fastest dimension in memory; the tensor's logical shape is (N, C, H, W) in all of them."""

_ORDER: dict[Layout, tuple[int, int, int, int]] = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1), "CHWN": (1, 2, 3, 0)}
_BACK: dict[Layout, tuple[int, int, int, int]] = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2), "CHWN": (3, 0, 1, 2)}
LAYOUTS: tuple[Layout, ...] = tuple(_ORDER)


def has_layout(x: torch.Tensor, layout: Layout) -> bool:
    """Whether ``x``, (N, C, H, W), lies in memory as ``layout`` says, without gaps; dimensions of size 1 fit any."""
    return x.is_contiguous() if layout == "NCHW" else x.permute(_ORDER[layout]).is_contiguous()


def layout_of(x: torch.Tensor) -> Layout | None:
    """The layout of ``x``, (N, C, H, W); the first of `LAYOUTS` where several fit, None where none does."""
    for layout in LAYOUTS:
        if has_layout(x, layout):
            return layout
    return None


def strides(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Strides, in elements, of a tensor of logical ``shape`` (N, C, H, W) that lies in memory as ``layout`` says."""
    found, step = [0, 0, 0, 0], 1
    for dimension in reversed(_ORDER[layout]):
        found[dimension] = step
        step *= shape[dimension]
    return tuple(found)


def to_layout(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``x``, (N, C, H, W), in ``layout``: itself where it is so already, else a copy."""
    if has_layout(x, layout):
        return x
    made = _transposed(x, layout) if x.is_cuda else None
    return x.permute(_ORDER[layout]).contiguous().permute(_BACK[layout]) if made is None else made


def _transposed(x: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """The copy by a kernel of our own; None where there is none for it, or somebody traces or wants a gradient."""
    import torch

    from numbasparse.runtime import transpose

    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or x.numel() == 0:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or x.element_size() not in (2, 4):
        return None
    n, c, h, w = x.shape
    source = layout_of(x)
    matrices = None if source is None else transpose.Matrices.of(n, c, h, w, source, layout)
    if matrices is None or matrices.blocks >= 1 << 31 or x.device.index != torch.cuda.current_device():
        return None
    made = empty(x.shape, layout, dtype=x.dtype, device=x.device)
    transpose.transpose(x.detach(), made, matrices)
    return made


def empty(shape: Sequence[int], layout: Layout, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A tensor of logical ``shape`` (N, C, H, W) in ``layout``, its values not set."""
    import torch

    order = _ORDER[layout]
    return torch.empty([shape[i] for i in order], dtype=dtype, device=device).permute(_BACK[layout])
