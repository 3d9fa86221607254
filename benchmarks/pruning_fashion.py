"""The experiments on Fashion-MNIST: training dense and pruned networks, and quantizing each of them with retraining.

Every function here is a job of `pruning_pool`. Networks are judged by the test images once, at the end of each
training: nothing is chosen by them. Recipes are compared (``calibrate``) on the last 5,000 training images, left out
of the training.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fashion import load_model
from fashion_large import build
from pruning_pool import Emit, Job, Row
from pruning_train import Images, Recipe, accuracy, train
from safetensors.torch import load_file, save
from torch import nn

from numbasparse.files import write_whole
from numbasparse.pruning import (
    ACDCSchedule,
    Committee,
    CubicSchedule,
    MagnitudePruning,
    OBSPruning,
    Pruner,
    SearchConfig,
    prune_,
    prune_with_data_,
    recalibrate_batch_norm_,
    report,
    search_sparsity,
)
from numbasparse.quantization import CodebookQuantization, LinearQuantization, Quantizer
from numbasparse.quantization.layers import QuantizationConfig

VALIDATION = 5000


@cache
def data_sets(folder: str, device: torch.device, limit: int | None, validation: bool) -> tuple[Images, Images]:
    """Return the images to train on and those to judge by; read once in each process."""
    training = Images.read(Path(folder), "train", device, limit)
    if validation:
        return training.split(min(VALIDATION, len(training) // 4))
    return training, Images.read(Path(folder), "t10k", device, limit)


class Experiment:
    """What all jobs on Fashion-MNIST share: data, recipe, a seeded network, and emitting its accuracy."""

    def __init__(self, job: Job, device: torch.device, emit: Emit) -> None:
        p = self.p = job.parameters
        self.device = device
        self.emit = emit
        self.recipe = Recipe(**p["recipe"])
        self.fine = Recipe(**{**p["recipe"], "lr": p["fine_lr"], "warm_up": 0.0})
        self.data, self.test = data_sets(p["folder"], device, p["limit"], p.get("validation", False))
        self.judge = "validation" if p.get("validation") else "test"
        self.start = time.perf_counter()

    def network(self, seed: int | None = None, name: str | None = None) -> nn.Module:
        torch.manual_seed(self.p["seed"] if seed is None else seed)
        return build(name or self.p["network"]).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def row(self, model: nn.Module, **more: Any) -> None:
        """Emit the accuracy of a network, and the seconds since the last row."""
        value = accuracy(model, self.test)
        now = time.perf_counter()
        common: Row = {"group": self.p["group"], "network": self.p["network"], "seed": self.p["seed"]}
        common |= {"sparsity": self.p["sparsity"], "epochs": self.p["epochs"], "judged_by": self.judge}
        reached = round(report(model).sparsity, 5)
        self.emit({**common, "accuracy": value, "reached": reached, "seconds": round(now - self.start, 2), **more})
        self.start = time.perf_counter()


def how(p: dict[str, Any]) -> Row:
    """Return what a row says of how a job's network was pruned."""
    return (
        {name: p[name] for name in ("method", "scope", "vector", "two_of_four")}
        if p["sparsity"]
        else {"method": "dense"}
    )


def method_config(p: dict[str, Any]) -> MagnitudePruning:
    """Return the pruning config of a job."""
    return MagnitudePruning(p["sparsity"], p["scope"], p["vector"], p["two_of_four"])


