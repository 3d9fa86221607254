"""Sparse convolutions in torch models: the operator, the module, convert; export and compile."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.kernels import KERNELS, kernels_for
from numbasparse.nn import SparseConv2d, clear_cache, conv2d, conversion_report, convert
from numbasparse.nn import operator as operator_room
from numbasparse.plans import Choice
from numbasparse.pruning import MagnitudePruning, prune_
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

DENSE = next(k.name for k in kernels_for("cpu") if k.is_dense)
SPARSE = [k.name for k in kernels_for("cpu") if not k.is_dense]
GENERAL = next(name for name in reversed(SPARSE))

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "leaky_relu(0.2)": lambda y: F.leaky_relu(y, 0.2),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    clear_cache()


@pytest.fixture(scope="module")
def fashion() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "data" / "fashion.py"
    spec = importlib.util.spec_from_file_location("fashion_for_nn", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(fashion: ModuleType) -> nn.Module:
    made = fashion.fashion_resnet()
    _shake_batch_norms(made)
    prune_(made, MagnitudePruning(sparsity=0.9))
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 1, 28, 28)


def _shake_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def _conv(*args: Any, density: float = 0.2, **kwargs: Any) -> nn.Conv2d:
    conv = nn.Conv2d(*args, **kwargs)
    with torch.no_grad():
        conv.weight.masked_fill_(torch.rand_like(conv.weight) >= density, 0.0)
    return conv.eval().requires_grad_(False)


def _arguments(layer: SparseConv2d, x: Tensor, config: str = "") -> tuple[Any, ...]:
    shapes = [list(v) for v in (layer.kernel_shape, layer.stride, layer.padding, layer.dilation)]
    return (
        x,
        layer.values,
        layer.indices,
        layer.indptr,
        layer.bias,
        *shapes,
        layer.groups,
        layer.activation,
        config,
    )


def _assert_close(actual: Tensor, expected: Tensor, tol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol * max(1.0, float(expected.abs().max())))


# ---- the operator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "arguments"),
    [
        ("none", {"kernel_size": 3, "padding": 1}),
        ("relu", {"kernel_size": 1, "bias": False}),
        ("relu6", {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "groups": 2}),
        ("silu", {"kernel_size": (2, 4), "padding": "same"}),
        ("none", {"kernel_size": 3, "padding": "valid", "dilation": 2, "bias": False}),
    ],
)
def test_operator_equals_torch(activation: str, arguments: dict[str, Any]) -> None:
    conv = _conv(4, 6, **arguments)
    x = torch.randn(2, 4, 9, 8)
    y = SparseConv2d.from_conv(conv, activation=activation)(x)
    assert y.is_contiguous()
    _assert_close(y, ACTIVATIONS[activation](conv(x)))


def test_image_without_a_batch() -> None:
    conv = _conv(4, 6, 3)
    x = torch.randn(4, 6, 6)
    _assert_close(SparseConv2d.from_conv(conv)(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_operator_keeps_dtype_and_takes_any_strides(dtype: torch.dtype) -> None:
    conv = _conv(4, 6, 3)
    x = torch.randn(2, 4, 9, 8).to(dtype).to(memory_format=torch.channels_last)
    y = SparseConv2d.from_conv(conv)(x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    _assert_close(y.float(), conv(x.float()), 1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3, padding=1, bias=bias), activation="relu")
    arguments = _arguments(layer, torch.randn(2, 4, 6, 5))
    torch.library.opcheck(conv2d, arguments)


def test_operator_sees_changed_weights() -> None:
    conv = _conv(4, 6, 3)
    x = torch.randn(1, 4, 6, 6)
    layer = SparseConv2d.from_conv(conv)
    layer(x)
    layer.values.mul_(2.0)
    with torch.no_grad():
        conv.weight.mul_(2.0)
    _assert_close(layer(x), conv(x))
    with torch.inference_mode():
        layer.values.mul_(2.0)
        conv.weight.mul_(2.0)
        _assert_close(layer(x), conv(x))


def test_operator_sees_changed_inference_tensors() -> None:
    with torch.inference_mode():
        conv = _conv(4, 6, 3)
        x = torch.randn(1, 4, 6, 6)
        layer = SparseConv2d.from_conv(conv)
        layer.values = layer.values.clone()
        assert layer.values.is_inference()
        layer(x)
        layer.values.mul_(2.0)
        conv.weight.mul_(2.0)
        _assert_close(layer(x), conv(x))


def test_a_layer_made_in_inference_mode_is_not_compared_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        layer = SparseConv2d.from_conv(_conv(4, 6, 3))
        assert not layer.values.is_inference()
        x = torch.randn(1, 4, 6, 6)
        layer(x)
        monkeypatch.setattr(torch, "equal", None)
        layer(x)


def test_plans_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    cache = operator_room._plans
    for size in (5, 6, 5, 6):
        layer(torch.randn(1, 4, size, size))
    assert len(cache) == 2
    monkeypatch.setattr(cache, "max_bytes", 1)
    layer(torch.randn(1, 4, 7, 7))
    assert len(cache) == 1
    clear_cache()
    assert len(cache) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1), "groups": 2},
        {"kernel_size": (2, 4), "padding": "same", "dilation": 2},
    ],
)
def test_gradients(activation: str, arguments: dict[str, Any]) -> None:
    conv = _conv(4, 6, **arguments).requires_grad_()
    layer = SparseConv2d.from_conv(conv, activation=activation)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = torch.randn(2, 4, 9, 8)
    x, same = (x.clone().requires_grad_() for _ in range(2))
    y, expected = layer(3 * x), ACTIVATIONS[activation](conv(3 * same))
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction)
    _assert_close(x.grad, same.grad)
    _assert_close(layer.bias.grad, conv.bias.grad)
    torch.library.opcheck(conv2d, _arguments(layer, x.detach().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    x = torch.randn(1, 4, 6, 6, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_the_weight_has_no_gradient() -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    layer.values.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient for its sparse weight"):
        layer(torch.randn(1, 4, 6, 6)).sum().backward()


def test_config_that_cannot_run_gives_way_to_the_default() -> None:
    conv = _conv(4, 6, 3)
    x = torch.randn(1, 4, 6, 6)
    layer = SparseConv2d.from_conv(conv)
    for name in KERNELS:  # those for GPUs too
        _assert_close(conv2d(*_arguments(layer, x, json.dumps({"kernel": name}))), conv(x))
        nonsense = json.dumps({"kernel": name, "config": {"nonsense": 1}})
        _assert_close(conv2d(*_arguments(layer, x, nonsense)), conv(x))


@pytest.mark.parametrize(
    ("config", "words"),
    [("{", "must be JSON"), ("[]", "must be JSON"), ('{"kernel": "fast"}', "expected a kernel's name")],
)
def test_wrong_configs(config: str, words: str) -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    with pytest.raises(ValueError, match=words):
        conv2d(*_arguments(layer, torch.randn(1, 4, 6, 6), config))


def test_wrong_inputs() -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    with pytest.raises(ValueError, match="weight has 4 input channels but input has 5"):
        layer(torch.randn(1, 5, 6, 6))
    with pytest.raises(ValueError, match="spans 3"):
        layer(torch.randn(1, 4, 2, 6))
    with pytest.raises(TypeError, match="int32"):
        layer(torch.ones(1, 4, 6, 6, dtype=torch.int32))


def test_operator_costs_little() -> None:
    """A loose bound, for a loaded machine: what is measured is tens of microseconds."""
    layer = SparseConv2d.from_conv(_conv(2, 2, 1))
    x = torch.randn(1, 2, 2, 2)
    arguments = _arguments(layer, x)
    best = math.inf
    with torch.inference_mode():
        for _ in range(200):
            start = time.perf_counter()
            conv2d(*arguments)
            best = min(best, time.perf_counter() - start)
    assert best < 1e-3


# ---- the module ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
        {"kernel_size": (2, 4), "padding": "same"},
        {"kernel_size": 3, "groups": 2, "bias": False, "dilation": (1, 2)},
    ],
)
def test_dense_round_trip(arguments: dict[str, Any]) -> None:
    conv = _conv(4, 6, **arguments)
    layer = SparseConv2d.from_conv(conv)
    again = layer.to_dense()
    assert torch.equal(again.weight, conv.weight)
    x = torch.randn(1, 4, 9, 9)
    _assert_close(again(x), conv(x))
    matrix = layer.weight_matrix()
    assert matrix == SparseWeight.from_dense(conv.weight, conv.groups)
    assert layer.sparsity == pytest.approx(matrix.sparsity)


def test_module_from_a_weight() -> None:
    weight = SparseWeight.from_dense(_conv(4, 6, 3).weight)
    layer = SparseConv2d(weight, padding=((0, 1), (2, 3)))
    x = torch.randn(1, 4, 6, 6)
    _assert_close(layer(x), F.conv2d(F.pad(x, (2, 3, 0, 1)), torch.from_numpy(weight.to_dense())))
    with pytest.raises(ValueError, match="ZeroPad2d"):
        layer.to_dense()


def test_state_dict_with_another_number_of_nonzeros() -> None:
    one, other = SparseConv2d.from_conv(_conv(4, 6, 3)), SparseConv2d.from_conv(_conv(4, 6, 3, density=0.4))
    assert one.values.shape != other.values.shape
    assert set(one.state_dict()) == {"values", "indices", "indptr", "bias"}
    x = torch.randn(1, 4, 6, 6)
    other(x)
    for assign in (False, True):
        fresh = copy.deepcopy(other)
        fresh.load_state_dict(one.state_dict(), assign=assign)
        assert torch.equal(fresh(x), one(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(SparseConv2d.from_conv(_conv(4, 8, 3)).state_dict()), "8"),
        (lambda s: s.update(indices=s["indices"][:-1]), "no sparse weight of shape"),
        (lambda s: s.update(indices=s["indices"] + 36), "no sparse weight of shape"),
        (lambda s: s.update(values=s["values"].double()), "float32"),
        (lambda s: s.update(values=None), "must be a tensor"),
        (lambda s: s.pop("indices"), "Missing key"),
    ],
)
def test_wrong_state_dicts(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    before = layer.weight_matrix()
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(state)
    assert layer.weight_matrix() == before


def test_copies_and_pickles() -> None:
    choice = Choice(GENERAL)
    layer = SparseConv2d.from_conv(_conv(4, 6, 3), choice=choice, activation="silu")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(1, 4, 6, 6)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert twin.choice == choice
        assert torch.equal(twin(x), layer(x))


def test_half_leaves_values_and_bias() -> None:
    layer = SparseConv2d.from_conv(_conv(4, 6, 3))
    x, values, bias = torch.randn(1, 4, 6, 6).half(), layer.values.clone(), layer.bias.clone()
    y = layer(x)
    layer.half()
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.bias, bias)
    assert layer(x).dtype == torch.float16
    _assert_close(layer(x).float(), y.float(), 1e-2)


def test_bias_of_a_half_convolution_is_float32() -> None:
    conv = _conv(4, 6, 3).half()
    layer = SparseConv2d.from_conv(conv)
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, conv.bias.float())
    layer.bias = nn.Parameter(layer.bias)  # one that is trained is the model's
    assert layer.half().bias.dtype == torch.float16


def test_repr() -> None:
    text = repr(SparseConv2d.from_conv(_conv(4, 6, 3, groups=2), choice=GENERAL, activation="relu"))
    assert f"kernel={GENERAL}" in text
    assert "groups=2" in text
    assert "sparsity=" in text


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="padding_mode 'reflect' is not supported"):
        SparseConv2d.from_conv(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(TypeError, match=r"expected an nn\.Conv2d"):
        SparseConv2d.from_conv(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a kernel's name"):
        SparseConv2d.from_conv(_conv(4, 6, 3), choice="fast")
    with pytest.raises(ValueError, match="got keys"):
        SparseConv2d.from_conv(_conv(4, 6, 3), choice={"name": "fast"})
    with pytest.raises(TypeError, match=r"numbasparse\.nn\.convert"):
        SparseConv2d.from_conv(_conv(4, 6, 3), choice=Tuned({}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be"):
        SparseConv2d.from_conv(_conv(4, 6, 3), activation="gelu")
    with pytest.raises(ValueError, match="bias must have shape"):
        SparseConv2d(SparseWeight.from_dense(_conv(4, 6, 3).weight), torch.zeros(5))


# ---- convert ------------------------------------------------------------------------------------------------


class Tuned:
    """Chooses by name, and remembers what it was asked."""

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.choices = choices
        self.asked: dict[str | None, ConvSpec] = {}

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice | None:
        self.asked[name] = spec
        return self.choices.get(name or "")


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def test_converted_model_equals_the_dense_one(model: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    model.train()
    converted = convert(model)
    assert model.training
    assert not converted.training
    model.eval()
    assert type(converted) is type(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    _assert_close(_run(converted, images), _run(model, images))
    report = {record.name: record for record in conversion_report(converted)}
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert list(report) == layers
    assert (report["linear"].decision, report["linear"].reason) == ("dense", "a linear layer at density 100.0%")
    assert report["stem.0"].decision == "dense"  # not pruned: it has one input channel
    assert report["stem.0"].batch_norm == "stem.1"
    assert isinstance(converted.get_submodule("stem.2"), nn.ReLU)
    first = report["stage1.0.conv1"]
    assert (first.decision, first.batch_norm, first.activation) == ("sparse", "stage1.0.bn1", "stage1.0.relu1")
    assert report["stage1.0.conv2"].activation is None  # the shortcut is added first
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    untouched = {key for key in converted.state_dict() if key.startswith("linear")}
    assert untouched == {"linear.weight", "linear.bias"}


def test_without_fusing(model: nn.Module, images: Tensor) -> None:
    converted = convert(model, fuse=False)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            assert type(converted.get_submodule(name)) is type(module)
    _assert_close(_run(converted, images), _run(model, images))


def test_tuned_choices_decide(model: nn.Module, images: Tensor) -> None:
    tuned = Tuned({"stage1.0.conv1": Choice(DENSE), "stage1.0.conv2": Choice(GENERAL)})
    converted = convert(model, tuned, images)
    assert type(converted.get_submodule("stage1.0.conv1")) is nn.Conv2d
    layer = converted.get_submodule("stage1.0.conv2")
    assert isinstance(layer, SparseConv2d)
    assert layer.choice == Choice(GENERAL)
    assert tuned.asked["stage2.0.conv1"].x_shape == (2, 32, 28, 28)
    assert tuned.asked["stage3.1.conv2"].x_shape == (2, 128, 7, 7)
    report = {record.name: record for record in conversion_report(converted)}
    assert report["stage1.1.conv1"].reason.startswith("default, as nothing is tuned for it")
    expected = _run(model, images)
    _assert_close(_run(converted, images), expected)
    _assert_close(_run(convert(model, tuned, (images,)), images), expected)
    _assert_close(_run(convert(model, tuned, {"x": images}), images), expected)
    _assert_close(_run(converted, images[:1]), expected[:1])  # a batch that nobody tuned


def test_tuned_by_name_needs_no_example(model: nn.Module) -> None:
    class ByName:
        def choice_by_name(self, name: str) -> Choice | None:
            return Choice(DENSE) if name == "stage1.0.conv1" else None

    converted = convert(model, ByName())
    assert type(converted.get_submodule("stage1.0.conv1")) is nn.Conv2d
    assert isinstance(converted.get_submodule("stage1.0.conv2"), SparseConv2d)


def test_tuned_to_be_dense_everywhere_warns(model: nn.Module, images: Tensor) -> None:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with pytest.warns(UserWarning, match="every layer stays dense"):
        converted = convert(model, Tuned({name: Choice(DENSE) for name in names}), images)
    _assert_close(_run(converted, images), _run(model, images))


def test_state_dict_of_converted_models(model: nn.Module, fashion: ModuleType, images: Tensor) -> None:
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"))
    converted = convert(model)
    other = fashion.fashion_resnet()
    prune_(other, MagnitudePruning(sparsity=0.7, scope="layer"))
    fresh = convert(other)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(_run(fresh, images), _run(converted, images))


class Awkward(nn.Module):
    """Everything that must not be folded or replaced, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = _conv(4, 4, 3, padding=1)
        self.alias = self.shared
        self.twice_bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.seen = _conv(4, 4, 3, padding=1)
        self.seen_bn = nn.BatchNorm2d(4)
        self.read = _conv(4, 4, 3, padding=1)
        self.read_bn = nn.BatchNorm2d(4)
        self.batch = _conv(4, 4, 3, padding=1)
        self.batch_bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.hooked = _conv(4, 4, 3, padding=1)
        self.hooked_relu = nn.ReLU()
        self.reflect = _conv(4, 4, 3, padding=1, padding_mode="reflect")
        self.functional = _conv(4, 4, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(4, 4, 1)
        self.dropout = nn.Dropout(0.5)
        self.unused = _conv(4, 4, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.relu(self.twice_bn(self.shared(x)))
        x = self.relu(self.twice_bn(self.alias(x)))
        y = self.seen(x)
        x = self.seen_bn(y) + y
        x = self.read_bn(self.read(x)) + self.read.weight.sum()
        x = self.dropout(self.batch_bn(self.batch(x)))
        x = self.hooked_relu(self.hooked(x))
        x = self.functional(self.reflect(x))
        if skip is None:
            x = x + 1.0
        return self.transposed(F.relu(x))


def test_what_must_not_be_folded_is_not() -> None:
    model = Awkward().eval()
    _shake_running_statistics(model)
    heard: list[Tensor] = []
    model.hooked_relu.register_forward_hook(lambda module, args, y: heard.append(y))
    x = torch.randn(2, 4, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert(model, example_input=x)
    report = {record.name: record for record in conversion_report(converted)}
    assert {name for name, record in report.items() if record.decision == "sparse"} == {
        "shared",
        "seen",
        "batch",
        "hooked",
        "functional",
    }
    assert not any(record.batch_norm or record.activation for record in report.values())
    assert converted.get_submodule("shared") is converted.get_submodule("alias")
    assert "directly" in report["read"].reason
    assert "reflect" in report["reflect"].reason
    assert "does not reach" in report["unused"].reason
    heard.clear()
    _assert_close(_run(converted, x), _run(model, x))
    assert len(heard) == 2  # a hook is copied with its module: it hears both models


def _shake_running_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0.5, 0.3)


class OptionalArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = _conv(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if skip is None:
            y = y - 0.5
        return self.relu(y)


def test_both_ways_through_an_optional_argument_count() -> None:
    """A trace sees ``skip`` as never None; only what holds both ways may be folded."""
    model = OptionalArgument().eval()
    x = torch.randn(1, 4, 5, 5)
    converted = convert(model)
    assert isinstance(converted.get_submodule("relu"), nn.ReLU)
    _assert_close(_run(converted, x), _run(model, x))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), _conv(4, 4, 1), nn.ReLU6())
        self.conv, self.bn = _conv(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.bn(self.conv(x)) if x.sum() > 0 else self.bn(x)


def test_untraceable_model_warns_and_folds_sequences() -> None:
    model = Untraceable().eval()
    _shake_batch_norms(model)
    with pytest.warns(UserWarning, match="cannot trace Untraceable"):
        converted = convert(model)
    x = torch.randn(2, 4, 6, 6)
    _assert_close(_run(converted, x), _run(model, x))
    report = {record.name: record for record in conversion_report(converted)}
    assert (report["body.0"].batch_norm, report["body.0"].activation) == ("body.1", "body.2")
    assert report["body.3"].activation == "body.4"
    assert report["conv"].batch_norm is None


def test_a_lone_convolution_and_a_parametrized_one() -> None:
    conv = _conv(4, 6, 3)
    x = torch.randn(1, 4, 6, 6)
    assert isinstance(convert(conv), SparseConv2d)
    _assert_close(_run(convert(conv), x), _run(conv, x))

    class Masked(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (weight > 0.3)

    masked = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        masked[0].weight.mul_(2.0)
    nn.utils.parametrize.register_parametrization(masked[0], "weight", Masked())
    converted = convert(masked)
    assert isinstance(converted.get_submodule("0"), SparseConv2d)
    _assert_close(_run(converted, x), _run(masked, x))


def test_convert_errors(model: nn.Module, fashion: ModuleType, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        convert(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="load the tuned file first"):
        convert(model, "tuned.json")
    with pytest.raises(ValueError, match=r"has no nn\.Conv2d and no nn\.Linear"):
        convert(nn.ReLU())
    with pytest.raises(ValueError, match="prune the model first"):
        convert(fashion.fashion_resnet())
    with pytest.raises(ValueError, match="give convert an example_input"):
        convert(model, Tuned({}))
    with pytest.raises(TypeError, match="example_input must be"):
        convert(model, Tuned({}), [images])
    with pytest.raises(ValueError, match="was not made by"):
        conversion_report(model)
    with torch.no_grad():
        model.get_parameter("stage1.0.conv2.weight").fill_(math.nan)
    with pytest.raises(ValueError, match=r"layer 'stage1\.0\.conv2'"):
        convert(model)


# ---- export and compile -------------------------------------------------------------------------------------


def test_export(model: nn.Module, images: Tensor) -> None:
    converted = convert(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(converted, (images,), dynamic_shapes=({0: batch},))
    assert "numbasparse.conv2d" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for x in (images, torch.randn(3, 1, 28, 28)):
        for runnable in (program, loaded):
            _assert_close(_run(runnable.module(), x), _run(converted, x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_image_sizes(strict: bool) -> None:
    layers = nn.Sequential(_conv(4, 6, 3, stride=2, padding=1), nn.ReLU(), _conv(6, 4, 1))
    converted = convert(layers)
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(converted, (torch.randn(1, 4, 9, 8),), dynamic_shapes=(sizes,), strict=strict)
    x = torch.randn(1, 4, 16, 17)
    _assert_close(_run(program.module(), x), _run(layers, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_compile(model: nn.Module, images: Tensor, backend: str, grad: bool) -> None:
    """With gradients enabled too: dense layers before a sparse one then ask for the backward graph."""
    converted = convert(model)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        y = compiled(images.requires_grad_(grad))
    _assert_close(y.detach(), _run(converted, images))
    if grad:
        (found,) = torch.autograd.grad(y.sum(), images)
        (expected,) = torch.autograd.grad(converted(images).sum(), images)
        _assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    layers = nn.Sequential(_conv(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), _conv(6, 4, 1)).eval()
    converted = convert(layers)
    torch._dynamo.reset()
    x = torch.randn(2, 4, 8, 8)
    _assert_close(_run(torch.compile(converted), x), _run(layers, x))


# ---- layouts between layers -----------------------------------------------------------------------------------


class _ByName:
    """Chooses a config of GPUs for every layer; those in ``rows`` work on NCHW, the others on CHWN."""

    def __init__(self, *rows: str) -> None:
        self.rows = rows

    def choice_by_name(self, name: str) -> Choice:
        return Choice("cuda_direct", {"batch": 1 if name in self.rows else 32})


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (_conv(4, 4, 3, padding=1) for _ in range(4))
        self.pool, self.act = nn.MaxPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        y = torch.relu(y + self.second(y))
        return self.last(self.pool(self.third(y))).view(x.size(0), -1)


def test_layouts_between_layers() -> None:
    model = _Residual()
    x = torch.randn(2, 4, 8, 8)
    converted = convert(model, _ByName())
    layouts = {name: m.out_layout for name, m in converted.named_modules() if isinstance(m, SparseConv2d)}
    assert layouts == {"first": "CHWN", "second": "CHWN", "third": "CHWN", "last": "NCHW"}
    _assert_close(_run(converted, x), _run(model, x))  # on the CPU they are NCHW all the same
    converted = convert(model, _ByName("first", "second", "third", "last"))
    assert all(m.out_layout is None for m in converted.modules() if isinstance(m, SparseConv2d))


def test_layouts_of_a_model_that_cannot_be_traced() -> None:
    class Model(_Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() > 0) else -x)

    with pytest.warns(UserWarning, match="cannot trace"):
        converted = convert(Model(), _ByName())
    assert all(m.out_layout is None for m in converted.modules() if isinstance(m, SparseConv2d))


def test_out_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="out_layout must be None or one of"):
        SparseConv2d.from_conv(_conv(4, 6, 3), out_layout="NWHC")  # type: ignore[arg-type]


def test_a_bias_that_was_made_a_parameter() -> None:
    layer = SparseConv2d.from_conv(_conv(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x).detach()
    layer.bias = nn.Parameter(layer.bias + 1.0)
    _assert_close(layer(x).detach(), expected + 1.0)
    with torch.inference_mode():
        _assert_close(layer(x), expected + 1.0)


def test_calls_pass_the_dispatcher_where_nobody_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode only, and not where operators are recorded, transformed or replaced."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    room = importlib.import_module("numbasparse.nn.operator")
    seen: list[str] = []

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(room, "conv2d", noted("operator", room.conv2d))
    layer = SparseConv2d.from_conv(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = layer(x)
    assert seen.pop() == "operator"

    class Counting(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found += "numbasparse" in str(function)
            return function(*args, **(kwargs or {}))

    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
        assert not seen
        with Counting() as mode:
            layer(x)
        assert (seen.pop(), mode.found) == ("operator", 1)
        with torch.profiler.profile() as profile:
            layer(x)
        assert seen.pop() == "operator"
        assert any(event.key == "numbasparse::conv2d" for event in profile.key_averages())
        traced = torch.jit.trace(layer, x)
        assert "numbasparse::conv2d" in str(traced.inlined_graph)
    with torch.no_grad():
        assert any("numbasparse" in str(node.target) for node in make_fx(layer)(x).graph.nodes)
