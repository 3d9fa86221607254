"""Evidence for pruning and quantization: accuracy on Fashion-MNIST, and Real-ESRGAN without labels.

    python benchmarks/pruning.py calibrate            # recipes compared on held-back training images
    python benchmarks/pruning.py core methods         # what README's tables are made of
    python benchmarks/pruning.py distilled --epochs 60  # pruned from a dense checkpoint, which is also the teacher
    python benchmarks/pruning.py taught               # ways to teach, on held-back training images
    python benchmarks/pruning.py committee --epochs 60  # the best of them, taught by the checkpoints of all seeds
    python benchmarks/pruning.py faculty --epochs 60  # the same, by those of both networks
    python benchmarks/pruning.py one-shot             # without retraining, also on a CPU
    python benchmarks/pruning.py two-of-four          # what such masks cost, also on a CPU
    python benchmarks/pruning.py realesrgan search
    python benchmarks/pruning.py core methods search realesrgan --tiny   # every path in a few steps, also on a CPU

Groups of jobs run in the order given, several at a time on every GPU, until all have ended or ``--seconds`` are over.
Every result is in ``OUT/pruning.json`` as soon as it is known, and jobs that are done there (or in the committed
results) are not done again: after an interruption start the same command anew. ``core`` trains both networks dense and
90, 95 and 98 % sparse over the same number of epochs, with several seeds, then each a little longer: as it is, and
quantized in six ways. ``methods`` compares pruning methods on one network. Fashion-MNIST is read from ``--data``
(``data/make_fashion.py --download`` gets it), the rest with ``data/fetch_realesrgan.py``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import torch
from common import RESULTS, environment
from pruning_fashion import (
    core,
    from_checkpoint,
    only_checkpoint,
    retrain_after,
    search,
    shipped_one_shot,
    shipped_two_of_four,
    single,
)
from pruning_pool import Job, Pool, Results
from pruning_realesrgan import realesrgan
from pruning_train import Recipe

ROOT = Path(__file__).resolve().parent.parent
FILE = "pruning.json"

SPARSITIES = (0.9, 0.95, 0.98)
AT_ONCE = (0.5, 0.7, 0.8, *SPARSITIES)
QUANTIZATIONS = [(kind, bits) for bits in (4, 8, 3) for kind in ("codebook", "linear")]

# method, scope, vector, two of four, function
METHODS = [
    ("gradual", "global", 1, False, single),
    ("gradual", "global", 1, True, single),
    ("gradual", "layer", 1, False, single),
    ("gradual", "erk", 1, False, single),
    ("gradual", "lamp", 1, False, single),
    ("gradual", "global", 4, False, single),
    ("gradual", "global", 16, False, single),
    ("acdc", "global", 1, False, single),
    ("dense, one-shot, retrained", "global", 1, False, retrain_after),
    ("gradual", "uniform+", 1, False, single),
]


def common_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return what every job on Fashion-MNIST has."""
    return {
        "folder": str(args.data),
        "limit": 160 if args.tiny else None,
        "epochs": args.epochs,
        "fine_epochs": args.fine_epochs,
        "fine_lr": args.fine_lr,
        "recipe": asdict(Recipe(lr=args.lr, weight_decay=args.weight_decay, batch=40 if args.tiny else 480)),
        "method": "gradual",
        "scope": args.scope,
        "vector": 1,
        "two_of_four": False,
        "ramp": (0.05, 0.6),
    }


