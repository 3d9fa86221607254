"""Gradient of ``numbasparse::conv2d`` with respect to its input, bias and residual, through the dense transpose.

For fine-tuning what stands before a converted layer, for attribution, for adversarial examples.  The convolution
back is torch's dense one, in its precision; the sparse weight itself has no gradient.  Nothing here but operations
of torch, so that ``torch.compile`` can trace it and gradients of gradients exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from numbasparse.activations import slope_of

_INPUTS = 14
_X, _VALUES, _BIAS, _RESIDUAL = 0, 1, 4, 13


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what `backward` needs: the weight; the result, or for SiLU the input."""
    x, values, indices, indptr, bias, *_, groups, activation, _, _, residual = inputs
    kept = {"none": None, "silu": x}.get(activation, output)
    ctx.save_for_backward(values, indices, indptr, bias, kept, residual if activation == "silu" else None)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.kernel_shape, ctx.stride, ctx.padding, ctx.dilation = inputs[5:9]
    ctx.groups, ctx.activation = groups, activation


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's inputs; None for all but input, bias and residual.

    Raises
    ------
    NotImplementedError
        If the sparse weight asks for a gradient.
    """
    if ctx.needs_input_grad[_VALUES]:
        raise NotImplementedError(
            "numbasparse::conv2d has no gradient for its sparse weight: train the dense model (see "
            "numbasparse.pruning) and convert it afterwards"
        )
    values, indices, indptr, bias, kept, _ = ctx.saved_tensors
    wanted: list[Tensor | None] = [None] * _INPUTS
    grad = _through_activation(ctx, grad, kept)
    if ctx.needs_input_grad[_X]:
        wanted[_X] = _of_input(ctx, grad, _dense(ctx, values, indices, indptr))
    if ctx.needs_input_grad[_BIAS]:
        wanted[_BIAS] = grad.sum((0, 2, 3)).to(bias.dtype)
    # An argument that was left out is not among the inputs.
    if any(ctx.needs_input_grad[_RESIDUAL:]):
        wanted[_RESIDUAL] = grad.to(ctx.residual_dtype)
    return tuple(wanted)


def _through_activation(ctx: Any, grad: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return grad
    if ctx.activation == "silu":
        # The sum before the activation is not kept: it takes as much memory as the result.
        values, indices, indptr, bias, x, residual = ctx.saved_tensors
        shape = (ctx.kernel_shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
        y = torch.ops.numbasparse.conv2d.default(x, values, indices, indptr, bias, *shape, "none", "", "", residual)
        sigmoid = torch.sigmoid(y)
        return grad * sigmoid * (1 + y * (1 - sigmoid))
    slope = slope_of(ctx.activation)
    if slope is not None:
        return torch.where(kept > 0, grad, grad * slope)
    inside = kept > 0 if ctx.activation == "relu" else (kept > 0) & (kept < 6)
    return torch.where(inside, grad, torch.zeros_like(grad))


def _dense(ctx: Any, values: Tensor, indices: Tensor, indptr: Tensor) -> Tensor:
    """The weight (K, C/groups, R, S), float32."""
    if values.dtype == torch.uint8:
        made: Tensor = torch.ops.numbasparse._dense_weight.default(
            values, indices, indptr, ctx.kernel_shape, ctx.groups
        )
        return made
    c_per_group, r, s = ctx.kernel_shape
    k = indptr.shape[0] - 1
    number = torch.arange(values.shape[0], device=values.device, dtype=indptr.dtype)
    row = torch.searchsorted(indptr, number, right=True) - 1
    flat = values.new_zeros((k, c_per_group * r * s))
    return flat.index_put((row, indices.long()), values).view(k, c_per_group, r, s)


def _of_input(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
    n, c, h, w = ctx.x_shape
    top, bottom, left, right = ctx.padding
    # As forwards: the CPU and float64 compute in float32.
    dtype = ctx.x_dtype if grad.is_cuda and ctx.x_dtype != torch.float64 else torch.float32
    # The padding may differ on two sides, which torch's convolutions cannot: take the gradient of the padded input.
    padded = conv2d_input(
        (n, c, h + top + bottom, w + left + right),
        weight.to(dtype),
        grad.to(dtype),
        ctx.stride,
        0,
        ctx.dilation,
        ctx.groups,
    )
    return padded[:, :, top : top + h, left : left + w].to(ctx.x_dtype)
