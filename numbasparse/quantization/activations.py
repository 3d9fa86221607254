"""Activations of few bits, simulated: calibration, and rounding in front of layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from numbasparse.levels import check_bits
from numbasparse.pruning.layers import LayerFilter
from numbasparse.quantization.layers import Layers, select_layers
from numbasparse.quantization.linear import check_choice, check_percentile

_SAMPLE = 1 << 14
"""Values of each batch that a percentile is taken from."""


@dataclass(frozen=True)
class ActivationQuantization:
    """Round a layer's input to evenly spaced levels, zero among them (affine, one scale for the tensor).

    Parameters
    ----------
    bits : int
        2 to 8.
    range : {"minmax", "percentile"}
        All values seen in calibration; or without the outermost ``100 - percentile`` percent, half at each end,
        of a random sample of 16384 values of each batch.
    percentile : float
        In (50, 100], for ``range="percentile"``.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    bits: int = 8
    range: Literal["minmax", "percentile"] = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice("range", self.range, ("minmax", "percentile"))
        check_percentile(self.percentile)


class FakeQuantize(nn.Module):
    """Round to levels and return floats; the gradient passes straight through within the range.

    Parameters
    ----------
    low, high : float
        Range of the levels, extended to zero.
    bits : int

    Attributes
    ----------
    scale, zero : Tensor
        Buffers: float32 (1,) distance of two levels, int32 (1,) code of zero.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, low: float, high: float, bits: int) -> None:
        super().__init__()
        self.most = (1 << bits) - 1
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / self.most or 1.0
        self.register_buffer("scale", torch.tensor([scale]))
        self.register_buffer("zero", torch.tensor([round(-low / scale)], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, of any shape."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, self.most)

    def extra_repr(self) -> str:
        return f"codes=0..{self.most}"


def quantize_activations_(
    model: nn.Module,
    batches: Iterable[Any],
    config: ActivationQuantization | None = None,
    filter: LayerFilter | None = None,
) -> dict[str, tuple[float, float]]:
    """Round the inputs of a model's layers to few bits, in ranges measured on data; in place.

    Each chosen layer ``name`` becomes an ``nn.Sequential`` of a `FakeQuantize`, ``name.quantize``, and itself,
    ``name.layer``: keys of the ``state_dict`` change so. The rounding is simulated: it shows the accuracy at that
    many bits, and retraining can adapt to it. The package's kernels compute with float32 activations; it
    makes nothing faster.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Run in eval mode.
    batches : iterable
        Calibration data: inputs, or tuples that begin with the input, as of (x, y). One image is enough to run;
        some hundred make the ranges those of the data.
    config : ActivationQuantization, optional
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; the same default as for pruning if not given.

    Returns
    -------
    dict of str to (float, float)
        Least and greatest value of the range of each layer's input, by the layer's former name.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen, the model itself is a layer, there are no batches, a layer's input holds NaN or
        infinity, or no batch reaches a layer. The model is then unchanged.
    """
    config = ActivationQuantization() if config is None else config
    if not isinstance(config, ActivationQuantization):
        raise TypeError(f"config must be an ActivationQuantization, got {type(config).__name__}")
    layers = select_layers(model, filter)
    if "" in layers:
        raise ValueError("the model itself is a layer, which cannot be replaced in place: put it into nn.Sequential")
    ranges = _measure(model, layers, batches, config)
    for name, (low, high) in ranges.items():
        quantize = FakeQuantize(low, high, config.bits).to(layers[name].get_parameter("weight").device)
        parts = OrderedDict([("quantize", quantize), ("layer", layers[name])])
        _replace(model, layers[name], nn.Sequential(parts).train(layers[name].training))
    return ranges


class _Observer:
    """What passes into one layer."""

    def __init__(self, name: str, config: ActivationQuantization) -> None:
        self.name, self.config = name, config
        self.low, self.high = math.inf, -math.inf
        self.samples: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"the input of layer {self.name!r} holds NaN or infinity: check the calibration data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.config.range == "percentile":
            places = torch.randint(x.numel(), (min(x.numel(), _SAMPLE),), generator=self.generator)
            self.samples.append(x.flatten()[places.to(x.device)].float().cpu())

    def range(self) -> tuple[float, float]:
        """Least and greatest value of the range."""
        if self.high < self.low:
            raise ValueError(f"no batch reaches layer {self.name!r}: leave it out with filter, or give other data")
        if not self.samples:
            return self.low, self.high
        outside = (100.0 - self.config.percentile) / 200
        values = torch.cat(self.samples).sort().values
        last = len(values) - 1
        return float(values[round(outside * last)]), float(values[round((1.0 - outside) * last)])


def _measure(
    model: nn.Module, layers: Layers, batches: Iterable[Any], config: ActivationQuantization
) -> dict[str, tuple[float, float]]:
    observers = {name: _Observer(name, config) for name in layers}
    with _watched(model, layers, observers), torch.no_grad():
        seen = 0
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            seen += 1
    if not seen:
        raise ValueError("there are no calibration batches: expected at least one input")
    return {name: observer.range() for name, observer in observers.items()}


@contextmanager
def _watched(model: nn.Module, layers: Layers, observers: dict[str, _Observer]) -> Iterator[None]:
    """The model in eval mode with an observer at each layer; all is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    handles = [layers[name].register_forward_pre_hook(observer) for name, observer in observers.items()]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever it stands."""
    for parent in list(model.modules()):
        # Not named_children: it lists a child that stands in two places once.
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
