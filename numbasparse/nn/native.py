"""Layouts between the sparse convolutions of a model: what passes from one to the next need not be converted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.runtime.layouts import Layout

# What computes each value from those at its place, and so keeps the order in memory.  Exact types, as in `convert`.
_MODULES = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.Sigmoid, nn.Dropout)
_SUMS_AND_PRODUCTS = (operator.add, operator.iadd, operator.mul, operator.imul, torch.add)
_FUNCTIONS = (*_SUMS_AND_PRODUCTS, torch.relu, F.relu, F.relu6, F.silu, F.leaky_relu)
_METHODS = ("add", "add_", "relu", "relu_")


class Tracer(fx.Tracer):
    """A tracer that does not look into the modules of this package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (SparseConv2d, SeparableMaxPool2d)) or super().is_leaf_module(m, module_qualified_name)


def keep_native(model: nn.Module, gives: Mapping[str, Layout], trace: Callable[[nn.Module], list[fx.Graph]]) -> None:
    """Let sparse convolutions give what their kernels write, where only other sparse convolutions get to see it.

    Parameters
    ----------
    model
        Converted; its sparse convolutions' ``out_layout`` is set.
    gives
        Layout that the kernel of a layer writes, by the layer's name; of those whose kernel is for GPUs.
    trace
        Gives the graphs of the model, with `Tracer`; may raise whatever the model's own code raises.
    """
    if not any(layout != "NCHW" for layout in gives.values()):
        return
    try:
        graphs = trace(model)
    except Exception:
        return  # `convert` has warned; layers then give the layout of their input
    seen = [_seen_by_sparse_only(graph, model) for graph in graphs]
    native = {name for name in gives if all(name in found for found in seen)}
    for name, layout in gives.items():
        module = model.get_submodule(name)
        assert isinstance(module, SparseConv2d)
        # The rest of the model may look at the order, as `Tensor.view` does.
        module.out_layout = layout if name in native else "NCHW"


def _seen_by_sparse_only(graph: fx.Graph, model: nn.Module) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    called: dict[str, bool] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], SparseConv2d):
            good = all(_ends_in_sparse(user, modules) for user in node.users)
            called[str(node.target)] = called.get(str(node.target), True) and good
    return {name for name, good in called.items() if good}


def _ends_in_sparse(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if isinstance(module, SparseConv2d):
            return True
        keeps = type(module) in _MODULES and not (module._forward_hooks or module._forward_pre_hooks)
    else:
        keeps = (node.op == "call_function" and node.target in _FUNCTIONS) or (
            node.op == "call_method" and node.target in _METHODS
        )
    return keeps and all(_ends_in_sparse(user, modules) for user in node.users)
