"""One-shot second-order pruning with calibration data: optimal brain surgeon, layer by layer.

For each layer the squared error of its output on the calibration data, ``||W X - W' X||^2``, is kept small: X holds
the unfolded inputs, one column per output position, so its Hessian is ``H = X X^T``, shared by all output channels of
a group. Setting a weight to zero costs ``w^2 / [H^-1]_jj`` after the best change of the weights that come later; the
weights are taken in blocks of columns, with the Cholesky factor of ``H^-1`` in place of its updates. At last the
weights kept are solved for exactly, given which they are.

Sources: Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022, arXiv 2208.11580 (layer-wise problem, Hessian
of unfolded inputs); Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774, algorithm 1 (column order, blocks,
Cholesky factor, adaptive masks).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning.allocation import LayerScores, top_mask
from numbasparse.pruning.criteria import Scope, ScopedPruning
from numbasparse.pruning.layers import Layer, Layers

_CHUNK_BYTES = 1 << 28
"""Bound on temporary buffers: unfolded inputs, and the systems solved at once."""


@dataclass(frozen=True)
class OBSPruning(ScopedPruning):
    """Second-order pruning at once, layer by layer, for models that cannot be retrained.

    Use it with ``prune_with_data_``. It prunes ``nn.Conv2d`` (any stride, padding, dilation, groups) and
    ``nn.Linear``. Normalization statistics are not changed: see ``recalibrate_batch_norm_``.

    Parameters
    ----------
    sparsity, scope, vector
        As in `ScopedPruning`, whose ``two_of_four`` it has not; the scopes rank by ``w^2 / [H^-1]_jj``, ``"global"`` by
        its share of the squared output of the layer, since errors of different layers are not of the same scale.
    damping : float
        Added to the diagonal of H, as a fraction of its mean; above 0.
    block : int
        Columns between two updates of the columns to the right; the mask of a block is chosen when it is reached.
    sequential : bool
        Take each layer's inputs from the model whose earlier layers are already pruned (as SparseGPT does), which costs
        one run over the data per layer but holds one Hessian at a time; otherwise from the dense model (as Optimal
        Brain Compression does), in one run, with the Hessians of all layers in memory.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    scope: Scope = "layer"
    damping: float = 0.01
    block: int = 128
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_of_four:
            raise ValueError("OBSPruning has no two_of_four: its masks are chosen by blocks of columns")
        if not 0.0 < self.damping < float("inf"):
            raise ValueError(f"damping must be above 0 (a fraction of the Hessian's mean diagonal), got {self.damping}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be an int of 1 or more columns, got {self.block!r}")

    def new_weights(
        self, model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], loss: object = None
    ) -> dict[str, Tensor]:
        """Return the pruned weight of every layer; see ``prune_with_data_``."""
        chosen = dict(layers)
        _check_kinds(chosen)
        if not self.sequential or self.scope in ("global", "lamp"):
            hessians = collect_hessians(model, chosen, batches)
        else:
            hessians = {}
        keep = self._counts(chosen, hessians)
        if not self.sequential:
            return {name: self._solve(layer, hessians[name], keep[name]) for name, layer in chosen.items()}
        return self._one_after_another(model, chosen, batches, keep)

    def _counts(self, layers: Layers, hessians: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the weights that each layer keeps; without Hessians only the sizes matter."""
        scores = {}
        for name, layer in layers.items():
            grid = layer.grid(self.vector)
            if name in hessians:
                values = grid.mean(self._saliency(layer, hessians[name]))
            else:
                values = grid.mean(torch.zeros_like(layer.weight, requires_grad=False))
            scores[name] = LayerScores(values, grid, layer.first, layer.last)
        return self.allocation(scores, self.sparsity)

    def _saliency(self, layer: Layer, hessian: Tensor) -> Tensor:
        """Return each weight's cost as a share of the layer's output, so that layers can be compared."""
        weight = _matrix(layer)
        output = ((weight @ hessian) * weight).sum().clamp_min(torch.finfo(weight.dtype).tiny)
        inverse = _inverse(_damped(hessian, self.damping))
        costs = weight.square() / inverse.diagonal(dim1=1, dim2=2)[:, None]
        return (costs / output).reshape(layer.weight.shape)

    def _one_after_another(
        self, model: nn.Module, layers: Layers, batches: Iterable[Any], keep: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Prune in the order of the forward pass, each layer seeing those before it pruned."""
        dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        new: dict[str, Tensor] = {}
        try:
            for name in execution_order(model, layers, batches):
                hessian = collect_hessians(model, {name: layers[name]}, batches, stop=True)[name]
                new[name] = self._solve(layers[name], hessian, keep[name])
                layers[name].weight.data.copy_(new[name])
        finally:
            for name, weight in dense.items():
                layers[name].weight.data.copy_(weight)
        return new

    def _solve(self, layer: Layer, hessian: Tensor, keep: int) -> Tensor:
        damped = _damped(hessian, self.damping)
        dense = _matrix(layer)
        mask = _choose(layer, dense, damped, self.vector, keep, self.block)
        return least_squares(dense, damped, mask).reshape(layer.weight.shape).to(layer.weight.dtype)


def _check_kinds(layers: Layers) -> None:
    for name, layer in layers.items():
        if type(layer.module) not in (nn.Conv2d, nn.Linear) and not isinstance(layer.module, (nn.Conv2d, nn.Linear)):
            raise ValueError(
                f"second-order pruning knows nn.Conv2d and nn.Linear, but the filter chose {name!r} "
                f"({type(layer.module).__name__}): let the filter leave it out"
            )


def _matrix(layer: Layer) -> Tensor:
    """Return the weight as float64 of shape (groups, K / groups, C / groups * R * S)."""
    grid = layer.grid(1)
    return layer.weight.detach().double().reshape(grid.groups, grid.group_rows, -1)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H with a raised diagonal; inputs that are always zero get a diagonal of their own."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    raised = diagonal + damping * mean
    # A group that sees nothing but zeros: any weights will do, the identity keeps them.
    raised = torch.where(mean > 0, raised, torch.ones_like(raised))
    damped = hessian.clone()
    damped.diagonal(dim1=1, dim2=2).copy_(raised)
    return damped


def _inverse(hessian: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()):
        raise ValueError(
            "the Hessian of a layer's calibration inputs is not positive definite in float64: raise damping or give "
            "more images"
        )
    return torch.cholesky_inverse(factor)


def _choose(layer: Layer, dense: Tensor, hessian: Tensor, vector: int, keep: int, block: int) -> Tensor:
    """Return the mask of the weights kept, bool of the shape of ``dense``.

    When a block of columns is reached, the errors of the blocks before it have been moved into the weights from there
    on. These are ranked anew, by what each would cost with the columns before it fixed, and the block gets its share
    of what may still be kept; within it the order of the columns counts too.
    """
    upper = torch.linalg.cholesky(_inverse(hessian), upper=True)
    columns = dense.shape[2]
    weight, mask = dense.clone(), torch.zeros_like(dense, dtype=torch.bool)
    for start in range(0, columns, block):
        part, rest = slice(start, min(start + block, columns)), slice(start, columns)
        # The inverse of the Hessian of the columns from here on, which this factor holds.
        inverse = upper[:, rest, rest].square().sum(1)
        best = top_mask(_scores(layer, weight[:, :, rest].square() / inverse[:, None], vector), keep)
        share = int(best.reshape(*dense.shape[:2], -1)[:, :, : part.stop - start].sum()) if keep else 0
        own = upper[:, part, part]
        if share:
            scores = weight[:, :, part].square() / own.diagonal(dim1=1, dim2=2)[:, None].square()
            mask[:, :, part] = top_mask(_scores(layer, scores, vector), share).reshape(scores.shape)
        keep -= share
        errors = _sweep(weight[:, :, part], mask[:, :, part], own)
        weight[:, :, part.stop :] -= errors @ upper[:, part, part.stop :]
    return mask


def _scores(layer: Layer, values: Tensor, vector: int) -> LayerScores:
    """Wrap scores of some columns, (groups, K / groups, columns)."""
    grid = layer.grid(vector)
    return LayerScores(grid.mean(values), type(grid)((grid.shape[0], values.shape[2]), grid.groups, vector))


def _sweep(weight: Tensor, mask: Tensor, upper: Tensor) -> Tensor:
    """Set pruned weights of a block to zero column by column, in place; return the errors for the later columns."""
    errors = torch.zeros_like(weight)
    for column in range(weight.shape[2]):
        lost = weight[:, :, column].masked_fill(mask[:, :, column], 0.0) / upper[:, column, column, None]
        weight[:, :, column:] -= lost[:, :, None] * upper[:, None, column, column:]
        errors[:, :, column] = lost
    return errors


def least_squares(dense: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Return the weights on ``mask`` that minimise ``tr((W' - W) H (W' - W)^T)``, row by row.

    Parameters
    ----------
    dense : Tensor
        W, (groups, rows, columns), float64.
    hessian : Tensor
        H, (groups, columns, columns), positive definite.
    mask : Tensor
        bool, shape of ``dense``.

    Returns
    -------
    Tensor
        Shape of ``dense``, exactly zero off the mask.
    """
    result = torch.zeros_like(dense)
    for group in range(dense.shape[0]):
        target = dense[group] @ hessian[group]
        counts = mask[group].sum(1)
        # Rows of like counts together: each is padded to the longest of its chunk.
        order = torch.argsort(counts)
        sizes = counts[order].tolist()
        start = 0
        while start < len(sizes):
            stop = start + 1
            while stop < len(sizes) and (stop + 1 - start) * sizes[stop] ** 2 * 8 <= _CHUNK_BYTES:
                stop += 1
            rows = order[start:stop]
            result[group, rows] = _solve_rows(target[rows], hessian[group], mask[group, rows], sizes[stop - 1])
            start = stop
    return result


def _solve_rows(target: Tensor, hessian: Tensor, mask: Tensor, longest: int) -> Tensor:
    """Solve ``w_S H_SS = target_S`` for each row's set S, padded with the identity to ``longest``."""
    if longest == 0:
        return torch.zeros_like(target)
    # Kept columns first, in ascending order.
    columns = torch.sort((~mask).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    real = mask.gather(1, columns)
    systems = hessian[columns[:, :, None], columns[:, None, :]]
    systems = systems * (real[:, :, None] & real[:, None, :])
    systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
    right = target.gather(1, columns) * real
    solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
    return torch.zeros_like(target).scatter_(1, columns, solved * real)


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def inputs_of(batch: Any, device: torch.device) -> Tensor:
    """Return the inputs of a batch, on a device."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(f"a batch must be a Tensor or (inputs, ...), got {type(inputs).__name__}")
    return inputs.to(device)


@contextmanager
def _watching(layers: Layers, see: Any) -> Iterator[None]:
    """Call ``see(name, input)`` before each layer runs."""
    handles = [
        layer.module.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def execution_order(model: nn.Module, layers: Layers, batches: Iterable[Any]) -> list[str]:
    """Return the layers' names in the order of their first call in a forward pass.

    Raises
    ------
    ValueError
        If there is no batch, or a layer is not called.
    """
    order: dict[str, None] = {}
    device = next(iter(layers.values())).weight.device
    with torch.no_grad(), _watching(layers, lambda name, x: order.setdefault(name)):
        for batch in batches:
            model(inputs_of(batch, device))
            break
        else:
            raise ValueError("batches has no batches: expected at least one of calibration data")
    _check_called(layers, order)
    return list(order)


def _check_called(layers: Iterable[str], called: Iterable[str]) -> None:
    missing = [name for name in layers if name not in set(called)]
    if missing:
        raise ValueError(
            f"layer {missing[0]!r} is not used in the model's forward pass, so nothing is known of its inputs: let the "
            "filter leave it out"
        )


def collect_hessians(
    model: nn.Module, layers: Layers, batches: Iterable[Any], *, stop: bool = False
) -> dict[str, Tensor]:
    """Return ``X X^T`` of every layer's unfolded inputs, per image.

    Parameters
    ----------
    model, layers, batches
        As in ``prune_with_data_``.
    stop : bool
        End each forward pass at the layer, of which there is one.

    Returns
    -------
    dict of str to Tensor
        float64, (groups, D, D) with D = C / groups * R * S.

    Raises
    ------
    ValueError
        If there is no batch, a layer is not called or an input is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    positions = dict.fromkeys(layers, 0)

    def see(name: str, inputs: Tensor) -> None:
        module = layers[name].module
        # A few images at a time: unfolding makes R * S copies of every input.
        images = max(1, _CHUNK_BYTES // (8 * max(1, _unfolded_size(module, inputs))))
        for part in inputs.detach().split(images):
            columns = unfold_inputs(module, part)
            positions[name] += columns.shape[2]
            product = (columns @ columns.mT).double()
            sums[name] = sums[name] + product if name in sums else product
        if stop:
            raise _Stop

    images = 0
    device = next(iter(layers.values())).weight.device
    with torch.no_grad(), _watching(layers, see):
        for batch in batches:
            inputs = inputs_of(batch, device)
            images += len(inputs)
            with suppress(_Stop):
                model(inputs)
    if not images:
        raise ValueError("batches has no images: expected at least one batch of calibration data")
    _check_called(layers, sums)
    for name, total in sums.items():
        _check_hessian(name, total, positions[name])
    return {name: total / images for name, total in sums.items()}


def _check_hessian(name: str, hessian: Tensor, positions: int) -> None:
    if not torch.isfinite(hessian).all():
        raise ValueError(
            f"the calibration inputs of layer {name!r} are NaN or infinite (or overflow when squared): check the data "
            "and the model's weights"
        )
    if positions < hessian.shape[1]:
        warnings.warn(
            f"layer {name!r} saw {positions} input vectors of length {hessian.shape[1]}: directions that no "
            "calibration image shows are decided by the damping alone; give more images",
            stacklevel=2,
        )


def _unfolded_size(module: nn.Module, inputs: Tensor) -> int:
    """Return an upper bound of the numbers per image after unfolding."""
    window = module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
    return window * max(1, inputs.numel() // max(1, len(inputs)))


def unfold_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's inputs as columns, so that its output is ``W @ columns`` for each group.

    Parameters
    ----------
    module : nn.Conv2d or nn.Linear
        Any stride, padding (also by name or mode), dilation and groups.
    inputs : Tensor
        (N, C, H, W), or (..., C) for a linear layer.

    Returns
    -------
    Tensor
        (groups, D, N * positions), D = C / groups * R * S; float32, or float64 for such inputs.
    """
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if not isinstance(module, nn.Conv2d):
        return inputs.reshape(1, -1, inputs.shape[-1]).mT
    inputs = inputs[None] if inputs.ndim == 3 else inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch's own list of the padding left, right, above and below, also of padding="same".
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
    grouped = columns.reshape(len(inputs), module.groups, -1, columns.shape[2])
    return grouped.permute(1, 2, 0, 3).flatten(2)


def recalibrate_batch_norm_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measure the statistics of every batch normalization anew, as is due after pruning without retraining.

    Parameters
    ----------
    model : nn.Module
        Its running means and variances are replaced by averages over ``batches``; its mode is put back.
    batches : iterable
        As in ``prune_with_data_``; batches of many images.

    Raises
    ------
    ValueError
        If there is no batch, or a batch has too few values for a variance. The statistics are then as before.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    device = next(model.parameters()).device
    seen = False
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over batches
        with torch.no_grad():
            for batch in batches:
                model(inputs_of(batch, device))
                seen = True
        if not seen:
            raise ValueError("batches has no batches: expected at least one of calibration data")
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
