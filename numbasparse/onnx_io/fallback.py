"""The whole model through onnxruntime: right, and not accelerated by this package."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class OnnxRuntimeModel(nn.Module):
    """An ONNX file that onnxruntime runs on the CPU, with tensors in and out.

    It has no layers to prune, tune or convert: nothing is accelerated.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ValueError
        If onnxruntime refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import onnxruntime

        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would print is in the error raised
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's kinds are many and private
            raise ValueError(f"onnxruntime refuses {path}: {error}") from error

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run on tensors in the order of the file's inputs; several outputs come as a tuple."""
        names = [value.name for value in self._session.get_inputs()]
        if len(names) != len(inputs):
            raise TypeError(f"the model has {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
        arrays = {n: np.ascontiguousarray(x.detach().cpu().numpy()) for n, x in zip(names, inputs, strict=True)}
        outputs = tuple(torch.from_numpy(np.array(y)) for y in self._session.run(None, arrays))
        return outputs[0] if len(outputs) == 1 else outputs
