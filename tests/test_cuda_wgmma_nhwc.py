"""The kernel for Hopper's sparse tensor cores and NHWC: emulated step by step, compiled, and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import assert_as_tensor_cores, assert_right_on_gpu, on_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quantized, random_weight, two_of_four
from tensor_emulation import OutputTile, box, k_major_operand, opened_dense, swizzled
from wgmma_emulation import Emulator, assert_code, case_name, code_cases

from numbasparse import SparseWeight
from numbasparse.channel_order import order_channels
from numbasparse.kernels import KERNELS, Config, ConfigError, wgmma_shape
from numbasparse.kernels import cuda_wgmma_nhwc as room
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, has_layout, to_layout
from numbasparse.spec import ConvSpec

KERNEL: Any = KERNELS["cuda_wgmma_nhwc"]
BASE: Config = {
    "batch": 1,
    "tile": "8x8",
    "channels": 32,
    "stages": 2,
    "split": 1,
    "groups": 1,
    "stack": 1,
    "turns": 1,
    "entries": "wide",
    "steps": "listed",
}


def config_of(**changes: int | str) -> Config:
    return {**BASE, **changes}


pytestmark = pytest.mark.usefixtures("a_hopper")


# --- the kernel in NumPy -------------------------------------------------------------------------------------


class PixelEmulator(Emulator):
    """Of activations in NHWC."""

    def __init__(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> None:
        super().__init__(KERNEL, spec, weight, config)
        self.whole = spec

    def run(self, x: np.ndarray) -> np.ndarray:
        n, c, h, w = self.spec.x_shape
        x = np.pad(x, ((0, 0), (0, c - x.shape[1]), (0, 0), (0, 0)))
        return super().run(x.transpose(0, 2, 3, 1).reshape(n, h, w, c).transpose(0, 3, 1, 2))

    @property
    def count(self) -> int:
        return int(self.g.pieces * self.g.groups)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.spec.n, self.spec.out_h, self.spec.out_w, self.spec.k

    def result(self, y: np.ndarray) -> np.ndarray:
        n, k, h, w = self.whole.out_shape
        return y.reshape(n, h, w, k).transpose(0, 3, 1, 2)

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Image, row and column of every piece, one warpgroup's behind another's."""
        g = self.g
        strips, own = g.tile_w // 8, g.group_origin
        return [
            (i // strips + group * own[0], group * own[1], i % strips * 8 + group * own[2])
            for group in range(g.groups)
            for i in range(g.pieces)
        ]

    def store(self, y: np.ndarray, sums: np.ndarray, rows: np.ndarray, tile: OutputTile) -> None:
        for (image, row, column), own in zip(self._pieces(), sums, strict=True):
            for n in range(self.g.n):
                at = (tile.part, tile.image + image, tile.oy + row + n // 8, tile.ox + column + n % 8)
                if at[1] < y.shape[1] and at[2] < y.shape[2] and at[3] < y.shape[3]:
                    assert np.isnan(y[at][rows[rows >= 0]]).all()
                    y[at][rows[rows >= 0]] = own[rows >= 0, n]

    def placed(self, x: np.ndarray, image: int, corner: tuple[int, int], channel: int) -> tuple[np.ndarray, np.ndarray]:
        g, words, where = self.g, [], []
        width, spec, each = g.row_bytes // 2, self.spec, g.planes // (g.phases[0] * g.phases[1])
        for plane in range(g.planes):
            i, j = divmod(plane // each, g.phases[1])
            y = corner[0] + i * spec.dilation[0] % spec.stride[0]
            left = corner[1] + j * spec.dilation[1] % spec.stride[1]
            origin = (image, y, left, channel + plane % each * width)
            copied = box(x.transpose(0, 2, 3, 1), origin, (g.batch, g.patch_h, g.patch_w, width), (1, *spec.stride, 1))
            words.append(copied.ravel())
            where.append(plane * g.plane_bytes + 2 * np.arange(copied.size))
        return np.concatenate(words), np.concatenate(where)

    def swizzle(self, linear: np.ndarray) -> np.ndarray:
        return swizzled(linear, self.g.row_bytes)

    def _starts(self, stage: int) -> list[int]:
        g = self.g
        return [
            stage + image * g.image_bytes + row * g.line_bytes + column * g.row_bytes
            for image, row, column in self._pieces()
        ]

    def operands(self, memory: np.ndarray, stage: int, word: int) -> np.ndarray:
        from numbasparse.codegen import ptx

        high = ptx.k_major_descriptor(self.g.row_bytes, self.g.line_bytes)
        made = [k_major_operand(memory, (start >> 4) + word, high, self.g.n) for start in self._starts(stage)]
        return np.stack(made)

    def rest_operands(self, memory: np.ndarray, stage: int, offsets: np.ndarray) -> np.ndarray:
        g, pixel = self.g, np.arange(8)
        made = np.zeros((self.count, 4, 8, g.n), np.uint16)
        pairs = offsets[:, :4, None]
        assert (offsets[:, 4:] == offsets[:, :4]).all()
        for i, start in enumerate(self._starts(stage)):
            for eight in range(g.rows):
                address = start + pairs + pixel * g.row_bytes + eight * g.line_bytes
                words = memory.view(np.uint16)[self.swizzle(address)[..., None] // 2 + np.arange(2)]
                # Of each 16 rows [pair][pixel][two channels].
                made[i, :, :, 8 * eight : 8 * eight + 8] = words.transpose(0, 1, 3, 2).reshape(4, 8, 8)
        return made


@st.composite
def problems(draw: st.DrawFn) -> tuple[ConvSpec, Config]:
    """Small problems with every option, and configs for them."""
    groups = draw(st.sampled_from([1, 1, 2]))
    r, s = draw(st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 3), (5, 5)]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    c, k = (
        draw(st.sampled_from([3, 8, 24, 40, 72, 136] if groups == 1 else [8, 24, 40])),
        draw(st.sampled_from([4, 12, 64, 72, 132])),
    )
    h, w = draw(st.integers(5, 17)), draw(st.integers(5, 17))
    padding = draw(st.sampled_from([0, 1, 2]))
    n = draw(st.integers(1, 5))
    if h + 2 * padding < (r - 1) * dilation + 1 or w + 2 * padding < (s - 1) * dilation + 1:
        r = s = 1
    spec = ConvSpec.create(
        (n, c * groups, h, w),
        (k * groups, c, r, s),
        draw(st.sampled_from([1, 1, 2, (1, 2), 3])),
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
    )
    config: Config = {
        "batch": draw(st.sampled_from([1, 2, 4])),
        "tile": draw(st.sampled_from(["7x8", "8x8", "4x16", "1x8", "14x8", "6x32"])),
        "channels": draw(st.sampled_from([32, 64, 128])),
        "stages": draw(st.integers(2, 3)),
        "split": draw(st.sampled_from([1, 1, 2])),
        "groups": draw(st.sampled_from([1, 2])),
        "stack": draw(st.sampled_from([1, 1, 2])),
        "turns": draw(st.sampled_from([1, 2])),
        "entries": draw(st.sampled_from(["wide", "coded"])),
        "steps": draw(st.sampled_from(["listed", "every"])),
    }
    return spec, config


@given(problem=problems(), density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_emulated(problem: tuple[ConvSpec, Config], density: float, seed: int) -> None:
    spec, config = problem
    rng = np.random.default_rng(seed)
    dense = random_weight(spec, density, rng, empty_rows=seed % 3 == 0)
    weight = SparseWeight.from_dense(two_of_four(dense) if seed % 5 < 2 else dense, spec.groups)
    linear = config["entries"] == "coded" and seed % 2 == 1
    if config["entries"] == "coded" and weight.nnz:
        weight = (
            quantized(weight, 4 + seed % 5, "linear") if linear else quantized(weight, 3 + seed // 2 % 2, "codebook")
        )
    if KERNEL.check(spec, weight, config) is not None:
        return
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(PixelEmulator(spec, weight, config).run(x), spec, weight, x, exact_weight=linear)


@pytest.mark.parametrize("steps", ["listed", "every"])
@pytest.mark.parametrize("k", [72, 132])
def test_a_stack_shares_tiles(k: int, steps: str) -> None:
    """Two blocks of output channels take every tile together, also where one of them has no weights for it."""
    spec = spec_of(2, 96, 9, k, 3, padding=1)
    rng = np.random.default_rng(4)
    dense = random_weight(spec, 0.12, rng)
    dense[:64, 32:64] = 0
    weight = SparseWeight.from_dense(dense)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    emulator = PixelEmulator(spec, weight, config_of(tile="9x8", stack=2, steps=steps))
    blocks = -(-k // 128)
    assert emulator.packed.rows.shape == (2 * blocks, 64)
    assert emulator.packed.ranges.shape == (blocks, 1, 2)
    assert emulator.packed.ranges[0, 0].tolist() == [0, 3]
    assert emulator.packed.jobs[:3, 0].tolist() == [0, 32, 64]
    assert (emulator.packed.jobs[:, 3] < emulator.packed.jobs[:, 2]).all()
    assert_as_tensor_cores(emulator.run(x), spec, weight, x)


@pytest.mark.parametrize(("c", "r", "listed"), [(64, 1, True), (128, 1, False), (64, 3, False)])
def test_lists_are_offered_where_steps_are_few(c: int, r: int, listed: bool) -> None:
    spec = spec_of(8, c, 14, 128, r, padding=r // 2)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    space = KERNEL.space(spec, weight, 1)
    assert ("listed" in space["steps"]) == listed
    suggested = KERNEL.suggest(spec, weight, 1, 10)
    assert len(suggested) == 10
    assert {config["steps"] for config in suggested} == ({"listed", "every"} if listed else {"every"})


def test_a_rest_and_doubled_steps_are_emulated() -> None:
    """The random cases could miss the rest; here there is one, and at half of the weights doubled steps."""
    spec = spec_of(2, 64, 7, 64, 3, padding=1)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    for density, rest, doubled in ((0.12, True, False), (0.6, False, True)):
        weight = SparseWeight.from_dense(random_weight(spec, density, rng))
        emulator = PixelEmulator(spec, weight, config_of(batch=2, channels=64))
        starts = [int(start) for start in emulator.packed.jobs[:, 1]]
        counts = [emulator.packed.blobs[16 * start :][:8].view(np.int32) for start in starts]
        assert (max(int(c[1]) for c in counts) > 0) == rest
        assert (max(int(c[0]) for c in counts) == 36) == doubled
        assert_as_tensor_cores(emulator.run(x), spec, weight, x)


@pytest.mark.parametrize("density", [0.05, 0.12, 0.2])
@pytest.mark.parametrize(("c", "channels", "r"), [(64, 32, 3), (96, 64, 3), (72, 128, 1), (64, 64, 2)])
def test_every_step_is_known(c: int, channels: int, r: int, density: float) -> None:
    """Of all masks; without a rest where two of four neighbours at most are there."""
    spec = spec_of(2, c, 9, 72, r, padding=r // 2)
    rng = np.random.default_rng(c + r)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    dense = random_weight(spec, density, rng)
    dense[5, 4:7] = 1.0
    config = config_of(tile="10x8", channels=channels, steps="every")
    for own, rest in ((two_of_four(dense), False), (dense, True)):
        weight = SparseWeight.from_dense(own)
        emulator = PixelEmulator(spec, weight, config)
        assert emulator.shape.every
        assert (emulator.shape.rest, wgmma_shape.facts_of(weight, config).rest) == (rest, rest)
        assert len(emulator.g.run().words) == r * r * channels // 32
        assert_as_tensor_cores(emulator.run(x), spec, weight, x)


@pytest.mark.parametrize("vector", [1, 16])
def test_what_the_rest_needs_is_counted(vector: int) -> None:
    """Of a weight as it is, and with its channels in order, against the chunks that are packed."""
    spec = spec_of(2, 64, 7, 64, 3, padding=1)
    rng = np.random.default_rng(5)
    mask = np.repeat(rng.random((64 // vector, 64, 3, 3)) < 0.14, vector, axis=0)
    dense = (mask * rng.uniform(0.5, 1, spec.weight_shape)).astype(np.float32)
    rooms = []
    for order in (np.arange(64), order_channels(SparseWeight.from_dense(dense))):
        weight = SparseWeight.from_dense(np.ascontiguousarray(dense[:, order]))
        facts = wgmma_shape.facts_of(weight, BASE)
        held = (dense[:, order] != 0).reshape(64, 16, 4, 9).sum(axis=2)
        assert facts.over == np.maximum(held - 2, 0).mean()
        emulator = PixelEmulator(spec, weight, config_of(steps="every"))
        needed = 0
        for start in emulator.packed.jobs[:, 1]:
            blob = emulator.packed.blobs[16 * start :]
            chunks, first = int(blob[4:8].view(np.int32)[0]), wgmma_shape.HEADER_BYTES + emulator.shape.steps_bytes(9)
            for chunk in blob[first:][: chunks * wgmma_shape.CHUNK_BYTES].reshape(chunks, wgmma_shape.CHUNK_BYTES):
                values = opened_dense(chunk[:1024].view(np.uint32).reshape(128, 2), "float16").reshape(4, 16, 4, 2)
                needed += int((values != 0).any(axis=(1, 3)).sum())
        # A pair that is there already serves others too, so that fewer may do.
        cells = 4 * 16 * 9 * 2
        assert needed <= round(facts.pairs * cells) <= 1.25 * needed
        rooms.append(emulator.shape.room[1])
    assert rooms[1] < rooms[0]


def test_chunks_without_room_come_with_every_step_again() -> None:
    """One part has far more of a rest than its share: a second job of it has steps of zeros."""
    spec = spec_of(2, 256, 7, 128, 3, padding=1)
    rng = np.random.default_rng(3)
    dense = random_weight(spec, 0.02, rng)
    dense[:16, :16] = 1.0
    weight = SparseWeight.from_dense(dense)
    emulator = PixelEmulator(spec, weight, config_of(steps="every"))
    assert emulator.packed.ranges[0, 0, 1] > 8
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(emulator.run(x), spec, weight, x)


@pytest.mark.parametrize(
    ("bits", "kind", "form", "lane_bytes"),
    [
        (8, "linear", "integers", 8),
        (4, "linear", "nibbles", 4),
        (4, "codebook", "flagged", 8),
        (3, "codebook", "nibbles", 4),
    ],
)
def test_forms_of_codes(bits: int, kind: str, form: str, lane_bytes: int) -> None:
    spec = spec_of(2, 64, 7, 64, 3, padding=1)
    rng = np.random.default_rng(1)
    single = SparseWeight.from_dense(random_weight(spec, 0.15, rng))
    weight, config = quantized(single, bits, kind), config_of(entries="coded")
    entries = wgmma_shape.entries_of(weight, config)
    assert (entries.form, entries.scaled, entries.metadata) == (form, kind == "linear", 128 * lane_bytes)
    assert KERNEL.space(spec, weight, 1)["entries"] == ("wide", "coded")
    assert KERNEL.space(spec, single, 1)["entries"] == ("wide",)
    emulator = PixelEmulator(spec, weight, config)
    assert emulator.packed.nbytes < KERNEL.pack(spec, weight, BASE).nbytes * (0.75 if lane_bytes == 8 else 0.55)
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(emulator.run(x), spec, weight, x, exact_weight=kind == "linear")


def test_large_codebooks_are_not_decoded() -> None:
    spec = spec_of(2, 64, 7, 64, 3, padding=1)
    weight = quantized(SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(1))), 6, "codebook")
    assert "the weight has 64 values, coded entries know 16" in str(
        KERNEL.check(spec, weight, config_of(entries="coded"))
    )
    assert KERNEL.space(spec, weight, 1)["entries"] == ("wide",)


def test_pictures_take_few_steps() -> None:
    """Three channels: a step for each tap, and what is over two of them in the rest, for which there is room."""
    spec = spec_of(2, 3, 9, 64, 3, padding=1)
    rng = np.random.default_rng(2)
    weight = SparseWeight.from_dense(random_weight(spec, 1.0, rng))
    emulator = PixelEmulator(spec, weight, config_of(tile="9x8"))
    assert emulator.packed.ranges[..., 1].max() == 1
    assert emulator.packed.blobs[:8].view(np.int32).tolist() == [9, 3]
    x = rng.standard_normal(spec.x_shape).astype(np.float32)
    assert_as_tensor_cores(emulator.run(x), spec, weight, x)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "CHWN"])
def test_channels_are_filled_up(layout: Layout) -> None:
    """What is before the kernel, with nothing in its place."""
    torch = pytest.importorskip("torch")
    spec = spec_of(2, 3, 5, 8, 3, padding=1)
    x = to_layout(torch.randn(2, 3, 5, 5, dtype=torch.float16), layout)

    def apply(given: Any, *rest: Any) -> Any:
        assert has_layout(given, "NHWC")
        assert torch.equal(given[:, :3], x)
        assert not given[:, 3:].any()
        return (given.shape, *rest)

    inner: Any = SimpleNamespace(takes="NHWC", gives="NHWC", nbytes=1, functions=(), workspace=10, apply=apply)
    runner = room._FillingRunner(spec, inner)
    assert runner.apply(x, None, None, "NCHW") == ((2, 8, 5, 5), None, None, "NCHW")
    assert runner.workspace == 10 + 2 * 2 * 8 * 25


# --- configs and code ----------------------------------------------------------------------------------------


def spec_of(n: int, c: int, h: int, k: int, r: int, dtype: str = "float16", groups: int = 1, **rest: Any) -> ConvSpec:
    return ConvSpec.create((n, c, h, h), (k, c // groups, r, r), groups=groups, dtype=dtype, **rest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile": "8"}, "tile must be a text like '14x8'"),
        ({"tile": "8x12"}, "its columns a multiple of 8"),
        ({"channels": 48}, "channels must be 32 or a multiple of 64, got 48"),
        ({"tile": "7x8", "groups": 2}, "2 warpgroups can share neither 1 pieces nor 7 rows"),
        ({"tile": "40x8"}, "at most 32 rows of 8 pixels, got 40"),
        ({"tile": "4x16", "batch": 3, "groups": 2}, "2 warpgroups cannot share 2 strips of 3 images evenly"),
        ({"tile": "32x16"}, "256 sums exceed a thread's registers"),
        ({"channels": 256, "stages": 8}, "bytes of shared memory exceed"),
        ({"split": 9}, "9 splits exceed the 1 tiles"),
        ({"stages": 1}, "stages must be from 2 to 8"),
        ({"tile": "8x16", "groups": 2, "turns": 2}, "at most 2 warpgroups have registers enough, got 4"),
        (
            {"tile": "8x8", "turns": 2, "stages": 3},
            "2 warpgroups that take turns need as many stages, or twice as many",
        ),
        ({"entries": "coded"}, "coded entries need a quantized weight"),
        ({"entries": "coded", "steps": "every"}, "every step of a tile needs entries 'wide', got 'coded'"),
        ({"steps": "some"}, "steps must be one of"),
        ({"stack": 2}, "16 output channels are no stack of blocks of 64"),
        ({"stack": 3}, "stack must be from 1 to 2"),
        ({"channels": 256, "steps": "every"}, "made for 2 to 64 of them, got 72"),
    ],
)
def test_bad_configs(changes: dict[str, Any], words: str) -> None:
    spec = spec_of(3, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    with pytest.raises(ConfigError, match=words):
        KERNEL.require(spec, weight, config_of(**changes))


def test_what_is_not_supported() -> None:
    rng = np.random.default_rng(0)
    spec = spec_of(3, 8, 14, 16, 3, padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, rng))
    with cuda.assumed((10, 0)):
        assert "compute capability 9.0 only, this GPU is 10.0" in str(KERNEL.supports(spec, weight))
    with cuda.assumed((9, 0)):
        assert KERNEL.supports(spec, weight) is None
        assert "float16 or bfloat16, got float32" in str(KERNEL.supports(spec_of(3, 8, 14, 16, 3, "float32"), weight))
        assert KERNEL.supports(spec_of(3, 8, 14, 16, 3, stride=2), weight) is None
        assert "got a stride of (9, 9)" in str(KERNEL.supports(spec_of(3, 8, 14, 16, 3, stride=9), weight))
        grouped = spec_of(3, 24, 14, 16, 3, groups=2)
        in_groups = SparseWeight.from_dense(random_weight(grouped, 0.2, rng), 2)
        assert KERNEL.supports(grouped, in_groups) is None
        grouped = spec_of(3, 20, 14, 16, 3, groups=2)
        in_groups = SparseWeight.from_dense(random_weight(grouped, 0.2, rng), 2)
        assert "got 20 and 8" in str(KERNEL.supports(grouped, in_groups))
        assert "got 8 and 6" in str(KERNEL.supports(spec_of(3, 8, 14, 6, 3), weight))
        assert "bytes of shared memory exceed" in str(KERNEL.supports(spec_of(3, 8, 14, 16, 7), weight))


@pytest.mark.parametrize("n", [1, 3, 8, 32])
@pytest.mark.parametrize(("c", "h", "r"), [(64, 56, 3), (512, 7, 3), (1024, 14, 1), (16, 32, 5)])
def test_common_layers_have_configs(n: int, c: int, h: int, r: int) -> None:
    spec = spec_of(n, c, h, 64, r, padding=r // 2)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    suggested = KERNEL.suggest(spec, weight, 1, 8)
    assert len(suggested) == 8
    assert all(KERNEL.check(spec, weight, config) is None for config in suggested)
    assert KERNEL.default(spec, weight, 1) == suggested[0]
    assert KERNEL.check(spec, weight, room._FALLBACK) is None


def test_steps_are_listed_where_many_are_empty() -> None:
    spec = spec_of(2, 128, 7, 128, 3, padding=1)
    dense = random_weight(spec, 0.1, np.random.default_rng(0))
    assert KERNEL.space(spec, SparseWeight.from_dense(dense), 1)["steps"] == ("every",)
    some = random_weight(spec, 0.4, np.random.default_rng(0))
    assert KERNEL.space(spec, SparseWeight.from_dense(some), 1)["steps"] == ("listed", "every")
    dense[:64, 32:64] = 0.0
    assert KERNEL.space(spec, SparseWeight.from_dense(dense), 1)["steps"] == ("listed", "every")


def test_stages_are_left_late_where_another_is_there() -> None:
    spec = spec_of(2, 128, 14, 64, 3, padding=1)
    dense = random_weight(spec, 0.1, np.random.default_rng(0))
    for own in (two_of_four(dense), dense):
        facts = wgmma_shape.facts_of(SparseWeight.from_dense(own), BASE)
        for turns, stages, steps in ((1, 2, "every"), (2, 2, "every"), (2, 4, "every"), (1, 2, "listed")):
            shape = KERNEL.shape(spec, config_of(turns=turns, stages=stages, steps=steps), facts)
            # A warpgroup whose next job comes into the stage of its last would wait for itself.
            assert shape.late == (steps == "every" and stages > turns)


CODES: list[Config] = [
    BASE,
    config_of(tile="28x8", groups=2, batch=2),
    config_of(tile="14x16", channels=64),
    config_of(tile="16x8", groups=2, split=2, stages=3),
    config_of(tile="14x16", turns=2),
    config_of(tile="14x16", stack=2),
]
EVERY: list[Config] = [
    config_of(tile="28x8", batch=2, groups=2, steps="every"),
    config_of(tile="14x16", channels=64, steps="every"),
    config_of(tile="14x16", turns=2, split=2, steps="every"),
    config_of(tile="14x16", stack=2, steps="every"),
]


@pytest.mark.parametrize(("config", "dtype", "form"), code_cases(CODES), ids=case_name)
def test_code(config: Config, dtype: str, form: tuple[int, str] | None) -> None:
    assert_code(KERNEL, spec_of(8, 128, 28, 128, 3, dtype, padding=1), config, form)


@pytest.mark.parametrize("config", EVERY, ids=case_name)
@pytest.mark.parametrize("rest", [False, True], ids=["two of four", "rest"])
def test_code_of_every_step(config: Config, rest: bool) -> None:
    # A residual needs most registers where there is a rest too.
    residuals = (False, True) if rest else (False,)
    assert_code(KERNEL, spec_of(8, 128, 28, 128, 3, padding=1), config, None, rest, residuals)


@pytest.mark.parametrize(
    ("r", "config", "late", "rest"),
    [
        ((1, 1), config_of(tile="32x8", channels=64), False, False),
        ((1, 1), config_of(tile="32x8", channels=64, stages=4, stack=2), False, True),
        ((3, 1), config_of(tile="16x8"), False, False),
        ((1, 1), config_of(tile="32x8", channels=128, groups=2), True, False),
        ((1, 1), config_of(tile="32x8", channels=128, groups=2), True, True),
        ((1, 1), config_of(tile="16x8", channels=128, stages=3, stack=2), True, False),
        ((5, 1), config_of(tile="16x8"), True, False),
    ],
    ids=case_name,
)
def test_code_of_few_steps(r: tuple[int, int], config: Config, late: bool, rest: bool) -> None:
    """Two to five: of few the last two would be among those whose weights the next job reads first."""
    spec = ConvSpec.create((8, 256, 28, 28), (128, 256, *r), padding=(r[0] // 2, 0), dtype="float16")
    config = {**config, "steps": "every"}
    dense = random_weight(spec, 0.1, np.random.default_rng(0))
    facts = wgmma_shape.facts_of(SparseWeight.from_dense(dense), config)
    assert KERNEL.shape(spec, config, facts).late == late
    assert_code(KERNEL, spec, config, None, rest, (False, True))


# --- on a GPU ------------------------------------------------------------------------------------------------

SAME: dict[str, Any] = {"padding": 1}
GPU_CASES: list[tuple[ConvSpec, Config, float]] = [
    *(
        (spec_of(5, 72, 14, 76, 3, dtype, **SAME), config_of(**changes), density)
        for dtype in ("float16", "bfloat16")
        for changes, density in (
            ({}, 0.1),
            ({}, 0.2),
            ({}, 0.6),
            ({"tile": "14x8", "channels": 64}, 0.1),
            ({"tile": "14x16", "channels": 64, "groups": 2}, 0.1),
            ({"tile": "7x8", "batch": 4, "groups": 2, "stages": 3}, 0.2),
            ({"tile": "14x8", "batch": 2, "split": 2}, 0.1),
            ({"tile": "16x8", "groups": 2, "split": 3, "stages": 3}, 0.2),
            ({"tile": "5x16", "channels": 64, "stages": 3}, 0.1),
            ({"tile": "7x16", "turns": 2}, 0.1),
            ({"tile": "14x16", "turns": 2, "stages": 2}, 0.2),
            ({"tile": "7x8", "batch": 2, "turns": 2, "split": 2}, 0.1),
        )
    ),
    *(
        (spec_of(5, 72, size, 76, r, stride=stride, padding=r // 2, **rest), config_of(**changes), 0.15)
        for size, r, stride, rest, changes in (
            (14, 3, 2, {}, {"tile": "7x8"}),
            (28, 3, 2, {}, {"tile": "14x8", "batch": 2, "groups": 2}),
            (15, 3, (2, 1), {}, {"tile": "8x16", "turns": 2}),
            (28, 3, 2, {"dilation": 2}, {"tile": "7x8", "channels": 64}),
            (17, 3, 3, {}, {"tile": "6x8"}),
            (28, 1, 2, {}, {"tile": "14x8", "channels": 128}),
        )
    ),
    (spec_of(64, 128, 14, 256, 3, **SAME), config_of(tile="14x8", batch=2, groups=2, stages=3), 0.1),
    (spec_of(5, 72, 14, 76, 3, **SAME), BASE, 0.0),
    (spec_of(1, 32, 56, 64, 3, **SAME), config_of(tile="28x8", groups=1), 0.1),
    (spec_of(1, 32, 56, 64, 3, **SAME), config_of(tile="56x8", groups=2), 0.1),
    (spec_of(2, 24, 12, 20, 5, padding=2, dilation=2), config_of(), 0.2),
    (spec_of(2, 160, 8, 132, 1), config_of(channels=128, tile="16x8"), 0.1),
    (spec_of(8, 512, 8, 132, 1), config_of(channels=64, tile="64x8", groups=2, split=2), 0.1),
    (spec_of(1, 64, 7, 64, 1), config_of(tile="7x8"), 0.1),
    # Many works of a job of two steps.
    (spec_of(24, 64, 16, 1024, 1), config_of(channels=64, tile="32x8", stages=4, stack=2), 0.1),
    (spec_of(24, 128, 16, 1024, 1), config_of(channels=64, tile="16x8", groups=2), 0.1),
    # Works of an odd number of jobs, one behind another.
    (spec_of(40, 160, 14, 512, 3, **SAME), config_of(tile="14x16", turns=2), 0.02),
    (spec_of(24, 288, 16, 1024, 1), config_of(tile="16x8", channels=32, turns=2, stages=4), 0.1),
    (spec_of(3, 64, 9, 64, 3, groups=4, **SAME), config_of(), 0.2),
    (spec_of(1, 16, 32, 64, 5, padding=2), config_of(tile="8x16"), 0.2),
    (spec_of(3, 16, 7, 24, 3, **SAME), config_of(batch=2, tile="7x8"), 0.2),
    (spec_of(3, 3, 17, 64, 3, **SAME), config_of(tile="17x8"), 1.0),
    (spec_of(8, 12, 8, 64, 1), config_of(tile="16x8"), 0.3),
    # Two blocks of output channels with one tile; an odd number of them; many works; chunks, and jobs that come again.
    (spec_of(5, 72, 14, 76, 3, **SAME), config_of(tile="14x8", stack=2), 0.1),
    (spec_of(5, 72, 14, 132, 3, **SAME), config_of(tile="14x8", stack=2, stages=3), 0.1),
    (spec_of(5, 72, 14, 132, 3, **SAME), config_of(tile="7x8", batch=2, stack=2, split=2), 0.6),
    (spec_of(24, 288, 16, 1024, 1), config_of(tile="32x8", channels=128, stack=2), 0.1),
    (spec_of(8, 512, 8, 132, 1), config_of(channels=256, tile="16x8", stack=2, split=2), 0.1),
]


EVERY_CASES = [
    (spec, {**config, "steps": "every"}, density)
    for spec, config, density in GPU_CASES
    if density <= 0.2 and (spec.r > 1 or int(config["channels"]) >= 64)
]


@pytest.mark.parametrize(("spec", "config", "density"), GPU_CASES + EVERY_CASES)
def test_cases_for_a_gpu_are_valid(spec: ConvSpec, config: Config, density: float) -> None:
    """Where there is none: nobody should find out there."""
    weight = SparseWeight.from_dense(random_weight(spec, density, np.random.default_rng(0)), spec.groups)
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
@pytest.mark.parametrize("rest", [False, True], ids=["two of four", "rest"])
@pytest.mark.parametrize("number", range(len(EVERY_CASES)))
def test_every_step(number: int, rest: bool) -> None:
    spec, config, density = EVERY_CASES[number]
    rng = np.random.default_rng(number)
    dense = random_weight(spec, density, rng, empty_rows=number % 4 == 1)
    weight = SparseWeight.from_dense(dense if rest else two_of_four(dense), spec.groups)
    assert_right_on_gpu(KERNEL, spec, weight, config, rng, number % 2 == 1)


@on_hopper
@pytest.mark.parametrize(("bits", "kind"), [(8, "linear"), (4, "linear"), (4, "codebook"), (3, "codebook")])
@pytest.mark.parametrize("number", [*range(6), 9, 11, 13, 21])
def test_codes(number: int, bits: int, kind: str) -> None:
    spec, config, density = GPU_CASES[number]
    rng = np.random.default_rng(number)
    weight = quantized(SparseWeight.from_dense(random_weight(spec, density, rng), spec.groups), bits, kind)
    config = {**config, "entries": "coded"}
    # Linear levels are whole numbers, which 16 bits hold; their scale comes in float32.
    assert_right_on_gpu(KERNEL, spec, weight, config, rng, number % 2 == 1, exact_weight=kind == "linear")
