"""ResNet-18, ResNet-50 and VGG-16, for timing whole networks: the published architectures with random weights.

ResNet: He et al., "Deep residual learning for image recognition" (2015, arXiv 1512.03385), with the stride of a
bottleneck in its 3x3 convolution, as is usual since (Goyal et al., 2017, arXiv 1706.02677).  VGG: Simonyan and
Zisserman, "Very deep convolutional networks" (2014, arXiv 1409.1556), configuration D, without batch normalization.
Modules have torchvision's names, so its weights load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from numbasparse.pruning import MagnitudePruning, prune_

CLASSES = 1000
IMAGE = 224


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; (N, in_channels, H, W) to (N, 4 * channels, H/stride, W/stride)."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Images float32 (N, 3, H, W) to scores (N, classes); ``blocks`` is how many of each of the four stages."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, int, int, int], classes: int = CLASSES
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            layers: list[nn.Module] = []
            for i in range(count):
                layers.append(block(channels, width, 2 if stage > 0 and i == 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG16(nn.Module):
    """Images float32 (N, 3, H, W) to scores (N, classes): thirteen 3x3 convolutions, three linear layers."""

    CHANNELS: ClassVar[tuple[tuple[int, int], ...]] = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for count, channels in self.CHANNELS:
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 49, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width but for the stride."""
    return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """What brings a block's input to the shape of its output, if anything is needed."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def resnet18() -> ResNet:
    """20 convolutions, 11.7 million parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet50() -> ResNet:
    """53 convolutions, 25.6 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3))


def vgg16() -> VGG16:
    """13 convolutions, 138.4 million parameters, of which 123.6 million are of the linear layers."""
    return VGG16()


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "resnet50": resnet50, "vgg16": vgg16}


def random_model(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with normal weights of He's variance (arXiv 1502.01852), in eval mode."""
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def settle_batch_norms(model: nn.Module, x: Tensor) -> None:
    """Give batch normalizations the statistics of ``x``, so that activations stay in range; in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def to_prune(model: nn.Module) -> list[nn.Module]:
    """The convolutions but the first, and the linear layers but the last."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [*convolutions[1:], *linear[:-1]]


def pruned(dense: nn.Module, sparsity: float, x: Tensor) -> nn.Module:
    """A copy with the largest weights of each layer of `to_prune`, and batch normalizations settled on ``x``."""
    model = copy.deepcopy(dense)
    layers = to_prune(model)
    prune_(model, MagnitudePruning(sparsity=sparsity, scope="layer"), filter=lambda module, name: module in layers)
    settle_batch_norms(model, x)
    return model.eval()
