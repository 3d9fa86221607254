"""Search: the sparsest model whose accuracy stays within an allowed drop.

Layers climb a ladder of sparsities. A round raises those layers to their next rung that are expected to cost least
(their measured drop per weight removed), retrains, and evaluates. Within the drop it is kept, and the next round is
twice as bold; otherwise the model goes back and half as many layers are raised. A layer that fails alone is closed.
Every round raises, halves or closes, so the search ends by itself.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.checkpoint import load_checkpoint, save_checkpoint
from numbasparse.pruning.criteria import LayerwisePruning, check_sparsity
from numbasparse.pruning.fit_config import FitConfig
from numbasparse.pruning.layers import LayerFilter, Layers, select_layers, weights_of
from numbasparse.pruning.loop import Batches, Loss, fit
from numbasparse.pruning.masks import check_finite
from numbasparse.pruning.pruner import Pruner
from numbasparse.pruning.sensitivity import Evaluate, evaluate_pruned, evaluated
from numbasparse.pruning.summary import PruningReport, count
from numbasparse.pruning.vectors import check_vector

Retrain = Callable[[nn.Module, Pruner], Any]
"""``(model, pruner)``: train the model, calling ``pruner.step()`` after every optimizer step."""

LOG = "search.jsonl"


@dataclass(frozen=True)
class SearchConfig:
    """The ladder and the granularity.

    Parameters
    ----------
    levels : sequence of float
        Sparsities a layer may have, ascending, in (0, 1).
    vector : {1, 2, 4, 8, 16}
        Granularity.
    max_rounds : int, optional
        End after so many retrainings even if layers are still open.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    levels: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
    vector: int = 1
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        levels = tuple(check_sparsity(value, "levels") for value in self.levels)
        if not levels or levels[0] == 0.0 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"levels must be ascending sparsities above 0, got {list(self.levels)}")
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "vector", check_vector(self.vector))
        if self.max_rounds is not None and self.max_rounds < 1:
            raise ValueError(f"max_rounds must be 1 or more, got {self.max_rounds!r}")


@dataclass(frozen=True)
class SearchResult:
    """What the search found; the model holds it.

    Attributes
    ----------
    accuracy, baseline : float
        What ``evaluate`` gave for the model found and for the one at the start.
    sparsities : dict of str to float
        Rung of every layer, 0 for those left dense.
    report : PruningReport
        Real sparsities.
    rounds : int
        Retrainings, those before a resume included.
    finished : bool
        False if ``max_rounds`` ended it.
    """

    accuracy: float
    baseline: float
    sparsities: dict[str, float]
    report: PruningReport
    rounds: int
    finished: bool


def fine_tune(batches: Batches, config: FitConfig, loss: Loss | None = None) -> Retrain:
    """Return a retraining for ``search_sparsity``: ``fit`` with these settings, anew in each round."""
    if config.checkpoint is not None:
        raise ValueError("a checkpoint file cannot be shared by the rounds of a search: the search resumes by itself")
    return lambda model, pruner: fit(model, batches, config, pruner=pruner, loss=loss)


