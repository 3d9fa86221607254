"""``numbasparse upscale``: a picture enlarged four times by a pruned RRDBNet, tile by tile."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import autotune
from numbasparse.cli.image_file import RGB, Picture, bicubic, read_picture, write_picture, write_side_by_side
from numbasparse.cli.models import check_device, check_out, save_state
from numbasparse.cli.tiles import Tile, tiles
from numbasparse.cli.upscale_networks import Networks, Target, load_networks, to_tensor
from numbasparse.models.rrdbnet import SCALE
from numbasparse.nn import conversion_report, convert

COMPARED = 192
"""Height and width, in pixels of the input, of what the side-by-side picture shows."""

LEAST_TIMES = 3


@dataclass(frozen=True)
class Options:
    """The command's options; see its help."""

    weights: Path | None = None
    dense_weights: Path | None = None
    sparsity: float | None = None
    steps: int = 100
    save_pruned: Path | None = None
    tuned: Path | None = None
    tile: int = 128
    overlap: int = 16
    compare: Path | None = None
    dense: bool = True
    device: str = "cpu"
    threads: int | None = None


@dataclass
class Runner:
    """A network that enlarges windows and remembers its times in seconds."""

    name: str
    model: nn.Module
    device: torch.device
    channels_last: bool = False
    seconds: list[float] = field(default_factory=list)

    def __call__(self, window: RGB) -> RGB:
        """Enlarge a window (H, W, 3); the time does not include moving it to and from the device."""
        x = to_tensor(window).to(self.device)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self._wait()
        start = time.perf_counter()
        with torch.inference_mode():
            y = self.model(x)
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        return y[0].permute(1, 2, 0).cpu().numpy()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(source: Path, out: Path, options: Options) -> None:
    """Enlarge ``source``, write ``out`` and print what was done; nothing is written if anything given is wrong.

    Raises
    ------
    ValueError, OSError
        If a file or an option cannot be used.
    """
    _check(source, out, options)
    picture = read_picture(source)
    tuned = None if options.tuned is None else autotune.load(options.tuned)  # before minutes go into pruning
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console()
    networks = load_networks(
        picture.rgb, options.weights, options.dense_weights, Target(options.sparsity, options.steps)
    )
    height, width = picture.rgb.shape[:2]
    cut = tiles(height, width, options.tile, options.overlap)
    _print_plan(console, picture, cut, networks, options)
    if options.save_pruned is not None:
        save_state(networks.pruned, options.save_pruned)
        console.print(f"wrote {options.save_pruned}", markup=False, soft_wrap=True)
    runners = _runners(console, networks, cut[0].read(picture.rgb), options, tuned)
    results = enlarge(picture, cut, runners)
    _print_times(console, runners, len(cut))
    _print_difference(console, results)
    write_picture(out, results["sparse"], picture)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    if options.compare is not None:
        _compare(options.compare, picture, results, networks, runners)
        console.print(f"wrote {options.compare}", markup=False, soft_wrap=True)


def _check(source: Path, out: Path, options: Options) -> None:
    """Everything that can be wrong before a file is read."""
    written = [path for path in (out, options.compare) if path is not None]
    for path in written:
        if path.suffix.lower() != ".png":
            raise ValueError(f"expected a file name that ends in .png, got {str(path)!r}: pictures are written as PNG")
    if options.save_pruned is not None:
        written.append(options.save_pruned)
    for path in written:
        check_out(path)
    if len({path.resolve() for path in written}) < len(written):
        raise ValueError("two results would be written into one file: give them different names")
    inputs = {path.resolve() for path in (source, options.weights, options.dense_weights, options.tuned) if path}
    for path in written:
        if path.resolve() in inputs:
            raise ValueError(f"{path} is read: give the result another name")
    if options.dense_weights is not None and not options.dense:
        raise ValueError("--dense-weights and --no-dense exclude each other")
    check_device(options.device)


# ---- running ------------------------------------------------------------------------------------------------


