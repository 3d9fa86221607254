"""Every kernel against the reference, on memory whose neighbours may not be touched."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from compare import assert_close
from conftest import Guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import conv_specs, random_weight, sparse_weights

from numbasparse.kernels import ConfigError, base, cpu_direct, cpu_pointwise, cpu_vector, kernel, kernels_for
from numbasparse.kernels.cpu_patches import Geometry
from numbasparse.kernels.cpu_rows import PackedRows
from numbasparse.plans import Choice, Plan
from numbasparse.quantization import CodebookQuantization, LinearQuantization
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec
from numbasparse.weight import Quantization, SparseWeight

KERNELS = {k.name: k for k in kernels_for("cpu")}
SPARSE = [name for name, k in KERNELS.items() if not k.is_dense]


def check(
    spec: ConvSpec,
    dense: np.ndarray,
    name: str,
    config: dict[str, Any] | None = None,
    activation: str = "none",
    threads: int = 1,
    bias: bool = True,
    quantization: Quantization | None = None,
) -> Plan:
    """Run on poisoned output, with each array once before and once after a forbidden page; compare.

    Without and with a residual.

    Parameters that `config` leaves out are those of the default config.
    """
    weight = SparseWeight.from_dense(dense, spec.groups, quantization)
    dense = weight.to_dense()
    chosen = KERNELS[name].default(spec, weight, threads) | (config or {})
    plan = Plan(spec, weight, Choice(name, chosen), activation, threads)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    for (here, there), residual in itertools.product((("start", "end"), ("end", "start")), (False, True)):
        x, y, b = Guarded(spec.x_shape, here), Guarded(spec.out_shape, there), Guarded((spec.k,), here)
        added = Guarded(spec.out_shape, here)
        for memory in (x, b, added):
            memory.array[...] = rng.standard_normal(memory.array.shape)
        y.array[...] = np.nan
        before = [memory.array.copy() for memory in (x, b, added)]
        used = b.array if bias else None, added.array if residual else None
        assert plan(x.array, used[0], out=y.array, residual=used[1]) is y.array
        for memory in (x, y, b, added):
            memory.check()
        for memory, old in zip((x, b, added), before, strict=True):
            assert np.array_equal(memory.array, old)
        name_or_none = None if activation == "none" else activation
        assert_close(y.array, spec, x.array, dense, used[0], name_or_none, residual=used[1])
    return plan


def weights(spec: ConvSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Weights from empty to full, endlessly."""
    single = np.zeros(spec.weight_shape, np.float32)
    single[tuple(s - 1 for s in spec.weight_shape)] = -1.5
    while True:
        yield random_weight(spec, 0.1, rng)
        yield random_weight(spec, 1.0, rng)
        yield random_weight(spec, 0.3, rng, empty_rows=True)
        yield single
        yield np.zeros(spec.weight_shape, np.float32)
        yield random_weight(spec, 0.03, rng)


# --- grid of the direct kernel: tiles, which are compiled, times problems, which are not -----------------------

SHAPES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel": (3, 3)},
    "3x3 stride 2": {"kernel": (3, 3), "stride": (2, 2)},
    "3x3 stride 3": {"kernel": (3, 3), "stride": (3, 3)},
    "3x3 stride 1,2": {"kernel": (3, 3), "stride": (1, 2)},
    "3x3 stride 2,1": {"kernel": (3, 3), "stride": (2, 1)},
    "3x3 stride 2,3": {"kernel": (3, 3), "stride": (2, 3)},
    "3x3 dilation 2": {"kernel": (3, 3), "dilation": (2, 2)},
    "3x3 dilation 2,3": {"kernel": (3, 3), "dilation": (2, 3)},
    "3x3 dilation 2 stride 2": {"kernel": (3, 3), "dilation": (2, 2), "stride": (2, 2)},
    "3x3 dilation 3 stride 2": {"kernel": (3, 3), "dilation": (3, 3), "stride": (2, 2)},
    "5x5": {"kernel": (5, 5)},
    "7x7 stride 2": {"kernel": (7, 7), "stride": (2, 2)},
    "2x4": {"kernel": (2, 4)},
    "1-D": {"kernel": (1, 9), "flat": True},
    "1-D dilation 2 stride 2": {"kernel": (1, 3), "stride": (1, 2), "dilation": (1, 2), "flat": True},
    "1x1": {"kernel": (1, 1)},
    "1x1 stride 2": {"kernel": (1, 1), "stride": (2, 2)},
}

