"""What kernels for tensor cores have in common: how a warp's sums leave, and which weights they cannot hold."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.kernels.cuda_tiles import device_function
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

DTYPES = ("float16", "bfloat16")
"""Of activations and weights; sums are float32."""
_FLOAT16_LIMIT = 65520.0
"""The least value that float16 rounds to infinity."""


def reason_values(spec: ConvSpec, weight: SparseWeight) -> str | None:
    """Reason why the operands cannot hold the problem's values."""
    if spec.dtype not in DTYPES:
        return f"activations must be of {' or '.join(DTYPES)}, got {spec.dtype}"
    if spec.dtype == "float16" and weight.nnz and float(np.abs(weight.data).max()) >= _FLOAT16_LIMIT:
        return f"a weight of {float(np.abs(weight.data).max()):g} is too large for float16"
    return None


_codings: weakref.WeakKeyDictionary[SparseWeight, tuple[NDArray[np.float32], NDArray[np.int64]]] = (
    weakref.WeakKeyDictionary()
)


def coding_of(weight: SparseWeight) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values of a quantized weight, before the scale, behind a zero; and the place of each non-zero's among them."""
    found = _codings.get(weight)
    if found is None:
        assert weight.levels is not None
        assert weight.codes is not None
        table = np.asarray(weight.levels.tables()[0], np.float32)
        values, places = np.unique(table[weight.levels.places(weight.codes, weight.rows)], return_inverse=True)
        found = _codings[weight] = np.concatenate([np.zeros(1, np.float32), values]), places.reshape(-1) + 1
    return found


def is_scaled(weight: SparseWeight) -> bool:
    """Whether output channels of a quantized weight have factors."""
    return weight.levels is not None and bool((weight.levels.scale != 1).any())


def scale_of(weight: SparseWeight) -> NDArray[np.float32]:
    """Factor of each output channel, (K,)."""
    scale = np.ones(1, np.float32) if weight.levels is None else weight.levels.scale
    return np.broadcast_to(np.asarray(scale, np.float32), weight.k)


def finish(
    spec: ConvSpec,
    rows: int,
    tile_w: int,
    batch: int,
    split: int,
    residual: bool,
    activation: str,
    scaled: bool = False,
) -> tuple[Any, Any]:
    """Device functions for the sums of a warp: 16 output channels of some rows of a tile, CHWN.

    Parameters
    ----------
    rows, tile_w, batch
        The sums: rows of the tile, and of each ``tile_w * batch`` columns, a multiple of 32.
    split
        Parts that `cuda_reduce` adds up, stored as float32 and not finished if there are several.
    residual, activation, scaled
        See `codegen.ptx.Finish`; there is a bias.

    Returns
    -------
    numbers_of
        ``(table, first, lane)``: output channels of a lane's two rows, whose warp's first is ``table[first]``.
    finish
        ``(sums, y, residual, bias, scale, numbers, part, image, oy, ox, lane)``: finishes and stores.
    """
    from numba import types

    from numbasparse.codegen import ptx

    i32, i64 = types.int32, types.int64
    size = 4 if split > 1 else 2
    plane = spec.out_h * spec.out_w * spec.n * size
    strides = (plane, spec.out_w * spec.n * size, spec.n * size, size)
    limits = (spec.out_h, spec.out_w, spec.n)
    # For parts of a split a lane stores pairs of n, else every fourth eight of them.
    each = 8 if split > 1 else 32
    places = [(i, n // batch, n % batch) for i in range(rows) for n in range(0, tile_w * batch, each)]
    store_parts = ptx.store_fragments(places, strides, limits) if split > 1 else None
    last = ptx.Finish(bias=True, scaled=scaled, residual=residual, activation=activation)
    store = ptx.store_finished_fragments(places, spec.dtype, last, strides, limits) if split == 1 else None
    total, row_bytes, pixel_bytes, eights = plane * spec.k, strides[1], strides[2], batch // 8
    load_one = ptx.load_words("global", 1)

    def numbers_of(table, first, lane):  # type: ignore[no-untyped-def]
        own = table + (first + (lane >> 2)) * i64(4)
        return i32(load_one(i64(own))), i32(load_one(i64(own + 32)))

    def both(values, numbers):  # type: ignore[no-untyped-def]
        """Of the two rows the float32 of their channels."""
        return (
            ptx.load_global_f32(i64(values + max(numbers[0], 0) * i64(4))),
            ptx.load_global_f32(i64(values + max(numbers[1], 0) * i64(4))),
        )

    both = device_function(both)

    def finish(sums, y, residual, bias, scale, numbers, part, image, oy, ox, lane):  # type: ignore[no-untyped-def]
        quarter = lane & 3
        if split > 1:
            n = image + 2 * quarter
            at = i64(oy) * row_bytes + i64(ox) * pixel_bytes + n * i64(size) + part * i64(total)
            store_parts(sums, i64(y + at), numbers, i32(oy), i32(ox), i32(n))
        else:
            x, n = ox + quarter // eights, image + quarter % eights * 8
            at = i64(oy) * row_bytes + i64(x) * pixel_bytes + n * i64(size)
            shifts = both(bias, numbers)
            factors = both(scale, numbers) if scaled else shifts
            store(sums, i64(y + at), i64(residual + at), numbers, shifts, factors, i32(oy), i32(x), i32(n))

    return device_function(numbers_of), device_function(finish)


def tensor_map(spec: ConvSpec, address: int, box: tuple[int, int, int, int]) -> cuda.TensorMap:
    """Boxes [row][column][channel][image] of an input in CHWN: channels come after pixels, whatever memory does.

    ``box`` is images, channels, columns and rows; what lies outside of the input is zero.
    """
    pixel, row = 2 * spec.n, 2 * spec.n * spec.w
    sizes, strides = (spec.n, spec.c, spec.w, spec.h), (row * spec.h, pixel, row)
    return cuda.TensorMap(address, spec.dtype, sizes, strides, box, 2 * box[0])
