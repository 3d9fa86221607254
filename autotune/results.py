"""What a report can show beside a tuned file: sweeps over sparsity, and points of accuracy and time.

`read` tells these files apart by what is in them:

- results of the layer benchmarks on CPU (``rows`` with ``dense`` and ``ours``) and GPU (``rows`` with ``times``):
  a sweep for each row;
- a tuned file: a sweep for each spec that it has at several sparsities (entries of `autotune.BUCKETS`);
- ``quickstart.json``: points;
- a points file::

    {"format": "numbasparse.points", "version": 1, "title": "ResNet-18 on Fashion-MNIST", "measure": "accuracy, %",
     "points": [{"name": "dense", "time_ms": 10.8, "accuracy": 95.2},
                {"name": "90 %", "time_ms": 4.7, "accuracy": 95.0, "group": "pruned"}]}

  More accuracy is better, whatever it measures; ``group`` is optional.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from autotune.report import short_shape
from autotune.tuned import FORMAT as TUNED_FORMAT
from autotune.tuned import Layer, TunedModel
from numbasparse.spec import ConvSpec

POINTS_FORMAT = "numbasparse.points"
POINTS_VERSION = 1

Positive = Annotated[float, msgspec.Meta(gt=0)]
T = TypeVar("T")


class Series(msgspec.Struct, frozen=True):
    """Times of one way to run a layer: microseconds, at rising sparsities (fractions)."""

    name: str
    sparsities: tuple[float, ...]
    us: tuple[float, ...]


class Sweep(msgspec.Struct, frozen=True):
    """One layer at several sparsities; `dense_us` is the best dense time, None if unknown."""

    layer: str
    dense_us: float | None
    series: tuple[Series, ...]


class Sweeps(msgspec.Struct, frozen=True):
    """The sweeps of one file, and where they were measured."""

    source: str
    where: str
    sweeps: tuple[Sweep, ...]


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's time in milliseconds and its accuracy."""

    name: str
    time_ms: Positive
    accuracy: float
    group: str = ""


class Points(msgspec.Struct, frozen=True):
    """The points of one file; `measure` names the accuracy."""

    source: str
    title: str
    measure: str
    points: tuple[Point, ...]


def read(path: str | os.PathLike[str]) -> Sweeps | Points:
    """Read a results file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is of none of the kinds above, or of one but malformed; the text names the file.
    """
    blob = Path(path).read_bytes()
    try:
        content = msgspec.json.decode(blob)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"cannot use {os.fspath(path)!r} as results: it is no JSON, or truncated or corrupt ({error})"
        ) from None
    if isinstance(content, dict) and content.get("format") == TUNED_FORMAT:
        return of_tuned(TunedModel.load(path, to_run=False), Path(path).name)
    try:
        return _read_content(content, Path(path).name)
    except ValueError as error:
        raise ValueError(f"cannot use {os.fspath(path)!r} as results: {error}") from None


def of_tuned(tuned: TunedModel, source: str) -> Sweeps:
    """The sweeps of a tuned model: specs that it has in at least two buckets of sparsity."""
    by_spec: dict[ConvSpec, list[Layer]] = {}
    for layer in tuned.layers:
        by_spec.setdefault(ConvSpec.from_dict(layer.spec), []).append(layer)
    sweeps = tuple(_of_layers(spec, layers) for spec, layers in by_spec.items() if len({x.bucket for x in layers}) > 1)
    return Sweeps(source, f"{tuned.device.label}, {tuned.created:%Y-%m-%d}", sweeps)