# lanes, chunk, tile, taps
GRID: dict[str, list[tuple[int, int, str, str]]] = {
    "3x3": [
        (8, 8, "2x2", "copied"),
        (8, 8, "2x2", "shifted"),
        (8, 4, "2x2", "copied"),
        (8, 2, "1x3", "copied"),
        (16, 16, "2x1", "shifted"),
        (16, 16, "1x1", "copied"),
        (16, 4, "1x2", "copied"),
        (4, 4, "3x1", "shifted"),
        (4, 2, "4x1", "copied"),
        (8, 8, "7x2", "shifted"),
        (8, 8, "28x1", "copied"),
    ],
    "3x3 stride 2": [
        (8, 8, "2x2", "copied"),
        (8, 8, "2x2", "shifted"),
        (16, 16, "1x1", "shifted"),
        (16, 4, "2x1", "copied"),
        (4, 4, "2x1", "shifted"),
        (4, 2, "1x2", "copied"),
    ],
    "3x3 stride 3": [
        (8, 8, "2x1", "copied"),
        (8, 8, "2x1", "shifted"),
        (16, 8, "1x1", "copied"),
        (4, 2, "2x1", "copied"),
    ],
    "3x3 stride 1,2": [(8, 8, "3x1", "shifted"), (8, 4, "3x1", "copied")],
    "3x3 stride 2,1": [(8, 8, "3x1", "shifted"), (8, 4, "3x1", "copied")],
    "3x3 stride 2,3": [(8, 8, "2x2", "shifted")],
    "3x3 dilation 2": [(8, 8, "2x2", "shifted"), (8, 4, "2x2", "copied")],
    "3x3 dilation 2,3": [(8, 8, "1x2", "shifted"), (16, 8, "2x1", "copied")],
    "3x3 dilation 2 stride 2": [(8, 8, "2x1", "shifted"), (8, 4, "2x1", "copied")],
    "3x3 dilation 3 stride 2": [(8, 8, "2x1", "shifted")],
    "5x5": [(8, 8, "3x2", "shifted"), (8, 4, "3x2", "copied")],
    "7x7 stride 2": [(8, 8, "2x2", "shifted"), (8, 8, "2x2", "copied")],
    "2x4": [(8, 8, "2x2", "shifted"), (4, 4, "2x2", "copied")],
    "1-D": [(8, 8, "1x5", "shifted"), (8, 8, "1x5", "copied")],
    "1-D dilation 2 stride 2": [(8, 8, "1x3", "shifted")],
    "1x1": [(8, 8, "1x4", "shifted"), (8, 4, "1x3", "copied")],
    "1x1 stride 2": [(8, 8, "2x2", "shifted"), (8, 4, "2x2", "copied")],
}


def problems(shape: dict[str, Any], tile_h: int, width: int, rng: np.random.Generator) -> Iterator[ConvSpec]:
    """Random specs whose output holds at least one whole tile, so that one compilation serves them all."""
    (r, s), stride, dilation = shape["kernel"], shape.get("stride", (1, 1)), shape.get("dilation", (1, 1))
    while True:
        out = tile_h + int(rng.integers(6)) * (not shape.get("flat")), width + int(rng.integers(1, 14))
        sizes, padding = [], []
        for o, size, step, d in zip(out, (r, s), stride, dilation, strict=True):
            padded = (o - 1) * step + (size - 1) * d + 1 + int(rng.integers(step))
            low, high = (int(p) for p in rng.integers(0, d * (size - 1) + 2, 2))
            if low + high >= padded or (size == 1 and rng.random() < 0.7):
                low = high = 0
            sizes.append(padded - low - high)
            padding.append((low, high))
        groups = int(rng.choice([1, 1, 2, 5]))
        c, k = (groups * int(rng.choice([1, 1, 3, 6])) for _ in range(2))
        n = int(rng.integers(1, 4))
        yield ConvSpec(n, c, *sizes, k, r, s, stride, tuple(padding), dilation, groups)


@pytest.mark.parametrize(
    ("shape", "lanes", "chunk", "tile", "taps"), [(name, *c) for name, configs in GRID.items() for c in configs]
)
def test_direct_grid(shape: str, lanes: int, chunk: int, tile: str, taps: str) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{shape} {lanes} {chunk} {tile} {taps}".encode()))
    tile_h, tile_w = (int(t) for t in tile.split("x"))
    specs = problems(SHAPES[shape], tile_h, tile_w * chunk, rng)
    for i, spec in enumerate(itertools.islice(specs, 8)):
        dense = next(itertools.islice(weights(spec, rng), i % 6, None))
        config = {
            "lanes": lanes,
            "chunk": chunk,
            "tile": tile,
            "taps": taps,
            "block_kb": (1, 4, 64)[i % 3],
            "split": min(1 + i % 4, spec.k),
            "prefetch": "next" if i == 7 and "stride 2" in shape else "none",
        }
        check(spec, dense, "cpu_direct", config, threads=1 + i % 3, bias=i % 2 == 0)


PATCHES: list[tuple[str, tuple[int, int], dict[str, Any], tuple[int, int]]] = [
    # shape, output's height and width, config, patch
    ("3x3", (48, 96), {"tile": "3x2", "taps": "copied", "block_kb": 4, "patch_kb": 64}, (3, 12)),
    ("3x3", (67, 48), {"tile": "2x2", "taps": "shifted", "block_kb": 3, "patch_kb": 80}, (4, 6)),
    ("3x3", (20, 92), {"tile": "2x2", "taps": "shifted", "block_kb": 4, "patch_kb": 30, "prefetch": "next"}, (2, 6)),
    ("3x3", (53, 44), {"chunk": 4, "tile": "5x2", "taps": "copied", "block_kb": 4, "patch_kb": 99}, (5, 11)),
    ("3x3 stride 2", (35, 40), {"tile": "1x1", "taps": "copied", "block_kb": 64, "patch_kb": 70}, (2, 5)),
    ("3x3 stride 2", (37, 56), {"tile": "1x3", "taps": "shifted", "block_kb": 2, "patch_kb": 64}, (2, 7)),
    ("3x3 dilation 2,3", (40, 56), {"tile": "2x1", "taps": "shifted", "block_kb": 4, "patch_kb": 24}, (2, 7)),
    ("1x1 stride 2", (36, 32), {"tile": "2x2", "taps": "shifted", "block_kb": 4, "patch_kb": 16}, (2, 4)),
]


