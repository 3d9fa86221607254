"""Plans: a kernel, its config, its packed weight and its compiled code for one spec, ready to be called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

import numpy as np

from numbasparse.kernels import Activation, Config, ConfigError, TorchRunner, kernel, kernels_for
from numbasparse.runtime import cpu
from numbasparse.runtime.layouts import Layout
from numbasparse.spec import DTYPES, ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch

DENSE_ABOVE = 0.4
"""Density from which an untuned layer is run dense on the CPU, where torch is there to run it (the stated default)."""

DENSE_ABOVE_CUDA = {"float32": 0.12, "float64": 0.12, "float16": 0.0, "bfloat16": 0.0}
"""The same for GPUs, by dtype.

In float32, 3x3 layers from and to NCHW, conversions counted, ran at 1.2 times cuDNN's speed at density 0.2 and 1.7
times at 0.1 (geometric means of six layers on an H100, batch of 32, tuned: benchmarks/results/cuda_layers.json), single
layers at 0.8 and 1.2.  In 16 bits cuDNN runs on tensor cores, and only tuning tells where a sparse kernel wins.
"""


@dataclass(frozen=True)
class Choice:
    """A kernel and its config: what a tuner chooses and a plan runs."""

    kernel: str
    config: Config = field(default_factory=dict)


class Chooser(Protocol):
    """Whatever can choose for a problem, for example a tuned file."""

    def choice(self, spec: ConvSpec, weight: SparseWeight, name: str | None = None) -> Choice | None:
        """The choice for a problem, or None where nothing is known of it."""


ConfigLike = Choice | Mapping[str, Any] | str | Chooser | None
"""A `Choice`, ``{"kernel": name, "config": {...}}``, a kernel's name, a `Chooser`, or None for the default."""


def dense_above(spec: ConvSpec, device: str = "cpu") -> float:
    """Density from which an untuned layer is run dense on a kind of device."""
    return DENSE_ABOVE_CUDA[spec.dtype] if device == "cuda" else DENSE_ABOVE


def default_choice(spec: ConvSpec, weight: SparseWeight, threads: int, device: str = "cpu") -> Choice:
    """The stated default for a problem that nobody tuned.

    Dense where more than `dense_above` of the weights are non-zero and torch is installed; else the first
    sparse kernel of the table that runs the problem, with its default config.
    """
    usable = [k for k in kernels_for(device) if k.supports(spec, weight) is None]
    dense = [k for k in usable if k.is_dense]
    sparse = [k for k in usable if not k.is_dense]
    ordered = dense + sparse if weight.density > dense_above(spec, device) else sparse + dense
    if not ordered:
        raise ConfigError(f"no kernel for device {device!r} runs {spec.key}")
    return Choice(ordered[0].name, ordered[0].default(spec, weight, threads))


def resolve(config: ConfigLike, spec: ConvSpec, weight: SparseWeight, threads: int, device: str = "cpu") -> Choice:
    """Turn anything that names a choice into a `Choice`.

    Raises
    ------
    ValueError
        If a kernel or a parameter is unknown.
    TypeError
        If ``config`` is none of `ConfigLike`.
    """
    if config is None:
        return default_choice(spec, weight, threads, device)
    if isinstance(config, Choice):
        return config
    if isinstance(config, str):
        return Choice(config, kernel(config).default(spec, weight, threads))
    if isinstance(config, Mapping):
        if "kernel" not in config or set(config) - {"kernel", "config"}:
            raise ValueError(f"expected a config like {{'kernel': name, 'config': {{...}}}}, got keys {sorted(config)}")
        chosen = kernel(config["kernel"])
        parameters = config.get("config") or chosen.default(spec, weight, threads)
        return Choice(chosen.name, dict(parameters))
    if hasattr(config, "choice"):
        found = config.choice(spec, weight)
        return found if found is not None else default_choice(spec, weight, threads, device)
    raise TypeError(
        "config must be None, a kernel's name, a Choice, a mapping with 'kernel' and 'config', or a tuned model; "
        f"got {type(config).__name__}"
    )