def crossover(sweep: Sweep, series: Series) -> float | None:
    """The sparsity from which on a series is faster than dense, by linear interpolation between measurements.

    Its least sparsity where it is faster everywhere; None where it is not faster at its greatest sparsity, or dense
    is unknown.
    """
    if sweep.dense_us is None or series.us[-1] >= sweep.dense_us:
        return None
    slower = [i for i, us in enumerate(series.us) if us >= sweep.dense_us]
    if not slower:
        return series.sparsities[0]
    i = slower[-1]
    (a, b), (slow, fast) = series.sparsities[i : i + 2], series.us[i : i + 2]
    return a + (b - a) * (slow - sweep.dense_us) / (slow - fast)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by rising time: no other point is as fast and more accurate, or as accurate and faster."""
    best = -math.inf
    kept = []
    for point in sorted(points, key=lambda p: (p.time_ms, -p.accuracy)):
        if point.accuracy > best:
            kept.append(point)
            best = point.accuracy
    return kept


# ---- kinds of files -----------------------------------------------------------------------------------------


class _PointsFile(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    title: str
    measure: str
    points: Annotated[list[Point], msgspec.Meta(min_length=1)]


class _Environment(msgspec.Struct):
    processor: str
    date: str


class _Median(msgspec.Struct):
    median_us: Positive


class _CpuRow(msgspec.Struct):
    layer: str
    dense: Annotated[dict[str, _Median], msgspec.Meta(min_length=1)]
    ours: Annotated[dict[str, _Median], msgspec.Meta(min_length=1)]


class _CpuFile(msgspec.Struct):
    environment: _Environment
    threads: int
    rows: list[_CpuRow]


class _Time(msgspec.Struct):
    us: Positive


class _GpuRow(msgspec.Struct):
    layer: str
    times: dict[str, _Time]


class _Gpu(msgspec.Struct):
    name: str


class _GpuFile(msgspec.Struct):
    environment: _Environment
    gpu: _Gpu
    rows: list[_GpuRow]


class _Accuracy(msgspec.Struct, rename={"pruned": "pruned, torch", "ours": "pruned, numbasparse"}):
    dense: float
    pruned: float
    ours: float


class _QuickstartFile(msgspec.Struct):
    accuracy: _Accuracy
    whole_model_ms: dict[str, Positive]
    images: int
    batch: int


_EXPECTED = (
    "expected results of the layer benchmarks, a tuned file, a quickstart.json, or points "
    f'({{"format": "{POINTS_FORMAT}", "version": {POINTS_VERSION}, "title", "measure", "points": [...]}})'
)


def _read_content(content: Any, source: str) -> Sweeps | Points:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; {_EXPECTED}")
    if content.get("format") == POINTS_FORMAT:
        return _points(_as(content, _PointsFile), source)
    if "whole_model_ms" in content:
        return _quickstart(_as(content, _QuickstartFile), source)
    rows = content.get("rows")
    row = rows[0] if isinstance(rows, list) and rows else None
    if isinstance(row, dict) and "dense" in row and "ours" in row:
        return _of_cpu(_as(content, _CpuFile), source)
    if isinstance(row, dict) and "times" in row and "gpu" in content:
        return _of_gpu(_as(content, _GpuFile), source)
    raise ValueError(_EXPECTED)


def _as(content: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}") from None


def _points(file: _PointsFile, source: str) -> Points:
    if file.version != POINTS_VERSION:
        raise ValueError(f"its version is {file.version}, but this package reads only version {POINTS_VERSION}")
    return Points(source, file.title, file.measure, tuple(file.points))


def _quickstart(file: _QuickstartFile, source: str) -> Points:
    times = dict(file.whole_model_ms)
    called = times.pop("numbasparse", None)
    ours = times.pop("numbasparse, captured", called)  # older files have none
    if ours is None or not times:
        raise ValueError("whole_model_ms must have the time of numbasparse and at least one dense time")
    dense = min(times.values())
    points = (
        Point("dense, torch", dense, file.accuracy.dense),
        Point("pruned, torch", dense, file.accuracy.pruned),
        Point("pruned, numbasparse", ours, file.accuracy.ours),
    )
    return Points(source, f"Quickstart's network, batch {file.batch}", f"accuracy on {file.images} images", points)


def _of_cpu(file: _CpuFile, source: str) -> Sweeps:
    sweeps = []
    for row in file.rows:
        # Stock torch: the layouts without weights that were packed before the call.
        stock = [time.median_us for name, time in row.dense.items() if not name.startswith("packed")]
        pairs = [(_fraction(name), time.median_us) for name, time in row.ours.items()]
        sweeps.append(Sweep(row.layer, min(stock, default=None), (_series("chosen", pairs),)))
    where = f"{file.environment.processor}, {file.threads} threads, {file.environment.date[:10]}"
    return Sweeps(source, where, tuple(sweeps))


def _of_gpu(file: _GpuFile, source: str) -> Sweeps:
    sweeps = []
    for row in file.rows:
        stock = [row.times[name].us for name in ("cudnn NCHW", "cudnn NHWC") if name in row.times]
        series = []
        for kind, words in (("ours native ", "layout kept"), ("ours alone ", "with conversions")):
            pairs = [(_fraction(n[len(kind) :]), t.us) for n, t in row.times.items() if _is_plain(n, kind)]
            series += [_series(words, pairs)] if pairs else []
        sweeps.append(Sweep(row.layer, min(stock, default=None), tuple(series)))
    return Sweeps(source, f"{file.gpu.name}, {file.environment.date[:10]}", tuple(s for s in sweeps if s.series))


def _is_plain(name: str, kind: str) -> bool:
    """Whether it is a time of that kind with a warm cache: the others end with ", cold"."""
    return name.startswith(kind) and name.endswith("%")


def _of_layers(spec: ConvSpec, layers: Sequence[Layer]) -> Sweep:
    dense = [layer.dense_us for layer in layers if layer.dense_us is not None]
    pairs = [(layer.sparsity, layer.median_us) for layer in layers]
    return Sweep(short_shape(spec), min(dense, default=None), (_series("chosen", pairs),))


def _series(name: str, pairs: Iterable[tuple[float, float]]) -> Series:
    """By rising sparsity; of two times at the same one, the less."""
    least: dict[float, float] = {}
    for sparsity, us in pairs:
        least[sparsity] = min(us, least.get(sparsity, math.inf))
    ordered = sorted(least.items())
    return Series(name, tuple(s for s, _ in ordered), tuple(us for _, us in ordered))


def _fraction(text: str) -> float:
    """``"90%"`` as 0.9."""
    try:
        value = float(text.removesuffix("%")) / 100.0
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ValueError(f'expected a sparsity like "90%", got {text!r}')
    return value
