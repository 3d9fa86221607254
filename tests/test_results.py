"""What a report shows beside a tuned file: readers of results, cross-overs, fronts, the roofline and the footprint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from reports import CPU, GPU, SPEC, gpu_layer, layer, model

pytest.importorskip("torch")

from autotune.footprint import csr_nbytes, footprint
from autotune.results import Point, Points, Series, Sweep, Sweeps, crossover, front, of_tuned, read
from autotune.roofline import Peak, known_peak, measure_peak, parse_peak, place_of, places
from autotune.tuned import this_device
from numbasparse.quantization import CodebookQuantization
from numbasparse.weight import SparseWeight

BENCHMARKS = ROOT / "benchmarks" / "results"
POINTS: dict[str, Any] = {
    "format": "numbasparse.points",
    "version": 1,
    "title": "A network",
    "measure": "accuracy, %",
    "points": [
        {"name": "dense", "time_ms": 10.0, "accuracy": 95.0},
        {"name": "90 %", "time_ms": 4.0, "accuracy": 94.5, "group": "pruned"},
    ],
}
QUICKSTART: dict[str, Any] = {
    "accuracy": {"dense": 0.95, "pruned, torch": 0.96, "pruned, numbasparse": 0.96},
    "whole_model_ms": {"dense, NCHW": 12.0, "dense, channels-last": 10.0, "numbasparse": 4.0},
    "images": 2000,
    "batch": 8,
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    return path


# ---- readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu_layers.json", "cpu_layers_avx512.json", "cuda_layers.json"])
def test_benchmarks_of_layers_are_sweeps(name: str) -> None:
    file = read(BENCHMARKS / name)
    assert isinstance(file, Sweeps)
    assert file.source == name
    assert len(file.sweeps) == len(json.loads((BENCHMARKS / name).read_text())["rows"])
    for sweep in file.sweeps:
        assert sweep.dense_us
        for series in sweep.series:
            assert list(series.sparsities) == sorted(set(series.sparsities))
            assert 0.8 in series.sparsities


def test_dense_of_the_cpu_benchmark_is_stock_torch(tmp_path: Path) -> None:
    dense = {"nchw": {"median_us": 9.0}, "nhwc": {"median_us": 8.0}, "packed_nchw": {"median_us": 1.0}}
    row = {"layer": "a", "dense": dense, "ours": {"95%": {"median_us": 2.0}, "90%": {"median_us": 4.0}}}
    environment = {"processor": "P", "date": "2026-01-02T03:04:05"}
    file = read(written(tmp_path, {"environment": environment, "threads": 2, "rows": [row]}))
    assert file == Sweeps(
        "results.json", "P, 2 threads, 2026-01-02", (Sweep("a", 8.0, (Series("chosen", (0.9, 0.95), (4.0, 2.0)),)),)
    )


def test_quickstart_and_points(tmp_path: Path) -> None:
    file = read(written(tmp_path, QUICKSTART))
    assert isinstance(file, Points)
    assert [(p.time_ms, p.accuracy) for p in file.points] == [(10.0, 0.95), (10.0, 0.96), (4.0, 0.96)]
    captured = QUICKSTART | {"whole_model_ms": QUICKSTART["whole_model_ms"] | {"numbasparse, captured": 3.0}}
    file = read(written(tmp_path, captured))
    assert isinstance(file, Points)
    assert [p.time_ms for p in file.points] == [10.0, 10.0, 3.0]
    file = read(written(tmp_path, POINTS))
    assert isinstance(file, Points)
    assert (file.title, file.measure) == ("A network", "accuracy, %")
    assert file.points == (Point("dense", 10.0, 95.0), Point("90 %", 4.0, 94.5, "pruned"))


def test_a_tuned_file_of_any_device_is_read(tmp_path: Path) -> None:
    a, b = layer("a", 0.9, 50.0), layer("b", 0.95, 30.0, 90.0)
    model(a, b).save(tmp_path / "t.json")
    file = read(tmp_path / "t.json")
    assert isinstance(file, Sweeps)
    assert file.sweeps == (Sweep("2x16x14x14 -> 32, 3x3", 90.0, (Series("chosen", (0.9, 0.95), (50.0, 30.0)),)),)
    model(gpu_layer("a"), device=GPU).save(tmp_path / "t.json")
    assert read(tmp_path / "t.json") == Sweeps("t.json", f"{GPU.label}, 2026-01-02", ())


def test_one_bucket_is_no_sweep() -> None:
    assert of_tuned(model(layer("a", 0.9), layer("b", 0.901)), "t").sweeps == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text", "it holds a str"),
        ([], "it holds a list"),
        ({}, "expected results of the layer benchmarks"),
        ({"rows": [{}]}, "expected results of the layer benchmarks"),
        (POINTS | {"version": 2}, "its version is 2"),
        (POINTS | {"points": []}, "points"),
        (POINTS | {"points": [{"name": "a", "time_ms": 0.0, "accuracy": 1.0}]}, "time_ms"),
        (POINTS | {"points": [{"name": "a", "time_ms": 1.0, "acuracy": 1.0}]}, "acuracy"),
        (QUICKSTART | {"whole_model_ms": {"numbasparse": 4.0}}, "at least one dense time"),
        (QUICKSTART | {"accuracy": {}}, "accuracy"),
        ({"rows": [{"layer": "a", "dense": {}, "ours": {}}]}, "rows[0].dense"),
        (
            {
                "environment": {"processor": "P", "date": "2026"},
                "threads": 1,
                "rows": [{"layer": "a", "dense": {"n": {"median_us": 1.0}}, "ours": {"many": {"median_us": 1.0}}}],
            },
            "'many'",
        ),
    ],
)
def test_wrong_results(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"results\.json") as error:
        read(written(tmp_path, content))
    assert words in str(error.value)


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff\x00", b"[" * 100_000])
def test_no_json(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "r.json").write_bytes(blob)
    with pytest.raises(ValueError, match="no JSON"):
        read(tmp_path / "r.json")


# ---- cross-overs and fronts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        ((90.0, 50.0, 20.0), 0.5),
        ((150.0, 50.0, 20.0), 0.6),
        ((150.0, 120.0, 110.0), None),
        ((90.0, 120.0, 60.0), 0.7 + 0.2 / 3),
    ],
)
def test_crossover(us: tuple[float, ...], expected: float | None) -> None:
    series = Series("chosen", (0.5, 0.7, 0.9), us)
    found = crossover(Sweep("a", 100.0, (series,)), series)
    assert found == (None if expected is None else pytest.approx(expected))
    assert crossover(Sweep("a", None, (series,)), series) is None


def test_crossover_is_where_the_line_meets_dense() -> None:
    series = Series("chosen", (0.5, 0.9), (300.0, 50.0))
    assert crossover(Sweep("a", 100.0, (series,)), series) == pytest.approx(0.5 + 0.4 * 200 / 250)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(i), float(t), float(a)) for i, (t, a) in enumerate(pairs)]
    found = {(p.time_ms, p.accuracy) for p in front(points)}
    naive = {
        (p.time_ms, p.accuracy)
        for p in points
        if not any(
            (q.time_ms <= p.time_ms and q.accuracy > p.accuracy) or (q.time_ms < p.time_ms and q.accuracy >= p.accuracy)
            for q in points
        )
    }
    assert found == naive


# ---- roofline -----------------------------------------------------------------------------------------------


def test_a_place() -> None:
    place = place_of(layer("a", 0.9, 50.0))
    flop = 2 * 461 * 2 * 14 * 14
    nbytes = 4 * (2 * 16 * 14 * 14 + 2 * 32 * 14 * 14) + 8 * 461
    assert SPEC.out_shape == (2, 32, 14, 14)
    assert place.gflops == pytest.approx(flop / 50e-6 / 1e9)
    assert place.intensity == pytest.approx(flop / nbytes)
    assert place_of(gpu_layer("a")).gflops == pytest.approx(flop / 20e-6 / 1e9)


def test_layers_without_a_place() -> None:
    assert [p.name for p in places([layer("a"), layer("b", us=0.0), layer("c", 1.0)])] == ["a"]


def test_peaks() -> None:
    peak = parse_peak("100,20")
    assert (peak.at(1.0), peak.at(5.0), peak.at(50.0)) == (20.0, 100.0, 100.0)
    assert known_peak(CPU) is None
    assert known_peak(GPU) == Peak(66_900.0, 3_350.0, "by the maker's data sheet, float32 without tensor cores")


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "0,1", "1,-1", "inf,1", "nan,1"])
def test_wrong_peaks(text: str) -> None:
    with pytest.raises(ValueError, match="peak"):
        parse_peak(text)


def test_the_peak_of_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    peak = measure_peak(this_device(1))
    assert 0.1 < peak.gbytes < 1e5
    assert 0.1 < peak.gflops < 1e6
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_peak_of_another_device_is_not_measured(device: Any) -> None:
    with pytest.raises(ValueError, match="GFLOP/s,GB/s"):
        measure_peak(device)


# ---- footprint ----------------------------------------------------------------------------------------------


def weights() -> dict[str, SparseWeight]:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((64, 32, 3, 3), dtype=np.float32) * (rng.random((64, 32, 3, 3)) < 0.2)
    return {"a": SparseWeight.from_dense(dense), "b": SparseWeight.from_dense(dense[:32])}


def test_footprint_of_plain_weights() -> None:
    given = weights()
    forms = {form.name: form.nbytes for form in footprint(given)}
    assert forms["dense, float32"] == 4 * (64 + 32) * 32 * 9
    nnz = sum(weight.nnz for weight in given.values())
    assert forms["CSR, float32"] == 8 * nnz + 4 * (65 + 33)
    for bits in (8, 4, 3):
        coded = [weight.quantized(CodebookQuantization(bits=bits)) for weight in given.values()]
        assert forms[f"codes of {bits} bits"] == sum(weight.nbytes for weight in coded)
    assert forms["codes of 3 bits"] < forms["codes of 4 bits"] < forms["codes of 8 bits"] < forms["CSR, float32"]
    assert csr_nbytes(given["a"]) == 8 * given["a"].nnz + 4 * 65


def test_footprint_of_quantized_weights() -> None:
    coded = {name: weight.quantized(CodebookQuantization(bits=4)) for name, weight in weights().items()}
    assert [form.name for form in footprint(coded)[2:]] == ["codes of 4 bits", "4 bits, Huffman"]


def test_wrong_weights() -> None:
    with pytest.raises(ValueError, match="no layer"):
        footprint({})
    given = weights()
    given["a"] = given["a"].quantized(CodebookQuantization(bits=4))
    with pytest.raises(ValueError, match="1 of 2 layers are quantized"):
        footprint(given)


# ---- what is shown --------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    assert tables.TABLES.read_text() == tables.text(), "run: python benchmarks/tables.py"


@pytest.mark.parametrize("name", ["README.md", "benchmarks/notes.md", "benchmarks/tables.md"])
def test_links_lead_to_files(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []
