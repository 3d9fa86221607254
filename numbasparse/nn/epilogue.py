"""What follows a convolution in its module's ``forward``, computed where the convolution writes its result.

`convert` folds modules by replacing them.  Here the calls between modules go: a product with a number, a sum with a
residual, and activations that are functions or modules that several layers share.  The module whose ``forward`` makes
those calls becomes an ``fx.GraphModule`` with the same children, without them.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.activations import USUAL_SLOPE, Activation, leaky_relu
from numbasparse.nn.fused import FusedConv2d
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.nn.rewritten import with_forward

aten = torch.ops.aten

# Exact types: a subclass may compute something else.
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}

_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
}
_LEAKY = (F.leaky_relu, aten.leaky_relu.default, aten.leaky_relu_.default)
_METHODS = {"relu": "relu", "relu_": "relu"}

_SUMS: tuple[Any, ...] = (operator.add, torch.add, aten.add.Tensor, "add")
_SUMS_IN_PLACE: tuple[Any, ...] = (operator.iadd, aten.add_.Tensor, "add_")
_PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, aten.mul.Tensor, aten.mul_.Tensor, "mul", "mul_")

# What changes none of its inputs in eval mode.
_PURE = (
    nn.Sequential,
    nn.Identity,
    nn.Conv2d,
    SparseConv2d,
    FusedConv2d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    SeparableMaxPool2d,
    nn.AvgPool2d,
)


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, and a sparse convolution can compute; None for any other module."""
    if type(module) is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    return _ACTIVATIONS.get(type(module))


def _leaky(slope: Any) -> Activation | None:
    try:
        return leaky_relu(slope)
    except (TypeError, ValueError):
        return None  # a slope that is negative, or known only when the model runs


@dataclass(frozen=True)
class Fused:
    """What a sparse convolution now computes besides: an activation (the module or function that did), a sum, a
    product with a number."""

    activation: str | None
    residual: bool
    scale: float | None = None


@dataclass(frozen=True)
class _Match:
    """A convolution in a graph, and the nodes after it that it can compute.

    ``after`` are those nodes in their order, each the only user of the one before; ``name`` is the activation's as
    `SparseConv2d` knows it, ``source`` what computed it.  ``scale`` goes into the weight and the bias.
    """

    conv: fx.Node
    after: tuple[fx.Node, ...]
    scale: float | None
    add: fx.Node | None
    residual: fx.Node | None
    name: str | None
    source: str | None