def search_sparsity(
    model: nn.Module,
    evaluate: Evaluate,
    max_drop: float = 0.0,
    *,
    retrain: Retrain | None = None,
    config: SearchConfig | None = None,
    filter: LayerFilter | None = None,
    folder: str | os.PathLike[str] | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Find the sparsest model whose accuracy stays within ``max_drop`` of the present one.

    Parameters
    ----------
    model : nn.Module
        At the end the model found. After an error or an interrupt it is as before the call; with a ``folder`` the
        next call with the same arguments goes on from the last round kept.
    evaluate : callable
        ``model -> number``, higher is better; called in eval mode without gradients. Use data that is neither trained
        on nor reported as the result.
    max_drop : float
        How much lower the number may become, in its own unit; 0 or more.
    retrain : callable, optional
        ``(model, pruner)``, such as ``fine_tune(batches, FitConfig(epochs=2, rate="linear"))``. Without one the
        search prunes only.
    config : SearchConfig, optional
        ``SearchConfig()`` if not given.
    filter : callable, optional
        Chooses the layers; ``default_filter`` if not given.
    folder : path, optional
        Made if it is not there. It gets ``search.jsonl``, one line of JSON per step, and the last model kept.
    tell : callable, optional
        Called with every line of the log.

    Returns
    -------
    SearchResult

    Raises
    ------
    TypeError
        If ``evaluate`` or ``retrain`` cannot be called.
    ValueError
        If ``max_drop`` is negative, no layer is chosen, ``evaluate`` gives NaN or no number, a weight is NaN or
        infinite, or the folder holds another search.
    RuntimeError
        If ``retrain`` brings pruned weights back.
    """
    if not callable(evaluate) or not (retrain is None or callable(retrain)):
        raise TypeError("evaluate and retrain must be callable, as evaluate(model) and retrain(model, pruner)")
    if not (math.isfinite(max_drop) and max_drop >= 0.0):
        raise ValueError(f"max_drop must be finite and not negative, got {max_drop!r}")
    layers = select_layers(model, filter)
    check_finite(layers)
    before = _copied(model)
    try:
        search = _Search(model, layers, evaluate, max_drop, retrain, config or SearchConfig(), _Log(folder, tell))
        return search.run(filter)
    except BaseException:
        model.load_state_dict(before)
        raise


class _Log:
    """Lines of JSON, and the last model kept; in memory only if there is no folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, tell: Callable[[dict[str, Any]], None] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.tell = tell
        self.past: list[dict[str, Any]] = []
        self.ended = False
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._read(self.folder / LOG)

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        *whole, torn = path.read_bytes().split(b"\n")
        if torn:  # a line that a kill cut off: its step is made again
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size - len(torn))
        try:
            lines = [json.loads(line) for line in whole]
        except ValueError as error:
            raise ValueError(f"{path} is not the log of a search: {error}") from None
        # A search that max_rounds ended may go on: its ends say nothing about the way.
        self.past = [line for line in lines if line.get("event") != "end"]
        self.ended = bool(lines) and lines[-1].get("event") == "end"

    def next_past(self, event: str) -> dict[str, Any] | None:
        """Take the next line of an earlier run if it is of this kind."""
        return self.past.pop(0) if self.past and self.past[0].get("event") == event else None

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns."""
        self.ended = False
        if self.folder is not None:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.tell is not None:
            self.tell(line)

    def file(self, number: int) -> Path | None:
        """Return the file of the model that a round kept."""
        return None if self.folder is None else self.folder / f"round-{number:04d}.safetensors"

    def drop_other_files(self, number: int) -> None:
        """Remove the models of earlier rounds."""
        if self.folder is not None:
            for path in self.folder.glob("round-*.safetensors"):
                if path != self.file(number):
                    path.unlink()


@dataclass
class _Ladder:
    """Who stands on which rung, and who is raised next. It depends on the outcomes alone, so a log replays it."""

    sizes: Mapping[str, int]
    levels: Sequence[float]
    drops: Mapping[str, Mapping[float, float]]
    rungs: dict[str, int] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    bold: int = 0

    def __post_init__(self) -> None:
        self.rungs = dict.fromkeys(self.sizes, -1)
        self.bold = len(self.sizes)

    def sparsity(self, name: str, rung: int) -> float:
        return self.levels[rung] if rung >= 0 else 0.0

    def cost(self, name: str) -> float:
        """Return the measured drop to the next rung per weight that it removes."""
        rung = self.rungs[name]
        low, high = self.sparsity(name, rung), self.sparsity(name, rung + 1)
        drop = self.drops[name][high] - (self.drops[name][low] if rung >= 0 else 0.0)
        return drop / (self.sizes[name] * (high - low))

    def proposal(self) -> list[str]:
        """Return the layers to raise, in their order in the model; empty at the end."""
        open_ = [n for n in self.sizes if n not in self.closed and self.rungs[n] + 1 < len(self.levels)]
        chosen = set(sorted(open_, key=self.cost)[: max(1, self.bold)])
        return [name for name in open_ if name in chosen]

    def targets(self, raised: Sequence[str]) -> dict[str, float]:
        """Return every layer's sparsity with some layers raised."""
        return {name: self.sparsity(name, rung + (name in raised)) for name, rung in self.rungs.items()}

    def settle(self, raised: Sequence[str], kept: bool) -> None:
        """Take note of a round's outcome."""
        if kept:
            for name in raised:
                self.rungs[name] += 1
            self.bold = min(2 * len(raised), len(self.sizes))
        elif len(raised) == 1:
            self.closed.add(raised[0])
        else:
            self.bold = len(raised) // 2


