"""Which layers of a model must agree on an order of channels, by torch.fx.

A *space* is a set of channels that several tensors of the model share: the outputs of a convolution, what normalization
and activations make of them, both terms of a residual sum. Their order is free if everything that writes, passes on and
reads them is known and can follow.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from numbasparse.pruning.layers import MASK

_SAME = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)
"""Modules that treat every channel alike."""

_SAME_FUNCTIONS = {
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardtanh,
    F.hardswish,
    F.dropout,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.interpolate,
}
_SAME_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone"}
_JOINING = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub, torch.mul}
"""Functions of two tensors, value by value."""
_JOINING_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_"}


@dataclass(eq=False)
class Space:
    """Channels that have one order.

    Attributes
    ----------
    writers
        Layers whose output channels they are, by name.
    followers
        Modules with a value for each of them: normalization, PReLU, depthwise convolutions.
    readers
        Layers whose input channels they are, by name; a linear layer may have several inputs for each.
    reason
        Why their order cannot change; empty if it can.
    """

    writers: dict[str, nn.Module] = field(default_factory=dict)
    followers: list[nn.Module] = field(default_factory=list)
    readers: dict[str, nn.Module] = field(default_factory=dict)
    reason: str = ""

    @property
    def channels(self) -> int | None:
        """How many there are; None if nothing known writes them."""
        for writer in self.writers.values():
            return int(writer.out_channels)  # type: ignore[arg-type]
        return None

    def permute(self, order: Tensor) -> None:
        """Give all layers the channels in another order: channel ``i`` now is what was ``order[i]``."""
        with torch.no_grad():
            for module in (*self.writers.values(), *self.followers):
                _move(module, order)
            for module in self.readers.values():
                _move_inputs(module, order)


@dataclass(frozen=True)
class _Value:
    """A tensor of the traced model: its channels, and whether each has become several neighbouring features."""

    space: Space
    flat: bool = False


class ChannelSpaces:
    """The spaces of a model.

    Attributes
    ----------
    failure : str
        Why the model could not be traced; then there are no spaces.
    """

    def __init__(self, model: nn.Module) -> None:
        self.failure = ""
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._shared = _shared_parameters(model)
        self._calls: dict[str, int] = {}
        self._written: dict[str, Space] = {}
        self._read: dict[str, Space] = {}
        # Spaces that were found to be one with another.
        self._joined: dict[Space, Space] = {}
        self._values: dict[fx.Node, _Value | None] = {}
        try:
            graph = fx.symbolic_trace(model).graph
        except Exception as error:  # whatever a model's own code raises on symbolic values
            self.failure = f"torch.fx cannot trace the model ({' '.join(str(error).split())[:120]})"
            return
        for node in graph.nodes:
            if node.op == "call_module":
                self._calls[str(node.target)] = self._calls.get(str(node.target), 0) + 1
        for node in graph.nodes:
            self._values[node] = self._value(node)
            if not node.users and node.op != "output":
                self._pin(node, "nothing reads its output")

    def written_by(self, name: str) -> Space:
        """The space of a layer's output channels."""
        return self._space(self._written, name)

    def read_by(self, name: str) -> Space:
        """The space of a layer's input channels."""
        return self._space(self._read, name)

    def _space(self, spaces: Mapping[str, Space], name: str) -> Space:
        if self.failure:
            return Space(reason=self.failure)
        calls = self._calls.get(name, 0)
        if calls != 1:
            return Space(reason=f"{name!r} is called {calls} times")
        return self._root(spaces[name])

    # ---- values of nodes ----------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> _Value | None:
        """What a node makes; None if that is no tensor of known channels."""
        given = [value for source in node.all_input_nodes if (value := self._values[source]) is not None]
        if node.op == "output":
            self._pin(node, "its output is the model's output")
        elif node.op == "call_module" and given:
            return self._module(node, given[0])
        elif node.op in ("call_function", "call_method") and given:
            return self._operation(node, given)
        elif node.op == "placeholder":
            return _Value(Space(reason="it is the model's input"))
        return None

    def _operation(self, node: fx.Node, given: list[_Value]) -> _Value | None:
        known = self._root(given[0].space)
        if _is(node, _SAME_FUNCTIONS, _SAME_METHODS) and len(node.all_input_nodes) == 1:
            return given[0]
        if _flattens(node, self._modules) and not given[0].flat:
            return _Value(known, flat=True)
        if _is(node, _JOINING, _JOINING_METHODS) and len(given) == len(node.all_input_nodes):
            return self._join(node, given)
        if node.target in (getattr, "size", "dim"):
            return None
        self._pin(node, f"its output goes through {node.name!r}, which is not known to treat channels alike")
        return _Value(Space(reason=f"it comes from {node.name!r}"))

    def _join(self, node: fx.Node, given: list[_Value]) -> _Value | None:
        """One space of all terms of a sum or product, which are known to have as many channels."""
        first = given[0]
        for other in given[1:]:
            own, its = self._root(first.space), self._root(other.space)
            if own is its:
                continue
            if own.channels is None or own.channels != its.channels or first.flat != other.flat:
                self._pin(node, f"its output is joined with another in {node.name!r} that has other channels")
                return _Value(Space(reason=f"it comes from {node.name!r}, which joins different channels"))
            self._joined[its] = own
            own.writers |= its.writers
            own.followers += its.followers
            own.readers |= its.readers
            own.reason = own.reason or its.reason
        return first

    def _module(self, node: fx.Node, given: _Value) -> _Value | None:
        name = str(node.target)
        module, space = self._modules[name], self._root(given.space)
        if isinstance(module, _SAME) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            return given
        if _flattens(node, self._modules) and not given.flat:
            return _Value(space, flat=True)
        reason = self._alone(name)
        if isinstance(module, (nn.BatchNorm2d, nn.PReLU)) and not given.flat:
            space.followers.append(module)
            space.reason = space.reason or reason
            return given
        if isinstance(module, nn.Conv2d):
            self._read[name] = space
            if module.groups == module.in_channels == module.out_channels and module.groups > 1:
                space.followers.append(module)
                space.reason = space.reason or reason
                self._written[name] = space
                return given
            made = self._written[name] = Space({name: module}, reason=reason)
            if module.groups > 1:
                reason = reason or f"its output goes into {name!r} (Conv2d), which cannot follow"
            space.readers[name] = module
            space.reason = space.reason or reason
            return _Value(made)
        if isinstance(module, nn.Linear):
            self._read[name] = space
            channels = space.channels
            if not given.flat or channels is None or module.in_features % channels:
                reason = reason or f"its output goes into {name!r} (Linear), which cannot follow"
            space.readers[name] = module
            space.reason = space.reason or reason
            made = self._written[name] = Space(reason=f"{name!r} is a Linear, not an nn.Conv2d")
            return _Value(made, flat=True)
        space.reason = space.reason or f"its output goes into {name!r} ({type(module).__name__}), which cannot follow"
        return _Value(Space(reason=f"it comes from {name!r} ({type(module).__name__})"))

    # ---- small things -------------------------------------------------------------------------------------------

    def _root(self, space: Space) -> Space:
        while space in self._joined:
            space = self._joined[space]
        return space

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Keep the order of all channels that a node has to do with."""
        for other in (*node.all_input_nodes, node):
            value = self._values.get(other)
            if value is not None:
                space = self._root(value.space)
                space.reason = space.reason or reason

    def _alone(self, name: str) -> str:
        """Why a module cannot change for one of its uses; empty if it has one only."""
        if self._calls[name] != 1:
            return f"{name!r} is called {self._calls[name]} times"
        for parameter in self._modules[name].parameters(recurse=False):
            if id(parameter) in self._shared:
                return f"{name!r} shares a parameter with another module"
        return ""


def _is(node: fx.Node, functions: Iterable[Any], methods: Iterable[str]) -> bool:
    return node.target in (functions if node.op == "call_function" else methods)


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _flattens(user: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a node turns (N, C, H, W) into (N, C * H * W), or (N, C) by a mean."""
    if user.op == "call_module":
        module = modules[str(user.target)]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    is_flatten = user.target is torch.flatten if user.op == "call_function" else user.target == "flatten"
    arguments: tuple[Any, ...] = (*user.args[1:], *(v for k, v in user.kwargs.items() if k == "start_dim"))
    if is_flatten:
        return arguments == (1,)
    is_mean = user.target is torch.mean if user.op == "call_function" else user.target == "mean"
    dims = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
    kept = user.kwargs.get("keepdim", user.args[2] if len(user.args) > 2 else False)
    return is_mean and isinstance(dims, (tuple, list)) and set(dims) in ({2, 3}, {-1, -2}) and not kept


def _move(module: nn.Module, order: Tensor) -> None:
    """Move every parameter and buffer that has one entry per channel."""
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.ndim and value.shape[0] == len(order):
            _take(value, order, 0)


def _move_inputs(module: nn.Module, order: Tensor) -> None:
    """Move the input channels of a layer's weight, and of its mask."""
    weight = module.get_parameter("weight")
    if isinstance(module, nn.Linear):
        # (features, C, H * W): flattening keeps a channel's positions together.
        order = torch.arange(weight.shape[1]).view(len(order), -1)[order].flatten()
    _take(weight, order, 1)
    mask = dict(module.named_buffers(recurse=False)).get(MASK)
    if mask is not None:
        _take(mask, order, 1)


def _take(value: Tensor, order: Tensor, dim: int) -> None:
    value.copy_(value.index_select(dim, order.to(value.device)))
