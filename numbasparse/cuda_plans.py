"""Plans on a GPU: the twin of `numbasparse.plans.Plan` for CUDA tensors, and how other libraries' arrays come in."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from numbasparse.activations import Activation
from numbasparse.choices import Choice, ConfigLike, check_kind, is_tensor, overlap, parse_device, resolve
from numbasparse.cpu_plans import Plan
from numbasparse.kernels import CudaRunner, kernel
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import LAYOUTS, Layout, layout_of
from numbasparse.spec import DTYPES, ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch


class CudaPlan(Plan):
    """One convolution on one GPU.  Made by `numbasparse.plan`; attributes as in `Plan`.

    Also
    ----
    functions
        The loaded kernels, with registers and occupancy; none where the code is a library's.

    Notes
    -----
    Runs on torch's current stream and waits for nothing, so it can be captured in a CUDA graph.  Tensors of the
    spec's dtype are taken as they are; others are converted to it and the result back.
    """

    def __init__(
        self, spec: ConvSpec, weight: SparseWeight, choice: Choice, activation: Activation, index: int
    ) -> None:
        import torch

        self.spec = spec
        self.choice = choice
        self.activation = activation
        self.threads = 1
        self.device = f"cuda:{index}"
        self._index = index
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._x_shape, self._out_shape, self._bias_shape = spec.x_shape, spec.out_shape, (spec.k,)
        runner = kernel(choice.kernel).prepare(spec, weight, choice.config, activation)
        assert isinstance(runner, CudaRunner)
        self._runner: CudaRunner = runner
        self.takes, self.gives = runner.takes, runner.gives
        self.functions = runner.functions

    def __repr__(self) -> str:
        return f"Plan({self.spec.key}, {self.choice.kernel}, {self.choice.config}, device={self.device!r})"

    def __call__(
        self,
        x: Any,
        bias: Any = None,
        out: Any = None,
        residual: Any = None,
        out_layout: Layout | Literal["native"] | None = None,
    ) -> Any:
        """Run the convolution.

        Parameters
        ----------
        x : CUDA tensor (N, C, H, W), or an array that speaks DLPack or has ``__cuda_array_interface__``
            On the plan's GPU; float32, float64, float16 or bfloat16, in any layout.
        bias : like ``x``, (K,), optional
        out : like ``x``, (N, K, OH, OW), optional
            Gets the result, in whatever layout it has.  Must not share memory with ``x``.
        residual : like ``x``, (N, K, OH, OW), optional
            Added before the activation.
        out_layout : "NCHW", "NHWC", "CHWN" or "native", optional
            Of the result.  None is ``x``'s own layout (NCHW where it has none); ``"native"`` is the plan's
            ``gives``, which costs no conversion.

        Returns
        -------
        tensor, or array of the library of ``x``, (N, K, OH, OW)
            Of ``x``'s dtype; ``out`` where given.
        """
        if not is_tensor(x):
            tensor, back = from_array(x)
            others = [None if t is None else from_array(t)[0] for t in (bias, out, residual)]
            y = self(tensor, others[0], others[1], others[2], out_layout)
            return back(y) if out is None else out
        import torch

        self._check_x(x)
        if out_layout is None:
            out_layout = layout_of(x if out is None else out) or "NCHW"
        elif out_layout == "native":
            out_layout = self.gives
        elif out_layout not in LAYOUTS:
            raise ValueError(f"out_layout must be None, 'native' or one of {LAYOUTS}, got {out_layout!r}")
        if bias is not None:
            bias = self._bias(bias)
        if residual is not None:
            residual = self._residual(residual)
        if out is not None:
            self._check_out_tensor(out, x)
        try:
            if torch.cuda.current_device() == self._index:
                return self._run(x, bias, out, residual, out_layout)
            with on_device(self._index):
                return self._run(x, bias, out, residual, out_layout)
        except torch.OutOfMemoryError as error:
            error.add_note(f"numbasparse: while running {self!r}; a smaller batch needs less memory")
            raise

    def _run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        residual: torch.Tensor | None,
        out_layout: Layout,
    ) -> torch.Tensor:
        # Each call to torch costs about a tenth of a launch, so what has nothing to do is not called.
        dtype = x.dtype
        if dtype is not self._dtype:
            x = x.to(self._dtype)
        if x.requires_grad:
            x = x.detach()
        y = self._runner.apply(x, bias, residual, out_layout)
        if out is not None:
            return out.copy_(y)
        return y if dtype is self._dtype else y.to(dtype)

    def _check_x(self, x: torch.Tensor) -> None:
        import torch

        if x.shape != self._x_shape:
            self.spec.check_x_shape(tuple(x.shape))
        self._check_device(x, "x")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a plan has no gradient: call it under torch.inference_mode() or torch.no_grad()")
        if x.dtype is not self._dtype:
            _check_float(x, "x")

    def _check_device(self, t: Any, name: str) -> None:
        if not is_tensor(t):
            raise TypeError(f"{name} must be a CUDA tensor like x, got {type(t).__name__}")
        if not t.is_cuda or t.get_device() != self._index:
            raise ValueError(f"{name} is on device {t.device}, this plan runs on {self.device}: move it there first")

    def _bias(self, bias: Any) -> torch.Tensor:
        import torch

        self._check_device(bias, "bias")
        if bias.shape != self._bias_shape:
            self.spec.check_bias_shape(tuple(bias.shape))
        if bias.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a plan has no gradient, and bias asks for one: use torch.no_grad(), or detach it")
        _check_float(bias, "bias")
        return bias.detach().to(torch.float32).contiguous()

    def _residual(self, residual: Any) -> torch.Tensor:
        self._check_device(residual, "residual")
        self.spec.check_out_shape(tuple(residual.shape))
        _check_float(residual, "residual")
        return residual.detach().to(self._dtype)

    def _check_out_tensor(self, out: Any, x: torch.Tensor) -> None:
        self._check_device(out, "out")
        self.spec.check_out_shape(tuple(out.shape))
        if out.dtype != x.dtype:
            raise ValueError(f"out must be of dtype {x.dtype} like x, got {out.dtype}")
        if overlap(out, x):
            raise ValueError("out shares memory with x: give a separate tensor")


def _check_float(t: torch.Tensor, words: str) -> None:
    name = str(t.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"expected {words} of dtype {', '.join(DTYPES)}, got {name}: convert it first")


def on_device(index: int) -> AbstractContextManager[Any]:
    """Make a GPU torch's current one within a block."""
    import torch

    return torch.cuda.device(index)


