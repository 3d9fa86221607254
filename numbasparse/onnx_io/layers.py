"""Operators that become layers: convolution, Gemm, batch normalization, pooling, activations, resizing.

Each function takes a `NodeContext` and returns the node's output.  Source of every rule: ONNX's operator reference
(https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.onnx_io.builder import NodeContext, UnsupportedNode, pads_for_torch, tensor_of
from numbasparse.onnx_io.modules import AveragePoolNoPad, DepthToSpaceDCR, HardSigmoid, SpaceToDepth

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_GLOBAL_POOLS: dict[str, dict[int, Any]] = {
    "GlobalAveragePool": {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d},
    "GlobalMaxPool": {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d, 5: nn.AdaptiveMaxPool3d},
}


def _by_rank(table: dict[int, Any], rank: int, what: str) -> Any:
    if rank not in table:
        raise UnsupportedNode(f"{what} of rank {rank} (supported: {', '.join(map(str, table))})")
    return table[rank]


def _pads(c: NodeContext, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[Any, Any]:
    """Pads before and after each spatial dimension, by ``pads`` or ``auto_pad``."""
    mode = c.expect("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    n = len(kernel)
    if mode == "VALID":
        return [0] * n, [0] * n
    if mode == "NOTSET":
        pads = list(c.attribute("pads", [0] * 2 * n))
        if min(pads) < 0:
            raise UnsupportedNode(f"attribute pads={pads} (supported: none below 0)")
        return pads[:n], pads[n:]
    # With a stride of 1 the pads do not depend on the input's size: nothing is fixed by it.
    sizes = c.known_sizes(0) if max(stride) > 1 else [0] * n
    begin, end = [], []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        left_over = (size % s or s) if s > 1 else 1
        total = max(d * (k - 1) + 1 - left_over, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return begin, end


def _padded(c: NodeContext, begin: Sequence[int], end: Sequence[int], value: float) -> fx.Node:
    x = c.tensor(0)
    if not any(begin) and not any(end):
        return x
    return c.build.call(F.pad, x, pads_for_torch(begin, end), "constant", value)


def conv(c: NodeContext) -> fx.Node:
    weight = tensor_of(c.constant(1, "the weight"))
    n = weight.dim() - 2
    kernel = list(weight.shape[2:])
    stride, dilation = list(c.attribute("strides", [1] * n)), list(c.attribute("dilations", [1] * n))
    begin, end = _pads(c, kernel, stride, dilation)
    even = begin == end
    x = c.tensor(0) if even else _padded(c, begin, end, 0.0)
    groups = c.attribute("group", 1)
    bias = tensor_of(c.constant(2, "the bias")) if c.has(2) else None
    made = _by_rank(_CONVS, n, "convolution")(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(kernel),
        stride=tuple(stride),
        padding=tuple(begin) if even else 0,
        dilation=tuple(dilation),
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    return c.build.module(_with(made, weight, bias), x)


def _with(module: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.contiguous())
    return module


def gemm(c: NodeContext) -> fx.Node:
    c.expect("transA", 0)
    weight = tensor_of(c.constant(1, "the weight")) * c.attribute("alpha", 1.0)
    weight = weight if c.attribute("transB", 0) else weight.T
    bias = None
    if c.has(2):
        array = c.constant(2, "the bias") * np.asarray(c.attribute("beta", 1.0), weight.numpy().dtype)
        if array.size != 1 and (array.size != len(weight) or array.shape[-1] != array.size):
            raise UnsupportedNode(f"a bias of shape {array.shape} (supported: one number per output)")
        bias = tensor_of(np.broadcast_to(array.reshape(-1), (len(weight),)))
    return c.build.module(_linear(weight, bias), c.tensor(0))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    outputs, inputs = weight.shape
    return _with(nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype), weight, bias)


def matmul(c: NodeContext) -> fx.Node:
    b = c.value(1)
    if isinstance(b, np.ndarray) and b.ndim == 2:
        return c.build.module(_linear(tensor_of(b).T, None), c.tensor(0))
    return c.build.call(torch.matmul, c.tensor(0), c.tensor(1))


def batch_norm(c: NodeContext) -> fx.Node:
    c.expect("training_mode", 0)
    c.expect("spatial", 1)
    c.one_output()
    weight, bias, mean, variance = (
        tensor_of(c.constant(i, what)) for i, what in enumerate(("scale", "bias", "mean", "variance"), 1)
    )
    made = _by_rank(_NORMS, c.rank(0), "batch normalization")(
        len(weight), eps=c.attribute("epsilon", 1e-5), dtype=weight.dtype
    )
    made.running_mean, made.running_var = mean, variance
    return c.build.module(_with(made, weight, bias), c.tensor(0))


def instance_norm(c: NodeContext) -> fx.Node:
    weight, bias = tensor_of(c.constant(1, "scale")), tensor_of(c.constant(2, "bias"))
    made = _by_rank(_INSTANCE_NORMS, c.rank(0), "instance normalization")(
        len(weight), eps=c.attribute("epsilon", 1e-5), affine=True, dtype=weight.dtype
    )
    return c.build.module(_with(made, weight, bias), c.tensor(0))


def _window(c: NodeContext) -> tuple[list[int], list[int], list[int], Any, Any]:
    kernel = list(c.attribute("kernel_shape"))
    stride = list(c.attribute("strides", [1] * len(kernel)))
    dilation = list(c.attribute("dilations", [1] * len(kernel)))
    return kernel, stride, dilation, *_pads(c, kernel, stride, dilation)


def _fits_torch(begin: Sequence[int], end: Sequence[int], kernel: Sequence[int]) -> bool:
    return list(begin) == list(end) and all(p <= k // 2 for p, k in zip(begin, kernel, strict=True))


def _ceil(c: NodeContext, separate_pad: bool) -> bool:
    """Whether the output's size is rounded up; a pad of its own would let windows start in the padding after."""
    if c.attribute("ceil_mode", 0) and separate_pad:
        raise UnsupportedNode("attribute ceil_mode=1 with uneven or wide padding")
    return bool(c.attribute("ceil_mode", 0))


