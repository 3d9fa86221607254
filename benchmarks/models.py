"""Whole models on the CPU, one picture at a time: sparse and converted against the dense ones of others.

    python benchmarks/models.py                      # ResNet-18, ResNet-50, VGG-16 and RRDBNet at 80 / 90 / 95 %
    python benchmarks/models.py --models resnet50 --trials 40
    python benchmarks/models.py --tiny               # every path on small models: no figures worth reading

Weights are random.  Masks keep the largest of each convolution but the first, and of each linear layer but the last.
Ours is tuned, converted and captured (`numbasparse.nn.convert`, `numbasparse.nn.capture`).  Dense: torch eager in NCHW
and channels-last, ``torch.compile``, the same with frozen weights, and onnxruntime and OpenVINO where they are
installed; the ratio is to the best of torch's.  With ``--deepsparse PYTHON``, an interpreter that has DeepSparse, the
same pruned model runs there too, in a process of its own that waits while others are timed.  All are timed in turns.
The results file is written anew after every model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import environment, fair_malloc, interleaved, summary, write

fair_malloc()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import autotune  # noqa: E402
import numbasparse  # noqa: E402
from numbasparse.nn import SparseConv2d, capture, conversion_report, convert  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import models as zoo  # noqa: E402
import realesrgan  # noqa: E402

SPARSITIES = (0.80, 0.90, 0.95)
TORCH = ("eager", "eager_channels_last", "compile", "compile_frozen")
OTHERS = ("onnxruntime", "openvino")

# Model and the shape of its input.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (make, (1, 3, zoo.IMAGE, zoo.IMAGE)) for name, make in zoo.MODELS.items()},
    "rrdbnet": (realesrgan.RRDBNet, (1, 3, 256, 256)),
}
TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: zoo.ResNet(zoo.BasicBlock, (1, 1, 1, 1), 10), (1, 3, 64, 64)),
    "resnet50": (lambda: zoo.ResNet(zoo.Bottleneck, (1, 1, 1, 1), 10), (1, 3, 64, 64)),
}


def tuned_and_converted(model: nn.Module, x: Tensor, args: argparse.Namespace) -> tuple[nn.Module, Any, float]:
    """The converted model, its tuned choices, and the seconds that tuning took."""
    start = time.perf_counter()
    tuned = autotune.tune(model, x, threads=args.threads, trials=args.trials, progress=args.progress)
    return convert(model, tuned, x), tuned, time.perf_counter() - start


def check(name: str, result: Tensor, expected: Tensor) -> None:
    """No speed without a right result."""
    scale = float(expected.abs().max())
    error = float((result - expected).abs().max())
    if not error <= 1e-3 * scale:
        raise AssertionError(f"{name} differs from the dense model by {error:.3g}, where values reach {scale:.3g}")


# ---- the dense ones -----------------------------------------------------------------------------------------


def dense_calls(dense: nn.Module, x: Tensor, wanted: tuple[str, ...], threads: int) -> dict[str, Callable[[], Any]]:
    """What can be called of ``wanted``; what is not installed is left out and said."""
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "eager": lambda: lambda: dense(x),
        "eager_channels_last": lambda: channels_last(dense, x),
        "compile": lambda: compiled(dense, x, frozen=False),
        "compile_frozen": lambda: compiled(dense, x, frozen=True),
        "onnxruntime": lambda: onnxruntime_call(dense, x, threads),
        "openvino": lambda: openvino_call(dense, x, threads),
    }
    calls = {}
    for name in wanted:
        try:
            calls[name] = makers[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    return calls


def channels_last(dense: nn.Module, x: Tensor) -> Callable[[], Any]:
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    picture = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(picture)


def compiled(dense: nn.Module, x: Tensor, *, frozen: bool) -> Callable[[], Any]:
    """`torch.compile`; with frozen weights it folds batch norms and keeps the weights in oneDNN's order."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=frozen):
        function = torch.compile(copy.deepcopy(dense))
        function(x)
    # The code is there: later calls find it without the patched setting.
    return lambda: function(x)


