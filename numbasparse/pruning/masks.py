"""Masks: computing them, keeping them on modules, and applying them.

While a layer is being pruned it carries a bool buffer ``weight_mask`` of the weight's shape, true where the weight
lives. It is an ordinary persistent buffer, so ``state_dict``, ``deepcopy`` and ``to(device)`` take it along. Nothing is
hooked into the forward pass, so a compiled model stays valid: a pruned weight *is* zero in ``weight`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from numbasparse.pruning import ranks
from numbasparse.pruning.allocation import LayerScores, top_mask
from numbasparse.pruning.criteria import Placement, PruningConfig
from numbasparse.pruning.layers import MASK, Layer, Layers


def check_config(config: PruningConfig) -> None:
    """Raise ``TypeError`` if ``config`` is not a pruning config that needs nothing but weights."""
    if hasattr(config, "new_weights") and not isinstance(config, type):
        raise TypeError(f"{type(config).__name__} needs data: call prune_with_data_(model, batches, config)")
    if isinstance(config, type) or not all(
        hasattr(config, name) for name in ("sparsity", "vector", "two_of_four", "criterion", "allocation")
    ):
        raise TypeError(f"config must be a pruning config like MagnitudePruning(sparsity=0.9), got {config!r}")


def compute_masks(
    layers: Mapping[str, Layer], config: PruningConfig, sparsity: float, *, regrow: bool = False
) -> dict[str, Tensor]:
    """Compute the mask of every layer; nothing is changed.

    Parameters
    ----------
    layers : mapping of str to Layer
        As from ``select_layers``.
    config : PruningConfig
        Criterion, granularity and allocation.
    sparsity : float
        In [0, 1); the config's own or a step of a schedule on the way there.
    regrow : bool
        Whether weights that an earlier mask on the layer has pruned may come back.

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
        check_finite(layers)
        scores = {name: config.criterion(layer.weight) for name, layer in layers.items()}
        return masks_from_scores(layers, scores, config, sparsity, regrow=regrow)


def masks_from_scores(
    layers: Mapping[str, Layer],
    scores: Mapping[str, Tensor],
    config: Placement,
    sparsity: float,
    *,
    regrow: bool = False,
) -> dict[str, Tensor]:
    """Compute the mask of every layer from scores of its weights; see `compute_masks`."""
    vectors = {name: _vector_scores(layer, scores[name], config.vector, regrow) for name, layer in layers.items()}
    # Not before the end of a schedule: which two of four stay is decided when the others have been trained as long.
    beyond = {}
    if config.two_of_four and sparsity >= config.sparsity:
        beyond = {name: found.grid.beyond_two(found.values) for name, found in vectors.items()}
        vectors = {name: found.without(beyond[name]) for name, found in vectors.items()}
    keep = config.allocation(vectors, sparsity)
    masks = {name: top_mask(vectors[name], keep[name]) for name in layers}
    masks |= {name: masks[name] & ~vectors[name].grid.expand(out) for name, out in beyond.items()}
    return masks if regrow else {name: mask & ~_pruned(layers[name].module) for name, mask in masks.items()}


def check_finite(layers: Mapping[str, Layer]) -> None:
    """Raise ``ValueError`` if a weight is NaN or infinite."""
    device = next(iter(layers.values())).weight.device
    # Read all counts at once: each reading waits for a GPU.
    bad = torch.stack([(~torch.isfinite(x.weight)).sum().to(device) for x in layers.values()]).tolist()
    for layer, count in zip(layers.values(), bad, strict=True):
        if count:
            raise ValueError(
                f"the weight of layer {layer.name!r} has {count} NaN or infinite values of {layer.weight.numel()}: it "
                "cannot be ranked; load a sound checkpoint, or lower the learning rate if training diverged"
            )


