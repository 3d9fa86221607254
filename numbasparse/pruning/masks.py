"""Masks: choosing layers, computing masks, keeping them on modules; one-shot pruning.

While a layer is being pruned it carries a bool buffer ``weight_mask`` of the weight's shape, true where the
weight lives. It is an ordinary persistent buffer, so ``state_dict``, ``deepcopy`` and ``to(device)`` take it
along. Nothing is hooked into the forward pass: a pruned weight *is* zero in ``weight`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from numbasparse.pruning.allocation import top_mask
from numbasparse.pruning.criteria import PruningConfig
from numbasparse.pruning.summary import PruningReport, count

MASK = "weight_mask"
"""Name of the buffer that holds a layer's mask."""

LayerFilter = Callable[[nn.Module, str], bool]
"""``(module, qualified_name) -> bool``: true for the layers to prune."""

Layers = dict[str, nn.Module]


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
    layers: Layers = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if chosen(module, name) and id(weight := layer_weight(module, name)) not in seen:
            seen.add(id(weight))
            layers[name] = module
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} was chosen for pruning: expected at least one "
            + ("that the filter accepts" if filter else "nn.Conv2d, not depthwise, of 4 or more input channels")
            + "; pass filter=lambda module, name: ... to choose layers yourself"
        )
    return layers


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


def weights_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the weight parameter of every layer."""
    return {name: layer_weight(module, name) for name, module in layers.items()}


def compute_masks(layers: Mapping[str, nn.Module], config: PruningConfig, sparsity: float) -> dict[str, Tensor]:
    """Compute the mask of every layer; nothing is changed.

    Weights that an earlier mask on the layer has pruned stay pruned.

    Parameters
    ----------
    layers : mapping of str to nn.Module
        As from ``select_layers``.
    config : PruningConfig
        Criterion and allocation.
    sparsity : float
        In [0, 1); the config's own or a step of a schedule on the way there.

    Returns
    -------
    dict of str to Tensor
        bool masks of the weights' shapes, on their devices, true where a weight is kept.

    Raises
    ------
    ValueError
        If a weight is NaN or infinite, or the sparsity would empty a layer.
    """
    with torch.no_grad():
        scores = {name: _scores(module, name, config) for name, module in layers.items()}
        keep = config.allocation(scores, sparsity)
        masks = {name: top_mask(score, keep[name]) for name, score in scores.items()}
        return {name: mask & ~_pruned(layers[name]) for name, mask in masks.items()}


def _scores(module: nn.Module, name: str, config: PruningConfig) -> Tensor:
    weight = layer_weight(module, name)
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(
            f"the weight of layer {name!r} has {bad} NaN or infinite values of {weight.numel()}: it cannot be "
            "ranked; load a sound checkpoint, or lower the learning rate if training diverged"
        )
    return config.criterion(weight).masked_fill(_pruned(module), -torch.inf)


def _pruned(module: nn.Module) -> Tensor:
    """Return where the layer's present mask has pruned; a single false if it has no mask."""
    mask = mask_of(module)
    weight = module.get_parameter("weight")
    return torch.zeros((), dtype=torch.bool, device=weight.device) if mask is None else ~mask


def mask_of(module: nn.Module) -> Tensor | None:
    """Return the mask kept on a module, or None."""
    mask = dict(module.named_buffers(recurse=False)).get(MASK)
    # torch.nn.utils.prune has a buffer of the same name, but of the weight's dtype: not ours.
    return mask if mask is not None and mask.dtype == torch.bool else None


def put_masks(layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Keep masks on modules as buffers ``weight_mask``, in place of earlier ones, and apply them."""
    for name, module in layers.items():
        present = mask_of(module)
        if present is None:
            # The weight's memory format, so that applying the mask is one pass over both.
            present = torch.empty_like(layer_weight(module, name), dtype=torch.bool, requires_grad=False)
            module.register_buffer(MASK, present)
        present.copy_(masks[name])
    apply_masks(layers)


def apply_masks(layers: Mapping[str, nn.Module]) -> None:
    """Set every pruned weight to exactly +0.0 in place, by the masks kept on the modules."""
    with torch.no_grad():
        for name, module in layers.items():
            # Not a product: that would give -0.0 for negative weights and NaN for infinite ones.
            layer_weight(module, name).masked_fill_(_pruned(module), 0.0)


def fold_masks(model: nn.Module) -> None:
    """Apply and remove every mask on a model, so that its ``state_dict`` has its original keys.

    ``Pruner.finish`` does this for its own model; call this one on a copy made while pruning was going on.
    """
    masked = {name: module for name, module in model.named_modules() if mask_of(module) is not None}
    apply_masks(masked)
    for module in masked.values():
        delattr(module, MASK)


def check_config(config: PruningConfig) -> None:
    """Raise ``TypeError`` if ``config`` is not a pruning config."""
    if isinstance(config, type) or not all(hasattr(config, a) for a in ("sparsity", "criterion", "allocation")):
        raise TypeError(f"config must be a pruning config like MagnitudePruning(sparsity=0.9), got {config!r}")


def prune_(model: nn.Module, config: PruningConfig, filter: LayerFilter | None = None) -> PruningReport:
    """Prune a model at once and in place: set its least important weights to zero.

    No mask or hook is left on the model. Everything is checked and computed before the first weight changes:
    after an error the model is as it was. Every chosen layer keeps at least one weight, so ``scope="layer"``
    misses the sparsity in a layer with very few weights; the total of ``scope="global"`` is exact.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    config : PruningConfig
        For example ``MagnitudePruning(sparsity=0.9, scope="global")``.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.

    Returns
    -------
    PruningReport
        Sparsity of the chosen layers.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen, a weight is NaN or infinite, or fewer weights than layers would be kept.
    """
    check_config(config)
    layers = select_layers(model, filter)
    masks = compute_masks(layers, config, config.sparsity)
    weights = weights_of(layers)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~masks[name], 0.0)
    return count(weights)


def report(model: nn.Module, filter: LayerFilter | None = None) -> PruningReport:
    """Report the sparsity of a model's layers (the same default choice as ``prune_``).

    Parameters
    ----------
    model : nn.Module
        Not changed.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``.
    """
    return count(weights_of(select_layers(model, filter)))
