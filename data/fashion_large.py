"""The larger networks of the pruning benchmarks, for 1x28x28 images of Fashion-MNIST, in 10 classes.

Both are their namesakes at half of the width. As there, all but the first convolution are prunable.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from fashion import BasicBlock
from torch import Tensor, nn


class FashionResNet18(nn.Module):
    """ResNet-18 for small images (He et al. 2015, arXiv 1512.03385): 20 convolutions, 2.8 million parameters.

    Input float32 (N, 1, 28, 28) from ``fashion.normalize``; output logits (N, 10). A 3x3 stem without pooling,
    then stages of two blocks with 32 channels at 28x28, 64 at 14x14, 128 at 7x7 and 256 at 4x4.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 32, 64, 128, 256)
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        stages = [nn.Sequential(BasicBlock(c, k, 1 if c == k else 2), BasicBlock(k, k, 1)) for c, k in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.stages(self.stem(x)))))


class FashionVGG16(nn.Module):
    """VGG-16 with batch norm for small images: 13 convolutions, 3.7 million parameters.

    Input float32 (N, 1, 28, 28) from ``fashion.normalize``; output logits (N, 10). Stages of 2, 2, 3, 3 and 3
    convolutions with 32, 64, 128, 256 and 256 channels at 28x28, 14x14, 7x7, 4x4 and 4x4: a pooling of 2 after
    each of the first three, and of the whole map at the end, in place of the three dense layers. Source: Simonyan
    and Zisserman, 2014, arXiv 1409.1556 (configuration D).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, count, pool in ((32, 2, True), (64, 2, True), (128, 3, True), (256, 3, False), (256, 3, False)):
            for _ in range(count):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if pool:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.features(x))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": FashionResNet18, "vgg16": FashionVGG16}


def build(name: str) -> nn.Module:
    """Return an untrained network in eval mode (``torch.manual_seed`` decides its weights).

    Raises
    ------
    ValueError
        If the name is not known.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(map(repr, NETWORKS))}, got {name!r}")
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()
