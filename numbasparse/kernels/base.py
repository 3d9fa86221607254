"""What a kernel is: one algorithm on one kind of device, its limits, its search space, its packed weight form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from numbasparse.activations import Activation

if TYPE_CHECKING:
    import torch

    from numbasparse.runtime.cuda import Function, Ptx
    from numbasparse.runtime.layouts import Layout
    from numbasparse.spec import ConvSpec
    from numbasparse.weight import SparseWeight

Config = dict[str, int | str]
"""One point of a kernel's search space."""

Space = Mapping[str, Sequence[int | str]]
"""Search space: for each parameter its choices.  Not every combination is valid: see `Kernel.check`."""


class ConfigError(ValueError):
    """A config that the kernel cannot run for this spec and weight."""


class Runner(ABC):
    """A packed weight with compiled code, ready to run one spec on memory.

    Attributes
    ----------
    nbytes
        Bytes of the packed weight.
    workspace
        Scratch bytes that each thread needs while it runs.
    """

    nbytes: int
    workspace: int

    @abstractmethod
    def run(self, x: int, y: int, bias: int, threads: int, residual: int = 0) -> None:
        """Convolve into ``y``.

        All are addresses of float32 in C order: ``x`` (N, C, H, W), ``y`` (N, K, OH, OW), ``bias`` (K,), and
        ``residual`` (N, K, OH, OW), which is added before the activation; 0 for none.  Outputs may be written
        more than once: ``y`` must not overlap ``x`` or ``residual``.
        """


class TorchRunner(ABC):
    """A runner that is an operation of torch: it makes its own output.

    Attributes as in `Runner`.
    """

    nbytes: int
    workspace: int = 0

    @abstractmethod
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve a float32 tensor (N, C, H, W), add ``residual``, like the result, and apply the activation.

        Returns (N, K, OH, OW), contiguous.
        """


class CudaRunner(TorchRunner):
    """A packed weight on a GPU with its loaded code.

    Attributes
    ----------
    nbytes, workspace
        As in `Runner`; the weight's bytes are the device's.
    takes, gives
        Layouts that the kernel reads and writes without a conversion.
    functions
        The loaded kernels, whose registers and occupancy can be read; none where the code is a library's.
    """

    takes: Layout
    gives: Layout
    functions: tuple[Function, ...] = ()

    @abstractmethod
    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_layout: Layout | None = None,
    ) -> torch.Tensor:
        """Convolve on torch's current stream; the current device is the one that it was prepared on.

        Parameters
        ----------
        x : CUDA tensor (N, C, H, W) of the spec's dtype
            In any layout: converted to `takes` where it has another one.
        bias : CUDA tensor (K,), optional
            float32, contiguous.
        residual : CUDA tensor (N, K, OH, OW) of the spec's dtype, optional
            In any layout; added before the activation.
        out_layout : Layout, optional
            Of the result; None is `gives`.

        Returns
        -------
        CUDA tensor (N, K, OH, OW) of the spec's dtype
        """


class Kernel(ABC):
    """One algorithm.  Subclasses are stateless; one instance of each stands in the kernels' table."""

    name: ClassVar[str]
    device: ClassVar[str]
    is_dense: ClassVar[bool] = False
    """Whether zeros are computed too: the rival that every choice is measured against."""
    version: ClassVar[int]
    """Raised when configs of an older version no longer mean the same: tuned files carry it."""

    @abstractmethod
    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        """Reason why the kernel cannot run this problem, or None."""

    @abstractmethod
    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        """Search space worth measuring for this problem."""

    @abstractmethod
    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        """Reason why this config cannot run here, or None.  Total: never raises for any dict."""

    @abstractmethod
    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        """A config that is good without tuning."""

    def suggest(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        threads: int,
        count: int,
        valid: Sequence[Config] | None = None,
    ) -> list[Config]:
        """At most ``count`` configs that are worth measuring first, the default leading.

        ``valid`` are all of `configs`, where the caller has them.
        """
        return [self.default(spec, weight, threads)]

    @abstractmethod
    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> Runner | TorchRunner:
        """Pack the weight and compile the code.

        Raises
        ------
        ConfigError
            If ``config`` cannot run here; the text says why.
        """

    def configs(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Iterator[Config]:
        """Every valid config of the search space."""
        return self.valid(spec, weight, self.space(spec, weight, threads))

    def valid(self, spec: ConvSpec, weight: SparseWeight, space: Space) -> Iterator[Config]:
        """Every valid config of a space."""
        for values in product(*space.values()):
            config = dict(zip(space, values, strict=True))
            if self.check(spec, weight, config) is None:
                yield config

    def require(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> None:
        """Raise `ConfigError` where `supports` or `check` gives a reason."""
        reason = self.supports(spec, weight) or self.check(spec, weight, config)
        if reason is not None:
            raise ConfigError(f"kernel {self.name!r} cannot run config {config} for {spec.key}: {reason}")


class CudaKernel(Kernel):
    """An algorithm for NVIDIA GPUs.  It learns about the GPU from `numbasparse.runtime.cuda.current`.

    ``threads`` means nothing here: 1 is passed.
    """

    device = "cuda"

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[Layout, Layout]:
        """`CudaRunner.takes` and `CudaRunner.gives` of what `prepare` makes; NCHW unless a kernel says otherwise."""
        return "NCHW", "NCHW"

    @abstractmethod
    def ptx(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> tuple[Ptx, ...]:
        """The kernels that `prepare` loads (none where the code is a library's).  Needs no GPU.

        Raises
        ------
        ConfigError
            If ``config`` cannot run here.
        """

    @abstractmethod
    def prepare(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        config: Config,
        activation: Activation = "none",
    ) -> CudaRunner:
        """Pack the weight onto torch's current device and load the code.

        Raises
        ------
        ConfigError
            If ``config`` cannot run here; the text says why.
        numbasparse.runtime.cuda.CudaError
            If there is no usable GPU.
        """


def check_fields(config: Config, fields: Mapping[str, Sequence[str] | tuple[int, int]]) -> str | None:
    """Reason why ``config`` does not have exactly ``fields``.

    A field is a range of ints, a sequence of allowed texts, or empty for any text.
    """
    if set(config) != set(fields):
        return f"expected the parameters {sorted(fields)}, got {sorted(map(str, config))}"
    for name, allowed in fields.items():
        value = config[name]
        if not allowed:
            if not isinstance(value, str):
                return f"{name} must be a text, got {value!r}"
        elif isinstance(allowed[0], str):
            if value not in allowed:
                return f"{name} must be one of {list(allowed)}, got {value!r}"
        elif isinstance(value, bool) or not isinstance(value, int):
            return f"{name} must be an integer, got {value!r}"
        elif not allowed[0] <= value <= allowed[1]:  # type: ignore[operator]
            return f"{name} must be from {allowed[0]} to {allowed[1]}, got {value}"
    return None
