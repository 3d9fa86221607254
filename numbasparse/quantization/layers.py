"""Layers of a PyTorch model that are quantized, and quantizing them at once."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from numbasparse.pruning.layers import LayerFilter, default_filter
from numbasparse.quantization.summary import QuantizationReport, compare
from numbasparse.weight import Quantization, SparseWeight, as_convolution


class QuantizationConfig(Quantization, Protocol):
    """What `quantize_` and `Quantizer` ask of a config."""

    @property
    def bits(self) -> int:
        """Bits of a code, 2 to 8."""


Layers = dict[str, nn.Module]


def quantize_(model: nn.Module, config: QuantizationConfig, filter: LayerFilter | None = None) -> QuantizationReport:
    """Quantize a model's weights at once and in place: each becomes the nearest level. Zeros stay zero.

    The weights stay float32 tensors, which hold few different values;
    ``SparseWeight.from_dense(weight, groups, quantization=config)`` finds the very same levels in them again.
    Everything is computed before the first weight changes: after an error the model is as it was.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    config : LinearQuantization or CodebookQuantization
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; the same default as for pruning if not given.

    Returns
    -------
    QuantizationReport
        Per layer: bits, error, bytes; and the weights as quantized `SparseWeight`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen, or a weight is not float32, NaN or infinite.
    """
    check_config(config)
    layers = select_layers(model, filter)
    before = {name: dense_weight(module.get_parameter("weight")) for name, module in layers.items()}
    after = {name: to_sparse(name, module, before[name], config) for name, module in layers.items()}
    with torch.no_grad():
        for name, module in layers.items():
            put_weight(module, after[name])
    return QuantizationReport(tuple(compare(name, before[name], after[name]) for name in layers))


def check_config(config: object) -> None:
    """Raise TypeError if ``config`` is no quantization config."""
    if isinstance(config, type) or not callable(getattr(config, "fit", None)) or not hasattr(config, "bits"):
        raise TypeError(f"config must be a quantization config like LinearQuantization(bits=8), got {config!r}")


def select_layers(model: nn.Module, filter: LayerFilter | None = None) -> Layers:
    """Return the layers a filter chooses, by qualified name; one that shares its weight with another once.

    Raises
    ------
    TypeError, ValueError
        As `quantize_`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    chosen = {name: m for name, m in model.named_modules() if (filter or default_filter)(m, name)}
    layers: Layers = {}
    seen: set[int] = set()
    for name, module in chosen.items():
        _check_weight(module, name)
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} was chosen: expected at least one "
            + ("that the filter accepts" if filter else "nn.Conv2d, not depthwise, of 4 or more input channels")
            + "; pass filter=lambda module, name: ... to choose layers yourself"
        )
    return layers


def _check_weight(module: nn.Module, name: str) -> None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    what = f"layer {name!r} ({type(module).__name__})"
    if weight is None:
        raise ValueError(
            f"{what} was chosen but has no parameter 'weight': let the filter choose modules like nn.Conv2d or "
            "nn.Linear, and remove parametrizations (torch.nn.utils.prune, weight_norm) first"
        )
    if nn.parameter.is_lazy(weight) or weight.is_meta or weight.numel() == 0:
        raise ValueError(f"the weight of {what} has no values: initialize or load the model first")
    if weight.dtype != torch.float32:
        raise ValueError(
            f"the weight of {what} must be float32, got {weight.dtype}: quantize the float32 model (mixed precision "
            "is torch.autocast around its forward pass)"
        )
    if not 2 <= weight.dim() <= 4:
        raise ValueError(f"the weight of {what} must have 2 to 4 dimensions, got shape {tuple(weight.shape)}")


def dense_weight(weight: torch.Tensor) -> NDArray[np.float32]:
    """Return a weight as NumPy array of its own, (K, C/groups, R, S); a linear layer's has R = S = 1."""
    array: NDArray[np.float32] = as_convolution(weight.detach().cpu().numpy().copy())
    return array


def to_sparse(name: str, module: nn.Module, weight: NDArray[np.float32], config: QuantizationConfig) -> SparseWeight:
    """Return a layer's weight quantized; errors name the layer."""
    try:
        groups = cast(int, getattr(module, "groups", 1))
        return SparseWeight.from_dense(weight, groups, quantization=config)
    except ValueError as error:
        raise ValueError(f"{error} (layer {name!r})") from None


def put_weight(module: nn.Module, weight: SparseWeight) -> None:
    """Write a weight into a layer, without a gradient."""
    parameter = module.get_parameter("weight")
    parameter.copy_(torch.from_numpy(weight.to_dense()).reshape(parameter.shape))
