"""``torch.nn.functional.interpolate`` into memory that is kept: it makes the largest tensors of many networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from numbasparse.nn.plain import is_plain
from numbasparse.runtime import memory


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Do what torch's function does; the result of ``"nearest"`` on images on the CPU lies in memory that is kept."""
    options = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if has_torch_function((input,)):  # as torch's own functions do, for those who trace
        traced: Tensor = handle_torch_function(interpolate, (input,), input, *options)
        return traced
    whole = isinstance(scale_factor, (int, float)) and float(scale_factor).is_integer() and scale_factor >= 1
    plain = size is None and whole and mode == "nearest" and not recompute_scale_factor and not antialias
    if not plain or align_corners is not None or not (is_plain(input) and _usable(input)):
        return F.interpolate(input, *options)
    n, c, h, w = input.shape
    scale = int(scale_factor)
    out = memory.empty_tensor((n, c, h * scale, w * scale))
    made: Tensor = torch.ops.aten.upsample_nearest2d.out(input, out.shape[2:], float(scale), float(scale), out=out)
    return made


def _usable(x: Tensor) -> bool:
    return x.numel() > 0 and x.dtype is torch.float32 and x.is_contiguous()


def enlarge_in_kept_memory(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Let a graph call `interpolate` of this module; tells whether it called torch's."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is F.interpolate]
    for node in found:
        node.target = interpolate
    return bool(found)