class _Search:
    """The state of ``search_sparsity``."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        evaluate: Evaluate,
        max_drop: float,
        retrain: Retrain | None,
        config: SearchConfig,
        log: _Log,
    ) -> None:
        self.model = model
        self.layers = layers
        self.evaluate = evaluate
        self.max_drop = max_drop
        self.retrain = retrain
        self.config = config
        self.log = log

    def run(self, filter: LayerFilter | None) -> SearchResult:
        """Climb until no layer is open."""
        baseline = self._start()
        ladder = _Ladder(
            {n: x.weight.numel() for n, x in self.layers.items()}, self.config.levels, self._drops(baseline)
        )
        number, accuracy = self._replay(ladder, baseline)
        kept = _copied(self.model)
        limit = self.config.max_rounds
        while (raised := ladder.proposal()) and (limit is None or number < limit):
            number += 1
            line = self._round(number, raised, ladder.targets(raised), baseline, filter)
            if line["kept"]:
                accuracy, kept = line["accuracy"], _copied(self.model)
            else:
                self.model.load_state_dict(kept)
            ladder.settle(raised, line["kept"])
        report = count(weights_of(self.layers))
        result = SearchResult(accuracy, baseline, ladder.targets(()), report, number, not raised)
        self._end(result)
        return result

    def _replay(self, ladder: _Ladder, baseline: float) -> tuple[int, float]:
        """Climb as the log says, and load the last model kept; returns the rounds and that model's accuracy."""
        number, last, accuracy = 0, None, baseline
        while (line := self.log.next_past("round")) is not None:
            number += 1
            raised = ladder.proposal()
            if (line["number"], line["raised"]) != (number, raised):
                raise ValueError(
                    f"{self.log.folder}/{LOG} does not follow from itself at round {number}: it was changed, or "
                    "written by another version; use another folder"
                )
            ladder.settle(raised, line["kept"])
            if line["kept"]:
                last, accuracy = number, line["accuracy"]
        path = None if last is None else self.log.file(last)
        if path is not None:
            self.model.load_state_dict(load_checkpoint(path))
        return number, accuracy

    def _start(self) -> float:
        """Return the value at the start, and check that a log is of this search."""
        line: dict[str, Any] = {
            "event": "start",
            "model": _digest(self.model),
            "layers": {name: list(layer.weight.shape) for name, layer in self.layers.items()},
            "levels": list(self.config.levels),
            "vector": self.config.vector,
            "max_drop": self.max_drop,
        }
        past = self.log.next_past("start")
        if past is None:
            if self.log.past:
                raise ValueError(f"{self.log.folder}/{LOG} does not begin with the start of a search")
            line["baseline"] = evaluated(self.model, self.evaluate)
            self.log.write(line)
            return float(line["baseline"])
        for name, value in line.items():
            if past.get(name) != value:
                raise ValueError(
                    f"{self.log.folder} holds another search: its {name} was {past.get(name)!r}, now it is {value!r}; "
                    "use another folder, or go on with the model and the settings that it was made with"
                )
        return float(past["baseline"])

    def _drops(self, baseline: float) -> dict[str, dict[float, float]]:
        """Measure every layer's sensitivity, or take it from the log."""
        drops: dict[str, dict[float, float]] = {}
        for name, layer in self.layers.items():
            past = self.log.next_past("sensitivity")
            if past is None:
                values = [
                    evaluate_pruned(self.model, layer, level, self.config.vector, self.evaluate)
                    for level in self.config.levels
                ]
                past = {"event": "sensitivity", "layer": name, "accuracy": values}
                self.log.write(past)
            drops[name] = {s: baseline - x for s, x in zip(self.config.levels, past["accuracy"], strict=True)}
        return drops

    def _round(
        self,
        number: int,
        raised: Sequence[str],
        targets: Mapping[str, float],
        baseline: float,
        filter: LayerFilter | None,
    ) -> dict[str, Any]:
        """Raise some layers, retrain and evaluate; the log has it when this returns."""
        start = time.perf_counter()
        pruner = Pruner(self.model, LayerwisePruning(dict(targets), self.config.vector), filter=filter)
        pruner.begin()
        try:
            if self.retrain is not None:
                self.retrain(self.model, pruner)
            if pruner.active:
                pruner.check_zeros()
                pruner.finish()
        except BaseException:
            pruner.cancel()
            raise
        accuracy = evaluated(self.model, self.evaluate)
        kept = accuracy >= baseline - self.max_drop
        path = self.log.file(number)
        if kept and path is not None:
            # The model first: a log that names a model has it.
            save_checkpoint(path, dict(self.model.state_dict()))
        line = {
            "event": "round",
            "number": number,
            "raised": list(raised),
            "sparsities": dict(targets),
            "sparsity": count(weights_of(self.layers)).sparsity,
            "accuracy": accuracy,
            "kept": kept,
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.log.write(line)
        if kept:
            self.log.drop_other_files(number)
        return line

    def _end(self, result: SearchResult) -> None:
        if not self.log.ended:
            self.log.write(
                {
                    "event": "end",
                    "finished": result.finished,
                    "rounds": result.rounds,
                    "sparsity": result.report.sparsity,
                    "sparsities": result.sparsities,
                    "accuracy": result.accuracy,
                }
            )


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _digest(model: nn.Module) -> str:
    """Return a hash of a model's parameters and buffers."""
    digest = blake2b(digest_size=16)
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
