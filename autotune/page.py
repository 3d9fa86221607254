"""The report of a tuned model as one HTML page that needs no other file and no network, and its pictures.

`build` makes both from a `Content`. A section for which there is no data is left out, and the page's last section
says what to give for it. All text that comes from files is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import accumulate
from string import Template
from typing import Any

import msgspec

import numbasparse
from autotune import pictures
from autotune.footprint import Form
from autotune.pictures import Picture
from autotune.report import layer_rows, summary
from autotune.results import Points, Series, Sweep, Sweeps, crossover, front, of_tuned
from autotune.roofline import Peak, Place, has_place, places
from autotune.tuned import Layer, TunedModel


@dataclass(frozen=True)
class Content:
    """What a report is made of.

    Attributes
    ----------
    tuned, source
        The tuned model, and the name of its file.
    results
        What `autotune.results.read` gave of other files.
    forms
        What `autotune.footprint.footprint` gave of the model's weights.
    peak
        The device's, for the roof of the roofline.
    """

    tuned: TunedModel
    source: str
    results: Sequence[Sweeps | Points] = ()
    forms: Sequence[Form] = ()
    peak: Peak | None = None


@dataclass(frozen=True)
class Page:
    """A page's text, and the pictures in it."""

    html: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class _Section:
    name: str
    heading: str
    parts: tuple[str | Picture, ...]

    def html(self) -> str:
        body = "\n".join(part if isinstance(part, str) else _figure(part) for part in self.parts)
        return f'<section id="{self.name}">\n<h2>{escape(self.heading)}</h2>\n{body}\n</section>'


@dataclass(frozen=True)
class _Absent:
    """A section without data: what it would show, and what to give."""

    heading: str
    give: str


def build(content: Content) -> Page:
    """Make the page and its pictures.

    Raises
    ------
    ValueError
        If the tuned model has no layer.
    """
    if not content.tuned.layers:
        raise ValueError(f"cannot make a page of {content.source!r}: it has no layer")
    made = [make(content) for make in _SECTIONS]
    sections = [section for section in made if isinstance(section, _Section)]
    absent = [section for section in made if isinstance(section, _Absent)]
    if absent:
        sections.append(_absent_section(absent))
    drawn = tuple(part for section in sections for part in section.parts if isinstance(part, Picture))
    return Page(_render(content, sections), drawn)


def _render(content: Content, sections: Sequence[_Section]) -> str:
    tuned = content.tuned
    template = Template(resources.files("autotune").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(f"Tuned layers: {content.source}"),
        where=_text(f"{tuned.device.label}. Measured on {tuned.created:%Y-%m-%d}."),
        facts="\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in _facts(tuned)),
        contents="\n".join(f'<li><a href="#{s.name}">{escape(s.heading)}</a></li>' for s in sections),
        sections="\n".join(section.html() for section in sections),
        version=_text(numbasparse.__version__),
    )


def _facts(tuned: TunedModel) -> list[tuple[str, str]]:
    rows = layer_rows(tuned)
    total = summary(rows)
    facts = []
    if total["ratio"] is not None:
        facts.append(("times dense speed, geometric mean", f"{total['ratio']:.2f}"))
    known = [row["ratio"] for row in rows if row["ratio"] is not None]
    if known:
        facts.append(("layers faster than dense", f"{sum(ratio > 1 for ratio in known)} of {len(rows)}"))
    dense = "" if total["dense_us"] is None else f"{_ms(total['dense_us'])} → "
    facts.append(("ms, sum of layers" + (", dense → chosen" if dense else ""), dense + _ms(total["median_us"] or 0.0)))
    return facts


# ---- sections -----------------------------------------------------------------------------------------------


