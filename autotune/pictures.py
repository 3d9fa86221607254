"""The pictures of a report, by matplotlib: PNG for files, SVG for a page that themes it.

Nothing here opens a window or touches pyplot's state. Text from files is drawn as it is: never as mathematics.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        out = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(out, format="png", dpi=150, facecolor="white")
        return out.getvalue()

    def svg(self) -> str:
        """An ``<svg>`` element for a page: no prolog, metadata or address; ids begin with `name`; colours are
        variables."""
        out = io.BytesIO()
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue().decode()
        text = text[text.index("<svg") :]
        for pattern, new in _REWRITES:
            text = pattern.sub(new, text)
        text = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{self.name}-", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        return text


# What an inline SVG must not have, or need not. Text cannot match: matplotlib escapes < and ".
_REWRITES = (
    (re.compile(r"<metadata>.*?</metadata>\s*", re.S), ""),
    (re.compile(r"<defs>\s*<style.*?</style>\s*</defs>\s*", re.S), ""),  # would hold for the whole page
    (re.compile(r' xmlns(:xlink)?="[^"]*"'), ""),
    (re.compile(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>"), r"<svg \1>"),
    (re.compile(r"font-family: [^;\"]*;? ?"), ""),
    (re.compile(r"font: ([^;\"]*?px) [^;\"]*"), r"font-size: \1"),
)


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
        times, accuracies = [p.time_ms for p in best], [p.accuracy for p in best]
        axes.step(times, accuracies, where="post", color=LINE, linewidth=1.4, label="Pareto front", zorder=1)
        groups = list(dict.fromkeys(point.group for point in file.points))
        for point in file.points:
            colour = SPARSE if point in best else DENSE
            marker = _MARKERS[groups.index(point.group) % len(_MARKERS)]
            axes.plot([point.time_ms], [point.accuracy], color=colour, marker=marker, linestyle="none")
            _note(axes, label(point.name), (point.time_ms, point.accuracy), (7, 3))
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
            share = "" if place == 0 else f"   1/{forms[0].nbytes / form.nbytes:.1f}"
            _note(axes, f"{form.nbytes / 1e6:.3g} MB{share}", (form.nbytes / 1e6, place), (5, 0), va="center")
        axes.set_yticks(range(len(forms)), [form.name for form in forms])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel("megabytes")
    alt = "Bars of the bytes of all weights: " + ", ".join(f"{f.name} {f.nbytes / 1e6:.3g} MB" for f in forms) + "."
    return Picture("footprint", alt, figure)


def roofline(places: Sequence[Place], numbers: Sequence[int], peak: Peak | None) -> Picture:
    """Every layer's place, numbered as in the page's table, under the roof where there is one."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(8.6, 4.6)
        x, y = [place.intensity for place in places], [place.gflops for place in places]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(x, y, color=SPARSE, marker="o", markersize=4.5, linestyle="none", label="layers")
        for number, place in zip(numbers, places, strict=True):
            _note(axes, str(number), (place.intensity, place.gflops), (4, 3), fontsize=7, color=MUTED)
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
