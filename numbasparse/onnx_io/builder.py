"""What an operator's importer works with: a node, its inputs, and the graph of torch modules that grows.

A value of the ONNX graph is one of three things here: an ``fx.Node`` (a tensor when the model runs), a NumPy array (a
constant), or a NumPy object array of ints and ``fx.Node`` (sizes computed from a tensor's shape).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from numbasparse.onnx_io.source import Source, shape_text

Value = fx.Node | np.ndarray


class UnsupportedNode(Exception):
    """Why a node cannot be imported, and the value at fault if it is one."""

    def __init__(self, reason: str, value: str = "") -> None:
        super().__init__(reason)
        self.value = value


@dataclass
class Builder:
    """The graph under construction, its modules, and every ONNX value known so far.

    ``fixed_sizes`` tells that the result is right for the sizes of ``source.shapes`` alone (the batch excepted).
    """

    source: Source
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    values: dict[str, Value] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)
    fixed_sizes: bool = False

    def new_name(self, kind: str) -> str:
        """``kind_0``, ``kind_1``, ...: never a text of the file."""
        self.names[kind] += 1
        return f"{kind}_{self.names[kind] - 1}"

    def module(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """A call of a new module."""
        # Not conv2d_0: so does the reader of an exported program call them, and would have to count on.
        name = self.new_name(f"onnx_{type(module).__name__.lower()}")
        self.root.add_module(name, module.eval())
        return self.graph.call_module(name, (x,))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function."""
        return self.graph.call_function(function, args, kwargs)

    def size(self, x: fx.Node, axis: int) -> fx.Node:
        """The size of a tensor when the model runs."""
        return self.graph.call_method("size", (x, axis))

    def buffer(self, array: np.ndarray) -> fx.Node:
        """A constant as a buffer, which follows the model to its device."""
        name = self.new_name("constant")
        self.root.register_buffer(name, tensor_of(array))
        return self.graph.get_attr(name)

    def module_called(self, value: Value) -> nn.Module | None:
        """The module whose output a value is."""
        if isinstance(value, fx.Node) and value.op == "call_module":
            return self.root.get_submodule(str(value.target))
        return None


@dataclass(frozen=True)
class NodeContext:
    """One node of the file with typed access to its inputs and attributes; what does not fit raises `UnsupportedNode`.

    Inputs are numbered from 0, as in ONNX's operator reference.
    """

    node: onnx.NodeProto
    build: Builder

    @property
    def opset(self) -> int:
        return self.build.source.opset

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.node.input) and self.node.input[index] != ""

    def value(self, index: int) -> Value:
        """An input, whatever it is."""
        if not self.has(index):
            raise UnsupportedNode(f"input {index} is missing")
        return self.build.values[self.node.input[index]]

    def tensor(self, index: int) -> fx.Node:
        """An input as a tensor; a constant becomes a buffer."""
        value = self.value(index)
        if isinstance(value, fx.Node):
            return value
        if value.dtype == object:
            raise UnsupportedNode(f"input {index} is computed from a shape, where a tensor is expected")
        return self.build.buffer(value)

    def constant(self, index: int, what: str) -> np.ndarray:
        """An input that must be a constant."""
        value = self.value(index)
        if isinstance(value, fx.Node) or value.dtype == object:
            raise UnsupportedNode(
                f"{what} (input {index}) is computed, where a constant is expected", self.node.input[index]
            )
        return value

    def ints(self, index: int, what: str) -> list[int]:
        """An input that must be constant integers."""
        return [int(i) for i in self.constant(index, what).reshape(-1)]

    def shape(self, index: int) -> tuple[int | None, ...]:
        """The inferred shape of an input; reading a size beyond the batch fixes the sizes of the import."""
        self.build.fixed_sizes = True
        return self._shape(index)

    def rank(self, index: int) -> int:
        """The inferred number of dimensions of an input."""
        return len(self._shape(index))

    def _shape(self, index: int) -> tuple[int | None, ...]:
        name = self.node.input[index]
        value = self.value(index)
        if not isinstance(value, fx.Node):
            return value.shape
        shapes = self.build.source.shapes
        if name not in shapes:
            raise UnsupportedNode(f"the rank of input {index} ({name!r}) cannot be inferred", name)
        return shapes[name]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute as a Python value (text decoded), or the default."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def expect(self, name: str, *allowed: Any) -> Any:
        """An attribute that must have one of the values; the first is the default."""
        value = self.attribute(name, allowed[0])
        if value not in allowed:
            text = value if isinstance(value, (int, float, str)) else list(value)
            raise UnsupportedNode(f"attribute {name}={text!r} (supported: {', '.join(map(repr, allowed))})")
        return value

    def one_output(self) -> None:
        """Refuse further outputs (masks, indices, running statistics)."""
        extra = [name for name in self.node.output[1:] if name]
        if extra:
            raise UnsupportedNode(f"more than one output ({', '.join(map(repr, extra))})")

    def axis(self, value: int, rank: int | None = None) -> int:
        """An axis as a number from 0."""
        if value >= 0:
            return value
        return value + (self.rank(0) if rank is None else rank)

    def known_sizes(self, index: int) -> list[int]:
        """The spatial sizes of an input, all of which must be known."""
        shape = self.shape(index)
        if any(size is None for size in shape[2:]):
            raise UnsupportedNode(
                f"its input has open sizes {shape_text(shape)}: give the input's shape", self.node.input[index]
            )
        return [int(size or 0) for size in shape[2:]]


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """A constant as a tensor of its own."""
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise UnsupportedNode(f"a constant of type {array.dtype}, which torch does not have") from None


def pads_for_torch(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Pads of the last dimensions as ``F.pad`` takes them: last dimension first, begin and end in turns."""
    return [int(p) for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]
