"""Plans, `conv2d` and the torch operator on a GPU; first what needs none.

``pytest -m gpu`` runs the part that needs one.  The grid takes every kernel of the table for GPUs.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from compare import assert_close
from strategies import random_weight
from torch import Tensor, nn

import numbasparse.nn
from numbasparse import Choice, SparseWeight, conv2d, plan
from numbasparse.cuda_plans import CudaPlan, from_array
from numbasparse.kernels import KERNELS, ConfigError, CudaRunner, kernels_for
from numbasparse.kernels.cuda_dense import CudaDense
from numbasparse.nn import SparseConv2d, convert
from numbasparse.nn import conv2d as operator
from numbasparse.plans import DENSE_ABOVE_CUDA, default_choice, parse_device
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import LAYOUTS, Layout, has_layout, layout_of, to_layout
from numbasparse.spec import ConvSpec

REASON = cuda.reason_unavailable()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
EVERY_NAME = [k.name for k in kernels_for("cuda")]
RNG = np.random.default_rng(0)

SPEC = ConvSpec.create((3, 8, 9, 10), (16, 8, 3, 3), 1, 1)
DENSE = random_weight(SPEC, 0.1, RNG)
WEIGHT = SparseWeight.from_dense(DENSE)
with cuda.assumed((9, 0)):
    NAMES = [name for name in EVERY_NAME if KERNELS[name].supports(SPEC, WEIGHT) is None]


def needs_gpu(test: Any) -> Any:
    """Mark a test that runs on a GPU."""
    for mark in on_gpu:
        test = mark(test)
    return test


# --- without a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"), [("cpu", ("cpu", None)), ("cuda", ("cuda", None)), ("cuda:1", ("cuda", 1))]
)
def test_devices(text: str, parsed: tuple[str, int | None]) -> None:
    assert parse_device(text) == parsed
    assert parse_device(torch.device(text)) == parsed  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "mps"])
def test_bad_devices(text: str) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or a certain GPU"):
        plan(SPEC, WEIGHT, device=text)


@pytest.mark.skipif(REASON is None, reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(cuda.CudaError, match="device 'cuda:1' cannot be used: torch cannot use CUDA"):
        plan(SPEC, WEIGHT, device="cuda:1")
    assert plan(SPEC, WEIGHT)(np.ones(SPEC.x_shape, np.float32)).shape == SPEC.out_shape


def test_kernels_keep_to_their_device() -> None:
    with pytest.raises(ConfigError, match=r"kernel 'cuda_simple' is for device 'cuda'; those for 'cpu' are \['cpu_"):
        plan(SPEC, WEIGHT, config="cuda_simple")


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="x is on device meta: only the CPU and NVIDIA GPUs"):
        conv2d(torch.empty(SPEC.x_shape, device="meta"), WEIGHT)


def test_cpu_plans_have_no_options_of_gpus() -> None:
    x = np.ones(SPEC.x_shape, np.float32)
    with pytest.raises(ValueError, match="on the CPU the layout of a result is NCHW"):
        conv2d(x, WEIGHT, padding=1, out_layout="CHWN")
    assert conv2d(x, WEIGHT, padding=1, out_layout="native").shape == SPEC.out_shape


@pytest.mark.parametrize("dtype", DENSE_ABOVE_CUDA)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
def test_default_choice(dtype: str, density: float) -> None:
    spec = ConvSpec.create((8, 16, 9, 10), (16, 16, 3, 3), dtype=dtype if dtype != "float64" else "float32")
    weight = SparseWeight.from_dense(random_weight(spec, density, np.random.default_rng(0)))
    with cuda.assumed((9, 0)):
        choice = default_choice(spec, weight, 1, "cuda")
        assert KERNELS[choice.kernel].check(spec, weight, choice.config) is None
    assert KERNELS[choice.kernel].is_dense is (weight.density > DENSE_ABOVE_CUDA[dtype])


class Foreign:
    """An array of another library, on the CPU."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def __dlpack__(self, **options: Any) -> Any:
        return self.t.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.t.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return type("space", (), {"from_dlpack": staticmethod(lambda t: Foreign(torch.from_dlpack(t)))})


