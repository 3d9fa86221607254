"""Kernels for tensor cores on a device, from the first instruction to the profile.

    python benchmarks/tensor_cores.py checks   # tests and sanitizers, one process each, with a log of each in --out
    python benchmarks/tensor_cores.py layers   # cuda_wgmma on the ten layers against cuDNN's float16, N = 32, 128 and
                                               # 8, and what the kernel's own estimate says of each config measured
    python benchmarks/tensor_cores.py nhwc     # cuda_wgmma_nhwc the same way, N = 1, 8, 32 and 128, and with masks of
                                               # at most two of four neighbouring channels, and of 16 x 1 vectors
    python benchmarks/tensor_cores.py adding   # the last convolutions of ResNet-50's blocks, with the sum and the ReLU
                                               # behind them, against cuDNN's convolution that does the same
    python benchmarks/tensor_cores.py codes    # the same kernel with quantized weights as codes
    python benchmarks/tensor_cores.py gathered # cuda_mma the same way: unstructured masks, and masks of 16 x 1 vectors
    python benchmarks/tensor_cores.py grid     # a small grid against float64, as compute-sanitizer gets it
    python benchmarks/tensor_cores.py pack     # milliseconds of packing 512x512x3x3; needs no GPU
    python benchmarks/tensor_cores.py order    # what an order of input channels leaves over two of four neighbours, of
                                               # single layers and whole models; needs no GPU
    python benchmarks/tensor_cores.py once     # three launches of the best known config, for a profiler
    python benchmarks/tensor_cores.py dry      # compile what `layers` compiles, without a GPU

*Ordered* are masks whose input channels are in the order that breaks few quads, as
`numbasparse.pruning.reorder_inputs` leaves them in a model.

``checks`` begins with the tests of single instructions: where one fails, the facts of codegen/ptx.py are wrong for this
GPU, and nothing after it means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, geometric_mean, write
from gpu import POINTWISE, SPARSITIES, SQUARE, TUNED_AT, Case, Row, add_dense, ratios, save, session
from models_gpu import error, over_two_of_four, zoo

from autotune.compiling import Compilers
from autotune.gpu import GpuBench
from autotune.measure import measure
from autotune.space import Candidate, LayerProblem
from numbasparse import ConvSpec, SparseWeight
from numbasparse.channel_order import order_channels, order_quads, over_two
from numbasparse.kernels import Config, CudaRunner, kernel, wgmma_shape
from numbasparse.kernels.cuda_tiles import EstimatedKernel
from numbasparse.pruning import MagnitudePruning, prune_, reorder_inputs
from numbasparse.quantization import CodebookQuantization, LinearQuantization
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import to_layout
from numbasparse.weight import Quantization

NAME, PIXELS, GATHERING = "cuda_wgmma", "cuda_wgmma_nhwc", "cuda_mma"
TARGET = Case((3, 256, 56, 256), 32, "float16")
"""The layer of the profile."""
RACED, SUGGESTED, BEST_FEW = 5, 1, 2
"""Configs measured at 90 % zeros; what the kernel suggests for another sparsity; how many of the best stay for it."""
GATHERED = 5
"""Configs of cuda_mma measured for each mask."""
ENDS = [(1, 64, 56, 256), (1, 128, 28, 512), (1, 256, 14, 1024), (1, 512, 7, 2048)]
"""Last convolutions of ResNet-50's blocks, to which is added what the block got."""
CODED = ("98%", "16x1 90%")
"""Masks of `gathered` whose weights are measured as codes too."""
CODES = {
    "int8": LinearQuantization(8, granularity="channel"),
    "int4": LinearQuantization(4, granularity="channel"),
    "codebook of 16": CodebookQuantization(4),
}
"""Quantized weights of `codes`."""


def of_each_shape(
    problem: LayerProblem,
    name: str,
    fields: tuple[str, ...],
    count: int,
    wanted: Callable[[Config], bool] = lambda config: True,
) -> list[Candidate]:
    """What a kernel thinks best of what is wanted, one config for each shape of a block, which ``fields`` are."""
    best: dict[tuple[Any, ...], Candidate] = {}
    for config in filter(wanted, kernel(name).suggest(problem.spec, problem.weight, 1, 10000)):
        best.setdefault(tuple(config[f] for f in fields), Candidate(name, config))
    return list(best.values())[:count]


def gathering_configs(problem: LayerProblem, count: int) -> list[Candidate]:
    """Those of cuda_mma."""
    fields = ("batch", "tile", "warps", "parts", "split")
    return of_each_shape(problem, GATHERING, fields, count, lambda config: config["entries"] == "wide")


