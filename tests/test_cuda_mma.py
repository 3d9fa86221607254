"""The kernel that gathers columns for any tensor cores: emulated step by step, compiled, and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare import assert_as_tensor_cores, assert_right_on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quantized, random_weight, tensor_core_specs
from tensor_emulation import opened_deep, output_tiles, store_tile, swizzled, widened

from numbasparse import SparseWeight
from numbasparse.kernels import KERNELS, Config, ConfigError, two_four
from numbasparse.kernels import cuda_mma as room
from numbasparse.kernels.two_four import narrow
from numbasparse.quantization import CodebookQuantization
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec

KERNEL = KERNELS["cuda_mma"]
BASE: Config = {
    "batch": 32,
    "tile": "2x4",
    "warps": 4,
    "parts": 2,
    "channels": 8,
    "stages": 2,
    "copy": "async",
    "split": 1,
    "entries": "wide",
}


def config_of(**changes: int | str) -> Config:
    return {**BASE, **changes}


def a_gpu() -> bool:
    return cuda.reason_unavailable() is None and cuda.current().capability >= (8, 0)


@pytest.fixture(autouse=True)
def some_gpu() -> Iterator[None]:
    """An A100 to think of where there is no GPU."""
    if a_gpu():
        yield
    else:
        with cuda.assumed((8, 0)):
            yield


# --- the kernel in NumPy -------------------------------------------------------------------------------------


class Emulator:
    """What the kernel computes, from its packed weight and the constants of its code, address by address."""

    BASE = 3072
    """Where the aligned shared memory begins, somewhere."""

    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> None:
        self.spec, self.weight = spec, weight
        self.packed = room.pack(spec, weight, config)
        self.shape = room._shape(spec, weight, config, self.packed.jobs)
        self.g = self.shape.geometry

    def run(self, x: np.ndarray) -> np.ndarray:
        """Sums of all blocks and splits, (N, K, OH, OW) float32, without bias; NaN where none was written."""
        spec, g, shape = self.spec, self.g, self.shape
        halves = narrow(x, spec.dtype).transpose(1, 2, 3, 0)  # CHWN
        y = np.full((shape.split, spec.k, spec.out_h, spec.out_w, spec.n), np.nan, np.float32)
        for tile in output_tiles(shape):
            for warp in range(shape.warps):
                part, group = divmod(warp, shape.groups)
                sums = self._warp(halves, tile.block, tile.part, warp, tile.image, tile.corner)
                lines = sums.reshape(16, g.part_h, g.columns).transpose(1, 0, 2)
                own = replace(tile, oy=tile.oy + part * g.part_h)
                store_tile(y, lines, self.packed.rows[tile.block, 16 * group : 16 * group + 16], own, g.batch)
        return y.sum(axis=0).transpose(3, 0, 1, 2)

    def _warp(
        self, x: np.ndarray, block: int, split: int, warp: int, image: int, corner: tuple[int, int]
    ) -> np.ndarray:
        """Sums of one warp, (16, columns)."""
        g, shape, packed = self.g, self.shape, self.packed
        group, part = warp % shape.groups, warp // shape.groups
        sums = np.zeros((16, g.part_h * g.columns), np.float32)
        at, first = int(packed.firsts[block, group, split]), split * shape.own_jobs
        for number, job in enumerate(range(first, first + shape.own_jobs)):
            stage = self.BASE + shape.stages_at + number % shape.stages * shape.stage_bytes
            memory = self._copied(x, packed.channels[block, job], image, corner, stage)
            start = stage + part * g.part_h * self.spec.stride[0] * g.patch_w * g.pixel_bytes
            for _ in range(packed.counts[block, group, job]):
                self._step(sums, memory, packed.steps[at], start)
                at += 1
        assert at <= len(packed.steps) - room._AHEAD
        return sums

    def _copied(self, x: np.ndarray, channel: int, image: int, corner: tuple[int, int], stage: int) -> np.ndarray:
        """Shared memory when a job's copies have come: NaN where nothing was copied."""
        g, spec = self.g, self.spec
        memory = np.full(self.BASE + self.shape.shared_bytes, 0xFF, np.uint8).view(np.uint16)
        pixel = np.arange(g.patch_h * g.patch_w)[:, None]
        y, xs, n = corner[0] + pixel // g.patch_w, corner[1] + pixel % g.patch_w, image + np.arange(g.batch)
        inside = (y >= 0) & (y < spec.h) & (xs >= 0) & (xs < spec.w) & (n < spec.n)
        for j in range(min(g.channels, spec.c - channel)):
            values = x[channel + j, y.clip(0, spec.h - 1), xs.clip(0, spec.w - 1), n.clip(0, spec.n - 1)] * inside
            linear = stage + pixel * g.pixel_bytes + j * g.row_bytes + 2 * np.arange(g.batch)
            assert linear.max() < stage + self.shape.stage_bytes
            memory[swizzled(linear, g.row_bytes) // 2] = values
        return memory

    def _step(self, sums: np.ndarray, memory: np.ndarray, step: np.ndarray, start: int) -> None:
        g, spec = self.g, self.spec
        row, column = spec.stride[0] * g.patch_w * g.pixel_bytes, spec.stride[1] * g.pixel_bytes
        lanes, offsets = step[:-64].reshape(32, -1), step[-64:].view(np.int32)
        if self.shape.coded:
            lanes = narrow(room.coding_of(self.weight)[0], spec.dtype)[lanes].view(np.uint8)
        a = opened_deep(np.ascontiguousarray(lanes).view(np.uint32), spec.dtype)
        for i in range(g.part_h):
            for n in range(0, g.columns, 8):
                address = start + offsets + i * row + n // g.batch * column + n % g.batch * 2
                words = memory[swizzled(address[:, None] + 2 * np.arange(8), g.row_bytes) // 2]
                pairs = widened(np.ascontiguousarray(words).view(np.uint32), spec.dtype).reshape(16, 8)
                sums[:, i * g.columns + n : i * g.columns + n + 8] += a @ pairs


@st.composite
def problems(draw: st.DrawFn) -> tuple[ConvSpec, Config]:
    """Small problems with every option, and configs for them, most of which are valid."""
    spec = draw(tensor_core_specs((1, 5, 24)))
    config: Config = {
        "batch": draw(st.sampled_from([8, 16, 32, 64])),
        "tile": draw(st.sampled_from(["1x4", "2x4", "4x2", "4x3"])),
        "warps": draw(st.sampled_from([1, 2, 4])),
        "parts": draw(st.sampled_from([1, 2])),
        "channels": draw(st.sampled_from([1, 3, 8])),
        "stages": draw(st.integers(2, 3)),
        "copy": "async",
        "split": draw(st.sampled_from([1, 1, 2])),
        "entries": draw(st.sampled_from(["wide", "wide", "coded"])),
    }
    return spec, config


@given(problem=problems(), density=st.sampled_from([0.0, 0.05, 0.2, 1.0]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_emulated(problem: tuple[ConvSpec, Config], density: float, seed: int) -> None:
    spec, config = problem
    rng = np.random.default_rng(seed)
    weight = SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=seed % 3 == 0), spec.groups)
    if config["entries"] == "coded":
        if not weight.nnz:
            return
        weight = quantized(weight, 4, "codebook")
    if KERNEL.check(spec, weight, config) is not None:
        return
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(Emulator(spec, weight, config).run(x), spec, weight, x)


# --- packing -------------------------------------------------------------------------------------------------


def test_neighbours_are_in_different_banks() -> None:
    rng = np.random.default_rng(0)
    line = rng.permutation(400)
    starts = np.array([0, 0, 64, 79, 400])
    place = room.order_banks(starts, line)
    for begin, end in itertools.pairwise(starts):
        own = np.full(end - begin, -1)
        own[place[begin:end]] = line[begin:end]
        assert sorted(own) == sorted(line[begin:end])
    # Of many rows at random places nearly all eights are in eight banks.
    own = np.full(400 - 79, -1)
    own[place[79:]] = line[79:]
    whole = own[: len(own) // 8 * 8].reshape(-1, 8) % 8
    assert sum(len(set(eight)) == 8 for eight in whole) >= len(whole) - 8


def test_rows_that_are_alike_share_a_group() -> None:
    """Of a mask of vectors of sixteen, in any order, a group keeps the columns of one vector and no more."""
    rng = np.random.default_rng(0)
    spec = ConvSpec.create((8, 32, 6, 6), (64, 32, 3, 3), padding=1, dtype="float16")
    vectors = rng.random((4, 32, 3, 3)) < 0.25
    mask = np.repeat(vectors, 16, axis=0)[rng.permutation(64)]
    weight = SparseWeight.from_dense((rng.standard_normal(mask.shape) * mask).astype(np.float32))
    assert room.groups_of(weight).shape == (4, 16)
    assert room.kept_share(weight) == pytest.approx(vectors.mean())
    steps = sum(int(-(-vector.sum() // 16)) for vector in vectors)
    assert len(room.pack(spec, weight, config_of(channels=32)).steps) == steps + room._AHEAD


def test_codebooks_of_groups_of_channels() -> None:
    """The last group may be smaller than the others."""
    spec = ConvSpec.create((8, 16, 4, 4), (20, 16, 3, 3), padding=1, dtype="float16")
    rng = np.random.default_rng(0)
    single = SparseWeight.from_dense(random_weight(spec, 0.3, rng))
    weight = single.quantized(CodebookQuantization(3, "channel_group", 8))
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(Emulator(spec, weight, config_of(batch=8, entries="coded")).run(x), spec, weight, x)


def test_a_weight_is_ordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(32, 16, 8, 32, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    expected = room.groups_of(weight)
    monkeypatch.setattr(two_four, "order_rows", None)
    assert room.groups_of(weight) is expected


# --- configs and code ----------------------------------------------------------------------------------------


def spec_of(n: int, c: int, h: int, k: int, r: int, dtype: str = "float16", groups: int = 1, **rest: Any) -> ConvSpec:
    return ConvSpec.create((n, c, h, h), (k, c // groups, r, r), groups=groups, dtype=dtype, **rest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile": "4"}, "tile must be a text like '2x4'"),
        ({"batch": 24}, "batch must be 8, 16, 32 or 64"),
        ({"tile": "3x4"}, "2 parts cannot share the rows of a tile of 3"),
        ({"batch": 8, "tile": "2x3"}, "a multiple of 32, got 24"),
        ({"tile": "16x4"}, "512 sums of 256 threads exceed"),
        ({"channels": 200, "stages": 8, "tile": "2x2"}, "bytes of shared memory exceed"),
        ({"warps": 32, "parts": 2}, "at most 1024 threads, got 2048"),
        ({"split": 9}, "9 splits exceed the jobs"),
        ({"stages": 1}, "stages must be from 2 to 8"),
        ({"entries": "coded"}, "coded entries need a quantized weight"),
        ({"copy": "box"}, "copy 'box' needs compute capability 9.0"),
    ],
)
def test_bad_configs(changes: dict[str, Any], words: str) -> None:
    spec = spec_of(32, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    with cuda.assumed((8, 0)), pytest.raises(ConfigError, match=words):
        KERNEL.require(spec, weight, config_of(**changes))


def test_what_is_not_supported() -> None:
    spec = spec_of(32, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    assert KERNEL.supports(spec, weight) is None
    with cuda.assumed((7, 5)):
        assert "need compute capability 8.0, this GPU is 7.5" in str(KERNEL.supports(spec, weight))
    assert "float16 or bfloat16, got float32" in str(KERNEL.supports(spec_of(32, 8, 14, 16, 3, "float32"), weight))
    assert "a batch of a multiple of 8, got 4" in str(KERNEL.supports(spec_of(4, 8, 14, 16, 3), weight))
    large = SparseWeight.from_dense(weight.to_dense() * np.float32(1e6))
    assert "too large for float16" in str(KERNEL.supports(spec, large))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize(("n", "c", "h", "r"), [(8, 64, 56, 3), (32, 512, 7, 3), (128, 1024, 14, 1), (32, 3, 32, 7)])
def test_common_layers_have_configs(n: int, c: int, h: int, r: int, capability: tuple[int, int]) -> None:
    spec = spec_of(n, c, h, 64, r, padding=r // 2)
    weight = SparseWeight.from_dense(random_weight(spec, 0.05, np.random.default_rng(0)))
    with cuda.assumed(capability):
        suggested = KERNEL.suggest(spec, weight, 1, 8)
        assert len(suggested) == 8
        assert all(KERNEL.check(spec, weight, config) is None for config in suggested)
        assert KERNEL.default(spec, weight, 1) == suggested[0]
        assert KERNEL.check(spec, weight, room._FALLBACK) is None


CODES: list[Config] = [
    BASE,
    config_of(batch=64, tile="4x2"),
    config_of(batch=16, tile="2x8", warps=8, parts=1),
    config_of(batch=8, tile="8x8", stages=3),
    config_of(tile="2x7", split=2),
    config_of(tile="2x2", warps=16, parts=1, stages=3),
    config_of(entries="coded"),
    config_of(copy="box"),
    config_of(copy="box", batch=16, tile="2x4", warps=16, parts=1, channels=16, stages=3),
    config_of(copy="box", batch=8, tile="8x8", split=2),
    config_of(copy="box", entries="coded"),
]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(CODES[0], "bfloat16"), *((config, "float16") for config in CODES)],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.values())),
)
def test_code(config: Config, dtype: str, capability: tuple[int, int]) -> None:
    """Sums stay in registers."""
    if config["copy"] == "box" and capability < (9, 0):
        pytest.skip("no copy engine")
    spec = spec_of(64, 32, 28, 128, 3, dtype, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    if config["entries"] == "coded":
        weight = quantized(weight, 8, "linear")
    with cuda.assumed(capability):
        for ptx in KERNEL.ptx(spec, weight, config, "relu"):  # type: ignore[attr-defined]
            assert ".f64" not in ptx.text
            assert ".local" not in ptx.text
            cubin = cuda.assemble(ptx)
            # For 8.x ptxas keeps addresses of copies that come next, and spills some words; for 12.0 it reserves 8
            # bytes for the address of a tensor map, without a spill.
            assert cubin.local_bytes <= {8: 192, 9: 0}.get(capability[0], 8)
            assert cubin.registers <= 255


# --- on a GPU ------------------------------------------------------------------------------------------------

SAME: dict[str, Any] = {"padding": 1}
GPU_CASES: list[tuple[ConvSpec, Config, float]] = [
    *(
        (spec_of(64, 48, 14, 72, 3, dtype, **SAME), config_of(**changes), density)
        for dtype in ("float16", "bfloat16")
        for changes, density in (
            ({}, 0.1),
            ({}, 0.6),
            ({"batch": 64}, 0.1),
            ({"batch": 64, "tile": "4x2", "channels": 24}, 0.2),
            ({"batch": 16, "tile": "4x8"}, 0.1),
            ({"batch": 8, "tile": "8x8"}, 0.1),
            ({"tile": "2x7", "stages": 3}, 0.1),
            ({"tile": "4x4", "split": 3, "parts": 4, "warps": 2}, 0.1),
            ({"tile": "2x2", "warps": 16, "parts": 1, "stages": 4}, 0.02),
            ({"entries": "coded"}, 0.1),
            ({"entries": "coded", "split": 2}, 0.1),
        )
    ),
    (spec_of(64, 48, 14, 72, 3, **SAME), BASE, 0.0),
    (spec_of(40, 24, 9, 20, 3, stride=2, **SAME), config_of(tile="2x4"), 0.2),
    (spec_of(40, 24, 9, 20, 3, stride=2, **SAME), config_of(batch=8, tile="4x4"), 0.2),
    (spec_of(32, 24, 12, 20, 5, padding=2, dilation=2), config_of(channels=4), 0.2),
    (spec_of(32, 160, 8, 130, 1), config_of(channels=64), 0.1),
    (spec_of(32, 160, 8, 130, 1), config_of(channels=32, split=2), 0.1),
    (spec_of(32, 3, 32, 64, 7, stride=2, padding=3), config_of(channels=3), 0.2),
    (spec_of(32, 64, 8, 64, 3, groups=4, **SAME), config_of(), 0.2),
    (spec_of(32, 64, 8, 64, 3, groups=64, **SAME), config_of(), 0.6),
    (spec_of(8, 16, 7, 24, 3, **SAME), config_of(batch=8, tile="2x8"), 0.2),
    (spec_of(24, 16, 7, 24, 3, **SAME), config_of(batch=16), 0.2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("copy", ["async", "box"])
@pytest.mark.skipif(not a_gpu(), reason="needs an NVIDIA GPU of compute capability 8.0 or more")
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("number", range(len(GPU_CASES)))
def test_variants(number: int, with_residual: bool, copy: str) -> None:
    spec, config, density = GPU_CASES[number]
    config = {**config, "copy": copy}
    if copy == "box" and cuda.current().capability < (9, 0):
        pytest.skip("no copy engine")
    rng = np.random.default_rng(number)
    weight = SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=number % 2 == 1), spec.groups)
    linear = config["entries"] == "coded" and number % 2 == 1
    if config["entries"] == "coded":
        weight = quantized(weight, 8, "linear") if linear else quantized(weight, 4, "codebook")
    # Linear levels are whole numbers, which 16 bits hold; their scale comes in float32.
    assert_right_on_gpu(KERNEL, spec, weight, config, rng, with_residual, exact_weight=linear)
