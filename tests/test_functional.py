from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_close
from scipy import sparse
from strategies import random_weight

from numbasparse import (
    Choice,
    ConvSpec,
    SparseWeight,
    clear_cache,
    conv2d,
    functional,
    get_num_threads,
    set_num_threads,
)
from numbasparse.kernels import KERNELS
from numbasparse.runtime import cpu

RNG = np.random.default_rng(0)
SPEC = ConvSpec.create((2, 4, 10, 11), (6, 4, 3, 3), 1, 1)
DENSE = random_weight(SPEC, 0.2, RNG)
WEIGHT = SparseWeight.from_dense(DENSE)
X = RNG.standard_normal(SPEC.x_shape).astype(np.float32)
BIAS = RNG.standard_normal(SPEC.k).astype(np.float32)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    clear_cache()
    before = cpu._threads
    yield
    cpu._threads = before
    clear_cache()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were packed, in order."""
    seen: list[str] = []
    for name, k in KERNELS.items():

        def counted(*args: Any, name: str = name, original: Any = k.prepare) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(k, "prepare", counted)
    return seen


# --- against the reference and torch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 2)},
        {"padding": ((1, 0), (2, 1))},
        {"padding": "same"},
        {"padding": "valid", "dilation": 2},
        {"padding": "same", "dilation": (2, 3)},
        {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]},
        {"stride": np.int64(2), "padding": np.int32(1)},
    ],
)
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_arguments(arguments: dict[str, Any], activation: str | None) -> None:
    spec = ConvSpec.create(X.shape, DENSE.shape, **arguments)
    y = conv2d(X, WEIGHT, BIAS, **arguments, activation=activation, config="cpu_direct")
    assert_close(y, spec, X, DENSE, BIAS, activation)
    paddings = arguments.get("padding", 0)
    if not (isinstance(paddings, tuple) and isinstance(paddings[0], tuple)):
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in arguments.items()}
        expected = torch.nn.functional.conv2d(*map(torch.from_numpy, (X, DENSE, BIAS)), **plain)
        expected = expected if activation is None else torch.nn.functional.relu6(expected)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups: int) -> None:
    spec = ConvSpec.create(X.shape, (8, 4 // groups, 3, 3), 1, 1, 1, groups)
    dense = random_weight(spec, 0.3, RNG)
    y = conv2d(X, SparseWeight.from_dense(dense, groups), None, 1, 1, 1, groups)
    assert_close(y, spec, X, dense)
    assert_close(conv2d(X, dense, None, 1, 1, 1, groups), spec, X, dense)


MATRIX = sparse.csr_array(DENSE.reshape(6, -1))
WEIGHTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SparseWeight": (WEIGHT, {}),
    "csr_array": (MATRIX, {"kernel_shape": (4, 3, 3)}),
    "csr_matrix": (sparse.csr_matrix(MATRIX), {"kernel_shape": [4, 3, 3]}),
    "csc": (MATRIX.tocsc(), {"kernel_shape": (4, 3, 3)}),
    "coo": (MATRIX.tocoo(), {"kernel_shape": (4, 3, 3)}),
    "array": (DENSE, {}),
    "float64": (DENSE.astype(np.float64), {}),
    "tensor": (torch.from_numpy(DENSE), {}),
    "parameter": (torch.nn.Parameter(torch.from_numpy(DENSE.copy())), {}),
    "with kernel_shape": (WEIGHT, {"kernel_shape": (4, 3, 3)}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tensor", [False, True])
def test_kinds_of_weight(kind: str, tensor: bool, prepared: list[str]) -> None:
    weight, more = WEIGHTS[kind]
    x: Any = torch.from_numpy(X) if tensor else X
    for _ in range(3):
        y = conv2d(x, weight, BIAS, padding=1, **more)
        assert isinstance(y, type(x))
        assert_close(np.asarray(y), SPEC, X, DENSE, BIAS)
    assert len(prepared) == 1


def test_changed_array_is_noticed() -> None:
    dense = DENSE.copy()
    conv2d(X, dense, padding=1)
    dense[0] = 1
    assert_close(conv2d(X, dense, padding=1), SPEC, X, dense)


def test_out() -> None:
    out = np.full(SPEC.out_shape, np.nan, np.float32)
    assert conv2d(X, WEIGHT, padding=1, out=out) is out
    assert_close(out, SPEC, X, DENSE)
    tensor = torch.full(SPEC.out_shape, float("nan"), dtype=torch.bfloat16)
    y = conv2d(torch.from_numpy(X).bfloat16(), WEIGHT, padding=1, out=tensor)
    assert y is tensor
    assert torch.isfinite(y).all()


def test_skips_products_with_zeros() -> None:
    x = X.copy()
    x[0, 1] = np.nan
    dense = DENSE.copy()
    dense[2, 1] = 0
    y = conv2d(x, dense, padding=1, config="cpu_direct")
    assert np.isfinite(y[0, 2]).all()
    assert np.isfinite(y[1]).all()


# --- the cache of plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": (1, 2), "padding": 1},
        {"stride": [1, 1], "padding": [1, 1]},
        {"config": "cpu_direct"},
        {"config": "dense"},
        {"config": Choice("dense", {"layout": "nhwc"})},
        {"config": {"kernel": "dense", "config": {"layout": "nhwc"}}},
        {"activation": "relu"},
    ],
)
def test_repeated_calls_do_not_prepare(arguments: dict[str, Any], prepared: list[str]) -> None:
    for _ in range(3):
        conv2d(X, WEIGHT, **arguments)
    assert len(prepared) == 1
    conv2d(X.astype(np.float16), WEIGHT, BIAS, **arguments)
    assert len(prepared) == 1
    conv2d(X[:1], WEIGHT, **arguments)
    assert len(prepared) == 2
    clear_cache()
    conv2d(X, WEIGHT, **arguments)
    assert len(prepared) == 3


def test_different_calls_have_different_plans(prepared: list[str]) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"activation": "relu"},
        {"config": "dense"},
        {"config": Choice("dense", {"layout": "nhwc"})},
    ]
    first = [conv2d(X, WEIGHT, **call) for call in calls]
    again = [conv2d(X, WEIGHT, **call) for call in calls]
    assert len(prepared) == len(calls)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)


def test_threads_are_part_of_the_key(prepared: list[str]) -> None:
    for count in (1, 2, 1, 2):
        set_num_threads(count)
        assert get_num_threads() == count
        conv2d(X, WEIGHT)
    assert len(prepared) == 2


def test_threads_of_torch_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = functional.plan
    monkeypatch.setattr(functional, "plan", lambda *a, **k: made.append(k["threads"]) or original(*a, **k))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    conv2d(torch.from_numpy(X), WEIGHT)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    conv2d(torch.from_numpy(X), WEIGHT)
    assert made == [3, cpu.MAX_THREADS]


def test_plans_go_with_their_weight(prepared: list[str]) -> None:
    weight = SparseWeight.from_dense(2 * DENSE)
    conv2d(X, weight)
    assert len(functional._plans._by_weight) == 1
    del weight
    gc.collect()
    assert len(functional._plans._by_weight) == 0


def test_cache_is_bounded(prepared: list[str]) -> None:
    weight = SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32))
    for width in range(1, 80):
        conv2d(np.ones((1, 1, 1, width), np.float32), weight, config="dense")
    (plans,) = functional._plans._by_weight.values()
    assert len(plans) == 64
    for i in range(70):
        conv2d(np.ones((1, 1, 1, 1), np.float32), np.full((1, 1, 1, 1), 1 + i, np.float32), config="dense")
    assert len(functional._converted) == 64


def test_a_new_plan_is_not_the_first_to_go(prepared: list[str]) -> None:
    weight = SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32))
    for width in [*range(1, 65), *range(1, 65), 65]:
        conv2d(np.ones((1, 1, 1, width), np.float32), weight, config="dense")
    count = len(prepared)
    conv2d(np.ones((1, 1, 1, 65), np.float32), weight, config="dense")
    assert len(prepared) == count == 65


class Chooser:
    def __init__(self, kernel: str) -> None:
        self.kernel_name = kernel

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice:
        return Choice(self.kernel_name, KERNELS[self.kernel_name].default(spec, weight, 1))


def test_chooser(prepared: list[str]) -> None:
    chooser = Chooser("dense")
    for _ in range(2):
        conv2d(X, WEIGHT, config=chooser)
    assert prepared == ["dense"]


def test_choosers_are_not_mixed_up(prepared: list[str]) -> None:
    """A chooser may be made at the address of one that is gone."""
    for i in range(6):
        conv2d(X, WEIGHT, config=Chooser(("dense", "cpu_direct")[i % 2]))
    assert prepared == ["dense", "cpu_direct"] * 3


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "full"}, ValueError, "padding must be 'same', 'valid'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1"),
        ({"padding": 1.5}, TypeError, "padding must be an int"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or two ints"),
        ({"dilation": 8}, ValueError, "padded input has only height 10"),
        ({"groups": 2}, ValueError, "weight has 8 input channels .* but input has 4"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"activation": "gelu"}, ValueError, "activation must be None"),
        ({"config": "abacus"}, ValueError, "expected a kernel's name"),
        ({"config": {"kernel": "dense", "config": {"size": 1}}}, ValueError, "expected the parameters"),
        ({"config": 3}, TypeError, "config must be None"),
        ({"kernel_shape": (3, 4, 3)}, ValueError, "differs from the SparseWeight's"),
        ({"x": X.tolist()}, TypeError, "x must be a NumPy array, a torch tensor or an array .* got list"),
        ({"x": X.astype(int)}, TypeError, "expected x of dtype .* got int64"),
        ({"x": X[0]}, ValueError, r"input must have shape \(N, C, H, W\), got 3 sizes"),
        ({"x": X[:, :3]}, ValueError, "weight has 4 input channels but input has 3"),
        ({"x": X[:0]}, ValueError, "size of the input's shape must be at least 1"),
        ({"bias": BIAS[:2]}, ValueError, r"bias must have shape \(6,\)"),
        ({"weight": DENSE[0, 0]}, ValueError, "weight must have shape"),
        ({"weight": DENSE.tolist()}, TypeError, "weight must be a SparseWeight, a SciPy sparse matrix"),
        ({"weight": DENSE.astype(int)}, TypeError, "float"),
        ({"weight": DENSE, "kernel_shape": (4, 3, 3)}, ValueError, "kernel_shape goes with a SciPy matrix"),
        ({"weight": MATRIX}, ValueError, r"give kernel_shape=\(C/groups, R, S\)"),
        ({"weight": MATRIX, "kernel_shape": (4, 3, 2)}, ValueError, "weight matrix must have shape"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        conv2d(**{"x": X, "weight": WEIGHT, **arguments})


def test_no_gradient() -> None:
    x = torch.from_numpy(X.copy()).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        conv2d(x, WEIGHT)
    with torch.no_grad():
        conv2d(x, WEIGHT)


def test_out_shares_memory() -> None:
    x = X.copy()
    with pytest.raises(ValueError, match="out shares memory with x"):
        conv2d(x, np.ones((4, 4, 1, 1), np.float32) * np.eye(4, dtype=np.float32)[..., None, None], out=x)