def test_foreign_arrays() -> None:
    t = torch.from_numpy(RNG.standard_normal(SPEC.x_shape).astype(np.float32))
    shared, back = from_array(Foreign(t))
    assert shared.data_ptr() == t.data_ptr()
    assert isinstance(back(shared), Foreign)
    y = conv2d(Foreign(t), WEIGHT, padding=1)
    assert isinstance(y, Foreign)
    assert torch.equal(y.t, conv2d(t, WEIGHT, padding=1))
    out = Foreign(torch.zeros(SPEC.out_shape))
    assert conv2d(Foreign(t), WEIGHT, padding=1, out=out) is out
    assert torch.equal(out.t, y.t)
    with pytest.raises(TypeError, match="a NumPy array is in the host's memory"):
        from_array(np.ones(3))
    with pytest.raises(TypeError, match="an array with __dlpack__, got list"):
        from_array([1.0])


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_tf32_is_asked_for() -> None:
    kernel, config = CudaDense(), {"layout": "nchw", "precision": "tf32"}
    torch.set_float32_matmul_precision("highest")
    assert kernel.space(SPEC, WEIGHT, 1)["precision"] == ("strict",)
    assert "set_float32_matmul_precision('high') allows it" in str(kernel.check(SPEC, WEIGHT, config))
    torch.set_float32_matmul_precision("high")
    assert kernel.space(SPEC, WEIGHT, 1)["precision"] == ("strict", "tf32")
    assert kernel.check(SPEC, WEIGHT, config) is None
    half = ConvSpec.create(SPEC.x_shape, SPEC.weight_shape, 1, 1, dtype="float16")
    assert kernel.space(half, WEIGHT, 1)["precision"] == ("strict",)
    assert "the dtype is float16" in str(kernel.check(half, WEIGHT, config))


class Stand(CudaRunner):
    """A kernel for CHWN that runs on the CPU."""

    takes = gives = "CHWN"
    nbytes = 1

    def apply(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None, out_layout: Layout | None = None
    ) -> Tensor:
        assert x.dtype == torch.float32
        y = nn.functional.conv2d(x, torch.from_numpy(DENSE), bias, padding=1)
        return to_layout(y if residual is None else y + residual, out_layout or self.gives)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> CudaPlan:
    """A plan on a GPU that is none."""
    monkeypatch.setattr(KERNELS["cuda_simple"], "prepare", lambda *_: Stand())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(CudaPlan, "_check_device", lambda *_: None)
    return CudaPlan(SPEC, WEIGHT, Choice("cuda_simple"), "none", 0)


def test_what_a_plan_does_around_its_kernel(stand_in: CudaPlan) -> None:
    x, residual = torch.randn(SPEC.x_shape), torch.randn(SPEC.out_shape)
    y = stand_in(x)
    assert (stand_in.device, stand_in.takes, stand_in.gives) == ("cuda:0", "CHWN", "CHWN")
    torch.testing.assert_close(y, conv2d(x, WEIGHT, padding=1))
    for layout in LAYOUTS:
        assert layout_of(stand_in(to_layout(x, layout))) == layout
        for out_layout in LAYOUTS:
            assert layout_of(stand_in(to_layout(x, layout), out_layout=out_layout)) == out_layout
        out = to_layout(torch.empty_like(y), layout)
        assert stand_in(x, out=out) is out
        assert torch.equal(out, y)
    assert layout_of(stand_in(x, out_layout="native")) == "CHWN"
    assert layout_of(stand_in(torch.randn(3, 8, 9, 20)[..., ::2])) == "NCHW"
    torch.testing.assert_close(stand_in(x, torch.ones(SPEC.k).double(), residual=residual.double()), y + 1 + residual)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(stand_in(x.to(dtype)), stand_in(x.to(dtype).float()).to(dtype))
    assert not stand_in(x.requires_grad_().detach()).requires_grad
    with pytest.raises(RuntimeError, match="a plan has no gradient"):
        stand_in(x)
    with torch.no_grad():
        assert torch.equal(stand_in(x), y)


