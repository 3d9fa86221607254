"""`SparseConv2d`: a module in place of ``nn.Conv2d`` whose weight is a sparse matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from numbasparse.activations import check_activation, in_torch
from numbasparse.kernels import kernel
from numbasparse.nn.operator import cached_plan, convolve
from numbasparse.plans import Choice, Plan
from numbasparse.runtime.layouts import LAYOUTS, Layout
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

ChoiceLike = Choice | Mapping[str, Any] | str | None
"""A `Choice`, ``{"kernel": name, "config": {...}}``, a kernel's name, or None for the stated default."""

_ARRAYS = ("values", "indices", "indptr")


class SparseConv2d(nn.Module):
    """A 2-D convolution with a fixed sparse weight, on the CPU or a GPU.

    Parameters
    ----------
    weight : SparseWeight
        (K, C/groups, R, S); copied.
    bias : Tensor, (K,), optional
        Copied.
    stride, padding, dilation
        As for ``nn.Conv2d``; padding may also be ((top, bottom), (left, right)).
    activation : None, "relu", "relu6", "silu" or "leaky_relu(SLOPE)"
        Applied to the output before it is written.
    choice : Choice, mapping, str, optional
        Which kernel and config; see `ChoiceLike`. Where it cannot run an input's shape, the stated default
        for that shape takes its place.
    out_layout : "NCHW", "NHWC" or "CHWN", optional
        On a GPU: order of the result in memory; None is that of the input.

    Attributes
    ----------
    values, indices, indptr : Tensor
        Buffers: the CSR matrix, float32 (nnz,), int32 (nnz,), int32 (K + 1,). The ``values`` of a quantized weight
        are uint8, see `SparseWeight.encoded`. ``half()`` and the like leave ``values`` as they are: everything is
        computed in float32.
    bias : Tensor or None
        Buffer, float32 (K,), which ``half()`` and the like leave as it is too: of another type it would be converted
        at every call.
    in_channels, out_channels, kernel_size, stride, dilation, groups
        As in ``nn.Conv2d``.
    padding : (int, int, int, int)
        (top, bottom, left, right).
    activation : str
        "none" or its name.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit each other, an unknown kernel or activation.

    Notes
    -----
    Packed weights and compiled code are cached by the operator per shape of the input and notice every change
    of the buffers except one made through ``.data`` (and on a GPU changes of tensors made in inference mode).
    ``.to("cuda")`` moves the buffers; the weight is packed anew on the device at the first call with a shape.
    There are gradients with respect to input and bias, none for the sparse weight: asking for one raises
    NotImplementedError.
    """

    takes_vectors = False
    """Whether the input is vectors (..., C) rather than images."""

    values: Tensor
    indices: Tensor
    indptr: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        activation: str | None = None,
        choice: ChoiceLike = None,
        out_layout: Layout | None = None,
    ) -> None:
        super().__init__()
        if out_layout not in (None, *LAYOUTS):
            raise ValueError(f"out_layout must be None or one of {LAYOUTS}, got {out_layout!r}")
        spec = _smallest_spec(weight, stride, padding, dilation)
        if bias is not None:
            spec.check_bias_shape(tuple(bias.shape))
        self.in_channels, self.out_channels, self.groups = spec.c, spec.k, spec.groups
        self.kernel_size = (spec.r, spec.s)
        self.stride, self.dilation = spec.stride, spec.dilation
        self.padding = (*spec.padding[0], *spec.padding[1])
        self.activation: str = check_activation(activation)
        self.choice = choice
        self.out_layout = out_layout
        # Normal tensors, also within inference mode, whose own do not count changes: the operator would have to compare
        # the whole weight with a copy at every call.
        with torch.inference_mode(False):
            for name, array in zip(_ARRAYS, (weight.encoded(), weight.indices, weight.indptr), strict=True):
                self.register_buffer(name, torch.from_numpy(array.copy()))
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32, copy=True))

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        weight: SparseWeight | None = None,
        choice: ChoiceLike = None,
        activation: str | None = None,
        out_layout: Layout | None = None,
    ) -> SparseConv2d:
        """Take the non-zero weights of a dense convolution, which is left as it is; the result is on its device.

        ``weight`` takes the place of the convolution's own, for example the same one quantized.

        Raises
        ------
        TypeError
            If ``conv`` is no ``nn.Conv2d``.
        ValueError
            If its ``padding_mode`` is not "zeros", or its weight holds NaN or infinity.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"expected an nn.Conv2d, got {type(conv).__name__}")
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode {conv.padding_mode!r} is not supported, only 'zeros': pad the input before the "
                f"convolution (torch.nn.functional.pad) and give the convolution padding=0"
            )
        made = cls(
            SparseWeight.from_dense(conv.weight, conv.groups) if weight is None else weight,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            activation=activation,
            choice=choice,
            out_layout=out_layout,
        )
        return made.to(conv.weight.device)

    @property
    def choice(self) -> Choice | None:
        """The kernel and config asked for; None is the stated default for each shape."""
        return self._choice

    @choice.setter
    def choice(self, choice: ChoiceLike) -> None:
        self._choice = as_choice(choice)
        self._config = "" if self._choice is None else _to_json(self._choice)

    @property
    def kernel_shape(self) -> tuple[int, int, int]:
        """(C/groups, R, S)."""
        return self.in_channels // self.groups, *self.kernel_size

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        c_per_group, r, s = self.kernel_shape
        return 1.0 - self.indices.numel() / (self.out_channels * c_per_group * r * s)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve (N, C, H, W), or (C, H, W) like ``nn.Conv2d``; the result has ``x``'s dtype.

        ``residual`` is added before the activation, within the kernel if it is of the result's shape, dtype and
        device; otherwise as torch adds, broadcasting and promoting.
        """
        batched = x if x.dim() != 3 else x.unsqueeze(0)
        if residual is None or self._fits(residual, x):
            y = self._convolve(batched, self.activation, residual)
            return y if x.dim() != 3 else y.squeeze(0)
        y = self._convolve(batched, "none", None)
        return in_torch(self.activation)((y if x.dim() != 3 else y.squeeze(0)) + residual)

    def _fits(self, residual: Tensor, x: Tensor) -> bool:
        """Whether a residual is exactly like the result."""
        if x.dim() != 4 or residual.dtype != x.dtype or residual.device != x.device:
            return False
        (top, bottom, left, right), (r, s) = self.padding, self.kernel_size
        out_h = (x.shape[2] + top + bottom - self.dilation[0] * (r - 1) - 1) // self.stride[0] + 1
        out_w = (x.shape[3] + left + right - self.dilation[1] * (s - 1) - 1) // self.stride[1] + 1
        return residual.shape == (x.shape[0], self.out_channels, out_h, out_w)

    def as_image(self, x: Tensor) -> Tensor | None:
        """The input as the convolution reads it; None for an image without a batch."""
        return x if x.dim() == 4 else None

    def plan_for(self, image: Tensor) -> Plan:
        """The plan that is run for an image: the weight packed, for who keeps the plan and not the layer."""
        weight = (self.values, self.indices, self.indptr)
        how = (self.kernel_shape, self.stride, self.padding, self.dilation, self.groups)
        return cached_plan(image, weight, *how, self.activation, self._config)

    def _convolve(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        # Past ``nn.Module.__getattr__``, which takes a microsecond for each.  The bias may be made a parameter.
        own = cast("dict[str, Any]", self._buffers)
        return convolve(
            x,
            own["values"],
            own["indices"],
            own["indptr"],
            self.bias,
            self.kernel_shape,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            activation,
            self._config,
            self.out_layout or "",
            residual,
        )

    def scale(self, factor: float) -> None:
        """Multiply weight and bias by a number: new tensors, which other modules do not share."""
        scaled = self.weight_matrix().scaled(np.full(self.out_channels, factor))
        for name, array in zip(_ARRAYS, (scaled.encoded(), scaled.indices, scaled.indptr), strict=True):
            setattr(self, name, torch.from_numpy(array.copy()).to(self.values.device))
        if self.bias is not None:
            self.bias = self.bias * factor

    def weight_matrix(self) -> SparseWeight:
        """Return the weight; its ``to_scipy()`` is the SciPy matrix."""
        values, indices, indptr = (t.detach().cpu().numpy() for t in (self.values, self.indices, self.indptr))
        return SparseWeight.from_encoded(values, indices, indptr, self.kernel_shape, self.groups)

    def to_dense(self) -> nn.Conv2d:
        """Return the dense convolution, without the activation.

        Raises
        ------
        ValueError
            If the padding is one that ``nn.Conv2d`` cannot have.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self._torch_padding(),
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        conv.weight = nn.Parameter(torch.from_numpy(self.weight_matrix().to_dense()).to(self.values.device))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.clone())
        return conv.train(self.training)

    def _torch_padding(self) -> tuple[int, int] | str:
        top, bottom, left, right = self.padding
        if top == bottom and left == right:
            return top, left
        same = self.stride == (1, 1) and self.padding == _flat_padding(self.weight_matrix(), "same", self.dilation)
        if not same:
            raise ValueError(
                f"nn.Conv2d cannot have padding (top, bottom, left, right) = {self.padding}: put nn.ZeroPad2d "
                f"before a convolution without padding"
            )
        return "same"

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
            f"padding={self.padding}",
        ]
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        parts.append(f"sparsity={self.sparsity:.2%}")
        parts.append(f"kernel={'default' if self._choice is None else self._choice.kernel}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseConv2d:
        kept = {name: self._buffers.get(name) for name in ("values", "bias")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers.get(name)
            if before is not None and after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        """Take a weight with any number of non-zeros, if it is one of this module's dense shape."""
        error_msgs = others[-1]
        found = {name: state_dict[prefix + name] for name in _ARRAYS if prefix + name in state_dict}
        if len(found) == len(_ARRAYS):
            reason = self._reason_misfit(found)
            if reason is not None:
                error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {reason}")
                return
            for name in ("values", "indices"):
                own = getattr(self, name)
                # The operator does not notice a change of an inference tensor on a GPU, but it does a new one.
                if own.shape != found[name].shape or own.dtype != found[name].dtype or own.is_inference():
                    setattr(self, name, own.new_empty(found[name].shape, dtype=_kept_dtype(found[name])))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def _reason_misfit(self, found: Mapping[str, Any]) -> str | None:
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                return f"{name} must be a tensor, got {type(tensor).__name__}"
        rows = found["indptr"].numel() - 1
        if rows != self.out_channels:
            return f"expected a sparse weight with {self.out_channels} output channels, got one with {rows}"
        if any(tensor.is_meta for tensor in found.values()):
            return None
        try:
            values, indices, indptr = (found[name].detach().cpu().numpy() for name in _ARRAYS)
            SparseWeight.from_encoded(values, indices, indptr, self.kernel_shape, self.groups)
        except (TypeError, ValueError) as error:
            return f"no sparse weight of shape {(self.out_channels, *self.kernel_shape)}: {error}"
        return None


def _kept_dtype(found: Tensor) -> torch.dtype:
    """Dtype of a buffer for a loaded tensor: codes stay bytes, and values of any float type become float32."""
    return torch.float32 if found.is_floating_point() else found.dtype


def as_choice(choice: ChoiceLike) -> Choice | None:
    """Turn what names a choice into one, or None.

    Raises
    ------
    ValueError
        If the kernel is unknown, or a mapping has other keys than "kernel" and "config".
    TypeError
        If it is nothing of the kind, a whole tuned model for example.
    """
    if choice is None:
        return None
    if isinstance(choice, str):
        made = Choice(choice)
    elif isinstance(choice, Mapping):
        if "kernel" not in choice or set(choice) - {"kernel", "config"}:
            raise ValueError(f"expected a choice like {{'kernel': name, 'config': {{...}}}}, got keys {sorted(choice)}")
        made = Choice(choice["kernel"], dict(choice.get("config") or {}))
    elif hasattr(choice, "kernel") and hasattr(choice, "config"):
        made = Choice(choice.kernel, dict(choice.config))
    else:
        raise TypeError(
            f"choice must be None, a kernel's name, a Choice, or a mapping with 'kernel' and 'config', got "
            f"{type(choice).__name__}; a tuned model goes to numbasparse.nn.convert"
        )
    kernel(made.kernel)
    return made


def _to_json(choice: Choice) -> str:
    return json.dumps({"kernel": choice.kernel, "config": choice.config}, sort_keys=True)


def _smallest_spec(weight: SparseWeight, stride: Any, padding: Any, dilation: Any) -> ConvSpec:
    """The convolution on the smallest image that needs no padding: it checks and normalizes every argument."""
    c_per_group, r, s = weight.kernel_shape
    down, right = (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[-1])
    x_shape = (1, c_per_group * weight.groups, max(1, down * (r - 1) + 1), max(1, right * (s - 1) + 1))
    return ConvSpec.create(x_shape, weight.shape, stride, padding, dilation, weight.groups)


def _flat_padding(weight: SparseWeight, padding: str, dilation: tuple[int, int]) -> tuple[int, ...]:
    vertical, horizontal = _smallest_spec(weight, 1, padding, dilation).padding
    return cast("tuple[int, ...]", (*vertical, *horizontal))
