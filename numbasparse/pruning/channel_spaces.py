"""Which layers of a model must agree on an order of channels, by torch.fx.

A *space* is a set of channels that several tensors of the model share: the outputs of a convolution, what normalization
and activations make of them, both terms of a residual sum. Their order is free if everything that writes, passes on and
reads them is known and can follow. A concatenation has several spaces, one behind another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


@dataclass(frozen=True)
class Use:
    """Where a module has a space's channels: from ``offset`` on, ``each`` values for each of them."""

    module: nn.Module
    offset: int = 0
    each: int = 1


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
        Layers among whose input channels they are; a linear layer may have several inputs for each.
    reason
        Why their order cannot change; empty if it can.
    """

    writers: dict[str, nn.Module] = field(default_factory=dict)
    followers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
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
            for use in (*(Use(writer) for writer in self.writers.values()), *self.followers):
                _move(use, order)
            for use in self.readers:
                _move_inputs(use, order)

    def pin(self, reason: str) -> None:
        """Keep the order, for the first reason."""
        self.reason = self.reason or reason


@dataclass(frozen=True)
class _Value:
    """A tensor of the traced model: its channels, and whether each has become several neighbouring features."""

    spaces: tuple[Space, ...]
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
        self._written: dict[str, tuple[Space, ...]] = {}
        self._read: dict[str, tuple[Space, ...]] = {}
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
        found = self._known(self._written, name)
        return found[0] if len(found) == 1 else Space(reason=f"{name!r} writes channels of several layers")

    def read_by(self, name: str) -> list[tuple[Space, int]]:
        """The spaces of a layer's input channels, and where each begins."""
        found = self._known(self._read, name)
        return list(zip(found, _offsets(found), strict=True))

    def _known(self, spaces: Mapping[str, tuple[Space, ...]], name: str) -> tuple[Space, ...]:
        if self.failure:
            return (Space(reason=self.failure),)
        calls = self._calls.get(name, 0)
        if calls != 1:
            return (Space(reason=f"{name!r} is called {calls} times"),)
        return self._roots(spaces[name])

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
            return _pinned("it is the model's input")
        return None

    def _operation(self, node: fx.Node, given: list[_Value]) -> _Value | None:
        if _is(node, _SAME_FUNCTIONS, _SAME_METHODS) and len(node.all_input_nodes) == 1:
            return given[0]
        if _flattens(node, self._modules) and not given[0].flat:
            return _Value(given[0].spaces, flat=True)
        if node.target in _CONCATENATIONS and (made := self._concatenated(node)) is not None:
            return made
        if _is(node, _JOINING, _JOINING_METHODS) and len(given) == len(node.all_input_nodes):
            return self._join(node, given)
        if node.target in (getattr, "size", "dim"):
            return None
        self._pin(node, f"its output goes through {node.name!r}, which is not known to treat channels alike")
        return _pinned(f"it comes from {node.name!r}")

    def _concatenated(self, node: fx.Node) -> _Value | None:
        """All channels, one behind another; None if it is another dimension, or their numbers are not known."""
        sources, dim = node.args[0] if node.args else (), node.kwargs.get("dim", 0)
        if len(node.args) > 1:
            dim = node.args[1]
        if dim not in (1, -3) or not isinstance(sources, (list, tuple)):
            return None
        values = [self._values.get(source) for source in sources if isinstance(source, fx.Node)]
        known = [value for value in values if value is not None and not value.flat]
        spaces = self._roots([space for value in known for space in value.spaces])
        if len(known) < len(sources) or any(space.channels is None for space in spaces):
            return None
        return _Value(spaces)

    def _join(self, node: fx.Node, given: list[_Value]) -> _Value | None:
        """One space of all terms of a sum or product, which are known to have as many channels."""
        first = given[0]
        for other in given[1:]:
            if self._roots(first.spaces) == self._roots(other.spaces) and first.flat == other.flat:
                continue
            if first.flat != other.flat or not self._alike(first.spaces, other.spaces):
                self._pin(node, f"its output is joined with another in {node.name!r} that has other channels")
                return _pinned(f"it comes from {node.name!r}, which joins different channels")
            for own, its in zip(first.spaces, other.spaces, strict=True):
                self._unite(own, its)
        return first

    def _alike(self, spaces: tuple[Space, ...], others: tuple[Space, ...]) -> bool:
        """Whether both are known to have as many channels, space by space."""
        own, its = ([space.channels for space in self._roots(some)] for some in (spaces, others))
        return own == its and None not in own

    def _unite(self, own: Space, its: Space) -> None:
        own, its = self._root(own), self._root(its)
        if own is not its:
            self._joined[its] = own
            own.writers |= its.writers
            own.followers += its.followers
            own.readers += its.readers
            own.pin(its.reason)

    def _module(self, node: fx.Node, given: _Value) -> _Value | None:
        name = str(node.target)
        module, spaces = self._modules[name], self._roots(given.spaces)
        if isinstance(module, _SAME) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            return given
        if _flattens(node, self._modules) and not given.flat:
            return _Value(spaces, flat=True)
        if isinstance(module, (nn.BatchNorm2d, nn.PReLU)) and not given.flat:
            self._follow(name, spaces)
            return given
        if isinstance(module, nn.Conv2d):
            self._read[name] = spaces
            if module.groups == module.in_channels == module.out_channels and module.groups > 1:
                self._follow(name, spaces)
                self._written[name] = spaces
                return given
            self._note_reader(name, spaces, 1, "" if module.groups == 1 else _cannot_follow(name, module))
            self._written[name] = made = (Space({name: module}, reason=self._alone(name)),)
            return _Value(made)
        if isinstance(module, nn.Linear):
            self._read[name] = spaces
            channels = [space.channels for space in spaces]
            total = 0 if None in channels else sum(count or 0 for count in channels)
            fits = given.flat and total > 0 and module.in_features % total == 0
            each = module.in_features // total if fits else 1
            self._note_reader(name, spaces, each, "" if fits else _cannot_follow(name, module))
            self._written[name] = made = (Space(reason=f"{name!r} is a Linear, not an nn.Conv2d"),)
            return _Value(made, flat=True)
        for space in spaces:
            space.pin(_cannot_follow(name, module))
        return _pinned(f"it comes from {name!r} ({type(module).__name__})")

    def _follow(self, name: str, spaces: tuple[Space, ...]) -> None:
        for space, offset in zip(spaces, _offsets(spaces), strict=True):
            space.followers.append(Use(self._modules[name], offset))
            space.pin(self._alone(name))

    def _note_reader(self, name: str, spaces: tuple[Space, ...], each: int, reason: str) -> None:
        for space, offset in zip(spaces, _offsets(spaces), strict=True):
            space.readers.append(Use(self._modules[name], offset, each))
            space.pin(self._alone(name) or reason)

    # ---- small things -------------------------------------------------------------------------------------------

    def _root(self, space: Space) -> Space:
        while space in self._joined:
            space = self._joined[space]
        return space

    def _roots(self, spaces: Sequence[Space]) -> tuple[Space, ...]:
        return tuple(self._root(space) for space in spaces)

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Keep the order of all channels that a node has to do with."""
        for other in (*node.all_input_nodes, node):
            value = self._values.get(other)
            for space in () if value is None else self._roots(value.spaces):
                space.pin(reason)

    def _alone(self, name: str) -> str:
        """Why a module cannot change for one of its uses; empty if it has one only."""
        if self._calls[name] != 1:
            return f"{name!r} is called {self._calls[name]} times"
        for parameter in self._modules[name].parameters(recurse=False):
            if id(parameter) in self._shared:
                return f"{name!r} shares a parameter with another module"
        return ""


def _pinned(reason: str) -> _Value:
    return _Value((Space(reason=reason),))


def _cannot_follow(name: str, module: nn.Module) -> str:
    return f"its output goes into {name!r} ({type(module).__name__}), which cannot follow"


def _offsets(spaces: Sequence[Space]) -> list[int]:
    """Where each begins; of several all numbers of channels are known."""
    return list(accumulate((space.channels or 0 for space in spaces[:-1]), initial=0))


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


def _move(use: Use, order: Tensor) -> None:
    """Move every parameter and buffer that has one entry per channel."""
    module = use.module
    width = next(
        int(getattr(module, name))
        for name in ("out_channels", "num_features", "num_parameters")
        if hasattr(module, name)
    )
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.ndim and value.shape[0] == width:
            _take(value, order + use.offset, 0, use.offset)


def _move_inputs(use: Use, order: Tensor) -> None:
    """Move the input channels of a layer's weight, and of its mask."""
    # (features, C, H * W) of a linear layer: flattening keeps a channel's positions together.
    inputs = (order[:, None] * use.each + torch.arange(use.each)).flatten() + use.offset * use.each
    mask = dict(use.module.named_buffers(recurse=False)).get(MASK)
    for value in (use.module.get_parameter("weight"), *([] if mask is None else [mask])):
        _take(value, inputs, 1, use.offset * use.each)


def _take(value: Tensor, order: Tensor, dim: int, first: int) -> None:
    """Give the entries from ``first`` on, as many as ``order`` has, those of ``order``."""
    value.narrow(dim, first, len(order)).copy_(value.index_select(dim, order.to(value.device)))
