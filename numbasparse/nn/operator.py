"""The operator ``numbasparse::conv2d``: a sparse convolution that ``torch.export`` and ``torch.compile`` can keep.

All that the convolution needs is in its arguments, so an exported program carries it. Programs saved with
``torch.export.save`` need ``import numbasparse.nn`` before they are loaded: that registers the operator.

=============  =====================================================================================
x              (N, C, H, W), on the CPU or a GPU; float32; float64, float16 and bfloat16 are summed in float32
values         (nnz,), float32: the CSR matrix of a `numbasparse.SparseWeight`; uint8 if it is quantized, see
               `SparseWeight.encoded`
indices        (nnz,), int32
indptr         (K + 1,), int32
bias           (K,), floating, or None
kernel_shape   (C/groups, R, S)
stride         (vertical, horizontal)
padding        (top, bottom, left, right)
dilation       (vertical, horizontal)
groups
activation     "none", "relu", "relu6", "silu" or "leaky_relu(SLOPE)"
config         JSON ``{"kernel": name, "config": {...}}``, or "" for the stated default
out_layout     on a GPU: "NCHW", "NHWC" or "CHWN", or "" for that of ``x`` (NCHW where it has none)
residual       like the result, or None: added before the activation
=============  =====================================================================================

The result is (N, K, OH, OW) of ``x``'s dtype, on the CPU contiguous. All tensors are on one device. A config that
cannot run the problem at hand (it was tuned for another batch, image size or device) gives way to the stated
default for that problem. On a GPU the first call with a shape packs the weight, and cannot be captured in a graph.
There are gradients with respect to ``x``, ``bias`` and ``residual``, see `numbasparse.nn.gradient`.

The operator is registered with `torch.library.Library` and not `torch.library.custom_op`: the latter's wrappers
cost as much again at each call as all the rest of the path.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from numbasparse.kernels import kernel
from numbasparse.nn.gradient import backward, setup_context
from numbasparse.nn.plain import is_unnoticed, threads
from numbasparse.plans import Choice, Plan, device_and_dtype, plan, resolve
from numbasparse.runtime import layouts
from numbasparse.runtime.cuda import CudaError
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_SCHEMA = (
    "(Tensor x, Tensor values, Tensor indices, Tensor indptr, Tensor? bias, int[] kernel_shape, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation, str config, str out_layout='', "
    "Tensor? residual=None) -> Tensor"
)

_MAX_BYTES = 1 << 30


class _Entry:
    """A plan and the tensors it was packed from; while it holds them, no other tensor can have their addresses."""

    def __init__(self, made: Plan, weight: tuple[Tensor, Tensor, Tensor]) -> None:
        self.plan = made
        self.weight = weight
        # Tensors made in inference mode do not count their changes: compare them with a copy.
        # (Not on a GPU, where that would wait for it at every call: there they count as never changed.)
        compared = any(t.is_inference() and t.is_cpu for t in weight)
        self.copies = tuple(t.clone() for t in weight) if compared else None
        tensors = sum(t.nbytes for t in weight)
        self.nbytes = made.nbytes + tensors * (1 if self.copies is None else 2)

    def is_current(self, weight: tuple[Tensor, Tensor, Tensor]) -> bool:
        return self.copies is None or all(map(torch.equal, self.copies, weight))


class _PlanCache:
    """The plans last used, as many as fit ``max_bytes`` (at least one)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._nbytes = 0
        self._watchers: list[dict[int, _Entry]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Any) -> _Entry | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                for used in self._watchers:
                    used[id(found)] = found
            return found

    @contextmanager
    def watched(self) -> Iterator[dict[int, _Entry]]:
        """Collect the entries that are used meanwhile: who keeps them keeps their memory on the device."""
        used: dict[int, _Entry] = {}
        with self._lock:
            self._watchers.append(used)
        try:
            yield used
        finally:
            with self._lock:
                self._watchers = [w for w in self._watchers if w is not used]

    def put(self, key: Any, entry: _Entry) -> None:
        with self._lock:
            replaced = self._entries.pop(key, None)
            self._nbytes += entry.nbytes - (0 if replaced is None else replaced.nbytes)
            self._entries[key] = entry
            while self._nbytes > self.max_bytes and len(self._entries) > 1:
                self._nbytes -= self._entries.popitem(last=False)[1].nbytes

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Forget afterwards what comes meanwhile."""
        with self._lock:
            before = set(self._entries)
        try:
            yield
        finally:
            with self._lock:
                for key in [key for key in self._entries if key not in before]:
                    self._nbytes -= self._entries.pop(key).nbytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._nbytes = 0


_plans = _PlanCache(_MAX_BYTES)


def plans_used() -> AbstractContextManager[Mapping[int, object]]:
    """Collect what the operator uses meanwhile, for one who has to keep it alive: a CUDA graph knows addresses only."""
    return _plans.watched()


def plans_not_kept() -> AbstractContextManager[None]:
    """Let the operator forget afterwards the plans that it makes meanwhile, and the weights that they keep alive."""
    return _plans.left_as_it_was()


def clear_cache() -> None:
    """Forget every plan that the operator keeps, and the weights that the plans keep alive."""
    _plans.clear()


def _identity(t: Tensor) -> tuple[int, int, torch.Size]:
    """What tells a living tensor's content from another's; changes through ``.data`` are not seen."""
    return t.data_ptr(), 0 if t.is_inference() else t._version, t.shape


def _conv2d(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    indptr: Tensor,
    bias: Tensor | None,
    kernel_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    config: str,
    out_layout: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Run the convolution with a cached plan; see the module's text for the arguments."""
    how = (kernel_shape, stride, padding, dilation, groups, activation, config)
    made = cached_plan(x, (values, indices, indptr), *how)
    bias = None if bias is None else bias.detach()
    residual = None if residual is None else residual.detach()
    layout = (out_layout or None) if x.is_cuda else None
    return made(x.detach(), bias, None, residual, cast("layouts.Layout | None", layout))


