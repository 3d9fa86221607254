"""The comparisons of a kernel's result with the reference: of float32, and of tensor cores' 16-bit operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numbasparse import SparseWeight
from numbasparse.kernels import Config
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.kernels.two_four import narrow
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec


def on_hopper(test: Any) -> Any:
    """Mark a test that runs on an H100 or H200."""
    absent = cuda.reason_unavailable() is not None or cuda.current().capability != (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="needs an H100 or H200")(test))


def assert_close(
    actual: np.ndarray,
    spec: ConvSpec,
    x: np.ndarray,
    weight_dense: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    *,
    residual: np.ndarray | None = None,
    rtol: float = 1e-5,
) -> None:
    """Assert that `actual` is the convolution up to float32 rounding, and holds nothing left unwritten.

    An error of float32 sums grows with the sum of the ABSOLUTE products, not with the result, which may be
    near zero. So the bound of each output is ``rtol * (conv(|x|, |w|) + |bias| + |residual| + 1)``; 1e-5 is about
    170 units in the last place. The activations have slopes of at most 1.1 and so need no other bound. Outputs that
    are NaN or infinite must be so in the reference too: fill buffers with NaN before a kernel writes into them.
    """
    assert actual.dtype == np.float32, f"expected float32, got {actual.dtype} for {spec.key}"
    assert actual.shape == spec.out_shape, f"expected {spec.out_shape}, got {actual.shape} for {spec.key}"
    expected = conv2d_reference(x, weight_dense, bias, spec, activation, residual)
    sizes = (np.abs(x), np.abs(weight_dense), None if bias is None else np.abs(bias))
    magnitude = conv2d_reference(*sizes, spec, residual=None if residual is None else np.abs(residual))
    finite = np.isfinite(expected)
    _assert_none(np.isfinite(actual) != finite, "are NaN or infinite in only one of the two", actual, expected, spec)
    _assert_none(
        ~finite & ~((actual == expected) | (np.isnan(actual) & np.isnan(expected))),
        "are not the same NaN or infinity",
        actual,
        expected,
        spec,
    )
    error = np.abs(np.subtract(actual, expected, where=finite, out=np.zeros_like(expected)))
    wrong = np.greater(error, rtol * (magnitude + 1.0), where=finite, out=np.zeros_like(finite))
    _assert_none(wrong, "are too far from the reference", actual, expected, spec)


def _assert_none(wrong: np.ndarray, words: str, actual: np.ndarray, expected: np.ndarray, spec: ConvSpec) -> None:
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {wrong.size} outputs {words}, the first at (n, k, oh, ow) = {first}: "
            f"got {actual[first]!r}, expected {expected[first]!r} for {spec.key}"
        )


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest 16-bit floats, as float32."""
    halves = narrow(np.ascontiguousarray(values, np.float32), dtype)
    return halves.view(np.float16).astype(np.float32) if dtype == "float16" else widened_half(halves)


def widened_half(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def assert_as_tensor_cores(
    y: np.ndarray, spec: ConvSpec, weight: SparseWeight, x: np.ndarray, bias: np.ndarray | None = None, **rest: Any
) -> None:
    """Compare with the convolution of the rounded operands; products of theirs are exact in float32.

    ``exact_weight=True``: the weight's values are not rounded, since their scale comes last, in float32.
    """
    images = rounded(x, spec.dtype)
    dense = weight.to_dense() if rest.get("exact_weight") else rounded(weight.to_dense(), spec.dtype)
    residual = rest.get("residual")
    expected = conv2d_reference(images, dense, bias, spec, rest.get("activation"), residual)
    sizes = (np.abs(images), np.abs(dense), None if bias is None else np.abs(bias))
    magnitude = conv2d_reference(*sizes, spec, residual=None if residual is None else np.abs(residual))
    rounding = rest.get("rounding", 0.0)
    assert np.isfinite(y).all()
    np.testing.assert_array_less(np.abs(y - expected), 1e-5 * (magnitude + 1) + rounding * np.abs(expected) + 1e-7)


def assert_right_on_gpu(
    kernel: Any,
    spec: ConvSpec,
    weight: SparseWeight,
    config: Config,
    rng: np.random.Generator,
    with_residual: bool,
    exact_weight: bool = False,
) -> None:
    """Run a kernel for tensor cores three times, with bias and ReLU, on memory that was NaN; as above."""
    import torch

    dtype = getattr(torch, spec.dtype)
    x = rng.standard_normal(spec.x_shape, np.float32)
    bias = rng.standard_normal(spec.k).astype(np.float32)
    residual = rounded(rng.standard_normal(spec.out_shape, np.float32), spec.dtype) if with_residual else None
    runner = kernel.prepare(spec, weight, config, "relu")
    added = None if residual is None else torch.from_numpy(residual).to("cuda", dtype)
    poison = torch.full((16 << 20,), torch.nan, device="cuda")
    del poison  # the output is likely to lie there: what is not written is NaN
    rest = {
        "activation": "relu",
        "residual": residual,
        "rounding": {"float16": 2.0**-10, "bfloat16": 2.0**-7}[spec.dtype],
        "exact_weight": exact_weight,
    }
    for _ in range(3):
        y = runner.apply(torch.from_numpy(x).to("cuda", dtype), torch.from_numpy(bias).cuda(), added)
        assert_as_tensor_cores(y.float().cpu().numpy(), spec, weight, x, bias, **rest)
