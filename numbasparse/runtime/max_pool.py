"""Max pooling of images in NHWC or CHWN on a GPU: reads and writes each byte about once, 16 at a time.

torch's own also writes where each maximum was, 8 bytes for each value, which nobody asks for in inference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, empty

if TYPE_CHECKING:
    import torch

THREADS = 256
"""Of a block; each makes 16 bytes of an output."""
_MOST_BLOCKS = 65_535
"""Along the second and third dimension of a grid."""


@dataclass(frozen=True)
class Window:
    """Rows and columns of a window, and of what is between two and around the image."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def reason_unsupported(x: torch.Tensor, layout: Layout | None) -> str | None:
    """Reason why there is no kernel for an image (N, C, H, W) on a GPU, or None."""
    if layout not in ("NHWC", "CHWN"):
        return "channels or images must be innermost"
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in ("float16", "bfloat16", "float32"):
        return f"no maximum of {kind}"
    if cuda.current().capability < (8, 0):
        return "a maximum that keeps NaN needs compute capability 8.0"
    inner, outer = (x.shape[1], x.shape[0]) if layout == "NHWC" else (x.shape[0], x.shape[1])
    if inner * x.element_size() % 16 or x.data_ptr() % 16:
        return "pieces of 16 bytes do not fit"
    if x.numel() == 0 or max(outer, x.shape[2]) > _MOST_BLOCKS or x.shape[3] * inner >= 1 << 31:
        return "the image is empty or too large"
    return None


def max_pool(x: torch.Tensor, layout: Layout, window: Window) -> torch.Tensor:
    """The largest of each window (NaN where there is one), in the same layout.

    Parameters
    ----------
    x : CUDA tensor (N, C, H, W)
        In ``layout``; `reason_unsupported` says whether it can be.
    window
        Padding is at most half of the size, and a window fits into the padded image.
    """
    n, c, h, w = x.shape
    (r, s), (down, right), (top, left) = window.size, window.stride, window.padding
    out_h, out_w = (h + 2 * top - r) // down + 1, (w + 2 * left - s) // right + 1
    out = empty((n, c, out_h, out_w), layout, dtype=x.dtype, device=x.device)
    inner, outer = (c, n) if layout == "NHWC" else (n, c)
    pieces = inner * x.element_size() // 16
    function = _loaded(str(x.dtype).removeprefix("torch."), window, cuda.current())
    grid = (-(-out_w * pieces // THREADS), out_h, outer)
    function.launch(grid, THREADS, 0, cuda.current_stream(), (out.data_ptr(), x.data_ptr(), pieces, h, w, out_w))
    return out


@functools.cache
def _loaded(dtype: str, window: Window, device: cuda.Device) -> cuda.Function:
    return cuda.load(ptx_of(dtype, window, device.capability))


def ptx_of(dtype: str, window: Window, capability: cuda.Capability) -> cuda.Ptx:
    """The kernel ``(out, x, pieces, h, w, out_w)``: addresses, pieces of 16 bytes of a pixel, and sizes."""
    key = repr((dtype, window))
    return cuda.compile_ptx(_code(dtype, window), 6, key, capability=capability, threads=THREADS, fastmath=False)


def _code(dtype: str, window: Window) -> Callable[..., None]:
    cuda.numba_cuda()
    from numba import types

    from numbasparse.codegen import ptx

    i32, i64 = types.int32, types.int64
    (r, s), (down, right), (top, left) = window.size, window.stride, window.padding
    least, load, larger = ptx.least_piece(dtype), ptx.load_piece_or(ptx.LEAST[dtype]), ptx.larger_pieces(dtype)

    def cuda_max_pool(out, x, pieces, h, w, out_w):  # type: ignore[no-untyped-def]
        i = i64(ptx.block_x()) * THREADS + ptx.thread_index()
        ox, piece = i // pieces, i % pieces
        oy, image = i64(ptx.block_y()), i64(ptx.block_z())
        if ox < out_w:
            largest = least()
            for dy in range(r):
                for dx in range(s):
                    iy, ix = oy * down - top + dy, ox * right - left + dx
                    inside = i32(1) if 0 <= iy < h and 0 <= ix < w else i32(0)
                    at = ((image * h + iy) * w + ix) * pieces + piece
                    largest = larger(largest, load(i64(x + at * 16), inside))
            place = ((image * i64(ptx.grid_y()) + oy) * out_w + ox) * pieces + piece
            ptx.store_piece(i64(out + place * 16), largest)

    return cuda_max_pool
