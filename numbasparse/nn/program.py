"""A model on a CPU as a list of steps: its Python does not run again, and neighbouring convolutions are one call.

`Program` is made from the model's graph (torch.fx) and one run on an example. Each node becomes one of these:

- a **job**: a sparse convolution, a max pooling, or a linear layer on one vector, which code of ours computes. Jobs
  that follow one another are one call of machine code, which keeps its threads between them. Their results lie in one
  block of memory, which is planned ahead: a place is used again as soon as nothing reads it any more.
- a **call**: anything else, called as in the graph at every run.
- a **constant**: what depends on shapes only, or is another view of a job's result.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from numbasparse.nn.native import Tracer
from numbasparse.nn.placing import Piece, place
from numbasparse.nn.recording import Layer, Recording, call_of
from numbasparse.runtime import cpu, memory
from numbasparse.runtime.job import Job

_ALIGNMENT = 64
_X, _Y, _BIAS = 2, 3, 4
"""Columns of a series' table."""


@dataclass(frozen=True)
class _Slot:
    """A place among the values of a run."""

    index: int


# ---- steps --------------------------------------------------------------------------------------------------


class _Call:
    """Anything that is not a job."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, out: int) -> None:
        self.function, self.args, self.kwargs, self.out = function, args, kwargs, out

    def __call__(self, values: list[Any]) -> None:
        args, kwargs = (_filled(a, values) for a in (self.args, self.kwargs))
        values[self.out] = self.function(*args, **kwargs)


def _filled(template: Any, values: list[Any]) -> Any:
    """A call's arguments with the values in place of their slots."""
    if type(template) is _Slot:
        return values[template.index]
    if type(template) is tuple:
        return tuple([_filled(part, values) for part in template])
    if type(template) is list:
        return [_filled(part, values) for part in template]
    if type(template) is dict:
        return {key: _filled(part, values) for key, part in template.items()}
    if type(template) is slice:
        return slice(*(_filled(part, values) for part in (template.start, template.stop, template.step)))
    return template


@dataclass
class _Series:
    """Jobs one behind another.

    Attributes
    ----------
    table
        See `numbasparse.runtime.cpu.run_series`.
    inputs
        (job, slot) of inputs that lie elsewhere in each run.
    outputs
        (job, slot, maker) of results that are made anew for each run.
    residuals
        (job, its work, slot of the residual) of those that have another address in each run.
    """

    threads: int
    table: np.ndarray
    workspace: int = 0
    inputs: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[tuple[int, int, Callable[[], Tensor]]] = field(default_factory=list)
    residuals: list[tuple[int, Job, int]] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)

    @functools.cached_property
    def _fresh(self) -> np.ndarray:
        return cpu.series_states(len(self.table), self.threads)

    def __call__(self, values: list[Any]) -> None:
        table = self.table
        for job, slot in self.inputs:
            table[job, _X] = _address_of(values, slot)
        for job, slot, maker in self.outputs:
            values[slot] = made = maker()
            table[job, _Y] = made.data_ptr()
        for job, work, slot in self.residuals:
            work.add(_address_of(values, slot), int(table[job, _Y]))
        cpu.run_series(table, self._fresh.copy(), self.threads, self.workspace)


def _address_of(values: list[Any], slot: int) -> int:
    """Where a value lies, brought into the form that kernels read if torch made it otherwise this time."""
    x = values[slot]
    if x.dtype is not torch.float32 or not x.is_contiguous():
        values[slot] = x = x.float().contiguous()
    address: int = x.data_ptr()
    return address


# ---- the program --------------------------------------------------------------------------------------------


