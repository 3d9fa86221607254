"""Make the quickstart's files from the full Fashion-MNIST set: train, prune, measure, write.

    PYTHONPATH=. python data/make_fashion.py --epochs 30 --prune-epochs 30 --device cuda

The set is read from Debian's package ``dataset-fashion-mnist``, from ``--source``, or fetched into
``--source`` with ``--download``. Written to ``--out``: the dense and the pruned weights, the first 2,000 test
images, and ``fashion_results.json``. The accuracies in it are of the written files, read back. They are of the
last epoch: no epoch, seed or setting is chosen by the test images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import (
    FILES,
    IMAGES_FILE,
    MEAN,
    STD,
    Array,
    check_set,
    fashion_resnet,
    load_images,
    load_model,
    normalize,
    pack_state,
    read_idx,
    write_arrays,
)
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning import (
    CubicSchedule,
    EpochRecord,
    FitConfig,
    MagnitudePruning,
    Pruner,
    PruningReport,
    SGDConfig,
    fit,
    report,
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
BACKGROUND = -MEAN / STD
"""A black pixel after ``normalize``."""


def download(folder: Path) -> None:
    """Fetch the four files into a folder, checking each one's MD5; files already there are kept.

    Raises
    ------
    ValueError
        If a fetched file is not the known one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in MD5.items():
        if (folder / name).exists():
            continue
        with urllib.request.urlopen(URL + name, timeout=60) as response:
            raw = response.read()
        got = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if got != md5:
            raise ValueError(f"{URL}{name} must have MD5 {md5}, got {got}: nothing was written, try again")
        beside = folder / f"{name}.part"
        beside.write_bytes(raw)
        os.replace(beside, folder / name)


def read_set(folder: Path, part: str) -> tuple[Array, Array]:
    """Read ``"train"`` or ``"t10k"``: images uint8 (N, 28, 28), labels uint8 (N,)."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    check_set(images, labels, f"{folder}/{part}")
    return images, labels


@dataclass
class Set:
    """A set on the device: x float32 (N, 1, 28, 28) normalized, y int64 (N,)."""

    x: Tensor
    y: Tensor

    @classmethod
    def on(cls, device: torch.device, images: Array, labels: Array) -> Set:
        x = torch.from_numpy(normalize(images)).to(device)
        return cls(x, torch.from_numpy(labels.astype(np.int64)).to(device))


class Augmented:
    """Batches of a training set in a new random order and with new random changes in each epoch.

    All of it happens on the device, a batch at a time: a loader of single images would take longer than the
    training.
    """

    def __init__(self, data: Set, batch: int, seed: int) -> None:
        self.data = data
        self.batch = batch
        self.random = torch.Generator(data.x.device).manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.data.x) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.data.x.device
        order = torch.randperm(len(self.data.x), generator=self.random, device=device)
        for chosen in order.split(self.batch):
            yield augment(self.data.x[chosen], self.random), self.data.y[chosen]


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Flip, shift and erase at random, each image of (N, 1, 28, 28) for itself."""
    return erase(shift(flip(x, random), random), random)


def flip(x: Tensor, random: torch.Generator) -> Tensor:
    """Mirror half of the images left to right."""
    flipped = torch.rand(len(x), 1, 1, 1, generator=random, device=x.device) < 0.5
    return torch.where(flipped, x.flip(3), x)


def shift(x: Tensor, random: torch.Generator, most: int = 2) -> Tensor:
    """Move each image by up to ``most`` pixels each way, filling with background."""
    n, _, height, width = x.shape
    padded = F.pad(x, (most, most, most, most), value=BACKGROUND)[:, 0]
    offset = torch.randint(2 * most + 1, (2, n, 1), generator=random, device=x.device)
    rows = (offset[0] + torch.arange(height, device=x.device))[:, :, None]
    columns = (offset[1] + torch.arange(width, device=x.device))[:, None, :]
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded[images, rows, columns][:, None]


def erase(x: Tensor, random: torch.Generator, share: float = 0.5, most: int = 10) -> Tensor:
    """Blank a rectangle of up to ``most`` by ``most`` pixels in a share of the images.

    Source: Zhong et al., "Random erasing data augmentation", 2017, arXiv 1708.04896 (here with background).
    """
    n, _, height, width = x.shape
    draw = torch.rand(5, n, 1, generator=random, device=x.device)
    inside = []
    for axis, size in enumerate((height, width)):
        length = 2 + draw[axis] * (most - 2)
        start = draw[2 + axis] * (size - length)
        position = torch.arange(size, device=x.device)
        inside.append((position >= start) & (position < start + length))
    box = inside[0][:, :, None] & inside[1][:, None, :] & (draw[4][:, :, None] < share)
    return x.masked_fill(box[:, None], BACKGROUND)


@torch.no_grad()
def accuracy(model: nn.Module, data: Set, batch: int = 1000) -> float:
    """Return the share of right answers, in float32."""
    model.eval()
    pairs = zip(data.x.split(batch), data.y.split(batch), strict=True)
    right = sum((model(x).argmax(1) == y).sum() for x, y in pairs)
    return int(right) / len(data.x)