# --- the grid, on a GPU ----------------------------------------------------------------------------------------


def spec_of(x: tuple[int, ...], k: int, r: int, s: int, *rest: Any, **more: Any) -> ConvSpec:
    return ConvSpec.create(x, (k, x[1] // more.get("groups", 1), r, s), *rest, **more)


GRID = [
    spec_of((1, 16, 14, 14), 32, 3, 3, 1, 1),
    spec_of((32, 16, 14, 14), 32, 3, 3, 1, 1),
    spec_of((5, 16, 7, 7), 24, 3, 3, 1, 1),
    spec_of((8, 3, 31, 33), 16, 7, 7, 2, 3),
    spec_of((33, 8, 9, 11), 7, 3, 3, (2, 3), ((1, 0), (0, 2))),
    spec_of((4, 8, 13, 12), 8, 3, 3, 1, 2, 2),
    spec_of((3, 6, 10, 9), 6, 2, 4, (1, 2), (0, 3), (3, 1)),
    spec_of((32, 64, 7, 7), 48, 1, 1),
    spec_of((1, 64, 28, 28), 16, 1, 1, 2),
    spec_of((8, 12, 8, 8), 18, 3, 3, 1, 1, groups=3),
    spec_of((16, 16, 8, 8), 16, 3, 3, 1, 1, groups=16),
    spec_of((2, 4, 1, 50), 5, 1, 9, 1, (0, 4)),
    spec_of((1, 1, 1, 1), 1, 1, 1),
    spec_of((130, 2, 3, 3), 3, 3, 3),
]
RTOL = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch hands out is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def some_configs(name: str, spec: ConvSpec, weight: SparseWeight, count: int = 4) -> list[dict[str, Any]]:
    """The default, and a few others, the same every time."""
    chosen, rng = KERNELS[name], random.Random(spec.key)
    space = chosen.space(spec, weight, 1)
    found = [chosen.default(spec, weight, 1)]
    for _ in range(500):
        config = {field: rng.choice(values) for field, values in space.items()}
        if len(found) <= count and config not in found and chosen.check(spec, weight, config) is None:
            found.append(config)
    return found


def check(
    spec: ConvSpec,
    dense: np.ndarray,
    choice: Choice,
    *,
    activation: str | None = None,
    bias: bool = True,
    residual: bool = False,
    layout: Layout = "NCHW",
    out_layout: Layout | None = None,
) -> None:
    """Run a plan and compare with the reference."""
    rng = np.random.default_rng(1)
    dtype = getattr(torch, spec.dtype)
    x = torch.from_numpy(rng.standard_normal(spec.x_shape).astype(np.float32)).to(dtype)
    b = rng.standard_normal(spec.k).astype(np.float32) if bias else None
    added = torch.from_numpy(rng.standard_normal(spec.out_shape).astype(np.float32)).to(dtype) if residual else None
    made = plan(spec, SparseWeight.from_dense(dense, spec.groups), device="cuda", config=choice, activation=activation)
    y = made(
        to_layout(x.cuda(), layout),
        None if b is None else torch.from_numpy(b).cuda(),
        residual=None if added is None else added.cuda(),
        out_layout=out_layout,
    )
    torch.cuda.synchronize()
    assert y.dtype == dtype
    assert has_layout(y, out_layout or layout)
    rtol = max(RTOL[spec.dtype], 1e-4 if KERNELS[choice.kernel].is_dense else 0)
    found = y.float().cpu().numpy()
    if added is not None:
        assert activation is None, "the comparison takes the residual off again"
        found = found - added.float().numpy()
    assert_close(found, spec, x.float().numpy(), dense, b, activation, rtol=rtol)


@needs_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.key)
@pytest.mark.parametrize("name", EVERY_NAME)
def test_grid(name: str, spec: ConvSpec, dtype: str) -> None:
    spec = ConvSpec.from_dict(spec.to_dict() | {"dtype": dtype})
    dense = random_weight(spec, 0.2, np.random.default_rng(2))
    weight = SparseWeight.from_dense(dense, spec.groups)
    reason = KERNELS[name].supports(spec, weight)
    if reason is not None:
        pytest.skip(reason)
    for config in some_configs(name, spec, weight, 3 if dtype == "float32" else 1):
        check(spec, dense, Choice(name, config))


@needs_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_densities(name: str, density: float) -> None:
    for empty_rows in (False, True):
        for spec in (SPEC, SPEC.with_batch(32)):
            dense = random_weight(spec, density, np.random.default_rng(2), empty_rows=empty_rows)
            weight = SparseWeight.from_dense(dense)
            for config in some_configs(name, spec, weight, 2):
                check(spec, dense, Choice(name, config))


@needs_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_epilogues(name: str) -> None:
    for spec in (SPEC, SPEC.with_batch(32)):
        for config in some_configs(name, spec, WEIGHT, 1):
            choice = Choice(name, config)
            for activation in (None, "relu", "relu6", "silu", "leaky_relu(0.2)"):
                for bias in (False, True):
                    check(spec, DENSE, choice, activation=activation, bias=bias)
            check(spec, DENSE, choice, residual=True)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_residual_comes_before_the_activation(name: str) -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config=name, activation="relu")
    plain = plan(SPEC, WEIGHT, device="cuda", config=name)
    x, added = torch.randn(SPEC.x_shape, device="cuda"), torch.randn(SPEC.out_shape, device="cuda")
    for layout in LAYOUTS:
        y = made(x, residual=to_layout(added, layout))
        torch.testing.assert_close(y, torch.relu(plain(x) + added), rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str) -> None:
    for layout in LAYOUTS:
        check(SPEC, DENSE, Choice(name, KERNELS[name].default(SPEC, WEIGHT, 1)), layout=layout)
        for out_layout in LAYOUTS:
            config = KERNELS[name].default(SPEC, WEIGHT, 1)
            check(SPEC, DENSE, Choice(name, config), layout=layout, out_layout=out_layout)
    made = plan(SPEC, WEIGHT, device="cuda", config=name)
    wide = torch.randn(3, 8, 9, 20, device="cuda")
    y = made(wide[..., ::2])
    assert layout_of(wide[..., ::2]) is None
    assert y.is_contiguous()
    torch.testing.assert_close(y, made(wide[..., ::2].contiguous()), rtol=1e-4, atol=1e-4)
    assert has_layout(made(wide[..., ::2], out_layout="native"), made.gives)
    with pytest.raises(ValueError, match="out_layout must be None, 'native' or one of"):
        made(wide[..., ::2], out_layout="NWHC")  # type: ignore[arg-type]