class _Builder:
    """Makes the steps from what was seen."""

    def __init__(self, graph: fx.Graph, recording: Recording) -> None:
        self.modules, self.seen = recording.modules, recording.seen
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.number = {node: i for i, node in enumerate(self.nodes)}
        (end,) = [node for node in graph.nodes if node.op == "output"]
        self.result = end.args[0]
        self.returned = set(end.all_input_nodes)
        self.buffers = self._buffers()

    def _buffers(self) -> dict[fx.Node, Tensor]:
        """Memory of every job's result, but for those that are only returned."""
        pieces = {node: Piece(0, self.number[node], self.number[node]) for node in self.nodes if self._stays(node)}
        for node, piece in pieces.items():
            piece.nbytes = -(-4 * prod(self._shape(node)) // _ALIGNMENT) * _ALIGNMENT
        end = len(self.nodes)
        for node in self.nodes:
            base = self.seen[node].base
            if base in pieces:
                used = [self.number.get(user, end) for user in node.users]
                pieces[base].last = max(pieces[base].last, self.number[node], *used)
        whole = memory.empty_tensor((max(1, place(list(pieces.values())) // 4),))
        found = {}
        for node, piece in pieces.items():
            shape = self._shape(node)
            found[node] = whole[piece.offset // 4 :][: prod(shape)].view(shape)
        return found

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        layer = self.seen[node].layer
        assert layer is not None
        return layer.shape

    def _stays(self, node: fx.Node) -> bool:
        """Whether a node is a job whose result has a place of its own in every run."""
        return self.seen[node].layer is not None and not self._made_anew(node)

    def _made_anew(self, node: fx.Node) -> bool:
        """Whether a job's result is only returned, and nothing else lies in its memory."""
        if node not in self.returned or any(user.op != "output" for user in node.users):
            return False
        return not any(self.seen[other].base is node for other in self.nodes if other is not node)

    def constants(self) -> list[Any]:
        """What each slot holds before a run."""
        values: list[Any] = []
        for node in self.nodes:
            seen = self.seen[node]
            if seen.constant:
                values.append(seen.value)
            elif node in self.buffers:
                values.append(self.buffers[node])
            elif self._fixed_view(node):
                values.append(self._view(node))
            else:
                values.append(None)
        return values

    def _fixed_view(self, node: fx.Node) -> bool:
        seen = self.seen[node]
        return seen.is_view and seen.base in self.buffers and seen.layer is None

    def _view(self, node: fx.Node) -> Tensor:
        """The view of a buffer that a node makes in every run."""
        seen = self.seen[node]
        assert seen.base is not None
        assert seen.form is not None
        buffer = self.buffers[seen.base]
        # A job's result begins where its memory does; here it is a part of a larger block.
        return buffer.as_strided(seen.form.shape, seen.form.stride, seen.form.offset + buffer.storage_offset())

    def steps(self) -> Iterator[tuple[int, Any]]:
        """The steps, each with the number of its last node."""
        series: _Series | None = None
        last = 0
        for node in self.nodes:
            seen, number = self.seen[node], self.number[node]
            if seen.constant or node.op == "placeholder" or self._fixed_view(node):
                continue
            if seen.layer is not None:
                if series is not None and series.threads != seen.layer.threads:
                    yield last, series
                    series = None
                series = series or _Series(seen.layer.threads, np.zeros((0, cpu.SERIES_WORDS), np.int64))
                self._append(series, node, seen.layer)
            else:
                if series is not None:
                    yield last, series
                    series = None
                args, kwargs = (self.with_slots(part) for part in (node.args, node.kwargs))
                yield number, _Call(call_of(node, self.modules), args, kwargs, number)
            last = number
        if series is not None:
            yield last, series

    def with_slots(self, arguments: Any) -> Any:
        """Arguments with slots in place of nodes, in tuples, lists and dicts of Python's own, not those of fx."""
        slotted: Any = map_arg
        return _plain_containers(slotted(arguments, lambda node: _Slot(self.number[node])))

    def _append(self, series: _Series, node: fx.Node, layer: Layer) -> None:
        job = layer.job
        at = len(series.table)
        words = np.zeros(cpu.SERIES_WORDS, np.int64)
        words[:_X] = job.code.address, job.params
        words[_BIAS] = layer.bias
        x = self._fixed_address(layer.x)
        if x is None:
            series.inputs.append((at, self.number[layer.x]))
        else:
            words[_X] = x
        if node in self.buffers:
            words[_Y] = self.buffers[node].data_ptr()
        else:
            series.outputs.append((at, self.number[node], memory.tensor_maker(layer.shape)))
        if layer.residual is not None:
            residual = self._fixed_address(layer.residual)
            if residual is None or node not in self.buffers:
                series.residuals.append((at, job, self.number[layer.residual]))
            else:
                job.add(residual, int(words[_Y]))
        series.table = np.concatenate([series.table, words[None]])
        series.workspace = max(series.workspace, job.workspace)
        series.keep += [job, layer.keep]

    def _fixed_address(self, node: fx.Node) -> int | None:
        if node in self.buffers:
            return self.buffers[node].data_ptr()
        seen = self.seen[node]
        if self._fixed_view(node):
            return self._view(node).data_ptr()
        return seen.value.data_ptr() if seen.constant else None

    def dead_after(self, ends: Sequence[int]) -> list[list[int]]:
        """Slots whose values nothing reads behind each step."""
        found: list[list[int]] = [[] for _ in ends]
        for node in self.nodes:
            seen = self.seen[node]
            if seen.constant or node in self.buffers or self._fixed_view(node) or node in self.returned:
                continue
            last = max([self.number[node], *(self.number[user] for user in node.users if user in self.number)])
            # A view that need not be made again, or a constant, is no step: then it is the first one behind.
            step = next((i for i, end in enumerate(ends) if end >= last), None)
            if step is not None:
                found[step].append(self.number[node])
        return found


def _plain_containers(template: Any) -> Any:
    if isinstance(template, dict):
        return {key: _plain_containers(part) for key, part in template.items()}
    if isinstance(template, (tuple, list)) and type(template).__name__.startswith("immutable"):
        return [_plain_containers(part) for part in template]
    if isinstance(template, tuple):
        return tuple(_plain_containers(part) for part in template)
    return template


class Program:
    """A model recorded with inputs of fixed shapes, on the CPU; made by `numbasparse.nn.capture`.

    Call it with tensors like the example's. Results are made anew by each call. It keeps the packed weights and those
    of dense layers, but not the model's sparse ones: a model that nothing else refers to frees them. Threads are as
    many as torch had when it was made. Calls from several threads wait for one another.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if Tracer().is_leaf_module(model, ""):
            model = nn.Sequential(model)  # a single layer, which the tracer would look into
        graph = _traced(model, len(inputs))
        builder = _Builder(graph, Recording(model, graph, inputs))
        steps = list(builder.steps())
        dead = builder.dead_after([end for end, _ in steps])
        self._steps = [(step, slots) for (_, step), slots in zip(steps, dead, strict=True)]
        self._constants = builder.constants()
        self._inputs = [builder.number[node] for node in builder.nodes if node.op == "placeholder"][: len(inputs)]
        self._described = [(x.shape, x.dtype) for x in inputs]
        self._result = builder.with_slots(builder.result)
        # What lies in the program's own memory is copied when it is returned: the next run writes there.
        self._own = {b.untyped_storage().data_ptr() for b in builder.buffers.values()}
        self._lock = threading.Lock()

    @property
    def jobs(self) -> list[int]:
        """How many convolutions each call of machine code computes."""
        return [len(step.table) for step, _ in self._steps if isinstance(step, _Series)]

    def __call__(self, *inputs: Tensor) -> Any:
        """Run on inputs of the example's shapes and dtypes.

        Raises
        ------
        TypeError
            If there are more or fewer inputs, or not tensors on the CPU.
        ValueError
            If one has another shape or dtype.
        """
        self._check(inputs)
        with self._lock, torch.inference_mode():
            values = self._constants.copy()
            for slot, x in zip(self._inputs, inputs, strict=True):
                values[slot] = x
            for step, dead in self._steps:
                step(values)
                for slot in dead:
                    values[slot] = None
            return tree_map(self._released, _filled(self._result, values))

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._described) or not all(isinstance(x, Tensor) and x.is_cpu for x in inputs):
            given = [str(x.device) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
            raise TypeError(f"expected {len(self._described)} tensors on the CPU, got {given}")
        for number, (x, (shape, dtype)) in enumerate(zip(inputs, self._described, strict=True)):
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(
                    f"input {number} must be {tuple(shape)}, {dtype}, as the model was captured, got "
                    f"{tuple(x.shape)}, {x.dtype}: capture the model once for each shape"
                )

    def _released(self, value: Any) -> Any:
        shares = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._own
        return value.clone() if shares else value


def _traced(model: nn.Module, count: int) -> fx.Graph:
    """The model's graph for so many arguments.

    Raises
    ------
    ValueError
        If it cannot be traced.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    left_out = {p.name: p.default for p in parameters[count:] if p.default is not inspect.Parameter.empty}
    try:
        return Tracer().trace(model, concrete_args=left_out or None)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} cannot be captured: torch.fx cannot trace it ({first}); call the model itself"
        ) from error
