"""The networks that are timed whole: published sizes, and ranges that float32 holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import fashion
import models

from numbasparse.pruning import reorder_inputs


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


def over_two(model: nn.Module) -> list[int]:
    """Of every sparse convolution what four neighbouring input channels hold over two non-zeros."""
    weights = [m.weight != 0 for m in model.modules() if isinstance(m, nn.Conv2d)]
    held = [w.unflatten(1, (-1, 4)).sum(2) for w in weights if not w.all()]
    return [int((count - 2).clamp(min=0).sum()) for count in held]


def test_a_whole_network_gets_an_order_of_its_channels() -> None:
    """Residual streams and the blocks between them: at 95 % zeros nothing is left over two of four."""
    model = models.random_model(models.resnet18)
    x = torch.randn(1, 3, 64, 64)
    models.settle_batch_norms(model, x)
    model = models.pruned(model, 0.95, x)
    with torch.no_grad():
        expected = model(x)
        before = over_two(model)
        result = reorder_inputs(model)
        assert not result.left
        assert sum(before) > 500
        assert sum(over_two(model)) == 0
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_trained_network_gets_an_order_of_its_channels() -> None:
    model, before = fashion.load_model("pruned"), fashion.load_model("pruned")
    pictures, _ = fashion.load_images()
    x = torch.from_numpy(fashion.normalize(pictures[:32]))
    result = reorder_inputs(model)
    assert len(result.applied) > 10
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels >= 4]
    given = [m for m in before.modules() if isinstance(m, nn.Conv2d) and m.in_channels >= 4]
    assert sum(over_two(nn.Sequential(*layers))) < 0.5 * sum(over_two(nn.Sequential(*given)))
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-3, atol=1e-4)
