from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_close
from strategies import random_weight

from numbasparse import Choice, SparseWeight, plan
from numbasparse.kernels import KERNELS, ConfigError
from numbasparse.plans import DENSE_ABOVE, default_choice, resolve
from numbasparse.spec import ConvSpec

SPEC = ConvSpec.create((2, 3, 8, 9), (4, 3, 3, 3), 1, 1)
RNG = np.random.default_rng(0)
DENSE = random_weight(SPEC, 0.2, RNG)
WEIGHT = SparseWeight.from_dense(DENSE)
X = RNG.standard_normal(SPEC.x_shape).astype(np.float32)
BIAS = RNG.standard_normal(SPEC.k).astype(np.float32)
BOTH = pytest.mark.parametrize("name", ["cpu_direct", "dense"])


class Chooser:
    def __init__(self, found: Choice | None) -> None:
        self.found = found

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice | None:
        assert (spec, weight) == (SPEC, WEIGHT)
        return self.found


# --- choosing --------------------------------------------------------------------------------------------------


def test_kinds_of_config() -> None:
    config = {**KERNELS["cpu_direct"].default(SPEC, WEIGHT, 1), "tile": "1x1"}
    choice = Choice("cpu_direct", config)
    default = Choice("cpu_direct", KERNELS["cpu_direct"].default(SPEC, WEIGHT, 1))
    for given, expected in [
        (None, default),
        ("cpu_direct", default),
        ("dense", Choice("dense", {"layout": "nchw"})),
        (choice, choice),
        ({"kernel": "cpu_direct", "config": config}, choice),
        ({"kernel": "cpu_direct"}, default),
        (Chooser(choice), choice),
        (Chooser(None), default),
    ]:
        assert resolve(given, SPEC, WEIGHT, 1) == expected
        assert plan(SPEC, WEIGHT, config=given, threads=1).choice == expected


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ("abacus", ValueError, "expected a kernel's name, one of"),
        ({"kernel": "abacus"}, ValueError, "expected a kernel's name, one of"),
        (Choice("abacus"), ValueError, "expected a kernel's name, one of"),
        ({"config": {}}, ValueError, "expected a config like"),
        ({"kernel": "dense", "configs": {}}, ValueError, "expected a config like"),
        ({"kernel": "dense", "config": {"order": 1}}, ConfigError, "expected the parameters \\['layout'\\]"),
        (Choice("cpu_direct", {"lanes": 8}), ConfigError, "expected the parameters"),
        ("cpu_pointwise", ConfigError, "only 1x1 kernels"),
        (7, TypeError, "config must be None, a kernel's name"),
    ],
)
def test_bad_configs(config: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(SPEC, WEIGHT, config=config, threads=1)


@pytest.mark.parametrize(("density", "dense"), [(0.0, False), (DENSE_ABOVE - 0.1, False), (0.8, True), (1.0, True)])
def test_default_choice(density: float, dense: bool) -> None:
    spec = ConvSpec.create((1, 20, 8, 8), (20, 20, 3, 3))
    weight = SparseWeight.from_dense(random_weight(spec, density, RNG))
    assert (default_choice(spec, weight, 1).kernel == "dense") is dense
    with pytest.raises(ConfigError, match="no kernel for device 'abacus'"):
        default_choice(spec, weight, 1, "abacus")


def test_default_choice_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    weight = SparseWeight.from_dense(np.ones(SPEC.weight_shape, np.float32))
    assert default_choice(SPEC, weight, 1).kernel == "cpu_direct"
    with pytest.raises(ConfigError, match="torch is not installed"):
        plan(SPEC, weight, config="dense", threads=1)


def test_pointwise_is_preferred() -> None:
    spec = ConvSpec.create((1, 20, 8, 8), (20, 20, 1, 1))
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, RNG))
    assert default_choice(spec, weight, 1).kernel == "cpu_pointwise"


# --- making ----------------------------------------------------------------------------------------------------