def checkpoint_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return what every job has that starts from a dense checkpoint."""
    first = args.first_epochs or args.epochs // 2
    p = common_parameters(args) | {"first_epochs": first, "checkpoints": str(args.checkpoints)}
    return p | {"distil": True, "committee": (), "teachers": (), "second": {}, "ramp": tuple(args.ramp)}


def calibrate_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Recipes for the dense networks, scopes at the highest sparsity, and what a teacher is worth."""
    for variant in ({}, {"lr": 0.1}, {"lr": 0.4}, {"weight_decay": 1e-3}):
        for network in ("resnet18", "vgg16"):
            p = common_parameters(args) | {"group": "calibrate", "network": network, "seed": 0, "sparsity": 0.0}
            p |= {"validation": True, "recipe": p["recipe"] | variant}
            yield Job(f"calibrate {network} {variant or 'default'} {args.epochs} epochs", single, p)
    for scope in ("global", "lamp", "erk"):
        p = common_parameters(args) | {"group": "calibrate", "network": "resnet18", "seed": 0, "sparsity": 0.98}
        yield Job(f"calibrate 98% {scope} {args.epochs} epochs", single, p | {"validation": True, "scope": scope})
    first = None
    for variant in ({"teacher_share": 0.0}, {}, {"temperature": 4.0}, {"teacher_share": 0.5}):
        p = checkpoint_parameters(args) | {"group": "calibrate", "network": "resnet18", "seed": 0, "sparsity": 0.95}
        p |= {"validation": True, "recipe": p["recipe"] | variant, "quantizations": ()}
        name = f"calibrate taught {variant or 'default'} {args.epochs} epochs"
        yield Job(name, from_checkpoint, p, (first,) if first else ())
        first = first or name  # it makes the checkpoint


def core_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Dense and pruned networks, each quantized; the first dense one is also pruned at once."""
    for network in args.networks:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for sparsity in (0.0, *(SPARSITIES[:1] if args.tiny else SPARSITIES)):
                p = common_parameters(args) | {"group": "core", "network": network, "seed": seed, "sparsity": sparsity}
                p["quantizations"] = QUANTIZATIONS[:2] if args.tiny else QUANTIZATIONS
                first = args.one_shot and network == "resnet18" and seed == 0 and sparsity == 0.0
                p["one_shot"] = ((0.9,) if args.tiny else AT_ONCE) if first else ()
                yield Job(f"core {network} {sparsity:.0%} seed {seed} {args.epochs} epochs", core, p)


def distilled_jobs(args: argparse.Namespace, group: str = "distilled") -> Iterator[Job]:
    """As ``core``, but all from the same dense checkpoint of half of the epochs, which also teaches the pruned ones."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    chosen = TEACHERS[group]
    starts = {
        (network, seed): f"{group} {network} seed {seed} {args.epochs} epochs checkpoint"
        for network in args.networks
        for seed in seeds
    }
    pruned: list[Job] = []
    dense: list[Job] = []
    taught: list[Job] = []
    for (network, seed), start in starts.items():
        name = start.removesuffix(" checkpoint")
        p = checkpoint_parameters(args) | {"group": group, "network": network, "seed": seed}
        p["quantizations"] = QUANTIZATIONS[: 2 if args.tiny else args.quantizations]
        alone = p | {"sparsity": 0.0, "distil": False}
        yield Job(start, only_checkpoint, alone)
        dense.append(Job(f"{name} dense", from_checkpoint, alone, (start,)))
        p |= {"committee": () if group == "distilled" else tuple(seeds)} | chosen
        teachers = (start,) if group == "distilled" else tuple(starts.values())
        for sparsity in SPARSITIES[:1] if args.tiny else args.sparsities:
            pruned.append(Job(f"{name} {sparsity:.0%}", from_checkpoint, p | {"sparsity": sparsity}, teachers))
        more = p | {"sparsity": 0.0, "quantizations": ()}
        taught.append(Job(f"{name} dense, taught", from_checkpoint, more, teachers))
    # One sparsity after the other, of all networks and seeds; last those that are only beside them.
    pruned.sort(key=lambda job: args.sparsities.index(job.parameters["sparsity"]))
    yield from [*dense, *pruned, *taught]


def committee_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """As ``distilled``, taught by the checkpoints of all seeds together, with the recipe that ``taught`` chose."""
    return distilled_jobs(args, "committee")


def faculty_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """As ``committee``, taught by the checkpoints of both networks, with the recipe that ``taught`` chose for that."""
    return distilled_jobs(args, "faculty")