@needs_gpu
@pytest.mark.parametrize("name", [name for name in NAMES if not KERNELS[name].is_dense])
def test_nan_and_infinity_pass(name: str) -> None:
    """Like torch: relu keeps NaN."""
    spec = spec_of((8, 1, 4, 4), 1, 1, 1)
    made = plan(spec, SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32)), device="cuda", config=name)
    relu = plan(
        spec, SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32)), device="cuda", config=name, activation="relu"
    )
    x = torch.randn(spec.x_shape, device="cuda")
    x[0, 0, 0, 0], x[0, 0, 1, 1], x[1, 0, 2, 2] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(made(x).isnan(), x.isnan())
    assert torch.equal(relu(x).isnan(), x.isnan())
    assert float(relu(x)[0, 0, 1, 1]) == np.inf


# --- plans and conv2d ------------------------------------------------------------------------------------------


@needs_gpu
def test_attributes() -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config="cuda_simple")
    assert isinstance(made, CudaPlan)
    assert made.device == f"cuda:{torch.cuda.current_device()}"
    assert (made.takes, made.gives) == ("NCHW", "NCHW")
    assert made.nbytes == 12 * WEIGHT.nnz + 4 * 17
    (function,) = made.functions
    assert 0 < function.registers <= 255
    assert (function.local_bytes, function.static_shared) == (0, 0)
    assert function.max_blocks(128, 0) >= 1
    assert "device='cuda:" in repr(made)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_conv2d_is_that_of_the_cpu(dtype: str) -> None:
    x = torch.randn(SPEC.x_shape).to(getattr(torch, dtype))
    bias = torch.randn(SPEC.k)
    expected = conv2d(x, WEIGHT, bias, padding=1, activation="relu")
    y = conv2d(x.cuda(), WEIGHT, bias.cuda(), padding=1, activation="relu")
    assert (y.dtype, y.device.type) == (x.dtype, "cuda")
    tol = max(1e-4, 2 * RTOL.get(dtype, 0))
    torch.testing.assert_close(y.cpu(), expected, rtol=tol, atol=10 * tol)
    out = torch.empty_like(y)
    assert conv2d(x.cuda(), WEIGHT, bias.cuda(), padding=1, activation="relu", out=out) is out
    assert torch.equal(out, y)


