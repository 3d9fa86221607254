"""``numbasparse report``: the table on the terminal, and the page and pictures as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

import autotune
from numbasparse.cli.models import check_out
from numbasparse.files import write_whole

if TYPE_CHECKING:
    from autotune.page import Content
    from autotune.roofline import Peak


@dataclass(frozen=True)
class Outputs:
    """What to write beside the table: a PNG of the layers, a page, a folder of the page's pictures."""

    plot: Path | None = None
    html: Path | None = None
    png: Path | None = None

    def check(self) -> None:
        """Raise OSError where one of them could not be written."""
        for path in (self.plot, self.html):
            if path is not None:
                check_out(path)
        if self.png is not None:
            check_out(self.png / "file.png" if self.png.is_dir() else self.png)
            if self.png.exists() and not self.png.is_dir():
                raise NotADirectoryError(f"cannot write pictures into {self.png}: it is no folder")


@dataclass(frozen=True)
class Extras:
    """What the page shows beside the tuned file."""

    results: tuple[Path, ...] = ()
    weights: Path | None = None
    peak: str | None = None
    measure_peak: bool = False

    def __bool__(self) -> bool:
        return bool(self.results or self.weights or self.peak is not None or self.measure_peak)


def run(path: Path, out: Outputs, extras: Extras) -> None:
    """Print the table and write what is asked for; nothing is written if anything given is wrong.

    Raises
    ------
    ValueError, OSError
        If a file or an option cannot be used.
    """
    if extras and out.html is None and out.png is None:
        raise ValueError("--results, --weights, --peak and --measure-peak are for the page: give --html or --png too")
    if extras.peak is not None and extras.measure_peak:
        raise ValueError("give either --peak or --measure-peak")
    tuned = autotune.load(path, to_run=False)
    out.check()
    made = _files(tuned, path, out, extras)
    autotune.print_report(tuned)
    if out.png is not None:
        out.png.mkdir(exist_ok=True)
    for file, blob in made.items():
        write_whole(file, blob)
        click.echo(f"wrote {file}")


def _files(tuned: autotune.TunedModel, path: Path, out: Outputs, extras: Extras) -> dict[Path, bytes]:
    made: dict[Path, bytes] = {}
    if out.plot is not None:
        from autotune import pictures

        made[out.plot] = pictures.layer_bars(autotune.layer_rows(tuned), str(path)).png()
    if out.html is None and out.png is None:
        return made
    from autotune.page import build

    page = build(_content(tuned, path, extras))
    if out.html is not None:
        made[out.html] = page.html.encode()
    if out.png is not None:
        made |= {out.png / f"{picture.name}.png": picture.png() for picture in page.pictures}
    return made


def _content(tuned: autotune.TunedModel, path: Path, extras: Extras) -> Content:
    from autotune.footprint import footprint
    from autotune.page import Content
    from autotune.results import read
    from autotune.roofline import known_peak, measure_peak, parse_peak
    from numbasparse.weight import load_weights

    results = tuple(read(file) for file in extras.results)
    forms = () if extras.weights is None else footprint(load_weights(extras.weights))
    if extras.peak is not None:
        peak: Peak | None = parse_peak(extras.peak)
    else:
        peak = measure_peak(tuned.device) if extras.measure_peak else known_peak(tuned.device)
    return Content(tuned, path.name, results, forms, peak)
