"""The pictures of a report, by matplotlib: PNG for files, SVG for a page that themes it.

Nothing here opens a window or touches pyplot's state. Text from files is drawn as it is: never as mathematics.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from autotune.footprint import Form
from autotune.results import Points, Sweep, Sweeps, crossover, front
from autotune.roofline import Peak, Place

INK, MUTED, LINE = "#1d2733", "#5d6873", "#d3d9df"
DENSE, SPARSE, ACCENT = "#8793a0", "#0b6e99", "#bf5316"

VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", DENSE: "dense", SPARSE: "sparse", ACCENT: "accent"}
"""The page's CSS variable of each colour, without the dashes: pictures follow its light and dark themes."""

MOST_BARS = 40
MOST_SWEEPS = 18

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}

_MARKERS = "osD^v"


@dataclass(frozen=True)
class Picture:
    """A drawn picture; `name` is fit for a file's name and for an id, `alt` says in words what it shows."""

    name: str
    alt: str
    figure: Figure

    def png(self) -> bytes:
        """The picture in the light colours on white."""
        return self._saved(format="png", dpi=150, facecolor="white")

    def svg(self) -> str:
        """An ``<svg>`` element for a page: no prolog, metadata or address; ids begin with `name`; colours are
        variables."""
        root = ElementTree.fromstring(self._saved(format="svg", transparent=True, metadata={"Date": None}))
        for parent in list(root.iter()):
            parent.tag = parent.tag.rpartition("}")[2]
            # A style element would hold for the whole page.
            for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
                parent.remove(child)
            parent.attrib = {
                name.rpartition("}")[2]: self._rewritten(name.rpartition("}")[2], value)
                for name, value in parent.attrib.items()
            }
        root.attrib = {"viewBox": root.attrib["viewBox"]}
        return ElementTree.tostring(root, encoding="unicode")

    def _rewritten(self, name: str, value: str) -> str:
        """An attribute of an element as the page needs it; text between elements is never touched."""
        if name == "id":
            return f"{self.name}-{value}"
        if name == "href":
            return value.replace("#", f"#{self.name}-", 1)
        value = value.replace("url(#", f"url(#{self.name}-")
        if name == "style":
            value = _FAMILY.sub("", _FONT.sub(r"font-size: \1", value))
            for colour, variable in VARIABLES.items():
                value = value.replace(colour, f"var(--{variable})")
        return value

    def _saved(self, **options: Any) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": self.name}), warnings.catch_warnings():
            # A name in a script that matplotlib's font lacks: a page's reader has fonts for it, a PNG shows boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(out, **options)
        return out.getvalue()


# The page's own font is used: of "font: 9px 'DejaVu Sans', ..." only the size stays, of "font-family: ..." nothing.
_FONT = re.compile(r"font: ([^;]*?px) [^;]*")
_FAMILY = re.compile(r"font-family: [^;]*; ?")


def layer_bars(rows: Sequence[Mapping[str, Any]], title: str = "") -> Picture:
    """Time of every layer, dense and chosen; ``rows`` as of `autotune.layer_rows`.

    Of more than `MOST_BARS` layers, those that take most time are drawn, in their order.
    """
    slowest = sorted(range(len(rows)), key=lambda i: -max(rows[i]["median_us"], rows[i]["dense_us"] or 0.0))
    shown = [rows[i] for i in sorted(slowest[:MOST_BARS])]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(8.6, 0.42 * max(len(shown), 1) + 1.2)
        places, height = range(len(shown)), 0.38
        dense = [row["dense_us"] or 0.0 for row in shown]
        axes.barh([p - height / 2 for p in places], dense, height, color=DENSE, label="dense (best of torch)")
        times = [row["median_us"] for row in shown]
        axes.barh([p + height / 2 for p in places], times, height, color=SPARSE, label="chosen by the tuner")
        for place, row in zip(places, shown, strict=True):
            if row["ratio"]:
                _note(axes, f"{row['ratio']:.1f}×", (row["median_us"], place + height / 2), (4, 0), va="center")
        axes.set_yticks(list(places), [f"{label(row['name'])}  {row['sparsity']:.0%}" for row in shown])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel("microseconds (median); beside each name its share of zeros")
        axes.set_title(label(title, 110))
        figure.legend(loc="outside upper right", ncols=2)
    faster = sum(1 for row in rows if (row["ratio"] or 0.0) > 1.0)
    alt = (
        f"Bars of {len(shown)} layers: time dense and as chosen. {faster} of {len(rows)} layers are faster than dense."
    )
    return Picture("layers", alt, figure)


