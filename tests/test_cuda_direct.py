"""The fast CUDA kernel: its packed form and geometry here, its variants on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import conv_specs, random_weight, sparse_weights

from numbasparse import SparseWeight
from numbasparse.kernels import KERNELS, Config, ConfigError
from numbasparse.kernels import cuda_direct as room
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.quantization import CodebookQuantization, LinearQuantization
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec

KERNEL = KERNELS["cuda_direct"]
BASE: Config = {
    "batch": 32,
    "vector": 4,
    "tile": "4x7",
    "warps": 4,
    "parts": 1,
    "rows": 4,
    "share": 1,
    "channels": 4,
    "stages": 2,
    "copy": "box",
    "split": 1,
    "entries": "wide",
}


def config_of(**changes: int | str) -> Config:
    return {**BASE, **changes}


@pytest.fixture(autouse=True)
def a_gpu() -> Iterator[None]:
    """An H100 to think of where there is no GPU."""
    if cuda.reason_unavailable() is None:
        yield
    else:
        with cuda.assumed((9, 0)):
            yield


def read_back(spec: ConvSpec, weight: SparseWeight, config: Config) -> np.ndarray:
    """The dense weight as a block finds it: by its table of steps, its streams and its offsets."""
    geometry = room.geometry_of(spec, config)
    assert isinstance(geometry, room.Geometry)
    packed = room.pack(spec, weight, config, geometry)
    warps, rows, share = (int(config[f]) for f in ("warps", "rows", "share"))
    words = packed.streams.view(np.uint32)
    table = weight.levels.tables()[0] if config["entries"] == "coded" else None  # type: ignore[union-attr]
    dense = np.zeros(weight.shape, np.float32)
    offsets = {
        r * spec.dilation[0] * geometry.patch_w * geometry.pixel_bytes + s * spec.dilation[1] * geometry.pixel_bytes: (
            r,
            s,
        )
        for r in range(spec.r)
        for s in range(spec.s)
    }
    assert packed.rows.shape == (len(packed.steps_table), warps * rows)
    for block, steps in enumerate(packed.steps_table):
        for start, size, live, _, *channels in steps:
            assert size <= packed.chunk_bytes
            assert (np.array(channels[:live]) >= 0).all()
            assert (np.array(channels[live:]) == -1).all()
            for warp in range(warps):
                at = start * 4 + words[start * 4 + warp] // 4
                for group in range(rows // share):
                    last = False
                    while not last:
                        entry = int(words[at])
                        last, empty = bool(entry >> 31), bool(entry >> 30 & 1)
                        low = entry & (0x3FFFF if table is not None else 0x3FFFFFFF)
                        channel, tap = divmod(low, geometry.channel_bytes)
                        if table is not None:
                            values = np.array([table[entry >> 18 & 0xFFF]])
                            at += 1
                        else:
                            values = words[at + 1 : at + 1 + share].view(np.float32)
                            at += 1 + share
                        if empty:
                            assert last
                            continue
                        for g, value in enumerate(values):
                            k = packed.rows[block, warp * rows + group * share + g]
                            if k >= 0:
                                c = channels[channel] - k // spec.k_per_group * spec.c_per_group
                                if value != 0:
                                    assert dense[k, c, *offsets[tap]] == 0
                                    dense[k, c, *offsets[tap]] = value
                            else:
                                assert value == 0
    if table is not None and weight.levels is not None:
        dense *= weight.levels.scale.reshape(-1, 1, 1, 1)
    return dense


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(data: st.DataObject) -> None:
    spec = data.draw(conv_specs())
    weight = data.draw(sparse_weights(spec))
    share = data.draw(st.sampled_from([1, 2, 4]))
    config = config_of(
        batch=1,
        vector=1,
        tile="4x8",
        copy="async",
        share=share,
        warps=data.draw(st.integers(1, 5)),
        rows=share * data.draw(st.integers(1, 3)),
        channels=data.draw(st.integers(1, 5)),
    )
    np.testing.assert_array_equal(read_back(spec, weight, config), weight.to_dense())


@pytest.mark.parametrize(
    "quantization",
    [LinearQuantization(bits=8, granularity="channel"), LinearQuantization(bits=3), CodebookQuantization(bits=4)],
    ids=["linear8", "linear3", "codebook4"],
)
def test_codes_are_packed(quantization: Any) -> None:
    spec = ConvSpec.create((32, 9, 7, 7), (13, 9, 3, 3), padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(1))).quantized(quantization)
    coded = config_of(entries="coded")
    np.testing.assert_allclose(read_back(spec, weight, coded), weight.to_dense(), rtol=1e-6)
    wide = KERNEL.ptx(spec, weight, BASE)  # type: ignore[attr-defined]
    assert KERNEL.ptx(spec, weight, coded)[0].text != wide[0].text  # type: ignore[attr-defined]


@given(
    spec=conv_specs(),
    batch=st.sampled_from([1, 8, 32]),
    vector=st.sampled_from([1, 4]),
    tile=st.sampled_from(["1x4", "4x7", "4x8", "8x4", "7x7"]),
    parts=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_every_output_has_one_lane(spec: ConvSpec, batch: int, vector: int, tile: str, parts: int) -> None:
    config = config_of(batch=batch, vector=vector, tile=tile, parts=parts, copy="async")
    geometry = room.geometry_of(spec, config)
    if isinstance(geometry, str):
        return
    seen = np.zeros((geometry.tile_h, geometry.tile_w, batch), int)
    for part in range(parts):
        for lane in range(32):
            n, p = lane % geometry.lanes_n * vector, lane // geometry.lanes_n
            for y, x in geometry.out:
                row, column = part * geometry.part_h + p // geometry.pixels_x + y, p % geometry.pixels_x + x
                seen[row, column, n : n + vector] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile": "4"}, "tile must be a text like '4x8'"),
        ({"batch": 24}, "powers of two"),
        ({"vector": 8}, "a vector at most 16 bytes"),
        ({"share": 3}, "share must divide rows"),
        ({"tile": "4x7", "vector": 4, "parts": 3}, "do not divide a tile"),
        ({"entries": "coded"}, "coded entries need a quantized weight"),
        ({"rows": 32, "warps": 16}, "registers of 512 threads"),
        ({"tile": "16x16", "channels": 64, "rows": 1, "vector": 1}, "registers|shared memory"),
        ({"split": 9}, "9 splits exceed the steps"),
        ({"warps": 0}, "warps must be from 1 to 31"),
        ({"copy": "fax"}, "copy must be one of"),
    ],
)
def test_bad_configs(changes: dict[str, Any], words: str) -> None:
    spec = ConvSpec.create((32, 8, 14, 14), (16, 8, 3, 3), padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    with pytest.raises(ConfigError, match=words):
        KERNEL.require(spec, weight, config_of(**changes))


def test_boxes_need_aligned_rows() -> None:
    spec = ConvSpec.create((1, 8, 7, 7), (16, 8, 3, 3), padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    reason = KERNEL.check(spec, weight, config_of(batch=1, vector=1, tile="8x8"))
    assert reason is not None
    assert "multiple of 16 bytes, got 28: use copy 'async'" in reason
    # The space has another way to copy for such a problem, and the default takes it.
    assert KERNEL.default(spec, weight, 1)["copy"] == "async"


@pytest.mark.parametrize("n", [1, 3, 8, 32])
@pytest.mark.parametrize(("c", "h", "r"), [(64, 56, 3), (512, 7, 3), (1024, 14, 1), (3, 5, 1)])
def test_common_layers_have_configs(n: int, c: int, h: int, r: int) -> None:
    spec = ConvSpec.create((n, c, h, h), (64, c, r, r), padding=r // 2)
    weight = SparseWeight.from_dense(random_weight(spec, 0.1, np.random.default_rng(0)))
    assert next(KERNEL.configs(spec, weight, 1), None) is not None
    assert KERNEL.check(spec, weight, KERNEL.default(spec, weight, 1)) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=["sm_75", "sm_80"])
def test_older_gpus_copy_otherwise(capability: tuple[int, int]) -> None:
    spec = ConvSpec.create((32, 8, 14, 14), (16, 8, 3, 3), padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.2, np.random.default_rng(0)))
    with cuda.assumed(capability):
        assert KERNEL.check(spec, weight, BASE) is not None
        config = KERNEL.default(spec, weight, 1)
        assert config["copy"] == ("plain" if capability < (8, 0) else "async")
        (ptx,) = KERNEL.ptx(spec, weight, config)  # type: ignore[attr-defined]
        assert cuda.assemble(ptx).local_bytes == 0


def test_defaults_do_not_multiply_with_zeros() -> None:
    spec = ConvSpec.create((32, 64, 56, 56), (64, 64, 3, 3), padding=1)
    weight = SparseWeight.from_dense(random_weight(spec, 0.3, np.random.default_rng(0)))
    assert KERNEL.suggest(spec, weight, 1, 1)[0]["share"] > 1
    assert KERNEL.default(spec, weight, 1)["share"] == 1


# --- on a GPU ------------------------------------------------------------------------------------------------


def spec_of(n: int, c: int, h: int, k: int, r: int, dtype: str = "float32", groups: int = 1, **rest: Any) -> ConvSpec:
    return ConvSpec.create((n, c, h, h), (k, c // groups, r, r), groups=groups, dtype=dtype, **rest)


SAME = {"padding": 1}
PIXELS = {"batch": 1, "vector": 1, "tile": "8x8"}
GPU_CASES: list[tuple[ConvSpec, Config, float]] = [
    *(
        (spec_of(32, 16, 14, 20, 3, dtype, **SAME), config_of(**changes), 0.2)
        for dtype in ("float32", "float16", "bfloat16")
        for changes in (
            {},
            {"copy": "async"},
            {"copy": "plain"},
            {"split": 2},
            {"share": 2},
            {"share": 4, "vector": 1},
            {"stages": 3, "tile": "8x8", "parts": 2, "rows": 2},
            {"stages": 1},
            {"copy": "async", "stages": 1},
        )
    ),
    (spec_of(32, 16, 14, 20, 3, "float16", **SAME), config_of(vector=8, tile="8x8", rows=1), 0.2),
    (spec_of(36, 7, 9, 5, 3, stride=2, **SAME), config_of(tile="4x4"), 0.2),
    (spec_of(36, 7, 9, 5, 3, stride=2, **SAME), config_of(tile="8x8", batch=16, vector=2), 0.2),
    (spec_of(32, 8, 12, 8, 5, padding=2, dilation=2), config_of(tile="4x4"), 0.2),
    (spec_of(32, 16, 8, 16, 1), config_of(tile="2x4", vector=2, copy="async"), 0.2),
    (spec_of(32, 16, 8, 16, 3, groups=4, **SAME), config_of(tile="4x4", rows=2, warps=2), 0.3),
    (spec_of(32, 8, 8, 8, 3, groups=8, **SAME), config_of(tile="4x4", rows=2, warps=2), 0.5),
    (spec_of(32, 16, 14, 20, 3, **SAME), BASE, 0.0),
    (spec_of(1, 16, 28, 20, 3, **SAME), config_of(**PIXELS), 0.2),
    (spec_of(1, 16, 28, 20, 3, "float16", padding=2), config_of(**PIXELS, copy="async"), 0.2),
    (spec_of(1, 16, 32, 20, 5, "float16", padding=2), config_of(**PIXELS), 0.2),
    (spec_of(1, 16, 28, 20, 3), config_of(batch=1, vector=1, tile="4x16", split=2), 0.2),
    (spec_of(2, 16, 28, 20, 3, stride=2, **SAME), config_of(**PIXELS), 0.2),
    (spec_of(3, 16, 7, 20, 3, **SAME), config_of(**PIXELS, copy="async"), 0.2),
    (spec_of(3, 16, 7, 20, 3, **SAME), config_of(**PIXELS, copy="plain", split=2), 0.2),
    (spec_of(8, 16, 14, 20, 3, **SAME), config_of(batch=8, vector=4, tile="8x8"), 0.2),
]


@pytest.mark.gpu
@pytest.mark.skipif(cuda.reason_unavailable() is not None, reason="needs a GPU")
@pytest.mark.parametrize("quantized", [False, True], ids=["wide", "coded"])
@pytest.mark.parametrize("number", range(len(GPU_CASES)))
def test_variants(number: int, quantized: bool) -> None:
    import torch

    spec, config, density = GPU_CASES[number]
    rng = np.random.default_rng(number)
    weight = SparseWeight.from_dense(random_weight(spec, density, rng, empty_rows=number % 2 == 1), spec.groups)
    if quantized:
        if config["share"] != 1 or not weight.nnz:
            pytest.skip("coded entries have one value")
        weight = weight.quantized(LinearQuantization(bits=8, granularity="channel"))
        config = {**config, "entries": "coded"}
    dtype = getattr(torch, spec.dtype)
    x = torch.from_numpy(rng.standard_normal(spec.x_shape, np.float32)).to(dtype)
    bias = rng.standard_normal(spec.k).astype(np.float32)
    runner: Any = KERNEL.prepare(spec, weight, config, "relu")
    poison = torch.full((16 << 20,), torch.nan, device="cuda")
    del poison  # the output is likely to lie there: what is not written is NaN
    y = runner.apply(x.cuda(), torch.from_numpy(bias).cuda()).float().cpu().numpy()
    images = x.float().numpy()
    expected = conv2d_reference(images, weight.to_dense(), bias, spec, "relu")
    magnitude = conv2d_reference(np.abs(images), np.abs(weight.to_dense()), np.abs(bias), spec)
    rounding = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[spec.dtype]
    np.testing.assert_array_less(np.abs(y - expected), 1e-5 * (magnitude + 1) + rounding * np.abs(expected) + 1e-7)
