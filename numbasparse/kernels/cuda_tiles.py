"""What GPU kernels with tiles of output pixels have in common: tiles, limits, bounds, and the order of configs."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from numbasparse.kernels.base import Config, CudaKernel
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_ROW_CLOCKS, _ROW_CLOCKS_PER_BYTE = 2.3, 0.005
"""Of the copy engine, for each row of a box, however short.  Measured on an H100 with all multiprocessors at work
(benchmarks/copy_engine.py)."""


@functools.cache
def parse_tile(text: int | str) -> tuple[int, int]:
    """Rows and columns of "4x8"; (0, 0) for any other text."""
    rows, _, columns = str(text).partition("x")
    good = rows.isdecimal() and columns.isdecimal() and len(rows) < 4 and len(columns) < 4
    return (int(rows), int(columns)) if good else (0, 0)


class OutputTiles:
    """Of the constants of a kernel's code: how its blocks share the outputs."""

    spec: ConvSpec
    geometry: Any
    """Has ``tile_h`` and ``tile_w``, output pixels of a block, and for `works` ``batch``, its images."""
    blocks: int
    """Of output channels."""
    split: int

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.spec.out_h // self.geometry.tile_h), -(-self.spec.out_w // self.geometry.tile_w)

    @property
    def works(self) -> int:
        """Output tiles of all output channels, images and splits: `locate` has their order."""
        down, across = self.tiles
        return self.blocks * self.split * across * down * -(-self.spec.n // self.geometry.batch)


def locate(shape: OutputTiles) -> Any:
    """Device function: of an output tile the block of output channels, split, first image, first output row and column,
    and first input ones.  Tiles of the same pixels are neighbours: the second cache serves them.
    """
    g, spec = shape.geometry, shape.spec
    down, across = shape.tiles
    blocks, split, batch, tile_h, tile_w = shape.blocks, shape.split, g.batch, g.tile_h, g.tile_w
    (sh, sw), pad_y, pad_x = spec.stride, spec.padding[0][0], spec.padding[1][0]

    def locate(work):  # type: ignore[no-untyped-def]
        pixels = work // (blocks * split)
        tile = pixels % (across * down)
        oy, ox = tile // across * tile_h, tile % across * tile_w
        image = pixels // (across * down) * batch
        return work % blocks, work // blocks % split, image, oy, ox, oy * sh - pad_y, ox * sw - pad_x

    return device_function(locate)


def device_function(function: Callable[..., Any]) -> Any:
    """A function that kernels are put together of."""
    return cuda.numba_cuda().jit(device=True, inline=True)(function)


def register_cap(threads: int) -> int:
    """Registers of a thread so that one block fits.

    A multiprocessor has four parts of 16,384 registers, which its warps take turns to live in; a warp gets
    registers in units of 8 per thread.
    """
    return min(255, 16384 // (32 * -(-threads // 128)) // 8 * 8)


def cached_by(*fields: str) -> Callable[[Callable[[ConvSpec, Config], Any]], Callable[[ConvSpec, Config], Any]]:
    """Keep what a function says of a spec and of these fields of a config, the only ones that it may look at.

    A space has tens of thousands of configs, which share a few hundred tiles.
    """

    def wrap(function: Callable[[ConvSpec, Config], Any]) -> Callable[[ConvSpec, Config], Any]:
        @functools.lru_cache(maxsize=4096)
        def known(spec: ConvSpec, *values: int | str) -> Any:
            return function(spec, dict(zip(fields, values, strict=True)))

        @functools.wraps(function)
        def ask(spec: ConvSpec, config: Config) -> Any:
            return known(spec, *[config[field] for field in fields])

        return ask

    return wrap


class EstimatedKernel(CudaKernel):
    """A kernel that knows itself what its configs may take: it suggests the fastest by that."""

    @property
    @abstractmethod
    def fallback(self) -> Config:
        """Small enough for most problems: the default where no config is valid."""

    @abstractmethod
    def estimator(self, spec: ConvSpec, weight: SparseWeight) -> Callable[[Config], float]:
        """What says how many clocks a valid config may take on this GPU."""

    def ranked(self, spec: ConvSpec, weight: SparseWeight, configs: Iterable[Config]) -> list[Config]:
        """Configs, the fastest by the estimate first."""
        return sorted(configs, key=self.estimator(spec, weight))

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return self.suggest(spec, weight, threads, 1)[0]

    def suggest(
        self,
        spec: ConvSpec,
        weight: SparseWeight,
        threads: int,
        count: int,
        valid: Sequence[Config] | None = None,
    ) -> list[Config]:
        configs = self.configs(spec, weight, threads) if valid is None else valid
        return self.ranked(spec, weight, configs)[:count] or [dict(self.fallback)]


def row_clocks(row_bytes: int) -> float:
    """Clocks that the copy engine takes for a row of a box."""
    return _ROW_CLOCKS + _ROW_CLOCKS_PER_BYTE * row_bytes


def split_clocks(spec: ConvSpec, split: int, device: cuda.Device) -> float:
    """Clocks that a second kernel takes which adds up the sums of ``split`` blocks."""
    out = spec.n * spec.k * spec.out_h * spec.out_w
    return 0.0 if split == 1 else 3000.0 + split * out * 8 / device.multiprocessors / 20