def _layers(content: Content) -> _Section:
    rows = layer_rows(content.tuned)
    text = (
        "Every convolution alone, median of interleaved calls. Dense is the best convolution of torch in any layout. "
        "A model's time is less than the sum where layers keep a layout between them, and more by all that is no "
        "convolution."
    )
    if len(rows) > pictures.MOST_BARS:
        text += f" Drawn are the {pictures.MOST_BARS} of {len(rows)} layers that take most time."
    return _Section("layers", "Dense against chosen", (_paragraph(text), pictures.layer_bars(rows)))


def _choices(content: Content) -> _Section:
    tuned = content.tuned
    on_gpu = any(layer.gpu is not None for layer in tuned.layers)
    columns = [
        _Column("no.", number=True),
        _Column("layer", heads=True),
        _Column("shape"),
        _Column("zeros", number=True),
        _Column("kernel"),
        _Column("config", code=True),
        _Column("dense µs", number=True),
        _Column("chosen µs", number=True),
        _Column("± µs", number=True),
        *([_Column("µs, layout kept", number=True), _Column("layouts", number=True)] if on_gpu else []),
        _Column("ratio", number=True),
        _Column("tried", number=True),
    ]
    rows = []
    for number, (row, layer) in enumerate(zip(layer_rows(tuned), _by_name(tuned), strict=True), 1):
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        cells = [str(number), row["name"], row["shape"], f"{row['sparsity']:.1%}", row["kernel"], config]
        cells += [_us(row["dense_us"]), _us(row["median_us"]), _us(row["spread_us"])]
        cells += _gpu_cells(layer) if on_gpu else []
        rows.append([*cells, _ratio(row["ratio"]), str(row["trials"])])
    text = (
        "Shape is batch × channels × height × width → output channels, kernel, /stride, g groups. ± is the "
        "interquartile range; tried is how many configs were measured."
    )
    return _Section("choices", "Chosen kernels", (_paragraph(text), _table("Every layer's choice", columns, rows)))


def _gpu_cells(layer: Layer) -> list[str]:
    return ["–", "–"] if layer.gpu is None else [_us(layer.gpu.native_us), f"{layer.gpu.takes} → {layer.gpu.gives}"]


def _sparsities(content: Content) -> _Section | _Absent:
    heading = "Time against sparsity"
    files = [of_tuned(content.tuned, content.source), *(r for r in content.results if isinstance(r, Sweeps))]
    files = [file for file in files if file.sweeps]
    if not files:
        return _Absent(
            heading,
            "--results FILE.json with results of a layer benchmark or a tuned file, or tune one layer at several "
            "sparsities (specs in two or more buckets of this file are shown).",
        )
    parts: list[str | Picture] = [
        _paragraph("Where a curve falls below the dense line, sparsity pays: the cross-over, by linear interpolation.")
    ]
    for number, file in enumerate(files, 1):
        parts += [
            _subheading(file.source),
            _paragraph(_sweep_words(file)),
            pictures.sweep_curves(file, f"sweep-{number}"),
        ]
        parts.append(_crossovers(file))
    return _Section("sparsity", heading, tuple(parts))


def _sweep_words(file: Sweeps) -> str:
    words = f"{file.where}."
    if len(file.sweeps) > pictures.MOST_SWEEPS:
        words += f" Drawn are the first {pictures.MOST_SWEEPS} of {len(file.sweeps)} layers; the table has all."
    return words


def _crossovers(file: Sweeps) -> str:
    columns = [
        _Column("layer", heads=True),
        _Column("series"),
        _Column("measured"),
        _Column("dense µs", number=True),
        _Column("µs at most zeros", number=True),
        _Column("faster than dense from", number=True),
    ]
    rows = [
        [
            sweep.layer,
            series.name,
            _span(series),
            _us(sweep.dense_us),
            _us(series.us[-1]),
            _crossover_words(sweep, series),
        ]
        for sweep in file.sweeps
        for series in sweep.series
    ]
    return _table(f"Cross-overs of {file.source}", columns, rows)


def _span(series: Series) -> str:
    low, high = _percent(series.sparsities[0]), _percent(series.sparsities[-1])
    return low if low == high else f"{low} to {high}"


