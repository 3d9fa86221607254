"""Pruned weights as ONNX sparse initializers, for those who want them in other tools."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor, nn

from numbasparse.files import write_whole
from numbasparse.onnx_io.quiet import quiet
from numbasparse.onnx_io.source import load_checked

DEFAULT_THRESHOLD = 0.7
"""A float32 weight kept costs 12 bytes (value and int64 index) instead of 4: below 2/3 zeros the file grows."""

LARGEST_MESSAGE = 2**31 - 1
"""Bytes of one protobuf message."""

_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


@dataclass(frozen=True)
class StoredWeight:
    """A weight that the file holds sparse: name, shape, share of zeros, bytes dense and as stored."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    dense_bytes: int
    stored_bytes: int


def save_onnx_sparse(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    x: Tensor | None = None,
    *,
    threshold: float = DEFAULT_THRESHOLD,
) -> tuple[StoredWeight, ...]:
    """Write an ONNX file whose pruned weights are sparse initializers.

    The weights of Conv, ConvTranspose, Gemm and MatMul are stored in COO form: the values, and one ascending int64
    linear index each (``SparseTensorProto``).  What reads them is `load_onnx` here, ONNX's own tools, and onnxruntime
    on the CPU, which makes them dense when it loads the file: the file is smaller, not the computation.

    Parameters
    ----------
    model
        A module (not converted: the sparse kernels are no ONNX operators), or the path of an ONNX file.
    path
        The file to write; whole or not at all.
    x
        Example input of the module, whose batch stays open in the file where the model allows.
    threshold
        Weights with at least this share of zeros are stored sparse.

    Raises
    ------
    ValueError
        If the threshold is not in 0..1, the model cannot be exported, or the file would be above protobuf's 2 GB.
    TypeError
        If ``model`` is a module and ``x`` is missing.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    if isinstance(model, nn.Module):
        if x is None:
            raise TypeError("a module is exported by running it: pass an example input x")
        proto = _export(model, x)
    else:
        proto = load_checked(Path(model))
        _forget_external_files(proto)
    stored = _make_sparse(proto.graph, threshold)
    if proto.ByteSize() > LARGEST_MESSAGE:
        raise ValueError(f"the file would have {proto.ByteSize()} bytes: expected at most {LARGEST_MESSAGE}")
    blob = proto.SerializeToString()
    onnx.checker.check_model(blob)
    write_whole(path, blob)
    return stored


def _export(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    import torch

    from numbasparse.nn import SparseConv2d

    converted = [name for name, module in model.named_modules() if isinstance(module, SparseConv2d)]
    if converted:
        raise ValueError(f"layer {converted[0]!r} is converted: export the pruned model before `convert`")
    # An open batch where the model allows it; torch.export takes sizes of 0 and 1 for fixed.
    example = torch.cat([x, x]) if len(x) == 1 else x
    attempts = [(example, ({0: torch.export.Dim("batch")},)), (x, None)]
    failure: Exception | None = None
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for given, shapes in attempts:
            try:
                return _export_once(model, given, shapes)
            except Exception as error:  # torch raises many kinds
                failure = error
    finally:
        for module, was in training.items():
            module.training = was
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    raise ValueError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from failure


def _export_once(model: nn.Module, x: Tensor, shapes: tuple[object, ...] | None) -> onnx.ModelProto:
    import torch

    # The logger says that torchvision is not installed.
    with quiet("torch.onnx._internal.exporter._registration"):
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        exported = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
    assert exported is not None
    return exported.model_proto


def _forget_external_files(proto: onnx.ModelProto) -> None:
    """The weights are in the message now: the new file needs no other."""
    for tensor in proto.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _make_sparse(graph: onnx.GraphProto, threshold: float) -> tuple[StoredWeight, ...]:
    weights = {
        node.input[_WEIGHTED[node.op_type]]
        for node in graph.node
        if node.op_type in _WEIGHTED and len(node.input) > _WEIGHTED[node.op_type]
    }
    stored: list[StoredWeight] = []
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor) if tensor.name in weights else None
        sparsity = 0.0 if array is None or not array.size else 1.0 - int(np.count_nonzero(array)) / array.size
        if array is None or not array.size or sparsity < threshold:
            kept.append(tensor)
            continue
        sparse = sparse_tensor(tensor.name, array)
        graph.sparse_initializer.append(sparse)
        stored.append(StoredWeight(tensor.name, array.shape, sparsity, array.nbytes, sparse.ByteSize()))
    names = {weight.name for weight in stored}
    del graph.initializer[:]
    graph.initializer.extend(kept)
    # Some files give the dense type of initializers too, among the inputs or the values; it is no longer theirs.
    for values in (graph.input, graph.value_info):
        others = [value for value in values if value.name not in names]
        del values[:]
        values.extend(others)
    return tuple(stored)


def sparse_tensor(name: str, array: np.ndarray) -> onnx.SparseTensorProto:
    """An array in COO form with linear indices; zeros of either sign are not stored."""
    flat = array.reshape(-1)
    indices = np.flatnonzero(flat).astype(np.int64)
    values = numpy_helper.from_array(flat[indices], name)
    return onnx.helper.make_sparse_tensor(values, numpy_helper.from_array(indices, f"{name}_indices"), array.shape)
