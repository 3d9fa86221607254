"""Hypothesis strategies: small convolution problems with every option, and weights for them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from numbasparse.quantization import CodebookQuantization, LinearQuantization
from numbasparse.spec import ConvSpec, Pair
from numbasparse.weight import SparseWeight


@st.composite
def conv_specs(draw: st.DrawFn, max_pixels: int = 120, max_channels: int = 4) -> ConvSpec:
    """Valid float32 specs with h * w <= max_pixels and at most `max_channels` channels in each group."""
    h = draw(st.integers(1, min(max_pixels, 20)), label="h")
    w = draw(st.integers(1, max_pixels // h), label="w")
    padding = (draw(_pads()), draw(_pads()))
    r, vertical = draw(_kernels(h + sum(padding[0])))
    s, horizontal = draw(_kernels(w + sum(padding[1])))
    groups = draw(st.integers(1, 4), label="groups")
    channels = st.one_of(st.just(1), st.integers(1, max_channels))  # 1 often: with groups, that is depthwise
    return ConvSpec(
        n=draw(st.integers(1, 3), label="n"),
        c=groups * draw(channels, label="c_per_group"),
        h=h,
        w=w,
        k=groups * draw(channels, label="k_per_group"),
        r=r,
        s=s,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=(vertical, horizontal),
        groups=groups,
    )


def _pads() -> st.SearchStrategy[Pair]:
    """Padding of the two ends of one direction, often equal."""
    number = st.integers(0, 3)
    return st.one_of(number.map(lambda p: (p, p)), st.tuples(number, number))


@st.composite
def _kernels(draw: st.DrawFn, padded: int) -> Pair:
    """Kernel size and dilation that fit into `padded` rows or columns."""
    size = draw(st.integers(1, min(5, padded)))
    largest = 3 if size == 1 else min(3, (padded - 1) // (size - 1))
    return size, draw(st.integers(1, largest))


@st.composite
def sparse_weights(draw: st.DrawFn, spec: ConvSpec) -> SparseWeight:
    """Weights for `spec`, from empty to full; some have empty rows."""
    density = draw(st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
    empty_rows = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=empty_rows), spec.groups)


def random_weight(spec: ConvSpec, density: float, rng: np.random.Generator, *, empty_rows: bool = False) -> np.ndarray:
    """Dense float32 weight of `spec` with about `density` nonzeros; `empty_rows` zeroes every second row."""
    weight = rng.standard_normal(spec.weight_shape).astype(np.float32)
    weight[rng.random(spec.weight_shape) >= density] = 0.0
    if empty_rows:
        weight[::2] = 0.0
    return weight


def two_of_four(weight: np.ndarray) -> np.ndarray:
    """A weight with at most the two largest of every four neighbouring input channels."""
    k, c, r, s = weight.shape
    quads = np.pad(weight, ((0, 0), (0, -c % 4), (0, 0), (0, 0))).reshape(k, -1, 4, r, s)
    rank = np.argsort(np.argsort(-np.abs(quads), axis=2), axis=2)
    return np.where(rank < 2, quads, np.float32(0)).reshape(k, -1, r, s)[:, :c]


def quantized(weight: SparseWeight, bits: int, kind: str) -> SparseWeight:
    """Codes of a codebook, or of linear levels with a scale for each output channel."""
    if kind == "codebook":
        return weight.quantized(CodebookQuantization(bits))
    return weight.quantized(LinearQuantization(bits, granularity="channel"))


@st.composite
def tensor_core_specs(draw: st.DrawFn, channels: tuple[int, ...]) -> ConvSpec:
    """Small problems of 16-bit floats with every option and batches of multiples of 8."""
    r, s = draw(st.sampled_from([(1, 1), (3, 3), (5, 1), (2, 3)]))
    groups = draw(st.sampled_from([1, 1, 2]))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    extent = ((r - 1) * dilation[0] + 1, (s - 1) * dilation[1] + 1)
    return ConvSpec(
        n=8 * draw(st.integers(1, 5)),
        c=groups * draw(st.sampled_from(channels)),
        h=extent[0] + draw(st.integers(0, 4)),
        w=extent[1] + draw(st.integers(0, 4)),
        k=groups * draw(st.sampled_from([1, 20, 70])),
        r=r,
        s=s,
        stride=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        padding=((draw(st.integers(0, 2)), 1), (draw(st.integers(0, 2)), 0)),
        dilation=dilation,
        groups=groups,
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
    )
