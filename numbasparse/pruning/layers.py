"""Layers: which parts of a model are pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from numbasparse.pruning.vectors import VectorGrid

MASK = "weight_mask"
"""Name of the buffer that holds a layer's mask."""

LayerFilter = Callable[[nn.Module, str], bool]
"""``(module, qualified_name) -> bool``: true for the layers to prune."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A chosen layer.

    Attributes
    ----------
    name : str
        Qualified name; empty if the model itself is the layer.
    module : nn.Module
        It has a parameter ``weight``, output channels first.
    first, last : bool
        Whether it is the model's first convolution, and its last convolution or linear layer, in the order of
        ``named_modules``.
    """

    name: str
    module: nn.Module
    first: bool
    last: bool

    @property
    def weight(self) -> nn.Parameter:
        """The weight, as it is now."""
        return self.module.get_parameter("weight")

    def grid(self, vector: int) -> VectorGrid:
        """Return how the weight is cut into vectors of ``vector`` output channels."""
        return VectorGrid(tuple(self.weight.shape), int(getattr(self.module, "groups", 1)), vector)


Layers = dict[str, Layer]


def default_filter(module: nn.Module, name: str) -> bool:
    """Choose every ``nn.Conv2d`` except depthwise ones and those on images (3 input channels or fewer).

    Both hold few weights, cost little time and lose much accuracy when pruned.
    """
    if not isinstance(module, nn.Conv2d) or module.in_channels <= 3:
        return False
    return module.groups != module.in_channels


def select_layers(model: nn.Module, filter: LayerFilter | None = None) -> Layers:
    """Return the layers a filter chooses, by qualified name, in the order of ``named_modules``.

    Parameters
    ----------
    model : nn.Module
        The model, not changed.
    filter : callable, optional
        ``(module, qualified_name) -> bool``; ``default_filter`` if not given. A weight shared by several
        layers is listed once, under the first.

    Raises
    ------
    TypeError
        If ``model`` is not a module or ``filter`` cannot be called.
    ValueError
        If no layer is chosen, or a chosen module has no weight parameter with values of its own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    chosen = filter or default_filter
    first, last = _ends(model)
    layers: Layers = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if chosen(module, name) and id(weight := layer_weight(module, name)) not in seen:
            seen.add(id(weight))
            layers[name] = Layer(name, module, module is first, module is last)
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} was chosen for pruning: expected at least one "
            + ("that the filter accepts" if filter else "nn.Conv2d, not depthwise, of 4 or more input channels")
            + "; pass filter=lambda module, name: ... to choose layers yourself"
        )
    return layers


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the first convolution and the last convolution or linear layer."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    weighted = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return (convolutions or [None])[0], (weighted or [None])[-1]  # type: ignore[list-item]


def layer_weight(module: nn.Module, name: str) -> nn.Parameter:
    """Return the weight parameter of a chosen layer, or raise ``ValueError`` if it cannot be pruned."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    what = f"layer {name!r} ({type(module).__name__})"
    if weight is None:
        raise ValueError(
            f"{what} was chosen for pruning but has no parameter 'weight': let the filter choose modules like "
            "nn.Conv2d or nn.Linear, and remove parametrizations (torch.nn.utils.prune, weight_norm) first"
        )
    if nn.parameter.is_lazy(weight) or weight.is_meta or weight.numel() == 0:
        raise ValueError(f"the weight of {what} has no values: initialize or load the model first")
    if not weight.is_floating_point():
        raise ValueError(f"the weight of {what} must have a floating dtype, got {weight.dtype}")
    return weight


def weights_of(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the weight parameter of every layer."""
    return {name: layer.weight for name, layer in layers.items()}
