"""Which layout a model on a GPU runs in, and which of its layers in CHWN: chosen for all at once, from measured times.

A layer by itself pays for bringing its input into the order of its kernel and its output back; between neighbours of
the same order nothing is paid. So the least time of a whole model is a minimum cut: every layer and every tensor is on
one of two sides, "plain" (the order of the rest of the model) or CHWN; a layer costs what it costs on its side, and a
tensor whose maker and reader are on different sides costs a conversion. All costs between two sides are positive, so
that the cut is exact (Kolmogorov and Zabih, "What energy functions can be minimized via graph cuts?", 2004).
The plain order may be NCHW or NHWC: whichever cut costs less.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import fx, nn

from numbasparse.choices import Choice, Measured
from numbasparse.kernels import CudaKernel, kernel
from numbasparse.nn.native import keeps_order
from numbasparse.runtime.layouts import Layout
from numbasparse.spec import ConvSpec

_NEVER = 1 << 28
"""A capacity above all that can be cut; in the unit below."""
_PER_US = 100
"""Capacities are integers: hundredths of a microsecond."""
_USUAL_RATE = 2.5e-6
"""Microseconds for each byte of a tensor that is converted, where none was."""
_BYTES = {"float32": 4, "float64": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Layer:
    """A convolution with what was measured of it."""

    spec: ConvSpec
    measured: Sequence[Measured]

    @property
    def in_bytes(self) -> int:
        """Of the input."""
        return _BYTES[self.spec.dtype] * int(np.prod(self.spec.x_shape))

    @property
    def out_bytes(self) -> int:
        """Of the output."""
        return _BYTES[self.spec.dtype] * int(np.prod(self.spec.out_shape))


@dataclass(frozen=True)
class Together:
    """What is chosen for all layers of a model.

    Attributes
    ----------
    us
        What they cost, with all conversions; not what is the same for every choice.
    plain
        The layout of everything that does not run in CHWN.
    choices
        Of every layer that the graph calls once and that has a kernel for a side.
    """

    us: float
    plain: Layout
    choices: dict[str, Choice]


def choose_together(
    graph: fx.Graph, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], given: Layout
) -> Together:
    """The choices of layers and the plain layout that take least time together.

    Parameters
    ----------
    graph
        Of the model, with its layers as calls of modules.
    modules
        Of the model, by name.
    layers
        Those that were measured, by name.
    given
        Layout of the model's input.  NHWC is kept: what dense layers get in it they give back in it.
    """
    kept = least_time(graph, modules, layers, given)
    if given == "NHWC":
        return kept
    other = least_time(graph, modules, layers, "NHWC")
    conversion = _rate(layers.values()) * sum(_input_bytes(graph, layers))
    return other if other.us + conversion < kept.us else kept


def least_time(
    graph: fx.Graph, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], plain: Layout
) -> Together:
    """The same where the plain layout is known."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    rate = _rate(layers.values())
    sides = {name: _sides(layer, plain, rate) for name, layer in layers.items() if calls[name] == 1}
    sides = {name: side for name, side in sides.items() if side.plain is not None or side.chwn is not None}
    if not sides:
        return Together(0.0, plain, {})
    cut = _Cut()
    for name, side in sides.items():
        cut.add(name, side, layers[name], rate)
    _join(graph, modules, cut)
    us, chwn = cut.solve()
    chosen = {}
    for name, side in sides.items():
        best = side.chwn if name in chwn else side.plain
        if best is not None:
            chosen[name] = best.choice
    return Together(us, plain, chosen)


def _input_bytes(graph: fx.Graph, layers: Mapping[str, Layer]) -> list[int]:
    """Of the model's inputs that layers read."""
    found = []
    for node in graph.nodes:
        readers = [layers[str(user.target)] for user in node.users if str(user.target) in layers]
        if node.op == "placeholder" and readers:
            found.append(max(layer.in_bytes for layer in readers))
    return found


@dataclass(frozen=True)
class _Sides:
    """The best measured kernel on each side, and what it costs there, in microseconds."""

    plain: Measured | None
    plain_us: float
    chwn: Measured | None


def _sides(layer: Layer, plain: Layout, rate: float) -> _Sides:
    costs = []
    for found in layer.measured:
        takes, gives = _layouts(found.choice, layer.spec)
        if takes == gives == plain:
            costs.append((found.native_us, found))
        # A dense layer stays the model's own, which works in the model's layout.
        elif (takes, gives) != ("CHWN", "CHWN") and not kernel(found.choice.kernel).is_dense:
            converted = (takes != plain) * layer.in_bytes + (gives != plain) * layer.out_bytes
            costs.append((found.native_us + rate * converted, found))
    native = [m for m in layer.measured if _layouts(m.choice, layer.spec) == ("CHWN", "CHWN")]
    chwn = min(native, key=lambda m: m.native_us, default=None)
    if not costs:
        return _Sides(None, float("inf"), chwn)
    us, best = min(costs, key=lambda cost: cost[0])
    return _Sides(best, us, chwn)


