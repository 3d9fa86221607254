"""Whole models on a GPU, every call one CUDA graph: sparse and converted against the dense ones of torch.

    python benchmarks/models_gpu.py                                       # all cases
    python benchmarks/models_gpu.py --cases vgg16,float32,32,0.9 resnet50,float16,128,0.95

Weights are random.  Masks keep the largest of each convolution but the first, and of each linear layer but the last;
then input channels are put into the order that breaks few quads (`reorder_inputs`, ``--as-is`` without).
Ours is tuned (one layer of each shape), converted and captured (`numbasparse.nn.convert`, `numbasparse.nn.capture`).
Dense: torch in NCHW and channels-last, captured too, and ``torch.compile(mode="max-autotune")`` in the layout that was
faster.  cuDNN's benchmark is on; float32 is strict (no TF32).  All are timed in turns by events; the results file is
written anew after every case.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS
from gpu import figures, save
from torch import Tensor, nn

import autotune
from autotune.model import problems_of
from autotune.space import LayerProblem
from numbasparse.channel_order import over_two
from numbasparse.nn import SparseConv2d, capture, conversion_report, convert
from numbasparse.pruning import reorder_inputs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import models as zoo

CASES = [
    "vgg16,float32,32,0.9",
    "resnet50,float32,32,0.9",
    "vgg16,float16,32,0.95",
    "resnet50,float16,32,0.95",
    "vgg16,float16,128,0.95",
    "resnet50,float16,128,0.95",
]
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
ROUNDS, ROUND_US = 15, 20_000.0


def distinct(model: nn.Module, x: Tensor) -> list[LayerProblem]:
    """One convolution of each shape, dense ones too: the first of a model may run in its neighbours' layout."""
    modules = dict(model.named_modules())
    found: dict[Any, LayerProblem] = {}
    for problem in problems_of(model, x, device="cuda"):
        if isinstance(modules[problem.name], nn.Conv2d):
            found.setdefault(problem.spec, problem)
    return list(found.values())


