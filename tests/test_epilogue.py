"""Sums and activations in the convolutions before them: plans, the operator, the rewritten models."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from compare import assert_close
from strategies import random_weight
from torch import Tensor, fx, nn
from torch.nn import functional as F

from numbasparse.kernels import kernels_for
from numbasparse.nn import SparseConv2d, conv2d, conversion_report, convert
from numbasparse.nn.exported import module_of
from numbasparse.plans import plan
from numbasparse.pruning import MagnitudePruning, prune_
from numbasparse.quantization import LinearQuantization, quantize_
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import models

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "leaky_relu(0.1)": lambda y: F.leaky_relu(y, 0.1),
}
SPEC = ConvSpec.create((2, 5, 6, 7), (4, 5, 1, 1))
DENSE = random_weight(SPEC, 0.4, np.random.default_rng(0))
WEIGHT = SparseWeight.from_dense(DENSE)
ABLE = [k for k in kernels_for("cpu") if k.supports(SPEC, WEIGHT) is None]
NAMES = [k.name for k in ABLE]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_comes_before_the_activation(name: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    made = plan(SPEC, WEIGHT, config=name, activation=activation)
    x, added = (rng.standard_normal(shape).astype(np.float32) for shape in (SPEC.x_shape, SPEC.out_shape))
    chosen = None if activation == "none" else activation
    assert_close(made(x, residual=added), SPEC, x, DENSE, None, chosen, residual=added)
    tensors = made(torch.from_numpy(x), residual=torch.from_numpy(added))
    assert_close(tensors.numpy(), SPEC, x, DENSE, None, chosen, residual=added)
    # Any order in memory and any float.
    strided = torch.from_numpy(added).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    close(made(torch.from_numpy(x), residual=strided), tensors)
    close(made(torch.from_numpy(x), residual=strided.double()), tensors)
    half = made(torch.from_numpy(x).half(), residual=strided.half())
    torch.testing.assert_close(half, tensors.half(), rtol=1e-2, atol=2e-2)
    assert_close(made(x), SPEC, x, DENSE, None, chosen)


def test_residuals_that_do_not_fit() -> None:
    made = plan(SPEC, WEIGHT)
    x, added = np.ones(SPEC.x_shape, np.float32), np.ones(SPEC.out_shape, np.float32)
    for residual, error, words in (
        (added[:1], ValueError, r"output's shape \(2, 4, 6, 7\), got \(1, 4, 6, 7\)"),
        (added.astype(int), TypeError, "floating dtype like x, got int64"),
        (torch.from_numpy(added), TypeError, "must be a NumPy array like x, got Tensor"),
    ):
        with pytest.raises(error, match=words):
            made(x, residual=residual)
    with pytest.raises(ValueError, match="out shares memory with residual"):
        made(x, out=added, residual=added)
    tensor, like_output = torch.from_numpy(x), torch.from_numpy(added)
    for value, error, words in (
        (like_output[:, :1], ValueError, "output's shape"),
        (like_output.int(), TypeError, "floating dtype like x"),
        (like_output.to("meta"), TypeError, "CPU tensor like x, got one on device meta"),
        (added, TypeError, "CPU tensor like x, got ndarray"),
        (like_output.clone().requires_grad_(), RuntimeError, "residual asks for one"),
    ):
        with pytest.raises(error, match=words):
            made(tensor, residual=value)
    with pytest.raises(ValueError, match="out shares memory with residual"):
        made(tensor, out=like_output, residual=like_output)


@pytest.mark.parametrize("name", [k.name for k in ABLE if not k.is_dense])
def test_threads_share_a_plan_each_with_its_residual(name: str) -> None:
    made = plan(SPEC, WEIGHT, config=name, threads=1)
    x = np.ones(SPEC.x_shape, np.float32)
    base, wrong = made(x), []

    def call(value: float) -> None:
        added = np.full(SPEC.out_shape, value, np.float32)
        for _ in range(200):
            if not np.allclose(made(x, residual=added), base + value, atol=1e-4):
                wrong.append(value)

    threads = [threading.Thread(target=call, args=(10.0 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the operator and the module ----------------------------------------------------------------------------


def sparse_conv(*args: int, activation: str = "none", **options: Any) -> SparseConv2d:
    return SparseConv2d.from_conv(conv(*args, **options), activation=activation)


def conv(*args: int, **options: Any) -> nn.Conv2d:
    made = nn.Conv2d(*args, **options)
    with torch.no_grad():
        made.weight.masked_fill_(torch.rand_like(made.weight) >= 0.2, 0.0)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_with_a_residual(activation: str) -> None:
    torch.manual_seed(0)
    layer = sparse_conv(3, 4, 3, padding=1, stride=2, activation=activation)
    dense, function = layer.to_dense(), ACTIVATIONS[activation]
    x, residual = torch.randn(2, 3, 7, 9, requires_grad=True), torch.randn(2, 4, 4, 5, requires_grad=True)
    y, expected = layer(x, residual), function(dense(x) + residual)
    close(y, expected)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, residual), grad), torch.autograd.grad(expected, (x, residual), grad), strict=True
    ):
        close(ours, theirs)
    tensors = (layer.values, layer.indices, layer.indptr, layer.bias)
    geometry = (layer.kernel_shape, layer.stride, layer.padding, layer.dilation, 1)
    torch.library.opcheck(conv2d, (x, *tensors, *geometry, activation, "", "", residual))
    # What is not exactly like the result is added as torch does.
    for other in (torch.randn(4, 1, 1), torch.randn(2, 4, 4, 5).double(), torch.randn(1, 4, 1, 5), torch.tensor(2.0)):
        torch.testing.assert_close(layer(x, other), function(dense(x) + other), rtol=1e-4, atol=1e-4)
    close(layer(x[0], residual[0]), function(dense(x[0]) + residual[0]))


# ---- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_networks(name: str) -> None:
    block, count = (models.BasicBlock, 2) if name == "resnet18" else (models.Bottleneck, 3)
    model = models.random_model(lambda: models.ResNet(block, (1, 2, 1, 1), 10))
    x = torch.randn(2, 3, 40, 48)
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"))
    models.settle_batch_norms(model, x)
    converted = convert(model, None, x)
    with torch.inference_mode():
        expected = model(x)
        close(converted(x), expected)
        close(copy.deepcopy(converted)(x), expected)
        close(converted(x[:1]), model(x[:1]))
        plain = convert(model, None, x, fuse=False)
        close(plain(x), expected)
    records = {record.name: record for record in conversion_report(converted)}
    last = [record for n, record in records.items() if n.startswith("layer") and n.endswith(f"conv{count}")]
    assert len(last) == 5
    assert all(record.residual and record.activation for record in last)
    assert sum(record.residual for record in records.values()) == 5
    inner = [record for n, record in records.items() if n.startswith("layer") and n.endswith("conv1")]
    assert all(record.activation and not record.residual for record in inner)
    assert type(converted) is models.ResNet
    names = {n for n, _ in model.named_modules()}
    assert {n for n, _ in converted.named_modules()} == names
    assert converted.load_state_dict(copy.deepcopy(converted.state_dict())) is not None
    assert not converted.training
    assert "relu" not in converted.layer2[0].code


class Block(nn.Module):
    """Two convolutions, a shared activation, and a ``forward`` that is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = conv(4, 4, 3, padding=1), conv(4, 4, 1)
        self.relu = nn.ReLU()
        self.in_place = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d((5, 6))
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5), requires_grad=False)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def keeps(block: Any, x: Tensor) -> Tensor:
    block.kept = F.relu(block.a(x))
    return block.kept + block.b(x)


