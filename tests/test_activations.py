"""Names of activations, and what they are in torch."""

from __future__ import annotations

import math

import pytest

from numbasparse.activations import check_activation, in_torch, leaky_relu, slope_of

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "none"),
        ("none", "none"),
        ("silu", "silu"),
        ("leaky_relu", "leaky_relu(0.01)"),
        ("leaky_relu(2e-1)", "leaky_relu(0.2)"),
        ("leaky_relu(0)", "leaky_relu(0.0)"),
    ],
)
def test_names(given: str | None, name: str) -> None:
    assert check_activation(given) == name
    assert check_activation(name) == name


@pytest.mark.parametrize(
    "wrong", ["", "gelu", "ReLU", "leaky_relu()", "leaky_relu(x)", "leaky_relu(-0.1)", "leaky_relu(inf)", 3]
)
def test_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"activation must be|slope of leaky_relu"):
        check_activation(wrong)


@pytest.mark.parametrize("slope", [-1.0, math.nan, math.inf])
def test_slopes_refused(slope: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        leaky_relu(slope)


def test_slope() -> None:
    assert slope_of(leaky_relu(0.2)) == 0.2
    assert slope_of("relu") is None


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "leaky_relu(0.2)"])
def test_in_place_gives_the_same(activation: str) -> None:
    x = torch.linspace(-8, 8, 33)
    expected = in_torch(activation)(x).clone()
    assert torch.equal(x, torch.linspace(-8, 8, 33))
    assert torch.equal(in_torch(activation, inplace=True)(x), expected)
