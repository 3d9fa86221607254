"""Choices: which kernel and config run a problem, named by a user, a tuned file or the stated default."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numbasparse.kernels import Config, ConfigError, kernel, kernels_for
from numbasparse.spec import DTYPES, ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch

DENSE_ABOVE = 0.4
"""Density from which an untuned layer is run dense on the CPU, where torch is there to run it (the stated default)."""

LINEAR_DENSE_ABOVE = 0.25
"""Density from which a linear layer stays dense, tuned or not: the tuner compares with torch's 1x1 convolution, and
``torch.nn.functional.linear`` is up to three times as fast (4096 x 4096, eight vectors, two cores with AVX2).  At 0.25
the sparse kernels were ahead of both on 1, 8 and 64 vectors."""

DENSE_ABOVE_CUDA = {"float32": 0.12, "float64": 0.12, "float16": 0.0, "bfloat16": 0.0}
"""The same for GPUs, by dtype.

In float32, 3x3 layers from and to NCHW, conversions counted, ran at 1.2 times cuDNN's speed at density 0.2 and 1.7
times at 0.1 (geometric means of six layers on an H100, batch of 32, tuned: benchmarks/results/cuda_layers.json), single
layers at 0.8 and 1.2.  In 16 bits cuDNN runs on tensor cores, and only tuning tells where a sparse kernel wins.
"""


@dataclass(frozen=True)
class Choice:
    """A kernel and its config: what a tuner chooses and a plan runs.  Not to be changed, its config neither."""

    kernel: str
    config: Config = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """Text that is equal for equal choices; a text keeps its hash."""
        return f"{self.kernel} {sorted(self.config.items())}"


@dataclass(frozen=True)
class Measured:
    """A choice for a GPU and its times in microseconds: with the input and output in its own layouts, and alone."""

    choice: Choice
    native_us: float
    alone_us: float


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


def overlap(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the contiguous ``out`` lies within the bytes that ``x`` spans."""
    size = x.element_size()
    end = x.data_ptr() + size + size * sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return out.data_ptr() < end and x.data_ptr() < out.data_ptr() + out.numel() * out.element_size()


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


def check_float(name: str) -> None:
    """Raise unless ``name`` is a dtype that can be convolved."""
    if name not in DTYPES:
        raise TypeError(f"expected x of dtype {', '.join(DTYPES)}, got {name}: convert it first")