def _crossover_words(sweep: Sweep, series: Series) -> str:
    if sweep.dense_us is None:
        return "dense unknown"
    at = crossover(sweep, series)
    if at is None:
        return f"never up to {_percent(series.sparsities[-1])}"
    return f"≤ {_percent(at)}" if at == series.sparsities[0] else _percent(at)


def _accuracies(content: Content) -> _Section | _Absent:
    heading = "Accuracy and time"
    files = [result for result in content.results if isinstance(result, Points)]
    if not files:
        return _Absent(
            heading,
            "--results FILE.json with points of accuracy and time: quickstart.json of `numbasparse quickstart`, or "
            '{"format": "numbasparse.points", "version": 1, "title": "...", "measure": "accuracy, %", "points": '
            '[{"name": "90 %", "time_ms": 4.7, "accuracy": 95.0}]}.',
        )
    parts: list[str | Picture] = []
    for number, file in enumerate(files, 1):
        parts += [_subheading(file.title), _paragraph(f"From {file.source}.")]
        parts += [pictures.pareto(file, f"pareto-{number}"), _points_table(file)]
    return _Section("accuracy", heading, tuple(parts))


def _points_table(file: Points) -> str:
    best = front(file.points)
    grouped = any(point.group for point in file.points)
    # The same number of digits after the point for all: columns can be compared at a glance.
    digits = max(len(f"{point.accuracy:.5g}".partition(".")[2]) for point in file.points)
    columns = [
        _Column("model", heads=True),
        *([_Column("group")] if grouped else []),
        _Column("ms", number=True),
        _Column(file.measure, number=True),
        _Column("on the front"),
    ]
    rows = [
        [
            point.name,
            *([point.group] if grouped else []),
            f"{point.time_ms:,.2f}",
            f"{point.accuracy:.{digits}f}",
            "yes" if point in best else "no",
        ]
        for point in file.points
    ]
    return _table(f"Models of {file.source}", columns, rows)


def _footprint(content: Content) -> _Section | _Absent:
    heading = "Footprint of the weights"
    if not content.forms:
        return _Absent(heading, "--weights FILE.safetensors, as written by `numbasparse quantize --sparse`.")
    dense = content.forms[0].nbytes
    columns = [_Column("form", heads=True), _Column("bytes", number=True), _Column("smaller than dense", number=True)]
    rows = [[form.name, f"{form.nbytes:,}", f"{dense / form.nbytes:.1f} times"] for form in content.forms]
    text = "Bytes of all layers together. CSR keeps a float32 value and an int32 column for each non-zero."
    parts = (_paragraph(text), pictures.footprint_bars(content.forms), _table("Bytes by form", columns, rows))
    return _Section("footprint", heading, parts)


def _roofline(content: Content) -> _Section | _Absent:
    heading = "Roofline"
    layers = content.tuned.layers
    # A layer's number is that of the first row of its names among the chosen kernels.
    first = accumulate((len(layer.names) for layer in layers), initial=1)
    numbers = [number for number, layer in zip(first, layers, strict=False) if has_place(layer)]
    numbered = dict(zip(numbers, places(layers), strict=True))
    if not numbered:
        return _Absent(heading, "a tuned file whose layers have non-zeros and times above 0.")
    peak = content.peak
    text = (
        "FLOP are two for each non-zero at each output position; bytes are input, output, and the weight's values and "
        "columns, each once."
    )
    if peak is None:
        text += ' There is no roof: give --peak "GFLOP/s,GB/s", or --measure-peak on the CPU that was tuned.'
    else:
        text += f" The roof is {peak.gflops:,.0f} GFLOP/s and {peak.gbytes:,.0f} GB/s, {peak.source}."
        text += " Layers whose data stays in caches can stand above the slope of the memory."
    picture = pictures.roofline(list(numbered.values()), list(numbered), peak)
    return _Section("roofline", heading, (_paragraph(text), picture, _places_table(numbered, peak)))


