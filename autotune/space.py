"""What is tuned: problems, and the candidates of each over all kernels of a device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from numbasparse.activations import check_activation
from numbasparse.kernels import Config, Kernel, kernels_for
from numbasparse.plans import Choice
from numbasparse.spec import DTYPES, ConvSpec
from numbasparse.weight import SparseWeight

_DTYPE_ON = {
    "cpu": dict.fromkeys(DTYPES, "float32"),
    "cuda": {name: name for name in DTYPES} | {"float64": "float32"},
}
"""What a kind of device computes a problem of a dtype as."""

_SUGGESTED = 24


def dtype_on(kind: str, dtype: str) -> str:
    """The dtype that a kind of device computes a problem of ``dtype`` as.

    Raises
    ------
    ValueError
        If ``dtype`` is none of `numbasparse.spec.DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return _DTYPE_ON[kind][dtype]


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer to tune.

    Attributes
    ----------
    name
        The layer's name; several problems may share it, with different specs.
    spec
        Shapes and dtype; which dtypes differ depends on the device, see `on`.
    weight
        Of the spec's weight shape.
    bias : float32, (K,), optional
    activation
        None, or as in `numbasparse.activations`.
    """

    name: str
    spec: ConvSpec
    weight: SparseWeight
    bias: np.ndarray | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a layer's name must be a string, got {self.name!r}")
        if not isinstance(self.spec, ConvSpec) or not isinstance(self.weight, SparseWeight):
            raise TypeError(
                f"expected a ConvSpec and a SparseWeight, got {type(self.spec).__name__} and "
                f"{type(self.weight).__name__} (layer {self.name!r})"
            )
        self.spec.check_weight_shape(self.weight.shape, name=self.name)
        if self.weight.groups != self.spec.groups:
            raise ValueError(
                f"weight has groups={self.weight.groups}, the spec has groups={self.spec.groups} (layer {self.name!r})"
            )
        if self.bias is not None:
            self.spec.check_bias_shape(np.shape(self.bias), name=self.name)
        activation = check_activation(self.activation)
        object.__setattr__(self, "activation", None if activation == "none" else activation)

    def on(self, kind: str) -> LayerProblem:
        """The problem as a kind of device has it: all is float32 on the CPU, only float64 is on a GPU."""
        return replace(self, spec=replace(self.spec, dtype=dtype_on(kind, self.spec.dtype)))

    @property
    def identity(self) -> tuple[ConvSpec, str, str | None]:
        """Equal for problems that are tuned as one."""
        return self.spec, self.weight.fingerprint, self.activation


@dataclass(frozen=True)
class Candidate:
    """A kernel and a config of it."""

    kernel: str
    config: Config

    @cached_property
    def key(self) -> str:
        """Text that is equal for equal candidates."""
        return f"{self.kernel} {json.dumps(self.config, sort_keys=True)}"

    @property
    def choice(self) -> Choice:
        return Choice(self.kernel, dict(self.config))

    @cached_property
    def params(self) -> dict[str, int | str]:
        """Parameters of the candidate for Optuna: the kernel's own are ``"kernel.parameter"``."""
        return {"kernel": self.kernel, **{f"{self.kernel}.{name}": value for name, value in self.config.items()}}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Candidate:
        """The reverse of `params`.

        Raises
        ------
        ValueError
            If they are no candidate's.
        """
        kernel = params.get("kernel")
        if not isinstance(kernel, str):
            raise ValueError(f"expected the parameter 'kernel', got {sorted(params)}")
        prefix = f"{kernel}."
        return cls(kernel, {name.removeprefix(prefix): v for name, v in params.items() if name.startswith(prefix)})

    def distance(self, other: Candidate) -> int:
        """In how many parameters two candidates differ; kernels have no parameter in common."""
        if self.kernel != other.kernel:
            return 1 + len(self.config) + len(other.config)
        return sum(value != other.config.get(name) for name, value in self.config.items())


class ProblemSpace:
    """Every candidate of a problem.

    Attributes
    ----------
    kernels
        The device's kernels that run the problem, by name.
    spaces
        For each kernel's name, its search space.
    candidates
        All valid ones, by key.
    dense, defaults
        Those that are always measured: the layouts of the dense kernels, and every sparse kernel's default.
    suggestions
        Of each sparse kernel, in the order of `defaults`, those that it finds promising itself, the best first.
    """

    def __init__(self, problem: LayerProblem, threads: int, device: str = "cpu") -> None:
        spec, weight = problem.spec, problem.weight
        self._problem = problem
        self.kernels: dict[str, Kernel] = {k.name: k for k in kernels_for(device) if k.supports(spec, weight) is None}
        self.spaces = {
            name: {parameter: tuple(values) for parameter, values in k.space(spec, weight, threads).items()}
            for name, k in self.kernels.items()
        }
        valid = {name: list(k.configs(spec, weight, threads)) for name, k in self.kernels.items()}
        every = [Candidate(name, c) for name, configs in valid.items() for c in configs]
        self.candidates = {c.key: c for c in every}
        self.dense = [c for c in every if self.kernels[c.kernel].is_dense]
        sparse = [k for k in self.kernels.values() if not k.is_dense]
        self.suggestions = [
            [Candidate(k.name, c) for c in k.suggest(spec, weight, threads, _SUGGESTED, valid[k.name])] for k in sparse
        ]
        self.defaults = [candidates[0] for candidates in self.suggestions]
        self._place = {key: number for number, key in enumerate(self.candidates)}

    def check(self, candidate: Candidate) -> str | None:
        """Reason why the candidate cannot run, or None."""
        if candidate.kernel not in self.kernels:
            return f"kernel {candidate.kernel!r} does not run this problem"
        return self.kernels[candidate.kernel].check(self._problem.spec, self._problem.weight, candidate.config)

    def is_dense(self, candidate: Candidate) -> bool:
        return self.kernels[candidate.kernel].is_dense

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Candidates that differ in one parameter from one."""
        found = (
            self.candidates.get(Candidate(candidate.kernel, {**candidate.config, name: value}).key)
            for name, values in self.spaces[candidate.kernel].items()
            for value in values
            if value != candidate.config[name]
        )
        return sorted((c for c in found if c is not None), key=lambda c: self._place[c.key])

    def nearest(self, wanted: Candidate, among: Iterable[Candidate]) -> Candidate | None:
        """The candidate that differs from ``wanted`` in the fewest parameters; the first of several."""
        return min(among, key=wanted.distance, default=None)

    @property
    def digest(self) -> str:
        """Hex digest of kernels, versions and spaces: a study of another space is another study."""
        described = [[name, k.version, list(self.spaces[name].items())] for name, k in sorted(self.kernels.items())]
        return blake2b(json.dumps(described).encode(), digest_size=6).hexdigest()
