"""GPU benchmark: single convolutions against cuDNN, cuSPARSE and a plain CSR kernel, timed in turns in one process.

    python benchmarks/gpu.py layers    # the ten layers at 80 / 90 / 95 / 98 %, N = 1, 8, 32, 128, float32 and float16
    python benchmarks/gpu.py sweep     # time against sparsity, 50 to 99.5 %, for two layers, with the bounds
    python benchmarks/gpu.py overhead  # host microseconds of an eager call
    python benchmarks/gpu.py plot      # the picture of the sweep, from its results file; needs no GPU
    python benchmarks/gpu.py layers --dry   # compile what `layers` compiles first, without a GPU

Times are medians of CUDA-graph replays with a warm L2 cache, all columns of a row in turns; every result is compared
with float64 before it is timed, and a column that is wrong has no time but a reason. Ours are given twice: ``native``,
the kernel with input and output in the layouts that it likes, and ``alone``, from and to NCHW or NHWC, conversions
counted. The ratio of both is to the better of cuDNN's NCHW and NHWC of the same precision (strict float32 is without
TF32), each with input, weight and output already in its layout.

Configs: the tuner searches at 90 % zeros; the best few that it finds, and what the kernel suggests for the sparsity in
question, are measured at each sparsity. The most important layers come first, the results file is written after every
row, and ``--seconds`` ends the run before a row that would not fit.

(Not named cuda.py: a script's folder comes first in the search path, and would hide the package ``cuda``.)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import RESULTS, environment, geometric_mean, write
from gpu_baselines import columns, cusparse_cupy, cusparse_torch

import autotune
import numbasparse
from autotune.compiling import Compilers
from autotune.gpu import Gpu, GpuBench, Loop, interleaved, repeats_for
from autotune.measure import Result, measure
from autotune.space import Candidate, LayerProblem, ProblemSpace
from numbasparse import ConvSpec, SparseWeight
from numbasparse.kernels import KERNELS, kernels_for
from numbasparse.runtime import cuda

# (kernel, input channels, height and width, output channels)
SQUARE = [
    (3, 64, 56, 64),
    (3, 128, 28, 128),
    (3, 256, 14, 256),
    (3, 512, 7, 512),
    (3, 256, 56, 256),
    (3, 512, 28, 512),
    (3, 512, 14, 512),
]
POINTWISE = [(1, 256, 56, 64), (1, 512, 28, 128), (1, 1024, 14, 256)]
SPARSITIES = (0.80, 0.90, 0.95, 0.98)
TUNED_AT = 0.90
SWEEP_LAYERS = [(3, 256, 14, 256), (3, 256, 56, 256)]
SWEEP = (0.50, 0.60, 0.70, 0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
PLAIN = "cuda_simple"
"""The one-thread-per-pixel CSR kernel: a column of its own, not one of ours."""
BEST_FEW = 4

Layer = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: a layer with a batch size and a dtype."""

    layer: Layer
    n: int
    dtype: str

    @property
    def name(self) -> str:
        r, c, h, k = self.layer
        return f"{r}x{r} {c}x{h}x{h} -> {k} N={self.n} {self.dtype}"

    @property
    def spec(self) -> ConvSpec:
        r, c, h, k = self.layer
        return ConvSpec.create((self.n, c, h, h), (k, c, r, r), padding=r // 2, dtype=self.dtype)

    def problem(self, sparsity: float) -> LayerProblem:
        """The layer with a random mask, the same in every run."""
        rng = np.random.default_rng([*self.layer, round(sparsity * 1000)])
        dense = rng.standard_normal(self.spec.weight_shape) * (rng.random(self.spec.weight_shape) >= sparsity)
        return LayerProblem(self.name, self.spec, SparseWeight.from_dense(dense.astype(np.float32)))


def cases(args: argparse.Namespace) -> list[Case]:
    """All rows, the most important first."""
    plan = [(SQUARE, 32, "float32"), (SQUARE, 1, "float32"), (SQUARE, 32, "float16"), (POINTWISE, 32, "float32")]
    plan += [(SQUARE, 8, "float32"), (SQUARE, 128, "float32"), (POINTWISE, 1, "float32"), (POINTWISE, 32, "float16")]
    plan += [(POINTWISE, n, "float32") for n in (8, 128)] + [(SQUARE + POINTWISE, n, "float16") for n in (1, 8, 128)]
    every = [Case(layer, n, dtype) for layers, n, dtype in plan for layer in layers]
    wanted = [case for case in every if case.n in args.batch and case.dtype in args.dtype]
    return wanted[args.skip :][: args.first]


# ---- choosing configs ---------------------------------------------------------------------------------------


def is_ours(candidate: Candidate) -> bool:
    return candidate.kernel != PLAIN and not KERNELS[candidate.kernel].is_dense


def suggested(problem: LayerProblem, count: int) -> list[Candidate]:
    """What our kernels suggest for a problem."""
    spec, weight = problem.spec, problem.weight
    kernels = [k for k in kernels_for("cuda") if is_ours(Candidate(k.name, {})) and k.supports(spec, weight) is None]
    found = [Candidate(k.name, config) for k in kernels for config in k.suggest(spec, weight, 1, count)]
    return [c for c in found if KERNELS[c.kernel].check(spec, weight, c.config) is None]


def tuned_configs(case: Case, args: argparse.Namespace) -> list[Candidate]:
    """The best few configs at `TUNED_AT`, by both of our times; from the tuned file if one is given."""
    problem = case.problem(TUNED_AT)
    if args.tuned is not None:
        chosen = args.tuned.choice(problem.spec, problem.weight, case.name)
        candidate = None if chosen is None else Candidate(chosen.kernel, chosen.config)
        return [candidate] if candidate is not None and is_ours(candidate) else []
    timeout = args.tune_seconds
    tuned = autotune.tune_layers([problem], device="cuda", trials=args.trials, timeout=timeout, progress=False)
    top = [(Candidate(m.kernel, m.config), m) for m in tuned.layers[0].top]
    ours = [(c, m) for c, m in top if is_ours(c) and m.gpu is not None]
    alone = [c for c, m in sorted(ours, key=lambda pair: pair[1].median_us)]
    native = [c for c, m in sorted(ours, key=lambda pair: pair[1].gpu.native_us)]
    return unique([*alone[:BEST_FEW], *native[:BEST_FEW]])


def unique(candidates: list[Candidate]) -> list[Candidate]:
    return list({c.key: c for c in candidates}.values())


def raced(bench: GpuBench, candidates: list[Candidate]) -> list[Result]:
    """Candidates of ours that are right at this sparsity, verified and timed shortly."""
    problem, best, results = bench.problem, float("inf"), []
    for candidate in candidates:
        if KERNELS[candidate.kernel].check(problem.spec, problem.weight, candidate.config) is not None:
            continue
        result = measure(bench, candidate, best)
        if result.us is None:
            print("  rejected:", candidate.key, result.reason, flush=True)
            continue
        best = min(best, result.us)
        results.append(result)
    return results


# ---- columns ------------------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass
class Row:
    """What is timed of a row, and what is wrong with the rest."""

    gpu: Gpu
    calls: Calls = dataclasses.field(default_factory=dict)
    cold: list[str] = dataclasses.field(default_factory=list)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    matrix: torch.Tensor | None = None

    def columns(self, bench: GpuBench) -> torch.Tensor:
        """The matrix of input columns: large, and the same for all sparsities, whose benches have equal inputs."""
        if self.matrix is None:
            self.matrix = columns(bench.input("NCHW"), bench.problem.spec)
        return self.matrix

    def add(self, name: str, call: Callable[[], Any], reason: str | None) -> None:
        if reason is None:
            self.calls[name] = call
        else:
            self.wrong[name] = reason

    def times(self) -> dict[str, dict[str, float]]:
        """Median, quartile range and best of every call in microseconds, all timed in turns."""
        loops = {name: self._loop(call) for name, call in self.calls.items()}
        flush = Loop.of(self.gpu, self.gpu.flush, 8)
        cold = {f"{name}, cold": self._loop(self._flushed(self.calls[name])) for name in self.cold}
        times = interleaved([flush, *loops.values(), *cold.values()])
        flush_us = median(times[id(flush)])
        warm_times = {name: figures(times[id(loop)]) for name, loop in loops.items()}
        cold_times = {name: figures([t - flush_us for t in times[id(loop)]]) for name, loop in cold.items()}
        return warm_times | cold_times

    def _loop(self, call: Callable[[], Any]) -> Loop:
        call()
        return Loop.of(self.gpu, call, repeats_for(self.gpu.us(call)))

    def _flushed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (self.gpu.flush(), call())


def figures(times: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"us": round(float(middle), 3), "spread_us": round(float(high - low), 3), "best_us": round(min(times), 3)}


def add_dense(row: Row, case: Case, prefix: str, tf32: bool = False) -> None:
    """cuDNN in both layouts, on a weight of which nothing is left out."""
    bench = GpuBench(case.problem(0.0), row.gpu)
    kernel = next(k for k in kernels_for("cuda") if k.is_dense)
    with allowed_tf32(tf32):
        space = ProblemSpace(bench.problem, 1, "cuda")
        for candidate in space.dense:
            if tf32 != (candidate.config.get("precision") == "tf32"):
                continue
            ready = kernel.prepare(bench.problem.spec, bench.problem.weight, dict(candidate.config))
            name = f"{prefix} {ready.takes}"
            row.add(name, bench.call(ready, ready.takes, ready.gives), bench.wrong(candidate, ready))


@contextlib.contextmanager
def allowed_tf32(allowed: bool) -> Iterator[None]:
    """Let float32 be computed as TF32 within, as a user would; the process is strict otherwise."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def add_sparsity(row: Row, bench: GpuBench, label: str, candidates: list[Candidate]) -> dict[str, Any]:
    """Ours by both times, and the baselines; returns the configs."""
    results = raced(bench, candidates)
    chosen: dict[str, Any] = {}
    for name, key in (("native", lambda r: r.native_us), ("alone", lambda r: r.us)):
        if not results:
            row.wrong[f"ours {name} {label}"] = "no config of ours was right"
            continue
        candidate = min(results, key=key).candidate
        ready = bench.prepare(candidate)
        layouts = (ready.takes, ready.gives) if name == "native" else (bench.better_layout(ready)[0],) * 2
        row.add(f"ours {name} {label}", bench.call(ready, *layouts), bench.wrong(candidate, ready))
        facts = [(f.registers, f.local_bytes) for f in ready.functions]
        chosen[name] = {"kernel": candidate.kernel, "config": candidate.config, "layouts": layouts, "registers": facts}
    return chosen


def add_baselines(row: Row, bench: GpuBench, label: str) -> None:
    """The plain kernel, and cuSPARSE on the matrix of input columns (float32)."""
    problem = bench.problem
    plain = KERNELS[PLAIN]
    if plain.supports(problem.spec, problem.weight) is None:
        candidate = Candidate(PLAIN, plain.default(problem.spec, problem.weight, 1))
        ready = bench.prepare(candidate)
        row.add(f"plain {label}", bench.call(ready, ready.takes, ready.gives), bench.wrong(candidate, ready))
    if problem.spec.dtype != "float32":
        return
    call, back = cusparse_torch(problem.weight, row.columns(bench), problem.spec)
    row.add(f"cusparse {label}", call, bench.judge(back(call()), dense=False))


def cupy_us(row: Row, bench: GpuBench) -> float | str:
    """cuSPARSE through CuPy, timed by events around five eager calls, since its memory is no graph's; or why not."""
    try:
        problem = bench.problem
        call, back = cusparse_cupy(problem.weight, row.columns(bench), problem.spec)
        reason = bench.judge(back(call()), dense=False)
        if reason is not None:
            return reason
        return round(min(row.gpu.us(lambda: [call() for _ in range(5)]) / 5 for _ in range(5)), 3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- layers -------------------------------------------------------------------------------------------------


def layers(args: argparse.Namespace) -> None:
    """Every case that fits into the time."""
    if args.dry:
        dry(args)
        return
    start, longest = time.perf_counter(), 0.0
    rows: list[dict[str, Any]] = []
    with session(args) as (gpu, compilers):
        wanted = cases(args)
        for case in wanted:
            compilers.submit(case.problem(TUNED_AT), suggested(case.problem(TUNED_AT), args.suggested))
        for case in wanted:
            began = time.perf_counter()
            if args.seconds is not None and began - start + longest > args.seconds:
                print(f"{len(rows)} of {len(wanted)} rows in {began - start:.0f} s: the next may not fit", flush=True)
                break
            rows.append(layer_row(case, gpu, args))
            longest = max(longest, time.perf_counter() - began)
            save(args, "cuda_layers", {"seconds": round(time.perf_counter() - start), **summaries(rows), "rows": rows})
            torch.cuda.empty_cache()


def layer_row(case: Case, gpu: Gpu, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    tuned = tuned_configs(case, args)
    tuning = time.perf_counter() - began
    row = Row(gpu)
    add_dense(row, case, "cudnn")
    if case.dtype == "float32":
        add_dense(row, case, "tf32", tf32=True)
        add_dense(row, dataclasses.replace(case, dtype="float16"), "float16")
    configs, cupy = {}, {}
    for sparsity in SPARSITIES:
        label = f"{sparsity:.0%}"
        bench = GpuBench(case.problem(sparsity), gpu)
        candidates = unique([*tuned, *suggested(bench.problem, 2)])
        configs[label] = add_sparsity(row, bench, label, candidates)
        add_baselines(row, bench, label)
        if args.cupy and case.dtype == "float32":
            cupy[label] = cupy_us(row, bench)
    row.cold = [name for name in row.calls if name.startswith("cudnn") or name.startswith("ours native")]
    times = row.times()
    result = {
        "layer": case.name,
        "n": case.n,
        "dtype": case.dtype,
        "spec": case.spec.to_dict(),
        "tuning_seconds": round(tuning, 1),
        "times": times,
        "ratios": ratios(times),
        "configs": configs,
        "cusparse_cupy_us": cupy,
        "wrong": row.wrong,
    }
    print(f"{case.name}: cuDNN {best_dense(times):.1f} us, ratios {result['ratios']}", flush=True)
    for name, reason in row.wrong.items():
        print(f"  not timed: {name}: {reason}", flush=True)
    return result


def best_dense(times: dict[str, dict[str, float]]) -> float:
    found = [t["us"] for name, t in times.items() if name.startswith("cudnn") and not name.endswith("cold")]
    return min(found, default=float("nan"))


def ratios(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """The best cuDNN of the same precision over each other column; nothing is compared with a wrong cuDNN."""
    dense = best_dense(times)
    others = {name: t for name, t in times.items() if not name.startswith("cudnn") and not name.endswith("cold")}
    return {} if dense != dense else {name: round(dense / t["us"], 3) for name, t in others.items()}


def summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of our ratios over the 3x3 layers and over the 1x1 layers, of what is there so far."""
    means: dict[str, Any] = {}
    for r in (3, 1):
        for n, dtype in dict.fromkeys((row["n"], row["dtype"]) for row in rows):
            chosen = [row for row in rows if (row["spec"]["r"], row["n"], row["dtype"]) == (r, n, dtype)]
            if chosen:
                means[f"{r}x{r} N={n} {dtype}"] = {"rows": len(chosen)} | {
                    f"{kind} {s:.0%}": mean_of(chosen, f"ours {kind} {s:.0%}")
                    for kind in ("native", "alone")
                    for s in SPARSITIES
                }
    return {"geometric_means": means}


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """None where a layer has no such ratio: a mean without it would flatter."""
    found = [row["ratios"].get(name) for row in rows]
    return None if None in found else round(geometric_mean(found), 3)


def dry(args: argparse.Namespace) -> None:
    """Compile what `layers` compiles before it measures; says how many configs and how long."""
    with (
        cuda.assumed(tuple(map(int, args.capability.split(".")))) as device,
        Compilers(device, args.workers) as compilers,
    ):
        wanted, began = cases(args), time.perf_counter()
        jobs = []
        for case in wanted:
            for sparsity in SPARSITIES:
                problem = case.problem(sparsity)
                count = args.suggested if sparsity == TUNED_AT else 2
                jobs += [(problem, c) for c in suggested(problem, count)]
        for problem, candidate in jobs:
            compilers.submit(problem, [candidate])
        failed = [reason for problem, c in jobs if (reason := compilers.wait(problem, c)) is not None]
    seconds = time.perf_counter() - began
    print(f"{len(jobs)} configs of {len(wanted)} rows for {device.name}: {seconds:.0f} s")
    for reason in failed:
        print("failed:", reason)


# ---- sweep --------------------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace) -> None:
    """Time against sparsity, for two layers at N=32 in strict float32."""
    content: dict[str, Any] = {"rows": []}
    with session(args) as (gpu, _):
        for layer in SWEEP_LAYERS:
            case = Case(layer, 32, "float32")
            tuned = tuned_configs(case, args)
            row = Row(gpu)
            add_dense(row, case, "cudnn")
            points = []
            for sparsity in SWEEP:
                bench = GpuBench(case.problem(sparsity), gpu)
                label = f"{sparsity:.1%}"
                configs = add_sparsity(row, bench, label, unique([*tuned, *suggested(bench.problem, 4)]))
                nnz = bench.problem.weight.nnz
                points.append({"sparsity": sparsity, "label": label, "nnz": nnz, "configs": configs})
            times = row.times()
            for point in points:
                point["native"] = times.get(f"ours native {point['label']}")
                point["alone"] = times.get(f"ours alone {point['label']}")
                point["bounds"] = bounds_us(case.spec, point["nnz"], cuda.current())
            dense = {name: t for name, t in times.items() if name.startswith("cudnn")}
            content["rows"].append(
                {"layer": case.name, "spec": case.spec.to_dict(), "dense": dense, "points": points, "wrong": row.wrong}
            )
            save(args, "cuda_sweep", content)


def bounds_us(spec: ConvSpec, nnz: int, device: cuda.Device) -> dict[str, float]:
    """Least microseconds at the highest clock: 128 multiply-adds, and 128 bytes of shared memory, per clock and SM.

    Shared memory: one load of 4 bytes for each multiply-add, which is what a kernel pays that keeps no input value in
    registers for several output channels.
    """
    work = nnz * spec.n * spec.out_h * spec.out_w
    per_us = device.multiprocessors * device.clock_mhz
    return {"fma": round(work / (128 * per_us), 3), "shared": round(work * 4 / (128 * per_us), 3)}


def plot(args: argparse.Namespace) -> None:
    """Draw the sweep's results file."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    content = json.loads((RESULTS / f"cuda_sweep{args.suffix}.json").read_text())
    rows = content["rows"]
    figure, every = plt.subplots(1, len(rows), figsize=(6.2 * len(rows), 4.6), layout="constrained", squeeze=False)
    for axes, row in zip(every[0], rows, strict=True):
        draw(axes, row)
    figure.suptitle(f"{content['gpu']['name']}, strict float32, warm L2, medians of graph replays", fontsize=10)
    path = RESULTS / f"cuda_sweep{args.suffix}.png"
    figure.savefig(path, dpi=130)
    print("wrote", path.name)


def draw(axes: Any, row: dict[str, Any]) -> None:
    """One layer: ours, cuDNN, the bounds, and where ours crosses cuDNN."""
    points = row["points"]
    zeros = [100 * p["sparsity"] for p in points]
    dense = min(t["us"] for t in row["dense"].values())
    for kind, colour in (("native", "#1f77b4"), ("alone", "#ff7f0e")):
        line = [(z, p[kind]["us"]) for z, p in zip(zeros, points, strict=True) if p[kind] is not None]
        axes.plot(*zip(*line, strict=True), "o-", color=colour, markersize=3, label=f"ours, {kind}")
        for crossing in crossings(line, dense):
            axes.plot(crossing, dense, "X", color=colour, markersize=9)
            axes.annotate(f"{crossing:.0f} %", (crossing, dense), (4, 5), textcoords="offset points", color=colour)
    axes.axhline(dense, color="#555555", label="cuDNN, best layout")
    axes.plot(zeros, [p["bounds"]["shared"] for p in points], ":", color="#888888", label="bound: shared memory")
    axes.plot(zeros, [p["bounds"]["fma"] for p in points], "--", color="#bbbbbb", label="bound: multiply-adds")
    axes.set_yscale("log")
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("microseconds")
    axes.set_title(row["layer"], fontsize=9)
    axes.legend(fontsize=8, frameon=False)


def crossings(line: list[tuple[float, float]], dense: float) -> list[float]:
    """Where a line of (zeros, us) crosses the time of dense, interpolated between its points."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if (y0 - dense) * (y1 - dense) < 0:
            found.append(x0 + (x1 - x0) * (np.log(dense) - np.log(y0)) / (np.log(y1) - np.log(y0)))
    return found


# ---- overhead -----------------------------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> None:
    """What the host needs for an eager call, on a convolution that takes the GPU less."""
    from torch.nn import functional as F

    case = Case((3, 16, 8, 16), 1, "float32")
    problem = case.problem(TUNED_AT)
    with session(args):
        x = torch.randn(problem.spec.x_shape, device="cuda")
        dense = torch.from_numpy(problem.weight.to_dense()).cuda()
        out: dict[str, float] = {}
        calls: Calls = {"F.conv2d": lambda: F.conv2d(x, dense, padding=1)}
        for kernel in kernels_for("cuda"):
            if kernel.supports(problem.spec, problem.weight) is None:
                config = numbasparse.Choice(kernel.name, kernel.default(problem.spec, problem.weight, 1))
                made = numbasparse.plan(problem.spec, problem.weight, device="cuda", config=config)
                calls[f"plan, {kernel.name}"] = lambda p=made: p(x, out_layout="native")
                if kernel.name == "cuda_direct":
                    calls[f"launch alone, {kernel.name}"] = launch_of(calls[f"plan, {kernel.name}"])
        calls["conv2d"] = lambda: numbasparse.conv2d(x, problem.weight, padding=1)
        for name, call in calls.items():
            out[name] = host_us(call)
            print(f"{name}: {out[name]:.2f} us", flush=True)
    save(args, "cuda_overhead", {"spec": problem.spec.to_dict(), "host_us_per_call": out})


def launch_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """The launch that a call does, by itself: same kernel, grid and addresses, whose tensors stay alive."""
    found: list[tuple[Any, ...]] = []
    launch = cuda.Function.launch

    def seen(*args: Any, **more: Any) -> None:
        found.append((args, more))
        launch(*args, **more)

    with mock.patch.object(cuda.Function, "launch", seen):
        result = call()
    ((args, more),) = found
    # ``result`` is kept: the launch writes there.
    return lambda kept=result: launch(*args, **more)


def host_us(call: Callable[[], Any], calls: int = 500, rounds: int = 9) -> float:
    """Median over rounds of the host's time for a call, the GPU idle before each round and waited for after it.

    With 500 short kernels in a row the queue of launches does not fill.
    """
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return round(median(times), 3)


# ---- all ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(args: argparse.Namespace) -> Iterator[tuple[Gpu, Compilers]]:
    """A GPU with strict float32, and compilers that work ahead of the measurements."""
    reason = cuda.reason_unavailable()
    if reason is not None:
        raise SystemExit(f"no GPU to measure on: {reason} (--dry compiles without one)")
    args.tuned = None if args.tuned is None else autotune.load(args.tuned)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    warnings.filterwarnings("ignore", "the machine was busy")
    with allowed_tf32(False), torch.inference_mode(), Compilers(cuda.current(), args.workers) as compilers:
        yield Gpu(), compilers


def save(args: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    facts = dataclasses.asdict(cuda.current())
    versions = {"cuda of torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    described = {"environment": environment(), "gpu": facts, "gpu_versions": versions}
    path = write(f"{name}{args.suffix}.json", described | content)
    print("wrote", path.name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "sweep", "overhead", "plot"))
    parser.add_argument("--seconds", type=float, help="end before a row that would not fit into this time")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"], choices=("float32", "float16"))
    parser.add_argument("--first", type=int, help="only so many rows")
    parser.add_argument("--skip", type=int, default=0, help="not the first so many of them")
    parser.add_argument("--trials", type=int, default=40, help="configs tried for each row")
    parser.add_argument("--tune-seconds", type=float, default=8.0, help="time for the search of each row")
    parser.add_argument("--suggested", type=int, default=24, help="configs compiled ahead for each row")
    parser.add_argument("--tuned", help="tuned file to take configs from, instead of searching")
    parser.add_argument("--cupy", action=argparse.BooleanOptionalAction, default=True, help="cuSPARSE through CuPy too")
    parser.add_argument("--workers", type=int, help="compiling processes; all cores but one if not given")
    parser.add_argument("--dry", action="store_true", help="layers: only compile, without a GPU")
    parser.add_argument("--capability", default="9.0", help="--dry: compute capability to compile for")
    parser.add_argument("--suffix", default="", help="added to the results file's name")
    args = parser.parse_args()
    {"layers": layers, "sweep": sweep, "overhead": overhead, "plot": plot}[args.what](args)


if __name__ == "__main__":
    main()
