"""Fit: a ready training loop around a ``Pruner``, with checkpoints, mixed precision and several processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning import ranks
from numbasparse.pruning.checkpoint import from_bytes, load_checkpoint, save_checkpoint, to_bytes
from numbasparse.pruning.distillation import Distillation
from numbasparse.pruning.fit_config import FitConfig
from numbasparse.pruning.pruner import Pruner
from numbasparse.pruning.randomness import random_state, restore_random_state

Batches = Iterable[Any]
"""Batches ``(inputs, targets)``, or Tensors of inputs alone where only distillation gives a loss."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs, targets) -> scalar``."""

AfterEpoch = Callable[[int, nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes
    ----------
    epoch : int
        From 0.
    loss : float
        Mean over the training images, of all ranks.
    accuracy : float or None
        On the training batches; None if the targets are not class indices.
    lr, sparsity : float
        At the end of the epoch; what the pruner's schedule asks for.
    seconds : float
        Wall-clock time, of the part since a resume.
    metrics : mapping of str to float
        What ``after_epoch`` and the callbacks returned.
    """

    epoch: int
    loss: float
    accuracy: float | None
    lr: float
    sparsity: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Callback:
    """What takes part in ``fit`` beside the pruner, as quantization does; every method may be left as it is."""

    def begin(self, model: nn.Module) -> None:
        """Before the optimizer is built: parameters, buffers and parametrizations may be added."""

    def before_step(self, step: int) -> None:
        """Before a forward pass; ``step`` optimizer steps were taken since the start of training."""

    def after_step(self, step: int) -> None:
        """After the optimizer and the pruner; ``step`` counts this one."""

    def after_epoch(self, epoch: int, model: nn.Module) -> Mapping[str, float]:
        """After an epoch, in eval mode without gradients; returns metrics for its record."""
        return {}

    def finish(self, model: nn.Module, failed: bool) -> None:
        """At the end, also after an error: what ``begin`` added must go or be folded."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the model's own state: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""


def fit(
    model: nn.Module,
    train_batches: Batches,
    config: FitConfig,
    *,
    pruner: Pruner | None = None,
    loss: Loss | None = None,
    distillation: Distillation | None = None,
    callbacks: Sequence[Callback] = (),
    after_epoch: AfterEpoch | None = None,
    device: str | torch.device | None = None,
) -> list[EpochRecord]:
    """Train a model, pruning on the way.

    After an error or an interrupt the model's parameters and buffers, the pruner and the modes are as before the call;
    with a checkpoint file the next call with the same arguments goes on where the file was last written, to the same
    bits as without the break. For that the order and noise of the data must come from the generators of torch, NumPy
    or Python, or from a ``torch.Generator`` that is an attribute of ``train_batches``, its samplers or its data set
    (or from the epoch's number alone: ``set_epoch`` is called where there is one), and on a GPU
    ``torch.use_deterministic_algorithms`` must be on.

    In a process group (``torchrun`` and ``torch.distributed.init_process_group``) the model is trained data-parallel:
    give each rank its part of the data (``DistributedSampler``) and its device; weights and masks are equal on all.
    Compile with ``model.compile()`` before the call.

    Parameters
    ----------
    model : nn.Module
        Trained in place and moved to ``device``; its train or eval mode is put back at the end.
    train_batches : iterable
        ``(inputs, targets)``, or Tensors of inputs alone if there is a ``distillation``; iterated once per epoch, so
        not a generator.
    config : FitConfig
        Epochs, optimizer, learning rate, precision, checkpoint.
    pruner : Pruner, optional
        Of this model. If it has not begun, it is begun here and finished at the end; otherwise both are left
        to the caller.
    loss : callable, optional
        ``(outputs, targets) -> scalar``, the mean over a batch; cross-entropy if not given.
    distillation : Distillation, optional
        Made for this model; its teacher is moved to ``device``.
    callbacks : sequence of Callback
        Called in turn.
    after_epoch : callable, optional
        ``(epoch, model) -> {name: value}``, called with the model in eval mode and no gradients, on every rank.
    device : str or torch.device, optional
        Where to train; where the model is if not given.

    Returns
    -------
    list of EpochRecord
        One per epoch, those before a resume included.

    Raises
    ------
    ValueError
        If ``train_batches`` is empty or can be iterated only once, the pruner belongs to another model, its schedule
        cannot end in the given epochs, or the checkpoint is damaged or of another training.
    RuntimeError
        If the loss becomes NaN or infinite, or ``torchrun`` was used without a process group.
    """
    ranks.check_started()
    _check_data(train_batches, config.epochs)
    _check_pruner(model, pruner, config.epochs, length_of(train_batches))
    _check_folder(config.checkpoint)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    if pruner is not None and not pruner.active:
        pruner.check()
    model.to(where)
    if distillation is not None:
        distillation.teacher.to(where)
    with _all_or_nothing(model, pruner, callbacks):
        loop = _Loop(model, where, config, train_batches, pruner, callbacks)
        loop.loss, loop.distillation, loop.after_epoch = loss, distillation, after_epoch
        loop.resume()
        loop.run()
    return loop.history


def _check_data(batches: Batches, epochs: int) -> None:
    """Refuse what would fail or do nothing after hours of training."""
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError(
            f"train_batches is a {type(batches).__name__}, which is used up after one of {epochs} epochs: pass "
            "something that can be iterated again, such as a list or a DataLoader"
        )
    if length_of(batches) == 0:
        raise ValueError("train_batches has no batches: expected at least one (x, y)")


def _check_pruner(model: nn.Module, pruner: Pruner | None, epochs: int, steps: int | None) -> None:
    if pruner is None:
        return
    if pruner.model is not model:
        raise ValueError("pruner was made for another model: make one with Pruner(model, ...) for this model")
    if pruner.schedule is not None and steps is not None:
        end = (pruner.steps if pruner.active else 0) + epochs * steps
        if end < pruner.schedule.end_step:
            raise ValueError(
                f"the pruner's schedule ends at step {pruner.schedule.end_step}, but {epochs} epochs of "
                f"{steps} batches end at step {end}: train longer or lower end_step"
            )


def _check_folder(checkpoint: str | os.PathLike[str] | None) -> None:
    folder = os.path.dirname(os.path.abspath(checkpoint)) if checkpoint is not None else None
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"the checkpoint {checkpoint} cannot be written: there is no folder {folder}")


def length_of(batches: Batches) -> int | None:
    """Return the number of batches, or None if it is not known."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over a stream has __len__ but refuses to answer
        return None


@contextmanager
def _all_or_nothing(model: nn.Module, pruner: Pruner | None, callbacks: Sequence[Callback]) -> Iterator[None]:
    """Begin and finish what takes part; after an error put back the model, the modes and the pruner."""
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    progress = pruner.state_dict() if pruner is not None and pruner.active else None
    begun: list[Callback] = []
    try:
        if pruner is not None and progress is None:
            pruner.begin()
        for callback in callbacks:
            begun.append(callback)
            callback.begin(model)
        yield
        if pruner is not None and progress is None:
            pruner.finish()
        while begun:
            begun.pop().finish(model, False)
    except BaseException:
        while begun:
            begun.pop().finish(model, True)
        if pruner is not None and progress is None:
            pruner.cancel()
        model.load_state_dict(state)
        if pruner is not None and progress is not None:
            pruner.load_state_dict(progress)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Loop:
    """The state of ``fit`` that lasts over epochs."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        config: FitConfig,
        batches: Batches,
        pruner: Pruner | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self.model = model
        self.device = device
        self.config = config
        self.batches = batches
        self.pruner = pruner
        self.callbacks = callbacks
        self.loss: Loss | None = None
        self.distillation: Distillation | None = None
        self.after_epoch: AfterEpoch | None = None
        self.optimizer = config.optimizer.build(model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.autocast is torch.float16)
        self.parallel = ranks.parallel(model, device)
        if pruner is not None:
            pruner.optimizer = self.optimizer
        self.length = length_of(batches)
        self.history: list[EpochRecord] = []
        self.steps = 0
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.index = 0
        self.images = 0
        # Summed on the device and read once per epoch: reading each loss would stall a GPU.
        self.sums = torch.zeros(2, device=self.device)
        self.classes = False
        self.data_start: dict[str, Any] = {}
        self.now: dict[str, Any] | None = None

    def run(self) -> None:
        """Train the epochs that are left."""
        with _progress(self.config.progress and ranks.rank() == 0, self) as advance:
            while len(self.history) < self.config.epochs:
                self.epoch(len(self.history), advance)

    def epoch(self, epoch: int, advance: Callable[[str], None]) -> None:
        """Train one epoch, or the rest of one; ``advance`` is told of every batch."""
        start, lr = time.perf_counter(), 0.0
        self.model.train()
        for batch in self._epoch_batches(epoch):
            # Without a known number of batches the rate goes down in steps of one epoch.
            lr = self._set_lr(epoch + (self.index / self.length if self.length else 0.0))
            self._batch(batch)
            self.index += 1
            advance(f"epoch {epoch + 1}/{self.config.epochs}")
            every = self.config.checkpoint_steps
            if every and self.index % every == 0 and self.index != self.length:
                self.save()
        if not self.images:
            raise ValueError(f"train_batches gave no batches in epoch {epoch + 1}: expected at least one (x, y)")
        self._record(epoch, lr, start)
        self._start_epoch()
        self.save()

    def _epoch_batches(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch, after those that a resumed one had already seen."""
        for owner in (self.batches, getattr(self.batches, "sampler", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        if self.now is None:
            self.data_start = random_state(self.batches, self.device)
            yield from self.batches
            return
        # The epoch's order is drawn anew from its start; then the generators go to where the checkpoint found them.
        restore_random_state(self.data_start, self.batches, self.device)
        batches = iter(self.batches)
        skipped = sum(1 for _ in islice(batches, self.index))
        if skipped < self.index:
            raise ValueError(
                f"the checkpoint was written after {self.index} batches of an epoch, but train_batches gave only "
                f"{skipped}: resume with the same data"
            )
        restore_random_state(self.now, self.batches, self.device)
        self.now = None
        yield from batches

    def _set_lr(self, epoch: float) -> float:
        lr = self.config.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _batch(self, batch: Any) -> None:
        """Take one optimizer step and add up the loss and the number right, without reading either."""
        inputs, targets = _split(batch, self.device)
        for callback in self.callbacks:
            callback.before_step(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.config.autocast, enabled=self.config.autocast is not None):
            outputs = self.parallel(inputs)
            loss = self._loss_of(inputs, outputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        if self.pruner is not None:
            self.pruner.step()
        for callback in self.callbacks:
            callback.after_step(self.steps)
        self.images += len(inputs)
        self.sums[0] += loss.detach().float() * len(inputs)
        self.classes = _are_classes(outputs, targets)
        if self.classes:
            self.sums[1] += (outputs.detach().argmax(1) == targets).sum()

    def _loss_of(self, inputs: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        task = None
        if targets is not None:
            task = (
                self.loss(outputs, targets)
                if self.loss is not None
                else nn.functional.cross_entropy(outputs, targets, label_smoothing=self.config.label_smoothing)
            )
        if self.distillation is not None:
            return self.distillation(inputs, outputs, task)
        if task is None:
            raise ValueError("the batches have no targets: pass (inputs, targets), or a distillation")
        return task

    def _record(self, epoch: int, lr: float, start: float) -> None:
        totals = ranks.add(torch.cat([self.sums.double(), self.sums.new_tensor([self.images], dtype=torch.float64)]))
        loss, right, images = totals.tolist()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss / images} in epoch {epoch + 1} at lr={lr:.3g}: lower the optimizer's lr or "
                "check the inputs for NaN"
            )
        metrics: dict[str, float] = {}
        self.model.eval()
        with torch.no_grad():
            if self.after_epoch is not None:
                metrics.update(self.after_epoch(epoch, self.model))
            for callback in self.callbacks:
                metrics.update(callback.after_epoch(epoch, self.model))
        sparsity = self.pruner.sparsity if self.pruner else 0.0
        accuracy = right / images if self.classes else None
        seconds = time.perf_counter() - start
        self.history.append(EpochRecord(epoch, loss / images, accuracy, lr, sparsity, seconds, metrics))

    # Checkpoints

    def _signature(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to be of this training."""
        config = replace(self.config, checkpoint=None, checkpoint_steps=None, progress=True)
        layers = list(self.pruner.layers) if self.pruner else None
        return {
            "config": repr(config),
            "batches": self.length,
            "ranks": ranks.size(),
            "pruning": None if self.pruner is None else repr((self.pruner.config, self.pruner.schedule, layers)),
        }

    def save(self) -> None:
        """Write the checkpoint: rank 0 does, with the random state of all."""
        if self.config.checkpoint is None:
            return
        own = {
            "now": random_state(self.batches, self.device),
            "data_start": self.data_start,
            "sums": self.sums,
            "images": self.images,
            "classes": self.classes,
        }
        parts = ranks.gather(to_bytes(own))
        if ranks.rank() == 0:
            save_checkpoint(
                self.config.checkpoint,
                {
                    "signature": self._signature(),
                    "steps": self.steps,
                    "index": self.index,
                    "model": dict(self.model.state_dict()),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "pruner": None if self.pruner is None else self.pruner.state_dict(),
                    "callbacks": [callback.state_dict() for callback in self.callbacks],
                    "history": [asdict(record) for record in self.history],
                    "ranks": [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts],
                },
            )
        ranks.wait()

    def resume(self) -> None:
        """Go on from the checkpoint, if it is there."""
        path = self.config.checkpoint
        if path is None or not os.path.exists(path):
            return
        state = load_checkpoint(path)
        self._check_signature(state["signature"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        for callback, part in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(part)
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.steps, self.index = state["steps"], state["index"]
        own = from_bytes(state["ranks"][ranks.rank()].numpy().tobytes(), str(path))
        self.sums = own["sums"].to(self.device)
        self.images, self.classes, self.data_start = own["images"], own["classes"], own["data_start"]
        if self.index:
            self.now = own["now"]
        else:
            restore_random_state(own["now"], self.batches, self.device)

    def _check_signature(self, saved: dict[str, Any]) -> None:
        for name, value in self._signature().items():
            if saved[name] != value:
                raise ValueError(
                    f"the checkpoint {self.config.checkpoint} is of another training: its {name} was {saved[name]}, "
                    f"now it is {value}; delete the file to start anew, or go on with what it was made with"
                )


def _split(batch: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return inputs and targets of a batch, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True), None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"a batch must be (inputs, targets) or a Tensor of inputs, got {type(batch).__name__}")
    inputs, targets = batch
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _are_classes(outputs: Tensor, targets: Tensor | None) -> bool:
    return targets is not None and not targets.is_floating_point() and targets.ndim == 1 and outputs.ndim == 2


@contextmanager
def _progress(show: bool, loop: _Loop) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after every batch, which moves a progress bar if one is shown."""
    if not show:
        yield lambda text: None
        return
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        total = loop.config.epochs * loop.length if loop.length else None
        if loop.steps:
            bar.console.print(f"resumed from {loop.config.checkpoint} after {loop.steps} steps")
        task = bar.add_task("training", total=total, completed=loop.steps)
        yield lambda text: bar.update(task, advance=1, description=text)
