"""The main job on real input: a pruned network, tuned on this machine, run on real images, exported."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from torch import nn

import autotune
import numbasparse
from numbasparse.cli.models import dense_rivals, time_models
from numbasparse.files import write_whole
from numbasparse.nn import capture, convert, save
from numbasparse.runtime import cpu


def data_folder() -> Path:
    """Where the shipped model and images are: in the installed package, else in the checkout."""
    package = Path(numbasparse.__file__).parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "fashion.py").is_file():
            return folder
    raise FileNotFoundError(f"the quickstart's data are missing beside {package}: install the package again")


def _fashion() -> ModuleType:
    path = data_folder() / "fashion.py"
    spec = importlib.util.spec_from_file_location("fashion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fashion"] = module
    spec.loader.exec_module(module)
    return module


def accuracy(model: nn.Module, images: torch.Tensor, labels: np.ndarray, batch: int) -> float:
    """Share of right answers."""
    with torch.inference_mode():
        answers = [model(images[i : i + batch]).argmax(1) for i in range(0, len(images), batch)]
    return float((torch.cat(answers).numpy() == labels).mean())


def run(out: Path, *, batch: int, images: int, trials: int, threads: int | None) -> None:
    """Tune, convert, run, print; write ``tuned.json``, ``model.safetensors``, ``quickstart.json``, ``layers.png``."""
    console = Console()
    start = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    fashion = _fashion()
    dense, pruned = fashion.load_model("dense"), fashion.load_model("pruned")
    pictures, labels = fashion.load_images()
    x = torch.from_numpy(fashion.normalize(pictures[:images]))
    labels = labels[:images]
    batch = min(batch, len(x))
    console.print(
        f"Fashion-MNIST, {len(x)} images in batches of {batch}; ResNet-style CNN, pruned. "
        f"{cpu.processor_name()}, {32 * cpu.vector_lanes()}-bit vectors, {torch.get_num_threads()} threads."
    )
    tuned = autotune.tune(pruned, x[:batch], trials=trials)
    tuned.save(out / "tuned.json")
    converted = convert(pruned, autotune.load(out / "tuned.json"), x[:batch])
    save(converted, out / "model.safetensors")
    models = {"dense": dense, "pruned, torch": pruned, "pruned, numbasparse": converted}
    right = _print_accuracy(console, models, x, labels, batch)
    times, ratio = _print_times(console, pruned, converted, x[:batch])
    record = {
        "device": msgspec.to_builtins(tuned.device),
        "versions": msgspec.to_builtins(tuned.versions),
        "created": str(tuned.created),
        "images": len(x),
        "batch": batch,
        "accuracy": right,
        "whole_model_ms": {name: seconds * 1e3 for name, seconds in times.items()},
        "ratio": ratio,
        "layers": autotune.layer_rows(tuned),
    }
    write_whole(out / "quickstart.json", (json.dumps(record, indent=1) + "\n").encode())
    where = f"{cpu.processor_name()}, {torch.get_num_threads()} threads"
    title = f"Fashion-MNIST CNN, batch {batch}, {where}: whole model {ratio:.2f}x"
    from autotune import pictures

    write_whole(out / "layers.png", pictures.layer_bars(autotune.layer_rows(tuned), title).png())
    files = f"{out / 'tuned.json'}, {out / 'model.safetensors'} (for `numbasparse run`) and {out / 'layers.png'}"
    wrote = f"wrote {files} ({time.perf_counter() - start:.0f} s in all)"
    console.print(wrote, markup=False, soft_wrap=True)


def _print_accuracy(
    console: Console, models: dict[str, nn.Module], x: torch.Tensor, labels: np.ndarray, batch: int
) -> dict[str, float]:
    right = {name: accuracy(model, x, labels, batch) for name, model in models.items()}
    for name, share in right.items():
        console.print(f"accuracy {name}: {share:.2%}")
    return right


def _print_times(
    console: Console, pruned: nn.Module, converted: nn.Module, x: torch.Tensor
) -> tuple[dict[str, float], float]:
    """Whole-model times in seconds, and the ratio of the best dense one to ours, captured."""
    calls: dict[str, Any] = dense_rivals(pruned, x)
    program = capture(converted, x)
    ours = {"numbasparse": lambda: converted(x), "numbasparse, captured": lambda: program(x)}
    with torch.inference_mode():
        times = time_models(calls | ours, 4.0)
    for name, seconds in times.items():
        console.print(f"whole model, {name}: {seconds * 1e3:.3f} ms")
    ratio = min(times[name] for name in calls) / times["numbasparse, captured"]
    console.print(f"whole model: {ratio:.2f} times the best dense speed")
    return times, ratio