def other_in_place(block: Any, x: Tensor) -> Tensor:
    y = block.a(x)
    y.add_(block.b(y))
    return y * x


def input_changes(block: Any, x: Tensor) -> Tensor:
    x = x * 1.0
    y = block.a(x)
    return y + block.in_place(x)


# Body, and what `a` and `b` take over: (activation, residual).
BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[str | None, bool], tuple[str | None, bool]]] = {
    "residual": (lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), ("relu", False), ("relu", True)),
    "in place": (lambda m, x: m.b(m.in_place(m.a(x))).add_(x).relu_(), ("block.in_place", False), ("relu", True)),
    "shared": (lambda m, x: m.relu(x + m.b(m.relu(m.a(x)))), ("block.relu", False), ("block.relu", True)),
    "sum of both": (lambda m, x: F.silu(m.a(x) + m.b(x)), ("silu", True), (None, False)),
    "leaky": (
        lambda m, x: F.leaky_relu(m.b(F.leaky_relu(m.a(x))) + x, 0.2),
        ("leaky_relu(0.01)", False),
        ("leaky_relu(0.2)", True),
    ),
    "leaky, by name": (
        lambda m, x: F.leaky_relu(m.a(x), negative_slope=0.3),
        ("leaky_relu(0.3)", False),
        (None, False),
    ),
    "leaky, below 0": (lambda m, x: F.leaky_relu(m.a(x), -0.5), (None, False), (None, False)),
    "no activation": (lambda m, x: m.b(m.a(x)) + x, (None, False), (None, True)),
    "broadcast": (lambda m, x: F.relu6(m.a(x) + m.b(m.pool(x))), ("relu6", True), (None, False)),
    "broadcast result": (lambda m, x: m.b(F.relu6(m.a(m.pool(x)) + x)), ("relu6", True), (None, False)),
    "seen twice": (lambda m, x: (y := m.a(x), F.relu(y) + y), (None, False), (None, False)),
    "with itself": (lambda m, x: (y := m.a(x)) + y, (None, False), (None, False)),
    "twice": (lambda m, x: F.relu(m.a(F.relu(m.a(x)))), (None, False), (None, False)),
    "other in place": (other_in_place, (None, False), (None, False)),
    "input changes": (input_changes, (None, False), (None, False)),
    "scaled": (lambda m, x: torch.add(m.a(x), x, alpha=2), (None, False), (None, False)),
    "a number": (lambda m, x: m.a(x) + 1.0, (None, False), (None, False)),
    "keeps": (keeps, (None, False), (None, False)),
    "reads": (lambda m, x: F.relu(m.a(x)) * m.scale, (None, False), (None, False)),
    "branches": (lambda m, x: F.relu(m.a(x)) if x.sum() > -1e9 else x, (None, False), (None, False)),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_bodies(name: str) -> None:
    torch.manual_seed(0)
    body, *expected = BODIES[name]
    model = nn.Sequential()
    model.add_module("block", Block(body))
    x = torch.randn(2, 4, 5, 6)
    converted = convert(model.eval(), None, x)
    with torch.inference_mode():
        ours, theirs = converted(x.clone()), model(x.clone())
    for actual, wanted in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]:
        close(actual, wanted)
    records = {record.name: record for record in conversion_report(converted)}
    found = [(records[n].activation, records[n].residual) for n in ("block.a", "block.b")]
    assert found == expected
    block: Any = converted.get_submodule("block")
    assert isinstance(block, fx.GraphModule) == (expected != [(None, False), (None, False)])
    assert block.body is body
    assert converted.state_dict().keys() == convert(model, None, x, fuse=False).state_dict().keys()


