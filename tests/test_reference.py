from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import conv_specs, random_weight, sparse_weights

from numbasparse.kernels.reference import conv2d_reference
from numbasparse.spec import ConvSpec

TORCH_ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "leaky_relu(0.2)": lambda y: torch.nn.functional.leaky_relu(y, 0.2),
}
ACTIVATIONS = tuple(TORCH_ACTIVATIONS)


def _torch(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, spec: ConvSpec, activation: str | None
) -> np.ndarray:
    (top, bottom), (left, right) = spec.padding
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    torch_bias = None if bias is None else torch.from_numpy(bias).double()
    torch_weight = torch.from_numpy(weight).double()
    y = torch.nn.functional.conv2d(padded, torch_weight, torch_bias, spec.stride, 0, spec.dilation, spec.groups)
    return TORCH_ACTIVATIONS[activation](y).numpy()


def _problem(spec: ConvSpec, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    return x, random_weight(spec, 0.5, rng), rng.standard_normal(spec.k).astype(np.float32)


def _check(spec: ConvSpec, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, act: str | None) -> None:
    ours = conv2d_reference(x, w, bias, spec, act)
    assert ours.dtype == np.float64
    assert ours.shape == spec.out_shape
    np.testing.assert_allclose(ours, _torch(x, w, bias, spec, act), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("padding", [0, 2, ((0, 1), (3, 2))])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_grid_against_torch(stride, padding, dilation, groups, kernel) -> None:  # type: ignore[no-untyped-def]
    weight_shape = (12, 6 // groups, *kernel)
    spec = ConvSpec.create((2, 6, 9, 11), weight_shape, stride, padding, dilation, groups)
    x, w, bias = _problem(spec)
    for activation in ACTIVATIONS:
        _check(spec, x, w, bias, activation)
    _check(spec, x, w, None, None)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_spec_against_torch(data: st.DataObject) -> None:
    spec = data.draw(conv_specs())
    weight = data.draw(sparse_weights(spec)).to_dense()
    x, _, bias = _problem(spec, seed=1)
    _check(spec, x, weight, data.draw(st.sampled_from([None, bias])), data.draw(st.sampled_from(ACTIVATIONS)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_special_values(activation: str | None) -> None:
    values = np.array([np.nan, -np.inf, np.inf, -1e4, -0.5, 0.0, 0.5, 5.9, 6.1, 1e4], np.float32)
    spec = ConvSpec.create((1, 1, 1, 10), (1, 1, 1, 1))
    ours = conv2d_reference(values.reshape(spec.x_shape), np.ones((1, 1, 1, 1)), None, spec, activation)
    expected = TORCH_ACTIVATIONS[activation](torch.from_numpy(values).double()).numpy()
    np.testing.assert_allclose(ours.ravel(), expected, rtol=1e-12)


def test_refuses() -> None:
    spec = ConvSpec.create((1, 2, 4, 4), (3, 2, 3, 3))
    x, w, bias = _problem(spec)
    with pytest.raises(ValueError, match="input must have shape"):
        conv2d_reference(x[0], w, bias, spec)
    with pytest.raises(ValueError, match="weight must have shape"):
        conv2d_reference(x, w[:, :1], bias, spec)
    with pytest.raises(ValueError, match="bias must have shape"):
        conv2d_reference(x, w, bias[:2], spec)
    with pytest.raises(ValueError, match=r"activation must be None, 'relu'.*got 'gelu'"):
        conv2d_reference(x, w, bias, spec, "gelu")


class TestAssertClose:
    spec = ConvSpec.create((2, 16, 9, 9), (8, 16, 3, 3), padding=1)

    def test_accepts_float32_rounding(self) -> None:
        x, w, bias = _problem(self.spec)
        tensors = [torch.from_numpy(array) for array in (x, w, bias)]
        y = torch.nn.functional.conv2d(tensors[0], tensors[1], tensors[2], padding=1)
        assert_close(y.numpy(), self.spec, x, w, bias)
        assert_close(torch.relu(y).numpy(), self.spec, x, w, bias, "relu")

    def test_accepts_the_references_infinities_and_no_others(self) -> None:
        x, w, bias = _problem(self.spec)
        x[0, 0, 4, 4] = np.inf
        with np.errstate(invalid="ignore"):
            y = conv2d_reference(x, w, bias, self.spec).astype(np.float32)
        assert_close(y, self.spec, x, w, bias)
        y[np.isinf(y)] *= -1
        with pytest.raises(AssertionError, match="not the same NaN or infinity"):
            assert_close(y, self.spec, x, w, bias)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1000.0])
    def test_refuses_one_wrong_output(self, value: float) -> None:
        x, w, bias = _problem(self.spec)
        y = conv2d_reference(x, w, bias, self.spec).astype(np.float32)
        y[1, 2, 3, 4] = value
        with pytest.raises(AssertionError, match=r"1 of 1296 outputs .*\(1, 2, 3, 4\)"):
            assert_close(y, self.spec, x, w, bias)

    def test_refuses_a_missing_product(self) -> None:
        x, w, bias = _problem(self.spec)
        fewer = w.copy()
        fewer[tuple(np.argwhere(w)[0])] = 0
        y = conv2d_reference(x, fewer, bias, self.spec).astype(np.float32)
        with pytest.raises(AssertionError, match="too far"):
            assert_close(y, self.spec, x, w, bias)

    def test_refuses_shape_and_dtype(self) -> None:
        x, w, bias = _problem(self.spec)
        y = conv2d_reference(x, w, bias, self.spec)
        with pytest.raises(AssertionError, match="float64"):
            assert_close(y, self.spec, x, w, bias)
        with pytest.raises(AssertionError, match=r"\(8, 9, 9\)"):
            assert_close(y[0].astype(np.float32), self.spec, x, w, bias)