def is_tensor(x: object) -> bool:
    """Whether ``x`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def check_activation(activation: str | None) -> Activation:
    """The activation's name; None is "none"."""
    name = "none" if activation is None else activation
    if name not in get_args(Activation):
        raise ValueError(f"activation must be None, 'relu', 'relu6' or 'silu', got {activation!r}")
    return cast(Activation, name)


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
            C-contiguous; must not share memory with ``x``.
        residual
            Only for plans on a GPU.
        out_layout
            Here always NCHW.

        Returns
        -------
        array or tensor, (N, K, OH, OW)
            Of the kind and dtype of ``x``; ``out`` where given.
        """
        if residual is not None:
            raise ValueError("a residual is added by plans on a GPU only: add it to the result")
        if out_layout not in (None, "native", "NCHW"):
            raise ValueError(f"on the CPU the layout of a result is NCHW, got out_layout={out_layout!r}")
        if is_tensor(x):
            return self._call_torch(x, bias, out)
        if not isinstance(x, np.ndarray):
            raise TypeError(f"x must be a NumPy array or a torch CPU tensor, got {type(x).__name__}")
        return self._call_numpy(x, bias, out)

    def _call_numpy(self, x: np.ndarray, bias: Any, out: np.ndarray | None) -> np.ndarray:
        if x.shape != self._x_shape:
            self.spec.check_x_shape(x.shape)
        dtype = x.dtype
        if dtype != np.float32:
            _check_float(dtype.name)
        a = np.ascontiguousarray(x, np.float32)
        b = None if bias is None else self._numpy_bias(bias)
        if out is not None:
            self._check_numpy_out(out, x)
        if isinstance(self._runner, TorchRunner):
            return self._dense_numpy(a, self._zero_bias if b is None else b, dtype, out)
        y = out if out is not None and dtype == np.float32 else np.empty(self._out_shape, np.float32)
        self._runner.run(_address(a), _address(y), self._zero_address if b is None else _address(b), self.threads)
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

    def _check_numpy_out(self, out: Any, x: np.ndarray) -> None:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array like x, got {type(out).__name__}")
        self._check_out(out, x.dtype, out.flags.c_contiguous)
        if not out.flags.writeable:
            raise ValueError("out is read-only: give a writeable array")
        if np.may_share_memory(out, x):
            raise ValueError("out shares memory with x: give a separate array")

    def _check_torch_out(self, out: Any, x: torch.Tensor) -> None:
        if not is_tensor(out):
            raise TypeError(f"out must be a torch tensor like x, got {type(out).__name__}")
        if not out.is_cpu:
            raise ValueError(f"out is on device {out.device}, this plan runs on the CPU")
        self._check_out(out, x.dtype, out.is_contiguous())
        if overlap(out, x):
            raise ValueError("out shares memory with x: give a separate tensor")

    def _check_out(self, out: Any, dtype: Any, contiguous: bool) -> None:
        self.spec.check_out_shape(tuple(out.shape))
        if out.dtype != dtype or not contiguous:
            raise ValueError(f"out must be C-contiguous {dtype} like x, got {out.dtype}, contiguous: {contiguous}")

    def _dense_numpy(self, x: np.ndarray, bias: np.ndarray, dtype: Any, out: np.ndarray | None) -> np.ndarray:
        import torch

        # torch takes no read-only arrays without a warning; the operation only reads.
        if not x.flags.writeable:
            x = x.copy()
        with torch.inference_mode():
            runner = cast(TorchRunner, self._runner)
            y = runner.apply(torch.from_numpy(x), torch.from_numpy(bias)).numpy()
        if out is None:
            return y if dtype == np.float32 else y.astype(dtype)
        out[...] = y
        return out

    def _call_torch(self, x: torch.Tensor, bias: Any, out: torch.Tensor | None) -> torch.Tensor:
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
            _check_float(str(dtype).removeprefix("torch."))
        a = x if single and x.is_contiguous() else x.detach().to(torch.float32).contiguous()
        if out is not None:
            self._check_torch_out(out, x)
        if isinstance(self._runner, TorchRunner):
            with torch.no_grad():
                y = self._runner.apply(a.detach(), None if bias is None else self._torch_bias(bias))
        else:
            y = out if out is not None and single else torch.empty(self._out_shape, dtype=torch.float32)
            b = None if bias is None else self._torch_bias(bias)
            address = self._zero_address if b is None else b.data_ptr()
            self._runner.run(a.data_ptr(), y.data_ptr(), address, self.threads)
        if out is not None:
            return out if y is out else out.copy_(y)
        return y if single else y.to(dtype)

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


def overlap(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the contiguous ``out`` lies within the bytes that ``x`` spans."""
    size = x.element_size()
    end = x.data_ptr() + size + size * sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return out.data_ptr() < end and x.data_ptr() < out.data_ptr() + out.numel() * out.element_size()


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _check_float(name: str) -> None:
    if name not in DTYPES:
        raise TypeError(f"expected x of dtype {', '.join(DTYPES)}, got {name}: convert it first")


