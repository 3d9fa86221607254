"""Re-ordering of output channels: rows with similar patterns become neighbours, and the result stays the same.

Kernels that take several output channels at once load fewer inputs where their rows share columns. A layer's output
channels can take any order if whoever reads them undoes it: here the next convolution or linear layer does, by its
input channels, and what lies between (normalization, activations, pooling, depthwise convolutions) moves along. Where
the graph does not allow that (residual additions, concatenations, the model's output), the layer is left and the order
returned, for an epilogue that writes row ``i`` to channel ``order[i]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from numbasparse.pruning.layers import MASK, Layer, LayerFilter, select_layers

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


@dataclass(frozen=True)
class Reordering:
    """What became of every chosen layer.

    Attributes
    ----------
    applied : dict of str to Tensor
        Layers whose output channels were moved: row ``i`` now is what was row ``order[i]``; int64, shape (K,).
    left : dict of str to Tensor
        Layers that were not changed: the order that would make similar rows neighbours, for an epilogue.
    reasons : dict of str to str
        Why each of ``left`` was left.
    """

    applied: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: re-ordered" for name in self.applied]
        return "\n".join(lines + [f"{name or '(model)'}: left, {reason}" for name, reason in self.reasons.items()])


class _Refused(Exception):
    """Why a layer's output channels must stay."""


def reorder_channels(model: nn.Module, filter: LayerFilter | None = None, *, vector: int = 8) -> Reordering:
    """Re-order output channels in place, so that rows with similar patterns are neighbours; outputs stay the same.

    Sums of the next layer are then taken in another order: outputs are equal up to float rounding, and to the bit where
    the sums are exact. Masks of a pruning in progress move along; an optimizer's running averages do not, so do it
    before or after training.

    Parameters
    ----------
    model : nn.Module
        Changed in place. `torch.fx` must be able to trace it, or all layers are left.
    filter : callable, optional
        Chooses the layers whose output channels are ordered; ``default_filter`` if not given.
    vector : int
        How many neighbours should share columns: what the kernel takes at once.

    Returns
    -------
    Reordering

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``; ValueError also if ``vector`` is less than 1.
    """
    if isinstance(vector, bool) or not isinstance(vector, int) or vector < 1:
        raise ValueError(f"vector must be an int of 1 or more, got {vector!r}")
    layers = select_layers(model, filter)
    result = Reordering()
    graph = _Graph(model)
    for name, layer in layers.items():
        order = similar_order(layer, vector)
        try:
            moves = graph.readers(name)
        except _Refused as reason:
            result.left[name], result.reasons[name] = order, str(reason)
            continue
        with torch.no_grad():
            _move(layer.module, order, 0)
            for module, kind in moves:
                _follow(module, kind, order)
        result.applied[name] = order
    return result


def similar_order(layer: Layer, vector: int) -> Tensor:
    """Return an order of a layer's output channels in which runs of ``vector`` rows share as many columns as can be.

    Runs are filled greedily: the fullest row left begins one, then comes the row that brings the fewest new columns,
    and of those the one that shares most. Channels stay in their group.

    Returns
    -------
    Tensor
        int64, shape (K,), on the CPU; new row ``i`` is old row ``order[i]``.
    """
    grid = layer.grid(1)
    pattern = (layer.weight.detach() != 0).reshape(grid.groups, grid.group_rows, -1).float()
    orders = [_greedy(rows, vector) + group * grid.group_rows for group, rows in enumerate(pattern)]
    return torch.cat(orders)


def _greedy(rows: Tensor, vector: int) -> Tensor:
    counts = rows.sum(1)
    left = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    order = []
    union = torch.zeros_like(rows[0])
    for position in range(len(rows)):
        if position % vector == 0:
            union = torch.zeros_like(union)
            score = counts
        else:
            shared = rows @ union
            # New columns decide; shared ones break ties, being fewer than all columns.
            score = shared / (rows.shape[1] + 1.0) - (counts - shared)
        best = int(score.masked_fill(~left, -torch.inf).argmax())
        left[best] = False
        union = torch.maximum(union, rows[best])
        order.append(best)
    return torch.tensor(order, dtype=torch.int64)


def block_columns(layer: Layer, vector: int) -> int:
    """Count the columns that runs of ``vector`` rows touch, over all runs: what the order makes small."""
    grid = layer.grid(vector)
    dead = grid.all((layer.weight.detach() == 0).reshape(layer.weight.shape))
    return int((~dead).sum())


