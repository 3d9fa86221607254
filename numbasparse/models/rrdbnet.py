"""RRDBNet, which enlarges pictures four times.

Wang et al., "ESRGAN" (2018, arXiv 1809.00219); with 6 or 23 blocks the networks of Real-ESRGAN (Wang et al., 2021,
arXiv 2107.10833), whose ``x4plus-anime`` and ``x4plus`` weights have the names of the modules here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 4


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of which sees the outputs of all before it; (N, features, H, W) to the same.

    Plain modules only, so that torch.fx can trace it and every layer can be found and replaced by name.
    """

    def __init__(self, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv1 = conv(features, growth)
        self.conv2 = conv(features + growth, growth)
        self.conv3 = conv(features + 2 * growth, growth)
        self.conv4 = conv(features + 3 * growth, growth)
        self.conv5 = conv(features + 4 * growth, features)
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.relu(self.conv1(x))
        x2 = self.relu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.relu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.relu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * 0.2 + x


class RRDB(nn.Module):
    """Residual in residual: three dense blocks and a shortcut around them."""

    def __init__(self, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(features, growth)
        self.rdb2 = DenseBlock(features, growth)
        self.rdb3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    """Enlarge pictures four times; as it is by default: 96 convolutions, 4.47 million parameters.

    Input float32 (N, 3, H, W), RGB in [0, 1]; output (N, 3, 4H, 4W), about [0, 1].

    Parameters
    ----------
    blocks : int
        Residual blocks of 15 convolutions.
    features, growth : int
        Channels between the blocks, and those that each convolution of a dense block adds.
    """

    def __init__(self, blocks: int = 6, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = conv(3, features)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.conv_body = conv(features, features)
        self.conv_up1 = conv(features, features)
        self.conv_up2 = conv(features, features)
        self.conv_hr = conv(features, features)
        self.conv_last = conv(features, 3)
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(x)
        y = first + self.conv_body(self.body(first))
        y = self.relu(self.conv_up1(F.interpolate(y, scale_factor=2.0, mode="nearest")))
        y = self.relu(self.conv_up2(F.interpolate(y, scale_factor=2.0, mode="nearest")))
        return self.conv_last(self.relu(self.conv_hr(y)))

    @property
    def reach(self) -> int:
        """How far a pixel of the input can change the output, in pixels of the input: 94 with 6 blocks, 349 with 23.

        Every 3x3 convolution reaches one pixel further: 15 for each block, ``conv_first`` and ``conv_body``.
        After these, ``conv_up1`` reaches half a pixel, and ``conv_up2``, ``conv_hr`` and ``conv_last`` a quarter
        each; 1.25 in all, which touch the second pixel beyond an edge of the input's grid.
        """
        return 15 * len(self.body) + 2 + 2


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def from_state(state: Mapping[str, Tensor], source: str) -> RRDBNet:
    """Make the network that a ``state_dict`` belongs to; float32, in eval mode, on the CPU.

    Blocks, features and growth follow from names and shapes.

    Parameters
    ----------
    state : mapping of str to Tensor
        Of any floating dtype.
    source : str
        What to call it in an error: the file's name.

    Raises
    ------
    ValueError
        If it is the state of something else, or a value is not finite.
    """
    blocks = {int(found[1]) for name in state if (found := re.match(r"body\.(\d+)\.", name))}
    try:
        features = len(state["conv_first.weight"])
        growth = len(state["body.0.rdb1.conv1.weight"])
        model = RRDBNet(len(blocks), features, growth)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (KeyError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{source} does not hold the weights of an RRDBNet: {reason}") from error
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} cannot be used: {broken[0]} has values that are NaN or infinite")
    return model.eval()
