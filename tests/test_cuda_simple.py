"""The plain CUDA kernel in numba's simulator, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from numbasparse.kernels.cuda_simple import CudaSimple, pack
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

SIMULATED = """
import sys
sys.path.insert(0, "tests")
import numpy as np
from numba import cuda
from compare import assert_close
from strategies import random_weight
from numbasparse.kernels.cuda_simple import build, pack
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

rng = np.random.default_rng(0)


def run(spec, density, activation=None, bias=True, threads=8, empty_rows=False, residual=False):
    dense = random_weight(spec, density, rng, empty_rows=empty_rows)
    x = rng.standard_normal(spec.x_shape).astype(spec.dtype)
    b = rng.standard_normal(spec.k).astype(np.float32) if bias else np.empty(0, np.float32)
    added = rng.standard_normal(spec.out_shape).astype(spec.dtype) if residual else np.empty(0, spec.dtype)
    y = np.full(spec.out_shape, np.nan, spec.dtype)
    packed = pack(spec, SparseWeight.from_dense(dense, spec.groups))
    grid = -(-spec.n * spec.out_h * spec.out_w // threads), spec.k
    kernel = cuda.jit(build(spec, activation or "none"))
    flat = y.reshape(-1)
    weight = [a.copy() for a in (packed.values, packed.offsets, packed.taps, packed.indptr)]
    kernel[grid, threads](x.reshape(-1), *weight, b, added.reshape(-1), flat)
    rtol = 1e-5 if spec.dtype == "float32" else 2e-3
    if residual:
        flat -= added.reshape(-1)
    assert_close(y.astype(np.float32), spec, x, dense, b if bias else None, activation, rtol=rtol)


def spec(x, k, r, s, *rest, **more):
    return ConvSpec.create(x, (k, x[1] // more.get("groups", 1), r, s), *rest, **more)


SIZES = [
    spec((1, 2, 5, 6), 3, 3, 3, 1, 1),
    spec((2, 3, 4, 7), 2, 3, 3),
    spec((2, 2, 7, 5), 3, 3, 2, (2, 3), ((1, 0), (0, 2))),
    spec((1, 2, 7, 7), 2, 3, 3, 1, 2, 2),
    spec((1, 2, 6, 6), 2, 2, 2, (1, 2), (0, 3), (3, 1)),
    spec((3, 4, 3, 3), 6, 3, 3, 1, 1, groups=2),
    spec((1, 3, 3, 3), 3, 3, 3, 1, 1, groups=3),
    spec((2, 5, 3, 3), 4, 1, 1),
    spec((1, 2, 1, 9), 2, 1, 5, 1, (0, 2)),
    spec((1, 1, 1, 1), 1, 1, 1),
]
for s in SIZES:
    run(s, 0.4)
for density in (0.0, 0.05, 1.0):
    run(SIZES[0], density)
run(SIZES[0], 0.5, empty_rows=True)
run(SIZES[1], 0.5, bias=False, threads=32)
for activation in ("relu", "relu6", "silu", "leaky_relu(0.25)"):
    run(SIZES[0], 0.5, activation)
run(SIZES[0], 0.5, residual=True)
run(spec((1, 2, 5, 6), 3, 3, 3, 1, 1, dtype="float16"), 0.4)
print("same")
"""


def test_simulator(run_python: Callable[..., str]) -> None:
    assert run_python(SIMULATED, NUMBA_ENABLE_CUDASIM="1") == "same"


def test_packing() -> None:
    spec = ConvSpec.create((1, 4, 5, 6), (2, 2, 2, 2), padding=1, dilation=(2, 3), groups=2)
    dense = np.zeros(spec.weight_shape, np.float32)
    dense[0, 1, 0, 1] = 2.0
    dense[1, 0, 1, 0] = 3.0
    packed = pack(spec, SparseWeight.from_dense(dense, 2))
    assert packed.values.tolist() == [2.0, 3.0]
    assert packed.offsets.tolist() == [1 * 30 + 3, 2 * 30 + 2 * 6]
    assert packed.taps.tolist() == [3, 2 << 16]
    assert packed.indptr.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "weight_shape", "more", "words"),
    [
        ((1, 1, 4, 4), (1, 1, 1, 1), {"dtype": "bfloat16"}, "dtype bfloat16: only float32 and float16"),
        ((1, 1, 4, 4), (65536, 1, 1, 1), {}, "65536 output channels"),
        ((1, 4, 32768, 32768), (1, 4, 1, 1), {}, "exceed 2147483647"),
        ((1, 1, 40000, 1), (1, 1, 2, 1), {"dilation": (20000, 1)}, "32768 rows"),
    ],
)
def test_limits(shape: tuple[int, ...], weight_shape: tuple[int, ...], more: dict[str, object], words: str) -> None:
    spec = ConvSpec.create(shape, weight_shape, **more)  # type: ignore[arg-type]
    weight = SparseWeight.from_dense(np.ones(weight_shape, np.float32))
    assert words in str(CudaSimple().supports(spec, weight))


@pytest.mark.parametrize("threads", [100, 2048, 0, "128", True])
def test_bad_configs(threads: object) -> None:
    spec = ConvSpec.create((1, 1, 4, 4), (1, 1, 1, 1))
    weight = SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32))
    assert "threads must be" in str(CudaSimple().check(spec, weight, {"threads": threads}))  # type: ignore[dict-item]