def _places_table(numbered: Mapping[int, Place], peak: Peak | None) -> str:
    columns = [
        _Column("no.", number=True),
        _Column("layer", heads=True),
        _Column("FLOP/byte", number=True),
        _Column("GFLOP/s", number=True),
        *([] if peak is None else [_Column("of the roof", number=True), _Column("bound by")]),
    ]
    rows = []
    for number, place in numbered.items():
        cells = [str(number), place.name, f"{place.intensity:,.2f}", f"{place.gflops:,.1f}"]
        if peak is not None:
            bound = "memory" if place.intensity * peak.gbytes < peak.gflops else "arithmetic"
            cells += [f"{place.gflops / peak.at(place.intensity):.1%}", bound]
        rows.append(cells)
    return _table("Every layer's place, by its number among the chosen kernels", columns, rows)


def _device(content: Content) -> _Section:
    tuned = content.tuned
    facts: dict[str, Any] = {"tuned file": content.source, "created": f"{tuned.created:%Y-%m-%d %H:%M %Z}"}
    facts |= msgspec.to_builtins(tuned.device) | {"fingerprint of the choices": tuned.fingerprint}
    columns = [_Column("what", heads=True), _Column("value")]
    versions = msgspec.to_builtins(tuned.versions)
    parts = (
        _table("Device", columns, [[name, str(value)] for name, value in facts.items()]),
        _table(
            "Versions", columns, [[name.replace("_", "-"), str(v)] for name, v in versions.items() if v is not None]
        ),
    )
    return _Section("device", "Device and versions", parts)


def _absent_section(absent: Iterable[_Absent]) -> _Section:
    items = "\n".join(f"<li>{_text(section.heading)}: give {_text(section.give)}</li>" for section in absent)
    return _Section("absent", "Not shown", (f'<ul class="absent">\n{items}\n</ul>',))


_SECTIONS: tuple[Callable[[Content], _Section | _Absent], ...] = (
    _layers,
    _choices,
    _sparsities,
    _accuracies,
    _footprint,
    _roofline,
    _device,
)


# ---- elements -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column; the one that `heads` has the rows' headings."""

    title: str
    number: bool = False
    code: bool = False
    heads: bool = False

    def head(self) -> str:
        return f'<th scope="col"{self._style()}>{_text(self.title)}</th>'

    def cell(self, text: str) -> str:
        if self.heads:
            return f'<th scope="row">{_text(text)}</th>'
        return f"<td{self._style()}>{f'<code>{_text(text)}</code>' if self.code else _text(text)}</td>"

    def _style(self) -> str:
        return ' class="number"' if self.number else ""


def _table(caption: str, columns: Sequence[_Column], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(column.head() for column in columns)
    body = "\n".join(
        f"<tr>{''.join(column.cell(text) for column, text in zip(columns, row, strict=True))}</tr>" for row in rows
    )
    return (
        # A wide table scrolls by itself; with tabindex also from the keyboard.
        f'<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0">\n'
        f"<table>\n<caption>{_text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table>\n</div>"
    )


def _figure(picture: Picture) -> str:
    caption = f"{picture.name}-caption"
    svg = picture.svg().replace("<svg", f'<svg role="img" aria-labelledby="{caption}"', 1)
    return f'<figure>\n{svg}\n<figcaption id="{caption}">{_text(picture.alt)}</figcaption>\n</figure>'


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _subheading(text: str) -> str:
    return f"<h3>{_text(text)}</h3>"


def _text(text: str) -> str:
    """Escaped, and without what a page cannot hold: control characters and lone surrogates."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _by_name(tuned: TunedModel) -> list[Layer]:
    """The layer of each row of `layer_rows`."""
    return [layer for layer in tuned.layers for _ in layer.names]


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(us: float) -> str:
    ms = us / 1000
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"
