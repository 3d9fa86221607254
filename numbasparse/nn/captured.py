"""A model recorded for inputs of fixed shapes: on a GPU one CUDA graph, on the CPU a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from numbasparse.nn.operator import plans_not_kept, plans_used
from numbasparse.nn.program import Program
from numbasparse.runtime import cuda, memory

_WARM_UPS = 3


class CapturedModel:
    """A model on a GPU as one CUDA graph; made by `capture`.

    Call it with tensors like the example's: they are copied into the buffers that the graph reads. What it returns are
    the graph's own buffers, which the next call overwrites: ``clone()`` what is to be kept. Calls are for one thread
    at a time.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.clone(memory_format=torch.preserve_format) for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            # Weights are packed, code is compiled and libraries choose their algorithms: none of it can be recorded.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    model(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # The packed weights lie in memory of plans that the operator may forget, the others in the model's.
            with plans_used() as self._plans, torch.cuda.graph(self._graph):
                self._outputs: Any = model(*self._inputs)
        self._model = model

    def __call__(self, *inputs: Tensor) -> Any:
        """Run on inputs of the example's shapes and dtypes, on any device.

        Raises
        ------
        TypeError
            If there are more or fewer inputs, or not tensors.
        ValueError
            If one has another shape or dtype.
        """
        if len(inputs) != len(self._inputs) or not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(f"expected {len(self._inputs)} tensors, got {[type(x).__name__ for x in inputs]}")
        for number, (x, buffer) in enumerate(zip(inputs, self._inputs, strict=True)):
            if x.shape != buffer.shape or x.dtype != buffer.dtype:
                raise ValueError(
                    f"input {number} must be {tuple(buffer.shape)}, {buffer.dtype}, as the model was captured, got "
                    f"{tuple(x.shape)}, {x.dtype}: capture the model once for each shape"
                )
        with torch.inference_mode():
            for x, buffer in zip(inputs, self._inputs, strict=True):
                buffer.copy_(x)
        self._graph.replay()
        return self._outputs


def capture(model: nn.Module, *example: Tensor) -> CapturedModel | Program:
    """Record a model for calls with inputs of the example's shapes: its Python does not run again.

    On a GPU it becomes one CUDA graph; on the CPU a `numbasparse.nn.program.Program`, which needs less memory too if
    the model is then deleted: its results lie in planned memory, and it keeps packed weights only.

    Parameters
    ----------
    model : nn.Module
        For example from `convert`, on the example's device; put into eval mode. On a GPU its parameters are used where
        they lie: changes in place are seen, new tensors are not. On the CPU changes of sparse weights are not seen.
    *example : Tensor
        The model's arguments.

    Returns
    -------
    CapturedModel or Program
        Called like the model, for inference. A `CapturedModel` returns the same tensors each time.

    Raises
    ------
    TypeError
        If the example is not of tensors, all on the CPU or all on one GPU.
    ValueError
        On the CPU, if torch.fx cannot trace the model.
    RuntimeError
        From torch, if the model does on a GPU what cannot be recorded, such as reading a result on the host. If what
        was recorded on the CPU gives something else than the model.
    """
    if example and all(isinstance(x, Tensor) and x.is_cpu for x in example):
        return _recorded(model.eval(), example)
    if not example or not all(isinstance(x, Tensor) and x.is_cuda for x in example):
        given = [str(x.device) if isinstance(x, Tensor) else type(x).__name__ for x in example]
        raise TypeError(f"a model is captured with tensors on the CPU or on one GPU as examples, got {given}")
    reason = cuda.reason_unavailable()
    if reason is not None:
        raise cuda.CudaError(reason)
    with torch.cuda.device(example[0].device):
        return CapturedModel(model.eval(), example)


def _recorded(model: nn.Module, example: tuple[Tensor, ...]) -> Program:
    """A program that gives what the model gives, on the example and on the same numbers in another order."""
    # The program keeps its plans; the operator need not, nor the weights that they were made of.
    with plans_not_kept():
        program = Program(model, example)
        _compare(program, model, example)
    # Results of both lay there, of which the program needs none.
    memory.blocks.clear()
    return program


def _compare(program: Program, model: nn.Module, example: tuple[Tensor, ...]) -> None:
    for inputs in (example, tuple(x.flip(tuple(range(x.dim()))) for x in example)):
        with torch.inference_mode():
            # Copies: a model may change its input in place.
            expected, got = (tree_leaves(run(*(x.clone() for x in inputs))) for run in (model, program))
        for one, other in zip(expected, got, strict=True):
            if not _same(one, other):
                raise RuntimeError(
                    f"{type(model).__name__} cannot be captured: what was recorded gives something else than the "
                    f"model, which must decide by values or keep a state; call the model itself"
                )


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
