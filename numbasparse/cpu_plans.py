"""Plans on a CPU: a kernel, its config, its packed weight and its compiled code for one spec, ready to be called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from numbasparse.activations import Activation
from numbasparse.choices import Choice, check_float, is_tensor, overlap
from numbasparse.kernels import TorchRunner, kernel
from numbasparse.kernels.cpu_runner import CpuRunner
from numbasparse.runtime import memory
from numbasparse.runtime.job import Job
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch

    from numbasparse.runtime.layouts import Layout


class Plan:
    """One convolution, packed and compiled: call it with an input of the spec's shape.

    Made by `plan`; this class runs on the CPU, `numbasparse.cuda_plans.CudaPlan` on a GPU.  Safe to call from
    several threads at once.

    Attributes
    ----------
    spec, choice, activation, threads
        What it runs; ``threads`` is how many at most.
    device
        ``"cpu"``, or a GPU as in ``"cuda:0"``.
    takes, gives
        Layouts that its kernel reads and writes without a conversion.
    nbytes
        Bytes of the packed weight.
    workspace
        Scratch bytes of each thread, shared by all plans of the process.
    """

    device: str = "cpu"
    takes: Layout = "NCHW"
    gives: Layout = "NCHW"

    def __init__(
        self, spec: ConvSpec, weight: SparseWeight, choice: Choice, activation: Activation, threads: int
    ) -> None:
        self.spec = spec
        self.choice = choice
        self.activation = activation
        self.threads = threads
        self._runner = kernel(choice.kernel).prepare(spec, weight, choice.config, activation)
        self._zero_bias = np.zeros(spec.k, np.float32)
        self._zero_address = _address(self._zero_bias)
        self._x_shape, self._out_shape = spec.x_shape, spec.out_shape

    def __repr__(self) -> str:
        return f"Plan({self.spec.key}, {self.choice.kernel}, {self.choice.config}, threads={self.threads})"

    @property
    def nbytes(self) -> int:
        return self._runner.nbytes

    @property
    def workspace(self) -> int:
        return self._runner.workspace

    def job(self, residual: bool) -> Job | None:
        """The convolution as a call of machine code, with or without a residual; None where torch computes it."""
        runner = self._runner
        return runner.job(residual) if isinstance(runner, CpuRunner) else None

    @property
    def zero_bias(self) -> int:
        """Address of a bias of zeros, which lives as long as the plan."""
        return self._zero_address

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
        x : array or torch CPU tensor, (N, C, H, W)
            float32; float64, float16 and bfloat16 are computed in float32 and rounded back.
        bias : array or tensor, (K,), optional
        out : like ``x``, (N, K, OH, OW), optional
            C-contiguous; must not share memory with ``x`` or ``residual``.
        residual : like ``x``, (N, K, OH, OW), optional
            Added before the activation.
        out_layout
            Here always NCHW.

        Returns
        -------
        array or tensor, (N, K, OH, OW)
            Of the kind and dtype of ``x``; ``out`` where given.
        """
        if out_layout not in (None, "native", "NCHW"):
            raise ValueError(f"on the CPU the layout of a result is NCHW, got out_layout={out_layout!r}")
        if is_tensor(x):
            return self._call_torch(x, bias, out, residual)
        if not isinstance(x, np.ndarray):
            raise TypeError(f"x must be a NumPy array or a torch CPU tensor, got {type(x).__name__}")
        return self._call_numpy(x, bias, out, residual)

    def _call_numpy(self, x: np.ndarray, bias: Any, out: np.ndarray | None, residual: Any) -> np.ndarray:
        if x.shape != self._x_shape:
            self.spec.check_x_shape(x.shape)
        dtype = x.dtype
        if dtype != np.float32:
            check_float(dtype.name)
        a = np.ascontiguousarray(x, np.float32)
        b = None if bias is None else self._numpy_bias(bias)
        added = None if residual is None else self._numpy_residual(residual)
        if out is not None:
            self._check_numpy_out(out, x, added)
        if isinstance(self._runner, TorchRunner):
            return self._dense_numpy(a, self._zero_bias if b is None else b, dtype, out, added)
        y = out if out is not None and dtype == np.float32 else memory.empty(self._out_shape)
        bias_address = self._zero_address if b is None else _address(b)
        self._runner.run(_address(a), _address(y), bias_address, self.threads, 0 if added is None else _address(added))
        if out is not None:
            if y is not out:
                out[...] = y
            return out
        return y if dtype == np.float32 else y.astype(dtype)

    def _numpy_bias(self, bias: Any) -> np.ndarray:
        if is_tensor(bias):
            bias = bias.detach().float().numpy()
        b = np.ascontiguousarray(bias, np.float32)
        if b.shape != (self.spec.k,):
            self.spec.check_bias_shape(b.shape)
        return b

    def _numpy_residual(self, residual: Any) -> np.ndarray:
        if not isinstance(residual, np.ndarray):
            raise TypeError(f"residual must be a NumPy array like x, got {type(residual).__name__}")
        if not np.issubdtype(residual.dtype, np.floating):
            raise TypeError(f"residual must have a floating dtype like x, got {residual.dtype}")
        self._check_residual_shape(residual.shape)
        return np.ascontiguousarray(residual, np.float32)

    def _check_residual_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self._out_shape:
            raise ValueError(f"residual must have the output's shape {self._out_shape}, got {shape}: expand it first")

    def _check_numpy_out(self, out: Any, x: np.ndarray, residual: np.ndarray | None) -> None:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array like x, got {type(out).__name__}")
        self._check_out(out, x.dtype, out.flags.c_contiguous)
        if not out.flags.writeable:
            raise ValueError("out is read-only: give a writeable array")
        if np.may_share_memory(out, x):
            raise ValueError("out shares memory with x: give a separate array")
        if residual is not None and np.may_share_memory(out, residual):
            raise ValueError("out shares memory with residual: give a separate array")

    def _check_torch_out(self, out: Any, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        if not is_tensor(out):
            raise TypeError(f"out must be a torch tensor like x, got {type(out).__name__}")
        if not out.is_cpu:
            raise ValueError(f"out is on device {out.device}, this plan runs on the CPU")
        self._check_out(out, x.dtype, out.is_contiguous())
        if overlap(out, x):
            raise ValueError("out shares memory with x: give a separate tensor")
        if residual is not None and overlap(out, residual):
            raise ValueError("out shares memory with residual: give a separate tensor")

    def _check_out(self, out: Any, dtype: Any, contiguous: bool) -> None:
        self.spec.check_out_shape(tuple(out.shape))
        if out.dtype != dtype or not contiguous:
            raise ValueError(f"out must be C-contiguous {dtype} like x, got {out.dtype}, contiguous: {contiguous}")

    def _dense_numpy(
        self, x: np.ndarray, bias: np.ndarray, dtype: Any, out: np.ndarray | None, residual: np.ndarray | None
    ) -> np.ndarray:
        import torch

        def tensor(array: np.ndarray) -> torch.Tensor:
            # torch takes no read-only arrays without a warning; the operation only reads.
            return torch.from_numpy(array if array.flags.writeable else array.copy())

        with torch.inference_mode():
            runner = cast(TorchRunner, self._runner)
            y = runner.apply(tensor(x), tensor(bias), None if residual is None else tensor(residual)).numpy()
        if out is None:
            return y if dtype == np.float32 else y.astype(dtype)
        out[...] = y
        return out

    def _call_torch(self, x: torch.Tensor, bias: Any, out: torch.Tensor | None, residual: Any) -> torch.Tensor:
        import torch

        # Cheap tests first: this is the path of every layer of a model.
        if x.shape != self._x_shape:
            self.spec.check_x_shape(tuple(x.shape))
        if not x.is_cpu:
            raise ValueError(f"x is on device {x.device}, this plan runs on the CPU: call x.cpu()")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a plan has no gradient: call it under torch.inference_mode() or torch.no_grad()")
        dtype = x.dtype
        single = dtype is torch.float32
        if not single:
            check_float(str(dtype).removeprefix("torch."))
        a = x if single and x.is_contiguous() else x.detach().to(torch.float32).contiguous()
        added = None if residual is None else self._torch_residual(residual)
        if out is not None:
            self._check_torch_out(out, x, added)
        if isinstance(self._runner, TorchRunner):
            with torch.no_grad():
                y = self._runner.apply(a.detach(), None if bias is None else self._torch_bias(bias), added)
        else:
            y = out if out is not None and single else self._new_tensor()
            b = None if bias is None else self._torch_bias(bias)
            address = self._zero_address if b is None else b.data_ptr()
            self._runner.run(
                a.data_ptr(), y.data_ptr(), address, self.threads, 0 if added is None else added.data_ptr()
            )
        if out is not None:
            return out if y is out else out.copy_(y)
        return y if single else y.to(dtype)

    @functools.cached_property
    def _new_tensor(self) -> Callable[[], torch.Tensor]:
        """Makes results; torch may come later than the plan."""
        return memory.tensor_maker(self._out_shape)

    def _torch_residual(self, residual: Any) -> torch.Tensor:
        import torch

        if not is_tensor(residual) or not residual.is_cpu:
            found = f"one on device {residual.device}" if is_tensor(residual) else type(residual).__name__
            raise TypeError(f"residual must be a torch CPU tensor like x, got {found}")
        if residual.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a plan has no gradient, and residual asks for one: use torch.no_grad(), or detach it")
        if not residual.is_floating_point():
            raise TypeError(f"residual must have a floating dtype like x, got {residual.dtype}")
        self._check_residual_shape(tuple(residual.shape))
        return residual.detach().to(torch.float32).contiguous()

    def _torch_bias(self, bias: Any) -> torch.Tensor:
        import torch

        b = bias if is_tensor(bias) else torch.from_numpy(np.array(bias, np.float32))
        if b.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a plan has no gradient, and bias asks for one: use torch.no_grad(), or detach it")
        if b.dtype is not torch.float32 or not b.is_contiguous():
            b = b.detach().to(torch.float32).contiguous()
        if b.shape != self._zero_bias.shape:
            self.spec.check_bias_shape(tuple(b.shape))
        return b


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