def sweep_curves(file: Sweeps, name: str) -> Picture:
    """Time against sparsity, a small chart for each layer, dense as a level line, cross-overs marked."""
    shown = file.sweeps[:MOST_SWEEPS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 2.1 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, sweep in zip(grid, shown, strict=False):
            _sweep(axes, sweep)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.supylabel("microseconds", color=MUTED, fontsize=9)
        figure.supxlabel("zeros", color=MUTED, fontsize=9)
        handles = {
            text: handle for axes in grid for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=4)
    alt = f"Time against sparsity of {len(shown)} layers; the table gives the sparsity at which each overtakes dense."
    return Picture(name, alt, figure)


def _sweep(axes: Axes, sweep: Sweep) -> None:
    for number, series in enumerate(sweep.series):
        percent = [100 * s for s in series.sparsities]
        style: dict[str, Any] = {"linestyle": "--" if number else "-", "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(percent, series.us, color=SPARSE, markersize=3.5, linewidth=1.4, label=series.name, **style)
        at = crossover(sweep, series)
        if at is not None and sweep.dense_us is not None and at > series.sparsities[0]:
            style = {"marker": "x", "color": ACCENT, "linestyle": "none", "label": "cross-over", "zorder": 3}
            axes.plot([100 * at], [sweep.dense_us], **style)
    if sweep.dense_us is not None:
        axes.axhline(sweep.dense_us, color=DENSE, linewidth=1.4, label="dense")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.locator_params(nbins=5)
    axes.tick_params(labelsize=8, labelcolor=MUTED)
    axes.set_title(label(sweep.layer, 34), fontsize=8)


def pareto(file: Points, name: str) -> Picture:
    """Accuracy against time, the Pareto front as steps."""
    best = front(file.points)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(8.6, 4.0)
        # The front goes on to the right of its last point: nothing slower is more accurate.
        times = [*(p.time_ms for p in best), 1.15 * max(p.time_ms for p in file.points)]
        accuracies = [*(p.accuracy for p in best), best[-1].accuracy]
        axes.step(times, accuracies, where="post", color=LINE, linewidth=1.4, label="Pareto front", zorder=1)
        groups = list(dict.fromkeys(point.group for point in file.points))
        for point in file.points:
            colour = SPARSE if point in best else DENSE
            marker = _MARKERS[groups.index(point.group) % len(_MARKERS)]
            axes.plot([point.time_ms], [point.accuracy], color=colour, marker=marker, linestyle="none")
        places = [(point.time_ms, point.accuracy) for point in file.points]
        for members in _together(places):
            names = " · ".join(label(file.points[i].name) for i in members)
            _note(axes, label(names, 60), places[members[0]], (7, 3))
        for number, group in enumerate(groups if any(groups) else ()):
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot([], [], color=MUTED, marker=marker, linestyle="none", label=label(group or "others"))
        axes.margins(x=0.15, y=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel(label(file.measure))
        axes.tick_params(labelcolor=MUTED)
        figure.legend(loc="outside upper right", ncols=4)
    alt = f"Accuracy against time of {len(file.points)} models, {len(best)} of them on the Pareto front."
    return Picture(name, alt, figure)


def footprint_bars(forms: Sequence[Form]) -> Picture:
    """Bytes of the weights in every form; the first is the dense one."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(8.6, 0.36 * len(forms) + 0.8)
        colours = [DENSE, *[SPARSE] * (len(forms) - 1)]
        axes.barh(range(len(forms)), [form.nbytes / 1e6 for form in forms], 0.66, color=colours)
        for place, form in enumerate(forms):
            share = "" if place == 0 else f" · {forms[0].nbytes / form.nbytes:.1f} times smaller"
            _note(axes, size(form.nbytes) + share, (form.nbytes / 1e6, place), (5, 0), va="center")
        axes.set_yticks(range(len(forms)), [form.name for form in forms])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel("megabytes")
    least = min(forms, key=lambda form: form.nbytes)
    alt = (
        f"Bars of the bytes of all weights in {len(forms)} forms: {forms[0].name} {size(forms[0].nbytes)}, the least "
        f"{least.name} {size(least.nbytes)}; the table gives each."
    )
    return Picture("footprint", alt, figure)


def roofline(places: Sequence[Place], numbers: Sequence[int], peak: Peak | None) -> Picture:
    """Every layer's place, numbered as in the page's table, under the roof where there is one."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(8.6, 4.6)
        x, y = [place.intensity for place in places], [place.gflops for place in places]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(x, y, color=SPARSE, marker="o", markersize=4.5, linestyle="none", label="layers")
        logs = [(math.log(place.intensity), math.log(place.gflops)) for place in places]
        for members in _together(logs):
            at = places[members[0]]
            names = label(", ".join(str(numbers[i]) for i in members))
            _note(axes, names, (at.intensity, at.gflops), (4, 3), fontsize=7, color=MUTED)
        if peak is not None:
            ridge = peak.gflops / peak.gbytes
            ends = min(*x, ridge) / 2, max(*x, ridge) * 2
            roof = sorted({*ends, ridge})
            axes.plot(roof, [peak.at(i) for i in roof], color=ACCENT, linewidth=1.4, label="roof")
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(FuncFormatter(_minor(*axis.get_view_interval())))
        axes.tick_params(which="both", labelcolor=MUTED, labelsize=8)
        axes.set_xlabel("intensity: FLOP of non-zeros for each byte of input, output and weight")
        axes.set_ylabel("GFLOP/s of non-zeros")
        figure.legend(loc="outside upper right", ncols=2)
    under = "" if peak is None else f" under a roof of {peak.gflops:,.0f} GFLOP/s and {peak.gbytes:,.0f} GB/s"
    return Picture("roofline", f"Roofline: {len(places)} layers{under}; the table gives each layer's numbers.", figure)


def label(text: str, most: int = 36) -> str:
    """A name as a picture can show it: what cannot be printed replaced, the middle of a long one left out."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(printable) <= most:
        return printable
    half = (most - 1) // 2
    return f"{printable[:half]}…{printable[-half:]}"


def size(nbytes: int) -> str:
    """Bytes in words, for example ``"75.2 kB"``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    unit, name = (1e3, "kB") if nbytes < 1e6 else (1e6, "MB")
    return f"{nbytes / unit:,.3g} {name}" if nbytes < 1e9 else f"{nbytes / unit:,.0f} {name}"


def _together(places: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Groups of places so near to their group's first that they need one label: 2 % of the extent in x and in y."""
    x, y = zip(*places, strict=True)
    dx, dy = 0.02 * (max(x) - min(x)), 0.02 * (max(y) - min(y))
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        near = (g for g in groups if abs(place[0] - x[g[0]]) <= dx and abs(place[1] - y[g[0]]) <= dy)
        group = next(near, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", **({"fontsize": 8} | style))


def _minor(low: float, high: float) -> Any:
    """Labels 2 and 5 of a decade between those of its ends, where fewer than two decades are shown."""
    few = math.log10(high / low) < 2.0

    def text(value: float, _: int) -> str:
        return f"{value:,g}" if few and f"{value:e}"[0] in "25" else ""

    return text