BOTH = ("resnet18", "vgg16")
TAUGHT: dict[str, dict[str, Any]] = {
    "own, global": {"scope": "global", "committee": False, "second": {}},
    "global": {"scope": "global", "second": {}},
    "lamp": {"scope": "lamp", "second": {}},
    "lamp, decay 1e-4": {"scope": "lamp", "second": {"weight_decay": 1e-4}},
    "lamp, teacher only": {"scope": "lamp", "second": {"teacher_share": 1.0}},
    "lamp, rate 0.1": {"scope": "lamp", "second": {"lr": 0.1}},
    "lamp, temperature 4": {"scope": "lamp", "second": {"temperature": 4.0}},
    "both networks": {"scope": "global", "teachers": BOTH, "second": {}},
    "mixup": {"scope": "global", "second": {"mixup": 0.5}},
    "both networks, mixup": {"scope": "global", "teachers": BOTH, "second": {"mixup": 0.5}},
    "decay 1e-4": {"scope": "global", "second": {"weight_decay": 1e-4}},
    "both networks, mixup, decay 1e-4": {
        "scope": "global",
        "teachers": BOTH,
        "second": {"mixup": 0.5, "weight_decay": 1e-4},
    },
}
"""Recipes that `taught` compares, of a committee of teachers but for the first."""
TEACHERS: dict[str, dict[str, Any]] = {
    "distilled": {},
    "committee": TAUGHT["global"],
    "faculty": TAUGHT["both networks, mixup"],
}
"""What each group takes: recipes that `taught` found best, of the teachers that the group has."""


def taught_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Ways to teach a network of 95 % zeros, compared on held-back training images."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    p = checkpoint_parameters(args) | {"group": "taught", "network": "resnet18", "validation": True}
    p |= {"quantizations": (), "distil": True}
    starts = {}
    for network in BOTH:
        for seed in seeds:
            start = f"taught {network} seed {seed} {args.epochs} epochs checkpoint"
            starts[network, seed] = start
            yield Job(start, only_checkpoint, p | {"network": network, "seed": seed, "sparsity": 0.0})
    for name, variant in TAUGHT.items():
        committee = tuple(seeds) if variant.get("committee", True) else ()
        for seed in seeds:
            mine = p | variant | {"committee": committee, "seed": seed, "sparsity": 0.95, "variant": name}
            yield Job(f"taught {name}, seed {seed} {args.epochs} epochs", from_checkpoint, mine, tuple(starts.values()))


def methods_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One network, pruned by each method."""
    for seed in range(args.method_seeds):
        for sparsity in SPARSITIES[:1] if args.tiny else SPARSITIES:
            for method, scope, vector, two_of_four, function in METHODS:
                p = common_parameters(args) | {"group": "methods", "network": "resnet18", "seed": seed}
                p |= {"sparsity": sparsity, "method": method, "scope": scope, "vector": vector}
                p |= {"two_of_four": two_of_four}
                how = f"{method} {scope} V={vector}{' two of four' if two_of_four else ''}"
                name = f"methods {how} {sparsity:.0%} seed {seed} {args.epochs} epochs"
                yield Job(name, function, p)


def realesrgan_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Both sparsities of Real-ESRGAN's network."""
    size = {"steps": 3, "batch": 1, "size": 32, "calibration": 2, "limit": 2} if args.tiny else {}
    full = {"steps": args.steps, "batch": 16, "size": 64, "calibration": 32, "limit": None}
    for sparsity in (0.9, 0.8):
        p = {"sparsity": sparsity, "scope": "global", "seed": 0, "lr": 5e-4, "pictures": str(args.out), **full, **size}
        yield Job(f"realesrgan {sparsity:.0%} {p['steps']} steps", realesrgan, p)


def search_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """The search for the highest sparsity without a drop, on the quickstart's network."""
    p = common_parameters(args) | {"group": "search", "network": "fashion", "seed": 0, "sparsity": 0.0}
    p |= {"log": str(args.out / "pruning_search"), "retrain_steps": 3 if args.tiny else args.search_steps}
    p |= {"fine_lr": args.search_lr, "recipe": p["recipe"] | {"batch": 40 if args.tiny else args.search_batch}}
    p |= {"levels": (0.5, 0.9) if args.tiny else tuple(args.search_levels)}
    p |= {"max_rounds": 2 if args.tiny else None}
    yield Job("search", search, p)


def one_shot_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What can be had without retraining, of the quickstart's network on 2,000 test images; no GPU needed."""
    p = common_parameters(args) | {"group": "one-shot", "network": "fashion", "seed": 0, "sparsity": 0.0}
    p["limit"] = 160 if args.tiny else 2000
    yield Job("one-shot", shipped_one_shot, p | {"one_shot": (0.9,) if args.tiny else AT_ONCE})