def method_pruner(model: nn.Module, p: dict[str, Any], steps: int) -> Pruner | None:
    """Return the pruner of a job's method for a training of so many steps.

    Gradual: cubic from ``ramp[0]`` to ``ramp[1]`` of the steps, in 60 updates of the masks. AC/DC: dense for a tenth,
    then in turns compressed and dense for an eighth each, compressed from 85 % on, as its paper has it.
    """
    if not p["sparsity"]:
        return None
    if p["method"] == "gradual":
        begin, end = (round(part * steps) for part in p["ramp"])
        schedule = CubicSchedule(begin, max(begin + 1, end), every=max(1, (end - begin) // 60))
        return Pruner(model, method_config(p), schedule)
    if p["method"] == "acdc":
        phase = max(1, steps // 8)
        begin = round(0.1 * steps)
        acdc = ACDCSchedule(begin, max(begin + 1, round(0.85 * steps)), phase, phase)
        return Pruner(model, method_config(p), acdc)
    raise ValueError(f"method must be 'gradual' or 'acdc', got {p['method']!r}")


def train_once(e: Experiment) -> nn.Module:
    """Train a job's network from scratch, pruning it on the way."""
    p = e.p
    model = e.network()
    steps = len(e.data) // e.recipe.batch * p["epochs"]
    loss = train_pruned(model, e, e.recipe, p["epochs"], method_pruner(model, p, steps))
    e.row(model, **how(p), loss=round(loss, 4), recipe=asdict(e.recipe), by_layer=by_layer(model))
    return model


def train_pruned(
    model: nn.Module,
    e: Experiment,
    recipe: Recipe,
    epochs: int,
    pruner: Pruner | None,
    teacher: nn.Module | None = None,
) -> float:
    """Train, with a pruner from its beginning to its end; return the last epoch's mean loss."""
    if pruner is None:
        return train(model, e.data, epochs=epochs, recipe=recipe, teacher=teacher)
    pruner.begin()
    loss = train(model, e.data, epochs=epochs, recipe=recipe, pruner=pruner, teacher=teacher)
    pruner.finish()
    return loss


def by_layer(model: nn.Module) -> list[float]:
    """Return the sparsity of each prunable layer."""
    return [round(layer.sparsity, 4) for layer in report(model).layers]


def single(job: Job, device: torch.device, emit: Emit) -> None:
    """Train once: a row of the table of methods, or of the comparison of recipes."""
    train_once(Experiment(job, device, emit))


def core(job: Job, device: torch.device, emit: Emit) -> None:
    """Train once from scratch; then, each from there, train a little longer as it is and quantized in every way."""
    e = Experiment(job, device, emit)
    model = train_once(e)
    fine_tune(e, model)
    if e.p["one_shot"]:
        one_shot(e, model)


def fine_tune(e: Experiment, model: nn.Module, teacher: nn.Module | None = None) -> None:
    """Train copies of a network a little longer: one as it is, and one quantized in each way."""
    p = e.p
    longer = copy.deepcopy(model)
    pruner = Pruner(longer, method_config(p)) if p["sparsity"] else None
    train_pruned(longer, e, e.fine, p["fine_epochs"], pruner, teacher)
    e.row(longer, method="longer", fine_epochs=p["fine_epochs"], fine_lr=p["fine_lr"])
    del longer, pruner
    for kind, bits in p["quantizations"]:
        quantized(e, model, kind, bits, teacher)


def checkpoint(e: Experiment, seed: int, network: str | None = None) -> nn.Module:
    """Return the dense network of a seed: trained here, or read from the file that an earlier job left."""
    p = e.p
    model = e.network(seed, network)
    name = f"{network or p['network']}-{seed}-{p['first_epochs']}-{e.judge}{p['limit'] or ''}.safetensors"
    path = Path(p["checkpoints"]) / name
    if path.exists():
        model.load_state_dict(load_file(path, device=str(e.device)))
        return model
    train(model, e.data, epochs=p["first_epochs"], recipe=e.recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({key: value.contiguous() for key, value in model.state_dict().items()}))
    return model


def teacher_of(e: Experiment, start: nn.Module) -> nn.Module | None:
    """Return who teaches a job: nobody, the network that it starts from, or those of several seeds and networks."""
    networks = e.p["teachers"] or (e.p["network"],)
    members = [(seed, network) for network in networks for seed in e.p["committee"]]
    if members:
        return Committee([checkpoint(e, *member) for member in members]).requires_grad_(False)
    return copy.deepcopy(start).requires_grad_(False) if e.p["distil"] else None


def only_checkpoint(job: Job, device: torch.device, emit: Emit) -> None:
    """Train a dense network, which other jobs start from and are taught by."""
    e = Experiment(job, device, emit)
    model = checkpoint(e, e.p["seed"])
    e.row(model, method="checkpoint", first_epochs=e.p["first_epochs"], recipe=asdict(e.recipe))


def from_checkpoint(job: Job, device: torch.device, emit: Emit) -> None:
    """Go on from a dense checkpoint, pruning on the way to the job's sparsity; then as ``core``.

    All have the same total of epochs, the dense one too. With ``distil`` the checkpoint is also the teacher, or with
    ``committee`` those of several seeds together, of each of the networks ``teachers`` if there are any, for the
    quantized networks too. ``second`` changes the recipe from the checkpoint on.
    """
    e = Experiment(job, device, emit)
    p = e.p
    model = checkpoint(e, p["seed"])
    teacher = teacher_of(e, model)
    epochs = p["epochs"] - p["first_epochs"]
    recipe = replace(e.recipe, **p["second"])
    pruner = method_pruner(model, p, len(e.data) // recipe.batch * epochs)
    loss = train_pruned(model, e, recipe, epochs, pruner, teacher)
    more = {"first_epochs": p["first_epochs"], "distilled": teacher is not None}
    more |= {"committee": p["committee"], "teachers": p["teachers"]}
    e.row(model, **how(p), **more, loss=round(loss, 4), recipe=asdict(recipe), by_layer=by_layer(model))
    if p["quantizations"]:
        e.fine = replace(recipe, lr=p["fine_lr"], warm_up=0.0)
        fine_tune(e, model, teacher)


def quantized(e: Experiment, model: nn.Module, kind: str, bits: int, teacher: nn.Module | None) -> None:
    """Quantize a copy of a trained network, retrain it so, and emit the accuracy before and after retraining.

    ``kind`` is ``"codebook"`` (exact k-means, one codebook a layer) or ``"linear"`` (symmetric, a scale for each output
    channel, of least squared error). Zeros stay zero, so the masks stay too.
    """
    config: QuantizationConfig = (
        CodebookQuantization(bits)
        if kind == "codebook"
        else LinearQuantization(bits, granularity="channel", range="mse")
    )
    p = e.p
    model = copy.deepcopy(model)
    quantizer = Quantizer(model, config)
    quantizer.begin()
    more = {"fine_epochs": p["fine_epochs"], "fine_lr": p["fine_lr"], "accuracy_at_once": accuracy(model, e.test)}
    train(model, e.data, epochs=p["fine_epochs"], recipe=e.fine, quantizer=quantizer, teacher=teacher)
    layers = quantizer.finish().layers
    for size in ("dense_nbytes", "nbytes", "huffman_nbytes"):
        more[size] = sum(getattr(layer, size) for layer in layers)
    e.row(model, method=f"{kind}, retrained", quantization=kind, bits=bits, **more)


def retrain_after(job: Job, device: torch.device, emit: Emit) -> None:
    """Train dense for half of the epochs, prune at once by magnitude, and retrain for the other half.

    Retraining repeats the learning rate's way from its peak down in a straight line (Le and Hua, "Network pruning
    that matters: a case study on retraining variants", ICLR 2021, arXiv 2105.03193, there called learning rate
    restarting with a linear decay).
    """
    e = Experiment(job, device, emit)
    p = e.p
    model = e.network()
    first = p["epochs"] // 2
    train(model, e.data, epochs=first, recipe=e.recipe)
    train_pruned(model, e, e.recipe, p["epochs"] - first, Pruner(model, method_config(p)))
    e.row(model, **how(p), by_layer=by_layer(model))


def one_shot(e: Experiment, dense: nn.Module) -> None:
    """Prune a trained network at once, without retraining, by magnitude and by OBS.

    Each accuracy is given as pruned and with batch norm's statistics measured anew on the calibration images.
    """
    count = min(1024, len(e.data))
    calibration = e.data.x[:count].split(256)
    for sparsity in e.p["one_shot"]:
        for method, scope in (("magnitude", "global"), ("magnitude", "erk"), ("obs", "layer"), ("obs", "erk")):
            model = copy.deepcopy(dense)
            if method == "obs":
                prune_with_data_(model, calibration, OBSPruning(sparsity, scope=scope))
            else:
                prune_(model, MagnitudePruning(sparsity, scope=scope))
            plain = accuracy(model, e.test)
            recalibrate_batch_norm_(model, calibration)
            more = {"sparsity": sparsity, "calibration": count, "accuracy_as_pruned": plain}
            e.row(model, method=f"{method}, one-shot", scope=scope, vector=1, **more)


def shipped_one_shot(job: Job, device: torch.device, emit: Emit) -> None:
    """Prune the quickstart's trained network at once: nothing is trained."""
    e = Experiment(job, device, emit)
    model = load_model("dense").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    e.row(model, method="dense, as shipped")
    one_shot(e, model)


def shipped_two_of_four(job: Job, device: torch.device, emit: Emit) -> None:
    """Retrain the quickstart's pruned network a little: as it is, and with at most two of four neighbouring channels.

    Both see the same images in the same order.
    """
    e = Experiment(job, device, emit)
    p = e.p
    for two_of_four in (False, True):
        torch.manual_seed(p["seed"])
        model = load_model("pruned").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        pruner = Pruner(model, method_config(p | {"two_of_four": two_of_four}))
        train_pruned(model, e, e.fine, p["fine_epochs"], pruner)
        e.row(model, method="retrained", two_of_four=two_of_four, fine_epochs=p["fine_epochs"], fine_lr=p["fine_lr"])


def search(job: Job, device: torch.device, emit: Emit) -> None:
    """Search the sparsest form of the quickstart's trained network that is not worse than it.

    The search decides by the first half of the test images, which were used for nothing before; the row that is
    emitted gives the accuracy on the other half, before and after. Every step of the search is a row too, and a line
    in the folder ``log``, from which an interrupted search goes on.
    """
    e = Experiment(job, device, emit)
    p = e.p
    model = load_model("dense").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    deciding, e.test = e.test.split(len(e.test) // 2)
    before = accuracy(model, e.test)

    def retrain(model: nn.Module, pruner: Pruner) -> None:
        # As many epochs of equal length as the steps need.
        steps = min(p["retrain_steps"], len(e.data) // e.fine.batch)
        epochs = -(-p["retrain_steps"] // steps)
        train(model, e.data, epochs=epochs, steps=-(-p["retrain_steps"] // epochs), recipe=e.fine, pruner=pruner)

    found = search_sparsity(
        model,
        lambda model: accuracy(model, deciding),
        max_drop=0.0,
        retrain=retrain,
        config=SearchConfig(levels=p["levels"], max_rounds=p["max_rounds"]),
        folder=p["log"],
        tell=lambda line: emit({"method": "search step", **line}),
    )
    more = {"baseline": before, "deciding": found.accuracy, "deciding_baseline": found.baseline}
    more |= {"rounds": found.rounds, "finished": found.finished, "sparsities": found.sparsities}
    e.row(model, method="search", retrain_steps=p["retrain_steps"], recipe=asdict(e.fine), **more)
