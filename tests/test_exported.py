"""Exported programs as modules: the same outputs, with convolutions that can be found, tuned and replaced."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from autotune.model import problems_of  # noqa: E402
from numbasparse.nn import SparseConv2d, conversion_report, convert  # noqa: E402
from numbasparse.nn.exported import module_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, when it copies a graph


def conv(c: int, k: int, size: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": 1, **options})


def norm(channels: int, **options: Any) -> nn.BatchNorm2d:
    """Batch norm with statistics and weights that are not the initial ones."""
    module = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
    return module


class Net(nn.Module):
    """Modules by name, and a function of them and x."""

    def __init__(self, forward: Callable[[Any, Any], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._function = forward

    def forward(self, x: Any) -> Any:
        return self._function(self, x)


def residual(m: Any, x: Any) -> Any:
    y = m.relu(m.bn1(m.conv1(x)))
    return m.relu2(m.bn2(m.conv2(y)) + m.shortcut(x))


def in_place_on_a_view(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y[:, :2].relu_()
    return y


def in_place_then_both(m: Any, x: Any) -> Any:
    y = m.conv(x)
    z = F.relu(y, inplace=True)
    return y + 2 * z


def in_place_after_a_view(m: Any, x: Any) -> Any:
    y = m.conv(x)
    view = y.flatten(1)
    y.relu_()
    return view


def result_not_used(m: Any, x: Any) -> Any:
    y = m.conv(x)
    F.relu_(y)
    return y


def nets() -> dict[str, tuple[nn.Module, int]]:
    """Every net with the number of Conv2d that must be found in it."""
    chain = nn.Sequential
    return {
        "bias": (chain(conv(3, 8)), 1),
        "no bias": (chain(conv(3, 8, bias=False)), 1),
        "same": (chain(conv(3, 8, (3, 5), padding="same", dilation=(2, 1))), 1),
        "valid": (chain(conv(3, 8, padding="valid")), 1),
        "stride": (chain(conv(3, 8, (3, 1), stride=(2, 1), padding=(1, 0))), 1),
        "dilation": (chain(conv(3, 8, dilation=(1, 2), padding=(0, 2))), 1),
        "groups": (chain(conv(3, 6, groups=3), conv(6, 4, 1, groups=2, padding=0)), 2),
        "circular": (chain(conv(3, 8, padding_mode="circular")), 1),
        "batch norm": (chain(conv(3, 8), norm(8, eps=0.1), conv(8, 4)), 2),
        "batch norm without weight": (chain(conv(3, 8), norm(8, affine=False)), 1),
        "batch norm without statistics": (chain(conv(3, 8), norm(8, track_running_stats=False)), 1),
        "relu": (chain(conv(3, 8), nn.ReLU(), conv(8, 4), norm(4), nn.ReLU()), 2),
        "relu in place": (chain(conv(3, 8), nn.ReLU(True), conv(8, 4), norm(4), nn.ReLU(True)), 2),
        "relu in place, input used": (Net(in_place_then_both, conv=conv(3, 8)), 1),
        "relu in place on a view": (Net(in_place_on_a_view, conv=conv(3, 8)), 1),
        "relu in place after a view": (Net(in_place_after_a_view, conv=conv(3, 8)), 1),
        "relu in place, result not used": (Net(result_not_used, conv=conv(3, 8)), 1),
        "residual": (
            Net(
                residual,
                conv1=conv(3, 8, bias=False),
                bn1=norm(8),
                relu=nn.ReLU(),
                conv2=conv(8, 8, bias=False),
                bn2=norm(8),
                relu2=nn.ReLU(True),
                shortcut=chain(conv(3, 8, 1, padding=0), norm(8)),
            ),
            3,
        ),
        "called twice": (Net(lambda m, x: m.conv(m.conv(x)), conv=conv(3, 3)), 2),
        "names that clash": (Net(lambda m, x: m.conv2d_0(m.conv2d_1(x)), conv2d_0=conv(3, 4), conv2d_1=conv(3, 3)), 2),
        "keywords": (Net(lambda m, x: F.conv2d(input=x, weight=m.a.weight, bias=m.a.bias, padding=1), a=conv(3, 8)), 1),
        "weight computed": (
            Net(lambda m, x: m.b(F.conv2d(x, m.a.weight * 2, m.a.bias)), a=conv(3, 8), b=conv(8, 4)),
            1,
        ),
        "bias computed": (Net(lambda m, x: m.b(F.conv2d(x, m.a.weight, m.a.bias + 1)), a=conv(3, 8), b=conv(8, 4)), 1),
        "head": (chain(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), 1),
        "two results": (Net(lambda m, x: {"x": x + 1, "y": m.a(x)}, a=conv(3, 8)), 1),
    }


NAMES = list(nets())


def sparse_net(name: str) -> tuple[nn.Module, int]:
    """The net in eval mode, with most of its convolutions' weights zero."""
    torch.manual_seed(0)
    model, count = nets()[name]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) > 0.8)
    return model.eval(), count


