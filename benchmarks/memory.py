"""Memory of whole models on a CPU, dense and converted at 90 %: ``python benchmarks/memory.py``.

Each runs in a process of its own, which loads its file, then runs three times on one picture. ``running`` is the most
that the process has held in its memory while running, above what it held before it loaded the model; ``loading`` is
the same while loading. The converted model is captured (`numbasparse.nn.capture`), which counts as loading, and only
what was captured is kept. Both sides have their packages imported before, and have run one tiny dense convolution,
whose code is 14 MB of torch's library; ours a sparse one too: numba then has read what it knows (44 MB for any model
or none). For the converted model it includes packed weights and compiled code, which come from the cache on disk (a
first process fills it).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

SPARSITY = 0.9
MODELS = ("resnet50", "vgg16")


def held(field: str) -> int:
    """Bytes: "VmRSS", what the process holds, or "VmHWM", the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> int:
    """Give back what is free, start to watch anew, and return what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmRSS")


def first_convolution(kind: str) -> None:
    """What a process does once, whatever its models."""
    import torch

    from numbasparse.nn import SparseConv2d

    conv: Any = torch.nn.Conv2d(8, 8, 3)
    x = torch.rand(1, 8, 16, 16)
    with torch.inference_mode():
        conv(x)
        if kind == "converted":
            conv.weight.mul_(torch.rand_like(conv.weight) < 0.1)
            SparseConv2d.from_conv(conv, choice="cpu_direct")(x)


def child(kind: str, name: str, path: str, threads: int) -> None:
    """Load and run one model; print bytes as JSON."""
    import models as zoo
    import safetensors.torch
    import torch

    from numbasparse.nn import capture, load

    torch.set_num_threads(threads)
    x = torch.rand(1, 3, zoo.IMAGE, zoo.IMAGE)
    first_convolution(kind)
    before = forget_peak()
    if kind == "dense":
        with torch.device("meta"):
            model: Any = zoo.MODELS[name]()
        model.load_state_dict(safetensors.torch.load_file(path), assign=True)
        model.eval()
    else:
        model = capture(load(path), x)
    loading = held("VmHWM") - before
    with torch.inference_mode():
        forget_peak()
        for _ in range(3):
            model(x)
    print(json.dumps({"loading": loading, "running": held("VmHWM") - before}))


def measured(kind: str, name: str, path: Path, threads: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", kind, name, str(path), "--threads", str(threads)]
    result: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return result


def row(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Both forms of one model, which hold the same numbers."""
    import models as zoo
    import torch

    from numbasparse.cli.models import save_state
    from numbasparse.nn import convert, save

    x = torch.rand(1, 3, zoo.IMAGE, zoo.IMAGE)
    model = zoo.pruned(zoo.random_model(zoo.MODELS[name]), SPARSITY, x)
    files = {"dense": folder / "dense.safetensors", "converted": folder / "converted.safetensors"}
    save_state(model, files["dense"])
    save(convert(model, None, x), files["converted"])
    measured("converted", name, files["converted"], threads)  # fills the cache of compiled code
    found: dict[str, Any] = {kind: measured(kind, name, path, threads) for kind, path in files.items()}
    for kind, path in files.items():
        found[kind]["file"] = path.stat().st_size
    share = found["converted"]["running"] / found["dense"]["running"]
    print(name, found, f"{share:.2f} of dense", flush=True)
    return {"model": name, "share_running": round(share, 3), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder), args.threads) for name in args.models]
    described = {"environment": environment(), "sparsity": SPARSITY, "threads": args.threads}
    print("wrote", write("memory.json", described | {"rows": rows}).name)


if __name__ == "__main__":
    main()
