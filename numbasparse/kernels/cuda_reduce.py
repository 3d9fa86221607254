"""The second kernel of a convolution whose input channels are split between blocks: adds up the parts."""

from __future__ import annotations

from collections.abc import Callable

from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout
from numbasparse.spec import ConvSpec

THREADS = 256
"""Of a block; each makes one output."""


def grid(spec: ConvSpec) -> tuple[int, int, int]:
    """Blocks of a launch."""
    return -(-spec.n * spec.k * spec.out_h * spec.out_w // THREADS), 1, 1


def reduce_ptx(
    spec: ConvSpec,
    split: int,
    layout: Layout,
    scaled: bool,
    residual: bool,
    activation: str,
    capability: cuda.Capability,
) -> cuda.Ptx:
    """A kernel ``(y, residual, bias, scale, parts)``, all addresses.

    Parameters
    ----------
    split : int
        Parts: float32 (split, N * K * OH * OW), each in the order of ``y``.
    layout : Layout
        That order.
    scaled, residual, activation
        See `codegen.ptx.Finish`; the factors are of channels, and there is a bias.
    """
    facts = (spec, split, layout, scaled, residual, activation)
    code = _code(*facts)
    return cuda.compile_ptx(code, 5, repr(facts), capability=capability, threads=THREADS, fastmath=False)


def _code(
    spec: ConvSpec, split: int, layout: Layout, scaled: bool, residual: bool, activation: str
) -> Callable[..., None]:
    from numba import types

    from numbasparse.codegen import ptx

    total = spec.n * spec.k * spec.out_h * spec.out_w
    pixels = spec.out_h * spec.out_w
    # Values of a channel that follow one another.
    run = {"NCHW": pixels, "NHWC": 1, "CHWN": pixels * spec.n}[layout]
    k, size = spec.k, ptx.element_bytes(spec.dtype)
    finish = ptx.Finish(bias=True, scaled=scaled, residual=residual, activation=activation)
    store, load = ptx.store_finished(spec.dtype, finish), ptx.load_global("float32")
    i64, f32 = types.int64, types.float32

    def cuda_reduce(y, residual, bias, scale, parts):  # type: ignore[no-untyped-def]
        i = ptx.block_x() * i64(THREADS) + ptx.thread_index()
        if i < total:
            value = f32(0)
            for part in range(split):
                value += load(i64(parts + (part * i64(total) + i) * 4))
            store(i64(y + i * size), value, i64(residual + i * size), bias, scale, i64(i // run % k))

    return cuda_reduce
