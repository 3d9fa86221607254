"""The few operators of ONNX that torch has no module for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AveragePoolNoPad(nn.Module):
    """Average over the inputs in the window alone, where the padding is uneven (count_include_pad=0).

    Parameters
    ----------
    pool
        Average pooling without padding.
    pads
        As ``F.pad`` takes them: last dimension first.
    """

    def __init__(self, pool: nn.Module, pads: list[int]) -> None:
        super().__init__()
        self.pool = pool
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        inside = F.pad(torch.ones_like(x[:1, :1]), self.pads)
        return self.pool(F.pad(x, self.pads)) / self.pool(inside)


class DepthToSpaceDCR(nn.Module):
    """(N, b*b*C, H, W) -> (N, C, H*b, W*b), the block's offset being the slow part of the channel."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(n, c // (b * b), h * b, w * b)


class SpaceToDepth(nn.Module):
    """(N, C, H, W) -> (N, b*b*C, H/b, W/b), the block's offset being the slow part of the channel."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, c * b * b, h // b, w // b)


class HardSigmoid(nn.Module):
    """max(0, min(1, alpha * x + beta)); torch's has alpha 1/6 and beta 1/2."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(self.alpha * x + self.beta, 0.0, 1.0)
