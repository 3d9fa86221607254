"""Sparse convolution on Hopper's sparse tensor cores, of activations in NHWC (torch's channels-last), for any batch.

How blocks work and what they multiply is in `wgmma_pipeline`.  An input tile lies in shared memory as [image][row]
[column][channel]: a pixel is a row of shared memory of 32 or 64 channels, of which the tensor cores read 32 as the k of
an operand.  Its n are pixels: eight neighbours of a row of the image, and such eights below one another, whose distance
is that of rows.  So a step is 32 neighbouring channels of a tap, and its operand a start.  The rest gathers pairs of
channels, from any tap.

Against `cuda_wgmma`: the copy engine brings rows of 64 or 128 bytes whatever the batch, which is what small batches
wait for there, and what a model computes by other means in channels-last needs no conversion.

A convolution of 1x1 is one of a single image, eight columns wide, of all pixels of the batch. Input channels that are
no multiple of eight, as of pictures, are filled up with zeros, at each call.

Bound: as of `cuda_wgmma`.  Since zeros are multiplied, an infinity in the input reaches outputs that it does not belong
to, as NaN.

Search space
------------
``batch``
    Images of a block.
``tile``
    Output pixels of a block, of each image, as text: rows x columns, the latter a multiple of eight.  Each eight
    columns of an image are one ``wgmma``, of 8 * rows of n.
``channels``, ``stages``
    Input channels of a stage, and stages of the ring.
``split``
    Blocks that share the input channels of one tile; a second kernel adds up their sums.
``groups``
    Warpgroups of a block, which share its images, or columns, or rows.
``stack``
    Warpgroups that have 64 output channels each, of the same pixels: half as many copies of tiles.
``turns``
    Warpgroups that take turns with the input channels of a tile, and whose sums are added up in shared memory.
``entries``
    ``"wide"``: 16-bit values.  ``"coded"``, for quantized weights with at most 16 values or with whole numbers of a
    byte: codes, which are decoded on the way to the tensor cores.
``steps``
    ``"listed"``: those that have a non-zero.  ``"every"``: all of a tile, in an order that the code knows, at most
    once; of 16-bit values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from numbasparse.kernels import two_four
from numbasparse.kernels.base import Config, CudaRunner, Space, check_fields
from numbasparse.kernels.cuda_tiles import cached_by, device_function, parse_tile, row_clocks
from numbasparse.kernels.wgmma_packing import Packed
from numbasparse.kernels.wgmma_pipeline import WgmmaKernel, clocks
from numbasparse.kernels.wgmma_shape import Facts, Geometry, Shape, facts_of, places_of
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    import torch

    from numbasparse.codegen import ptx

_EIGHT = 8
"""Pixels that an operand has in neighbouring rows of shared memory."""


@dataclass(frozen=True)
class PixelTile(Geometry):
    """Channels of pixels of images, the channels innermost, in *planes* of so many channels as a row has.

    With a stride neighbouring outputs need every second (third...) pixel: those of one remainder have planes of their
    own, a *phase* for each that some tap needs.

    A *piece* of a tile is what one ``wgmma`` has as its n: `rows` x 8 pixels of one image.

    Attributes
    ----------
    rows
        Of a piece.
    pieces
        Of a warpgroup.
    """

    rows: int
    pieces: int

    @property
    def strips(self) -> int:
        """Pieces side by side."""
        return self.tile_w // _EIGHT

    @property
    def n(self) -> int:
        """Columns of one ``wgmma``."""
        return _EIGHT * self.rows

    @property
    def sums(self) -> int:
        return self.pieces * self.n // 2

    @functools.cached_property
    def phases(self) -> tuple[int, int]:
        """How many there are, down and across: i of them begins ``i * dilation % stride`` from the first tap."""
        spec = self.spec
        taps, steps = (spec.r, spec.s), zip(spec.dilation, spec.stride, strict=True)
        down, across = (min(count, s // gcd(d, s)) for count, (d, s) in zip(taps, steps, strict=True))
        return down, across

    @functools.cached_property
    def planes(self) -> int:
        """Of a stage: of each phase all channels."""
        down, across = self.phases
        return down * across * self._phase_planes

    @property
    def _phase_planes(self) -> int:
        return self.channels * 2 // self.row_bytes

    @property
    def line_bytes(self) -> int:
        """From a row of an image to the next."""
        return self.patch_w * self.row_bytes

    @property
    def image_bytes(self) -> int:
        """From an image to the next."""
        return self.patch_h * self.line_bytes

    @property
    def plane_bytes(self) -> int:
        """From a plane to the next; the pattern of swizzled rows repeats after 1024 bytes."""
        return -(-self.batch * self.image_bytes // 1024) * 1024

    @property
    def tile_bytes(self) -> int:
        return self.planes * self.plane_bytes

    @property
    def copied_bytes(self) -> int:
        return self.planes * self.batch * self.image_bytes

    @property
    def _octets_of_row(self) -> int:
        return self.row_bytes // 16

    @property
    def octets(self) -> int:
        """From the first channel of the first tap to the last one of the last, in all planes."""
        _, pixel = self._taps()
        return self.planes * (int(pixel.max()) + 1) * self._octets_of_row

    def cover(
        self, part: np.ndarray, row: np.ndarray, column: np.ndarray, data: np.ndarray, parts: int, once: bool
    ) -> tuple[two_four.Steps, two_four.Rest]:
        spec = self.spec
        # Of every column of a weight's matrix, and then of every non-zero.
        c, tap = np.divmod(np.arange(spec.c_per_group * spec.r * spec.s), spec.r * spec.s)
        plane, within = np.divmod(c % self.channels, self.row_bytes // 2)
        phase, pixel = (found[tap] for found in self._taps())
        plane += phase * self._phase_planes
        octet = plane * (self.octets // self.planes) + pixel * self._octets_of_row + within // 8
        arrays = (part, row, octet[column], (within % 8)[column], data)
        return two_four.cover_steps(*arrays, parts, self.octets, aligned=True, once=once)

    def _taps(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every tap its phase, and the pixels from the first of that."""
        spec, phases = self.spec, self.phases
        row, column = np.divmod(np.arange(spec.r * spec.s), spec.s)
        pixel = row * spec.dilation[0] // spec.stride[0] * self.patch_w + column * spec.dilation[1] // spec.stride[1]
        # As many taps on a phase comes again.
        return row % phases[0] * phases[1] + column % phases[1], pixel

    def all_octets(self) -> np.ndarray:
        phase, pixel = self._taps()
        plane = phase[:, None] * self._phase_planes + np.arange(self._phase_planes)
        first = plane * (self.octets // self.planes) + pixel[:, None] * self._octets_of_row
        return np.sort((first[:, :, None] + np.arange(0, self._octets_of_row, 4)).ravel())

    def _bytes(self, octet: np.ndarray) -> np.ndarray:
        """Where an octet of the first pixel begins."""
        plane, within = np.divmod(octet.astype(np.int64), self.octets // self.planes)
        return plane * self.plane_bytes + within * 16

    def words(self, steps: two_four.Steps) -> np.ndarray:
        """The start, in units of 16 bytes."""
        return (self._bytes(steps.columns[:, 0]) // 16).astype(np.int32)

    def run(self) -> ptx.StepRun:
        from numbasparse.codegen import ptx

        words = tuple(int(start) // 16 for start in self._bytes(self.all_octets()))
        high = ptx.k_major_descriptor(self.row_bytes, self.line_bytes)
        return ptx.StepRun(words, self._units, self.n, self.spec.dtype, high)

    def offsets(self, rest: two_four.Rest) -> np.ndarray:
        """Of the chunk's four pairs, twice."""
        pair = rest.columns[:, :, ::2]
        found = self._bytes(pair // two_four.OCTET) + pair % two_four.OCTET * 2
        return np.concatenate([found, found], axis=2).astype(np.int32)

    def row_blocks(self, weight: SparseWeight) -> np.ndarray:
        """Neighbours, since they are stored together; each sixteen in the order that `ptx.ColumnStore` wants."""
        i = np.arange(16)
        within = 4 * (i % 8 // 2) + 2 * (i // 8) + i % 2
        spec, per = self.spec, self.spec.k_per_group
        order = (np.arange(-(-per // two_four.ROWS) * two_four.ROWS).reshape(-1, 16)[:, :1] + within).ravel()
        blocks = [np.where(order < per, order + g * per, -1) for g in range(spec.groups)]
        return np.concatenate(blocks).reshape(-1, two_four.ROWS).astype(np.int32)

    def tensor_map(self, address: int) -> cuda.TensorMap:
        """Boxes [image][row][column][channel]; what lies outside of the input is zero."""
        spec = self.spec
        sizes, pixel = (spec.c, spec.w, spec.h, spec.n), 2 * spec.c
        strides = (pixel, pixel * spec.w, pixel * spec.w * spec.h)
        box = (self.row_bytes // 2, self.patch_w, self.patch_h, self.batch)
        every = (1, spec.stride[1], spec.stride[0], 1)
        return cuda.TensorMap(address, spec.dtype, sizes, strides, box, self.row_bytes, every)

    def copy_tile(self, cluster: int) -> Any:
        from numba import types

        from numbasparse.codegen import ptx

        assert cluster == 1
        i32, u32 = types.int32, types.uint32
        planes, plane_bytes, channels = self._phase_planes, self.plane_bytes, self.row_bytes // 2
        (phases_down, phases_across), (dilation, stride) = self.phases, (self.spec.dilation, self.spec.stride)
        (dilation_y, dilation_x), (stride_y, stride_x) = dilation, stride

        def copy_tile(stage, channel, origin, full):  # type: ignore[no-untyped-def]
            tensor_map = ptx.tensor_map_address()
            image, top, left = i32(origin[0]), i32(origin[1]), i32(origin[2])
            for i in range(phases_down):
                for j in range(phases_across):
                    y, x = i32(top + i * dilation_y % stride_y), i32(left + j * dilation_x % stride_x)
                    for plane in range(planes):
                        number = (i * phases_across + j) * planes + plane
                        to, c = u32(stage + number * plane_bytes), i32(channel + plane * channels)
                        ptx.copy_box(to, tensor_map, c, x, y, image, full)

        return device_function(copy_tile)

    def _displacements(self) -> list[int]:
        """Of the pieces of a warpgroup, from its first."""
        strips = self.strips
        return [i // strips * self.image_bytes + i % strips * _EIGHT * self.row_bytes for i in range(self.pieces)]

    @property
    def _units(self) -> tuple[int, ...]:
        """The same in units of 16 bytes."""
        return tuple(d // 16 for d in self._displacements())

    @property
    def group_origin(self) -> tuple[int, int, int]:
        """Images, rows and columns from a warpgroup's first output to the next one's."""
        if self.rows < self.tile_h:
            return 0, self.rows, 0
        return (0, 0, _EIGHT * self.pieces) if self.pieces < self.strips else (self.pieces // self.strips, 0, 0)

    @property
    def group_bytes(self) -> int:
        image, row, column = self.group_origin
        return image * self.image_bytes + row * self.line_bytes + column * self.row_bytes

    def multiply(self) -> Any:
        from numba import types

        from numbasparse.codegen import ptx

        u32 = types.uint32
        wgmma = ptx.sparse_wgmma(self._units, self.n, self.spec.dtype, k_major=True)
        high = ptx.k_major_descriptor(self.row_bytes, self.line_bytes)

        def multiply(sums, values, metadata, word, stage):  # type: ignore[no-untyped-def]
            return wgmma(sums, values, metadata, u32((stage >> 4) + word), u32(high))

        return device_function(multiply)

    def lane_start(self) -> Any:
        row_bytes = self.row_bytes

        def lane_start(lane):  # type: ignore[no-untyped-def]
            return (lane >> 2) * row_bytes

        return device_function(lane_start)

    def rest_mma(self) -> Any:
        from numbasparse.codegen import ptx

        pieces = [(displacement, self.rows) for displacement in self._displacements()]
        return ptx.pair_mma(pieces, self.line_bytes, ptx.SWIZZLES[self.row_bytes].mask, self.spec.dtype)

    def finish(self, split: int, residual: bool, activation: str, scaled: bool, ahead: int) -> tuple[Any, Any, Any]:
        from numba import types

        from numbasparse.codegen import ptx

        i32, i64 = types.int32, types.int64
        spec, strips = self.spec, self.strips
        dtype = "float32" if split > 1 else spec.dtype
        size = ptx.element_bytes(dtype)
        last = None if split > 1 else ptx.Finish(bias=True, scaled=scaled, residual=residual, activation=activation)
        places = tuple((i // strips, j, i % strips * _EIGHT) for i in range(self.pieces) for j in range(self.rows))
        pixel = spec.k * size
        strides = (pixel * spec.out_w * spec.out_h, pixel * spec.out_w, pixel)
        limits = spec.n, spec.out_h, spec.out_w
        columns = ptx.ColumnStore(places, dtype, last, strides, limits, ahead)
        load, store = columns.begin(), columns.store()
        total = strides[0] * spec.n
        group_image, group_row, group_column = self.group_origin
        load_one = ptx.load_words("global", 1)

        def numbers_of(table, first, lane):  # type: ignore[no-untyped-def]
            """The first of the four channels that a lane stores, and those of its two rows."""
            own, quad = table + (first + (lane >> 2)) * i64(4), table + (first + 2 * (lane & 3)) * i64(4)
            return i32(load_one(i64(quad))), i32(load_one(i64(own))), i32(load_one(i64(own + 32)))

        def both(values, numbers):  # type: ignore[no-untyped-def]
            """Of a lane's two rows the float32 of their channels."""
            return (
                ptx.load_global_f32(i64(values + max(numbers[1], i32(0)) * i64(4))),
                ptx.load_global_f32(i64(values + max(numbers[2], i32(0)) * i64(4))),
            )

        both = device_function(both)

        def whereabouts(numbers, part, image, oy, ox, group, lane):  # type: ignore[no-untyped-def]
            """Of a lane: offset, whether it stores, and image, row and column."""
            image, oy, ox = image + group * group_image, oy + group * group_row, ox + group * group_column + (lane >> 2)
            at = image * i64(strides[0]) + oy * i64(strides[1]) + ox * i64(strides[2])
            at += max(numbers[0], i32(0)) * i64(size) + part * i64(total)
            return at, i32(1) if numbers[0] >= 0 else i32(0), (i32(image), i32(oy), i32(ox))

        whereabouts = device_function(whereabouts)

        def begin(residual, numbers, part, image, oy, ox, group, lane):  # type: ignore[no-untyped-def]
            at, there, origin = whereabouts(numbers, part, image, oy, ox, group, lane)
            return load(i64(residual + at), there, origin)

        def finish(sums, begun, y, residual, bias, scale, numbers, part, image, oy, ox, group, lane):  # type: ignore[no-untyped-def]
            at, there, origin = whereabouts(numbers, part, image, oy, ox, group, lane)
            shifts = both(bias, numbers)
            factors = both(scale, numbers) if scaled else shifts
            store(sums, begun, i64(y + at), i64(residual + at), there, shifts, factors, origin)

        return device_function(numbers_of), device_function(begin), device_function(finish)


_DENSE, _FEW = 0.2, 2
"""From here on steps may be less work that are taken twice; up to here code for all is no faster by rule."""


def _lists_steps(spec: ConvSpec, weight: SparseWeight) -> bool:
    """Whether a list of steps may be worth its words: of codes, of dense weights, where one in twenty of the pieces
    that steps multiply is empty (64 output and 32 input channels of a tap), and where there are few.
    """
    taps, rows = spec.r * spec.s, -(-spec.k_per_group // two_four.ROWS)
    columns = -(-spec.c_per_group // two_four.STEP)
    if weight.levels is not None or weight.density > _DENSE or taps * columns <= _FEW:
        return True
    k, channel, tap = places_of(weight)
    block = k // spec.k_per_group * rows + k % spec.k_per_group // two_four.ROWS
    pieces = np.zeros(spec.groups * rows * columns * taps, bool)
    pieces[(block * columns + channel // two_four.STEP) * taps + tap] = True
    return bool(pieces.mean() < 0.95)


def filled(spec: ConvSpec) -> ConvSpec:
    """The convolution with input channels up to the next multiple of eight, which have no weights.

    The columns of the weight's matrix stay the same: channels come first in their order.
    """
    return spec if spec.groups > 1 else dataclasses.replace(spec, c=-(-spec.c // 8) * 8)


def flat(spec: ConvSpec) -> ConvSpec:
    """A 1x1 convolution as one of an image, eight columns wide, that has all pixels; others as they are."""
    spec = filled(spec)
    pixels = spec.n * spec.h * spec.w
    pointwise = (spec.r, spec.s) == (1, 1) and spec.stride == (1, 1) and not any(map(any, spec.padding))
    if not pointwise or pixels % _EIGHT:
        return spec
    return ConvSpec.create(
        (1, spec.c, pixels // _EIGHT, _EIGHT), spec.weight_shape, groups=spec.groups, dtype=spec.dtype
    )


@cached_by("batch", "tile", "channels", "groups")
def geometry_of(spec: ConvSpec, config: Config) -> PixelTile:
    """The geometry of a config whose fields have been checked."""
    spec, (tile_h, tile_w) = flat(spec), parse_tile(config["tile"])
    batch, channels, groups = (int(config[f]) for f in ("batch", "channels", "groups"))
    pieces, rows = batch * (tile_w // _EIGHT), tile_h
    if pieces % groups == 0:
        pieces //= groups
    else:
        rows //= groups
    return PixelTile(
        spec=spec,
        layout="NHWC",
        groups=groups,
        batch=batch,
        channels=channels,
        tile_h=tile_h,
        tile_w=tile_w,
        patch_h=tile_h + (spec.r - 1) * spec.dilation[0] // spec.stride[0],
        patch_w=tile_w + (spec.s - 1) * spec.dilation[1] // spec.stride[1],
        row_bytes=128 if channels % 64 == 0 else 64,
        rows=rows,
        pieces=pieces,
    )


@functools.lru_cache(maxsize=4096)
def expected_work(steps: int, pairs: int, share: float, once: bool = False) -> tuple[int, float, float]:
    """Steps of a tile, its chunks, and their standard deviation, if what goes into the rest lies at random: of its
    ``pairs`` of channels such a share for each 16 rows; ``once`` as of `cover_steps`.

    Each of the ``steps`` has a non-zero.  The chunks of a tile are those of the one among four groups of 16 rows that
    has most.
    """
    deviation = sqrt(pairs * share * (1.0 - share))
    # A chunk is begun for the last pairs.
    chunks = min(pairs * share + 1.03 * deviation, float(pairs)) / 4 + 0.4 * min(1.0, pairs * share)
    # See `two_four.cover_steps`.
    return (steps, chunks, deviation / 4) if once or chunks < steps else (2 * steps, 0.0, 0.0)


class _FillingRunner(CudaRunner):
    """Fills input channels up with zeros before another runner."""

    def __init__(self, spec: ConvSpec, inner: CudaRunner) -> None:
        self._spec, self._inner = spec, inner
        self.takes, self.gives = inner.takes, inner.gives
        self.nbytes, self.functions = inner.nbytes, inner.functions
        self.workspace = inner.workspace + 2 * int(np.prod(filled(spec).x_shape))

    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_layout: layouts.Layout | None = None,
    ) -> torch.Tensor:
        whole = layouts.empty(filled(self._spec).x_shape, self.takes, dtype=x.dtype, device=x.device)
        whole[:, self._spec.c :] = 0
        whole[:, : self._spec.c] = x
        return self._inner.apply(whole, bias, residual, out_layout)


class CudaWgmmaNhwc(WgmmaKernel):
    """Sparse tensor cores of Hopper, channels innermost; see the module's text."""

    name = "cuda_wgmma_nhwc"
    version = 4

    def reason_spec(self, spec: ConvSpec) -> str | None:
        if max(spec.stride) > 8:
            return f"the copy engine takes every eighth pixel at most, got a stride of {spec.stride}"
        if filled(spec).c % 8 or spec.k_per_group % 4:
            return (
                "pixels are copied and stored in pieces of 16 and 8 bytes: input channels (of several groups) must be "
                f"a multiple of 8 and output channels (of a group) of 4, got {spec.c} and {spec.k_per_group}"
            )
        return None

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        # A window of 7x7 has more weights than two stages can hold.
        return super().supports(spec, weight) or self.check(spec, weight, self.fallback)

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        spec = flat(spec)
        heights = sorted({-(-spec.out_h // i) for i in range(1, 9)} | {8, 16, 32, 64})
        widths = [w for w in (8, 16, 32) if w < spec.out_w + 8]
        return {
            "batch": tuple(b for b in (1, 2, 4, 8) if b <= spec.n),
            "tile": tuple(f"{h}x{w}" for h in heights for w in widths if h <= min(64, 2 * spec.out_h)),
            "channels": tuple(c for c in (32, 64, 128, 256) if c < 2 * max(spec.c_per_group, 32)),
            "stages": (2, 3, 4),
            "split": tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or 32 * s <= spec.c_per_group),
            "groups": (1, 2),
            "stack": (1, 2) if spec.groups == 1 and spec.k > two_four.ROWS else (1,),
            "turns": (1, 2),
            "entries": self.entries(weight),
            "steps": ("listed", "every") if _lists_steps(spec, weight) else ("every",),
        }

    def reason_config(self, spec: ConvSpec, config: Config) -> str | None:
        return (
            check_fields(config, _FIELDS)
            or _reason_shape(spec, config)
            or _reason_steps(spec, config)
            or _reason_stack(spec, config)
        )

    def geometry(self, spec: ConvSpec, config: Config) -> PixelTile:
        return geometry_of(spec, config)

    def layouts(self, spec: ConvSpec, config: Config) -> tuple[layouts.Layout, layouts.Layout]:
        return "NHWC", "NHWC"

    @property
    def fallback(self) -> Config:
        return dict(_FALLBACK)

    def shape(
        self, spec: ConvSpec, config: Config, facts: Facts, activation: str = "none", residual: bool = False
    ) -> Shape:
        geometry, every = geometry_of(spec, config), config["steps"] == "every"
        steps, chunks, deviation = _work(geometry, facts, spec, every)
        # Steps that are listed have a rest even if it is empty, so that one code serves many weights.
        rest = facts.rest or not every
        # A blob counts chunks in bytes.
        room = steps, min(ceil(chunks + 2 * deviation) + 1, 255) if rest else 0
        stages, split, turns, stack = (int(config[f]) for f in ("stages", "split", "turns", "stack"))
        blocks = spec.groups * -(-spec.k_per_group // (two_four.ROWS * stack))
        code = (facts.entries, activation, residual, every, rest, stack)
        return Shape(geometry, room, stages, split, 1, blocks, turns, *code)

    def runner(self, spec: ConvSpec, packed: Packed, scale: np.ndarray, make: Callable[..., Shape]) -> CudaRunner:
        whole = filled(spec)
        made = super().runner(whole, packed, scale, make)
        return made if whole == spec else _FillingRunner(spec, made)

    def estimate(self, spec: ConvSpec, weight: SparseWeight, config: Config, device: cuda.Device) -> float:
        facts, g = facts_of(weight, config), geometry_of(spec, config)
        shape = self.shape(spec, config, facts)
        steps, chunks, _ = _work(g, facts, spec, shape.every)
        copy = g.planes * g.batch * g.patch_h * g.patch_w * row_clocks(g.row_bytes)
        stores = shape.stack * g.groups * g.sums / 4 * _STORE_CLOCKS
        return clocks(shape, steps, chunks, 64 * g.n * g.pieces * g.groups * shape.stack, copy, stores, device)


def _reason_steps(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the code cannot know all steps of a tile."""
    if config["steps"] != "every":
        return None
    if config["entries"] != "wide":
        return f"every step of a tile needs entries 'wide', got {config['entries']!r}"
    count = spec.r * spec.s * int(config["channels"]) // two_four.STEP
    if not _KNOWN_STEPS[0] <= count <= _KNOWN_STEPS[1]:
        return f"code for every step of a tile is made for {_KNOWN_STEPS[0]} to {_KNOWN_STEPS[1]} of them, got {count}"
    return None


def _reason_stack(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the warpgroups of a block cannot have output channels of their own."""
    if int(config["stack"]) == 1:
        return None
    if spec.groups > 1:
        return f"a stack of blocks has the same input channels, which those of {spec.groups} groups do not"
    if spec.k <= two_four.ROWS:
        return f"{spec.k} output channels are no stack of blocks of {two_four.ROWS}"
    return None


def _work(geometry: PixelTile, facts: Facts, spec: ConvSpec, every: bool) -> tuple[int, float, float]:
    """`expected_work` of a stage."""
    taps, there = geometry.spec.r * geometry.spec.s, min(geometry.channels, spec.c_per_group)
    steps = ceil((geometry.channels if every else there) / two_four.STEP) * taps
    return expected_work(steps, 2 * ceil(there / 4) * taps, facts.pairs, every or not facts.rest)


_KNOWN_STEPS = 2, 64
"""How many steps of a tile the code can know: the first two are a part of their own, and it grows with each."""
_STORE_CLOCKS = 12.0
"""Of transposing, finishing and storing eight pixels by a warp."""
_FIELDS: dict[str, Any] = {
    "batch": (1, 16),
    "tile": (),
    "channels": (32, 256),
    "stages": (2, 8),
    "split": (1, 64),
    "groups": (1, 2),
    "stack": (1, 2),
    "turns": (1, 2),
    "entries": ("wide", "coded"),
    "steps": ("listed", "every"),
}
_FALLBACK: Config = {
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


@cached_by("batch", "tile", "channels", "groups")
def _reason_shape(spec: ConvSpec, config: Config) -> str | None:
    """Reason why the instructions cannot have such operands."""
    tile_h, tile_w = parse_tile(config["tile"])
    batch, channels, groups = (int(config[f]) for f in ("batch", "channels", "groups"))
    if not 1 <= tile_h <= 64 or tile_w % _EIGHT or not _EIGHT <= tile_w <= 256:
        return f"tile must be a text like '14x8', its columns a multiple of 8, got {config['tile']!r}"
    if channels != 32 and channels % 64:
        return f"channels must be 32 or a multiple of 64, got {channels}"
    pieces = batch * (tile_w // _EIGHT)
    if pieces % groups and tile_h % groups:
        return f"{groups} warpgroups can share neither {pieces} pieces nor {tile_h} rows"
    geometry = geometry_of(spec, config)
    if geometry.rows > 32:
        return f"a wgmma has at most 32 rows of 8 pixels, got {geometry.rows}"
    strips, pieces = geometry.strips, geometry.pieces
    if geometry.rows == tile_h and strips % pieces and pieces % strips:
        return f"{groups} warpgroups cannot share {strips} strips of {batch} images evenly"
    if geometry.sums > 128:
        return f"{geometry.sums} sums exceed a thread's registers, at most 128 fit"
    if max(geometry.patch_h * spec.stride[0], geometry.patch_w * spec.stride[1]) > 256:
        return "a box reaches over at most 256 values along a dimension"
    return None