def plan(
    spec: ConvSpec,
    weight: SparseWeight,
    *,
    device: str = "cpu",
    config: ConfigLike = None,
    activation: str | None = None,
    threads: int | None = None,
) -> Plan:
    """Pack ``weight`` and compile a kernel for ``spec``.

    Parameters
    ----------
    spec
        The problem; its weight shape must be the weight's.
    device
        ``"cpu"``, ``"cuda"`` (torch's current GPU) or a certain GPU, as ``"cuda:1"``, on which the weight is packed.
        On a GPU the dtype of the spec is that of the activations in memory; sums are in float32.
    config
        Which kernel and config (see `ConfigLike`); None takes `default_choice`.
    activation
        None, ``"relu"``, ``"relu6"`` or ``"silu"``, applied to the output.
    threads
        How many threads at most; None takes `numbasparse.runtime.cpu.get_num_threads`.  Means nothing on a GPU.

    Raises
    ------
    ValueError
        For shapes that do not match, an unknown device, kernel, parameter or activation.
    numbasparse.runtime.cuda.CudaError
        If there is no usable GPU.
    """
    kind, _ = parse_device(device)
    spec.check_weight_shape(weight.shape)
    if weight.groups != spec.groups:
        raise ValueError(f"weight has groups={weight.groups}, the spec has groups={spec.groups}")
    count = cpu.get_num_threads() if threads is None else _check_threads(threads)
    name = check_activation(activation)
    if kind == "cuda":
        from numbasparse.cuda_plans import cuda_plan

        return cuda_plan(spec, weight, device, config, name)
    choice = resolve(config, spec, weight, count, kind)
    check_kind(choice, kind)
    return Plan(spec, weight, choice, name, count)


def device_and_dtype(x: torch.Tensor) -> tuple[str, str]:
    """What a plan for a tensor outside of the host's memory is made for: device as in "cuda:0", and spec's dtype.

    Raises
    ------
    ValueError
        If it is on no GPU of NVIDIA's.
    TypeError
        If its dtype is none of `DTYPES`.
    """
    if not x.is_cuda:
        raise ValueError(f"x is on device {x.device}: only the CPU and NVIDIA GPUs are supported, call x.cpu()")
    dtype = str(x.dtype).removeprefix("torch.")
    _check_float(dtype)
    return f"cuda:{x.get_device()}", dtype


def parse_device(device: str) -> tuple[str, int | None]:
    """Kind and number of a device: ``("cpu", None)``, ``("cuda", None)`` for the current GPU, ``("cuda", 1)``.

    Raises
    ------
    ValueError
        If ``device`` is none.
    """
    kind, colon, number = str(device).partition(":")
    if kind == "cuda" and colon and number.isdecimal():
        return kind, int(number)
    if colon or kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or a certain GPU like 'cuda:1', got {device!r}")
    return kind, None


def check_kind(choice: Choice, kind: str) -> None:
    """Raise unless the kernel of ``choice`` is there and runs on that kind of device."""
    runs_on = kernel(choice.kernel).device
    if runs_on != kind:
        names = [k.name for k in kernels_for(kind)]
        raise ConfigError(f"kernel {choice.kernel!r} is for device {runs_on!r}; those for {kind!r} are {names}")


def _check_threads(threads: int) -> int:
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= cpu.MAX_THREADS:
        raise ValueError(f"threads must be from 1 to {cpu.MAX_THREADS}, got {threads!r}")
    return threads


__all__ = ["Choice", "Chooser", "Plan", "default_choice", "plan", "resolve"]