@pytest.mark.parametrize(("shape", "out", "config", "patch"), PATCHES)
def test_patches(shape: str, out: tuple[int, int], config: dict[str, Any], patch: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    (r, s), stride = SHAPES[shape]["kernel"], SHAPES[shape].get("stride", (1, 1))
    dilation = SHAPES[shape].get("dilation", (1, 1))
    padding = tuple((min(1, size - 1), size // 2 * d) for size, d in zip((r, s), dilation, strict=True))
    h, w = (
        (o - 1) * step + (size - 1) * d + 1 - sum(p)
        for o, step, size, d, p in zip(out, stride, (r, s), dilation, padding, strict=True)
    )
    config = {"lanes": 8, "chunk": 8, "split": 1, "prefetch": "channel", **config}
    for n, c, k, groups, density in ((1, 9, 5, 1, 0.2), (2, 12, 6, 3, 0.1), (1, 7, 4, 1, 0.0)):
        spec = ConvSpec(n, c, h, w, k, r, s, stride, padding, dilation, groups)
        assert (spec.out_h, spec.out_w) == out
        if groups == 1:
            geometry = Geometry.of(spec, config)
            assert (geometry.patch_h, geometry.patch_w) == patch
        check(spec, random_weight(spec, density, rng), "cpu_direct", config, threads=2, bias=n == 1)


@pytest.mark.parametrize(
    ("lanes", "vectors", "pixels"),
    [
        (4, 1, None),
        (4, 14, None),
        (8, 1, None),
        (8, 3, None),
        (8, 14, None),
        (16, 2, None),
        (16, 7, None),
        (4, 1, 4),
        (4, 2, 5),
        (8, 3, 19),
        (16, 2, 17),
    ],
)
def test_pointwise_grid(lanes: int, vectors: int, pixels: int | None) -> None:
    rng = np.random.default_rng(lanes * vectors)
    for i in range(6):
        h = int(rng.integers(1, 5)) if pixels is None else 1
        w = -(-(vectors * lanes + int(rng.integers(40))) // h) if pixels is None else pixels
        groups = (1, 1, 3)[i % 3]
        spec = ConvSpec(1 + i % 3, groups * (1, 7, 4)[i % 3], h, w, groups * (3, 1, 5)[i // 2], 1, 1, groups=groups)
        dense = next(itertools.islice(weights(spec, rng), i, None))
        config = {"lanes": lanes, "vectors": vectors, "block": (64, 1, 3)[i % 3], "split": min(1 + i % 3, spec.k)}
        config["prefetch"] = ("none", "next")[i % 2]
        check(spec, dense, "cpu_pointwise", config, threads=1 + i % 3, bias=i % 2 == 0)


# --- grid of the kernel of columns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "vectors", "pixels"),
    [(4, 1, None), (4, 3, None), (8, 2, None), (16, 1, None), (16, 4, None), (4, 2, 5), (8, 3, 19), (16, 2, 17)],
)
def test_columns_grid(lanes: int, vectors: int, pixels: int | None) -> None:
    """Ranges of one row to all, the last one shorter; codes too."""
    rng = np.random.default_rng(lanes * vectors)
    for i in range(6):
        w = vectors * lanes + int(rng.integers(40)) if pixels is None else pixels
        spec = ConvSpec(1 + i % 3, (1, 7, 40)[i % 3], 1, w, (3, 1, 17)[i // 2], 1, 1)
        dense = next(itertools.islice(weights(spec, rng), i, None))
        config = {"lanes": lanes, "vectors": vectors, "rows": (64, 1, 5)[i % 3]}
        config["prefetch"] = ("none", "next")[i % 2]
        activation = ("none", "silu", "relu6")[i % 3]
        check(spec, dense, "cpu_columns", config, activation, 1 + i % 3, i % 2 == 0)
        config["entries"] = "coded"
        check(spec, dense, "cpu_columns", config, activation, 1 + i % 3, i % 2 == 0, QUANTIZATIONS[i])


def test_columns_reasons() -> None:
    spec = ConvSpec.create((1, 300, 3, 3), (400, 300, 1, 1))
    columns = kernel("cpu_columns")
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    config = {"lanes": 8, "vectors": 2, "rows": 100, "prefetch": "none"}
    assert columns.check(spec, weight, config) is None
    for change, words in (
        ({"lanes": 16}, "at most the image's 9 pixels"),
        ({"vectors": 3}, "3 vectors exceed the image's 9 pixels"),
        ({"rows": 5000}, "the sums of 5000 output channels exceed 262144 bytes"),
        ({"rows": 1}, "ranges of 1 output channels cut the rows into 11"),
        ({"rows": 0}, "rows must be from 1 to 65535, got 0"),
    ):
        assert words in (columns.check(spec, weight, {**config, **change}) or ""), change
    wide = ConvSpec.create((1, 70_000, 2, 2), (1, 70_000, 1, 1))
    one = np.zeros(wide.weight_shape, np.float32)
    one[0, 5] = 1.0
    assert "got 70000 channels" in (columns.supports(wide, SparseWeight.from_dense(one)) or "")


# --- grid of the kernel for vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("image", [(1, 1, 1), (3, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)], ids=str)
def test_vector_grid(lanes: int, image: tuple[int, int, int]) -> None:
    """Rows of all lengths, the last unit shorter, blocks of a few channels to all of them."""
    rng = np.random.default_rng(lanes * sum(image))
    n, h, w = image
    for i, channels in enumerate((1, 3, 16, 40, 70, 300)):
        spec = ConvSpec(n, channels, h, w, (5, 1, 33, 7, 16, 20)[i], 1, 1)
        dense = next(itertools.islice(weights(spec, rng), i, None))
        config = {"lanes": lanes, "rows": (2, 1, 16, 64, 5, 3)[i], "block": (1, 64, 7, 16, 1 << 16, 100)[i]}
        check(spec, dense, "cpu_vector", config, ("none", "relu6")[i % 2], threads=1 + i % 3, bias=i % 2 == 0)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vector_grid_of_codes(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    for i, quantization in enumerate(QUANTIZATIONS):
        spec = ConvSpec(1 + i % 2, (1, 30, 64)[i % 3], 1, 1 + i // 3, (6, 1, 9)[i % 3], 1, 1)
        dense = next(itertools.islice(weights(spec, rng), i, None))
        config = {"lanes": lanes, "rows": 1 + i, "block": (64, 5)[i % 2], "entries": "coded"}
        check(spec, dense, "cpu_vector", config, "silu", 1 + i % 3, i % 2 == 0, quantization)


@pytest.mark.parametrize("quantized", [False, True])
def test_vectors_are_packed_in_ranges(monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    """Ranges of whole units, the last one shorter, give what all at once does."""
    rng = np.random.default_rng(0)
    weight = SparseWeight.from_dense(rng.standard_normal((37, 90, 1, 1)) * (rng.random((37, 90, 1, 1)) < 0.2))
    if quantized:
        weight = weight.quantized(QUANTIZATIONS[0])
    whole = cpu_vector.pack(weight, 8, 4, 32, quantized)
    monkeypatch.setattr(cpu_vector, "_AT_ONCE", 150)
    assert len(cpu_vector._ranges(weight, 4)) > 2
    for array, again in zip(whole, cpu_vector.pack(weight, 8, 4, 32, quantized), strict=True):
        np.testing.assert_array_equal(array, again)


def test_vectors_of_more_channels_than_places_count() -> None:
    """Places are 16 bits, and count from the block's first channel."""
    spec = ConvSpec(1, 70_000, 1, 1, 3, 1, 1)
    dense = np.zeros(spec.weight_shape, np.float32)
    dense[0, [0, 65_535, 65_536, 69_999], 0, 0] = 1.0, 2.0, 3.0, 4.0
    dense[2, 69_998] = 5.0
    check(spec, dense, "cpu_vector")
    reason = kernel("cpu_vector").check(spec, SparseWeight.from_dense(dense), {"lanes": 8, "rows": 1, "block": 65_537})
    assert reason == "block must be from 1 to 65536, got 65537"


def test_what_passes_a_zero_weight_stays_out_of_vectors() -> None:
    """Lanes behind the last non-zero are not read: no infinity times zero."""
    spec = ConvSpec(1, 40, 1, 1, 2, 1, 1)
    dense = np.zeros(spec.weight_shape, np.float32)
    dense[0, 5:22], dense[1, 0] = 1.0, 2.0
    x = np.ones(spec.x_shape, np.float32)
    x[0, [0, 30]] = np.inf
    y = Plan(
        spec, SparseWeight.from_dense(dense), Choice("cpu_vector", {"lanes": 16, "rows": 1, "block": 64}), "none", 1
    )(x)
    assert y.ravel().tolist() == [17.0, np.inf]


# --- quantized weights -----------------------------------------------------------------------------------------

QUANTIZATIONS: list[Quantization] = [
    CodebookQuantization(4),
    LinearQuantization(8, granularity="channel"),
    CodebookQuantization(2, "channel_group", 2),
    LinearQuantization(3, symmetric=False, granularity="channel", range="mse"),
    LinearQuantization(5, symmetric=False),
    CodebookQuantization(8, "channel_group", 3),
]


@pytest.mark.parametrize(
    ("shape", "lanes", "chunk", "tile", "taps"),
    [
        ("3x3", 8, 8, "2x2", "copied"),
        ("3x3", 8, 8, "2x2", "shifted"),
        ("3x3", 16, 16, "1x1", "copied"),
        ("3x3", 4, 2, "4x1", "copied"),
        ("3x3", 8, 8, "7x2", "shifted"),
        ("3x3 stride 2", 16, 4, "2x1", "copied"),
        ("3x3 stride 2,3", 8, 8, "2x2", "shifted"),
        ("3x3 dilation 2,3", 8, 8, "1x2", "shifted"),
        ("1-D", 8, 8, "1x5", "shifted"),
        ("1x1", 8, 4, "1x3", "copied"),
    ],
)
def test_direct_grid_of_codes(shape: str, lanes: int, chunk: int, tile: str, taps: str) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{shape} {lanes} {chunk} {tile} {taps} codes".encode()))
    tile_h, tile_w = (int(t) for t in tile.split("x"))
    specs = problems(SHAPES[shape], tile_h, tile_w * chunk, rng)
    for i, spec in enumerate(itertools.islice(specs, 12)):
        dense = next(itertools.islice(weights(spec, rng), i % 6, None))
        config = {
            "lanes": lanes,
            "chunk": chunk,
            "tile": tile,
            "taps": taps,
            "block_kb": (1, 4, 64)[i % 3],
            "split": min(1 + i % 4, spec.k),
            "prefetch": "none",
            "entries": "wide" if i == 11 else "coded",
        }
        quantization = QUANTIZATIONS[i % 4 if i < 8 else i - 6]
        check(spec, dense, "cpu_direct", config, threads=1 + i % 3, bias=i % 2 == 0, quantization=quantization)


@pytest.mark.parametrize(("lanes", "vectors", "pixels"), [(4, 1, 4), (8, 3, None), (8, 14, None), (16, 2, 17)])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_pointwise_grid_of_codes(lanes: int, vectors: int, pixels: int | None, activation: str) -> None:
    rng = np.random.default_rng(lanes * vectors)
    for i, quantization in enumerate(QUANTIZATIONS):
        w = vectors * lanes + int(rng.integers(40)) if pixels is None else pixels
        groups = (1, 1, 3)[i % 3]
        spec = ConvSpec(1 + i % 3, groups * (1, 7, 4)[i % 3], 1, w, groups * (3, 1, 5)[i // 2], 1, 1, groups=groups)
        dense = next(itertools.islice(weights(spec, rng), i, None))
        config = {"lanes": lanes, "vectors": vectors, "block": (64, 1, 3)[i % 3], "split": min(1 + i % 3, spec.k)}
        config |= {"prefetch": "none", "entries": "coded"}
        check(spec, dense, "cpu_pointwise", config, activation, 1 + i % 3, i % 2 == 0, quantization)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    "special", ["one of everything", "depthwise multiplier 2", "pointwise, groups", "many channels"]
)
def test_special_codes(name: str, special: str) -> None:
    spec = ConvSpec.create(*SPECIAL[special])
    empty = SparseWeight.from_dense(np.zeros(spec.weight_shape, np.float32), spec.groups)
    if KERNELS[name].supports(spec, empty) is not None:
        return
    for i, dense in enumerate(itertools.islice(weights(spec, np.random.default_rng(7)), 6)):
        plan = check(spec, dense, name, quantization=QUANTIZATIONS[i])
        assert plan.choice.config["entries"] == "coded"


@pytest.mark.parametrize("name", SPARSE)
def test_codes_take_half_the_memory(name: str, without_compiling: None) -> None:
    spec = ConvSpec.create((1, 256, 1, 1) if name == "cpu_vector" else (1, 256, 14, 14), (256, 256, 1, 1))
    dense = random_weight(spec, 0.2, np.random.default_rng(0))
    chosen = KERNELS[name]
    single = SparseWeight.from_dense(dense)
    assert "entries" not in chosen.default(spec, single, 1)
    wide = chosen.prepare(spec, single, chosen.default(spec, single, 1)).nbytes
    weight = single.quantized(CodebookQuantization(4))
    coded = chosen.prepare(spec, weight, chosen.default(spec, weight, 1)).nbytes
    assert coded < 0.6 * wide
    configs = list(chosen.configs(spec, weight, 1))
    assert {c["entries"] for c in configs} == {"coded", "wide"}
    # Where blocks cut rows into many pieces, the tables may be too large beside codes, and not beside values.
    plain = list(chosen.configs(spec, single, 1))
    assert [c for c in configs if c["entries"] == "wide"] == [{**c, "entries": "wide"} for c in plain]
    reasons = [chosen.check(spec, weight, {**c, "entries": "coded"}) for c in plain]
    assert all(reason is None or "cut the rows into" in reason for reason in reasons)


@pytest.mark.parametrize("name", SPARSE)
def test_reasons_against_codes(name: str, without_compiling: None) -> None:
    spec = ConvSpec.create((1, 4, 1, 1) if name == "cpu_vector" else (1, 4, 8, 8), (4, 4, 1, 1))
    single = SparseWeight.from_dense(random_weight(spec, 0.5, np.random.default_rng(0)))
    chosen = KERNELS[name]
    config = chosen.default(spec, single, 1)
    # A config tuned for the weight in float32 says nothing of entries; it holds for the quantized one too.
    assert chosen.check(spec, single.quantized(CodebookQuantization(2)), config) is None
    assert chosen.check(spec, single, {**config, "entries": "wide"}) is None
    assert "need a quantized weight" in (chosen.check(spec, single, {**config, "entries": "coded"}) or "")
    assert "entries must be one of" in (chosen.check(spec, single, {**config, "entries": "scaled"}) or "")


def test_codes_within_reach(without_compiling: None) -> None:
    """24 bits of offset: 64 MiB. Far images are read with wide entries, or packed."""
    spec = ConvSpec.create((1, 5, 2048, 2048), (2, 5, 1, 1))
    weight = SparseWeight.from_dense(np.ones(spec.weight_shape, np.float32), quantization=CodebookQuantization(2))
    pointwise, direct = kernel("cpu_pointwise"), kernel("cpu_direct")
    config = pointwise.default(spec, weight, 1)
    assert config["entries"] == "wide"
    assert "stay below 67108864 bytes" in (pointwise.check(spec, weight, {**config, "entries": "coded"}) or "")
    assert direct.default(spec, weight, 1)["entries"] == "coded"


# --- special problems, each kernel with its default config -----------------------------------------------------

SPECIAL: dict[str, tuple[Any, ...]] = {
    # x_shape, weight_shape, stride, padding, dilation, groups
    "one of everything": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "one pixel, 3x3": ((1, 3, 1, 1), (2, 3, 3, 3), 1, 1),
    "narrower than a vector": ((2, 3, 5, 3), (4, 3, 3, 3), 1, 1),
    "one column": ((1, 2, 9, 1), (3, 2, 3, 1)),
    "one row": ((1, 2, 1, 9), (3, 2, 1, 3), 1, (0, 1)),
    "wide row": ((1, 2, 1, 301), (3, 2, 1, 5), 1, (0, 2)),
    "one channel in, one out": ((1, 1, 14, 14), (1, 1, 3, 3), 1, 1),
    "depthwise": ((2, 16, 14, 14), (16, 1, 3, 3), 1, 1, 1, 16),
    "depthwise multiplier 2": ((1, 6, 7, 7), (12, 1, 3, 3), 2, 1, 1, 6),
    "only padding is seen": ((1, 2, 1, 2), (2, 2, 1, 1), 3, ((3, 3), (4, 4))),
    "padding beyond the kernel": ((1, 2, 3, 4), (2, 2, 3, 3), 1, ((4, 0), (0, 5))),
    "kernel as large as the image": ((2, 3, 6, 7), (4, 3, 6, 7)),
    "7x7 of ResNet": ((1, 3, 32, 32), (8, 3, 7, 7), 2, 3),
    "same": ((1, 3, 10, 11), (4, 3, 4, 2), 1, "same"),
    "stride beyond the kernel": ((1, 2, 11, 13), (3, 2, 1, 1), (2, 3)),
    "stride beyond the image": ((1, 2, 3, 3), (3, 2, 2, 2), 7),
    "many channels": ((1, 130, 7, 7), (33, 130, 3, 3), 1, 1),
    "pointwise": ((2, 20, 9, 9), (7, 20, 1, 1)),
    "pointwise, small": ((3, 6, 2, 2), (5, 6, 1, 1)),
    "pointwise, smaller than a vector": ((3, 6, 1, 3), (5, 6, 1, 1)),
    "pointwise, groups": ((1, 12, 5, 5), (6, 4, 1, 1), 1, 0, 1, 3),
    "pointwise, padded": ((1, 3, 5, 5), (6, 3, 1, 1), 1, 1),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("special", SPECIAL)
def test_special(name: str, special: str) -> None:
    spec = ConvSpec.create(*SPECIAL[special])
    rng = np.random.default_rng(7)
    empty = SparseWeight.from_dense(np.zeros(spec.weight_shape, np.float32), spec.groups)
    reason = KERNELS[name].supports(spec, empty)
    if reason is not None:
        assert name in ("cpu_pointwise", "cpu_vector", "cpu_columns"), reason
        with pytest.raises(ConfigError, match="cannot run config"):
            KERNELS[name].prepare(spec, empty, {"lanes": 4, "vectors": 1, "block": 1, "split": 1})
        return
    for dense in itertools.islice(weights(spec, rng), 5):
        check(spec, dense, name)
        # The default config is for few threads; other thread counts of the same config need no compilation.
        check(spec, dense, name, KERNELS[name].default(spec, empty, 1), threads=3)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("team", ["openmp", "own"])
def test_threads(threads: int, team: str, request: pytest.FixtureRequest) -> None:
    if team == "own":
        request.getfixturevalue("own_team")
    else:
        pytest.importorskip("torch")
    rng = np.random.default_rng(threads)
    spec = ConvSpec.create((2, 5, 19, 23), (6, 5, 3, 3), 1, 1)
    config = {"lanes": 8, "chunk": 8, "tile": "2x2", "taps": "shifted", "block_kb": 1, "split": 2}
    for _ in range(5):
        check(spec, random_weight(spec, 0.2, rng), "cpu_direct", config, threads=threads)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_configs(data: st.DataObject) -> None:
    _random_config(data)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_random_configs(data: st.DataObject) -> None:
    _random_config(data)


def _random_config(data: st.DataObject) -> None:
    spec = data.draw(conv_specs())
    weight = data.draw(sparse_weights(spec))
    threads = data.draw(st.integers(1, 4))
    usable = [k for k in kernels_for("cpu") if k.supports(spec, weight) is None and not k.is_dense]
    chosen = data.draw(st.sampled_from(usable), label="kernel")
    config = data.draw(st.sampled_from(list(chosen.configs(spec, weight, threads))), label="config")
    check(spec, weight.to_dense(), chosen.name, config, threads=threads)


# --- activations -----------------------------------------------------------------------------------------------

ACTIVATION_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("cpu_pointwise", {"lanes": 4, "vectors": 1, "block": 8, "split": 1}),
    ("cpu_pointwise", {"lanes": 8, "vectors": 1, "block": 8, "split": 1}),
    ("cpu_pointwise", {"lanes": 16, "vectors": 2, "block": 8, "split": 1}),
    ("cpu_columns", {"lanes": 8, "vectors": 3, "rows": 2, "prefetch": "next"}),
    ("cpu_direct", {"lanes": 8, "chunk": 4, "tile": "1x3", "taps": "copied", "block_kb": 1, "split": 1}),
    ("dense", {"layout": "nchw"}),
    ("dense", {"layout": "nhwc"}),
]


def apply(values: np.ndarray, activation: str, name: str, config: dict[str, Any]) -> np.ndarray:
    """The activation of each value: a convolution with the weight 1."""
    spec = ConvSpec(1, 1, 1, len(values), 1, 1, 1)
    weight = SparseWeight.from_dense(np.ones((1, 1, 1, 1), np.float32))
    plan = Plan(spec, weight, Choice(name, KERNELS[name].default(spec, weight, 1) | config), activation, 1)  # type: ignore[arg-type]
    return plan(values.astype(np.float32).reshape(spec.x_shape)).ravel()


@pytest.mark.parametrize(("name", "config"), ACTIVATION_CONFIGS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "leaky_relu(0.2)"])
def test_activations(activation: str, name: str, config: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    spec = ConvSpec(2, 5, 6, 9, 4, 1, 1)
    check(spec, random_weight(spec, 0.6, rng) * 4, name, config, activation)
    # Several blocks of channels: the activation comes after the last one only.
    if name == "cpu_pointwise":
        check(spec, random_weight(spec, 0.6, rng) * 4, name, {**config, "block": 1}, activation)


@pytest.mark.parametrize(("name", "config"), ACTIVATION_CONFIGS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_activations_of_special_values(activation: str, name: str, config: dict[str, Any]) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 6.0, 6.5, -1e-45, 1e-45, 3e38, -3e38, 1.0] * 4)
    values = values.astype(np.float32)
    expected = {
        "none": values,
        "relu": np.maximum(values, np.float32(0)),
        "relu6": np.minimum(np.maximum(values, np.float32(0)), np.float32(6)),
    }[activation]
    np.testing.assert_array_equal(apply(values, activation, name, config), expected)


@pytest.mark.parametrize(("name", "config"), [c for c in ACTIVATION_CONFIGS if c[0] != "dense"])
def test_silu_accuracy(name: str, config: dict[str, Any]) -> None:
    x = np.concatenate([np.linspace(-100, 100, 20_001), np.linspace(-1, 1, 2001), [0.0, 1e-38, 1e30, 3e38, -3e38]])
    x = x.astype(np.float32)
    expected = x.astype(np.float64) / (1 + np.exp(-np.maximum(x.astype(np.float64), -700)))
    actual = apply(x, "silu", name, config)
    assert np.isfinite(actual).all()
    # Relative to the value; below -87 the value itself is under 1e-35 (but for inputs that no network makes).
    usual = np.abs(x) <= 100
    np.testing.assert_allclose(actual[usual], expected[usual], rtol=5e-7, atol=1e-34)
    np.testing.assert_allclose(actual, expected, rtol=5e-7, atol=4.0)
    special = apply(np.array([np.nan, np.inf] * 24), "silu", name, config)
    assert np.isnan(special[::2]).all()
    assert (special[1::2] == np.inf).all()


# --- search spaces ---------------------------------------------------------------------------------------------

SPACES = {
    "ResNet 3x3": ((1, 64, 28, 28), (64, 64, 3, 3), 1, 1),
    "late 3x3": ((1, 256, 7, 7), (256, 256, 3, 3), 1, 1),
    "stride 2": ((4, 32, 15, 15), (16, 32, 3, 3), 2, 1),
    "pointwise": ((1, 96, 14, 14), (24, 96, 1, 1)),
    "1-D": ((1, 8, 1, 100), (8, 8, 1, 9), 1, (0, 4)),
    "depthwise": ((1, 384, 14, 14), (384, 1, 3, 3), 1, 1, 1, 384),
    "tiny": ((1, 1, 2, 2), (1, 1, 2, 2)),
    "vector": ((1, 500, 1, 1), (70, 500, 1, 1)),
}


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `prepare` return the packed weight."""
    for module in (cpu_direct, cpu_pointwise):
        monkeypatch.setattr(module, "_Runner", lambda *args: next(a for a in args if isinstance(a, PackedRows)))


def space_problem(name: str, density: float) -> tuple[ConvSpec, SparseWeight]:
    spec = ConvSpec.create(*SPACES[name])
    dense = random_weight(spec, density, np.random.default_rng(5))
    return spec, SparseWeight.from_dense(dense, spec.groups)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("threads", "density"), [(1, 0.5), (2, 0.02), (2, 0.1), (16, 0.1)])
def test_every_config_packs(space: str, name: str, threads: int, density: float, without_compiling: None) -> None:
    spec, weight = space_problem(space, density)
    if KERNELS[name].supports(spec, weight) is not None:
        return
    configs = list(KERNELS[name].configs(spec, weight, threads))
    assert configs
    default = KERNELS[name].default(spec, weight, threads)
    assert KERNELS[name].check(spec, weight, default) is None
    some = np.random.default_rng(0).permutation(len(configs))[:100]
    for config in [*(configs[i] for i in some), default]:
        nbytes = KERNELS[name].prepare(spec, weight, config).nbytes
        assert nbytes <= 1.3 * (8 * weight.nnz + 4 * (spec.k + 1)) + 4096


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPARSE)
def test_the_default_is_in_the_space(space: str, name: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hosts of any vector width: a tuner looks for it there."""
    monkeypatch.setattr(cpu, "vector_lanes", lambda: lanes)
    monkeypatch.setattr(cpu, "vector_registers", lambda: 32 if lanes == 16 else 16)
    for density in (0.02, 0.3):
        spec, weight = space_problem(space, density)
        if KERNELS[name].supports(spec, weight) is None:
            for threads in (1, 2):
                assert KERNELS[name].default(spec, weight, threads) in list(
                    KERNELS[name].configs(spec, weight, threads)
                )


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ("stride 2", "cpu_direct"),
        ("tiny", "cpu_direct"),
        ("pointwise", "cpu_direct"),
        ("pointwise", "cpu_pointwise"),
        ("pointwise", "cpu_columns"),
        ("vector", "cpu_vector"),
    ],
)
def test_some_configs_run(space: str, name: str) -> None:
    spec, weight = space_problem(space, 0.1)
    configs = list(KERNELS[name].configs(spec, weight, 2))
    for i in np.random.default_rng(2).choice(len(configs), 2):
        check(spec, weight.to_dense(), name, configs[i], threads=2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_default_is_valid(data: st.DataObject) -> None:
    spec = data.draw(conv_specs(max_pixels=400, max_channels=40))
    weight = data.draw(sparse_weights(spec))
    threads = data.draw(st.sampled_from([1, 2, 8, 64]))
    for chosen in KERNELS.values():
        if chosen.supports(spec, weight) is None:
            config = chosen.default(spec, weight, threads)
            assert chosen.check(spec, weight, config) is None
            assert all(isinstance(v, int | str) for v in config.values())


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("threads", [1, 4, 64])
@pytest.mark.parametrize(
    "problem",
    [
        ((1, 1024, 7, 7), (1024, 1, 3, 3), 1, 1, 1, 1024),
        ((1, 512, 14, 14), (512, 1, 5, 5), 2, 2, 1, 512),
        ((1, 2048, 7, 7), (128, 2048, 1, 1)),
        ((1, 512, 4, 4), (8, 512, 3, 3), 1, 1),
        ((1, 4096, 1, 1), (1000, 4096, 1, 1)),
    ],
)
def test_default_packs(problem: tuple[Any, ...], threads: int, density: float, without_compiling: None) -> None:
    spec = ConvSpec.create(*problem)
    weight = SparseWeight.from_dense(random_weight(spec, density, np.random.default_rng(0)), spec.groups)
    for name in SPARSE:
        if KERNELS[name].supports(spec, weight) is None:
            KERNELS[name].prepare(spec, weight, KERNELS[name].default(spec, weight, threads))


VALUES = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.sampled_from([4, 8, 16]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.text(max_size=6),
    st.from_regex(r"[0-9]{1,3}x[0-9]{1,3}", fullmatch=True),
    st.sampled_from(["copied", "shifted", "nchw", "nhwc", "coded"]),
    st.lists(st.integers(), max_size=2),
)
FIELDS = ["lanes", "chunk", "tile", "taps", "block_kb", "split", "vectors", "block", "layout", "entries"]
KEYS = st.one_of(st.sampled_from(FIELDS), st.text(max_size=3), st.integers(), st.none())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_check_never_raises(data: st.DataObject) -> None:
    spec = data.draw(conv_specs())
    weight = data.draw(sparse_weights(spec))
    chosen = data.draw(st.sampled_from(list(KERNELS.values())))
    names = list(chosen.default(spec, weight, 2)) if chosen.supports(spec, weight) is None else FIELDS
    right = st.fixed_dictionaries(dict.fromkeys(names, VALUES))
    config = data.draw(st.one_of(right, st.dictionaries(KEYS, VALUES), right.map(lambda c: {**c, "more": 1})))
    reason = chosen.check(spec, weight, config)  # type: ignore[arg-type]
    assert reason is None or reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lanes": 5}, "lanes must be 4, 8 or 16"),
        ({"chunk": 3}, "chunk a power of two"),
        ({"chunk": 16}, "chunk a power of two"),
        ({"taps": "shifted", "chunk": 4}, "shifted taps need chunk == lanes"),
        ({"taps": "moved"}, "taps must be one of"),
        ({"tile": "29x1"}, "1 to 28 accumulators"),
        ({"tile": "2"}, "tile must be like '7x2'"),
        ({"tile": 2}, "tile must be a text"),
        ({"tile": "10x1"}, "exceeds the output's height 9"),
        ({"tile": "1x3"}, "beyond the output's width 9"),
        ({"split": 5}, "exceeds the 4 output channels"),
        ({"split": True}, "split must be an integer"),
        ({"block_kb": 0}, "block_kb must be from 1"),
        ({"unknown": 1}, "expected the parameters"),
    ],
)
def test_direct_reasons(change: dict[str, Any], words: str) -> None:
    spec = ConvSpec.create((1, 3, 9, 9), (4, 3, 3, 3), 1, 1)
    weight = SparseWeight.from_dense(np.ones(spec.weight_shape, np.float32))
    direct = kernel("cpu_direct")
    config = direct.default(spec, weight, 1)
    config |= {"lanes": 8, "chunk": 8, "tile": "2x1", "taps": "copied", "block_kb": 8, "split": 1}
    assert direct.check(spec, weight, config) is None
    assert words in (direct.check(spec, weight, {**config, **change}) or "")
    with pytest.raises(ConfigError, match=r"kernel 'cpu_direct' cannot run config .* for n1_c3_h9_w9"):
        direct.prepare(spec, weight, {**config, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lanes": 6}, "lanes must be 4, 8 or 16"),
        ({"lanes": 16}, "at most the image's 9 pixels"),
        ({"vectors": 3}, "3 vectors exceed the image's 9 pixels"),
        ({"vectors": 29}, "vectors must be from 1 to 28"),
        ({"split": 5}, "exceeds the 4 output channels"),
        ({"block": 0}, "block must be from 1"),
    ],
)
def test_pointwise_reasons(change: dict[str, Any], words: str) -> None:
    spec = ConvSpec.create((1, 3, 3, 3), (4, 3, 1, 1))
    weight = SparseWeight.from_dense(np.ones(spec.weight_shape, np.float32))
    pointwise = kernel("cpu_pointwise")
    config = pointwise.default(spec, weight, 1) | {"lanes": 8, "vectors": 2, "block": 8, "split": 1}
    assert pointwise.check(spec, weight, config) is None
    assert words in (pointwise.check(spec, weight, {**config, **change}) or "")


def test_table() -> None:
    assert kernels_for("cpu") == list(KERNELS.values())
    assert kernels_for("abacus") == []
    for name, k in KERNELS.items():
        assert kernel(name) is k
        assert isinstance(k, base.Kernel)
        assert k.name == name
        assert k.version >= 1
    for bad in ("cpu", None, ["cpu_direct"]):
        with pytest.raises(ValueError, match="expected a kernel's name, one of"):
            kernel(bad)  # type: ignore[arg-type]


def test_host() -> None:
    assert cpu.vector_lanes() in (4, 8, 16)
    assert cpu.vector_registers() in (16, 32)
    first, second = cpu.cache_bytes()
    assert 4096 <= first <= second
    assert cpu.processor_name()
