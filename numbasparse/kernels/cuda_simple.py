"""One thread per output pixel, one row of the CSR matrix per block: the plain kernel that one would write first.

Baseline for the fast kernels (after Escoin's, Chen, arXiv 1802.10280, without its caching of rows in shared
memory), and, being nothing but plain numba.cuda on arrays, the one that the CUDA simulator runs.  A block belongs
to one output channel, and its threads to neighbouring pixels, so the weights are the same for all lanes and the
inputs are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from numbasparse.activations import Activation, slope_of
from numbasparse.kernels.base import Config, CudaKernel, CudaRunner, Space, check_fields
from numbasparse.kernels.cpu_rows import coordinates
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, empty, to_layout
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch

api: Any = None
"""The module numba.cuda, set by `build`.  Global because the simulator exchanges it among a kernel's globals."""

_DTYPES = ("float32", "float16")
_THREADS = (32, 64, 128, 256, 512, 1024)
_MOST_CHANNELS = 65535
_MOST_PIXELS = 2**31 - 1


@dataclass(frozen=True)
class PackedCsr:
    """A CSR matrix whose columns are offsets into an image.

    Attributes
    ----------
    values : float32, (nnz,)
    offsets : int32, (nnz,)
        From the input value at a window's first row and column in channel 0, in values.
    taps : int32, (nnz,)
        Row of the window that a non-zero multiplies times 65536, plus column: what padding is tested with.
    indptr : int32, (K + 1,)
        Row k is ``indptr[k]`` up to ``indptr[k + 1]``.
    """

    values: np.ndarray
    offsets: np.ndarray
    taps: np.ndarray
    indptr: np.ndarray


def pack(spec: ConvSpec, weight: SparseWeight) -> PackedCsr:
    """Turn columns into offsets for the images of ``spec``."""
    _, c, r, s = coordinates(weight)
    row, column = r * spec.dilation[0], s * spec.dilation[1]
    return PackedCsr(
        values=np.asarray(weight.data, np.float32),
        offsets=((c * spec.h + row) * spec.w + column).astype(np.int32),
        taps=(row * 65536 + column).astype(np.int32),
        indptr=np.asarray(weight.indptr, np.int32),
    )


def build(spec: ConvSpec, activation: Activation) -> Callable[..., None]:
    """The kernel for ``spec``, its sizes constants.

    Returns
    -------
    function
        Of flat arrays; ``bias`` and ``residual`` have no items where there is none.  To be launched with blocks for
        the N * OH * OW pixels in x, and K blocks in y.
    """
    global api
    api = cuda.numba_cuda()
    n, c, h, w, k = spec.n, spec.c, spec.h, spec.w, spec.k
    out_h, out_w = spec.out_h, spec.out_w
    (sh, sw), top, left = spec.stride, spec.padding[0][0], spec.padding[1][0]
    padded = spec.is_padded
    # Everything is float32: a Python float would be a float64 in the kernel.
    zero, one, six = np.float32(0), np.float32(1), np.float32(6)
    relu, relu6, silu = (activation == name for name in ("relu", "relu6", "silu"))
    negative = slope_of(activation)
    leaky, slope = negative is not None, np.float32(negative or 0.0)

    def cuda_simple(x, values, offsets, taps, indptr, bias, residual, y):  # type: ignore[no-untyped-def]
        pixel = api.blockIdx.x * api.blockDim.x + api.threadIdx.x
        row = api.blockIdx.y
        if pixel >= n * out_h * out_w:
            return
        image, oh, ow = pixel // (out_h * out_w), pixel // out_w % out_h, pixel % out_w
        above, before = oh * sh - top, ow * sw - left
        first = (image * c * h + above) * w + before
        total = zero
        if bias.size > 0:
            total += bias[row]
        for i in range(indptr[row], indptr[row + 1]):
            if padded:
                ih, iw = above + (taps[i] >> 16), before + (taps[i] & 65535)
                if ih < 0 or ih >= h or iw < 0 or iw >= w:
                    continue
            total += values[i] * np.float32(x[first + offsets[i]])
        at = ((image * k + row) * out_h + oh) * out_w + ow
        if residual.size > 0:
            total += np.float32(residual[at])
        # Written so that NaN stays NaN, as in torch.
        if (relu or relu6) and total < zero:
            total = zero
        if leaky and total < zero:
            total = slope * total
        if relu6 and total > six:
            total = six
        if silu:
            total = total / (one + np.float32(math.exp(-total)))
        y[at] = total

    return cuda_simple