def test_attributes() -> None:
    made = plan(SPEC, WEIGHT, activation="relu", threads=2)
    assert (made.spec, made.activation, made.threads) == (SPEC, "relu", 2)
    assert 0 < made.nbytes <= 1.3 * (8 * WEIGHT.nnz + 4 * 5) + 4096
    assert made.workspace > 0
    assert "cpu_direct" in repr(made)
    assert SPEC.key in repr(made)
    assert plan(SPEC, WEIGHT, config="dense").nbytes == 4 * DENSE.size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "abacus"}, "device must be 'cpu', 'cuda' or a certain GPU like 'cuda:1', got 'abacus'"),
        ({"activation": "gelu"}, "activation must be None, 'relu'.*, got 'gelu'"),
        ({"threads": 0}, "threads must be from 1"),
        ({"threads": 2.0}, "threads must be from 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(SPEC, WEIGHT, **change)


def test_weight_must_fit() -> None:
    other = SparseWeight.from_dense(np.ones((4, 3, 3, 1), np.float32))
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 3, 3, 3\)"):
        plan(SPEC, other)
    spec = ConvSpec.create((1, 4, 5, 5), (4, 2, 3, 3), groups=2)
    with pytest.raises(ValueError, match="weight has groups=1, the spec has groups=2"):
        plan(spec, SparseWeight.from_dense(np.ones((4, 2, 3, 3), np.float32)))


# --- calling ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("with_out", [False, True])
def test_kinds(name: str, kind: str, with_out: bool) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=2)
    x: Any = X if kind == "numpy" else torch.from_numpy(X)
    out: Any = np.full(SPEC.out_shape, np.nan, np.float32)
    out = out if kind == "numpy" else torch.from_numpy(out)
    for bias in (None, BIAS, torch.from_numpy(BIAS), BIAS.astype(np.float64), BIAS.tolist(), np.repeat(BIAS, 2)[::2]):
        y = made(x, bias, out if with_out else None)
        assert type(y) is type(x)
        assert y is out or not with_out
        assert_close(np.asarray(y), SPEC, X, DENSE, None if bias is None else BIAS)


@BOTH
@pytest.mark.parametrize("dtype", ["float64", "float16", "torch.float64", "torch.float16", "torch.bfloat16"])
@pytest.mark.parametrize("with_out", [False, True])
def test_dtypes(name: str, dtype: str, with_out: bool) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=1)
    library, kind = (torch, getattr(torch, dtype[6:])) if dtype.startswith("torch") else (np, np.dtype(dtype))
    x: Any = torch.from_numpy(X).to(kind) if library is torch else X.astype(kind)  # type: ignore[arg-type, call-overload]
    out = None
    if with_out:
        out = library.full(SPEC.out_shape, float("nan"), dtype=kind)  # type: ignore[attr-defined]
    y = made(x, BIAS, out)
    assert y.dtype == kind
    assert y is out or not with_out
    single: Any = x.float().numpy() if library is torch else x.astype(np.float32)
    expected = made(single, BIAS)
    rounded: Any = torch.from_numpy(expected).to(kind) if library is torch else expected.astype(kind)  # type: ignore[arg-type]
    assert (y == rounded).all()


