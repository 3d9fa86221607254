"""CPU benchmark: single convolutions against dense oneDNN through torch, all timed in turns in one process.

    python benchmarks/cpu.py layers      # the nine layers at 80 / 90 / 95 / 98 %, N = 1 and 8
    python benchmarks/cpu.py linear      # linear layers on one vector
    python benchmarks/cpu.py calls       # what a call costs beyond its kernel, and after 50 ms without work
    python benchmarks/cpu.py awkward     # sizes that fit nothing
    python benchmarks/cpu.py exhaustive  # the tuner's choice against every config

Ours is a whole call of `numbasparse.conv2d` on a torch tensor with a tuned config: input packed, output
allocated.  Dense is stock torch, NCHW and channels-last, input and weight already in that order; the ratio is
to the better of the two.  Beside it stands oneDNN with prepacked weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import environment, fair_malloc, geometric_mean, interleaved, summary, write

fair_malloc()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import autotune  # noqa: E402
import numbasparse  # noqa: E402
from numbasparse import ConvSpec, SparseWeight  # noqa: E402
from numbasparse.kernels import ConfigError, kernels_for  # noqa: E402
from numbasparse.nn import SparseConv2d, capture, conv2d  # noqa: E402

# (kernel, input channels, height and width, output channels)
LAYERS = [
    (3, 64, 56, 64),
    (3, 128, 28, 128),
    (3, 256, 14, 256),
    (3, 512, 7, 512),
    (3, 256, 56, 256),
    (3, 512, 28, 512),
    (1, 256, 56, 64),
    (1, 512, 28, 128),
    (1, 1024, 14, 256),
]
SPARSITIES = (0.80, 0.90, 0.95, 0.98)
# Linear layers of VGG-16 and ResNet-50, and a small one: inputs and outputs.
LINEAR = [(25088, 4096), (4096, 4096), (2048, 1000), (512, 1000)]

# spec arguments of convolutions whose sizes divide nothing: x shape, weight shape, stride, padding, groups
AWKWARD = {
    "3x3 96x35x35 -> 96": ((1, 96, 35, 35), (96, 96, 3, 3), 1, 1, 1),
    "5x5 s2 48x17x17 -> 200": ((1, 48, 17, 17), (200, 48, 5, 5), 2, 2, 1),
    "3x3 s2 64x56x56 -> 64": ((1, 64, 56, 56), (64, 64, 3, 3), 2, 1, 1),
    "depthwise 3x3 128x28x28": ((1, 128, 28, 28), (128, 1, 3, 3), 1, 1, 128),
    "3x3 d2 64x33x33 -> 80": ((1, 64, 33, 33), (80, 64, 3, 3), 1, 2, 1),
    "7x7 s2 3x224x224 -> 64": ((1, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    "3x3 N=3 40x19x23 -> 56": ((3, 40, 19, 23), (56, 40, 3, 3), 1, 1, 1),
}


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], sparsity: float, groups: int) -> SparseWeight:
    """Normal values under a random mask."""
    dense = rng.standard_normal(shape) * (rng.random(shape) >= sparsity)
    return SparseWeight.from_dense(dense.astype(np.float32), groups=groups)


def dense_calls(x: torch.Tensor, weight: torch.Tensor, spec: ConvSpec) -> dict[str, Callable[[], Any]]:
    """Stock torch in both layouts, and oneDNN with prepacked weights in both."""
    pad = (spec.padding[0][0], spec.padding[1][0])
    args = (None, spec.stride, pad, spec.dilation, spec.groups)
    x_last, w_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    calls: dict[str, Callable[[], Any]] = {
        "nchw": lambda: F.conv2d(x, weight, *args),
        "nhwc": lambda: F.conv2d(x_last, w_last, *args),
    }
    for name, tensor in (("packed_nchw", x), ("packed_nhwc", x_last)):
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            torch._to_mkldnn(weight) if hasattr(torch, "_to_mkldnn") else weight.to_mkldnn(),
            list(pad),
            list(spec.stride),
            list(spec.dilation),
            spec.groups,
            list(tensor.shape),
        )
        tail = (list(pad), list(spec.stride), list(spec.dilation), spec.groups, "none", [], "")
        calls[name] = lambda t=tensor, w=packed, a=tail: torch.ops.mkldnn._convolution_pointwise(t, w, None, *a)
    return calls


def check(result: torch.Tensor, x: torch.Tensor, weight: SparseWeight, spec: ConvSpec) -> None:
    """No speed without a right result: compare the first image with float64."""
    dense = torch.from_numpy(weight.to_dense()).double()
    pad = (spec.padding[0][0], spec.padding[1][0])
    args = (None, spec.stride, pad, spec.dilation, spec.groups)
    exact = F.conv2d(x[:1].double(), dense, *args)
    bound = F.conv2d(x[:1].double().abs(), dense.abs(), *args)
    error = (result[:1].double() - exact).abs() - 1e-5 * (bound + 1)
    if not bool((error <= 0).all()):
        raise AssertionError(f"wrong result for {spec.key}: {float(error.max())}")


def tuned_for(problems: list[Any], args: argparse.Namespace) -> tuple[Any, float]:
    """Tune all problems; returns the tuned model and the seconds it took."""
    start = time.perf_counter()
    tuned = autotune.tune_layers(problems, threads=args.threads, trials=args.trials, progress=args.progress)
    return tuned, time.perf_counter() - start


def layers(args: argparse.Namespace) -> None:
    """The nine layers, every sparsity, N = 1 and 8."""
    rng = np.random.default_rng(0)
    problems, cases = [], []
    for batch in args.batch:
        for r, c, h, k in LAYERS:
            spec = ConvSpec.create((batch, c, h, h), (k, c, r, r), padding=r // 2)
            weights = {s: random_weight(rng, spec.weight_shape, s, 1) for s in SPARSITIES}
            name = f"{r}x{r} {c}x{h}x{h} -> {k} N={batch}"
            cases.append((name, spec, weights))
            problems += [autotune.LayerProblem(f"{name} {s:.0%}", spec, w) for s, w in weights.items()]
    tuned, seconds = tuned_for(problems, args)
    print(f"tuned {len(problems)} problems in {seconds:.0f} s", flush=True)
    rows = [layer_row(name, spec, weights, tuned, args) for name, spec, weights in cases]
    means = {
        f"N={batch}": {
            f"{s:.0%}": round(geometric_mean([r["ours"][f"{s:.0%}"]["ratio"] for r in rows if r["n"] == batch]), 2)
            for s in SPARSITIES
        }
        for batch in args.batch
    }
    print("geometric means", means)
    content = {"tuning_seconds": round(seconds, 1), "problems": len(problems), "geometric_means": means, "rows": rows}
    save(args, "cpu_layers", content)


def layer_row(
    name: str, spec: ConvSpec, weights: dict[float, SparseWeight], tuned: Any, args: argparse.Namespace
) -> dict[str, Any]:
    x = torch.randn(spec.x_shape)
    calls: dict[Any, Callable[[], Any]] = dict(dense_calls(x, torch.randn(spec.weight_shape), spec))
    choices = {}
    for s, weight in weights.items():
        choices[s] = tuned.choice(spec, weight, f"{name} {s:.0%}")
        pad = spec.padding[0][0]
        calls[s] = lambda w=weight, c=choices[s], p=pad: numbasparse.conv2d(x, w, padding=p, config=c)
        check(calls[s](), x, weight, spec)
    times = {key: summary(t) for key, t in interleaved(calls, args.seconds).items()}
    stock = min(times["nchw"]["median_us"], times["nhwc"]["median_us"])
    packed = min(stock, times["packed_nchw"]["median_us"], times["packed_nhwc"]["median_us"])
    ours = {}
    for s in weights:
        mine = times[s]["median_us"]
        ours[f"{s:.0%}"] = {
            **times[s],
            "ratio": round(stock / mine, 3),
            "ratio_prepacked": round(packed / mine, 3),
            "kernel": choices[s].kernel,
            "config": choices[s].config,
        }
    print(name, f"dense {stock:.0f} us:", {s: v["ratio"] for s, v in ours.items()}, flush=True)
    dense = {key: times[key] for key in ("nchw", "nhwc", "packed_nchw", "packed_nhwc")}
    return {"layer": name, "n": spec.n, "spec": spec.to_dict(), "dense": dense, "ours": ours}


def linear(args: argparse.Namespace) -> None:
    """One vector times a matrix: `F.linear`, each sparse kernel's best known config, all in turns."""
    rows = []
    for c, k in LINEAR:
        spec = ConvSpec.create((1, c, 1, 1), (k, c, 1, 1))
        x = torch.randn(spec.x_shape)
        for sparsity in (0.80, 0.90, 0.95):
            weight = random_weight(np.random.default_rng(0), spec.weight_shape, sparsity, 1)
            dense, vector = torch.from_numpy(weight.to_dense()).view(k, c), x.view(1, c)
            image = dense.view(spec.weight_shape)
            calls: dict[Any, Callable[[], Any]] = {
                "linear": lambda d=dense, v=vector: F.linear(v, d),
                "1x1 convolution": lambda d=image, i=x: F.conv2d(i, d),
            }
            tuned, _ = tuned_for([autotune.LayerProblem("layer", spec, weight)], args)
            choice = tuned.choice(spec, weight, "layer")
            for name, config in (("tuned", choice), ("cpu_vector", "cpu_vector"), ("cpu_direct", "cpu_direct")):
                calls[name] = lambda w=weight, g=config, i=x: numbasparse.conv2d(i, w, config=g)
                check(calls[name](), x, weight, spec)
            times = {key: summary(t) for key, t in interleaved(calls, args.seconds).items()}
            ratio = round(times["linear"]["median_us"] / times["tuned"]["median_us"], 3)
            rows.append({"layer": f"{c} -> {k}", "sparsity": sparsity, "chosen": choice.kernel, "ratio": ratio,
                         "config": choice.config, "times": times})  # fmt: skip
            print(f"{c} -> {k} {sparsity:.0%}", {key: round(t["median_us"]) for key, t in times.items()}, ratio)
    save(args, "cpu_linear", {"rows": rows})


