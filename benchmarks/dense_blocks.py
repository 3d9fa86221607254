"""What one buffer for a dense block, and kept memory, save on a CPU: ``python benchmarks/dense_blocks.py``.

Three dense blocks of Real-ESRGAN's network (one of its six RRDB), random weights, 90 % zeros in every convolution, one
image of 256 x 256, default kernels: converted with `torch.cat` as the model has it, with one buffer for each block,
with that and large outputs in `numbasparse.runtime.memory`'s blocks, and the dense model in eager torch, all in turns.
malloc is as it is by default: that is what kept memory is about.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from common import environment, interleaved, summary, write

from numbasparse.models.rrdbnet import RRDB
from numbasparse.nn import convert
from numbasparse.pruning import MagnitudePruning, prune_
from numbasparse.runtime import memory

THREADS, SECONDS, SPARSITY, SHAPE = 2, 30.0, 0.9, (1, 64, 256, 256)


def converted(model: torch.nn.Module, x: torch.Tensor, shared: bool) -> torch.nn.Module:
    """The converted model, with or without the buffers."""
    module = importlib.import_module("numbasparse.nn.convert")  # the package has a function of that name
    kept = module.share_concatenations
    if not shared:
        module.share_concatenations = lambda graph, modules: False  # type: ignore[assignment]
    try:
        return convert(model, None, x)
    finally:
        module.share_concatenations = kept  # type: ignore[assignment]


def fresh_memory(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model with outputs of any size from torch's own allocator."""

    def call(x: torch.Tensor) -> torch.Tensor:
        smallest, memory.SMALLEST = memory.SMALLEST, 1 << 60
        try:
            return model(x)
        finally:
            memory.SMALLEST = smallest

    return call


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model, x = RRDB().eval(), torch.randn(SHAPE)
    prune_(model, MagnitudePruning(sparsity=SPARSITY, scope="layer"))
    with torch.inference_mode():
        expected = model(x)
        joined, shared = converted(model, x, False), converted(model, x, True)
        models = {
            "dense": model,
            "torch.cat": fresh_memory(joined),
            "one buffer": fresh_memory(shared),
            "one buffer, kept memory": shared,
        }
        for name, made in models.items():
            error = float((made(x) - expected).abs().max() / expected.abs().max())
            assert error < 1e-4, f"{name} differs by {error:.2g}"
        times = {
            k: summary(t) for k, t in interleaved({k: lambda m=m: m(x) for k, m in models.items()}, SECONDS).items()
        }
    ratios = {k: round(times["dense"]["median_us"] / t["median_us"], 3) for k, t in times.items()}
    print({k: round(t["median_us"] / 1000, 1) for k, t in times.items()}, ratios)
    described = {"environment": environment(), "threads": THREADS, "sparsity": SPARSITY, "shape": list(SHAPE)}
    print("wrote", write("dense_blocks.json", described | {"times": times, "ratios_to_dense": ratios}).name)


if __name__ == "__main__":
    main()