def max_pool(c: NodeContext) -> fx.Node:
    c.one_output()
    kernel, stride, dilation, begin, end = _window(c)
    inside = _fits_torch(begin, end, kernel)
    x = c.tensor(0) if inside else _padded(c, begin, end, float("-inf"))
    padding = tuple(begin) if inside else 0
    pool = _by_rank(_MAX_POOLS, len(kernel), "pooling")
    options = {"dilation": tuple(dilation), "ceil_mode": _ceil(c, not inside)}
    return c.build.module(pool(tuple(kernel), tuple(stride), padding, **options), x)


def average_pool(c: NodeContext) -> fx.Node:
    kernel, stride, dilation, begin, end = _window(c)
    if max(dilation) > 1:
        raise UnsupportedNode(f"attribute dilations={dilation} (supported: 1)")
    pool = _by_rank(_AVERAGE_POOLS, len(kernel), "pooling")
    count_pad = bool(c.attribute("count_include_pad", 0))
    inside = _fits_torch(begin, end, kernel)
    ceil = _ceil(c, not inside)
    if inside:
        made = pool(tuple(kernel), tuple(stride), tuple(begin), ceil_mode=ceil, count_include_pad=count_pad)
        return c.build.module(made, c.tensor(0))
    made = pool(tuple(kernel), tuple(stride))
    if count_pad:
        return c.build.module(made, _padded(c, begin, end, 0.0))
    return c.build.module(AveragePoolNoPad(made, pads_for_torch(begin, end)), c.tensor(0))


def global_pool(c: NodeContext) -> fx.Node:
    return c.build.module(_by_rank(_GLOBAL_POOLS[c.node.op_type], c.rank(0), "pooling")(1), c.tensor(0))


def clip(c: NodeContext) -> fx.Node:
    if c.opset < 11:
        low, high = c.attribute("min"), c.attribute("max")
    else:
        low, high = (float(c.constant(i, w)) if c.has(i) else None for i, w in ((1, "min"), (2, "max")))
    if low is None and high is None:
        return c.tensor(0)
    if (low, high) == (0.0, 6.0):
        return c.build.module(nn.ReLU6(), c.tensor(0))
    if low is not None and high is not None and low < high:
        return c.build.module(nn.Hardtanh(low, high), c.tensor(0))
    return c.build.call(torch.clamp, c.tensor(0), min=low, max=high)


