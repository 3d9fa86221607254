"""Sparse convolution on Hopper's sparse tensor cores, of activations in CHWN: taps as addresses into an input tile.

How blocks work and what they multiply is in `wgmma_pipeline`.  An input tile lies in shared memory as
[row][column][channel][image]: the channels of a pixel are eight rows of shared memory that the tensor cores read as
eight k of an operand; other pixels are other n, and other taps are other starts.  So a step is a start and a distance
between its four octets, any of the tile.  The rest takes its eight columns one by one, from any row.

Bound: each sparse ``wgmma`` reads its 32 x n operand from shared memory as fast as that can give, so that the tensor
cores and shared memory are both full, and every other use of shared memory (copies into it, the rest) adds to it.
Zeros make it faster up to about 90 %; beyond, a step takes as long whatever its columns hold.

Since zeros are multiplied, an infinity in the input reaches outputs that it does not belong to, as NaN.

Search space
------------
``batch``
    Images of a block: the width of a row of shared memory, of activations in CHWN.
``tile``
    Output pixels of a block, as text: rows x columns.  A row is one ``wgmma``, of columns * batch of n.
``channels``, ``stages``
    Input channels of a stage, and stages of the ring.
``split``
    Blocks that share the input channels of one tile; a second kernel adds up their sums.
``cluster``
    Blocks of different output channels that get their input tile from one copy: as many times less is read from the
    second cache.
``groups``
    Warpgroups of a block.  Blocks of one may be two on a multiprocessor, so that one stores while the other computes.
``turns``
    Warpgroups that take turns with the input channels of a tile, and whose sums are added up in shared memory.
``entries``
    ``"wide"``: 16-bit values.  ``"coded"``, for quantized weights with at most 16 values or with whole numbers of a
    byte: codes, which are decoded on the way to the tensor cores.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil, exp
from typing import Any

import numpy as np

from numbasparse.kernels import cuda_fragments, two_four
from numbasparse.kernels.base import Config, Space, check_fields
from numbasparse.kernels.cuda_tiles import cached_by, device_function, parse_tile, row_clocks
from numbasparse.kernels.wgmma_pipeline import WgmmaKernel, clocks
from numbasparse.kernels.wgmma_shape import Facts, Geometry, Shape, facts_of
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight


@dataclass(frozen=True)
class ImageTile(Geometry):
    """Pixels of channels of images, the images innermost.

    Attributes
    ----------
    pixel_bytes
        The channels of one pixel.
    octets
        Octets of eight channels from the first tap's first to the last tap's last: what a step can start from.
    """

    pixel_bytes: int
    octets: int

    @property
    def rows(self) -> int:
        """Rows of the tile of a warpgroup."""
        return self.tile_h // self.groups

    @property
    def n(self) -> int:
        """Columns of one ``wgmma``, a row of the tile."""
        return self.tile_w * self.batch

    @property
    def sums(self) -> int:
        return self.rows * self.n // 2

    @property
    def tile_bytes(self) -> int:
        return self.patch_h * self.patch_w * self.pixel_bytes

    @property
    def copied_bytes(self) -> int:
        return self.tile_bytes

    def octet(self, c: Any, r: Any, s: Any) -> Any:
        """Octet of channel c of a stage at tap (r, s)."""
        pixel = r * self.spec.dilation[0] * self.patch_w + s * self.spec.dilation[1]
        return pixel * (self.channels // 8) + c // 8

    def cover(
        self, part: np.ndarray, row: np.ndarray, column: np.ndarray, data: np.ndarray, parts: int, once: bool
    ) -> tuple[two_four.Steps, two_four.Rest]:
        assert not once
        spec = self.spec
        # Of every column of a weight's matrix, and then of every non-zero.
        c, tap = np.divmod(np.arange(spec.c_per_group * spec.r * spec.s), spec.r * spec.s)
        channel = c % self.channels
        octet = self.octet(channel, tap // spec.s, tap % spec.s)
        return two_four.cover_steps(part, row, octet[column], (channel % 8)[column], data, parts, self.octets)

    def words(self, steps: two_four.Steps) -> np.ndarray:
        """The start (bits 0-13) and the distance between octets (14-27), in units of 16 bytes."""
        placed = (steps.columns * (8 * self.row_bytes // 16)).astype(np.int64)
        return (placed[:, 0] | placed[:, 1] << 14).astype(np.int32)

    def offsets(self, rest: two_four.Rest) -> np.ndarray:
        """Of every row of shared memory."""
        return (rest.columns * self.row_bytes).astype(np.int32)

    def row_blocks(self, weight: SparseWeight) -> np.ndarray:
        """Rows of similar columns together."""
        spec, blocks = self.spec, []
        width = spec.c_per_group * spec.r * spec.s
        for g in range(spec.groups):
            start = g * spec.k_per_group
            indptr = weight.indptr[start : start + spec.k_per_group + 1]
            indices = weight.indices[indptr[0] : indptr[-1]]
            made = two_four.order_rows(indptr - indptr[0], indices.astype(np.int32), width)
            blocks.append(np.where(made >= 0, made + start, -1))
        return np.concatenate(blocks).astype(np.int32)

    def tensor_map(self, address: int) -> cuda.TensorMap:
        return cuda_fragments.tensor_map(self.spec, address, (self.batch, self.channels, self.patch_w, self.patch_h))

    @property
    def _line_bytes(self) -> int:
        """From the input of a row of the tile to that of the next."""
        return self.spec.stride[0] * self.patch_w * self.pixel_bytes

    @property
    def _column_bytes(self) -> int:
        """The same of columns."""
        return self.spec.stride[1] * self.pixel_bytes

    @property
    def group_bytes(self) -> int:
        return self.rows * self._line_bytes

    def copy_tile(self, cluster: int) -> Any:
        from numba import types

        from numbasparse.codegen import ptx

        i32, every = types.int32, (1 << cluster) - 1

        def copy_tile(stage, channel, origin, full):  # type: ignore[no-untyped-def]
            tensor_map = ptx.tensor_map_address()
            image, top, left = i32(origin[0]), i32(origin[1]), i32(origin[2])
            if cluster > 1:
                ptx.copy_box_to_cluster(stage, tensor_map, image, channel, left, top, full, i32(every))
            else:
                ptx.copy_box(stage, tensor_map, image, channel, left, top, full)

        return device_function(copy_tile)

    def multiply(self) -> Any:
        from numba import types

        from numbasparse.codegen import ptx

        u32 = types.uint32
        units = [i * self._line_bytes // 16 for i in range(self.rows)]
        wgmma = ptx.sparse_wgmma(units, self.n, self.spec.dtype)
        descriptor = ptx.matrix_descriptor(self.row_bytes, self._column_bytes)
        low_word, high_word, k_high = descriptor.low, descriptor.high, descriptor.k_high

        def multiply(sums, values, metadata, word, stage):  # type: ignore[no-untyped-def]
            low, high = (stage >> 4) + (word & 0x3FFF) + low_word, high_word
            distance = (word >> 14) & 0x3FFF
            if k_high:
                return wgmma(sums, values, metadata, u32(low), u32(high + distance))
            return wgmma(sums, values, metadata, u32(low + (distance << 16)), u32(high))

        return device_function(multiply)

    def lane_start(self) -> Any:
        # Lanes of an eight that is not of the first pixel's images are at another pixel.
        eights, pixel = self.batch // 8, self._column_bytes

        def lane_start(lane):  # type: ignore[no-untyped-def]
            eight = lane >> 3
            return eight // eights * pixel + eight % eights * 16

        return device_function(lane_start)

    def rest_mma(self) -> Any:
        from numbasparse.codegen import ptx

        displacements = [
            i * self._line_bytes + n // self.batch * self._column_bytes + n % self.batch * 2
            for i in range(self.rows)
            for n in range(0, self.n, 32)
        ]
        return ptx.gathered_mma(displacements, ptx.SWIZZLES[self.row_bytes].mask, self.spec.dtype)

    def finish(self, split: int, residual: bool, activation: str, scaled: bool, ahead: int) -> tuple[Any, Any, Any]:
        rows = self.rows
        numbers_of, store = cuda_fragments.finish(
            self.spec, rows, self.tile_w, self.batch, split, residual, activation, scaled
        )

        def begin(residual, numbers, part, image, oy, ox, group, lane):  # type: ignore[no-untyped-def]
            """Residuals have 8 registers for each place here, too many to load them ahead."""
            return lane

        def finish(sums, begun, y, residual, bias, scale, numbers, part, image, oy, ox, group, lane):  # type: ignore[no-untyped-def]
            store(sums, y, residual, bias, scale, numbers, part, image, oy + group * rows, ox, lane)

        return numbers_of, device_function(begin), device_function(finish)


@cached_by("batch", "tile", "channels", "groups")
def geometry_of(spec: ConvSpec, config: Config) -> ImageTile:
    """The geometry of a config whose fields have been checked."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, channels = int(config["batch"]), int(config["channels"])
    (sh, sw), (dh, dw) = spec.stride, spec.dilation
    patch_w = (tile_w - 1) * sw + (spec.s - 1) * dw + 1
    return ImageTile(
        spec=spec,
        layout="CHWN",
        groups=int(config["groups"]),
        batch=batch,
        channels=channels,
        tile_h=tile_h,
        tile_w=tile_w,
        patch_h=(tile_h - 1) * sh + (spec.r - 1) * dh + 1,
        patch_w=patch_w,
        row_bytes=2 * batch,
        pixel_bytes=2 * batch * channels,
        octets=((spec.r - 1) * dh * patch_w + (spec.s - 1) * dw + 1) * (channels // 8),
    )


@functools.lru_cache(maxsize=4096)
def expected_work(geometry: ImageTile, over: float) -> tuple[int, float]:
    """Steps and chunks of a tile, if what is over two in quads (``over`` in each) lies at random.

    Every octet has a non-zero. Sixteen rows share a column of the rest, and four times sixteen the chunks.
    """
    spec = geometry.spec
    channels = range(0, min(geometry.channels, spec.c_per_group), 8)
    needed = tuple(geometry.octet(c, r, s) for r in range(spec.r) for s in range(spec.s) for c in channels)
    once, columns = two_four.steps_to_cover(needed, geometry.octets), 8 * len(needed)
    own = 16 * columns / 4 * over
    chunks = max(1.0 - exp(-4 * own), 1.1 * own / two_four.REST)
    return (once, chunks) if chunks < once else (2 * once, 0.0)


class CudaWgmma(WgmmaKernel):
    """Sparse tensor cores of Hopper, images innermost; see the module's text."""

    name = "cuda_wgmma"
    version = 3

    def reason_spec(self, spec: ConvSpec) -> str | None:
        return f"the copy engine needs a batch of a multiple of 8, got {spec.n}" if spec.n % 8 else None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {
            "batch": tuple(b for b in (64, 32, 16, 8) if b <= max(8, spec.n)),
            "tile": _TILES,
            "channels": (8, 16, 24, 32, 48, 64, 128, 256),
            "stages": (2, 3, 4),
            "split": (1, 2, 4, 8),
            "cluster": (1, 2),
            "groups": (1, 2),
            "turns": (1, 2),
            "entries": self.entries(weight),
        }

    def reason_config(self, spec: ConvSpec, config: Config) -> str | None:
        return check_fields(config, _FIELDS) or _reason_shape(spec, config)

    def geometry(self, spec: ConvSpec, config: Config) -> ImageTile:
        return geometry_of(spec, config)

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[layouts.Layout, layouts.Layout]:
        return "CHWN", "CHWN"

    @property
    def fallback(self) -> Config:
        return dict(_FALLBACK)

    def shape(
        self, spec: ConvSpec, config: Config, facts: Facts, activation: str = "none", residual: bool = False
    ) -> Shape:
        geometry = geometry_of(spec, config)
        steps, chunks = expected_work(geometry, facts.over)
        blocks = spec.groups * -(-spec.k_per_group // two_four.ROWS)
        stages, split, cluster, turns = (int(config[f]) for f in ("stages", "split", "cluster", "turns"))
        room = steps, ceil(chunks) + 1
        return Shape(geometry, room, stages, split, cluster, blocks, turns, facts.entries, activation, residual)

    def estimate(self, spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device) -> float:
        facts, g = facts_of(weight, config), geometry_of(spec, config)
        shape = self.shape(spec, config, facts)
        steps, chunks = expected_work(g, facts.over)
        row = row_clocks(g.row_bytes) * (1.0 if shape.cluster == 1 else 1.3)
        copy, stores = g.patch_h * g.patch_w * g.channels * row, g.groups * 4 * g.sums / 8 * _STORE_CLOCKS
        return clocks(shape, steps, chunks, 64 * g.n * g.tile_h, copy, stores, device)


_STORE_CLOCKS = 24.0
"""Of trading, finishing and storing eight rows of 64 bytes by a warp."""
_FIELDS: dict[str, Any] = {
    "batch": (8, 64),
    "tile": (),
    "channels": (8, 256),
    "stages": (2, 8),
    "split": (1, 64),
    "cluster": (1, 8),
    "groups": (1, 2),
    "turns": (1, 2),
    "entries": ("wide", "coded"),
}
_TILES = (
    "1x4",
    "1x7",
    "1x8",
    "1x16",
    "2x1",
    "2x2",
    "2x4",
    "2x7",
    "2x8",
    "2x14",
    "2x16",
    "4x2",
    "4x4",
    "4x7",
    "4x8",
    "4x14",
    "8x2",
    "8x4",
    "8x8",
)
_FALLBACK: Config = {
    "batch": 8,
    "tile": "2x4",
    "channels": 8,
    "stages": 2,
    "split": 1,
    "cluster": 1,
    "groups": 1,
    "turns": 1,
    "entries": "wide",
}


@cached_by("batch", "tile", "channels", "groups")
def _reason_shape(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the instructions cannot have such operands."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, channels = int(config["batch"]), int(config["channels"])
    if not 1 <= tile_h <= 256 or not 1 <= tile_w <= 256:
        return f"tile must be a text like '2x4', got {config['tile']!r}"
    if batch not in (8, 16, 32, 64):
        return f"batch must be 8, 16, 32 or 64, got {batch}"
    if channels % 8:
        return f"channels must be a multiple of 8, got {channels}"
    groups = int(config["groups"])
    if tile_h % groups:
        return f"{groups} warpgroups cannot share the rows of a tile of {tile_h}"
    n = tile_w * batch
    if n > 256 or n % 32:
        return f"columns * batch must be a multiple of 32 up to 256, got {n}"
    geometry = geometry_of(spec, config)
    if geometry.sums > 128:
        return f"{geometry.sums} sums exceed a thread's registers, at most 128 fit"
    if max(geometry.patch_h, geometry.patch_w) > 256:
        return "a box has at most 256 values along a dimension"
    return None
