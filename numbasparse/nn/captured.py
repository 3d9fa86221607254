"""A model on a GPU as one CUDA graph: all its kernels start with one call of the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.nn.operator import plans_used
from numbasparse.runtime import cuda

_WARM_UPS = 3


class CapturedModel:
    """A model recorded with inputs of fixed shapes; made by `capture`.

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


def capture(model: nn.Module, *example: Tensor) -> CapturedModel:
    """Record a model on a GPU as a CUDA graph, for calls with inputs of the example's shapes.

    Parameters
    ----------
    model : nn.Module
        On a GPU, for example from `convert`; put into eval mode. Its parameters are used where they lie: changes in
        place are seen, new tensors are not.
    *example : Tensor
        The model's arguments, on the same GPU.

    Returns
    -------
    CapturedModel
        Called like the model.

    Raises
    ------
    TypeError
        If the example is not of CUDA tensors.
    RuntimeError
        From torch, if the model does what cannot be recorded, such as reading a result on the host.
    """
    if not example or not all(isinstance(x, Tensor) and x.is_cuda for x in example):
        given = [str(x.device) if isinstance(x, Tensor) else type(x).__name__ for x in example]
        raise TypeError(f"a model is captured with CUDA tensors as examples, got {given}")
    reason = cuda.reason_unavailable()
    if reason is not None:
        raise cuda.CudaError(reason)
    with torch.cuda.device(example[0].device):
        return CapturedModel(model.eval(), example)
