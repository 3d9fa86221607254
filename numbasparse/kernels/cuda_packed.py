"""What runners on a GPU have in common: a packed weight on the device, compiled kernels, and what a call does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numbasparse.kernels import cuda_reduce
from numbasparse.kernels.base import CudaRunner
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec

if TYPE_CHECKING:
    import torch

_MAPS = 256
"""Tensor maps that a runner keeps."""

Size = tuple[tuple[int, int, int], int, int]
Finish = tuple[int, int, int, int]
Compile = Callable[[Any, cuda.Capability], tuple[cuda.Ptx, cuda.Ptx | None]]


class PackedRunner(CudaRunner):
    """A runner of a packed weight and, where input channels are split between blocks, a second kernel.

    Parameters
    ----------
    spec : ConvSpec
    arrays : sequence of ndarray
        The packed weight, which goes to torch's current device.
    layout : Layout
        Of input and output.
    split : int
        Parts whose sums `cuda_reduce` adds up.
    make : callable
        Makes the constants of the code (``residual=``), whatever they are.
    compiled : callable
        Makes the kernels of those.
    scale : ndarray, (K,), optional
        Factor of each output channel.
    """

    def __init__(
        self,
        spec: ConvSpec,
        arrays: Sequence[np.ndarray],
        layout: layouts.Layout,
        split: int,
        make: Callable[..., Any],
        compiled: Compile,
        scale: np.ndarray | None = None,
    ) -> None:
        import torch

        self._facts = cuda.current()
        self._device = torch.device("cuda", self._facts.index)
        self._dtype = getattr(torch, spec.dtype)
        self._spec, self._make, self._compiled = spec, make, compiled
        self.takes = self.gives = layout
        out = spec.n * spec.k * spec.out_h * spec.out_w
        self.workspace = 4 * split * out if split > 1 else 0
        self._arrays = [torch.from_numpy(np.ascontiguousarray(a)).to(self._device) for a in arrays]
        self._pointers = tuple(a.data_ptr() for a in self._arrays)
        self._zero_bias = torch.zeros(spec.k, dtype=torch.float32, device=self._device)
        self._zero_address = self._zero_bias.data_ptr()
        kept = [*self._arrays, self._zero_bias]
        self._scale_address = 0
        if scale is not None:
            kept.append(torch.from_numpy(np.array(scale, np.float32)).to(self._device))
            self._scale_address = kept[-1].data_ptr()
        self._kept = kept
        self.nbytes = sum(a.nbytes for a in kept)
        self._functions: dict[bool, tuple[Any, Size, cuda.Function, cuda.Function | None]] = {}
        self._maps: dict[int, cuda.TensorMap] = {}
        self._x_strides = layouts.strides(spec.x_shape, layout)
        self._y_strides = layouts.strides(spec.out_shape, layout)
        self._reduce_grid = cuda_reduce.grid(spec)
        self.functions = tuple(f for f in self._load(False)[2:] if f is not None)

    @abstractmethod
    def _size(self, shape: Any) -> Size:
        """Grid, threads of a block, and bytes of its shared memory."""

    @abstractmethod
    def _start(self, main: cuda.Function, shape: Any, size: Size, x: int, finish: Finish, stream: int) -> None:
        """Launch the kernel: addresses of the input, and of the output (or sums), residual, bias and factors."""

    def _load(self, residual: bool) -> tuple[Any, Size, cuda.Function, cuda.Function | None]:
        found = self._functions.get(residual)
        if found is None:
            shape = self._make(residual=residual)
            main, reduce = self._compiled(shape, self._facts.capability)
            found = shape, self._size(shape), cuda.load(main), None if reduce is None else cuda.load(reduce)
            self._functions[residual] = found
        return found

    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_layout: layouts.Layout | None = None,
    ) -> torch.Tensor:
        import torch

        shape, size, main, reduce = self._load(residual is not None)
        # What torch is not asked for costs nothing: its calls take longer than a launch.
        if x.stride() != self._x_strides:
            x = layouts.to_layout(x, self.takes)
        # Kernels copy and add pieces of 16 bytes.
        x_address = x.data_ptr()
        if x_address % 16:
            x = x.clone(memory_format=torch.preserve_format)
            x_address = x.data_ptr()
        added = None if residual is None else layouts.to_layout(residual, self.gives)
        if added is not None and added.data_ptr() % 16:
            added = added.clone(memory_format=torch.preserve_format)
        added_address = 0 if added is None else added.data_ptr()
        y = torch.empty_strided(self._spec.out_shape, self._y_strides, dtype=self._dtype, device=self._device)
        y_address = target = y.data_ptr()
        if reduce is not None:
            parts = torch.empty(self.workspace // 4, dtype=torch.float32, device=self._device)
            target = parts.data_ptr()
        bias_address = self._zero_address if bias is None else bias.data_ptr()
        stream = cuda.current_stream()
        finish = (added_address, bias_address, self._scale_address)
        self._start(main, shape, size, x_address, (target, *finish), stream)
        if reduce is not None:
            reduce.launch(self._reduce_grid, cuda_reduce.THREADS, 0, stream, (y_address, *finish, target))
        return y if out_layout is None or out_layout == self.gives else layouts.to_layout(y, out_layout)

    def _map(self, address: int, make: Callable[[int], cuda.TensorMap]) -> cuda.TensorMap:
        """The map of an input: kept, since torch's allocator gives the same few addresses again and again."""
        found = self._maps.get(address)
        if found is None:
            if len(self._maps) >= _MAPS:
                self._maps.clear()
            found = self._maps[address] = make(address)
        return found