def _runners(console: Console, networks: Networks, window: RGB, options: Options, tuned: Any) -> list[Runner]:
    """The converted network and, if wanted, the dense one in the faster of its layouts, both warm."""
    device = torch.device(options.device)
    with console.status("compiling kernels"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec", FutureWarning)  # torch's own, when it copies a graph
        pruned = networks.pruned.to(device)
        sparse = Runner("sparse", convert(pruned, tuned, to_tensor(window).to(device)), device)
        sparse(window)
    _print_layers(console, sparse.model, window, tuned is not None)
    runners = [sparse, *([_fastest_dense(networks.dense.to(device), window, device)] if options.dense else [])]
    for runner in runners:
        runner.seconds.clear()
    return runners


def _fastest_dense(model: nn.Module, window: RGB, device: torch.device) -> Runner:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    candidates = [Runner("dense", model, device), Runner("dense", last, device, channels_last=True)]
    for _ in range(2):
        for candidate in candidates:
            candidate(window)
    return min(candidates, key=lambda candidate: candidate.seconds[-1])


def enlarge(picture: Picture, cut: Sequence[Tile], runners: Sequence[Runner]) -> dict[str, npt.NDArray[Any]]:
    """Enlarge a picture tile by tile, with all networks in turns.

    Only one window at a time is on the device; the results are held as the integers that are written.

    Returns
    -------
    dict of str to ndarray
        By the runners' names: (4H, 4W, channels) of the picture's dtype.
    """
    height, width = picture.rgb.shape[:2]
    shape = (height * SCALE, width * SCALE, picture.channels)
    results = {runner.name: np.empty(shape, picture.dtype) for runner in runners}
    with _progress(len(cut)) as advance:
        for index, tile in enumerate(cut):
            for runner in runners[:: 1 if index % 2 == 0 else -1]:
                result = picture.quantize(runner(tile.read(picture.rgb)))
                tile.write(result, results[runner.name], SCALE)
            advance(runners)
    if len(runners) > 1:
        _time_again(cut[-1].read(picture.rgb), runners)
    return results


def _time_again(window: RGB, runners: Sequence[Runner]) -> None:
    """Until there are enough times for a median."""
    while len(runners[0].seconds) < LEAST_TIMES:
        for runner in runners:
            runner(window)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("upscaling", total=total)

        def advance(runners: Sequence[Runner]) -> None:
            last = ", ".join(f"{runner.name} {runner.seconds[-1] * 1e3:.0f} ms" for runner in runners)
            bar.update(task, advance=1, description=last)

        yield advance


# ---- telling ------------------------------------------------------------------------------------------------


def _print_plan(console: Console, picture: Picture, cut: Sequence[Tile], networks: Networks, options: Options) -> None:
    height, width = picture.rgb.shape[:2]
    rows, columns = cut[0].read(picture.rgb).shape[:2]
    reach = networks.pruned.reach
    console.print(
        f"{width} x {height} to {width * SCALE} x {height * SCALE} pixels; RRDBNet of {len(networks.pruned.body)} "
        f"blocks, {networks.sparsity:.1%} zeros, {networks.origin}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    seams = f"overlap {options.overlap} of the {reach} pixels that the network sees around a pixel"
    exact = (
        "no seams at all" if options.overlap >= reach else "faint seams are possible, a larger --overlap removes them"
    )
    how = f"{seams}: {exact}" if len(cut) > 1 else "the whole picture at once"
    console.print(f"tiles: {len(cut)} windows of {columns} x {rows}; {how}", highlight=False, soft_wrap=True)


def _print_layers(console: Console, model: nn.Module, window: RGB, is_tuned: bool) -> None:
    layers = conversion_report(model)
    sparse = sum(layer.decision == "sparse" for layer in layers)
    tuned = sum(layer.reason.startswith("tuned") for layer in layers)
    text = f"layers: {sparse} of {len(layers)} sparse"
    if is_tuned:
        text += f", {tuned} by the tuned file"
    if tuned < len(layers):
        shape = f"1,3,{window.shape[0]},{window.shape[1]}"
        text += f"; the rest by default (tune for windows of this size: --input {shape})"
    console.print(text, highlight=False, soft_wrap=True)


def _print_times(console: Console, runners: Sequence[Runner], count: int) -> None:
    table = Table("network", "ms a tile (median)", "least", f"s for {count} tiles", "speed")
    medians = {runner.name: statistics.median(runner.seconds) for runner in runners}
    for runner in reversed(runners):
        median = medians[runner.name]
        layout = ", channels-last" if runner.channels_last else ""
        speed = f"{medians['dense'] / median:.2f}" if "dense" in medians else ""
        times = f"{median * 1e3:.0f}", f"{min(runner.seconds) * 1e3:.0f}", f"{sum(runner.seconds[:count]):.1f}"
        table.add_row(runner.name + layout, *times, speed)
    console.print(table)


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of integers of one dtype; infinite if they are the same.

    Row by row, so that no copy of the whole is made.
    """
    total = sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in zip(a, b, strict=True))
    return math.inf if total == 0 else 10 * math.log10(float(np.iinfo(a.dtype).max) ** 2 * a.size / total)


def _print_difference(console: Console, results: dict[str, npt.NDArray[Any]]) -> None:
    if "dense" not in results:
        return
    ratio = psnr(results["sparse"], results["dense"])
    said = "the same in every value" if math.isinf(ratio) else f"PSNR {ratio:.1f} dB"
    console.print(f"sparse against dense: {said}", highlight=False)


def _compare(
    path: Path, picture: Picture, results: dict[str, npt.NDArray[Any]], networks: Networks, runners: Sequence[Runner]
) -> None:
    """Write the middle of the picture: bicubic, dense, sparse."""
    height, width = picture.rgb.shape[:2]
    rows, columns = _middle(height), _middle(width)
    panels = {"bicubic\n ": bicubic(picture.rgb[rows, columns], SCALE)}
    seconds = {runner.name: statistics.median(runner.seconds) for runner in runners}
    if "dense" in results:
        panels[f"dense\n{seconds['dense'] * 1e3:.0f} ms a tile"] = _panel(results["dense"], rows, columns)
    caption = f"sparse, {networks.sparsity:.0%} zeros\n{seconds['sparse'] * 1e3:.0f} ms a tile"
    if "dense" in results:
        caption += f", PSNR to dense {psnr(results['sparse'], results['dense']):.1f} dB"
    panels[caption] = _panel(results["sparse"], rows, columns)
    write_side_by_side(path, panels)


def _middle(length: int) -> slice:
    start = max(0, (length - COMPARED) // 2)
    return slice(start, min(length, start + COMPARED))


def _panel(values: npt.NDArray[Any], rows: slice, columns: slice) -> RGB:
    """A part of a result (rows and columns of the input) as RGB in [0, 1]."""
    part = values[rows.start * SCALE : rows.stop * SCALE, columns.start * SCALE : columns.stop * SCALE]
    return np.broadcast_to(part, (*part.shape[:2], 3)).astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