def calls(args: argparse.Namespace) -> None:
    """The cost of a call: plan alone, conv2d from NumPy and torch, a module; back to back and every 50 ms."""
    rng = np.random.default_rng(0)
    spec = ConvSpec.create((1, 64, 56, 56), (64, 64, 3, 3), padding=1)
    weight = random_weight(rng, spec.weight_shape, 0.9, 1)
    array = rng.standard_normal(spec.x_shape).astype(np.float32)
    tensor = torch.from_numpy(array)
    dense = torch.from_numpy(weight.to_dense())
    plan = numbasparse.plan(spec, weight, threads=args.threads)
    # How much a pause costs that has nothing to do with waking other threads.
    single = numbasparse.plan(spec, weight, threads=1)
    # A layer whose kernel takes next to no time: its module's call passes torch's dispatcher in inference mode.
    conv = torch.nn.Conv2d(16, 16, 3, padding=1)
    torch.nn.init.sparse_(conv.weight.data.view(16, -1), 0.9)
    layer, small = SparseConv2d.from_conv(conv).eval(), torch.randn(1, 16, 4, 4)
    alone = numbasparse.plan(
        ConvSpec.create(small.shape, conv.weight.shape, padding=1), layer.weight_matrix(), threads=args.threads
    )
    several = torch.nn.Sequential(*(copy.deepcopy(layer) for _ in range(20)))
    captured = capture(several, small)
    given = (small, layer.values, layer.indices, layer.indptr, layer.bias, layer.kernel_shape, layer.stride)
    given += (layer.padding, layer.dilation, layer.groups, "none", "")
    functions: dict[Any, Callable[[], Any]] = {
        "16x4x4 plan, torch": lambda: alone(small),
        "16x4x4 operator": lambda: conv2d(*given),
        "16x4x4 module": lambda: layer(small),
        "20 times 16x4x4, modules": lambda: several(small),
        "20 times 16x4x4, captured": lambda: captured(small),
        "plan, one thread": lambda: single(array),
        "plan, NumPy": lambda: plan(array),
        "conv2d, NumPy": lambda: numbasparse.conv2d(array, weight, padding=1),
        "plan, torch": lambda: plan(tensor),
        "conv2d, torch": lambda: numbasparse.conv2d(tensor, weight, padding=1),
        "dense torch": lambda: F.conv2d(tensor, dense, padding=1),
    }
    with torch.inference_mode():
        steady = {k: summary(t) for k, t in interleaved(functions, args.seconds, block=20).items()}
    paused = {}
    for key, function in functions.items():
        times = []
        for _ in range(60):
            time.sleep(0.05)
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        paused[key] = summary(times) | {"max_us": round(max(times) * 1e6, 1)}
    for key in functions:
        print(key, "steady", steady[key]["median_us"], "every 50 ms", paused[key]["median_us"], paused[key]["max_us"])
    save(args, "cpu_calls", {"spec": spec.to_dict(), "sparsity": 0.9, "steady": steady, "every_50_ms": paused})


def awkward(args: argparse.Namespace) -> None:
    """Sizes that divide nothing, at 90 % and 80 % (depthwise: 60 %): right, and not slower than dense."""
    rng = np.random.default_rng(0)
    rows = []
    for name, (x_shape, w_shape, stride, padding, groups) in AWKWARD.items():
        spec = ConvSpec.create(x_shape, w_shape, stride, padding, 2 if " d2 " in name else 1, groups)
        for sparsity in (0.6,) if groups > 1 else (0.8, 0.9):
            weight = random_weight(rng, w_shape, sparsity, groups)
            problem = autotune.LayerProblem(name, spec, weight)
            tuned, _ = tuned_for([problem], args)
            row = layer_row_at(name, spec, weight, tuned, args)
            rows.append(row | {"sparsity": sparsity})
    save(args, "cpu_awkward", {"rows": rows})


def layer_row_at(
    name: str, spec: ConvSpec, weight: SparseWeight, tuned: Any, args: argparse.Namespace
) -> dict[str, Any]:
    x = torch.randn(spec.x_shape)
    choice = tuned.choice(spec, weight, name)
    functions: dict[Any, Callable[[], Any]] = dict(dense_calls(x, torch.from_numpy(weight.to_dense()), spec))
    conv = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "groups": spec.groups}
    functions["ours"] = lambda: numbasparse.conv2d(x, weight, **conv, config=choice)
    check(functions["ours"](), x, weight, spec)
    times = {key: summary(t) for key, t in interleaved(functions, args.seconds).items()}
    stock = min(times["nchw"]["median_us"], times["nhwc"]["median_us"])
    ratio = round(stock / times["ours"]["median_us"], 3)
    print(f"{name} {weight.sparsity:.0%}: dense {stock:.0f} us, ours {times['ours']['median_us']:.0f} us, {ratio}")
    return {"layer": name, "ratio": ratio, "kernel": choice.kernel, "config": choice.config, "times": times}


