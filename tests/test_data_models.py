"""The networks that are timed whole: published sizes, and ranges that float32 holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import models


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"),
    # Parameters as torchvision's documentation states them.
    [("resnet18", 20, 11_689_512), ("resnet50", 53, 25_557_032), ("vgg16", 13, 138_357_544)],
)
def test_published_sizes(name: str, convolutions: int, parameters: int) -> None:
    with torch.device("meta"):
        model = models.MODELS[name]()
        scores = model(torch.empty(2, 3, models.IMAGE, models.IMAGE))
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert scores.shape == (2, models.CLASSES)


def test_settled_batch_norms_keep_the_range() -> None:
    model = models.random_model(models.resnet18)
    x = torch.randn(1, 3, 64, 64)
    models.settle_batch_norms(model, x)
    assert not any(module.training for module in model.modules())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    with torch.no_grad():
        assert 0.01 < float(model(x).abs().max()) < 1000
