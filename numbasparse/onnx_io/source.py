"""Reading an ONNX file: validity, versions, external data, constants and shapes, before anything is built.

A file is data: nothing of it is executed, and no text of it ends up in generated code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

OLDEST_OPSET = 7
"""Before opset 7 broadcasting was by attributes; older files are refused and can be converted by their owner."""

LARGEST_TENSOR = 2**31
"""Bytes: a sparse initializer or a filled constant of a few bytes in the file may claim any size."""

_DOMAINS = ("", "ai.onnx")


class UnsupportedOnnxError(ValueError):
    """The file is valid, but holds nodes that cannot be imported: ``nodes`` lists all of them, one text each."""

    def __init__(self, path: str | os.PathLike[str], nodes: Sequence[str]) -> None:
        self.nodes = list(nodes)
        super().__init__(
            f"{path} has {len(self.nodes)} node(s) that cannot be imported: {'; '.join(self.nodes)}. "
            "Nothing was imported; with the fall-back the whole model runs through onnxruntime, not accelerated"
        )


@dataclass
class Source:
    """A checked ONNX model.

    Attributes
    ----------
    path : Path
    opset : int
        Version of the standard operators.
    nodes : list of NodeProto
        In topological order.
    constants : dict
        Initializers, sparse ones made dense, by name.
    input : str
        Name of the one input that is no initializer.
    outputs : list of str
    shapes : dict
        Inferred shapes by value; ``None`` for a size that the file leaves open.
    declared : tuple
        Shape of the input as the file declares it.
    """

    path: Path
    opset: int
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    input: str
    outputs: list[str]
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    declared: tuple[int | None, ...] = ()


def read_onnx(path: str | os.PathLike[str], shape: Sequence[int] | None = None) -> Source:
    """Read and check a file.

    Parameters
    ----------
    path
        The file; external data lie in files beside it.
    shape
        Sizes of the input, for those that the file leaves open.

    Raises
    ------
    OSError
        If there is no such file, or its external data are missing or outside its folder.
    ValueError
        If it is no valid ONNX model, its versions are out of range, it has not exactly one input of floats, or
        ``shape`` contradicts it.
    """
    path = Path(path)
    model = load_checked(path)
    opset = _opset(path, model)
    constants = _constants(path, model.graph)
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs)
        raise ValueError(f"{path} has {len(inputs)} inputs ({names}): expected a model with one input")
    declared = _declared_shape(path, inputs[0])
    if shape is not None:
        _fix_shape(path, inputs[0], declared, shape)
    return Source(
        path=path,
        opset=opset,
        nodes=list(model.graph.node),
        constants=constants,
        input=inputs[0].name,
        outputs=[value.name for value in model.graph.output],
        shapes=_shapes(path, model),
        declared=declared,
    )


def load_checked(path: Path) -> onnx.ModelProto:
    """Load a model with its external data and run ONNX's own checker on it; errors as `read_onnx`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises kinds of its own
        raise ValueError(f"{path} is no ONNX file: {error}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise ValueError(f"{path} is no ONNX file: it has no graph or names no operator set")
    try:
        # Refuses absolute paths, links, and paths that leave the folder.
        onnx.load_external_data_for_model(model, str(path.resolve().parent))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise OSError(f"{path} keeps weights in other files, which must lie beside it: {error}") from error
    try:
        # By path: a model of more than 2 GB does not fit in one protobuf message.
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise ValueError(f"{path} is no valid ONNX model: {error}") from error
    return model


def _opset(path: Path, model: onnx.ModelProto) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = next((versions[domain] for domain in _DOMAINS if domain in versions), None)
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        raise ValueError(f"{path} uses only the operators of {sorted(versions)}: expected ONNX's own operator set")
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"{path} uses opset {opset}: expected {OLDEST_OPSET} to {newest}; "
            "convert it with onnx.version_converter, or install a newer onnx"
        )
    return opset


def _constants(path: Path, graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        constants[sparse.values.name] = dense_of(path, sparse)
    return constants


def dense_of(path: Path, sparse: onnx.SparseTensorProto) -> np.ndarray:
    """The dense array of a sparse tensor in COO form, with linear ([nnz]) or coordinate ([nnz, rank]) indices.

    Source: SparseTensorProto in onnx.proto.
    """
    name, dims = sparse.values.name, tuple(sparse.dims)
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    size = math.prod(dims)
    if size * values.itemsize > LARGEST_TENSOR:
        raise ValueError(f"sparse initializer {name!r} of {path} is {dims}: expected at most {LARGEST_TENSOR} bytes")
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dims)
    if indices.shape != values.shape or (len(indices) and not 0 <= indices.min() <= indices.max() < size):
        raise ValueError(f"sparse initializer {name!r} of {path} has indices that do not fit its shape {dims}")
    dense = np.zeros(size, values.dtype)
    dense[indices] = values
    return dense.reshape(dims)


def _declared_shape(path: Path, value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    tensor = value.type.tensor_type
    allowed = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    if tensor.elem_type not in allowed:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ValueError(f"input {value.name!r} of {path} holds {kind}: expected floating-point numbers")
    if not tensor.HasField("shape"):
        raise ValueError(f"input {value.name!r} of {path} has no rank: expected a shape like (N, 3, 224, 224)")
    return _sizes(tensor)


def _sizes(tensor: onnx.TypeProto.Tensor) -> tuple[int | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)


def _fix_shape(path: Path, value: onnx.ValueInfoProto, declared: tuple[int | None, ...], shape: Sequence[int]) -> None:
    """Write the sizes that the file leaves open into it; the batch (the first one) stays as declared."""
    fits = len(shape) == len(declared) and all(d in (None, s) for d, s in zip(declared[1:], shape[1:], strict=True))
    if not fits:
        raise ValueError(f"input {value.name!r} of {path} has shape {shape_text(declared)}, not {tuple(shape)}")
    for dim, size in list(zip(value.type.tensor_type.shape.dim, shape, strict=True))[1:]:
        dim.dim_value = size


def shape_text(shape: Sequence[int | None]) -> str:
    """A shape for people, with a question mark for an open size."""
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _shapes(path: Path, model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    try:
        inferred = onnx.shape_inference.infer_shapes(without_big_constants(model), data_prop=True).graph
    except Exception as error:
        raise ValueError(f"the shapes of {path} cannot be inferred: {error}") from error
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {v.name: _sizes(v.type.tensor_type) for v in values if v.type.tensor_type.HasField("shape")}


def without_big_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference: initializers of many elements become inputs of their shape."""
    small = onnx.ModelProto()
    small.ir_version = model.ir_version
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    graph, old = small.graph, model.graph
    graph.name = old.name
    graph.node.extend(old.node)
    graph.input.extend(old.input)
    graph.output.extend(old.output)
    known = {value.name for value in old.input}
    big = [(t.name, t.data_type, t.dims) for t in old.initializer if math.prod(t.dims) > 64]
    big += [(s.values.name, s.values.data_type, s.dims) for s in old.sparse_initializer]
    graph.initializer.extend(t for t in old.initializer if math.prod(t.dims) <= 64)
    for name, kind, dims in big:
        if name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(dims)))
    return small
