"""Re-ordering of channels, so that kernels meet patterns that they like; what the model computes stays the same.

`reorder_channels` makes output channels with similar patterns neighbours: kernels that take several at once load fewer
inputs where their rows share columns. `reorder_inputs` orders the channels that layers read, so that tensor cores find
at most two non-zeros among almost any four neighbours.

A layer's output channels can take any order if whoever reads them undoes it: here the next convolutions or linear
layers do, by their input channels, and what lies between (normalization, activations, pooling, depthwise convolutions)
moves along, also through residual sums and concatenations. Where the graph does not allow that (the model's output,
functions that are not known to treat channels alike), the layer is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from numbasparse.channel_order import QUAD, order_quads, over_two
from numbasparse.pruning.channel_spaces import ChannelSpaces, Space
from numbasparse.pruning.layers import Layer, LayerFilter, select_layers


@dataclass(frozen=True)
class Reordering:
    """What became of every chosen layer.

    Attributes
    ----------
    applied : dict of str to Tensor
        Layers whose channels (output channels of `reorder_channels`, input channels of `reorder_inputs`) were moved:
        channel ``i`` now is what was channel ``order[i]``; int64, shape (K,) or (C,).
    left : dict of str to Tensor
        Layers that were not changed: the order that would be good, for an epilogue that writes row ``i`` to channel
        ``order[i]``, or for whoever makes the input.
    reasons : dict of str to str
        Why each of ``left`` was left.
    """

    applied: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: re-ordered" for name in self.applied]
        return "\n".join(lines + [f"{name or '(model)'}: left, {reason}" for name, reason in self.reasons.items()])


def reorder_channels(model: nn.Module, filter: LayerFilter | None = None, *, vector: int = 8) -> Reordering:
    """Re-order output channels in place, so that rows with similar patterns are neighbours; outputs stay the same.

    Sums of the next layer are then taken in another order: outputs are equal up to float rounding, and to the bit where
    the sums are exact. Masks of a pruning in progress move along; an optimizer's running averages do not, so do it
    before or after training. Layers whose outputs are joined (residual sums) are left.

    Parameters
    ----------
    model : nn.Module
        Changed in place. `torch.fx` must be able to trace it, or all layers are left.
    filter : callable, optional
        Chooses the layers whose output channels are ordered; ``default_filter`` if not given.
    vector : int
        How many neighbours should share columns: what the kernel takes at once.

    Returns
    -------
    Reordering

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``; ValueError also if ``vector`` is less than 1.
    """
    if isinstance(vector, bool) or not isinstance(vector, int) or vector < 1:
        raise ValueError(f"vector must be an int of 1 or more, got {vector!r}")
    result, spaces = Reordering(), ChannelSpaces(model)
    for name, layer in select_layers(model, filter).items():
        order, space = similar_order(layer, vector), spaces.written_by(name)
        others = [other for other in space.writers if other != name]
        if space.reason or others:
            result.left[name] = order
            result.reasons[name] = space.reason or (
                f"its output is joined with that of {others[0]!r} (a residual sum, product or the like)"
            )
        else:
            space.permute(order)
            result.applied[name] = order
    return result


def reorder_inputs(model: nn.Module, filter: LayerFilter | None = None) -> Reordering:
    """Re-order input channels in place, so that few neighbouring four hold more than two non-zeros; outputs stay the
    same, as of `reorder_channels`.

    Sparse tensor cores (float16 and bfloat16 on Hopper) multiply at most two of four as they are, and the rest costs
    extra. Do it behind pruning and before ``autotune.tune``; it takes up to a
    second for each layer. Layers that read the same channels (a residual stream) get one order for all of them. Output
    channels of the layers before move, so that vectors of outputs (``vector`` of the pruning) are neighbours no more.

    Parameters
    ----------
    model : nn.Module
        Changed in place. `torch.fx` must be able to trace it, or all layers are left.
    filter : callable, optional
        Chooses the layers whose input channels are ordered; ``default_filter`` if not given. Linear layers and
        convolutions of groups are left.

    Returns
    -------
    Reordering
        Layers in whose order nothing could be gained are in neither. Of a layer that reads a concatenation the channels
        that cannot move stay where they are.

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``.
    """
    layers, spaces = select_layers(model, filter), ChannelSpaces(model)
    readers: dict[Space, list[tuple[Layer, int]]] = {}
    for name, layer in layers.items():
        if isinstance(layer.module, nn.Conv2d) and layer.module.groups == 1:
            for space, offset in spaces.read_by(name):
                readers.setdefault(space, []).append((layer, offset))
    result = Reordering()
    for space, uses in readers.items():
        patterns = np.concatenate([_patterns(layer, space, offset) for layer, offset in uses], axis=1)
        if not over_two(patterns):
            continue
        order = torch.from_numpy(order_quads(patterns))
        reason = space.reason or next(
            (f"{name!r} writes them in groups" for name, writer in space.writers.items() if writer.groups != 1), ""
        )
        if not reason:
            space.permute(order)
        for layer, offset in uses:
            _note(result, layer, order + offset, offset, reason)
    return result


def _note(result: Reordering, layer: Layer, order: Tensor, offset: int, reason: str) -> None:
    """Write down what became of some of a layer's input channels, behind what became of others."""
    name, before = layer.name, torch.arange(layer.weight.shape[1])
    if not reason:
        whole = result.applied.get(name, before).clone()
        whole[offset : offset + len(order)] = order
        result.applied[name] = whole
        result.left.pop(name, None)
        result.reasons.pop(name, None)
    elif name not in result.applied:
        whole = result.left.get(name, before).clone()
        whole[offset : offset + len(order)] = order
        result.left[name], result.reasons[name] = whole, result.reasons.get(name, reason)