def hard_sigmoid(c: NodeContext) -> fx.Node:
    alpha, beta = c.attribute("alpha", 0.2), c.attribute("beta", 0.5)
    torchs = abs(alpha - 1 / 6) < 1e-6 and beta == 0.5
    return c.build.module(nn.Hardsigmoid() if torchs else HardSigmoid(alpha, beta), c.tensor(0))


def prelu(c: NodeContext) -> fx.Node:
    slope = c.constant(1, "the slope")
    if slope.size > 1 and (slope.ndim != c.rank(0) - 1 or slope.shape[0] != slope.size):
        raise UnsupportedNode(f"a slope of shape {slope.shape} (supported: one number, or one per channel)")
    made = nn.PReLU(slope.size)
    return c.build.module(_with(made, tensor_of(slope.reshape(-1)), None), c.tensor(0))


def softmax(c: NodeContext) -> fx.Node:
    kind = nn.Softmax if c.node.op_type == "Softmax" else nn.LogSoftmax
    axis = c.attribute("axis", -1 if c.opset >= 13 else 1)
    if c.opset < 13 and c.axis(axis) != c.rank(0) - 1:  # it was over all axes from this one on
        raise UnsupportedNode(f"attribute axis={axis} before opset 13 (supported: the last axis)")
    return c.build.module(kind(dim=axis), c.tensor(0))


def multiply(c: NodeContext) -> fx.Node:
    """A product; ``x * sigmoid(x)`` and ``x * hardsigmoid(x)`` are the activations that they are."""
    for gate, x in ((0, 1), (1, 0)):
        source, made = c.value(gate), c.build.module_called(c.value(gate))
        if isinstance(source, fx.Node) and made is not None and source.args[0] is c.value(x):
            if type(made) is nn.Sigmoid:
                return c.build.module(nn.SiLU(), c.tensor(x))
            if type(made) is nn.Hardsigmoid:
                return c.build.module(nn.Hardswish(), c.tensor(x))
    return binary(torch.mul, operator.mul)(c)


def binary(function: Callable[..., Any], on_sizes: Callable[..., Any]) -> Callable[[NodeContext], Any]:
    """An operator of two tensors that broadcast, or of sizes and constants."""

    def build(c: NodeContext) -> Any:
        a, b = c.value(0), c.value(1)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return sizes_of(c, on_sizes, a, b)
        return c.build.call(function, _number_or_tensor(c, 0), _number_or_tensor(c, 1))

    return build


