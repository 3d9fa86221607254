"""Exported programs as modules whose convolutions can be found, tuned and replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten

# Arguments after the tensors, with the operators' defaults.
_CONV_ARGUMENTS = (("stride", [1, 1]), ("padding", [0, 0]), ("dilation", [1, 1]), ("groups", 1))


def module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """A GraphModule of the program in which convolutions, batch norms and ReLUs are modules again.

    Export turns modules into operators with the weights as inputs; tuning and converting look for ``nn.Conv2d``.
    Operators with weights that are computed in the program stay as they are.
    """
    graph_module: Any = program.module()
    makers: dict[Any, Callable[[fx.GraphModule, fx.Node], nn.Module | None]] = {
        aten.conv2d.default: _conv,
        aten.conv2d.padding: _conv,
        aten.batch_norm.default: _batch_norm,
        aten.relu.default: lambda g, node: nn.ReLU(),
        aten.relu_.default: _relu_in_place,
    }
    counts: dict[str, int] = {}
    for node in list(graph_module.graph.nodes):
        maker = makers.get(node.target) if node.op == "call_function" else None
        module = None if maker is None else maker(graph_module, node)
        if module is not None:
            _replace(graph_module, node, module, counts)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    # A new one: torch's refuses eval() and train(), and still holds the weights that moved into modules.
    return fx.GraphModule(graph_module, graph_module.graph)


def _replace(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module, counts: dict[str, int]) -> None:
    kind = type(module).__name__.lower()
    number = counts.get(kind, 0)
    while hasattr(graph_module, name := f"{kind}_{number}"):  # the model may have a module of that name
        number += 1
    counts[kind] = number + 1
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(name, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)


def _tensor(graph_module: fx.GraphModule, argument: Any) -> torch.Tensor | None:
    """The parameter or buffer that an argument reads; None for anything else."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value: Any = graph_module
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def _conv(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    weight = _tensor(graph_module, node.args[1])
    bias_argument = node.args[2] if len(node.args) > 2 else None
    bias = _tensor(graph_module, bias_argument)
    if weight is None or (bias_argument is not None and bias is None):
        return None
    given = dict(zip((name for name, _ in _CONV_ARGUMENTS), node.args[3:], strict=False))
    values: dict[str, Any] = dict(_CONV_ARGUMENTS) | given | dict(node.kwargs)
    pairs = {name: _pair(values[name]) for name in ("stride", "padding", "dilation")}
    groups = int(values["groups"])
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        **pairs,
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    conv.weight = nn.Parameter(weight.detach())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return conv


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return tuple(value) if len(value) == 2 else (value[0], value[0])


def _relu_in_place(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Only where nothing else can see the input change: it is a module's output, and goes nowhere else."""
    source = node.args[0]
    alone = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
    return nn.ReLU() if alone else None


def _batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """aten.batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled) on images, in eval mode."""
    weight, bias, mean, variance = (_tensor(graph_module, a) for a in node.args[1:5])
    image = node.meta.get("val")
    if weight is None or bias is None or mean is None or variance is None or node.args[5]:
        return None
    if image is None or image.dim() != 4:
        return None
    norm = nn.BatchNorm2d(len(weight), eps=float(str(node.args[7])), dtype=weight.dtype)
    norm.weight, norm.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    norm.running_mean, norm.running_var = mean.detach().clone(), variance.detach().clone()
    return norm.eval()