class _Graph:
    """Who reads a layer's output, by torch.fx."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self.failure = ""
        self.shared = _shared_parameters(model)
        try:
            traced = fx.symbolic_trace(model)
        except Exception as error:  # whatever a model's own code raises on symbolic values
            self.failure = f"torch.fx cannot trace the model ({' '.join(str(error).split())[:120]})"
            return
        for node in traced.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)

    def readers(self, name: str) -> list[tuple[nn.Module, str]]:
        """Return the modules that must follow a new order of a layer's output, and how.

        Raises
        ------
        _Refused
            If one that reads it cannot.
        """
        if self.failure:
            raise _Refused(self.failure)
        node = self._only_call(name)
        if not isinstance(self.modules[name], nn.Conv2d):
            raise _Refused(f"it is a {type(self.modules[name]).__name__}, not an nn.Conv2d")
        moves: list[tuple[nn.Module, str]] = []
        self._walk(node, flat=False, channels=self.modules[name].out_channels, moves=moves)  # type: ignore[arg-type]
        return moves

    def _only_call(self, name: str) -> fx.Node:
        calls = self.calls.get(name, [])
        if len(calls) != 1:
            raise _Refused(f"{name!r} is called {len(calls)} times")
        for parameter in self.modules[name].parameters(recurse=False):
            if id(parameter) in self.shared:
                raise _Refused(f"{name!r} shares a parameter with another module")
        return calls[0]

    def _walk(self, node: fx.Node, *, flat: bool, channels: int, moves: list[tuple[nn.Module, str]]) -> None:
        if not node.users:
            raise _Refused("nothing reads its output")
        for user in node.users:
            if any(source is not node for source in user.all_input_nodes):
                raise _Refused(
                    f"its output is joined with another in {user.name!r} (a residual sum, product or the like)"
                )
            if user.op == "output":
                raise _Refused("its output is the model's output")
            if self._passes(user, flat):
                self._walk(user, flat=flat, channels=channels, moves=moves)
            elif _flattens(user, self.modules) and not flat:
                self._walk(user, flat=True, channels=channels, moves=moves)
            elif user.op == "call_module":
                self._module(user, flat, channels, moves)
            else:
                raise _Refused(f"its output goes through {user.name!r}, which is not known to treat channels alike")

    def _passes(self, user: fx.Node, flat: bool) -> bool:
        """Return whether a node treats every channel alike."""
        if user.op == "call_module":
            module = self.modules[str(user.target)]
            return isinstance(module, _SAME) or (isinstance(module, nn.PReLU) and module.num_parameters == 1)
        if user.op == "call_function":
            return user.target in _SAME_FUNCTIONS
        return user.op == "call_method" and user.target in _SAME_METHODS

    def _module(self, user: fx.Node, flat: bool, channels: int, moves: list[tuple[nn.Module, str]]) -> None:
        """Note a module that must follow, and walk on behind it if its own output moves too."""
        name = str(user.target)
        module = self.modules[name]
        self._only_call(name)
        if isinstance(module, (nn.BatchNorm2d, nn.PReLU)) and not flat:
            moves.append((module, "channels"))
            self._walk(user, flat=flat, channels=channels, moves=moves)
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and not flat:
            moves.append((module, "inputs"))
        elif isinstance(module, nn.Conv2d) and module.groups == channels == module.out_channels and not flat:
            moves.append((module, "channels"))
            self._walk(user, flat=flat, channels=channels, moves=moves)
        elif isinstance(module, nn.Linear) and flat and module.in_features % channels == 0:
            moves.append((module, "inputs"))
        else:
            raise _Refused(f"its output goes into {name!r} ({type(module).__name__}), which cannot follow")


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


def _follow(module: nn.Module, kind: str, order: Tensor) -> None:
    """Move a reader's channels, or the input channels of its weight."""
    if kind == "channels":
        _move(module, order, 0)
    else:
        weight = module.get_parameter("weight")
        if isinstance(module, nn.Linear):
            # (features, C, H * W): flattening keeps a channel's positions together.
            order = torch.arange(weight.shape[1]).view(len(order), -1)[order].flatten()
        _take(weight, order, 1)
        mask = _mask(module)
        if mask is not None:
            _take(mask, order, 1)


def _move(module: nn.Module, order: Tensor, dim: int) -> None:
    """Move every parameter and buffer that has one entry per channel."""
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.ndim and value.shape[0] == len(order):
            _take(value, order, dim)


def _mask(module: nn.Module) -> Tensor | None:
    return dict(module.named_buffers(recurse=False)).get(MASK)


def _take(value: Tensor, order: Tensor, dim: int) -> None:
    value.copy_(value.index_select(dim, order.to(value.device)))