def _patterns(layer: Layer, space: Space, offset: int) -> np.ndarray:
    """Where a layer's weight for a space's channels is not zero: bool, (channels, output channels and taps).

    Of channels that begin within a quad the quads are not known; then it has no rows.
    """
    weight = layer.weight.detach()
    channels = weight.shape[1] if space.channels is None else space.channels
    rows = (weight[:, offset : offset + channels] != 0).transpose(0, 1).flatten(1).cpu().numpy()
    return rows if offset % QUAD == 0 else rows[:, :0]


def similar_order(layer: Layer, vector: int) -> Tensor:
    """Return an order of a layer's output channels in which runs of ``vector`` rows share as many columns as can be.

    Runs are filled greedily: the fullest row left begins one, then comes the row that brings the fewest new columns,
    and of those the one that shares most. Channels stay in their group.

    Returns
    -------
    Tensor
        int64, shape (K,), on the CPU; new row ``i`` is old row ``order[i]``.
    """
    grid = layer.grid(1)
    pattern = (layer.weight.detach() != 0).reshape(grid.groups, grid.group_rows, -1).float()
    orders = [_greedy(rows, vector) + group * grid.group_rows for group, rows in enumerate(pattern)]
    return torch.cat(orders)


def _greedy(rows: Tensor, vector: int) -> Tensor:
    counts = rows.sum(1)
    left = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    order = []
    union = torch.zeros_like(rows[0])
    for position in range(len(rows)):
        if position % vector == 0:
            union = torch.zeros_like(union)
            score = counts
        else:
            shared = rows @ union
            # New columns decide; shared ones break ties, being fewer than all columns.
            score = shared / (rows.shape[1] + 1.0) - (counts - shared)
        best = int(score.masked_fill(~left, -torch.inf).argmax())
        left[best] = False
        union = torch.maximum(union, rows[best])
        order.append(best)
    return torch.tensor(order, dtype=torch.int64)


def block_columns(layer: Layer, vector: int) -> int:
    """Count the columns that runs of ``vector`` rows touch, over all runs: what the order makes small."""
    grid = layer.grid(vector)
    dead = grid.all((layer.weight.detach() == 0).reshape(layer.weight.shape))
    return int((~dead).sum())