def layouts() -> dict[str, Any]:
    tensor, reversed_x = torch.from_numpy(X), np.ascontiguousarray(X[:, :, ::-1, ::-1])
    read_only = X.copy()
    read_only.flags.writeable = False
    wide = np.zeros((*X.shape[:3], 2 * X.shape[3]), np.float32)
    wide[..., ::2] = X
    unaligned = np.frombuffer(b"?" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(X.shape)
    return {
        "reversed": reversed_x[:, :, ::-1, ::-1],
        "every second": wide[..., ::2],
        "transposed": np.ascontiguousarray(X.T).T,
        "fortran": np.asfortranarray(X),
        "read-only": read_only,
        "big-endian": X.astype(">f4"),
        "unaligned": unaligned,
        "broadcast": np.broadcast_to(X[:1], X.shape),
        "channels_last": tensor.to(memory_format=torch.channels_last),
        "sliced": torch.from_numpy(wide)[..., ::2],
        "expanded": tensor[:1].expand(X.shape),
        "permuted": tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


@BOTH
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.filterwarnings("error")
def test_layouts(name: str, layout: str) -> None:
    x = layouts()[layout]
    y = plan(SPEC, WEIGHT, config=name, threads=2)(x, BIAS)
    assert type(y) is (torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
    assert_close(np.asarray(y).astype(np.float32), SPEC, np.asarray(x).astype(np.float32), DENSE, BIAS)
    assert y.is_contiguous() if isinstance(y, torch.Tensor) else y.flags.c_contiguous


@BOTH
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X[:1], ValueError, r"input must have shape \(2, 3, 8, 9\)"),
        (X[0], ValueError, "input must have shape"),
        (X.astype(np.int32), TypeError, "expected x of dtype float32, .* got int32"),
        (X.astype(np.complex64), TypeError, "got complex64"),
        (X.astype(bool), TypeError, "got bool"),
        (X.tolist(), TypeError, "x must be a NumPy array or a torch CPU tensor, got list"),
        (torch.from_numpy(X)[:, :2], ValueError, "input must have shape"),
        (torch.from_numpy(X).int(), TypeError, "got int32"),
        (torch.zeros(SPEC.x_shape, device="meta"), ValueError, "x is on device meta, this plan runs on the CPU"),
        (torch.from_numpy(X).requires_grad_(), RuntimeError, "a plan has no gradient"),
    ],
)
def test_bad_inputs(name: str, x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(SPEC, WEIGHT, config=name, threads=1)(x)


@BOTH
@pytest.mark.parametrize("bias", [BIAS[:3], BIAS[:, None], np.float32(1), torch.zeros(5)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_bad_bias(name: str, bias: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        plan(SPEC, WEIGHT, config=name, threads=1)(X if kind == "numpy" else torch.from_numpy(X), bias)


@BOTH
@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 4, 8, 8), np.float32),
        np.zeros(SPEC.out_shape),
        np.zeros((*SPEC.out_shape[:3], 18), np.float32)[..., ::2],
        np.asfortranarray(np.zeros(SPEC.out_shape, np.float32)),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_bad_out(name: str, out: np.ndarray, kind: str) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=1)
    with pytest.raises(ValueError, match=r"output must have shape|out must be C-contiguous"):
        made(X, out=out) if kind == "numpy" else made(torch.from_numpy(X), out=torch.from_numpy(out))
    assert not out.any()


@BOTH
def test_out_of_the_other_kind(name: str) -> None:
    made, zeros = plan(SPEC, WEIGHT, config=name, threads=1), np.zeros(SPEC.out_shape, np.float32)
    for x, out in ((X, torch.from_numpy(zeros)), (torch.from_numpy(X), zeros), (X, zeros.tolist())):
        with pytest.raises((TypeError, ValueError), match="out must be"):
            made(x, out=out)


@BOTH
def test_read_only_out(name: str) -> None:
    out = np.zeros(SPEC.out_shape, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|writeable"):
        plan(SPEC, WEIGHT, config=name, threads=1)(X, out=out)
    assert not out.any()


@BOTH
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_out_shares_memory_with_x(name: str, kind: str) -> None:
    spec = ConvSpec.create((1, 4, 8, 9), (4, 4, 3, 3), 1, 1)
    made = plan(spec, SparseWeight.from_dense(random_weight(spec, 0.2, RNG)), config=name, threads=1)
    x: Any = np.ones(spec.x_shape, np.float32)
    x = x if kind == "numpy" else torch.from_numpy(x)
    with pytest.raises(ValueError, match="out shares memory with x"):
        made(x, out=x)
    assert (x == 1).all()


def test_parts_of_one_buffer_are_not_shared() -> None:
    """Only overlapping memory matters, not a common owner."""
    spec = ConvSpec.create((1, 4, 8, 9), (4, 4, 3, 3), 1, 1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, RNG))
    both = np.ones((2, *spec.x_shape), np.float32)
    plan(spec, weight, threads=1)(both[0], out=both[1])


def test_gradients() -> None:
    made = plan(SPEC, WEIGHT, threads=1)
    x = torch.from_numpy(X.copy()).requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = made(x)
        assert not y.requires_grad
    assert not made(x.detach(), torch.from_numpy(BIAS.copy())).requires_grad


@BOTH
def test_default_dtype_of_torch_does_not_matter(name: str) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=1)
    torch.set_default_dtype(torch.float64)
    try:
        y = made(torch.from_numpy(X))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(y.numpy(), SPEC, X, DENSE)


@BOTH
def test_results_are_separate(name: str) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=1)
    first = made(X)
    kept = first.copy()
    made(2 * X)
    assert np.array_equal(first, kept)