def configs(problem: LayerProblem, count: int, clusters: int) -> list[Candidate]:
    """Those of cuda_wgmma."""
    fields = ("batch", "tile", "split", "cluster", "groups", "turns")
    return of_each_shape(problem, NAME, fields, count, lambda config: int(config["cluster"]) <= clusters)


def pixel_configs(problem: LayerProblem, count: int) -> list[Candidate]:
    """Those of cuda_wgmma_nhwc."""
    fields = ("batch", "tile", "split", "groups", "stack", "turns", "channels")
    return of_each_shape(problem, PIXELS, fields, count)


# ---- right --------------------------------------------------------------------------------------------------

SMALL: list[tuple[str, ConvSpec, Config]] = [
    (
        NAME,
        ConvSpec.create((n, c, h, h), (k, c, r, r), stride, r // 2, dtype="float16"),
        {
            "batch": batch,
            "tile": tile,
            "channels": channels,
            "stages": stages,
            "split": split,
            "cluster": cluster,
            "groups": groups,
            "turns": 1,
            "entries": "wide",
        },
    )
    for (n, c, h, k, r, stride), (batch, tile, channels, stages, split, cluster, groups) in (
        ((64, 64, 6, 72, 3, 1), (64, "2x4", 16, 2, 1, 1, 2)),
        ((64, 64, 6, 72, 3, 1), (32, "2x4", 16, 2, 1, 2, 2)),
        ((32, 64, 6, 72, 3, 1), (32, "4x4", 16, 3, 1, 1, 2)),
        ((32, 64, 6, 72, 3, 1), (32, "2x4", 16, 3, 1, 2, 1)),
        ((32, 64, 6, 64, 3, 1), (16, "4x4", 16, 2, 2, 1, 2)),
        ((40, 40, 7, 64, 3, 2), (8, "2x4", 8, 2, 1, 1, 2)),
        ((32, 160, 4, 64, 1, 1), (32, "2x4", 64, 2, 1, 1, 2)),
    )
]
SMALL += [
    (
        PIXELS,
        ConvSpec.create((n, c, h, h), (k, c, r, r), 1, r // 2, dtype="float16"),
        {
            "batch": batch,
            "tile": tile,
            "channels": channels,
            "stages": 2,
            "split": split,
            "groups": groups,
            "stack": stack,
            "turns": turns,
            "entries": entries,
            "steps": steps,
        },
    )
    for (n, c, h, k, r), (batch, tile, channels, split, groups, stack, turns, entries, steps) in (
        ((3, 72, 14, 76, 3), (1, "14x8", 32, 1, 1, 1, 1, "wide", "listed")),
        ((4, 72, 7, 72, 3), (2, "7x8", 64, 1, 2, 1, 1, "wide", "listed")),
        ((2, 128, 9, 64, 3), (1, "4x16", 32, 2, 2, 1, 1, "wide", "listed")),
        ((4, 160, 4, 64, 1), (1, "8x8", 64, 1, 1, 1, 1, "wide", "listed")),
        ((2, 3, 12, 64, 3), (1, "12x8", 32, 1, 1, 1, 1, "wide", "listed")),
        ((3, 72, 14, 76, 3), (1, "14x8", 32, 1, 1, 1, 1, "coded", "listed")),
        ((3, 160, 14, 76, 3), (1, "7x16", 32, 1, 1, 1, 2, "wide", "listed")),
        ((3, 160, 14, 76, 3), (1, "7x16", 32, 1, 1, 1, 2, "coded", "listed")),
        ((3, 72, 14, 76, 3), (1, "14x8", 32, 1, 1, 1, 1, "wide", "every")),
        ((3, 160, 14, 76, 3), (1, "14x16", 32, 1, 2, 1, 1, "wide", "every")),
        ((3, 160, 14, 76, 3), (1, "7x16", 32, 1, 1, 1, 2, "wide", "every")),
        ((3, 72, 14, 76, 3), (1, "14x8", 32, 1, 1, 2, 1, "wide", "listed")),
        ((3, 160, 14, 132, 3), (1, "14x16", 32, 1, 1, 2, 1, "wide", "every")),
    )
]
SMALL += [
    (
        GATHERING,
        ConvSpec.create((n, c, h, h), (k, c, 3, 3), stride, 1, dtype="float16"),
        {
            "batch": batch,
            "tile": tile,
            "warps": 4,
            "parts": 2,
            "channels": 8,
            "stages": 2,
            "copy": copy,
            "split": split,
            "entries": entries,
        },
    )
    for (n, c, h, k, stride), (batch, tile, copy, split, entries) in (
        ((32, 40, 6, 72, 1), (32, "2x4", "box", 1, "wide")),
        ((32, 40, 6, 72, 2), (16, "4x4", "async", 1, "wide")),
        ((32, 40, 6, 72, 1), (32, "2x4", "box", 2, "coded")),
    )
]


def grid(args: argparse.Namespace) -> None:
    """Every case at several sparsities; exits with 1 if any is wrong."""
    # memcheck takes an operand of wgmma for one piece of memory, which may seem to end behind the last stage.
    exact = wgmma_shape.Shape.shared_bytes.fget
    wgmma_shape.Shape.shared_bytes = property(lambda shape: exact(shape) + 16384)  # type: ignore[method-assign]
    wrong = 0
    with session(args) as (gpu, _):
        for number, (name, spec, config) in enumerate(SMALL):
            for density in (0.02, 0.2, 0.6):
                rng = np.random.default_rng(number)
                dense = rng.standard_normal(spec.weight_shape) * (rng.random(spec.weight_shape) < density)
                weight = SparseWeight.from_dense(dense.astype(np.float32))
                if config["entries"] == "coded":
                    weight = weight.quantized(CODES["int8"] if density == 0.2 else CODES["codebook of 16"])
                refused = kernel(name).check(spec, weight, config)
                if refused is not None:
                    print(name, spec.key, config, f"density {density}: refused: {refused}", flush=True)
                    continue
                problem = LayerProblem("small", spec, weight, activation="relu")
                bench = GpuBench(problem, gpu)
                candidate = Candidate(name, config)
                reason = bench.wrong(candidate, bench.prepare(candidate))
                wrong += reason is not None
                print(name, spec.key, config, f"density {density}:", reason or "right", flush=True)
    sys.exit(min(wrong, 1))


# ---- fast ---------------------------------------------------------------------------------------------------


def race(
    bench: GpuBench, compilers: Compilers, candidates: list[Candidate], row: Row, label: str
) -> list[dict[str, Any]]:
    """Measure candidates, the best of which becomes a column; what came of each, the fastest first."""
    problem, device, found = bench.problem, cuda.current(), []
    for candidate in candidates:
        compilers.wait(problem, candidate)
        result = measure(bench, candidate, min((f["us"] for f in found if f["us"]), default=float("inf")))
        clocks = estimated(candidate.kernel).estimator(problem.spec, problem.weight)(candidate.config)
        native = result.native_us if result.us else None
        found.append(
            {"config": candidate.config, "us": native, "estimated_us": round(clocks / device.clock_mhz, 1)}
            | ({} if result.reason is None else {"reason": result.reason})
        )
    found.sort(key=lambda f: f["us"] or float("inf"))
    if found[0]["us"]:
        winner = Candidate(candidates[0].kernel, found[0]["config"])
        ready = bench.prepare(winner)
        row.add(f"ours native {label}", bench.call(ready, ready.takes, ready.gives), bench.wrong(winner, ready))
    return found


def fits(candidate: Candidate, problem: LayerProblem) -> bool:
    """Whether a config can run a problem."""
    return kernel(candidate.kernel).check(problem.spec, problem.weight, dict(candidate.config)) is None


def estimated(name: str) -> EstimatedKernel:
    """A kernel that has an estimate."""
    found = kernel(name)
    assert isinstance(found, EstimatedKernel)
    return found


def timed(
    args: argparse.Namespace,
    gpu: Any,
    wanted: list[Case],
    name: str,
    labels: tuple[str, ...],
    race_all: Callable[[Case, Row], dict[str, list[dict[str, Any]]]],
) -> None:
    """A row for each case, while there is time: cuDNN's two layouts, and what ``race_all`` adds, by the label raced."""
    rows: list[dict[str, Any]] = []
    began, longest = time.perf_counter(), 0.0
    for case in wanted:
        start = time.perf_counter()
        if start - began + longest > args.seconds:
            print(f"{len(rows)} of {len(wanted)} rows fitted into {args.seconds:.0f} s", flush=True)
            break
        row = Row(gpu)
        add_dense(row, case, "cudnn")
        raced = race_all(case, row)
        times = row.times()
        rows.append({"layer": case.name, "times": times, "ratios": ratios(times), "raced": raced})
        first = next(iter(raced.values()))
        print(case.name, rows[-1]["ratios"], first[0]["config"], row.wrong, flush=True)
        save(args, name, {"geometric_means": means(rows, labels), "rows": rows})
        longest = max(longest, time.perf_counter() - start)
        torch.cuda.empty_cache()
    print(means(rows, labels))


def layers(args: argparse.Namespace) -> None:
    """The best of some configs for each layer, batch and sparsity, and cuDNN's two layouts, in turns."""
    batches = args.batch or (32, 128)
    wanted = [Case(layer, n, "float16") for rows in (SQUARE, POINTWISE) for n in batches for layer in rows]
    if not args.batch:
        wanted += [Case(layer, 8, "float16") for layer in SQUARE]
    masks = [unordered(args), in_order(args)]
    of_masks(args, wanted, "tensor_layers", masks, lambda problem, count: configs(problem, count, args.clusters))


def nhwc(args: argparse.Namespace) -> None:
    """The same of cuda_wgmma_nhwc, and with masks that leave no rest, or are of vectors."""
    batches = args.batch or (1, 8, 32, 128)
    kinds = [rows for rows in (SQUARE, POINTWISE) if args.window in (None, rows[0][0])]
    wanted = [Case(layer, n, "float16") for rows in kinds for n in batches for layer in rows]
    vectors = [(f"16x1 {s:.0%}", functools.partial(vector_problem, sparsity=s, vector=16)) for s in args.vectors]
    masks = [
        unordered(args),
        in_order(args),
        [(f"two of four {s:.0%}", functools.partial(two_of_four, sparsity=s)) for s in tuned_first(args.two_of_four)],
        vectors,
        [(f"{label} ordered", functools.partial(channels_ordered, make=make)) for label, make in vectors],
    ]
    of_masks(args, wanted, "tensor_nhwc", masks, pixel_configs)


Masks = list[tuple[str, Callable[[Case], LayerProblem]]]
"""Of one kind: what they are called, and what makes them."""


def unordered(args: argparse.Namespace) -> Masks:
    """Random masks."""
    return [(f"{s:.0%}", functools.partial(Case.problem, sparsity=s)) for s in tuned_first(args.sparsity)]


def in_order(args: argparse.Namespace) -> Masks:
    """The same, with input channels in the order that breaks few quads."""
    sparsities = tuned_first(args.ordered)
    return [
        (f"{s:.0%} ordered", functools.partial(channels_ordered, make=functools.partial(Case.problem, sparsity=s)))
        for s in sparsities
    ]


def channels_ordered(case: Case, make: Callable[[Case], LayerProblem]) -> LayerProblem:
    """A problem with its input channels in another order: what the layer before can write at no cost."""
    problem = make(case)
    order = order_channels(problem.weight)
    weight = SparseWeight.from_dense(np.ascontiguousarray(problem.weight.to_dense()[:, order]))
    return dataclasses.replace(problem, name=f"{problem.name} ordered", weight=weight)


def tuned_first(sparsities: list[float]) -> list[float]:
    """The one that configs are chosen at first."""
    return sorted(sparsities, key=lambda s: s != TUNED_AT)


def two_of_four(case: Case, sparsity: float) -> LayerProblem:
    """The layer with a random mask that has at most two of every four neighbouring input channels of a tap."""
    layer = torch.nn.Conv2d(case.spec.c_per_group, case.spec.k, (case.spec.r, case.spec.s), bias=False)
    layer.weight.data = torch.randn(
        layer.weight.shape, generator=torch.Generator().manual_seed(hash((*case.layer, round(sparsity * 1000))))
    )
    prune_(layer, MagnitudePruning(sparsity, two_of_four=True), lambda module, name: True)
    return LayerProblem(f"{case.name} two of four", case.spec, SparseWeight.from_dense(layer.weight.detach().numpy()))


def of_masks(
    args: argparse.Namespace,
    wanted: list[Case],
    name: str,
    masks: list[Masks],
    choose: Callable[[LayerProblem, int], list[Candidate]],
) -> None:
    """Rows of cases with masks of some kinds, each at some sparsities; the configs that are best at the first of a kind
    are measured at its others too.
    """
    masks = [kind for kind in masks if kind]
    labels = [label for kind in masks for label, _ in kind]
    problems = {(case, label): make(case) for case in wanted for kind in masks for label, make in kind}
    firsts = [kind[0][0] for kind in masks]
    chosen = {key: choose(problem, args.raced) for key, problem in problems.items() if key[1] in firsts}
    with session(args) as (gpu, compilers):
        for key, candidates in chosen.items():
            compilers.submit(problems[key], candidates)

        def race_all(case: Case, row: Row) -> dict[str, list[dict[str, Any]]]:
            raced: dict[str, list[dict[str, Any]]] = {}
            few: list[Candidate] = []
            for label in labels:
                problem = problems[case, label]
                if label in firsts:
                    own = chosen[case, label]
                else:
                    # Another sparsity may have no room for what was best.
                    own = [c for c in few if fits(c, problem)] or choose(problem, SUGGESTED)
                compilers.submit(problem, own)
                raced[label] = race(GpuBench(problem, gpu, compilers), compilers, own, row, label)
                if label in firsts:
                    few = [Candidate(own[0].kernel, f["config"]) for f in raced[label][:BEST_FEW]]
            return raced

        timed(args, gpu, wanted, name, tuple(labels), race_all)


def adding(args: argparse.Namespace) -> None:
    """Last convolutions of blocks at 95 %, each config without and with what is added, and cuDNN's own sum."""
    wanted = [Case(layer, n, "float16") for n in args.batch or (32,) for layer in ENDS]
    problems = {case: channels_ordered(case, functools.partial(Case.problem, sparsity=0.95)) for case in wanted}
    problems = {case: dataclasses.replace(problem, activation="relu") for case, problem in problems.items()}
    chosen = {case: pixel_configs(problem, args.raced) for case, problem in problems.items()}
    rows: list[dict[str, Any]] = []
    with session(args) as (gpu, compilers):
        for case, candidates in chosen.items():
            compilers.submit(problems[case], candidates)
        for case, candidates in chosen.items():
            row, bench = Row(gpu), GpuBench(problems[case], gpu, compilers)
            prepared = [bench.prepare(candidate) for candidate in candidates]
            for number, (candidate, ready) in enumerate(zip(candidates, prepared, strict=True)):
                row.add(f"ours {number}", bench.call(ready, "NHWC", "NHWC"), bench.wrong(candidate, ready))
            add_sums(row, bench, prepared)
            times = row.times()
            best = min((us for name, us in times.items() if name.startswith("ours with")), key=lambda us: us["us"])
            ratio = round(times["cudnn with sum"]["us"] / best["us"], 3)
            used = [dict(candidate.config) for candidate in candidates]
            rows.append({"layer": case.name, "ratio": ratio, "times": times, "configs": used, "wrong": row.wrong})
            print(case.name, ratio, {name: us["us"] for name, us in times.items()}, row.wrong, flush=True)
            mean = round(geometric_mean([r["ratio"] for r in rows]), 3)
            save(args, "tensor_adding", {"geometric_mean": mean, "rows": rows})


def add_sums(row: Row, bench: GpuBench, prepared: list[CudaRunner]) -> None:
    """Columns of ``relu(convolution + residual)``: each config, and cuDNN."""
    spec, x = bench.problem.spec, bench.input("NHWC")
    weight = torch.from_numpy(bench.problem.weight.to_dense()).to(x)
    added = to_layout(torch.randn(spec.out_shape, device="cuda", dtype=torch.float16), "NHWC")
    expected = (torch.nn.functional.conv2d(x.double(), weight.double()) + added).relu()

    def add(name: str, call: Callable[[], Any]) -> None:
        off = error(call(), expected)
        row.add(name, call, None if off < 0.02 else f"off by {off}")

    for number, ready in enumerate(prepared):
        add(f"ours with sum {number}", functools.partial(ready.apply, x, None, added, "NHWC"))
    dense = weight.contiguous(memory_format=torch.channels_last)
    how = (None, spec.stride, (0, 0), spec.dilation, spec.groups)
    add("cudnn with sum", lambda: torch.cudnn_convolution_add_relu(x, dense, added, 1.0, *how))


def codes(args: argparse.Namespace) -> None:
    """cuda_wgmma_nhwc with 16-bit values and with codes, one config for all of a layer."""
    wanted = [Case(layer, n, "float16") for n in args.batch or (32, 8) for layer in SQUARE]
    found = {}
    with session(args) as (gpu, compilers):
        for case in wanted:
            for sparsity in args.sparsity:
                problem = case.problem(sparsity)
                (wide,) = pixel_configs(problem, 1)
                compilers.submit(problem, [wide])
                found[case, sparsity] = problem, wide
                for quantization in CODES.values():
                    compilers.submit(*coded(problem, wide, quantization))

        def race_all(case: Case, row: Row) -> dict[str, list[dict[str, Any]]]:
            raced = {}
            for sparsity in args.sparsity:
                (problem, wide), label = found[case, sparsity], f"{sparsity:.0%}"
                raced[label] = race(GpuBench(problem, gpu, compilers), compilers, [wide], row, label)
                for name, quantization in CODES.items():
                    add_coded(row, problem, wide, quantization, gpu, compilers, f"native {name} {label}")
            return raced

        labels = tuple(f"{sparsity:.0%}" for sparsity in args.sparsity)
        names = (*labels, *(f"{code} {label}" for code in CODES for label in labels))
        timed(args, gpu, wanted, "tensor_codes", names, race_all)


MASKS = {
    "98%": (0.98, 1),
    "95%": (0.95, 1),
    "90%": (0.90, 1),
    "16x1 75%": (0.75, 16),
    "16x1 90%": (0.90, 16),
}
"""Masks of `gathered`: sparsity, and output channels that share the fate of a column."""


def vector_problem(case: Case, sparsity: float, vector: int) -> LayerProblem:
    """The layer with a random mask of vectors of output channels, the same in every run."""
    if vector == 1:
        return case.problem(sparsity)
    spec, rng = case.spec, np.random.default_rng([*case.layer, round(sparsity * 1000), vector])
    k, *rest = spec.weight_shape
    mask = np.repeat(rng.random((-(-k // vector), *rest)) >= sparsity, vector, axis=0)[:k]
    dense = rng.standard_normal(spec.weight_shape) * mask
    return LayerProblem(f"{case.name} {vector}x1", spec, SparseWeight.from_dense(dense.astype(np.float32)))


def gathered(args: argparse.Namespace) -> None:
    """The best of some configs of cuda_mma for each layer, batch and mask, coded weights, and cuDNN's two layouts."""
    wanted = [Case(layer, n, "float16") for n in args.batch or (32, 128, 8) for layer in SQUARE]
    wanted += [Case(layer, n, "float16") for n in args.batch or (32, 128, 8) for layer in POINTWISE]
    with session(args) as (gpu, compilers):
        problems = {(case, mask): vector_problem(case, *MASKS[mask]) for case in wanted for mask in MASKS}
        for problem in problems.values():
            compilers.submit(problem, gathering_configs(problem, GATHERED))

        def race_all(case: Case, row: Row) -> dict[str, list[dict[str, Any]]]:
            raced: dict[str, list[dict[str, Any]]] = {}
            for mask in MASKS:
                bench = GpuBench(problems[case, mask], gpu, compilers)
                raced[mask] = race(bench, compilers, gathering_configs(bench.problem, GATHERED), row, mask)
                if raced[mask][0]["us"] and mask in CODED:
                    winner = Candidate(GATHERING, raced[mask][0]["config"])
                    add_coded(row, bench.problem, winner, CODES["int8"], gpu, compilers, f"coded {mask}")
            return raced

        timed(args, gpu, wanted, "tensor_gathered", tuple(MASKS), race_all)


def add_coded(
    row: Row,
    problem: LayerProblem,
    wide: Candidate,
    quantization: Quantization,
    gpu: Any,
    compilers: Compilers,
    label: str,
) -> None:
    """The same config with weights that are codes."""
    problem, (candidate,) = coded(problem, wide, quantization)
    if kernel(wide.kernel).check(problem.spec, problem.weight, dict(candidate.config)) is None:
        bench = GpuBench(problem, gpu, compilers)  # which waits for a candidate that was submitted
        ready = bench.prepare(candidate)
        row.add(f"ours {label}", bench.call(ready, ready.takes, ready.gives), bench.wrong(candidate, ready))


@functools.cache
def quantized(weight: SparseWeight, quantization: Quantization) -> SparseWeight:
    """A weight as codes."""
    return weight.quantized(quantization)


def coded(problem: LayerProblem, wide: Candidate, quantization: Quantization) -> tuple[LayerProblem, list[Candidate]]:
    """The problem with codes for weights, and the config for it."""
    weight = quantized(problem.weight, quantization)
    return dataclasses.replace(problem, weight=weight), [Candidate(wide.kernel, {**wide.config, "entries": "coded"})]


def means(rows: list[dict[str, Any]], labels: tuple[str, ...]) -> dict[str, float]:
    """Geometric means of the ratios over the 3x3 layers that are there, with input and output as the kernel likes."""
    found = {}
    for n in (1, 8, 32, 128):
        for label in labels:
            name = f"ours native {label}"
            own = [r["ratios"][name] for r in rows if f"N={n} " in r["layer"] and r["layer"].startswith("3x3")
                   and name in r["ratios"]]  # fmt: skip
            if own:
                found[f"N={n} {label} ({len(own)} layers)"] = round(geometric_mean(own), 3)
    return found


def once(args: argparse.Namespace) -> None:
    """Three launches, and nothing else on the GPU that matters."""
    if args.kernel != NAME and args.config is None:
        raise SystemExit(f"what is best is known of {NAME} only: give --config for --kernel {args.kernel}")
    problem = TARGET.problem(0.9)
    if args.in_order:
        problem = channels_ordered(TARGET, functools.partial(Case.problem, sparsity=0.9))
    best = best_config(args) if args.config is None else parse_config(args.config)
    print("config", best)
    ready: Any = kernel(args.kernel).prepare(problem.spec, problem.weight, dict(best))
    x = to_layout(torch.randn(problem.spec.x_shape, device="cuda", dtype=torch.float16), ready.takes)
    for _ in range(3):
        ready.apply(x, None)
    torch.cuda.synchronize()


def best_config(args: argparse.Namespace) -> Config:
    """The fastest that `layers` found, or what the kernel thinks best."""
    path = RESULTS / f"tensor_layers{args.suffix}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [row["raced"]["90%"][0]["config"] for row in rows if row["layer"] == TARGET.name and "raced" in row]
    return found[0] if found else dict(configs(TARGET.problem(0.9), 1, args.clusters)[0].config)


def parse_config(text: str) -> Config:
    """ "batch=32,tile=4x4,..." as a config."""
    pairs = (part.partition("=")[::2] for part in text.split(","))
    return {name: int(value) if value.isdecimal() else value for name, value in pairs}


# ---- without a GPU ------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Best of several runs, on one core, of a layer of 512x512x3x3 at each sparsity."""
    from numbasparse.kernels import two_four

    del args
    spec = ConvSpec.create((32, 512, 28, 28), (512, 512, 3, 3), padding=1, dtype="float16")
    for sparsity in SPARSITIES:
        rng = np.random.default_rng(0)
        dense = rng.standard_normal(spec.weight_shape) * (rng.random(spec.weight_shape) >= sparsity)
        weight = SparseWeight.from_dense(dense.astype(np.float32))
        config: Config = {
            "batch": 32,
            "tile": "4x4",
            "channels": 32,
            "stages": 2,
            "split": 1,
            "cluster": 1,
            "groups": 2,
            "turns": 1,
            "entries": "wide",
        }
        width = spec.c * spec.r * spec.s

        def gathered(weight: SparseWeight = weight, width: int = width) -> Any:
            blocks = two_four.order_rows(weight.indptr, weight.indices, width)
            steps = two_four.gather_steps(weight.indptr, weight.indices, weight.data, width, blocks, 0.5)
            return steps if isinstance(steps, str) else two_four.fragments(steps.values, "float16")

        def whole(weight: SparseWeight = weight, config: Config = config) -> Any:
            return kernel(NAME).pack(spec, weight, config)

        order_ms = fastest_ms(functools.partial(order_channels, weight))
        gathered_ms, whole_ms = fastest_ms(gathered), fastest_ms(whole)
        print(
            f"{sparsity:.0%}: columns ordered {gathered_ms:.1f} ms, octets covered and written {whole_ms:.1f} ms, "
            f"an order of input channels sought {order_ms:.0f} ms"
        )


def order(args: argparse.Namespace) -> None:
    """What is over two of four before and after, and seconds of one core, of layers and models with random weights."""
    order_quads(np.zeros((4, 1), bool))  # compiles
    layers = []
    for layer, sparsity in itertools.product(SQUARE[:3] + SQUARE[5:6], SPARSITIES):
        weight = Case(layer, 1, "float16").problem(sparsity).weight
        patterns = np.moveaxis(weight.to_dense() != 0, 1, 0).reshape(layer[1], -1)
        found, seconds = timed_once(functools.partial(order_quads, patterns))
        row = {"sparsity": sparsity, "before": over_two(patterns), "after": over_two(patterns[found])}
        layers.append({"layer": "{0}x{0} {1} -> {3}".format(*layer), **row, "seconds": round(seconds, 3)})
        print(layers[-1], flush=True)
    networks = []
    for name, sparsity in itertools.product(("vgg16", "resnet18", "resnet50"), (0.9, 0.95)):
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        dense = zoo.random_model(zoo.MODELS[name])
        zoo.settle_batch_norms(dense, x)
        model = zoo.pruned(dense, sparsity, x)
        before = over_two_of_four(model)
        _, seconds = timed_once(functools.partial(reorder_inputs, model))
        row = {"sparsity": sparsity, "before": before, "after": over_two_of_four(model)}
        networks.append({"model": name, **row, "seconds": round(seconds, 2)})
        print(networks[-1], flush=True)
    content = {"environment": environment(), "layers": layers, "models": networks}
    print("wrote", write(f"tensor_order{args.suffix}.json", content).name)


def timed_once(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def fastest_ms(call: Any) -> float:
    """The least of seven runs, after one that compiles."""
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times[1:])


def dry(args: argparse.Namespace) -> None:
    """Compile ahead; fails where anything does not, or where the assembler could not do as asked."""
    with cuda.assumed((9, 0)) as device, Compilers(device, args.workers) as compilers:
        cases = [Case(layer, n, "float16").problem(0.9) for n in (32, 128) for layer in SQUARE + POINTWISE]
        jobs = [(p, c) for p in cases for c in configs(p, RACED, args.clusters) + pixel_configs(p, RACED)]
        for problem, candidate in jobs:
            compilers.submit(problem, [candidate])
        failed = [reason for problem, c in jobs if (reason := compilers.wait(problem, c)) is not None]
        for problem, candidate in jobs:
            chosen: Any = kernel(candidate.kernel)
            for ptx in chosen.ptx(problem.spec, problem.weight, dict(candidate.config)):
                cubin = cuda.assemble(ptx)
                failed += [f"{candidate.key}: {loss}" for loss in cubin.losses]
                failed += [f"{candidate.key}: {cubin.local_bytes} bytes spilled"] if cubin.local_bytes else []
    print(f"{len(jobs)} configs, {len(failed)} failed or slowed", *failed, sep="\n")
    sys.exit(min(len(failed), 1))


# ---- checks ----------------------------------------------------------------------------------------------------


def checks(args: argparse.Namespace) -> None:
    """One process for each step, since one that fails on the device loses it for the rest of its process."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report = [tests("instructions", "tests/test_ptx_tensor.py", 120, out)]
    if not report[0].startswith("instructions: exit 0"):
        print("an instruction does not do what codegen/ptx.py says: nothing after it would mean anything")
    else:
        report.append(tests("kernel", "tests/test_cuda_wgmma.py", 200, out))
        small = [sys.executable, str(Path(__file__)), "grid", "--workers", "4"]
        if shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck"):
                # The bindings ask for functions that older drivers lack, which is no error of ours.
                sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
                report.append(step(tool, args.seconds, [*sanitizer, *small], out))
    print("\n".join(report))


def step(name: str, seconds: float, command: list[str], out: Path) -> str:
    """Run a command into a log, print the log's end, and say how it went."""
    began = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        # A session of its own, so that a kernel that never ends is killed with everything that the step started.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "over time"
    said = f"{name}: exit {code}, {time.perf_counter() - began:.0f} s"
    lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
    print(f"=== {said}", *lines[-12:], sep="\n", flush=True)
    return said


def tests(name: str, path: str, seconds: float, out: Path) -> str:
    """Run a file's tests for a GPU in several processes at once, which mostly compile."""
    pytest = f"{sys.executable} -m pytest -q -p no:cacheprovider -m gpu"
    count = max(1, min(12, (os.cpu_count() or 1) - 1))
    # Tests are dealt to the processes one by one; the step fails if any does.
    script = (
        f"{pytest} --collect-only {path} 2>/dev/null | grep :: > {out}/{name}.ids; "
        f'for i in $(seq 0 {count - 1}); do (awk "NR % {count} == $i" {out}/{name}.ids | '
        f"xargs -r -d '\\n' {pytest} --tb=short || touch {out}/{name}.failed) > {out}/{name}.$i.log 2>&1 & done; wait; "
        f"cat {out}/{name}.*.log; test -s {out}/{name}.ids && ! test -e {out}/{name}.failed"
    )
    return step(name, seconds, ["bash", "-c", script], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {f.__name__: f for f in (checks, layers, nhwc, adding, codes, gathered, grid, pack, order, once, dry)}
    parser.add_argument("what", choices=steps)
    parser.add_argument(
        "--seconds", type=float, default=100.0, help="layers: end before this time is over; checks: of a sanitizer"
    )
    parser.add_argument("--clusters", type=int, default=4, help="blocks of a cluster, at most")
    parser.add_argument("--kernel", default=NAME, help="once: whose config it is")
    parser.add_argument(
        "--in-order", action="store_true", help="once: input channels in the order that breaks few quads"
    )
    parser.add_argument("--config", help='once: as "batch=32,tile=4x4,channels=32,stages=3,split=1,cluster=1,groups=2"')
    parser.add_argument("--batch", type=int, nargs="+", help="other batch sizes")
    parser.add_argument("--window", type=int, choices=(1, 3), help="nhwc: layers of this size only")
    parser.add_argument("--sparsity", type=float, nargs="*", default=list(SPARSITIES))
    parser.add_argument("--two-of-four", type=float, nargs="*", default=[0.9, 0.8], help="nhwc: of such masks")
    parser.add_argument("--ordered", type=float, nargs="*", default=list(SPARSITIES), help="with channels in order")
    parser.add_argument("--vectors", type=float, nargs="*", default=[0.75], help="nhwc: masks of 16 x 1 vectors")
    parser.add_argument("--raced", type=int, default=RACED, help="configs measured at the first sparsity")
    parser.add_argument("--out", default="benchmarks/results/tensor", help="checks: folder of the logs")
    parser.add_argument("--workers", type=int, help="compiling processes; all cores but one if not given")
    parser.add_argument("--suffix", default="", help="added to the results file's name")
    args = parser.parse_args()
    args.tuned = None
    steps[args.what](args)


if __name__ == "__main__":
    main()
