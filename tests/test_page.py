"""The report's page: well-formed, whole, safe with any name, and as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import CONFIG, GPU, gpu_layer, layer, model

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from click.testing import CliRunner, Result
from matplotlib.image import imread

from autotune import pictures
from autotune.footprint import Form
from autotune.page import Content, build
from autotune.results import Point, Points, Series, Sweep, Sweeps
from autotune.roofline import Peak
from numbasparse.cli import main
from numbasparse.weight import SparseWeight, save_weights

CHROMIUM = shutil.which("chromium")
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://example.com/x onerror=alert(1)>',
    "' style='background:url(//example.com)",
    "]]>--><svg onload=alert(1)>",
    "$title ${where} $x^2_{$",
    "a\x00b\x1b[31m\u202ec",
    'x" id="y url(#z #1d2733 font: 9px x',
    "\N{CJK UNIFIED IDEOGRAPH-5C64}\N{ROCKET}",
    "n" * 500,
    "",
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Document(HTMLParser):
    """What a page holds; a tag that is not closed, or closed in disorder, fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, list[str]] = {"td": [], "th": [], "p": [], "li": [], "h2": [], "text": [], "code": []}
        self.rows: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag in self.cells:
            self.cells[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open) & self.cells.keys():
            self.cells[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check(html: str) -> Document:
    """Assert what holds for every page, and give it parsed."""
    document = Document(html)
    assert {tag for tag, _ in document.tags}.isdisjoint(
        {"script", "img", "link", "iframe", "object", "embed", "image", "foreignobject", "base", "form"}
    )
    ids = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in document.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith("#"), f"{tag} {name}={value}"
                assert value[1:] in ids
            if name in ("aria-labelledby", "clip-path") and value is not None:
                assert value.removeprefix("url(#").removesuffix(")") in ids
            if name == "style":
                assert "url(" not in (value or "")
                assert "font-family" not in (value or "")
                assert not re.search(r"#[0-9a-f]{3,6}\b", value or ""), "a colour that no theme changes"
    for picture in document.all("svg"):
        assert picture["role"] == "img"
    for head in document.all("th"):
        assert head["scope"] in ("col", "row")
    assert len(document.all("title")) == len(document.all("h1")) == len(document.all("main")) == 1
    assert len(document.all("caption")) == len(document.all("table"))
    return document


def full(*names: str) -> Content:
    """Everything that a page can show, with these names of layers and elsewhere."""
    layers = [layer(name, 0.5 + 0.4 * i / len(names), 50.0 + i) for i, name in enumerate(names)]
    sweep = Sweep(names[0], 100.0, (Series("kept", (0.5, 0.9), (150.0, 50.0)), Series("b", (0.5, 0.9), (300.0, 200.0))))
    points = (Point(names[0], 10.0, 95.0), Point(names[-1], 5.0, 94.0, names[-1]))
    return Content(
        model(*layers),
        names[0],
        (Sweeps(names[0], names[-1], (sweep,)), Points(names[0], names[0], names[-1], points)),
        (Form("dense, float32", 1000), Form("CSR, float32", 300)),
        Peak(100.0, 20.0, "as stated by the caller"),
    )


# ---- what a page shows --------------------------------------------------------------------------------------


def test_every_section_and_every_layer() -> None:
    names = [f"stage.{i}.conv" for i in range(12)]
    page = build(full(*names))
    document = check(page.html)
    assert document.cells["h2"] == [
        "Dense against chosen",
        "Chosen kernels",
        "Time against sparsity",
        "Accuracy and time",
        "Footprint of the weights",
        "Roofline",
        "Device and versions",
    ]
    for name in names:
        assert document.cells["th"].count(name) >= 2  # chosen kernels and roofline
        assert any(text.startswith(name) for text in document.cells["text"])  # in the bars
    assert document.cells["code"] == [" ".join(f"{k}={v}" for k, v in CONFIG.items())] * len(names)
    for value in ("2.00", "50.0", "100", "A processor & kin", "2026-01-02 03:04 UTC", "0.68.1", "2.13.0"):
        assert value in document.cells["td"]
    assert "70%" in document.cells["td"]  # the cross-over
    assert "never up to 90%" in document.cells["td"]
    assert any("100 GFLOP/s and 20 GB/s, as stated by the caller" in text for text in document.cells["p"])
    assert [p.name for p in page.pictures] == ["layers", "sweep-1", "sweep-2", "pareto-1", "footprint", "roofline"]
    assert all(picture.png().startswith(PNG) for picture in page.pictures[:1])


def test_what_is_not_there_is_asked_for() -> None:
    page = build(Content(model(layer("a")), "t.json"))
    document = check(page.html)
    assert document.cells["h2"] == [
        "Dense against chosen",
        "Chosen kernels",
        "Roofline",
        "Device and versions",
        "Not shown",
    ]
    missing = [text for text in document.cells["li"] if "give" in text]
    assert [text.split(":")[0] for text in missing] == [
        "Time against sparsity",
        "Accuracy and time",
        "Footprint of the weights",
    ]
    assert "--results" in missing[0]
    assert "numbasparse.points" in missing[1]
    assert "--weights" in missing[2]
    assert any("--peak" in text for text in document.cells["p"])
    assert [p.name for p in page.pictures] == ["layers", "roofline"]


def test_layers_without_dense_times_or_non_zeros() -> None:
    document = check(build(Content(model(layer("a", 1.0, dense_us=None)), "t.json")).html)
    assert "–" in document.cells["td"]
    assert "Roofline" not in document.cells["h2"]
    assert not any("geometric mean" in text for text in document.cells["p"])


def test_a_page_of_a_gpu() -> None:
    page = build(Content(model(gpu_layer("a"), device=GPU), "t.json"))
    document = check(page.html)
    assert "µs, layout kept" in document.cells["th"]
    assert {"20.0", "CHWN → CHWN", "numba-cuda"} <= {*document.cells["td"], *document.cells["th"]}


def test_names_that_share_a_problem_each_have_a_row() -> None:
    document = check(build(Content(model(layer("a", names=["a", "b"]), layer("c", us=20.0)), "t.json")).html)
    numbers = [text for text in document.cells["text"] if text in ("1", "2", "3")][-2:]  # after those of the axes
    assert {"a", "b", "c"} <= set(document.cells["th"])
    assert numbers == ["1", "3"], "the roofline's numbers are those of the rows"


def test_no_layers() -> None:
    with pytest.raises(ValueError, match=r"'t\.json': it has no layer"):
        build(Content(model(), "t.json"))


def test_many_layers_are_drawn_in_part_and_listed_whole() -> None:
    most = pictures.MOST_BARS + 3
    page = build(Content(model(*(layer(f"layer{i}", us=10.0 + i, dense_us=9.0) for i in range(most))), "t.json"))
    document = check(page.html)
    assert {f"layer{i}" for i in range(most)} <= set(document.cells["th"])
    drawn = [text for text in document.cells["text"] if text.startswith("layer")]
    assert len([text for text in drawn if text != "layers"]) == pictures.MOST_BARS
    assert any(f"the {pictures.MOST_BARS} of {most} layers" in text for text in document.cells["p"])


# ---- names --------------------------------------------------------------------------------------------------


def test_hostile_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor a warning of glyphs that the font lacks
        page = build(full(*HOSTILE))
        assert all(picture.png().startswith(PNG) for picture in page.pictures)
    document = check(page.html)
    for name in HOSTILE:
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
        assert shown in document.cells["th"]


@settings(max_examples=12, deadline=None)
@given(st.text(max_size=30))
def test_any_name(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = check(build(Content(model(layer(name)), name)).html)
    assert "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) in document.cells["th"]


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = build(full("a", "b")).html
    assert "://" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


# ---- the command --------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a tuned file, points and weights."""
    monkeypatch.chdir(tmp_path)
    model(layer("conv1"), layer("conv2", 0.95, 30.0)).save("t.json")
    points = [{"name": "dense", "time_ms": 10.0, "accuracy": 95.0}, {"name": "90 %", "time_ms": 4.0, "accuracy": 94.5}]
    head = {"format": "numbasparse.points", "version": 1, "title": "A network", "measure": "accuracy, %"}
    Path("points.json").write_text(json.dumps(head | {"points": points}))
    weight = np.zeros((8, 8, 3, 3), np.float32)
    weight[:, 0] = 0.5
    save_weights("w.safetensors", {"conv1": SparseWeight.from_dense(weight)})
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_command_writes_page_and_pictures(folder: Path) -> None:
    before = names(folder)
    options = ("--results", "points.json", "--weights", "w.safetensors", "--peak", "100,20")
    result = run("t.json", "--html", "page.html", "--png", "pictures", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    document = check(Path("page.html").read_text(encoding="utf-8"))
    assert "Not shown" not in document.cells["h2"]
    assert "conv1" in result.stdout
    pngs = {f"pictures/{n}.png" for n in ("layers", "sweep-1", "pareto-1", "footprint", "roofline")}
    assert names(folder) - before == {"page.html", "pictures", *pngs}
    assert all(f"wrote {name}" in result.stdout for name in ("page.html", *pngs))
    assert all(Path(name).read_bytes().startswith(PNG) for name in pngs)
    assert run("t.json", "--png", "pictures").exit_code == 0, "a folder that is there is written into"


def test_a_file_of_a_gpu_is_reported_without_one(folder: Path) -> None:
    model(gpu_layer("conv1"), device=GPU).save("gpu.json")
    result = run("gpu.json", "--html", "page.html")
    assert (result.exit_code, result.stderr) == (0, "")
    document = check(Path("page.html").read_text(encoding="utf-8"))
    assert any("66,900 GFLOP/s and 3,350 GB/s, by the maker's data sheet" in text for text in document.cells["p"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--results", "points.json"), "give --html or --png"),
        (("--html", "p.html", "--results", "absent.json"), "absent.json"),
        (("--html", "p.html", "--results", "w.safetensors"), "w.safetensors"),
        (("--html", "p.html", "--weights", "t.json"), "t.json"),
        (("--html", "p.html", "--weights", "absent"), "absent"),
        (("--html", "p.html", "--peak", "fast"), "'fast'"),
        (("--html", "p.html", "--peak", "1,2", "--measure-peak"), "either --peak or --measure-peak"),
        (("--html", "p.html", "--measure-peak"), "state the peak"),
        (("--html", "absent/p.html"), "cannot write absent/p.html"),
        (("--html", "."), "cannot write ."),
        (("--html", "p.html", "--png", "t.json"), "t.json: it is no folder"),
        (("--html", "p.html", "--png", "absent/pictures"), "cannot write absent/pictures"),
    ],
)
def test_wrong_arguments_write_nothing(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    before = names(folder)
    result = run("t.json", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert names(folder) == before


# ---- a browser ----------------------------------------------------------------------------------------------


def screenshot(folder: Path, dark: bool) -> np.ndarray:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1200,1600",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--screenshot={folder / 'page.png'}",
        (folder / "page.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels: Any = imread(folder / "page.png")
    return np.asarray(255 * pixels[..., :3]).round().astype(int)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("dark", "paper", "bars"), [(False, "ffffff", "0b6e99"), (True, "14191f", "53b5dc")])
def test_in_a_browser(tmp_path: Path, dark: bool, paper: str, bars: str) -> None:
    (tmp_path / "page.html").write_text(build(full("conv1", "conv2")).html, encoding="utf-8")
    pixels = screenshot(tmp_path, dark)
    assert pixels.shape == (1600, 1200, 3)
    assert (pixels[0, 0] == list(bytes.fromhex(paper))).all()
    shown = (np.abs(pixels - list(bytes.fromhex(bars))) <= 2).all(axis=-1)
    assert shown.sum() > 5000, "the bars of the layers are not to be seen"
