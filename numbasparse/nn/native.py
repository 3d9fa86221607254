"""Layouts between the sparse convolutions of a model: what passes from one to the next need not be converted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.nn.fused import FusedConv2d
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.runtime.layouts import Layout

# What computes each value from those at its place (or near it), and so keeps the order in memory.  Exact types.
_MODULES = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Dropout,
    SeparableMaxPool2d,
)
_SUMS_AND_PRODUCTS = (operator.add, operator.iadd, operator.mul, operator.imul, torch.add)
_FUNCTIONS = (*_SUMS_AND_PRODUCTS, torch.relu, F.relu, F.relu6, F.silu, F.leaky_relu)
_METHODS = ("add", "add_", "relu", "relu_")


class Tracer(fx.Tracer):
    """A tracer that does not look into the modules of this package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (SparseConv2d, FusedConv2d, SeparableMaxPool2d)) or super().is_leaf_module(
            m, module_qualified_name
        )


def keep_native(
    model: nn.Module, gives: Mapping[str, Layout], plain: Layout, trace: Callable[[nn.Module], list[fx.Graph]]
) -> None:
    """Let sparse convolutions give what their kernels write, where only others that read it get to see it.

    Parameters
    ----------
    model
        Converted; its sparse convolutions' ``out_layout`` is set.
    gives
        Layout that the kernel of a layer reads and writes, by the layer's name; of those whose kernel is for GPUs.
    plain
        Layout of the rest of the model.
    trace
        Gives the graphs of the model, with `Tracer`; may raise whatever the model's own code raises.
    """
    if all(layout == plain for layout in gives.values()):
        return
    try:
        graphs = trace(model)
    except Exception:
        return  # `convert` has warned; layers then give the layout of their input
    seen = [_seen_by_its_like_only(graph, model, gives) for graph in graphs]
    native = {name for name in gives if all(name in found for found in seen)}
    for name, layout in gives.items():
        module = model.get_submodule(name)
        assert isinstance(module, SparseConv2d)
        # The rest of the model may look at the order, as `Tensor.view` does.
        module.out_layout = layout if name in native else plain


def keeps_order(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node's result has the order in memory of what it is computed from, if all of that has one."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        return type(module) in _MODULES and not (module._forward_hooks or module._forward_pre_hooks)
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )


def _seen_by_its_like_only(graph: fx.Graph, model: nn.Module, gives: Mapping[str, Layout]) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    called: dict[str, bool] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in gives:
            good = all(_ends_in(user, gives[name], modules, gives) for user in node.users)
            called[name] = called.get(name, True) and good
    return {name for name, good in called.items() if good}


def _ends_in(node: fx.Node, layout: Layout, modules: Mapping[str, nn.Module], gives: Mapping[str, Layout]) -> bool:
    """Whether only convolutions that read a layout see the result of a node, or of what keeps its order."""
    if node.op == "call_module" and str(node.target) in gives:
        return gives[str(node.target)] == layout
    return keeps_order(node, modules) and all(_ends_in(user, layout, modules, gives) for user in node.users)