@pytest.mark.parametrize(
    ("body", "scale", "residual"),
    [
        (lambda m, x: m.a(x) * 0.2 + x, 0.2, True),
        (lambda m, x: F.relu(x + 2 * m.a(x)), 2.0, True),
        (lambda m, x: torch.mul(m.a(x), -0.5), -0.5, False),
        (lambda m, x: m.a(x).mul_(3), 3.0, False),
        (lambda m, x: m.a(x) * x, None, False),
        (lambda m, x: m.a(x) * 0.0, None, False),
        (lambda m, x: m.a(x) * True, None, False),
        (lambda m, x: 0.5 * (m.a(x) + x), None, True),
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_products_with_a_number(body: Callable[[Any, Tensor], Any], scale: Any, residual: bool, bits: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(), torch.randn(2, 4, 5, 6)
    model.add_module("block", Block(body))
    quantized = None if bits is None else quantize_(model, LinearQuantization(bits=bits)).weights
    converted = convert(model.eval(), None, x, quantized=quantized)
    before = convert(model, None, x, fuse=False, quantized=quantized).state_dict()
    with torch.inference_mode():
        close(converted(x.clone()), model(x.clone()))
    record = conversion_report(converted)[0]
    assert (record.name, record.scale, record.residual) == ("block.a", scale, residual)
    if bits is not None:
        assert converted.get_submodule("block.a").values.dtype == torch.uint8
    # The weights of the model that was not fused are its own.
    again = convert(model, None, x, fuse=False, quantized=quantized).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


def asks_for_tensors(block: Any, x: Any) -> Any:
    """torch.fx shows proxies, which are no tensors: what it sees is not what runs."""
    return block.a(x) if isinstance(x, Tensor) else F.relu(block.a(x))


def changes_its_input(block: Any, x: Any) -> Any:
    """torch.fx sees a sum, and not that the caller's tensor changes."""
    x += block.a(x)
    return block.relu(x)


class Outer(nn.Module):
    """Uses a block's input after the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return self.block(x) + 2 * x


@pytest.mark.parametrize("body", [asks_for_tensors, changes_its_input])
def test_a_rewrite_that_changes_the_result_is_put_back(body: Callable[[Any, Tensor], Any]) -> None:
    model, x = Outer(Block(body)).eval(), torch.randn(1, 4, 5, 5)
    with pytest.warns(UserWarning, match="gave another result on example_input"):
        converted = convert(model, None, x)
    with torch.inference_mode():
        close(converted(x), model(x))
    assert not any(record.activation for record in conversion_report(converted))


def test_hooks_stay() -> None:
    heard: list[Any] = []
    model, x = nn.Sequential(Block(BODIES["residual"][0])).eval(), torch.randn(1, 4, 5, 5)
    model[0].register_forward_hook(lambda module, args, y: heard.append(y))
    converted = convert(model, None, x)
    assert not any(record.residual for record in conversion_report(converted))
    heard.clear()
    converted(x)
    assert len(heard) == 1


def test_exported_programs() -> None:
    model = models.random_model(lambda: models.ResNet(models.BasicBlock, (1, 1, 1, 1), 10))
    x = torch.randn(1, 3, 40, 40)
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"))
    models.settle_batch_norms(model, x)
    program = torch.export.export(model, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        converted = convert(module_of(program), None, x)
    with torch.inference_mode():
        close(converted(x), model(x))
    assert sum(record.residual for record in conversion_report(converted)) == 4
    # And out again.
    again = torch.export.export(converted, (x,)).module()
    with torch.inference_mode():
        close(again(x), model(x))


# ---- a model's own forward ------------------------------------------------------------------------------------


class Flat(nn.Module):
    """No part of it is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return torch.relu(self.second(y) + y)

    def size(self) -> int:
        return len(self.state_dict())


def test_a_models_own_forward() -> None:
    torch.manual_seed(3)
    model = Flat().eval()
    with torch.no_grad():
        for conv in (model.first, model.second):
            conv.weight.mul_(torch.rand_like(conv.weight) < 0.2)
    x = torch.randn(2, 3, 7, 8)
    converted = convert(model, None, x)
    assert isinstance(converted, Flat)
    assert type(converted).__name__ == "Flat"
    assert (converted.note, converted.size()) == ("kept", 8)
    assert [(r.activation, r.residual) for r in conversion_report(converted)] == [("relu", False), ("relu", True)]
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    torch._dynamo.reset()
    twins = [
        converted,
        copy.deepcopy(converted),
        torch.load(buffer, weights_only=False),
        torch.compile(converted, backend="aot_eager", fullgraph=True),
        torch.export.export(converted, (x,)).module(),
    ]
    with torch.inference_mode():
        expected = model(x)
        for twin in twins:
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
        twins[1].first.bias.zero_()  # the copy is one
        assert not torch.allclose(twins[1](x), expected)
        torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(twins[1], Flat)
    assert isinstance(twins[2], Flat)


def test_results_agree_up_to_rounding() -> None:
    """Of sixteen bits, what half precision makes of a deep model; a residual that is left out never passes."""
    conversion = importlib.import_module("numbasparse.nn.convert")
    torch.manual_seed(0)
    y = torch.randn(4, 1000)
    noise = torch.randn_like(y)
    for dtype, small, large in (
        (torch.float32, 5e-4, 2e-3),
        (torch.float16, 3e-2, 0.1),
        (torch.bfloat16, 0.2, 0.5),
    ):
        before = y.to(dtype)
        assert conversion._close([before], [(y + small * noise).to(dtype)])
        assert not conversion._close([before], [(y + large * noise).to(dtype)])
    assert not conversion._close([y], [y, y])
    assert not conversion._close([y], [y[:2]])
    broken = y.clone()
    broken[1, 1] = torch.nan
    assert not conversion._close([y], [broken])
    assert conversion._close([broken], [broken])
    assert conversion._close([torch.zeros(3)], [torch.zeros(3)])
    assert not conversion._close([torch.zeros(3)], [torch.full((3,), 1e-3)])