def over_two_of_four(model: nn.Module) -> int:
    """What four neighbouring input channels hold over two non-zeros, in all sparse convolutions."""
    weights = [m.weight.detach() != 0 for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(over_two(w.transpose(0, 1).flatten(1).numpy()) for w in weights if not w.all())


def us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds of one of several calls, by events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Times of all of them, each round a block of calls of each."""
    counts = {}
    for name, call in calls.items():
        us(call, 2)
        counts[name] = max(1, round(ROUND_US / us(call, 2)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(us(call, counts[name]))
    return times


def error(y: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max())


def compiled(model: nn.Module, x: Tensor, backends: str) -> Callable[[], Any]:
    """``torch.compile`` as fast as it gets, which includes a CUDA graph of its own."""
    torch._dynamo.reset()
    settings: Any = torch._inductor.config  # type: ignore[attr-defined]
    # Triton's convolutions take minutes to try, and took two to six times as long as cuDNN's wherever they were seen.
    settings.max_autotune_conv_backends = "ATEN"
    settings.max_autotune_gemm_backends = "ATEN" if x.dtype == torch.float32 else backends
    function = torch.compile(model, mode="max-autotune")
    for _ in range(3):
        function(x)
    return lambda: function(x)


def run(case: str, args: argparse.Namespace) -> dict[str, Any]:
    name, dtype_name, batch, sparsity = case.split(",")
    dtype, tolerance = getattr(torch, dtype_name), 1e-3 if dtype_name == "float32" else 3e-2
    x = torch.randn(int(batch), 3, zoo.IMAGE, zoo.IMAGE, generator=torch.Generator().manual_seed(0))
    dense = zoo.random_model(zoo.MODELS[name])
    zoo.settle_batch_norms(dense, x[:4])
    sparse = zoo.pruned(dense, float(sparsity), x[:4])
    over = [over_two_of_four(sparse)]
    began = time.perf_counter()
    if not args.as_is:
        reorder_inputs(sparse)
    reordering = time.perf_counter() - began
    over.append(over_two_of_four(sparse))
    sparse = sparse.cuda()
    x = x.cuda()
    expected = sparse(x)
    dense, sparse, x = dense.to("cuda", dtype), sparse.to(dtype), x.to(dtype)
    torchs = error(sparse(x), expected)

    began = time.perf_counter()
    problems = distinct(sparse, x)
    file = f"models_gpu_{name}_{dtype_name}_{batch}.tuned.json"
    if args.tuned and (Path(args.tuned) / file).exists():
        tuned = autotune.load(Path(args.tuned) / file)
    else:
        limits = {"trials": args.trials, "timeout": args.tune_seconds}
        tuned = autotune.tune_layers(problems, device="cuda", progress=False, **limits)
        tuned.save(RESULTS / file)
    tuning = time.perf_counter() - began
    print(f"{case}: {len(problems)} shapes tuned in {tuning:.0f} s", flush=True)

    calls: dict[str, Callable[[], Any]] = {}
    wrong, chosen, offs = {}, {}, {}
    for label, order in FORMATS.items():
        image = x.contiguous(memory_format=order)
        graph = capture(copy.deepcopy(dense).to(memory_format=order), image)
        calls[f"dense {label}"] = lambda graph=graph, image=image: graph(image)
        ours = convert(copy.deepcopy(sparse).to(memory_format=order), tuned, image)
        graph = capture(ours, image)
        off = offs[f"ours {label}"] = error(graph(image), expected)
        print(f"{case}: ours {label} is off by {off:.2g}, torch by {torchs:.2g}", flush=True)
        if off > max(tolerance, 2 * torchs):
            wrong[f"ours {label}"] = off
            continue
        calls[f"ours {label}"] = lambda graph=graph, image=image: graph(image)
        layouts = {n: m.out_layout for n, m in ours.named_modules() if isinstance(m, SparseConv2d)}
        records = conversion_report(ours)
        chosen[label] = {r.name: [r.decision, r.reason, layouts.get(r.name)] for r in records}
    first = {key: median(times) for key, times in in_turns(calls).items()}
    print(case, {key: round(time) for key, time in first.items()}, wrong, flush=True)
    first = {key: time for key, time in first.items() if key.startswith("dense")}
    if not args.no_compile:
        order = FORMATS[min(first, key=lambda key: first[key]).removeprefix("dense ")]
        image = x.contiguous(memory_format=order)
        began = time.perf_counter()
        try:
            calls["dense compiled"] = compiled(copy.deepcopy(dense).to(memory_format=order), image, args.gemm_backends)
        except Exception as problem:
            wrong["dense compiled"] = f"{type(problem).__name__}: {problem}"[:500]
        print(f"{case}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    times = {key: figures(found) for key, found in in_turns(calls).items()}
    best = {who: min(t["us"] for key, t in times.items() if key.startswith(who)) for who in ("dense", "ours")}
    ratio = round(best["dense"] / best["ours"], 3)
    print(case, {key: t["us"] for key, t in times.items()}, "ratio", ratio, wrong, flush=True)
    return {
        "model": name,
        "dtype": dtype_name,
        "batch": int(batch),
        "sparsity": float(sparsity),
        "times": times,
        "ratio": ratio,
        "tuning_seconds": round(tuning, 1),
        "reordering_seconds": round(reordering, 1),
        "over_two_of_four": over,
        "gemm_backends": args.gemm_backends,
        "shapes": len(problems),
        "layers": {
            layer.names[0]: {"ratio": layer.ratio, "choice": layer.choice.kernel, "dense_us": layer.dense_us}
            for layer in tuned.layers
        },
        "chosen": chosen,
        "off": {"torch": torchs, **offs},
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL,DTYPE,BATCH,SPARSITY")
    parser.add_argument("--trials", type=int, default=24, help="configs tried for each shape")
    parser.add_argument("--tune-seconds", type=float, default=120.0, help="for tuning each case")
    parser.add_argument(
        "--tuned", metavar="FOLDER", help="take tuned files of an earlier run from there, if it has any"
    )
    parser.add_argument("--as-is", action="store_true", help="do not re-order input channels")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--gemm-backends", default="ATEN,TRITON", help="of torch.compile for float16")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after that")
    parser.add_argument("--suffix", default="", help="added to the results file's name")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    began, rows = time.perf_counter(), []
    with torch.inference_mode():
        for case in args.cases:
            if time.perf_counter() - began > args.seconds:
                print(f"no time for {case}", flush=True)
                break
            rows.append(run(case, args))
            save(args, "models_gpu", {"rows": rows})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
