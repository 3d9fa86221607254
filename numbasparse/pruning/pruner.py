"""Pruner: pruning while training, in the user's own loop."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.criteria import PruningConfig
from numbasparse.pruning.layers import MASK, LayerFilter, select_layers, weights_of
from numbasparse.pruning.masks import MaskSet, check_config, compute_masks, fold_masks, mask_of
from numbasparse.pruning.schedules import Schedule
from numbasparse.pruning.summary import PruningReport, count


class Pruner:
    """Prune a model in the user's own training loop.

    ``begin()`` puts masks on the chosen layers, ``step()`` belongs after every ``optimizer.step()``, and
    ``finish()`` removes the masks. Between ``begin`` and ``finish`` each chosen layer has a bool buffer
    ``weight_mask``, which ``state_dict`` and ``deepcopy`` take along; pruned weights are zero after every ``step()``
    and come back only where the schedule's sparsity falls.

    Between two updates of the masks a step is one fused multiplication without synchronization. For a step that is
    compiled or captured in a CUDA graph, put ``apply()`` into it, after the optimizer, and call ``step(apply=False)``
    outside of it.

    In a process group every rank must make the same calls; the masks of rank 0 are taken by all.

    To resume from a checkpoint made while pruning: build model and pruner, call ``begin(step=saved_step)``,
    then ``model.load_state_dict(...)``.

    Parameters
    ----------
    model : nn.Module
        Changed in place from ``begin()`` on.
    config : PruningConfig
        For example ``MagnitudePruning(sparsity=0.9)``.
    schedule : CubicSchedule or ACDCSchedule, optional
        The way to ``config.sparsity``; without one ``begin()`` prunes at once.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.
    optimizer : torch.optim.Optimizer, optional
        Its running averages (momentum) of pruned weights are set to zero when the weights come back.

    Attributes
    ----------
    active : bool
        Whether pruning goes on.
    steps : int
        Optimizer steps seen.
    sparsity : float
        What the schedule asks for at present.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If no layer is chosen, or the schedule starts above the config's sparsity.

    Examples
    --------
    >>> pruner = Pruner(model, MagnitudePruning(sparsity=0.9), schedule=CubicSchedule(0, 1000, every=50))
    >>> pruner.begin()
    >>> for x, y in batches:
    ...     optimizer.zero_grad()
    ...     loss(model(x), y).backward()
    ...     optimizer.step()
    ...     pruner.step()
    >>> print(pruner.finish())
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        schedule: Schedule | None = None,
        filter: LayerFilter | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_config(config)
        if schedule is not None and schedule.initial > config.sparsity:
            raise ValueError(
                f"the schedule starts at sparsity {schedule.initial:g}, above the config's {config.sparsity:g}: "
                "lower initial or raise sparsity"
            )
        self.model = model
        self.config = config
        self.schedule = schedule
        self.layers = select_layers(model, filter)
        self.optimizer = optimizer
        self.active = False
        self.steps = 0
        self.sparsity = 0.0
        self._masks = MaskSet(self.layers)

    def begin(self, step: int = 0) -> None:
        """Put masks on the chosen layers.

        Parameters
        ----------
        step : int
            Optimizer steps already taken, when resuming.

        Raises
        ------
        RuntimeError
            If pruning has already begun.
        ValueError
            If a weight is NaN or infinite, or the config's sparsity would empty a layer. The model is then
            unchanged.
        """
        if self.active:
            raise RuntimeError("pruning has already begun: call finish() before begin() again")
        self.check()
        target = self._target(step)
        self._masks.put(compute_masks(self.layers, self.config, target))
        self.active, self.steps, self.sparsity = True, step, target

    def check(self) -> None:
        """Try the final sparsity, so that an impossible one fails now and not hours into training.

        Raises
        ------
        ValueError
            If a weight is NaN or infinite, or the sparsity would empty a layer.
        """
        compute_masks(self.layers, self.config, self.config.sparsity)

    def step(self, *, apply: bool = True) -> None:
        """Follow the schedule and set pruned weights to zero again; call it after ``optimizer.step()``.

        Parameters
        ----------
        apply : bool
            False if the training step itself contains ``apply()``.

        Raises
        ------
        RuntimeError
            If pruning has not begun.
        ValueError
            If the schedule asks for new masks while a weight is NaN or infinite; the masks stay.
        """
        self._must_be_active("step")
        target = self._target(self.steps + 1)
        if target != self.sparsity:
            self._update(target)
        elif apply:
            self._masks.apply()
        self.steps += 1

    def apply(self) -> None:
        """Set pruned weights to zero in one in-place operation; fit for ``torch.compile`` and CUDA graphs."""
        self._must_be_active("apply")
        self._masks.apply_fused()

    def check_zeros(self) -> None:
        """Raise ``RuntimeError`` if a pruned weight is not zero, as when ``step()`` is forgotten."""
        self._must_be_active("check_zeros")
        for name, mask in self._masks.get().items():
            if bool((self.layers[name].weight.detach()[~mask] != 0).any()):
                raise RuntimeError(
                    f"pruned weights of layer {name!r} are not zero: call pruner.step() after every optimizer.step()"
                )

    def finish(self) -> PruningReport:
        """Remove the masks, so that ``state_dict`` has its original keys; pruned weights stay zero.

        Returns
        -------
        PruningReport
            Sparsity of the chosen layers.

        Warns
        -----
        UserWarning
            If the schedule has not come to its end, so that the sparsity is lower than asked for.

        Raises
        ------
        RuntimeError
            If pruning has not begun.
        """
        self._must_be_active("finish")
        if self.schedule is not None and self.steps < self.schedule.end_step:
            warnings.warn(
                f"pruning was finished at step {self.steps} of {self.schedule.end_step}: sparsity is "
                f"{self.sparsity:.4g}, not {self.config.sparsity:g}",
                stacklevel=2,
            )
        for layer in self.layers.values():
            fold_masks(layer.module)
        self._masks.forget()
        self.active = False
        return count(weights_of(self.layers))

    def cancel(self) -> None:
        """Remove the masks without a word, as after a failure; weights stay as they are."""
        for layer in self.layers.values():
            if mask_of(layer.module) is not None:
                delattr(layer.module, MASK)
        self._masks.forget()
        self.active, self.steps, self.sparsity = False, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the progress; the masks are in the model's own ``state_dict``."""
        return {"steps": self.steps, "sparsity": self.sparsity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the progress; ``begin()`` first, then load the model and this."""
        self._must_be_active("load_state_dict")
        self.steps, self.sparsity = int(state["steps"]), float(state["sparsity"])

    def _update(self, target: float) -> None:
        regrow = target < self.sparsity
        # Weights the optimizer has just moved away from zero must not be ranked by that.
        self._masks.apply()
        if regrow:
            self._drop_momentum()
        self._masks.put(compute_masks(self.layers, self.config, target, regrow=regrow))
        self.sparsity = target

    def _drop_momentum(self) -> None:
        """Set the optimizer's averages of pruned weights to zero."""
        if self.optimizer is None:
            return
        for name, mask in self._masks.get().items():
            weight = self.layers[name].weight
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.masked_fill_(~mask, 0.0)

    def _target(self, step: int) -> float:
        final = self.config.sparsity
        return final if self.schedule is None else self.schedule.sparsity_at(step, final)

    def _must_be_active(self, call: str) -> None:
        if not self.active:
            raise RuntimeError(f"{call}() was called before begin(): call pruner.begin() first")