class _Shallow(fx.Tracer):
    """A tracer of one module's own ``forward``, which looks into none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fuse_epilogues(
    model: nn.Module, once: set[str], then: Callable[[fx.Graph, Mapping[str, nn.Module]], bool]
) -> tuple[nn.Module, dict[str, Fused]]:
    """Let sparse convolutions, and dense ones that can, compute the sums and activations after them.

    Parameters
    ----------
    model
        Converted, in eval mode; left as it is.
    once
        Names of convolutions that are called exactly once when the model runs.
    then
        Gets every graph afterwards, with the modules that it calls, and tells whether it changed it.

    Returns
    -------
    model
        A copy that shares the tensors; the same object if there was nothing to do.  Its class is the model's, or one
        derived from it with another ``forward``.
    fused
        What each convolution took over, by its name.
    """
    made = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    found: dict[str, Fused] = {}
    changed = False
    owners = Counter(id(m) for _, m in made.named_modules(remove_duplicate=False))
    for name, owner in list(made.named_modules()):
        graph = _own_graph(owner) if owners[id(owner)] == 1 else None
        if graph is None:
            continue
        prefix = f"{name}." if name else ""
        here = dict(_fuse_graph(graph, owner, once, prefix))
        if then(graph, dict(owner.named_modules(remove_duplicate=False))) or here:
            keeps_class = not name and not isinstance(owner, fx.GraphModule)
            made = _put(made, name, with_forward(owner, graph) if keeps_class else _graph_module(owner, graph))
            found.update(here)
            changed = True
    return (made, found) if changed else (model, {})


def calls_of(graph: fx.Graph) -> Counter[str]:
    """How often a graph calls each module."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _own_graph(owner: nn.Module) -> fx.Graph | None:
    """The graph of a module's own ``forward``, if a graph can take its place."""
    if isinstance(owner, fx.GraphModule):
        return copy.deepcopy(owner.graph)
    if type(owner).__module__.startswith("torch.nn.") or _has_hooks(owner):
        return None
    if not any(isinstance(child, (SparseConv2d, FusedConv2d)) for child in owner.children()):
        return None
    # To a trace an argument is always a tensor: with more than one, some may be other things when the model runs.
    parameters = list(inspect.signature(owner.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    shadow = copy.deepcopy(owner, {id(t): t for t in [*owner.parameters(), *owner.buffers()]})
    before = _state(shadow)
    try:
        graph = _Shallow().trace(shadow)
    except Exception:  # whatever the model's own code raises when it meets a proxy: then it stays
        return None
    for node in graph.nodes:
        node.type = None  # an annotation that is text could not be pickled
    # A forward that keeps something would not any more; constants would not follow the model to another device.
    kept = _state(shadow) != before or any(node.op == "get_attr" for node in graph.nodes)
    return None if kept else graph


def _state(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What an assignment or an appended item in ``forward`` changes."""
    return {k: (id(v), len(v) if isinstance(v, (list, dict, set)) else 0) for k, v in vars(module).items()}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _graph_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module with all that the owner has."""
    made = fx.GraphModule(owner, graph, class_name=type(owner).__name__)
    made._modules = dict(owner._modules)
    made._parameters = dict(owner._parameters)
    made._buffers = dict(owner._buffers)
    for name, value in vars(owner).items():
        if name not in vars(made):
            object.__setattr__(made, name, value)
    made.training = owner.training
    return made


def _put(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, key = name.rpartition(".")
    root.get_submodule(parent)._modules[key] = module
    return root


# ---- one graph ----------------------------------------------------------------------------------------------


def _fuse_graph(graph: fx.Graph, owner: nn.Module, once: set[str], prefix: str) -> Iterator[tuple[str, Fused]]:
    """Fuse in a graph and in the convolutions that it calls; yields what each took over.

    ``prefix`` is what stands before the owner's names in the whole model.
    """
    modules = dict(owner.named_modules(remove_duplicate=False))
    calls = calls_of(graph)
    for node in list(graph.nodes):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        name = f"{prefix}{node.target}"
        if not isinstance(conv, (SparseConv2d, FusedConv2d)) or name not in once or calls[str(node.target)] != 1:
            continue
        match = _match(node, conv, modules)
        if match is None:
            continue
        conv.activation = match.name or "none"
        if match.scale is not None:
            assert isinstance(conv, SparseConv2d)
            conv.scale(match.scale)
        source = f"{prefix}{match.source}" if match.after[-1].op == "call_module" else match.source
        _rewrite(graph, match)
        yield name, Fused(source if match.name else None, match.add is not None, match.scale)
    graph.lint()


def _match(node: fx.Node, conv: SparseConv2d | FusedConv2d, modules: Mapping[str, nn.Module]) -> _Match | None:
    if conv.activation != "none" or _has_hooks(conv) or len(node.args) != 1 or node.kwargs:
        return None
    chain = [node, *_identities_after(node, modules)]
    product, scale = _product_after(chain[-1])
    if product is not None:
        chain += [product, *_identities_after(product, modules)]
    add, residual = _sum_after(chain[-1], modules, node)
    if add is not None:
        chain += [add, *_identities_after(add, modules)]
    name, source, following = _activation_after(chain[-1], modules)
    if add is None and following is None and product is None:
        return None
    # cuDNN knows sums with an activation only.
    if isinstance(conv, FusedConv2d) and (product is not None or name != "relu"):
        return None
    after = chain[1:] if following is None else [*chain[1:], following]
    return _Match(node, tuple(after), scale, add, residual, name, source)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _identities_after(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The ``nn.Identity`` one after another that take a node's value, while nothing else does."""
    found: list[fx.Node] = []
    user = _only_user(node)
    while user is not None and user.op == "call_module" and len(user.args) == 1 and not user.kwargs:
        module = modules[str(user.target)]
        if type(module) is not nn.Identity or _has_hooks(module):
            break
        found.append(user)
        user = _only_user(user)
    return found


def _product_after(value: fx.Node) -> tuple[fx.Node, float] | tuple[None, None]:
    """The product of a convolution's result with a number, and the number."""
    user = _only_user(value)
    if user is None or user.target not in _PRODUCTS or len(user.args) != 2 or user.kwargs:
        return None, None
    left, right = user.args
    number = right if left is value else left
    # Not a bool, and nothing that becomes infinite or 0 in float32 and takes NaN along.
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 1e-6 <= abs(number) <= 1e6:
        return None, None
    return user, float(number)


def _sum_after(
    value: fx.Node, modules: Mapping[str, nn.Module], conv: fx.Node
) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The sum that takes a convolution's result, and what it is added to."""
    add = _only_user(value)
    if add is None or add.op not in ("call_function", "call_method") or len(add.args) != 2 or add.kwargs:
        return None, None
    in_place = add.target in _SUMS_IN_PLACE
    if not in_place and add.target not in _SUMS:
        return None, None
    left, right = add.args
    other = right if left is value else left
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None, None
    # In place, the sum changes its left side, which others may see if it is not the convolution's result.
    if in_place and left is not value:
        return None, None
    # The convolution will run where the sum is: nothing between may change its input.
    if not all(changes_nothing(node, modules) for node in _between(conv, add)):
        return None, None
    assert isinstance(other, fx.Node)
    return add, other


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = []
    node = first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def changes_nothing(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node leaves its inputs as they are."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_function":
        return node.target in _SUMS or node.target is operator.mul
    if node.op != "call_module":
        return False
    return all(type(m) in _PURE and not _has_hooks(m) for m in modules[str(node.target)].modules())


def _activation_after(
    value: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[str, str, fx.Node] | tuple[None, None, None]:
    """Name of the activation that takes a value and nothing else does; what computes it; its node."""
    user = _only_user(value)
    if user is None:
        return None, None, None
    name: str | None = None
    if user.op == "call_function" and user.target in _LEAKY:
        name = _leaky_call(value, user)
    elif len(user.args) != 1 or set(user.kwargs) - {"inplace"}:
        return None, None, None
    elif user.op == "call_module":
        module = modules[str(user.target)]
        name = None if _has_hooks(module) else activation_of(module)
    elif user.op == "call_function":
        name = _FUNCTIONS.get(user.target)
    elif user.op == "call_method":
        name = _METHODS.get(str(user.target))
    if name is None:
        return None, None, None
    return name, str(user.target) if user.op == "call_module" else name, user


def _leaky_call(value: fx.Node, call: fx.Node) -> Activation | None:
    """The activation of a call ``F.leaky_relu(value, slope, inplace)``; None if it is one of something else."""
    if not call.args or call.args[0] is not value:
        return None
    slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", USUAL_SLOPE)
    return _leaky(slope)


def _rewrite(graph: fx.Graph, match: _Match) -> None:
    """Take the nodes after a convolution out; with a sum, the convolution is called where that was."""
    result, erased = match.conv, list(match.after)
    if match.add is not None:
        with graph.inserting_before(match.add):
            result = graph.call_module(str(match.conv.target), (match.conv.args[0], match.residual))
        erased.insert(0, match.conv)
    result.meta = dict(match.after[-1].meta)
    match.after[-1].replace_all_uses_with(result)
    for node in reversed(erased):
        graph.erase_node(node)
