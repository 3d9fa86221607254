"""The oracle: a slow, plain convolution in float64 that defines what every kernel must compute."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from numbasparse.activations import check_activation, slope_of
from numbasparse.spec import ConvSpec


def conv2d_reference(
    x: NDArray[np.floating],
    weight_dense: NDArray[np.floating],
    bias: NDArray[np.floating] | None,
    spec: ConvSpec,
    activation: str | None = None,
    residual: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Convolve with float64 products and sums.

    Every weight takes part, zeros too: an infinity or NaN in `x` reaches every output whose window covers it,
    while a sparse kernel may skip it where the weight is zero. Compare on finite data.

    Parameters
    ----------
    x : ndarray, shape (N, C, H, W)
        Any floating type, as are the other arrays.
    weight_dense : ndarray, shape (K, C/groups, R, S)
    bias : ndarray, shape (K,), or None
    spec : ConvSpec
        Its dtype is not looked at.
    activation : str, optional
        See `numbasparse.activations`.
        Applied after the bias and the residual.
    residual : ndarray, shape (N, K, OH, OW), or None
        Added like the bias.

    Returns
    -------
    ndarray, float64, shape (N, K, OH, OW)

    Raises
    ------
    ValueError
        If a shape is not the one of `spec`, or the activation is unknown.
    """
    spec.check_x_shape(np.shape(x))
    spec.check_weight_shape(np.shape(weight_dense))
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), *spec.padding))
    weight = np.asarray(weight_dense, np.float64)
    out = np.zeros(spec.out_shape, np.float64)
    for r in range(spec.r):
        for s in range(spec.s):
            out += _tap(padded, weight[:, :, r, s], r, s, spec)
    if bias is not None:
        spec.check_bias_shape(np.shape(bias))
        out += np.asarray(bias, np.float64)[:, None, None]
    if residual is not None:
        spec.check_out_shape(np.shape(residual))
        out += np.asarray(residual, np.float64)
    return _activate(out, activation)


def _tap(
    padded: NDArray[np.float64], weight: NDArray[np.float64], r: int, s: int, spec: ConvSpec
) -> NDArray[np.float64]:
    """Return what kernel position (r, s) adds to every output; `weight` is (K, C/groups)."""
    top, left = r * spec.dilation[0], s * spec.dilation[1]
    rows = slice(top, top + (spec.out_h - 1) * spec.stride[0] + 1, spec.stride[0])
    columns = slice(left, left + (spec.out_w - 1) * spec.stride[1] + 1, spec.stride[1])
    seen = padded[:, :, rows, columns].reshape(spec.n, spec.groups, spec.c_per_group, -1)
    grouped_weight = weight.reshape(spec.groups, spec.k_per_group, spec.c_per_group)
    with np.errstate(invalid="ignore"):  # infinity times zero is NaN, which is the answer
        return np.matmul(grouped_weight, seen).reshape(spec.out_shape)


def _activate(y: NDArray[np.float64], activation: str | None) -> NDArray[np.float64]:
    """Apply the activation; np.maximum and np.minimum keep NaN, as torch does."""
    name = check_activation(activation)
    slope = slope_of(name)
    if slope is not None:
        # not min and max: slope * -inf is NaN for a slope of 0, as in torch
        with np.errstate(invalid="ignore"):
            return np.where(y < 0, slope * y, y)
    if name == "none":
        return y
    if name == "silu":
        # exp(-y) is infinite for very negative y, and y / inf is right; -inf gives NaN, as in torch
        with np.errstate(over="ignore", invalid="ignore"):
            return y / (1.0 + np.exp(-y))
    positive = np.maximum(y, 0.0)
    return positive if name == "relu" else np.minimum(positive, 6.0)
