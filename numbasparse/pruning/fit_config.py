"""Settings of the ready training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

Rate = Literal["cosine", "linear", "constant"]


class OptimizerConfig(Protocol):
    """What ``fit`` asks of an optimizer's settings."""

    @property
    def lr(self) -> float:
        """Highest learning rate."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model's trainable parameters."""


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
            _check_number(name, getattr(self, name))
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0: pass nesterov=False")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model's trainable parameters."""
        groups = _groups(model, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW; weight decay acts on weights of two or more dimensions, not on biases and norms.

    Raises
    ------
    ValueError
        If a value is negative or not finite.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            _check_number(name, getattr(self, name))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model's trainable parameters."""
        return torch.optim.AdamW(_groups(model, self.weight_decay), lr=self.lr, betas=self.betas)


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class FitConfig:
    """How ``fit`` trains.

    Parameters
    ----------
    epochs : int
        1 or more.
    optimizer : SGDConfig, AdamWConfig or the like
        With an ``lr`` and ``build(model)``.
    rate : {"cosine", "linear", "constant"}
        The way of the learning rate from ``optimizer.lr`` to 0 at the end, step by step (epoch by epoch if the number
        of batches is not known). ``"linear"`` is the retraining of Zimmer, Spiegel and Pokutta, "How I learned to stop
        worrying and love retraining", ICLR 2023, arXiv 2111.00843.
    warmup_epochs : float
        First the learning rate rises from 0 in a line over so many epochs, which are part of ``epochs``.
    label_smoothing : float
        In [0, 1], of the default loss.
    autocast : torch.dtype, optional
        Run the forward pass in ``torch.bfloat16`` or ``torch.float16``; weights stay as they are. With float16 the
        loss is scaled (``torch.amp.GradScaler``), which synchronizes with a GPU once per step.
    checkpoint : path, optional
        File to resume from if it is there, and to write after every epoch. It stays after the end; ``fit`` with the
        same file then returns at once.
    checkpoint_steps : int, optional
        Write it also after every so many optimizer steps of an epoch.
    progress : bool
        Show a progress bar (needs rich).

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    epochs: int
    optimizer: OptimizerConfig = SGDConfig()
    rate: Rate = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    autocast: torch.dtype | None = None
    checkpoint: str | Path | None = None
    checkpoint_steps: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be an int of 1 or more, got {self.epochs!r}")
        if self.rate not in ("cosine", "linear", "constant"):
            raise ValueError(f"rate must be one of 'cosine', 'linear', 'constant', got {self.rate!r}")
        if not 0.0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in [0, epochs), got {self.warmup_epochs!r} of {self.epochs}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {self.autocast!r}")
        if self.checkpoint_steps is not None and (self.checkpoint is None or self.checkpoint_steps < 1):
            raise ValueError(
                "checkpoint_steps must be 1 or more and needs a checkpoint file, got "
                f"checkpoint_steps={self.checkpoint_steps!r}, checkpoint={self.checkpoint!r}"
            )

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate after ``epoch`` epochs, a fraction included."""
        if epoch < self.warmup_epochs:
            return self.optimizer.lr * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        if self.rate == "constant":
            return self.optimizer.lr
        if self.rate == "linear":
            return self.optimizer.lr * (1.0 - done)
        return 0.5 * self.optimizer.lr * (1.0 + math.cos(math.pi * done))