def exhaustive(args: argparse.Namespace) -> None:
    """The tuner's choice against the best of every config of every kernel, three times for three layers."""
    rows = []
    for layer, sparsity in ((LAYERS[0], 0.9), (LAYERS[2], 0.95), (LAYERS[7], 0.8)):
        runs = [exhaustive_run(layer, sparsity, seed, args) for seed in range(3)]
        r, c, h, k = layer
        row = {"layer": f"{r}x{r} {c}x{h}x{h} -> {k}", "sparsity": sparsity, "runs": runs}
        row["median_chosen_over_best"] = statistics.median(run["chosen_over_best"] for run in runs)
        print(row["layer"], sparsity, "chosen / best =", [run["chosen_over_best"] for run in runs], flush=True)
        rows.append(row)
    save(args, "cpu_exhaustive", {"rows": rows})


def exhaustive_run(
    layer: tuple[int, int, int, int], sparsity: float, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    r, c, h, k = layer
    spec = ConvSpec.create((1, c, h, h), (k, c, r, r), padding=r // 2)
    weight = random_weight(np.random.default_rng(seed), spec.weight_shape, sparsity, 1)
    tuned, seconds = tuned_for([autotune.LayerProblem("layer", spec, weight)], args)
    chosen = tuned.choice(spec, weight, "layer")
    x = torch.randn(spec.x_shape)
    plans = every_plan(spec, weight, args.threads)
    calls: dict[Any, Callable[[], Any]] = {i: (lambda p=p: p(x)) for i, p in enumerate(plans)}
    # Everything coarsely, then the twelve best and the choice again, in turns and for long.
    coarse = interleaved(calls, 0.0, block=3, rounds=2)
    best = sorted(coarse, key=lambda i: min(coarse[i]))[:12]
    mine = numbasparse.plan(spec, weight, config=chosen, threads=args.threads)
    final = {i: calls[i] for i in best} | {"chosen": lambda: mine(x)}
    times = {key: summary(t) for key, t in interleaved(final, args.seconds).items()}
    winner = min(best, key=lambda i: times[i]["median_us"])
    return {
        "configs": len(plans),
        "trials": tuned.layers[0].trials,
        "tuning_seconds": round(seconds, 1),
        "chosen": {"kernel": chosen.kernel, "config": chosen.config, **times["chosen"]},
        "best": {"kernel": plans[winner].choice.kernel, "config": plans[winner].choice.config, **times[winner]},
        "chosen_over_best": round(times["chosen"]["median_us"] / times[winner]["median_us"], 3),
    }


def every_plan(spec: ConvSpec, weight: SparseWeight, threads: int) -> list[numbasparse.Plan]:
    """A plan for every config that the sparse kernels can run."""
    plans = []
    for kernel in kernels_for("cpu"):
        if kernel.is_dense or kernel.supports(spec, weight) is not None:
            continue
        for config in kernel.configs(spec, weight, threads):
            try:
                plans.append(
                    numbasparse.plan(spec, weight, config=numbasparse.Choice(kernel.name, config), threads=threads)
                )
            except ConfigError:  # too many pieces for the packed form's limit
                continue
    return plans


def save(args: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    path = write(f"{name}{args.suffix}.json", {"environment": environment(), "threads": args.threads, **content})
    print("wrote", Path(path).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "linear", "calls", "awkward", "exhaustive"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=160, help="configs tried for each layer")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each table row")
    parser.add_argument("--suffix", default="", help="added to the results file's name")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbasparse.set_num_threads(args.threads)
    with torch.inference_mode():
        steps = {f.__name__: f for f in (layers, linear, calls, awkward, exhaustive)}
        steps[args.what](args)


if __name__ == "__main__":
    main()