@needs_gpu
def test_other_dtypes_than_the_plans() -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config="cuda_simple")
    x = torch.randn(SPEC.x_shape, device="cuda")
    y = made(x.double())
    assert y.dtype == torch.float64
    assert torch.equal(y, made(x).double())


@needs_gpu
def test_bad_inputs() -> None:
    made = plan(SPEC, WEIGHT, device="cuda")
    x = torch.randn(SPEC.x_shape, device="cuda")
    bias = torch.zeros(SPEC.k, device="cuda")
    out = torch.empty(SPEC.out_shape, device="cuda")
    for arguments, error, words in [
        ((x.cpu(),), ValueError, "x is on device cpu, this plan runs on cuda:"),
        ((x.cpu().numpy(),), TypeError, "a NumPy array is in the host's memory"),
        ((x[:, :3],), ValueError, "input must have shape"),
        ((x.int(),), TypeError, "expected x of dtype .* got int32"),
        ((x.clone().requires_grad_(),), RuntimeError, "a plan has no gradient"),
        ((x, bias.cpu()), ValueError, "bias is on device cpu, this plan runs on cuda:"),
        ((x, bias.cpu().numpy()), TypeError, "bias must be a CUDA tensor like x, got ndarray"),
        ((x, bias[:3]), ValueError, "bias must have shape"),
        ((x, bias.clone().requires_grad_()), RuntimeError, "bias asks for one"),
        ((x, bias, out.half()), ValueError, "out must be of dtype torch.float32"),
        ((x, bias, out[:1]), ValueError, "output must have shape"),
        ((x, bias, out.cpu()), ValueError, "out is on device cpu"),
        ((x, bias, None, out.cpu()), ValueError, "residual is on device cpu"),
        ((x, bias, None, out[:1]), ValueError, "output must have shape"),
    ]:
        with pytest.raises(error, match=words):
            made(*arguments)
    with pytest.raises(ConfigError, match="kernel 'cpu_direct' is for device 'cpu'"):
        plan(SPEC, WEIGHT, device="cuda", config="cpu_direct")
    with pytest.raises(ValueError, match="device 'cuda:99' does not exist"):
        plan(SPEC, WEIGHT, device="cuda:99")
    with pytest.raises(ValueError, match="out shares memory with x"):
        conv2d(x, np.ones((8, 8, 1, 1), np.float32), out=x)


