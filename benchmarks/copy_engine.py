"""What Hopper's copy engine takes for boxes of activations and for weights in one piece: the bounds of cuda_wgmma.

    python benchmarks/copy_engine.py

Every multiprocessor copies 64 boxes of a CHWN input of 256 x 14 x 14, float16, and with them a piece of the same
186 KB, ``depth`` copies under way; in a cluster the first block orders each box for all. Clocks are of 1.755 GHz, from
the median of seven launches less 5 microseconds for the launch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import write

from numbasparse.runtime import cuda

COPIES, CHANNELS, HEIGHT = 64, 32, 14
PIECE = 23200
BOXES = [(32, 32, 6, 6), (32, 32, 9, 3), (32, 16, 10, 6), (128, 64, 6, 4), (128, 32, 6, 6), (32, 32, 6, 1)]
"""Images, images of a box, its columns and rows."""


def code(tile: int, piece: int, depth: int, cluster: int) -> Callable[..., None]:
    """The kernel ``(pieces)``; a box of ``tile`` bytes and a piece of ``piece`` bytes, 0 for none."""
    from numba import types

    from numbasparse.codegen import ptx

    i32, u32, i64 = types.int32, types.uint32, types.int64
    base_of, stage_bytes, every = ptx.shared_base(1024), stage(tile, piece), (1 << cluster) - 1

    def copy_engine(pieces):  # type: ignore[no-untyped-def]
        base = i64(base_of())
        if ptx.thread_index() == 0:
            for i in range(depth):
                ptx.mbarrier_init(u32(base + 8 * i), i32(1))
            ptx.mbarrier_init_fence()
        if cluster > 1:
            ptx.cluster_arrive()
            ptx.cluster_wait()
        else:
            ptx.barrier()
        place = ptx.block_x() // cluster
        top, left = place // HEIGHT % HEIGHT - 1, place % HEIGHT - 1
        slot, phase = i32(0), i32(0)
        for number in range(COPIES + depth):
            full, to = u32(base + 8 * slot), u32(base + 1024 + slot * stage_bytes)
            if number >= depth:
                ptx.mbarrier_wait(full, phase)
            if cluster > 1:
                ptx.cluster_arrive()
                ptx.cluster_wait()
            if number < COPIES and ptx.thread_index() == 0:
                ptx.mbarrier_expect(full, i32(tile + piece))
                channel, tensor_map = i32(number % 8 * CHANNELS), ptx.tensor_map_address()
                if tile > 0 and cluster == 1:
                    ptx.copy_box(to, tensor_map, i32(0), channel, i32(left), i32(top), full)
                elif tile > 0 and ptx.cluster_rank() == 0:
                    ptx.copy_box_to_cluster(to, tensor_map, i32(0), channel, i32(left), i32(top), full, i32(every))
                if piece > 0:
                    ptx.copy_bulk(u32(to + tile), i64(pieces + number % 8 * i64(piece)), i32(piece), full)
            slot += i32(1)
            if slot == i32(depth):
                slot = i32(0)
                if number >= depth:
                    phase ^= i32(1)

    return copy_engine


def stage(tile: int, piece: int) -> int:
    """Bytes of shared memory for both."""
    return -(-(tile + piece) // 1024) * 1024


def compiled(box: tuple[int, int, int, int] | None, piece: int, depth: int, cluster: int) -> tuple[cuda.Ptx, int]:
    """The kernel, and the bytes of its box."""
    cuda.numba_cuda()
    tile = 0 if box is None else 2 * CHANNELS * box[1] * box[2] * box[3]
    key = repr((box, piece, depth, cluster))
    kernel = code(tile, piece, depth, cluster)
    return cuda.compile_ptx(kernel, 1, key, capability=(9, 0), threads=32, fastmath=False), tile


def measure(box: tuple[int, int, int, int] | None, piece: int, depth: int, cluster: int) -> dict[str, Any] | None:
    """One case; None where it does not fit."""
    made, tile = compiled(box, piece, depth, cluster)
    shared = 2048 + depth * stage(tile, piece)
    if shared > cuda.current().shared_per_block:
        return None
    n, batch, columns, rows = box or BOXES[0]
    x = torch.zeros(256 * HEIGHT * HEIGHT * n, dtype=torch.float16, device="cuda")
    pieces = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    strides = (2 * n * HEIGHT * HEIGHT, 2 * n, 2 * n * HEIGHT)
    sizes, boxed = (n, 256, HEIGHT, HEIGHT), (batch, CHANNELS, columns, rows)
    tensor_map = cuda.TensorMap(x.data_ptr(), "float16", sizes, strides, boxed, 2 * batch)
    function, grid, times = cuda.load(made), (cuda.current().multiprocessors, 1, 1), []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function.launch(grid, 32, shared, cuda.current_stream(), [pieces.data_ptr()], cluster, tensor_map)
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    us = statistics.median(times[3:]) - 5
    clocks = us * 1755 / COPIES
    described = None if box is None else {"n": n, "images": batch, "columns": columns, "rows": rows}
    facts = {"box": described, "piece_bytes": piece, "depth": depth, "cluster": cluster, "us": round(us, 1)}
    return facts | {"clocks": round(clocks), "bytes_per_clock": round((tile + piece) / clocks, 1)}


def main() -> None:
    cases = [(box, 0, depth, cluster) for depth in (1, 2, 4) for cluster in (1, 2, 4) for box in BOXES]
    cases += [(box, PIECE, depth, 1) for depth in (1, 2, 4) for box in (*BOXES[:2], None)]  # type: ignore[misc]
    rows = [row for case in cases if (row := measure(*case)) is not None]
    for row in rows:
        print(row, flush=True)
    print("wrote", write("copy_engine.json", {"gpu": cuda.current().name, "rows": rows}).name)


if __name__ == "__main__":
    main()
