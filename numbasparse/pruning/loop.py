"""Ready training loop around a ``Pruner``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from numbasparse.pruning.pruner import Pruner


@dataclass(frozen=True)
class SGDConfig:
    """SGD with momentum; weight decay acts on weights of two or more dimensions, not on biases and norms.

    Raises
    ------
    ValueError
        If a value is negative or not finite, or ``nesterov`` is asked for without momentum.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0: pass nesterov=False")

    def build(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimizer for a model's trainable parameters."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training: mean loss, accuracy on the training batches, and what ``after_epoch`` returned."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    sparsity: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


Batches = Iterable[tuple[Tensor, Tensor]]
AfterEpoch = Callable[[int, nn.Module], Mapping[str, float]]


def retrain(
    model: nn.Module,
    train_batches: Batches,
    *,
    pruner: Pruner | None = None,
    epochs: int,
    optimizer: SGDConfig | None = None,
    label_smoothing: float = 0.0,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    after_epoch: AfterEpoch | None = None,
    progress: bool = True,
) -> list[EpochRecord]:
    """Train a classifier with cross-entropy, SGD and a cosine learning rate, pruning on the way.

    Parameters
    ----------
    model : nn.Module
        Trained in place and moved to ``device``; its train or eval mode is put back at the end.
    train_batches : iterable of (Tensor, Tensor)
        Inputs and class indices (int64); iterated once per epoch, so not a generator.
    pruner : Pruner, optional
        Of this model. If it has not begun, it is begun here and finished at the end; otherwise both are left
        to the caller. After an exception it stays active.
    epochs : int
        1 or more.
    optimizer : SGDConfig, optional
        ``SGDConfig()`` if not given; ``lr`` is the start of the cosine, which ends at 0.
    label_smoothing : float
        In [0, 1].
    device : str or torch.device, optional
        Where to train; where the model is if not given.
    autocast : torch.dtype, optional
        Run the forward pass in this dtype (``torch.bfloat16``); weights stay as they are.
    after_epoch : callable, optional
        ``(epoch, model) -> {name: value}``, called with the model in eval mode and no gradients.
    progress : bool
        Show a progress bar (needs rich).

    Returns
    -------
    list of EpochRecord
        One per epoch.

    Raises
    ------
    ValueError
        If ``train_batches`` is empty or can be iterated only once, ``epochs`` is less than 1, the pruner
        belongs to another model, or its schedule cannot end in the given epochs. Nothing is changed then.
    RuntimeError
        If the loss becomes NaN or infinite.
    """
    _check_loop(model, train_batches, pruner, epochs)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(where)
    was_training = model.training
    begun_here = pruner is not None and not pruner.active
    if pruner is not None and begun_here:
        pruner.begin()
    loop = _Loop(model, where, optimizer or SGDConfig(), label_smoothing, autocast, pruner)
    history: list[EpochRecord] = []
    steps = _length(train_batches)
    with _progress(progress, epochs, steps) as advance:
        for epoch in range(epochs):
            history.append(loop.epoch(epoch, epochs, train_batches, steps, after_epoch, advance))
    model.train(was_training)
    if pruner is not None and begun_here:
        pruner.finish()
    return history


def _check_loop(model: nn.Module, batches: Batches, pruner: Pruner | None, epochs: int) -> None:
    """Refuse what would fail or do nothing after hours of training."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an int of 1 or more, got {epochs!r}")
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError(
            f"train_batches is a {type(batches).__name__}, which is used up after one of {epochs} epochs: pass "
            "something that can be iterated again, such as a list or a DataLoader"
        )
    steps = _length(batches)
    if steps == 0:
        raise ValueError("train_batches has no batches: expected at least one (x, y)")
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


def _length(batches: Batches) -> int | None:
    """Return the number of batches, or None if it is not known."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over a stream has __len__ but refuses to answer
        return None


class _Loop:
    """The state of ``retrain`` that lasts over epochs."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        sgd: SGDConfig,
        label_smoothing: float,
        autocast: torch.dtype | None,
        pruner: Pruner | None,
    ) -> None:
        self.model = model
        self.device = device
        self.sgd = sgd
        self.optimizer = sgd.build(model)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.autocast = autocast
        self.pruner = pruner

    def epoch(
        self,
        epoch: int,
        epochs: int,
        batches: Batches,
        steps: int | None,
        after_epoch: AfterEpoch | None,
        advance: Callable[[str], None],
    ) -> EpochRecord:
        """Train one epoch; ``advance`` is told of every batch."""
        start = time.perf_counter()
        self.model.train()
        # Summed on the device and read once per epoch: reading each loss would stall a GPU.
        sums = torch.zeros(2, device=self.device)
        lr, seen = 0.0, 0
        for index, (x, y) in enumerate(batches):
            # Without a known number of batches the cosine goes down in steps of one epoch.
            lr = self._set_lr((epoch + (index / steps if steps else 0.0)) / epochs)
            sums += self._batch(x.to(self.device), y.to(self.device))
            seen += len(x)
            advance(f"epoch {epoch + 1}/{epochs}")
        if not seen:
            raise ValueError(f"train_batches gave no batches in epoch {epoch + 1}: expected at least one (x, y)")
        loss, accuracy = (sums / seen).tolist()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss} in epoch {epoch + 1} at lr={lr:.3g}: lower SGDConfig.lr or check the "
                "inputs for NaN"
            )
        metrics = self._evaluate(epoch, after_epoch)
        sparsity = self.pruner.sparsity if self.pruner else 0.0
        return EpochRecord(epoch, loss, accuracy, lr, sparsity, time.perf_counter() - start, metrics)

    def _set_lr(self, done: float) -> float:
        lr = 0.5 * self.sgd.lr * (1.0 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _batch(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one optimizer step; return the batch's summed loss and number right, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.model(x)
            loss = self.loss(logits, y)
        loss.backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        right = (logits.detach().argmax(1) == y).sum()
        return torch.stack([loss.detach().float() * len(x), right.float()])

    def _evaluate(self, epoch: int, after_epoch: AfterEpoch | None) -> Mapping[str, float]:
        if after_epoch is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            return dict(after_epoch(epoch, self.model))


@contextmanager
def _progress(show: bool, epochs: int, steps: int | None) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after every batch, which moves a progress bar if one is shown."""
    if not show:
        yield lambda text: None
        return
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=epochs * steps if steps else None)
        yield lambda text: bar.update(task, advance=1, description=text)