@needs_gpu
def test_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(SPEC.x_shape)
    first, second = (conv2d(x.to(f"cuda:{i}"), WEIGHT, padding=1) for i in range(2))
    assert second.device.index == 1
    torch.testing.assert_close(first.cpu(), second.cpu())
    with pytest.raises(ValueError, match="x is on device cuda:0, this plan runs on cuda:1"):
        plan(SPEC, WEIGHT, device="cuda:1")(x.to("cuda:0"))


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_cupy(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(RNG.standard_normal(SPEC.x_shape).astype(np.float32))
    bias = cupy.asarray(RNG.standard_normal(SPEC.k).astype(np.float32))
    y = conv2d(x, WEIGHT, bias, padding=1, config=name)
    assert isinstance(y, cupy.ndarray)
    assert_close(cupy.asnumpy(y), SPEC, cupy.asnumpy(x), DENSE, cupy.asnumpy(bias), rtol=1e-4)
    out = cupy.empty_like(y)
    assert plan(SPEC, WEIGHT, device="cuda", config=name)(x, bias, out) is out
    cupy.testing.assert_array_equal(out, y)


class OnlyInterface:
    """What numba's device arrays have."""

    def __init__(self, t: Tensor) -> None:
        self.__cuda_array_interface__ = t.__cuda_array_interface__
        self.owner = t


@needs_gpu
def test_cuda_array_interface() -> None:
    x = torch.randn(SPEC.x_shape, device="cuda")
    assert torch.equal(conv2d(OnlyInterface(x), WEIGHT, padding=1), conv2d(x, WEIGHT, padding=1))


# --- streams, graphs, threads, memory --------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_stream(name: str) -> None:
    """The kernel waits for what is before it on torch's current stream, and for nothing else."""
    made = plan(SPEC, WEIGHT, device="cuda", config=name)
    ones, x = torch.ones(SPEC.x_shape, device="cuda"), torch.zeros(SPEC.x_shape, device="cuda")
    expected = made(ones)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made(ones)  # so that memory is there
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(ones)
        y = made(x)
        late = side.query()
    assert not late, "the host waited for the stream"
    side.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph(name: str, layout: Layout) -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config=name, activation="relu")
    x = to_layout(torch.randn(SPEC.x_shape, device="cuda"), layout)
    bias = torch.randn(SPEC.k, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made(x, bias)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x, bias)
    for _ in range(2):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, made(x, bias), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_nothing_is_loaded_in_a_capture() -> None:
    spec = spec_of((2, 4, 5, 5), 3, 2, 2)
    layer = SparseConv2d(SparseWeight.from_dense(random_weight(spec, 0.5, RNG))).cuda()
    x = torch.randn(spec.x_shape, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(cuda.CudaError, match=r"for the first time while a CUDA graph is captured: call the model"),
        torch.no_grad(),
        torch.cuda.graph(graph),
    ):
        layer(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert layer(x).shape == spec.out_shape


@needs_gpu
def test_threads() -> None:
    """New threads have no CUDA context of their own; each uses its own stream."""
    plans = [plan(SPEC, WEIGHT, device="cuda", config=name) for name in NAMES]
    x = torch.randn(SPEC.x_shape, device="cuda")
    expected = [made(x) for made in plans]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(50):
                    made = (number + i) % len(plans)
                    y = plans[made](x)
                    torch.cuda.current_stream().synchronize()
                    if not torch.allclose(y, expected[made], rtol=1e-4, atol=1e-4):
                        wrong.append((number, i))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_gpu
def test_a_thread_that_only_launches() -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config="cuda_simple")
    x, out = torch.randn(SPEC.x_shape, device="cuda"), []
    thread = threading.Thread(target=lambda: out.append(made(x)))
    thread.start()
    thread.join()
    assert torch.equal(out[0], made(x))