def two_of_four_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What it costs to take the quickstart's pruned network to two of four; no GPU needed."""
    for seed in range(args.seeds):
        p = common_parameters(args) | {"group": "two of four", "network": "fashion", "seed": seed, "sparsity": 0.9}
        yield Job(f"two of four seed {seed} {args.fine_epochs} epochs", shipped_two_of_four, p)


GROUPS = {
    "calibrate": calibrate_jobs,
    "core": core_jobs,
    "taught": taught_jobs,
    "distilled": distilled_jobs,
    "committee": committee_jobs,
    "faculty": faculty_jobs,
    "methods": methods_jobs,
    "one-shot": one_shot_jobs,
    "two-of-four": two_of_four_jobs,
    "realesrgan": realesrgan_jobs,
    "search": search_jobs,
}


def devices(workers: int) -> list[str]:
    """Return a device for each worker: all GPUs in turns, or one CPU."""
    if not torch.cuda.is_available():
        return ["cpu"]
    return [f"cuda:{index}" for _ in range(workers) for index in range(torch.cuda.device_count())]


def describe(args: argparse.Namespace, workers: list[str]) -> dict[str, Any]:
    """Return what a run was made with."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    kept = {name: value for name, value in settings.items() if name not in ("data", "out", "checkpoints")}
    return {**environment(), "gpus": gpus, "cuda": torch.version.cuda, "workers": workers, "settings": kept}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Evidence for pruning and quantization.")
    parser.add_argument("groups", nargs="+", choices=GROUPS, help="what to run, the most important first")
    parser.add_argument("--seconds", type=float, default=420.0, help="stop when so many are over")
    parser.add_argument("--workers", type=int, default=4, help="processes on each GPU")
    parser.add_argument("--epochs", type=int, default=40, help="of each training")
    parser.add_argument("--first-epochs", type=int, help="of them until the checkpoint, half if not given")
    parser.add_argument("--fine-epochs", type=int, default=2, help="of retraining quantized")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--fine-lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--scope", default="global", help="of the pruned networks of core")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="jobs whose names have one of these")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="of distilled and committee")
    parser.add_argument("--quantizations", type=int, default=6, help="of distilled, committee: the first so many")
    parser.add_argument("--seeds", type=int, default=3, help="of core")
    parser.add_argument("--first-seed", type=int, default=0, help="of core")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vgg16"], choices=("resnet18", "vgg16"))
    parser.add_argument("--one-shot", action=argparse.BooleanOptionalAction, default=True, help="prune one at once too")
    parser.add_argument("--method-seeds", type=int, default=2, help="of methods")
    parser.add_argument("--steps", type=int, default=1500, help="of Real-ESRGAN's distillation")
    parser.add_argument("--ramp", type=float, nargs=2, default=(0.0, 0.5), help="of distilled: shares of its steps")
    parser.add_argument("--search-steps", type=int, default=375, help="of retraining in each round of the search")
    levels = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    parser.add_argument("--search-levels", type=float, nargs="+", default=levels, help="sparsities a layer may have")
    parser.add_argument("--search-lr", type=float, default=0.05)
    parser.add_argument("--search-batch", type=int, default=480)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "numbasparse-checkpoints", help="of distilled"
    )
    parser.add_argument("--data", type=Path, default=ROOT / ".data" / "fashion-mnist", help="Fashion-MNIST's folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    parser.add_argument("--tiny", action="store_true", help="try every path on a few images; results mean nothing")
    args = parser.parse_args()
    if args.tiny:
        args.epochs, args.fine_epochs, args.seeds, args.method_seeds = 2, 2, 1, 1
        if args.out == RESULTS:
            parser.error("--tiny needs --out FOLDER: its results must not stand among the others")
    return args


def main() -> int:
    """Run the script; the exit code says whether a job failed or was left."""
    # An ordinary exit, which ends the workers too: they would otherwise go on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse()
    every = [job for group in args.groups for job in GROUPS[group](args)]
    jobs = [job for job in every if any(text in job.name for text in args.only)]
    workers = devices(args.workers)
    results = Results(args.out / FILE, describe(args, workers), None if args.tiny else RESULTS / FILE)
    return 1 if Pool(workers, results, args.seconds).run(jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
