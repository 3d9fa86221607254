"""Distillation: a pruned model learns from the dense one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Match = Literal["kl", "mse", "l1"]


class Committee(nn.Module):
    """Several dense models as one teacher: the mean of their outputs.

    Models that were trained from different seeds err in different places, so that their mean teaches more than any of
    them: in benchmarks/results/pruning.json it is worth 0.1 to 0.2 points.

    Parameters
    ----------
    members : sequence of nn.Module
        One or more, which take the same input and give outputs of one shape.

    Raises
    ------
    ValueError
        If there are none.

    Notes
    -----
    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("a committee needs at least one model, got none")
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the members' outputs for one input."""
        outputs = [member(x) for member in self.members]
        for output in outputs[1:]:
            _check_shapes("outputs of members", outputs[0], output, ("one member", "another"))
        return torch.stack(outputs).mean(0)


class Distillation:
    """Loss terms that pull a student's outputs and features towards a teacher's.

    In a loop of one's own::

        distillation = Distillation(model, teacher, weight=0.7, features=["layer3"])
        loss = distillation(x, outputs := model(x), task_loss=loss_of(outputs, y))
        ...
        distillation.close()

    Parameters
    ----------
    student : nn.Module
        The model in training. Hooks are put on its feature layers until ``close()``.
    teacher : nn.Module, optional
        Kept in eval mode, without gradients, on the student's device; a `Committee` for several. Without one, a copy
        of the student as it is now.
    weight : float
        Share of the output term in [0, 1]; the task's loss has the rest. Without a task loss it counts whole.
    match : {"kl", "mse", "l1"}
        Divergence of class probabilities at ``temperature``, times its square; or the mean squared or absolute
        difference of outputs of any shape.
    temperature : float
        Above 0; softens class probabilities.
    features : sequence of str
        Qualified names of layers, the same in both models, whose outputs are compared: mean squared difference,
        divided by the mean square of the teacher's, averaged over layers.
    feature_weight : float
        Factor of the feature term, not negative.

    Raises
    ------
    TypeError
        If a model is not a module.
    ValueError
        If a number is out of its range, a layer is not in both models, or the teacher is the student.

    Notes
    -----
    Sources: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531
    (outputs); Romero et al., "FitNets", ICLR 2015, arXiv 1412.6550 (features).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight: float = 0.5,
        match: Match = "kl",
        temperature: float = 4.0,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        for role, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module) and not (role == "teacher" and model is None):
                raise TypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
        _check(weight, match, temperature, feature_weight)
        if teacher is student:
            raise ValueError("teacher and student are the same model: pass a copy of the dense one, or no teacher")
        self.teacher = (copy.deepcopy(student) if teacher is None else teacher).eval()
        self.weight = weight
        self.match = match
        self.temperature = temperature
        self.feature_weight = feature_weight
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._handles: list[Any] = []
        try:
            for model, seen in zip((student, self.teacher), self._seen, strict=True):
                self._handles += [_watch(model, name, seen) for name in features]
        except BaseException:
            self.close()
            raise

    def __call__(self, inputs: Tensor, outputs: Tensor, task_loss: Tensor | None = None) -> Tensor:
        """Return the whole loss; call it right after the student ran on ``inputs``.

        Parameters
        ----------
        inputs : Tensor
            What the student was given.
        outputs : Tensor
            What it returned.
        task_loss : Tensor, optional
            Scalar loss against the targets.

        Raises
        ------
        ValueError
            If outputs or features of the two models differ in shape.
        """
        with torch.no_grad():
            wanted = self.teacher(inputs)
        _check_shapes("outputs", outputs, wanted)
        term = self._outputs(outputs, wanted)
        total = term if task_loss is None else (1.0 - self.weight) * task_loss + self.weight * term
        return total + self.feature_weight * self._features() if self._handles else total

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for seen in self._seen:
            seen.clear()

    def _outputs(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        # In float32 also under autocast: differences of near-equal half floats are rounded away.
        outputs, wanted = outputs.float(), wanted.float()
        if self.match == "mse":
            return F.mse_loss(outputs, wanted)
        if self.match == "l1":
            return F.l1_loss(outputs, wanted)
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(outputs / t, 1), F.log_softmax(wanted / t, 1), reduction="batchmean", log_target=True
        )
        return divergence * t * t

    def _features(self) -> Tensor:
        student, teacher = self._seen
        terms = []
        for name, wanted in teacher.items():
            if name not in student:
                raise ValueError(f"the student's layer {name!r} did not run before the loss was asked for")
            actual = student.pop(name)
            _check_shapes(f"features of layer {name!r}", actual, wanted)
            scale = wanted.float().square().mean().clamp_min(1e-12)
            terms.append(F.mse_loss(actual.float(), wanted.float()) / scale)
        teacher.clear()
        return torch.stack(terms).mean()


def _check(weight: float, match: str, temperature: float, feature_weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight must be in [0, 1], got {weight!r}")
    if match not in ("kl", "mse", "l1"):
        raise ValueError(f"match must be one of 'kl', 'mse', 'l1', got {match!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if not (math.isfinite(feature_weight) and feature_weight >= 0):
        raise ValueError(f"feature_weight must be finite and not negative, got {feature_weight!r}")


def _watch(model: nn.Module, name: str, seen: dict[str, Tensor]) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"feature layer {name!r} is not in {type(model).__name__}") from None
    return module.register_forward_hook(lambda module, args, output: seen.__setitem__(name, output))


def _check_shapes(what: str, one: Tensor, other: Tensor, who: tuple[str, str] = ("student", "teacher")) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{what} must have the same shape in {who[0]} and {who[1]}, got {tuple(one.shape)} and {tuple(other.shape)}"
        )
