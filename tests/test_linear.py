"""`SparseLinear`, and linear layers in `convert` and the tuner."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import autotune
from autotune.model import problems_of
from numbasparse.nn import SparseLinear, conversion_report, convert
from numbasparse.nn import convert as convert_function
from numbasparse.plans import Choice
from numbasparse.pruning import MagnitudePruning, prune_
from numbasparse.quantization import LinearQuantization, quantize_
from numbasparse.weight import SparseWeight


def linear(inputs: int, outputs: int, sparsity: float = 0.8, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        made.weight[torch.rand_like(made.weight) < sparsity] = 0
    return made.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Sparse:
    """Chooses the first sparse kernel for every layer, as a tuned file may."""

    def choice(self, spec: Any, weight: SparseWeight, name: str) -> Choice:
        return Choice("cpu_direct")


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 20),
    batch=st.lists(st.integers(1, 4), max_size=3),
    sparsity=st.sampled_from([0.0, 0.7, 1.0]),
    bias=st.booleans(),
    activation=st.sampled_from([None, "relu", "leaky_relu(0.2)"]),
)
def test_like_the_dense_layer(
    inputs: int, outputs: int, batch: list[int], sparsity: float, bias: bool, activation: str | None
) -> None:
    dense = linear(inputs, outputs, sparsity, bias)
    sparse = SparseLinear.from_linear(dense, activation=activation)
    x = torch.randn(*batch, inputs)
    acts: dict[str | None, Any] = {None: lambda y: y, "relu": F.relu, "leaky_relu(0.2)": lambda y: F.leaky_relu(y, 0.2)}
    with torch.inference_mode():
        close(sparse(x), acts[activation](dense(x)))
        residual = torch.randn(*batch, outputs)
        close(sparse(x, residual), acts[activation](dense(x) + residual))
    assert torch.equal(sparse.to_dense().weight, dense.weight)


def test_inputs_of_every_kind() -> None:
    dense = linear(12, 5)
    sparse = SparseLinear.from_linear(dense)
    x = torch.randn(12, 6).t()  # not contiguous
    close(sparse(x), dense(x))
    close(sparse(torch.empty(0, 3, 12)), dense(torch.empty(0, 3, 12)))
    close(sparse(x.double()), dense(x).double())
    for wrong in (torch.randn(2, 11), torch.randn(12, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected vectors of 12 values"):
            sparse(wrong)
    with pytest.raises(TypeError, match=r"expected an nn\.Linear"):
        SparseLinear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


def test_gradients() -> None:
    dense = linear(9, 4)
    sparse = SparseLinear.from_linear(dense, activation="relu")
    x, y = (torch.arange(27.0).reshape(3, 9).sub(13).requires_grad_() for _ in range(2))
    sparse(x).square().sum().backward()
    F.relu(dense(y)).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    close(x.grad, y.grad)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 25, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(F.relu(self.conv(x)).flatten(1)))
        return self.fc3(F.relu(self.fc2(y) * 0.5 + y))


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"), filter=lambda m, name: name in ("conv", "fc1", "fc2"))
    return model.eval()


@pytest.mark.parametrize("bits", [None, 4])
def test_convert(bits: int | None) -> None:
    model, x = pruned(), torch.randn(3, 4, 5, 5)
    layers = lambda m, name: name in ("conv", "fc1", "fc2")  # noqa: E731
    weights = None if bits is None else quantize_(model, LinearQuantization(bits=bits), filter=layers).weights
    converted = convert(model, Sparse(), x, quantized=weights)
    with torch.inference_mode():
        close(converted(x), model(x))
    report = {record.name: record for record in conversion_report(converted)}
    assert {name: record.decision for name, record in report.items()} == {
        "conv": "sparse",
        "fc1": "sparse",
        "fc2": "sparse",
        "fc3": "dense",
    }
    assert isinstance(converted.get_submodule("fc2"), SparseLinear)
    assert report["fc3"].reason == "a linear layer at density 100.0%"
    again = convert(model, Sparse(), x, quantized=weights)
    again.load_state_dict(converted.state_dict())
    with torch.inference_mode():
        assert torch.equal(again(x), converted(x))


def test_layers_in_a_sequence_are_fused() -> None:
    model = nn.Sequential(linear(16, 8), nn.ReLU(), nn.Dropout(), linear(8, 4))
    converted = convert(model, Sparse(), torch.randn(2, 16))
    assert [r.activation for r in conversion_report(converted)] == ["1", None]
    assert isinstance(converted.get_submodule("1"), nn.Identity)


def test_the_default_is_for_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    room: Any = __import__("sys").modules[convert_function.__module__]
    monkeypatch.setattr(room, "_LARGE_LINEAR", 64 * 64)
    converted = convert(nn.Sequential(linear(64, 64, 0.9), linear(64, 63, 0.9)))
    assert [record.decision for record in conversion_report(converted)] == ["sparse", "dense"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_layers_whose_weights_torch_reads_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), linear(16, 8)).eval()
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"), filter=lambda m, name: isinstance(m, nn.Linear))
    x = torch.randn(2, 5, 16)
    converted = convert(model, Sparse(), x)
    report = {record.name: record.decision for record in conversion_report(converted)}
    assert report == {"0.self_attn.out_proj": "dense", "0.linear1": "dense", "0.linear2": "dense", "1": "sparse"}
    with torch.inference_mode():
        close(converted(x), model(x))


def test_tuning() -> None:
    model, x = pruned(), torch.randn(3, 4, 5, 5)
    specs = {problem.name: problem.spec for problem in problems_of(model, x)}
    assert list(specs) == ["conv", "fc1", "fc2"]
    assert specs["fc1"].x_shape == (1, 200, 1, 3)
    tuned = autotune.tune(model, x, trials=2, progress=False, threads=2)
    converted = convert(model, tuned, x)
    with torch.inference_mode():
        close(converted(x), model(x))
    assert [problem.spec for problem in problems_of(convert(model, Sparse(), x), x)] == list(specs.values())