def cached_plan(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    kernel_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    config: str,
) -> Plan:
    """The plan that the operator runs for an input; arguments as in the module's text."""
    key = (
        x.shape,
        *map(_identity, weight),
        tuple(kernel_shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        activation,
        config,
        torch.get_num_threads() if x.is_cpu else (x.device, x.dtype),
    )
    entry = _plans.get(key)
    if entry is None or not entry.is_current(weight):
        _check_devices(x, weight)
        made = _make_plan(x, weight, kernel_shape, stride, padding, dilation, groups, activation, config)
        entry = _Entry(made, weight)
        _plans.put(key, entry)
    return entry.plan


def _check_devices(x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> None:
    others = {t.device for t in weight} - {x.device}
    if others:
        raise ValueError(
            f"the input is on device {x.device}, the sparse weight on {', '.join(map(str, others))}: move the model "
            f"or the input with .to()"
        )
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CudaError(
            f"an input of shape {tuple(x.shape)}, {x.dtype}, comes for the first time while a CUDA graph is captured: "
            f"call the model with it once before the capture"
        )


def _make_plan(
    x: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    kernel_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    config: str,
) -> Plan:
    values, indices, indptr = (t.detach().cpu().numpy() for t in tensors)
    # Not copied: the weight lives only until it is packed.
    weight = SparseWeight.from_encoded(values, indices, indptr, kernel_shape, groups, copy=False)
    _check_padding(padding)
    top, bottom, left, right = padding
    device, dtype = ("cpu", "float32") if x.is_cpu else device_and_dtype(x)
    pads = ((top, bottom), (left, right))
    spec = ConvSpec.create(tuple(x.shape), weight.shape, stride, pads, dilation, groups, dtype)
    count = threads()
    with nullcontext() if x.is_cpu else torch.cuda.device(x.device):
        choice = _fitting(config, spec, weight, count, x.device.type)
        return plan(spec, weight, device=device, config=choice, activation=activation, threads=count)


def _fitting(config: str, spec: ConvSpec, weight: SparseWeight, threads: int, kind: str) -> Choice | None:
    """The choice in ``config``, or None where it cannot run this problem on that kind of device."""
    if not config:
        return None
    try:
        parsed = json.loads(config)
    except ValueError as error:
        raise ValueError(f"config must be JSON like {{'kernel': name, 'config': {{...}}}}: {error}") from None
    if not isinstance(parsed, dict) or "kernel" not in parsed:
        raise ValueError(f"config must be JSON like {{'kernel': name, 'config': {{...}}}}, got {config!r}")
    asked = kernel(parsed["kernel"])
    if asked.device != kind or asked.supports(spec, weight) is not None:
        return None
    choice = resolve(parsed, spec, weight, threads, kind)
    return choice if kernel(choice.kernel).check(spec, weight, choice.config) is None else None


def _check_padding(padding: Sequence[int]) -> None:
    if len(padding) != 4:
        raise ValueError(f"padding must be (top, bottom, left, right), got {len(padding)} numbers: {tuple(padding)}")


def _conv2d_fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    indptr: Tensor,
    bias: Tensor | None,
    kernel_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    config: str,
    out_layout: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Make an output without content.  Sizes may be symbols: arithmetic only, no question that needs a number."""
    if x.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), got {x.dim()} sizes: {tuple(x.shape)}")
    _check_padding(padding)
    n, c, h, w = x.shape
    c_per_group, r, s = kernel_shape
    torch._check(
        c == c_per_group * groups,
        lambda: f"weight has {c_per_group * groups} input channels but input has {c} (groups={groups})",
    )
    top, bottom, left, right = padding
    out_h = (h + top + bottom - dilation[0] * (r - 1) - 1) // stride[0] + 1
    out_w = (w + left + right - dilation[1] * (s - 1) - 1) // stride[1] + 1
    shape = (n, indptr.shape[0] - 1, out_h, out_w)
    if residual is not None:
        _check_residual(residual, shape)
    if not x.is_cuda:
        return x.new_empty(shape)
    layout = cast("layouts.Layout", out_layout) or layouts.layout_of(x) or "NCHW"
    return layouts.empty(shape, layout, dtype=x.dtype, device=x.device)


def _check_residual(residual: Tensor, shape: tuple[Any, ...]) -> None:
    torch._check(residual.dim() == 4, lambda: f"residual must have four sizes, got {tuple(residual.shape)}")
    for got, expected in zip(residual.shape, shape, strict=True):
        torch._check(
            got == expected,
            lambda: f"residual must have the output's shape {shape}, got {tuple(residual.shape)}: expand it first",
        )


def _dense_weight(values: Tensor, indices: Tensor, indptr: Tensor, kernel_shape: Sequence[int], groups: int) -> Tensor:
    """Decode a quantized weight, float32 (K, C/groups, R, S): an operator, because it cannot be traced."""
    arrays = [t.detach().cpu().numpy() for t in (values, indices, indptr)]
    dense = SparseWeight.from_encoded(arrays[0], arrays[1], arrays[2], kernel_shape, groups).to_dense()
    return torch.from_numpy(dense).to(values.device)


def _dense_weight_fake(
    values: Tensor, indices: Tensor, indptr: Tensor, kernel_shape: Sequence[int], groups: int
) -> Tensor:
    return values.new_empty((indptr.shape[0] - 1, *kernel_shape), dtype=torch.float32)


_library = torch.library.Library("numbasparse", "DEF")
_library.define("conv2d" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "_dense_weight(Tensor values, Tensor indices, Tensor indptr, int[] kernel_shape, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("conv2d", _conv2d, _key)
    _library.impl("_dense_weight", _dense_weight, _key)
torch.library.register_fake("numbasparse::_dense_weight", _dense_weight_fake, lib=_library)
torch.library.register_fake("numbasparse::conv2d", _conv2d_fake, lib=_library)
torch.library.register_autograd("numbasparse::conv2d", backward, setup_context=setup_context, lib=_library)

conv2d = torch.ops.numbasparse.conv2d.default
"""The registered overload ``torch.ops.numbasparse.conv2d.default``, with the arguments of the module's text."""


def convolve(x: Tensor, *rest: Any) -> Tensor:
    """The operator with the same arguments, past torch's dispatcher where nobody would notice.

    The dispatcher takes 20 us to hand over so many arguments, half of what a call costs beside the kernel.
    """
    return _conv2d(x, *rest) if is_unnoticed(x) and torch.is_inference_mode_enabled() else conv2d(x, *rest)
