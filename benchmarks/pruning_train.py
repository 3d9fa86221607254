"""A fast trainer for Fashion-MNIST: the whole set on the device, and each training step one CUDA graph.

A network of this size is trained in steps of a few milliseconds, of several hundred kernels each: launched one by
one from Python they would leave the GPU idle for much of the time. Batches are drawn and augmented inside the step.
On a CPU the same steps run plainly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning import Distillation, Pruner
from numbasparse.quantization import Quantizer

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

from fashion import normalize  # noqa: E402
from make_fashion import augment, read_set  # noqa: E402

Step = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, and a learning rate up and down in straight lines.

    The rate rises from 0 to ``lr`` over the share ``warm_up`` of the steps, then falls to 0 at the end. Weight
    decay acts on weights of two or more dimensions. ``batch`` should divide the training set: the rest of each
    epoch's random order is left out. Where there is a teacher, the loss against its outputs (softened by
    ``temperature``) has the share ``teacher_share``, that against the labels the rest. A share ``mixup`` of the images
    is mixed with others of their batch, labels too: what a teacher says of such images is more than the labels do
    (Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022, arXiv 2106.05237;
    mixing: Zhang et al., ICLR 2018, arXiv 1710.09412).
    """

    lr: float = 0.2
    warm_up: float = 0.15
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    batch: int = 480
    teacher_share: float = 0.8
    temperature: float = 2.0
    mixup: float = 0.0


@dataclass(frozen=True)
class Images:
    """Normalized images float32 (N, 1, 28, 28) and labels int64 (N,), on the device."""

    x: Tensor
    y: Tensor

    @classmethod
    def read(cls, folder: Path, part: str, device: torch.device, limit: int | None = None) -> Images:
        """Read ``"train"`` or ``"t10k"``; ``limit`` takes only the first images."""
        images, labels = read_set(folder, part)
        x = torch.from_numpy(normalize(images[:limit])).to(device)
        return cls(x, torch.from_numpy(labels[:limit].astype(np.int64)).to(device))

    def __len__(self) -> int:
        return len(self.x)

    def split(self, count: int) -> tuple[Images, Images]:
        """Return all but the last ``count`` images, and these."""
        return Images(self.x[:-count], self.y[:-count]), Images(self.x[-count:], self.y[-count:])


class GraphStep:
    """A step that can be repeated; on CUDA it is captured once and replayed.

    Parameters
    ----------
    step : callable
        Works on tensors that stay where they are, and waits for nothing on the device.
    state : callable
        Returns every tensor that a step changes; warming up for the capture leaves them as they were. Tensors
        that a first step makes (an optimizer's momentum) are set to zero.
    device : torch.device
    """

    WARM_UP = 3

    def __init__(self, step: Step, state: Callable[[], list[Tensor]], device: torch.device) -> None:
        self._graph = None
        if device.type != "cuda":
            self._run = step
            return
        before = state()
        saved = [tensor.detach().clone() for tensor in before]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()
        with torch.no_grad():
            for tensor, old in zip(before, saved, strict=True):
                tensor.copy_(old)
            for tensor in state()[len(before) :]:
                tensor.zero_()
        self._run = self._graph.replay

    def __call__(self) -> None:
        self._run()


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    recipe: Recipe,
    steps: int | None = None,
    pruner: Pruner | None = None,
    quantizer: Quantizer | None = None,
    teacher: nn.Module | None = None,
) -> float:
    """Train a classifier in place; return the mean loss of the last epoch.

    Parameters
    ----------
    model : nn.Module
        On the device of ``data``.
    data : Images
    epochs : int
    recipe : Recipe
    steps : int, optional
        Of an epoch; a whole pass over the data if not given.
    pruner : Pruner, optional
    quantizer : Quantizer, optional
        Both have begun, and are left for the caller to finish.
    teacher : nn.Module, optional
        The model learns from its outputs too, to the recipe's share.

    Raises
    ------
    RuntimeError
        If the loss is NaN or infinite in the end.
    """
    device = data.x.device
    model.train()
    lr = torch.zeros((), device=device)
    optimizer = _optimizer(model, recipe, lr)
    chosen = torch.zeros(recipe.batch, dtype=torch.int64, device=device)
    losses = torch.zeros((), device=device)
    if pruner is not None:
        pruner.optimizer = optimizer
    share, temperature = recipe.teacher_share, recipe.temperature
    distillation = Distillation(model, teacher, weight=share, temperature=temperature) if teacher is not None else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x, kept = mixed(augment(data.x[chosen], None), recipe.mixup)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = model(x)
            loss = label_loss(outputs, data.y[chosen], kept, recipe.label_smoothing)
            if distillation is not None:
                loss = distillation(x, outputs, loss)
        loss.backward()
        optimizer.step()
        losses.add_(loss.detach())
        if pruner is not None:
            pruner.apply()
        if quantizer is not None:
            quantizer.step()

    def state() -> list[Tensor]:
        momenta = (entry["momentum_buffer"] for entry in optimizer.state.values())
        return [*model.parameters(), *model.buffers(), losses, *momenta]

    run = GraphStep(step, state, device)
    steps = steps or len(data) // recipe.batch
    for epoch in range(epochs):
        losses.zero_()
        order = torch.randperm(len(data), device=device)
        for index in range(steps):
            lr.fill_(recipe.lr * triangle((epoch * steps + index + 1) / (epochs * steps + 1), recipe.warm_up))
            chosen.copy_(order[index * recipe.batch : (index + 1) * recipe.batch])
            run()
            if pruner is not None:
                pruner.step(apply=False)
    loss = float(losses) / steps
    if not np.isfinite(loss):
        raise RuntimeError(f"training diverged: the mean loss of the last epoch is {loss}")
    return loss


def mixed(x: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """Mix a share of the images (N, 1, H, W) with their neighbours in the batch, which is in random order.

    Returns
    -------
    x : Tensor
    kept : Tensor (N,) or None
        How much is left of each image, 1 where nothing was mixed in; None if ``share`` is 0.
    """
    if not share:
        return x, None
    draw = torch.rand(2, len(x), device=x.device)
    kept = torch.where(draw[0] < share, draw[1], torch.ones_like(draw[1]))
    weight = kept[:, None, None, None]
    return weight * x + (1.0 - weight) * x.roll(1, 0), kept


def label_loss(outputs: Tensor, y: Tensor, kept: Tensor | None, smoothing: float) -> Tensor:
    """Return the mean cross-entropy; of mixed images against both labels, each by its part."""
    if kept is None:
        return F.cross_entropy(outputs, y, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(outputs, labels, label_smoothing=smoothing, reduction="none") for labels in (y, y.roll(1, 0))
    )
    return (kept * own + (1.0 - kept) * other).mean()


def triangle(done: float, warm_up: float) -> float:
    """Return the learning rate's share of its peak after a share of all steps."""
    return min(done / warm_up, (1.0 - done) / (1.0 - warm_up)) if warm_up else 1.0 - done


def _optimizer(model: nn.Module, recipe: Recipe, lr: Tensor) -> torch.optim.SGD:
    """Return fused SGD, which reads its learning rate from a tensor: it may change between replays."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=True, fused=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, batch: int = 1000) -> float:
    """Return the share of right answers in float32, without augmentation; the model is left in eval mode."""
    model.eval()
    precision = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        right = torch.zeros((), dtype=torch.int64, device=data.x.device)
        for x, y in zip(data.x.split(batch), data.y.split(batch), strict=True):
            right += (model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()
    finally:
        torch.backends.cudnn.allow_tf32 = precision
    return int(right) / len(data)
