"""The kernel for Hopper's sparse tensor cores: emulated step by step, compiled, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compare import assert_as_tensor_cores, assert_right_on_gpu, on_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quantized, random_weight, tensor_core_specs
from tensor_emulation import OutputTile, box, operand, store_tile, swizzled
from wgmma_emulation import Emulator, assert_code, case_name, code_cases

from numbasparse import SparseWeight
from numbasparse.kernels import KERNELS, Config, ConfigError
from numbasparse.kernels import cuda_wgmma as room
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec

KERNEL: Any = KERNELS["cuda_wgmma"]
BASE: Config = {
    "batch": 32,
    "tile": "2x4",
    "channels": 16,
    "stages": 2,
    "split": 1,
    "cluster": 1,
    "groups": 2,
    "turns": 1,
    "entries": "wide",
}


def config_of(**changes: int | str) -> Config:
    return {**BASE, **changes}


pytestmark = pytest.mark.usefixtures("a_hopper")


# --- the kernel in NumPy -------------------------------------------------------------------------------------


class ImageEmulator(Emulator):
    """Of activations in CHWN."""

    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> None:
        from numbasparse.codegen import ptx

        super().__init__(KERNEL, spec, weight, config)
        self.column = spec.stride[1] * self.g.pixel_bytes
        self.descriptor = ptx.matrix_descriptor(self.g.row_bytes, self.column)

    @property
    def count(self) -> int:
        return int(self.g.tile_h)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.spec.k, self.spec.out_h, self.spec.out_w, self.spec.n

    def result(self, y: np.ndarray) -> np.ndarray:
        return y.transpose(3, 0, 1, 2)

    def store(self, y: np.ndarray, sums: np.ndarray, rows: np.ndarray, tile: OutputTile) -> None:
        store_tile(y, sums, rows, tile, self.g.batch)

    def placed(self, x: np.ndarray, image: int, corner: tuple[int, int], channel: int) -> tuple[np.ndarray, np.ndarray]:
        g = self.g
        # What the tensor map makes of CHWN: H, W, C, N.
        copied = box(x.transpose(2, 3, 1, 0), (*corner, channel, image), (g.patch_h, g.patch_w, g.channels, g.batch))
        return copied.ravel(), 2 * np.arange(copied.size)

    def swizzle(self, linear: np.ndarray) -> np.ndarray:
        return swizzled(linear, self.g.row_bytes)

    def _line(self, i: int) -> int:
        """Offset of the first input row of row i of the tile."""
        return int(i * self.spec.stride[0] * self.g.patch_w * self.g.pixel_bytes)

    def operands(self, memory: np.ndarray, stage: int, word: int) -> np.ndarray:
        distance = word >> 14 & 0x3FFF
        high = self.descriptor.high + distance * self.descriptor.k_high
        made = []
        for i in range(self.g.tile_h):
            low = (stage + self._line(i) >> 4) + (word & 0x3FFF) + self.descriptor.low
            low += (distance << 16) * (not self.descriptor.k_high)
            made.append(operand(memory, low, high, self.g.n))
        return np.stack(made)

    def rest_operands(self, memory: np.ndarray, stage: int, offsets: np.ndarray) -> np.ndarray:
        g, eight = self.g, np.arange(4)
        lanes = eight // (g.batch // 8) * self.column + eight % (g.batch // 8) * 16
        made = np.zeros((g.tile_h, 4, 8, g.n), np.uint16)
        for i in range(g.tile_h):
            for n in range(0, g.n, 32):
                address = stage + offsets + self._line(i) + n // g.batch * self.column + n % g.batch * 2
                every = self.swizzle(address[..., None] + lanes)
                made[i, ..., n : n + 32] = memory.view(np.uint16)[every[..., None] // 2 + np.arange(8)].reshape(
                    4, 8, 32
                )
        return made


@st.composite
def problems(draw: st.DrawFn) -> tuple[ConvSpec, Config]:
    """Small problems with every option, and valid configs for them."""
    spec = draw(tensor_core_specs((1, 5, 24, 40)))
    config: Config = {
        "batch": draw(st.sampled_from([8, 16, 32, 64])),
        "tile": draw(st.sampled_from(["1x4", "2x4", "4x2", "4x3"])),
        "channels": draw(st.sampled_from([8, 16, 32])),
        "stages": draw(st.integers(2, 3)),
        "split": draw(st.sampled_from([1, 1, 2])),
        "cluster": draw(st.sampled_from([1, 1, 2])),
        "groups": draw(st.sampled_from([1, 2])),
        "turns": draw(st.sampled_from([1, 2])),
        "entries": draw(st.sampled_from(["wide", "coded"])),
    }
    return spec, config


@given(problem=problems(), density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_emulated(problem: tuple[ConvSpec, Config], density: float, seed: int) -> None:
    spec, config = problem
    rng = np.random.default_rng(seed)
    weight = SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=seed % 3 == 0), spec.groups)
    linear = config["entries"] == "coded" and seed % 2 == 1
    if config["entries"] == "coded" and weight.nnz:
        weight = (
            quantized(weight, 4 + seed % 5, "linear") if linear else quantized(weight, 3 + seed // 2 % 2, "codebook")
        )
    if KERNEL.check(spec, weight, config) is not None:
        return
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(ImageEmulator(spec, weight, config).run(x), spec, weight, x, exact_weight=linear)


def test_a_tile_whose_weight_does_not_fit_is_copied_again() -> None:
    """One channel block is full, the others are nearly empty: a stage has room for what is usual."""
    spec = ConvSpec.create((8, 256, 5, 6), (64, 256, 3, 3), padding=1, dtype="float16")
    rng = np.random.default_rng(1)
    dense = random_weight(spec, 0.02, rng)
    dense[:, 8:16] = random_weight(spec, 1.0, rng)[:, 8:16]
    weight = SparseWeight.from_dense(dense)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    emulator = ImageEmulator(spec, weight, config_of(batch=8, channels=8))
    assert emulator.packed.ranges[0, 0, 1] > 32
    assert_as_tensor_cores(emulator.run(x), spec, weight, x)


def starts(emulator: ImageEmulator) -> list[int]:
    return [int(start) for start in emulator.packed.jobs[:, 1]]


def test_a_rest_and_doubled_steps_are_emulated() -> None:
    """The random cases could miss the rest; here there is one, and at half of the weights doubled steps."""
    spec = ConvSpec.create((8, 32, 5, 6), (64, 32, 3, 3), padding=1, dtype="float16")
    rng = np.random.default_rng(1)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    for density, rest, doubled in ((0.15, True, False), (0.5, False, True)):
        weight = SparseWeight.from_dense(random_weight(spec, density, rng))
        for batch in (8, 16):
            emulator = ImageEmulator(spec, weight, config_of(batch=batch, channels=32))
            held = sum(int(emulator.packed.blobs[16 * start :][4:8].view(np.int32)[0]) for start in starts(emulator))
            assert (held > 0) == rest
            steps = max(int(emulator.packed.blobs[16 * start :][:4].view(np.int32)[0]) for start in starts(emulator))
            assert (steps > 9) == doubled
            assert_as_tensor_cores(emulator.run(x), spec, weight, x)


# --- configs and code ----------------------------------------------------------------------------------------


def spec_of(n: int, c: int, h: int, k: int, r: int, dtype: str = "float16", groups: int = 1, **rest: Any) -> ConvSpec:
    return ConvSpec.create((n, c, h, h), (k, c // groups, r, r), groups=groups, dtype=dtype, **rest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile": "4"}, "tile must be a text like '2x4'"),
        ({"batch": 24}, "batch must be 8, 16, 32 or 64"),
        ({"channels": 12}, "channels must be a multiple of 8"),
        ({"tile": "3x4"}, "2 warpgroups cannot share the rows of a tile of 3"),
        ({"tile": "2x9"}, "a multiple of 32 up to 256, got 288"),
        ({"tile": "8x8"}, "512 sums exceed a thread's registers"),
        ({"channels": 128, "stages": 8}, "bytes of shared memory exceed"),
        ({"cluster": 2}, "a cluster of 2 does not divide the 1 blocks"),
        ({"split": 9}, "9 splits exceed the 1 tiles"),
        ({"stages": 1}, "stages must be from 2 to 8"),
        ({"turns": 2}, "at most 2 warpgroups have registers enough, got 4"),
        ({"entries": "coded"}, "coded entries need a quantized weight"),
    ],
)
def test_bad_configs(changes: dict[str, Any], words: str) -> None:
    spec = spec_of(32, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    with pytest.raises(ConfigError, match=words):
        KERNEL.require(spec, weight, config_of(**changes))


def test_what_is_not_supported() -> None:
    rng = np.random.default_rng(0)
    spec = spec_of(32, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, rng))
    assert KERNEL.supports(spec, weight) is None
    with cuda.assumed((10, 0)):
        assert "compute capability 9.0 only, this GPU is 10.0" in str(KERNEL.supports(spec, weight))
    with cuda.assumed((9, 0)):
        assert "float16 or bfloat16, got float32" in str(KERNEL.supports(spec_of(32, 8, 14, 16, 3, "float32"), weight))
        assert "a batch of a multiple of 8, got 4" in str(KERNEL.supports(spec_of(4, 8, 14, 16, 3), weight))
        large = SparseWeight.from_dense(weight.to_dense() * np.float32(1e6))
        assert "too large for float16" in str(KERNEL.supports(spec, large))
        assert KERNEL.supports(spec_of(32, 8, 14, 16, 3, "bfloat16", padding=1), large) is None


@pytest.mark.parametrize("n", [8, 32, 128])
@pytest.mark.parametrize(("c", "h", "r"), [(64, 56, 3), (512, 7, 3), (1024, 14, 1), (3, 32, 7)])
def test_common_layers_have_configs(n: int, c: int, h: int, r: int) -> None:
    spec = spec_of(n, c, h, 64, r, padding=r // 2)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    suggested = KERNEL.suggest(spec, weight, 1, 8)
    assert len(suggested) == 8
    assert all(KERNEL.check(spec, weight, config) is None for config in suggested)
    assert KERNEL.default(spec, weight, 1) == suggested[0]
    assert KERNEL.check(spec, weight, room._FALLBACK) is None


CODES: list[Config] = [
    BASE,
    config_of(batch=64, channels=24),
    config_of(batch=16, tile="4x8"),
    config_of(batch=8, tile="8x8"),
    config_of(tile="2x7", split=2, cluster=2),
    config_of(groups=1),
    config_of(groups=1, turns=2),
]


@pytest.mark.parametrize(("config", "dtype", "form"), code_cases(CODES), ids=case_name)
def test_code(config: Config, dtype: str, form: tuple[int, str] | None) -> None:
    assert_code(KERNEL, spec_of(64, 64, 28, 128, 3, dtype, padding=1), config, form)


# --- on a GPU ------------------------------------------------------------------------------------------------

SAME: dict[str, Any] = {"padding": 1}
GPU_CASES: list[tuple[ConvSpec, Config, float]] = [
    *(
        (spec_of(64, 48, 14, 72, 3, dtype, **SAME), config_of(**changes), density)
        for dtype in ("float16", "bfloat16")
        for changes, density in (
            ({}, 0.1),
            ({}, 0.2),
            ({}, 0.6),
            ({"batch": 64}, 0.1),
            ({"batch": 64, "tile": "4x2", "channels": 24}, 0.2),
            ({"batch": 16, "tile": "4x8"}, 0.1),
            ({"batch": 8, "tile": "8x8"}, 0.1),
            ({"tile": "2x7", "stages": 3}, 0.1),
            ({"tile": "4x4", "split": 3}, 0.1),
            ({"cluster": 2}, 0.1),
            ({"groups": 1}, 0.1),
            ({"groups": 1, "turns": 2}, 0.1),
            ({"groups": 1, "turns": 2, "cluster": 2, "tile": "1x8", "split": 2}, 0.2),
            ({"groups": 1, "tile": "1x8", "cluster": 2, "stages": 3}, 0.2),
            ({"cluster": 2, "tile": "4x4", "split": 2, "stages": 3}, 0.2),
        )
    ),
    (spec_of(64, 48, 14, 72, 3, **SAME), BASE, 0.0),
    (spec_of(40, 24, 9, 20, 3, stride=2, **SAME), config_of(tile="2x4"), 0.2),
    (spec_of(40, 24, 9, 20, 3, stride=2, **SAME), config_of(batch=8, tile="4x4"), 0.2),
    (spec_of(32, 24, 12, 20, 5, padding=2, dilation=2), config_of(channels=8), 0.2),
    (spec_of(32, 160, 8, 130, 1), config_of(channels=128), 0.1),
    (spec_of(32, 160, 8, 130, 1), config_of(channels=64, split=2), 0.1),
    (spec_of(32, 3, 32, 64, 7, stride=2, padding=3), config_of(channels=8), 0.2),
    (spec_of(32, 64, 8, 64, 3, groups=4, **SAME), config_of(), 0.2),
    (spec_of(32, 160, 8, 256, 1), config_of(channels=64, cluster=4), 0.1),
    (spec_of(32, 64, 8, 300, 3, groups=2, **SAME), config_of(cluster=3, channels=8), 0.02),
    (spec_of(8, 16, 7, 24, 3, **SAME), config_of(batch=8, tile="2x8"), 0.2),
    (spec_of(24, 16, 7, 24, 3, **SAME), config_of(batch=16), 0.2),
]


@pytest.mark.parametrize("number", range(len(GPU_CASES)))
def test_cases_for_a_gpu_are_valid(number: int) -> None:
    """Where there is none: nobody should find out there."""
    spec, config, density = GPU_CASES[number]
    weight = SparseWeight.from_dense(random_weight(spec, density, np.random.default_rng(number)), spec.groups)
    assert KERNEL.supports(spec, weight) is None
    assert KERNEL.check(spec, weight, config) is None


@on_hopper
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("number", range(len(GPU_CASES)))
def test_variants(number: int, with_residual: bool) -> None:
    spec, config, density = GPU_CASES[number]
    rng = np.random.default_rng(number)
    weight = SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=number % 2 == 1), spec.groups)
    assert_right_on_gpu(KERNEL, spec, weight, config, rng, with_residual)


@on_hopper
@pytest.mark.parametrize(("bits", "kind"), [(8, "linear"), (4, "linear"), (4, "codebook"), (3, "codebook")])
@pytest.mark.parametrize("number", [*range(6), 9, 18])
def test_codes(number: int, bits: int, kind: str) -> None:
    spec, config, density = GPU_CASES[number]
    rng = np.random.default_rng(number)
    weight = quantized(SparseWeight.from_dense(random_weight(spec, density, rng), spec.groups), bits, kind)
    config = {**config, "entries": "coded"}
    # Linear levels are whole numbers, which 16 bits hold; their scale comes in float32.
    assert_right_on_gpu(KERNEL, spec, weight, config, rng, number % 2 == 1, exact_weight=kind == "linear")