@needs_gpu
def test_out_of_memory() -> None:
    spec = spec_of((64, 1, 512, 512), 8, 1, 1)
    weight = SparseWeight.from_dense(np.ones((8, 1, 1, 1), np.float32))
    x = torch.ones(spec.x_shape, device="cuda")
    made = plan(spec, weight, device="cuda", config="cuda_simple")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_allocated() + (64 << 20)) / torch.cuda.mem_get_info()[1]
    )
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            made(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("a smaller batch needs less memory" in note for note in caught.value.__notes__)
    small = np.ones((1, 1, 2, 2), np.float32)
    assert conv2d(small, weight)[0, :, 0, 0].tolist() == [1.0] * 8
    assert bool((made(x) == 1.0).all())


@needs_gpu
def test_launch_errors() -> None:
    made = plan(SPEC, WEIGHT, device="cuda", config="cuda_simple")
    (function,) = made.functions
    with pytest.raises(cuda.CudaError, match=r"kernel cuda_simple .* cannot be launched with grid \(1, 1, 1\), 4096"):
        function.launch((1, 1, 1), 4096, 0, cuda.current_stream(), [0] * 56)
    x = torch.randn(SPEC.x_shape, device="cuda")
    assert made(x).isfinite().all()


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_launch_overhead_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Microseconds of the host per call; nothing is asserted of them."""
    made = plan(SPEC, WEIGHT, device="cuda", config=name)
    x = torch.randn(SPEC.x_shape, device="cuda")
    layer = SparseConv2d(WEIGHT, padding=1, choice=name).cuda()
    calls: dict[str, Callable[[], Any]] = {
        "plan": lambda: made(x),
        "plan, native": lambda: made(x, out_layout="native"),
        "module": lambda: layer(x),
    }
    if name == "cuda_simple":
        (function,) = made.functions
        runner: Any = made._runner
        y = torch.empty(SPEC.out_shape, device="cuda")
        real = (*_flat(x), *runner._weight_arguments, *_flat(None), *_flat(None), *_flat(y))
        stream = cuda.current_stream()
        calls["launch"] = lambda: function.launch(runner._grid, 128, 0, stream, real)
    with torch.inference_mode():
        for words, call in calls.items():
            call()
            torch.cuda.synchronize()
            best = float("inf")
            for _ in range(20):
                start = time.perf_counter()
                for _ in range(20):  # few enough to fit the driver's queue
                    call()
                best = min(best, (time.perf_counter() - start) / 20)
                torch.cuda.synchronize()
            with capsys.disabled():
                print(f"\n{name}: {words}: {best * 1e6:.1f} us a call", end="")


def _flat(t: Tensor | None) -> tuple[int, ...]:
    return cuda.array_arguments(0, 0, 4) if t is None else cuda.array_arguments(t.data_ptr(), t.numel(), 4)


# --- the torch operator ----------------------------------------------------------------------------------------


def arguments_of(layer: SparseConv2d, x: Tensor, out_layout: str = "") -> tuple[Any, ...]:
    shapes = [list(v) for v in (layer.kernel_shape, layer.stride, layer.padding, layer.dilation)]
    weight = (layer.values, layer.indices, layer.indptr)
    return (x, *weight, layer.bias, *shapes, layer.groups, layer.activation, layer._config, out_layout)


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 8, 1),
        nn.Flatten(),
    ).eval()
    for module in made:
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.masked_fill_(torch.rand_like(module.weight) > 0.1, 0.0)
    return made.requires_grad_(False)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name: str, layout: Layout) -> None:
    layer = SparseConv2d(WEIGHT, torch.randn(SPEC.k), padding=1, activation="relu", choice=name).cuda()
    x = to_layout(torch.randn(SPEC.x_shape, device="cuda"), layout)
    for out_layout in ("", *LAYOUTS):
        torch.library.opcheck(operator, arguments_of(layer, x, out_layout))
    torch.library.opcheck(operator, arguments_of(layer, x.clone().requires_grad_()))


@needs_gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "leaky_relu(0.2)"])
def test_gradients(activation: str) -> None:
    layer = SparseConv2d(WEIGHT, torch.randn(SPEC.k), padding=1, activation=activation)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = torch.randn(SPEC.x_shape, requires_grad=True)
    direction = torch.randn(SPEC.out_shape)
    expected = torch.autograd.grad(layer(x), (x, layer.bias), direction)
    moved = layer.cuda()
    assert moved.bias is not None
    here = x.detach().cuda().requires_grad_()
    found = torch.autograd.grad(moved(here), (here, moved.bias), direction.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_modules_move(layers: nn.Sequential) -> None:
    converted = convert(layers)
    x = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        expected = converted(x)
        moved = converted.cuda()
        torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(
            ValueError, match=r"the input is on device cpu, the sparse weight on cuda:0: move the model"
        ):
            moved(x)
        back = moved.cpu()
        torch.testing.assert_close(back(x), expected)
        half = back.cuda().half()
        assert half[0].values.dtype == torch.float32
        assert half(x.cuda().half()).dtype == torch.float16
    assert numbasparse.nn.conversion_report(converted)


@needs_gpu
@pytest.mark.usefixtures("strict")
def test_models_on_a_gpu_are_converted(layers: nn.Sequential) -> None:
    x = torch.randn(4, 3, 16, 16, device="cuda")
    model = layers.cuda()
    converted = convert(model, example_input=x)
    with torch.inference_mode():
        assert isinstance(converted[0], SparseConv2d)
        assert converted[0].values.is_cuda
        torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-3)


class TunedLayers:
    """A kernel's default config for every layer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice:
        return Choice(self.name, KERNELS[self.name].default(spec, weight, 1))


@needs_gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", [name for name in NAMES if not KERNELS[name].is_dense])
@pytest.mark.parametrize("n", [1, 32])
def test_layouts_between_layers(layers: nn.Sequential, name: str, n: int) -> None:
    x = torch.randn(n, 3, 16, 16, device="cuda")
    model = layers.cuda()
    converted = convert(model, TunedLayers(name), x)
    sparse = [m for m in converted if isinstance(m, SparseConv2d)]
    assert [m.choice is not None and m.choice.kernel for m in sparse] == [name] * 3
    between: list[Tensor] = []
    for m in sparse:
        m.register_forward_hook(lambda m, args, y: between.append(y))
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-3)
    for m, y in zip(sparse, between, strict=True):
        assert has_layout(y, m.out_layout or "NCHW")
    assert between[-1].is_contiguous()
    if n > 1 and KERNELS[name].layouts(SPEC, sparse[0].choice.config)[1] == "CHWN":  # type: ignore[attr-defined,union-attr]
        assert sparse[0].out_layout == "CHWN"