def _vector_scores(layer: Layer, scores: Tensor, vector: int, regrow: bool) -> LayerScores:
    grid = layer.grid(vector)
    scores = scores.detach()
    # Means of half floats would be rounded, and equal where they are not.
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if regrow or mask_of(layer.module) is None:
        return LayerScores(grid.mean(scores), grid, layer.first, layer.last)
    pruned = _pruned(layer.module)
    values = grid.mean(scores.masked_fill(pruned, 0.0)).masked_fill(grid.all(pruned), -torch.inf)
    return LayerScores(values, grid, layer.first, layer.last)


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


def set_masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every pruned weight to exactly +0.0 in place."""
    with torch.no_grad():
        for name, weight in weights.items():
            # Not a product: that would give -0.0 for negative weights and NaN for infinite ones.
            weight.masked_fill_(~masks[name], 0.0)


class MaskSet:
    """The masks of some layers, kept on the modules as buffers and applied to all weights in one operation.

    ``apply_fused`` is a single in-place multiplication over all layers, with no decision, allocation or
    synchronization: it may stand in a compiled step or in a CUDA graph. New masks are copied into the same memory, so
    that a graph captured before stays right.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._weights: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._seen: list[tuple[Tensor, int]] = []

    def put(self, masks: Mapping[str, Tensor]) -> None:
        """Keep masks on the modules, in place of earlier ones, and apply them.

        In a process group the masks of rank 0 are taken by all.
        """
        for name, layer in self.layers.items():
            mask = mask_of(layer.module)
            if mask is None:
                # The weight's memory format, so that applying the mask is one pass over both.
                mask = torch.empty_like(layer.weight, dtype=torch.bool, requires_grad=False)
                layer.module.register_buffer(MASK, mask)
            mask.copy_(masks[name])
        for mask in self.get().values():
            ranks.broadcast(mask)
        set_masked({name: x.weight for name, x in self.layers.items()}, self.get())
        self.refresh()

    def get(self) -> dict[str, Tensor]:
        """Return the masks that the modules keep.

        Raises
        ------
        RuntimeError
            If a module has lost its mask.
        """
        masks = {name: mask_of(layer.module) for name, layer in self.layers.items()}
        lost = [name for name, mask in masks.items() if mask is None]
        if lost:
            raise RuntimeError(
                f"the mask of layer {lost[0]!r} is gone since begin(): leave the buffers '{MASK}' alone until finish()"
            )
        return masks  # type: ignore[return-value]

    def refresh(self) -> None:
        """Take over masks and weights that were changed or moved from outside, as by ``load_state_dict`` or ``to``."""
        masks = list(self.get().values())
        now = [(mask, mask._version) for mask in masks]
        if len(now) == len(self._seen) and all(
            a is b and x == y for (a, x), (b, y) in zip(now, self._seen, strict=True)
        ):
            return
        weights: list[Tensor] = [layer.weight for layer in self.layers.values()]
        fits = len(self._factors) == len(weights) and all(
            f.device == w.device and f.dtype == w.dtype for f, w in zip(self._factors, weights, strict=True)
        )
        if not fits:
            self._factors = [torch.empty_like(weight, requires_grad=False) for weight in weights]
        for factor, mask in zip(self._factors, masks, strict=True):
            factor.copy_(mask)
        self._weights, self._seen = weights, now

    def apply(self) -> None:
        """Set every pruned weight to zero."""
        self.refresh()
        self.apply_fused()

    def apply_fused(self) -> None:
        """Set every pruned weight to zero by the masks as ``put`` or ``refresh`` last saw them."""
        with torch.no_grad():
            torch._foreach_mul_(self._weights, self._factors)

    def forget(self) -> None:
        """Drop what was derived from the masks."""
        self._weights, self._factors, self._seen = [], [], []


def fold_masks(model: nn.Module) -> None:
    """Apply and remove every mask on a model, so that its ``state_dict`` has its original keys.

    ``Pruner.finish`` does this for its own model; call this one on a copy made while pruning was going on.
    """
    masked = [(module, mask) for module in model.modules() if (mask := mask_of(module)) is not None]
    for module, mask in masked:
        set_masked({"": module.get_parameter("weight")}, {"": mask})
        delattr(module, MASK)