def sizes_of(c: NodeContext, function: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Arithmetic of constants now, and of sizes when the model runs."""
    if a.dtype != object and b.dtype != object:
        return np.asarray(function(a, b), dtype=np.result_type(a, b))

    def one(x: Any, y: Any) -> Any:
        return c.build.call(function, x, y) if isinstance(x, fx.Node) or isinstance(y, fx.Node) else function(x, y)

    return np.asarray(np.frompyfunc(one, 2, 1)(a, b), dtype=object)


def _number_or_tensor(c: NodeContext, index: int) -> Any:
    value = c.value(index)
    if isinstance(value, np.ndarray) and value.dtype != object and value.size == 1 and value.ndim <= 1:
        return float(value.reshape(())) if value.dtype.kind == "f" else value.reshape(()).item()
    return c.tensor(index)


def divide_sizes(a: Any, b: Any) -> Any:
    """Integers are divided as in C; sizes are never negative."""
    if isinstance(a, np.ndarray) and a.dtype.kind == "f":
        return a / b
    return a // b


def depth_to_space(c: NodeContext) -> fx.Node:
    block = c.attribute("blocksize")
    mode = c.expect("mode", "DCR", "CRD")
    return c.build.module(nn.PixelShuffle(block) if mode == "CRD" else DepthToSpaceDCR(block), c.tensor(0))


def space_to_depth(c: NodeContext) -> fx.Node:
    return c.build.module(SpaceToDepth(c.attribute("blocksize")), c.tensor(0))


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def upsample(c: NodeContext) -> fx.Node:
    """Opsets 7 to 9: nearest of asymmetric coordinates, rounded down."""
    c.expect("mode", "nearest")
    scales = c.attribute("scales") if c.opset < 9 else c.constant(1, "scales").tolist()
    return _scaled(c, scales, "nearest", None)


def resize(c: NodeContext) -> fx.Node:
    for name, value in (("antialias", 0), ("exclude_outside", 0), ("keep_aspect_ratio_policy", "stretch")):
        c.expect(name, value)
    if c.attribute("axes") is not None:
        raise UnsupportedNode("attribute axes (supported: all axes)")
    mode = c.expect("mode", "nearest", "linear", "cubic")
    at = 1 if c.opset < 11 else 2
    sizes = c.value(3) if c.has(3) else None
    scales = None
    if sizes is None:
        if not c.has(at):
            raise UnsupportedNode("neither scales nor sizes")
        scales = [float(s) for s in c.constant(at, "scales").reshape(-1)]
    align = _coordinates(c, mode, scales)
    if scales is not None:
        return _scaled(c, scales, mode, align)
    assert sizes is not None
    if isinstance(sizes, fx.Node):
        raise UnsupportedNode("sizes (input 3) are computed from values of tensors", c.node.input[3])
    spatial = list(sizes.reshape(-1)[2:])
    size = [s if isinstance(s, fx.Node) else int(s) for s in spatial]
    return c.build.call(F.interpolate, c.tensor(0), size=size, mode=_mode(mode, len(size)), align_corners=align)


def _coordinates(c: NodeContext, mode: str, scales: Sequence[float] | None) -> bool | None:
    """torch's ``align_corners`` for the coordinates of the node."""
    if c.opset < 11:
        if mode != "nearest":
            raise UnsupportedNode(f"attribute mode={mode!r} before opset 11, whose coordinates torch does not have")
        return None
    where = c.attribute("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        rounding = c.attribute("nearest_mode", "round_prefer_floor")
        # A whole number of copies of each input: whatever half-way case a rounding differs in does not occur.
        whole = scales is not None and all(s == int(s) for s in scales)
        repeats = where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer")
        if (where, rounding) != ("asymmetric", "floor") and not (whole and repeats):
            raise UnsupportedNode(
                f"attributes coordinate_transformation_mode={where!r} and nearest_mode={rounding!r} (supported: "
                "'asymmetric' with 'floor', or 'half_pixel' with rounding and whole scales)"
            )
        return None
    if mode == "cubic" and abs(c.attribute("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        raise UnsupportedNode(f"attribute cubic_coeff_a={c.attribute('cubic_coeff_a')} (supported: -0.75)")
    return c.expect("coordinate_transformation_mode", "half_pixel", "pytorch_half_pixel", "align_corners") == (
        "align_corners"
    )


def _mode(mode: str, spatial: int) -> str:
    if mode == "linear":
        return _by_rank(_LINEAR, spatial, "resizing")
    if mode == "cubic" and spatial != 2:
        raise UnsupportedNode("attribute mode='cubic' on other than images")
    return "bicubic" if mode == "cubic" else mode


def _scaled(c: NodeContext, scales: Sequence[float], mode: str, align: bool | None) -> fx.Node:
    if list(scales[:2]) != [1.0, 1.0]:
        raise UnsupportedNode(f"scales {list(scales)} (supported: 1 for batch and channels)")
    factors = tuple(float(s) for s in scales[2:])
    made = nn.Upsample(scale_factor=factors, mode=_mode(mode, len(factors)), align_corners=align)
    return c.build.module(made, c.tensor(0))


def module(make: Callable[[NodeContext], nn.Module]) -> Callable[[NodeContext], fx.Node]:
    """An operator of one tensor that is a torch module."""
    return lambda c: c.build.module(make(c), c.tensor(0))


def function(made: Callable[..., Any]) -> Callable[[NodeContext], fx.Node]:
    """An operator of one tensor that is a torch function."""
    return lambda c: c.build.call(made, c.tensor(0))