@needs_gpu
def test_compile(layers: nn.Sequential) -> None:
    converted = convert(layers).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.inference_mode():
        expected = converted(x)
        for options in ({"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}):
            torch._dynamo.reset()
            numbasparse.nn.clear_cache()  # plans are made while it warms up
            compiled = torch.compile(converted, fullgraph=True, **options)  # type: ignore[call-overload]
            for _ in range(3):
                torch.testing.assert_close(compiled(x).clone(), expected, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("strict", [True, False])
def test_export(layers: nn.Sequential, strict: bool) -> None:
    converted = convert(layers).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(converted, (x,), dynamic_shapes=({0: batch},), strict=strict)
    with torch.inference_mode():
        for n in (4, 7):
            x = torch.randn(n, 3, 16, 16, device="cuda")
            torch.testing.assert_close(program.module()(x), converted(x), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_model_in_a_graph(layers: nn.Sequential) -> None:
    converted = convert(layers).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.inference_mode():
        converted(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = converted(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, converted(x), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_operator_sees_changed_weights() -> None:
    layer = SparseConv2d(WEIGHT, padding=1).cuda()
    x = torch.randn(SPEC.x_shape, device="cuda")
    with torch.no_grad():
        y = layer(x)
        layer.values.mul_(2.0)
        torch.testing.assert_close(layer(x), 2 * y, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        fresh = SparseConv2d(WEIGHT, padding=1).cuda()
        fresh(x)
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(fresh(x), 2 * y, rtol=1e-4, atol=1e-4)
