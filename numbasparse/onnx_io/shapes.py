"""Operators that move values without computing: reshaping, slicing, joining; on tensors, constants and sizes alike.

Exporters write ``x.view(x.size(0), -1)`` as Shape, Gather, Unsqueeze, Concat and Reshape.  Such sizes become calls of
``size`` in the graph, and arithmetic of them, so that they stay open.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.onnx_io.builder import NodeContext, UnsupportedNode, Value, pads_for_torch
from numbasparse.onnx_io.source import LARGEST_TENSOR, dense_of


def constant(c: NodeContext) -> np.ndarray:
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if (value := c.attribute(name)) is not None:
            return np.asarray(value, np.float32 if "float" in name else np.int64)
    tensor = c.attribute("value")
    if tensor is not None:
        return numpy_helper.to_array(tensor)
    sparse = c.attribute("sparse_value")
    if sparse is not None:
        return dense_of(c.build.source.path, sparse)
    raise UnsupportedNode("a constant of text")


def constant_of_shape(c: NodeContext) -> np.ndarray:
    shape = c.ints(0, "the shape")
    fill = c.attribute("value")
    value = numpy_helper.to_array(fill).reshape(()) if fill is not None else np.float32(0)
    if np.prod(np.asarray(shape, float)) * value.itemsize > LARGEST_TENSOR:
        raise UnsupportedNode(f"a constant of shape {shape}: expected at most {LARGEST_TENSOR} bytes")
    return np.full(shape, value)


def identity(c: NodeContext) -> Value:
    return c.value(0)


def dropout(c: NodeContext) -> Value:
    c.one_output()
    if c.opset >= 12 and c.has(2) and bool(c.constant(2, "training_mode")):
        raise UnsupportedNode("input training_mode is true: expected a model exported for inference")
    return c.value(0)


def cast(c: NodeContext) -> Value:
    to = helper.tensor_dtype_to_np_dtype(c.attribute("to"))
    value = c.value(0)
    if isinstance(value, np.ndarray):
        return value if value.dtype == object else value.astype(to)
    try:
        dtype = torch.from_numpy(np.zeros(0, to)).dtype
    except TypeError:
        raise UnsupportedNode(f"attribute to={to}, which torch does not have") from None
    return c.build.graph.call_method("to", (value, dtype))


def shape(c: NodeContext) -> np.ndarray:
    """Sizes of a tensor: read when the model runs, so that no size is fixed by it."""
    value = c.value(0)
    if isinstance(value, np.ndarray):
        sizes: list[Any] = list(value.shape)
    else:
        sizes = [c.build.size(value, axis) for axis in range(c.rank(0))]
    return np.asarray(sizes, dtype=object)[c.attribute("start", 0) : c.attribute("end")]


def gather(c: NodeContext) -> Value:
    axis = c.attribute("axis", 0)
    indices = c.constant(1, "indices")
    value = c.value(0)
    if isinstance(value, np.ndarray):
        return np.asarray(np.take(value, indices, axis=axis), dtype=value.dtype)
    if indices.ndim == 0:
        return c.build.call(torch.select, value, axis, int(indices))
    if indices.ndim == 1:
        return c.build.call(torch.index_select, value, axis, c.build.buffer(_from_zero(c, indices, axis)))
    raise UnsupportedNode(f"indices of rank {indices.ndim} (supported: 0, 1)")


def _from_zero(c: NodeContext, indices: np.ndarray, axis: int) -> np.ndarray:
    if (indices >= 0).all():
        return indices
    size = c.shape(0)[axis]
    if size is None:
        raise UnsupportedNode("indices below 0 along an open size")
    return np.where(indices < 0, indices + size, indices)


def slice_(c: NodeContext) -> Value:
    if c.opset < 10:
        starts, ends = list(c.attribute("starts")), list(c.attribute("ends"))
        axes, steps = c.attribute("axes"), None
    else:
        starts, ends = c.ints(1, "starts"), c.ints(2, "ends")
        axes = c.ints(3, "axes") if c.has(3) else None
        steps = c.ints(4, "steps") if c.has(4) else None
    value = c.value(0)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if min(steps, default=1) < 1:
        raise UnsupportedNode(f"steps {steps} (supported: above 0)")
    rank = value.ndim if isinstance(value, np.ndarray) else c.rank(0)
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    if isinstance(value, np.ndarray):
        return value[tuple(index)]
    return c.build.call(operator.getitem, value, tuple(index))


def split(c: NodeContext) -> list[Value]:
    axis = c.attribute("axis", 0)
    parts = len(c.node.output)
    sizes = list(c.attribute("split", [])) if c.opset < 13 else (c.ints(1, "split") if c.has(1) else [])
    if not sizes:
        size = c.shape(0)[axis]
        if size is None:
            raise UnsupportedNode("equal parts of an open size")
        part = -(-size // parts)
        sizes = [part] * (parts - 1) + [size - part * (parts - 1)]
    pieces = c.build.call(torch.split, c.tensor(0), sizes, axis)
    return [c.build.call(operator.getitem, pieces, i) for i in range(parts)]


def concat(c: NodeContext) -> Value:
    axis = c.attribute("axis")
    values = [c.value(i) for i in range(len(c.node.input))]
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    if len(arrays) == len(values):
        kind = object if any(a.dtype == object for a in arrays) else arrays[0].dtype
        return np.concatenate([a.astype(kind) for a in arrays], axis=axis)
    return c.build.call(torch.cat, [c.tensor(i) for i in range(len(values))], axis)


def _axes(c: NodeContext, since: int) -> list[int] | None:
    """Axes: an attribute before some opset, an input since."""
    if c.opset < since:
        found = c.attribute("axes")
        return None if found is None else list(found)
    return c.ints(1, "axes") if c.has(1) else None


def unsqueeze(c: NodeContext) -> Value:
    axes = _axes(c, 13)
    if axes is None:
        raise UnsupportedNode("axes are missing")
    value = c.value(0)
    if isinstance(value, np.ndarray):
        return np.expand_dims(value, tuple(axes))
    rank = c.rank(0) + len(axes)
    for axis in sorted(c.axis(a, rank) for a in axes):
        value = c.build.call(torch.unsqueeze, value, axis)
    return value


def squeeze(c: NodeContext) -> Value:
    axes = _axes(c, 13)
    value = c.value(0)
    if isinstance(value, np.ndarray):
        return np.squeeze(value, None if axes is None else tuple(axes))
    if axes is None:
        axes = [i for i, size in enumerate(c.shape(0)) if size == 1 and i > 0]
        if any(size is None for size in c.shape(0)[1:]) or c.shape(0)[0] == 1:
            raise UnsupportedNode("axes are missing, and the batch or another size is open or 1")
    return c.build.call(torch.squeeze, value, tuple(c.axis(a) for a in axes))


def transpose(c: NodeContext) -> Value:
    value = c.value(0)
    order = c.attribute("perm")
    if isinstance(value, np.ndarray):
        return np.transpose(value, order)
    order = list(order) if order is not None else list(range(c.rank(0)))[::-1]
    return c.build.call(torch.permute, value, tuple(order))


def flatten(c: NodeContext) -> fx.Node:
    axis = c.attribute("axis", 1)
    axis = axis if axis >= 0 else c.axis(axis)
    x = c.tensor(0)
    if axis == 0:
        return c.build.call(torch.reshape, x, (1, -1))
    if axis > 1:
        x = c.build.call(torch.flatten, x, 0, axis - 1)
    return c.build.module(nn.Flatten(1), x)


def reshape(c: NodeContext) -> Value:
    target = c.value(1)
    if isinstance(target, fx.Node):
        raise UnsupportedNode("a shape (input 1) that is computed from values of tensors", c.node.input[1])
    value = c.value(0)
    sizes = [s if isinstance(s, fx.Node) else int(s) for s in target.reshape(-1)]
    if isinstance(value, np.ndarray):
        return _reshaped_array(c, value, sizes)
    if not c.attribute("allowzero", 0):
        sizes = [c.build.size(value, i) if s == 0 else s for i, s in enumerate(sizes)]
    if sizes and _is_batch(c, sizes[0]):
        sizes[0] = c.build.size(value, 0)
    if len(sizes) == 2 and _is_size_of(sizes[0], value) and sizes[1] == -1:
        return c.build.module(nn.Flatten(1), value)
    return c.build.call(torch.reshape, value, tuple(sizes))


def _reshaped_array(c: NodeContext, value: np.ndarray, sizes: list[Any]) -> np.ndarray:
    if any(isinstance(s, fx.Node) for s in sizes):
        raise UnsupportedNode("a constant reshaped by sizes of a tensor")
    return value.reshape(
        [value.shape[i] if s == 0 and not c.attribute("allowzero", 0) else s for i, s in enumerate(sizes)]
    )


def _is_batch(c: NodeContext, size: Any) -> bool:
    """Whether a number in a shape is the batch that the file declares: then any other batch may take its place."""
    declared = c.build.source.declared[0]
    return isinstance(size, int) and size == declared and c._shape(0)[:1] == (declared,)


def _is_size_of(size: Any, x: fx.Node) -> bool:
    return isinstance(size, fx.Node) and size.target == "size" and size.args == (x, 0)


def expand(c: NodeContext) -> fx.Node:
    target = c.value(1)
    if isinstance(target, fx.Node):
        raise UnsupportedNode("a shape (input 1) that is computed from values of tensors", c.node.input[1])
    sizes = tuple(-1 if not isinstance(s, fx.Node) and s == 1 else s for s in target.reshape(-1).tolist())
    if len(sizes) < c.rank(0):
        raise UnsupportedNode("a shape of fewer dimensions than the tensor")
    return c.build.graph.call_method("expand", (c.tensor(0), *sizes))


def pad(c: NodeContext) -> fx.Node:
    mode = c.expect("mode", "constant", "reflect", "edge")
    if c.opset < 11:
        pads, value = list(c.attribute("pads")), float(c.attribute("value", 0.0))
    else:
        pads = c.ints(1, "pads")
        value = float(c.constant(2, "the value")) if c.has(2) else 0.0
    rank = c.rank(0)
    if c.has(3) and c.opset >= 18:
        axes = [c.axis(a) for a in c.ints(3, "axes")]
        full = [0] * 2 * rank
        for i, axis in enumerate(axes):
            full[axis], full[rank + axis] = pads[i], pads[len(axes) + i]
        pads = full
    begin, end = pads[:rank], pads[rank:]
    if mode == "constant":
        return c.build.call(F.pad, c.tensor(0), pads_for_torch(begin, end), "constant", value)
    if any(begin[:2]) or any(end[:2]) or rank < 3:
        raise UnsupportedNode(f"attribute mode={mode!r} with pads {pads} (supported: spatial dimensions alone)")
    torchs = {"reflect": "reflect", "edge": "replicate"}[mode]
    return c.build.call(F.pad, c.tensor(0), pads_for_torch(begin[2:], end[2:]), torchs)


def reduce_mean(c: NodeContext) -> fx.Node:
    axes = _axes(c, 18)
    if not axes:
        raise UnsupportedNode("a mean over all axes")
    return c.build.call(torch.mean, c.tensor(0), tuple(axes), bool(c.attribute("keepdims", 1)))