def cuda_plan(
    spec: ConvSpec, weight: SparseWeight, device: str, config: ConfigLike, activation: Activation
) -> CudaPlan:
    """`numbasparse.plan` for a GPU."""
    reason = cuda.reason_unavailable()
    if reason is not None:
        raise cuda.CudaError(f"device {device!r} cannot be used: {reason}")
    import torch

    _, index = parse_device(device)
    if index is None:
        index = torch.cuda.current_device()
    elif index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} does not exist: torch sees {torch.cuda.device_count()} GPUs")
    if torch.cuda.is_current_stream_capturing():
        raise cuda.CudaError(
            f"there is no plan for {spec.key} yet, and none can be made while a CUDA graph is captured: call the "
            f"convolution once before the capture"
        )
    # As on the CPU, float64 is computed in float32 and rounded back.
    computed = replace(spec, dtype="float32") if spec.dtype == "float64" else spec
    with on_device(index):
        choice = resolve(config, computed, weight, 1, "cuda")
        check_kind(choice, "cuda")
        try:
            return _apart(lambda: CudaPlan(computed, weight, choice, activation, index), index)
        except torch.OutOfMemoryError as error:
            error.add_note(f"numbasparse: while packing the weight of {spec.key} for {device}")
            raise


def _apart(make: Callable[[], CudaPlan], index: int) -> CudaPlan:
    """Make a plan whose packed weight has memory that nothing else gets while a kernel may still read it.

    torch's allocator gives freed memory to the next tensor of the stream that it was taken on, while plans run on
    any stream; so weights are taken on a stream of their own, when no kernel runs.  And what a thread takes while
    ``torch.compile`` warms up in it belongs to a CUDA graph; so weights are taken in a thread of their own.
    """
    import torch

    def work() -> CudaPlan:
        torch.cuda.synchronize(index)
        with torch.cuda.device(index), torch.cuda.stream(_packing_stream(index)):
            made = make()
        torch.cuda.synchronize(index)
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@functools.cache
def _packing_stream(index: int) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(index)


def is_array(x: object) -> bool:
    """Whether ``x`` is an array of another library that may be in a GPU's memory."""
    return not isinstance(x, np.ndarray) and (hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__"))


def from_array(x: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """A tensor that shares the memory of an array, and what brings a tensor back to the array's library.

    Parameters
    ----------
    x
        Tensor, CuPy array, or anything else with ``__dlpack__`` or ``__cuda_array_interface__``.  Of the array
        standard's libraries (those with ``__array_namespace__``) arrays come back, of others tensors.

    Raises
    ------
    TypeError
        If it is nothing of the kind; a NumPy array too, which is in the host's memory.
    """
    import torch

    if is_tensor(x):
        return x, _same
    if isinstance(x, np.ndarray):
        raise TypeError(
            "this plan runs on a GPU, and a NumPy array is in the host's memory: torch.from_numpy(x).cuda()"
        )
    if not is_array(x):
        raise TypeError(f"expected a CUDA tensor or an array with __dlpack__, got {type(x).__name__}")
    if not hasattr(x, "__dlpack__"):
        return torch.as_tensor(x, device="cuda"), _same
    # CuPy's arrays do not name their library, but are in a module of it.
    library = x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules.get(_root(type(x)))
    return torch.from_dlpack(x), getattr(library, "from_dlpack", _same)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _same(t: torch.Tensor) -> torch.Tensor:
    return t