def image(n: int = 2) -> Any:
    return torch.randn(n, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def export(model: nn.Module, x: Any, **options: Any) -> Any:
    return torch.export.export(model, (x,), **options)


def check_equal(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def convs_of(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_layers(name: str) -> None:
    model, count = sparse_net(name)
    x = image()
    module = module_of(export(model, x))
    assert len(convs_of(module)) == count
    with torch.inference_mode():
        expected = model(x.clone())
        check_equal(module(x.clone()), expected, 0.0)

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that it cannot be traced, above all
            converted = convert(module, None, x)
        check_equal(converted(x.clone()), expected)
        check_equal(module(x.clone()), expected, 0.0)  # as it was
    assert len(conversion_report(converted)) == count
    problems = problems_of(module, x)
    assert {problem.name for problem in problems} == set(convs_of(module))
    for problem in problems:
        assert problem.weight.sparsity == pytest.approx(
            float((convs_of(module)[problem.name].weight == 0).double().mean())
        )


def test_layers_keep_their_geometry() -> None:
    module = module_of(export(sparse_net("stride")[0], image()))
    (layer,) = convs_of(module).values()
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups) == (
        (3, 1),
        (2, 1),
        (1, 0),
        (1, 1),
        1,
    )
    module = module_of(export(sparse_net("same")[0], image()))
    (layer,) = convs_of(module).values()
    assert (layer.padding, layer.dilation) == ("same", (2, 1))


def test_batch_norm_and_relu_are_folded() -> None:
    x = image()
    converted = convert(module_of(export(sparse_net("relu in place")[0], x)), None, x)
    first, second = conversion_report(converted)
    assert (first.decision, first.batch_norm, first.activation) == ("sparse", None, "relu_0")
    assert (second.decision, second.batch_norm, second.activation) == ("sparse", "batchnorm2d_0", "relu_1")
    assert sum(isinstance(m, SparseConv2d) for m in converted.modules()) == 2


def test_a_computed_weight_stays_an_operator() -> None:
    module = module_of(export(sparse_net("weight computed")[0], image()))
    operators = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.conv2d.default in operators
    assert [layer.in_channels for layer in convs_of(module).values()] == [8]


def test_modes_copies_and_state() -> None:
    model, _ = sparse_net("residual")
    module = module_of(export(model, image()))
    twin = copy.deepcopy(module)
    module.train()
    assert all(m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    module.eval()
    assert not any(m.training for m in module.modules())

    values = sum(p.numel() for p in module.parameters())
    assert values == sum(p.numel() for p in model.parameters()), "weights are held once"
    twin.load_state_dict(module.state_dict())
    with torch.inference_mode():
        check_equal(twin(image()), model(image()), 0.0)


def test_the_program_is_left_as_it_was() -> None:
    model, _ = sparse_net("relu in place")
    program = export(model, image())
    module_of(program)
    with torch.inference_mode():
        check_equal(program.module()(image()), model(image()), 0.0)


def test_a_saved_program_with_any_batch_size() -> None:
    model, count = sparse_net("residual")
    file = io.BytesIO()
    torch.export.save(export(model, image(), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)), file)
    file.seek(0)
    module = module_of(torch.export.load(file))
    converted = convert(module, None, image())
    assert [layer.decision for layer in conversion_report(converted)] == ["sparse"] * count
    with torch.inference_mode():
        for n in (2, 5):
            check_equal(module(image(n)), model(image(n)), 0.0)
            check_equal(converted(image(n)), model(image(n)))


def test_a_program_keeps_its_guards() -> None:
    module = module_of(export(sparse_net("bias")[0], image()))
    with pytest.raises((AssertionError, RuntimeError), match=r"size\(\)\[0\]|shape\[0\]"):
        module(image(3))


def test_a_program_in_train_mode_keeps_its_batch_norm() -> None:
    model, _ = sparse_net("batch norm")
    module = module_of(export(model.train(), image()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert len(convs_of(module)) == 2


def test_tune() -> None:
    pytest.importorskip("optuna")
    from autotune import tune

    x = image()
    model, count = sparse_net("residual")
    module = module_of(export(model, x))
    tuned = tune(module, x, trials=2, progress=False)
    assert sorted(name for layer in tuned.layers for name in layer.names) == sorted(convs_of(module))
    assert len(convs_of(module)) == count
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "every layer stays dense")
        converted = convert(module, tuned, x)
    with torch.inference_mode():
        check_equal(converted(x), model(x))