def train(
    model: nn.Module,
    batches: Augmented,
    test: Set,
    args: argparse.Namespace,
    *,
    epochs: int,
    optimizer: SGDConfig,
    pruner: Pruner | None = None,
) -> Any:
    """Run ``fit`` with the settings common to both trainings."""

    def after_epoch(epoch: int, model: nn.Module) -> Mapping[str, float]:
        value = accuracy(model, test)
        print(f"epoch {epoch + 1}/{epochs}  test accuracy {value:.4f}", flush=True)
        return {"test_accuracy": value}

    config = FitConfig(
        epochs=epochs,
        optimizer=optimizer,
        label_smoothing=args.label_smoothing,
        autocast=torch.bfloat16 if args.device.startswith("cuda") else None,
        progress=False,
    )
    return fit(model, batches, config, pruner=pruner, device=args.device, after_epoch=after_epoch)


def prune(model: nn.Module, batches: Augmented, test: Set, args: argparse.Namespace) -> list[EpochRecord]:
    """Prune over the first half of retraining, so that the second half heals the final mask."""
    steps = len(batches) * args.prune_epochs
    schedule = CubicSchedule(0, max(1, steps // 2), every=min(20, max(1, steps // 10)))
    pruner = Pruner(model, MagnitudePruning(args.sparsity, scope="global"), schedule=schedule)
    sgd = SGDConfig(lr=args.prune_lr, weight_decay=args.weight_decay)
    return train(model, batches, test, args, epochs=args.prune_epochs, optimizer=sgd, pruner=pruner)


def write_model(model: nn.Module, name: str, out: Path) -> None:
    """Write a model's weights, contiguous and in C order."""
    write_arrays(pack_state(model.state_dict()), out / FILES[name], {"model": "FashionResNet", "weights": name})


def measure(name: str, out: Path, test: Set, shipped: Set) -> dict[str, Any]:
    """Measure a written model on all test images and on the shipped ones."""
    model = load_model(name, out).to(test.x.device)
    sparsity: PruningReport = report(model)
    return {
        "file": FILES[name],
        "bytes": (out / FILES[name]).stat().st_size,
        "accuracy_test": accuracy(model, test),
        "test_images": len(test.x),
        "accuracy_shipped": accuracy(model, shipped),
        "shipped_images": len(shipped.x),
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in model.parameters()),
        "pruned_layers": sparsity.to_dict(),
    }


def versions(device: torch.device) -> dict[str, Any]:
    """Say what the run was made with."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def history(records: list[EpochRecord]) -> list[dict[str, float]]:
    """Return the epochs in the types of JSON."""
    fields = ("epoch", "loss", "accuracy", "lr", "sparsity", "seconds")
    return [
        {**{f: round(getattr(r, f), 6) for f in fields}, **{k: round(v, 6) for k, v in r.metrics.items()}}
        for r in records
    ]


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write JSON beside its place, then rename it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Do everything; return what ``fashion_results.json`` holds."""
    start = time.perf_counter()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    images, labels = read_set(args.source, "train")
    test_images, test_labels = read_set(args.source, "t10k")
    data = Set.on(device, images[: args.limit], labels[: args.limit])
    test = Set.on(device, test_images[: args.limit], test_labels[: args.limit])
    batches = Augmented(data, args.batch, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_arrays({"images": test_images[:2000].copy(), "labels": test_labels[:2000].copy()}, args.out / IMAGES_FILE)

    # Assigned, not passed on: channels_last changes the parameters in place.
    model = fashion_resnet().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = SGDConfig(lr=args.lr, weight_decay=args.weight_decay)
    dense = train(model, batches, test, args, epochs=args.epochs, optimizer=sgd)
    write_model(model, "dense", args.out)
    pruned = prune(model, batches, test, args)
    write_model(model, "pruned", args.out)

    # The last figures are of true float32, not of the tensor cores' shortened one.
    torch.backends.cudnn.allow_tf32 = False
    shipped = Set.on(device, *load_images(args.out))
    settings = {k: v for k, v in vars(args).items() if k not in ("source", "out", "download")}
    results = {
        "settings": settings,
        "versions": versions(device),
        "dense": {"epochs_in_all": args.epochs, **measure("dense", args.out, test, shipped)},
        "pruned": {"epochs_in_all": args.epochs + args.prune_epochs, **measure("pruned", args.out, test, shipped)},
        "history": {"dense": history(dense), "pruned": history(pruned)},
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(results, args.out / "fashion_results.json")
    return results


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train and prune the quickstart's model on Fashion-MNIST.")
    parser.add_argument("--source", type=Path, default=DEBIAN, help="folder with the four .gz files")
    parser.add_argument("--download", action="store_true", help="fetch the files into --source first")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=30, help="of dense training")
    parser.add_argument("--prune-epochs", type=int, default=30, help="of pruning and healing")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.2, help="of dense training")
    parser.add_argument("--prune-lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--limit", type=int, default=None, help="use only so many images, to try the script out")
    args = parser.parse_args()
    if args.download and args.source == DEBIAN:
        parser.error("--download needs --source FOLDER to put the files in")
    return args


def main() -> None:
    """Run the script."""
    args = parse()
    if args.download:
        download(args.source)
    results = make(args)
    for name in ("dense", "pruned"):
        x = results[name]
        print(
            f"{name}: accuracy {x['accuracy_test']:.4f} on {x['test_images']} test images, "
            f"{x['accuracy_shipped']:.4f} on the {x['shipped_images']} shipped; "
            f"{x['nonzero_parameters']} of {x['parameters']} parameters; {x['bytes']} bytes"
        )
    print(f"{results['seconds']} s on {results['versions']['device']}")


if __name__ == "__main__":
    main()