class _Runner(CudaRunner):
    takes: Layout = "NCHW"
    gives: Layout = "NCHW"

    def __init__(self, spec: ConvSpec, weight: SparseWeight, ptx: cuda.Ptx) -> None:
        import torch

        function = cuda.load(ptx)
        packed = pack(spec, weight)
        device = torch.device("cuda", torch.cuda.current_device())
        arrays = (packed.values, packed.offsets, packed.taps, packed.indptr)
        self._weight = [torch.from_numpy(a.copy()).to(device) for a in arrays]
        self._weight_arguments = tuple(v for t in self._weight for v in _array(t))
        self._spec = spec
        self._grid = (-(-spec.n * spec.out_h * spec.out_w // ptx.threads), spec.k, 1)
        self._function = function
        self.functions = (function,)
        self.nbytes = sum(t.nbytes for t in self._weight)

    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_layout: Layout | None = None,
    ) -> torch.Tensor:
        x = to_layout(x, self.takes)
        y = empty(self._spec.out_shape, self.gives, dtype=x.dtype, device=x.device)
        if residual is not None:
            residual = to_layout(residual, self.gives)
        self._function.launch(
            self._grid,
            self._function.ptx.threads,
            0,
            cuda.current_stream(),
            (*_array(x), *self._weight_arguments, *_array(bias), *_array(residual, x.element_size()), *_array(y)),
        )
        return y if out_layout is None else to_layout(y, out_layout)


def _array(t: torch.Tensor | None, itemsize: int = 4) -> tuple[int, ...]:
    if t is None:
        return cuda.array_arguments(0, 0, itemsize)
    return cuda.array_arguments(t.data_ptr(), t.numel(), t.element_size())


class CudaSimple(CudaKernel):
    """CSR times image, a thread for each output; ``threads`` is how many a block has."""

    name = "cuda_simple"
    version = 1

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        if spec.dtype not in _DTYPES:
            return f"dtype {spec.dtype}: only {' and '.join(_DTYPES)}"
        if spec.k > _MOST_CHANNELS:
            return f"{spec.k} output channels, the limit is {_MOST_CHANNELS}"
        if max(spec.c * spec.h * spec.w, spec.n * spec.out_h * spec.out_w) > _MOST_PIXELS:
            return f"an image or the pixels of a channel exceed {_MOST_PIXELS} values"
        if max(spec.dilation[0] * spec.r, spec.dilation[1] * spec.s) >= 1 << 15:
            return "the window spans 32768 rows or columns, or more"
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {"threads": _THREADS[1:4]}

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        reason = check_fields(config, {"threads": (_THREADS[0], _THREADS[-1])})
        if reason is None and config["threads"] not in _THREADS:
            return f"threads must be one of {list(_THREADS)}, got {config['threads']}"
        return reason

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return {"threads": 128}

    def ptx(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> tuple[cuda.Ptx, ...]:
        self.require(spec, weight, config)
        activations = f"{spec.dtype}[::1]"
        made = cuda.compile_ptx(
            build(spec, activation),
            (activations, "float32[::1]", *["int32[::1]"] * 3, "float32[::1]", activations, activations),
            f"{spec.key} {activation}",
            capability=cuda.current().capability,
            threads=int(config["threads"]),
            fastmath=False,
        )
        return (made,)

    def prepare(
        self, spec: ConvSpec, weight: SparseWeight, config: Config, activation: Activation = "none"
    ) -> CudaRunner:
        return _Runner(spec, weight, *self.ptx(spec, weight, config, activation))
