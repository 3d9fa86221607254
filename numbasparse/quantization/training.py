"""Quantization-aware retraining in the user's own loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from numbasparse.levels import CodebookLevels, Levels, LinearLevels
from numbasparse.pruning.layers import LayerFilter
from numbasparse.pruning.loop import Callback
from numbasparse.pruning.masks import mask_of
from numbasparse.quantization.layers import (
    Layers,
    QuantizationConfig,
    check_config,
    dense_weight,
    select_layers,
    to_sparse,
)
from numbasparse.quantization.summary import QuantizationReport, compare
from numbasparse.weight import SparseWeight

MASTER = "weight_master"
SCALE, ZERO = "weight_scale", "weight_zero"
ENTRIES, CODES = "weight_entries", "weight_codes"
BUFFERS = (MASTER, SCALE, ZERO, ENTRIES, CODES)
"""Names of the buffers that a layer carries while it is trained."""

_UNITS = float(1 << 36)
"""The largest change as an integer: sums of 2**26 of them fit into int64."""


class Quantizer:
    """Train a model whose weights are quantized, in the user's own training loop.

    ``begin()`` quantizes the chosen layers, ``step()`` belongs after every ``optimizer.step()``, and ``finish()``
    ends it. In between the model *is* the quantized model at every moment: nothing is hooked into the forward
    pass, so it can be evaluated, copied, compiled, or wrapped for data-parallel training, before or after
    ``begin()``. Each layer carries buffers, which ``state_dict`` and ``deepcopy`` take along: ``weight_master``,
    the weight in full precision, and its levels.

    Gradients are those at the quantized weight, applied to the one in full precision (the straight-through
    estimator): ``step()`` adds to the master what the optimizer changed and quantizes it again. Linear levels stay
    as ``begin()`` or the last ``refit()`` chose them. With a codebook each entry moves by the mean of what the
    optimizer did to its members: their summed gradients, divided by their number so that one learning rate suits
    entries of many members and of few; then each weight takes the entry nearest to its master.

    ``refit()`` chooses levels anew from the masters (ranges; codebooks by exact k-means). It moves weights away from
    where training had taken them: train on after it.

    Weights that are zero at ``begin()``, and those that a `numbasparse.pruning.Pruner` prunes later (call its
    ``step()`` first), stay exactly zero. A pruner whose schedule still prunes ranks quantized weights, of which many
    are equal: better prune first and quantize then. ``step()`` waits for no result of a GPU, and its sums do not
    depend on their order, so that data-parallel ranks stay equal; ``refit()`` and ``finish()`` work on the host.

    To resume from a checkpoint made while training: build model and quantizer, call ``begin()``, then
    ``model.load_state_dict(...)``.

    Parameters
    ----------
    model : nn.Module
        Changed in place from ``begin()`` on.
    config : LinearQuantization or CodebookQuantization
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; the same default as for pruning if not given.

    Raises
    ------
    TypeError, ValueError
        As `quantize_`.

    Notes
    -----
    Sources: Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons", 2013,
    arXiv 1308.3432 (straight-through); Han, Mao and Dally, "Deep compression", 2015, arXiv 1510.00149 (entries
    trained by the summed gradients of their members).

    Examples
    --------
    >>> quantizer = Quantizer(model, CodebookQuantization(bits=4))
    >>> quantizer.begin()
    >>> for epoch in range(epochs):
    ...     for x, y in batches:
    ...         optimizer.zero_grad()
    ...         loss(model(x), y).backward()
    ...         optimizer.step()
    ...         quantizer.step()
    >>> print(quantizer.finish())
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig, filter: LayerFilter | None = None) -> None:
        check_config(config)
        self.model = model
        self.config = config
        self.layers: Layers = select_layers(model, filter)
        self.active = False

    def begin(self) -> None:
        """Quantize the chosen layers and give them their buffers.

        Raises
        ------
        RuntimeError
            If it has already begun.
        ValueError
            If a weight is NaN or infinite. The model is then unchanged.
        """
        if self.active:
            raise RuntimeError("quantization has already begun: call finish() before begin() again")
        fitted = {n: self._fit(n, m, m.get_parameter("weight")) for n, m in self.layers.items()}
        for name, module in self.layers.items():
            module.register_buffer(MASTER, module.get_parameter("weight").detach().clone())
            for buffer, value in fitted[name].items():
                module.register_buffer(buffer, value)
            self._quantize(module)
        self.active = True

    def step(self) -> None:
        """Take the optimizer's change into the masters and quantize again; call it after ``optimizer.step()``.

        Raises
        ------
        RuntimeError
            If it has not begun.
        """
        self._must_be_active("step")
        with torch.no_grad():
            for module in self.layers.values():
                self._step(module)

    def refit(self) -> None:
        """Choose levels anew from the masters, and quantize by them.

        Raises
        ------
        RuntimeError
            If it has not begun.
        ValueError
            If a master is NaN or infinite. The model is then unchanged.
        """
        self._must_be_active("refit")
        fitted = {name: self._fit(name, m, m.get_buffer(MASTER)) for name, m in self.layers.items()}
        for name, module in self.layers.items():
            for buffer, value in fitted[name].items():
                module.get_buffer(buffer).copy_(value)
            self._quantize(module)

    def finish(self) -> QuantizationReport:
        """Remove the buffers, so that ``state_dict`` has its original keys; the weights stay on their levels.

        Returns
        -------
        QuantizationReport
            Errors are those from the masters to the weights.

        Raises
        ------
        RuntimeError
            If it has not begun.
        ValueError
            If a weight is NaN or infinite. Nothing is removed then.
        """
        self._must_be_active("finish")
        weights = {n: dense_weight(m.get_parameter("weight")) for n, m in self.layers.items()}
        after = {n: to_sparse(n, m, weights[n], self.config) for n, m in self.layers.items()}
        rows = [compare(n, dense_weight(m.get_buffer(MASTER)), after[n]) for n, m in self.layers.items()]
        fold_quantization(self.model)
        self.active = False
        return QuantizationReport(tuple(rows))

    def cancel(self) -> None:
        """Put the masters back as the weights and remove the buffers; nothing if it has not begun."""
        if self.active:
            with torch.no_grad():
                for module in self.layers.values():
                    module.get_parameter("weight").copy_(module.get_buffer(MASTER))
            fold_quantization(self.model)
            self.active = False

    def _fit(self, name: str, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        """Buffers of levels for a weight, on its device."""
        dense = dense_weight(weight)
        try:
            sparse = SparseWeight.from_dense(dense, int(getattr(module, "groups", 1)))
        except ValueError as error:
            raise ValueError(f"{error} (layer {name!r}); lower the learning rate if training diverged") from None
        levels = self.config.fit(sparse.data, sparse.rows, sparse.k)
        fitted = _linear_buffers(levels) if isinstance(levels, LinearLevels) else _codebook_buffers(levels, sparse)
        return {buffer: torch.from_numpy(array).to(weight.device) for buffer, array in fitted.items()}

    def _quantize(self, module: nn.Module) -> None:
        """Write the weight that the master and the levels give."""
        with torch.no_grad():
            module.get_parameter("weight").copy_(_on_levels(module, self.config.bits))

    def _step(self, module: nn.Module) -> None:
        weight, master, mask = module.get_parameter("weight"), module.get_buffer(MASTER), mask_of(module)
        if mask is not None:
            master.masked_fill_(~mask, 0.0)
        alive = master != 0
        change = torch.where(alive, weight - _on_levels(module, self.config.bits), 0.0)
        master.add_(change)
        if _has_codebook(module):
            _move_entries(module.get_buffer(ENTRIES), module.get_buffer(CODES), change, alive)
            _take_nearest(module, getattr(self.config, "group", None) or len(master))
        self._quantize(module)

    def _must_be_active(self, call: str) -> None:
        if not self.active:
            raise RuntimeError(f"{call}() was called before begin(): call quantizer.begin() first")


class QuantizerCallback(Callback):
    """A `Quantizer` for ``numbasparse.pruning.fit``, which begins, steps and finishes it.

    Parameters
    ----------
    quantizer : Quantizer
        Of the model that is trained; not begun.
    refit_every : int, optional
        Steps from one ``refit()`` to the next; never if not given. None should fall at the end of training.

    Attributes
    ----------
    report : QuantizationReport or None
        After training.

    Raises
    ------
    ValueError
        If ``refit_every`` is no int of 1 or more.
    """

    def __init__(self, quantizer: Quantizer, refit_every: int | None = None) -> None:
        if refit_every is not None and (not isinstance(refit_every, int) or refit_every < 1):
            raise ValueError(f"refit_every must be an int of 1 or more, or None, got {refit_every!r}")
        self.quantizer = quantizer
        self.refit_every = refit_every
        self.report: QuantizationReport | None = None

    def begin(self, model: nn.Module) -> None:
        if model is not self.quantizer.model:
            raise ValueError("the quantizer was made for another model: make one with Quantizer(model, config)")
        self.quantizer.begin()

    def after_step(self, step: int) -> None:
        self.quantizer.step()
        if self.refit_every is not None and step % self.refit_every == 0:
            self.quantizer.refit()

    def finish(self, model: nn.Module, failed: bool) -> None:
        if failed:
            self.quantizer.cancel()
        else:
            self.report = self.quantizer.finish()


def fold_quantization(model: nn.Module) -> None:
    """Remove every buffer of a `Quantizer` from a model; the weights stay on their levels.

    ``Quantizer.finish`` does this for its own model; call this one on a copy made while training was going on.
    """
    for module in model.modules():
        for buffer in BUFFERS:
            if buffer in dict(module.named_buffers(recurse=False)):
                delattr(module, buffer)


def _linear_buffers(levels: LinearLevels) -> dict[str, NDArray[Any]]:
    return {SCALE: levels.scale.copy(), ZERO: levels.zero.astype(np.float32)}


def _codebook_buffers(levels: Levels, weight: SparseWeight) -> dict[str, NDArray[Any]]:
    """Entries, (T, 2**bits), and for each weight the place of its entry in the flattened entries, int32."""
    if not isinstance(levels, CodebookLevels):
        raise TypeError(f"cannot train {type(levels).__name__}: expected LinearLevels or CodebookLevels")
    channels = weight.rows
    codes = np.zeros((weight.k, int(np.prod(weight.kernel_shape))), np.int32)
    codes[channels, weight.indices] = levels.places(levels.encode(weight.data, channels), channels)
    return {ENTRIES: levels.entries.copy(), CODES: codes}


def _has_codebook(module: nn.Module) -> bool:
    return hasattr(module, CODES)


def _on_levels(module: nn.Module, bits: int) -> Tensor:
    """What a layer's weight is on its levels, in the weight's shape; zero where the master is."""
    master = module.get_buffer(MASTER)
    if _has_codebook(module):
        values = module.get_buffer(ENTRIES).flatten()[module.get_buffer(CODES).long()]
        return torch.where(master != 0, values.view(master.shape), 0.0)
    # One for all output channels, or one for each.
    scale, zero = (module.get_buffer(name).view(-1, *[1] * (master.dim() - 1)) for name in (SCALE, ZERO))
    steps = torch.clamp(torch.round(master / scale) + zero, 0, (1 << bits) - 1) - zero
    return steps * scale


def _move_entries(entries: Tensor, codes: Tensor, change: Tensor, alive: Tensor) -> None:
    """Move each entry by the mean change of its members.

    The sums are of integers: they are exact, and the same in whatever order a GPU adds.
    """
    size = entries.numel()
    largest = change.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).double()
    fixed = torch.round(change.double() / largest * _UNITS).long().flatten()
    # Several sums for each entry: otherwise thousands of threads wait for one address.
    slots = max(1, 8192 // size)
    places = codes.flatten().long() + torch.arange(codes.numel(), device=codes.device) % slots * size
    sums, members = (
        torch.zeros(slots * size, dtype=torch.int64, device=codes.device)
        .scatter_add_(0, places, values)
        .view(slots, size)
        .sum(0)
        for values in (fixed, alive.flatten().long())
    )
    moved = sums.double() / members.clamp(min=1) * (largest / _UNITS)
    entries.add_(moved.float().view_as(entries))


def _take_nearest(module: nn.Module, channels_per_table: int) -> None:
    """Give every weight the code of the entry nearest to its master; sorts the entries."""
    entries, codes = module.get_buffer(ENTRIES), module.get_buffer(CODES)
    tables, size = entries.shape
    entries.copy_(entries.sort(dim=1).values)
    middles = (entries[:, 1:] + entries[:, :-1]) / 2
    master = module.get_buffer(MASTER).flatten(1)
    # The last table may have fewer channels than the others.
    rows = torch.nn.functional.pad(master, (0, 0, 0, tables * channels_per_table - len(master))).view(tables, -1)
    places = torch.searchsorted(middles, rows) + size * torch.arange(tables, device=entries.device)[:, None]
    codes.copy_(places.view(tables * channels_per_table, -1)[: len(master)])