def _layouts(choice: Choice, spec: ConvSpec) -> tuple[Layout, Layout]:
    chosen = kernel(choice.kernel)
    assert isinstance(chosen, CudaKernel)
    return chosen.layouts(spec, choice.config)


def _rate(layers: Iterable[Layer]) -> float:
    """Microseconds for each byte of a tensor that is converted, by what kernels cost more alone than natively."""
    rates = [
        (found.alone_us - found.native_us) / (layer.in_bytes + layer.out_bytes)
        for layer in layers
        for found in layer.measured
        if _layouts(found.choice, layer.spec) == ("CHWN", "CHWN")
    ]
    return max(median(rates), 0.0) if rates else _USUAL_RATE


class _Cut:
    """The network: place 0 is CHWN, 1 is plain, the others are layers' kernels and tensors."""

    def __init__(self) -> None:
        self.kernels: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self.readers: dict[str, float] = {}
        self.adders: dict[str, float] = {}
        self._count = 2
        self._edges: list[tuple[int, int, int]] = []

    def place(self) -> int:
        """A new one."""
        self._count += 1
        return self._count - 1

    def edge(self, chwn: int, plain: int, us: float) -> None:
        """What it costs that the first is on the side of CHWN and the second on the other."""
        capacity = _NEVER if us == float("inf") else min(round(us * _PER_US), _NEVER - 1)
        self._edges.append((chwn, plain, capacity))

    def never(self, chwn: int, plain: int) -> None:
        """Forbid that."""
        self.edge(chwn, plain, float("inf"))

    def add(self, name: str, side: _Sides, layer: Layer, rate: float) -> None:
        """A layer's kernel and its output."""
        own, output = self.place(), self.place()
        self.kernels[name], self.outputs[name] = own, output
        self.readers[name], self.adders[name] = rate * layer.in_bytes, rate * layer.out_bytes
        self.edge(own, 1, float("inf") if side.chwn is None else side.chwn.native_us)
        self.edge(0, own, side.plain_us)
        self.edge(own, output, rate * layer.out_bytes)
        self.never(output, own)

    def read(self, name: str, tensor: int, residual: bool = False) -> None:
        """A layer reads a tensor, as input or to add it: it converts a plain one to CHWN, and cannot do the reverse."""
        self.edge(self.kernels[name], tensor, (self.adders if residual else self.readers)[name])
        self.never(tensor, self.kernels[name])

    def solve(self) -> tuple[float, set[str]]:
        """What the cut costs, in microseconds, and the layers on the side of CHWN."""
        rows, columns, capacities = (np.array(values, np.int32) for values in zip(*self._edges, strict=True))
        network = csr_array((capacities, (rows, columns)), shape=(self._count, self._count))
        network.sum_duplicates()
        network.data = np.minimum(network.data, _NEVER).astype(np.int32)
        found = maximum_flow(network, 0, 1)
        left = csr_array(network - found.flow)
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, 0, return_predecessors=False).tolist())
        return found.flow_value / _PER_US, {name for name, place in self.kernels.items() if place in reached}


def _join(graph: fx.Graph, modules: Mapping[str, nn.Module], cut: _Cut) -> None:
    """Tell who reads what: the places of tensors, of which what keeps the order in memory makes one."""
    tensors: dict[fx.Node, int] = {}
    for node in graph.nodes:
        name = str(node.target)
        inputs = [tensors[source] for source in node.all_input_nodes]
        adder = _adder(node, modules, cut)
        if node.op == "call_module" and name in cut.kernels:
            for tensor in inputs:
                cut.read(name, tensor)
            tensors[node] = cut.outputs[name]
        elif adder is not None:
            layer, other = adder
            cut.read(layer, tensors[other], residual=True)
            tensors[node] = cut.outputs[layer]
        elif inputs and keeps_order(node, modules):
            tensors[node], *others = inputs
            for tensor in others:
                cut.never(tensors[node], tensor)
                cut.never(tensor, tensors[node])
        else:
            for tensor in inputs:
                cut.never(tensor, 1)
            tensors[node] = 1


def _adder(node: fx.Node, modules: Mapping[str, nn.Module], cut: _Cut) -> tuple[str, fx.Node] | None:
    """The layer that can add what a node adds to its result, as `epilogue` has it do, and what it adds."""
    if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_") or len(node.args) != 2 or node.kwargs:
        return None
    if not all(isinstance(argument, fx.Node) for argument in node.args):
        return None
    for own, other in (node.args, node.args[::-1]):
        maker: Any = own
        while len(maker.users) == 1 and maker.op == "call_module":
            name = str(maker.target)
            if name in cut.kernels:
                return name, cast(fx.Node, other)
            if type(modules[name]) is not nn.Identity:
                break
            maker = maker.args[0]
    return None