def as_onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], opset_version=14)
    return file.getvalue()


def onnxruntime_call(dense: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(as_onnx(dense, x), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_call(dense: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    converted = openvino.convert_model(dense, example_input=x, input=list(x.shape))
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    picture = x.numpy()
    return lambda: torch.from_numpy(request.infer([picture])[0].copy())


class DeepSparse:
    """A pruned model in DeepSparse; calling it is one run of the process that has it."""

    def __init__(self, python: str, model: nn.Module, x: Tensor, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, given, gives = (str(Path(folder) / name) for name in ("model.onnx", "x.npy", "y.npy"))
            Path(path).write_bytes(as_onnx(model, x))
            np.save(given, x.numpy())
            child = str(Path(__file__).parent / "deepsparse_child.py")
            self.process = subprocess.Popen(
                [python, child, path, given, gives, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._wait("ready")
            self.output = torch.from_numpy(np.load(gives))

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self._wait("done")

    def _wait(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise RuntimeError(f"DeepSparse ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- where the time goes ------------------------------------------------------------------------------------


def layer_times(model: nn.Module, x: Tensor, seconds: float) -> tuple[dict[str, float], float]:
    """Median microseconds in each convolution by name, and of the whole model with the clocks in it."""
    kinds = (nn.Conv2d, nn.Linear, SparseConv2d)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    begun: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in found}

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: begun.__setitem__(name, time.perf_counter())

    def end(name: str) -> Callable[..., None]:
        return lambda *_: times[name].append(time.perf_counter() - begun[name])

    handles = [m.register_forward_pre_hook(begin(name)) for name, m in found.items()]
    handles += [m.register_forward_hook(end(name)) for name, m in found.items()]
    try:
        whole = interleaved({"model": lambda: model(x)}, seconds, rounds=2)["model"]
    finally:
        for handle in handles:
            handle.remove()
    return {name: summary(t)["median_us"] for name, t in times.items()}, summary(whole)["median_us"]


def profile(dense: nn.Module, ours: nn.Module, x: Tensor, seconds: float) -> dict[str, Any]:
    """Each convolution dense (eager, channels-last or not as the model is) and as converted."""
    dense_times, dense_whole = layer_times(dense, x, seconds)
    our_times, our_whole = layer_times(ours, x, seconds)
    rows = [
        {
            "layer": record.name,
            "decision": record.decision,
            "reason": record.reason,
            "sparsity": round(record.sparsity, 4),
            "dense_us": dense_times[record.name],
            "ours_us": our_times[record.name],
        }
        for record in conversion_report(ours)
    ]
    return {
        "layers": rows,
        "outside_convolutions": round(1 - sum(our_times.values()) / our_whole, 3),
        "outside_convolutions_dense": round(1 - sum(dense_times.values()) / dense_whole, 3),
    }


def print_profile(title: str, found: dict[str, Any]) -> None:
    print(f"{title}: layer, dense us, ours us, ratio, decision")
    for row in found["layers"]:
        ratio = row["dense_us"] / row["ours_us"]
        print(f"  {row['layer']:24} {row['dense_us']:9.0f} {row['ours_us']:9.0f} {ratio:6.2f}  {row['reason']}")
    dense = [row["layer"] for row in found["layers"] if row["decision"] == "dense"]
    print(f"  stayed dense: {', '.join(dense) or 'none'}")
    outside, before = found["outside_convolutions"], found["outside_convolutions_dense"]
    print(f"  outside convolutions: {outside:.1%} of the time (dense model: {before:.1%})", flush=True)


# ---- one model ----------------------------------------------------------------------------------------------


def model_row(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], args: argparse.Namespace) -> Any:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense = zoo.random_model(make)
    zoo.settle_batch_norms(dense, x)
    expected = dense(x)
    calls: dict[Any, Callable[[], Any]] = dict(dense_calls(dense, x, tuple(args.against), args.threads))
    for key, call in calls.items():
        check(f"{name}, {key}", call(), expected)
    ours, details, others = {}, {}, {}
    for sparsity in args.sparsity:
        key = f"{sparsity:.0%}"
        model = zoo.pruned(dense, sparsity, x)
        ours[key], _, seconds = tuned_and_converted(model, x, args)
        check(f"{name} {key}", ours[key](x), model(x))
        details[key] = {"tuning_seconds": round(seconds, 1), **profile(model, ours[key], x, args.seconds / 4)}
        print_profile(f"{name} {key}", details[key])
        program = capture(ours[key], x)
        check(f"{name} {key}, captured", program(x), model(x))
        calls[key] = lambda p=program: p(x)
        if args.deepsparse:
            others[key] = calls["deepsparse", key] = DeepSparse(args.deepsparse, model, x, args.threads)
            check(f"{name} {key}, deepsparse", others[key].output, model(x))
    times = {key: summary(t) for key, t in interleaved(calls, args.seconds).items()}
    for other in others.values():
        other.close()
    stock = {key: times[key]["median_us"] for key in TORCH if key in times}
    best = min(stock, key=lambda key: stock[key])
    for key in ours:
        mine = times[key]["median_us"]
        ratios = {other: round(times[other]["median_us"] / mine, 3) for other in args.against if other in times}
        details[key] |= {**times[key], "ratio": round(stock[best] / mine, 3), "ratios": ratios}
        if key in others:
            theirs = times["deepsparse", key]
            details[key] |= {"deepsparse": theirs, "ratio_to_deepsparse": round(theirs["median_us"] / mine, 3)}
    dense_times = {key: times[key] for key in args.against if key in times}
    for key, found in dense_times.items():
        print(f"{name} {key}: {found['median_us'] / 1000:.1f} ms")
    for key in ours:
        beside = f", {details[key]['ratio_to_deepsparse']} times deepsparse" if key in others else ""
        words = f"{times[key]['median_us'] / 1000:.1f} ms, {details[key]['ratio']} times {best}{beside}"
        print(f"{name} {key}: {words}", flush=True)
    return {"model": name, "shape": list(shape), "best_torch": best, "dense": dense_times, "ours": details}


def rivals(deepsparse_python: str | None) -> dict[str, str]:
    """Versions of what is compared with, where it is installed."""
    found = {}
    for name in ("onnxruntime", "openvino"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if deepsparse_python:
        ask = "from importlib.metadata import version; print(version('deepsparse'))"
        found["deepsparse"] = subprocess.check_output([deepsparse_python, "-c", ask], text=True).strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=None)
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=80, help="configs tried for each layer")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each model")
    parser.add_argument("--against", nargs="+", choices=[*TORCH, *OTHERS], default=[*TORCH, *OTHERS])
    parser.add_argument("--deepsparse", metavar="PYTHON", help="an interpreter that has DeepSparse")
    parser.add_argument("--suffix", default="", help="added to the results file's name")
    parser.add_argument("--tiny", action="store_true", help="small models, few configs: tries every path")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    cases = TINY if args.tiny else CASES
    if args.tiny:
        args.trials, args.seconds, args.suffix = 3, 0.5, f"_tiny{args.suffix}"
    torch.set_num_threads(args.threads)
    numbasparse.set_num_threads(args.threads)
    rows = []
    versions = rivals(args.deepsparse)
    with torch.inference_mode():
        for name in args.models or cases:
            rows.append(model_row(name, *cases[name], args))
            settings = {"threads": args.threads, "trials": args.trials, "seconds": args.seconds}
            path = write(f"models{args.suffix}.json", {**environment(), "rivals": versions, **settings, "rows": rows})
            print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
