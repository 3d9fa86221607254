"""The autotuner: search, tuned file, look-up, resuming, and what it must never choose."""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune import BUCKETS, LayerProblem, TunedModel, bucket_of, layer_rows, load, tune_layers
from autotune import measure as timing
from autotune import tuned as files
from numbasparse.kernels import KERNELS
from numbasparse.kernels.base import Config, Kernel, Runner, Space, check_fields
from numbasparse.plans import Choice, Plan, plan, resolve
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

optuna = pytest.importorskip("optuna")


def weight_of(spec: ConvSpec, sparsity: float, seed: int = 0) -> SparseWeight:
    """A weight with exactly that share of zeros, up to rounding."""
    rng = np.random.default_rng(seed)
    dense = rng.uniform(0.5, 1.0, spec.weight_shape).astype(np.float32)
    dense.reshape(-1)[rng.permutation(dense.size)[: round(sparsity * dense.size)]] = 0.0
    return SparseWeight.from_dense(dense, spec.groups)


SPEC = ConvSpec.create((2, 8, 8, 8), (8, 8, 3, 3), 1, 1)
POINTWISE = ConvSpec.create((2, 8, 8, 8), (16, 8, 1, 1))


def problem(name: str = "conv", spec: ConvSpec = SPEC, sparsity: float = 0.9, seed: int = 0) -> LayerProblem:
    return LayerProblem(name, spec, weight_of(spec, sparsity, seed))


@pytest.fixture(scope="module")
def tuned() -> TunedModel:
    problems = [problem("a"), problem("twin of a"), problem("b", POINTWISE)]
    return tune_layers(problems, trials=6, progress=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the candidates that were measured, re-timings apart."""
    keys: list[str] = []
    original = timing.measure

    def measure(bench: Any, candidate: Any, best_us: float) -> Any:
        keys.append(candidate.key)
        return original(bench, candidate, best_us)

    monkeypatch.setattr(timing, "measure", measure)
    return keys


@pytest.fixture(autouse=True)
def no_surprising_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "the machine was busy")
        yield


# ---- search -------------------------------------------------------------------------------------------------


def test_layers_of_a_tuned_model(tuned: TunedModel) -> None:
    assert [layer.names for layer in tuned.layers] == [["a", "twin of a"], ["b"]]
    for layer in tuned.layers:
        assert layer.median_us > 0
        assert layer.trials == 6
        assert layer.bucket == bucket_of(layer.sparsity)
        assert layer.choice.version == KERNELS[layer.choice.kernel].version
        assert {"dense"} < {measured.kernel for measured in layer.top}
        assert layer.dense_us is not None
        assert layer.dense_choice_us is not None
        assert layer.dense_us <= layer.dense_choice_us
        assert layer.ratio == pytest.approx(layer.dense_us / layer.median_us)


def test_choice_is_not_slower_than_dense(tuned: TunedModel) -> None:
    for layer in tuned.layers:
        dense = layer.dense_choice_us or 0.0
        assert layer.median_us <= dense
        assert layer.choice.kernel == "dense" or layer.median_us < 0.98 * dense


def test_a_plan_takes_a_tuned_model(tuned: TunedModel) -> None:
    p = problem("a")
    made = plan(p.spec, p.weight, config=tuned)
    assert made.choice == resolve(tuned, p.spec, p.weight, 1)
    assert made.choice == tuned.choice(p.spec, p.weight)


def test_sparse_must_win_by_median_and_by_best_time() -> None:
    from autotune.study import _chosen, _Final

    dense = [_Final({"kernel": "dense"}, us=100.0, spread=1.0, best=50.0)]
    for us, best, wins in ((90.0, 40.0, True), (90.0, 60.0, False), (99.0, 40.0, False)):
        sparse = [_Final({"kernel": "cpu_direct"}, us, 1.0, best)]
        assert _chosen(sparse, dense) == (sparse if wins else dense)[0]
    assert _chosen(sparse, []) == sparse[0]


def test_a_busy_machine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [timing.Timing(900.0, 800.0, 100.0)]
    monkeypatch.setattr(timing, "interleaved", lambda calls: busy * len(calls))
    with pytest.warns(UserWarning, match="busy with something else while 1 of 1 layers"):
        tune_layers([problem()], trials=3, progress=False)


def test_no_candidate_is_measured_twice(counted: list[str]) -> None:
    tune_layers([problem()], trials=14, progress=False)
    assert len(counted) == len(set(counted)) <= 14


def test_a_small_space_is_measured_whole(counted: list[str]) -> None:
    p = problem("one", ConvSpec.create((1, 4, 1, 4), (4, 4, 1, 1)))
    from autotune.space import ProblemSpace

    space = ProblemSpace(p, 1)
    tune_layers([p], trials=500, threads=1, progress=False)
    assert sorted(counted) == sorted(space.candidates)


def test_few_trials_still_measure_dense_and_the_default(counted: list[str]) -> None:
    tune_layers([problem()], trials=1, timeout=1e-3, progress=False)
    assert sum(key.startswith("dense") for key in counted) == 2
    assert any(key.startswith("cpu_direct") for key in counted)


def test_activation_and_bias_are_verified() -> None:
    bias = np.linspace(-1, 1, SPEC.k, dtype=np.float32)
    for activation in ("relu", "relu6", "silu", "leaky_relu(0.2)"):
        p = LayerProblem("a", SPEC, weight_of(SPEC, 0.9), bias, activation)
        layer = tune_layers([p], trials=3, progress=False).layers[0]
        assert layer.trials == 3
        assert len(layer.top) == 3, "a right candidate was rejected"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"trials": 0}, ValueError, "trials must be at least 1"),
        ({"trials": 1.5}, TypeError, "trials must be an int"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be more than 0"),
        ({"timeout": "1"}, TypeError, "timeout must be a number"),
        ({"device": "tpu"}, ValueError, "device must be 'cpu', 'cuda' or .* got 'tpu'"),
        ({"threads": 0}, ValueError, "threads must be from 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tune_layers([problem()], progress=False, **arguments)


def test_problems_are_checked() -> None:
    with pytest.raises(ValueError, match="no layers to tune"):
        tune_layers([])
    with pytest.raises(TypeError, match="LayerProblem"):
        tune_layers(["conv"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layer 'x'"):
        LayerProblem("x", POINTWISE, weight_of(SPEC, 0.5))
    with pytest.raises(ValueError, match=r"bias .*layer 'x'"):
        LayerProblem("x", SPEC, weight_of(SPEC, 0.5), np.zeros(3, np.float32))


def test_import_loads_neither_torch_nor_optuna() -> None:
    code = "import sys, autotune; sys.exit(sum(m in sys.modules for m in ('torch', 'optuna')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- kernels that are wrong ---------------------------------------------------------------------------------


class _FakeRunner(Runner):
    nbytes = workspace = 0

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run = run

    def run(self, x: int, y: int, bias: int, threads: int, residual: int = 0) -> None:
        self._run(y)


class _Fake(Kernel):
    """Returns at once; what it computes is `run`'s affair."""

    name, device, version = "fake", "cpu", 1

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run = run

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return {"size": (1, 2)}

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        return check_fields(config, {"size": (1, 2)})

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return {"size": 1}

    def prepare(self, spec: Any, weight: Any, config: Config, activation: Any = "none") -> Runner:
        return _FakeRunner(self._run)


def _fill(value: float) -> Callable[[int], None]:
    size = int(np.prod(SPEC.out_shape))
    return lambda y: np.ctypeslib.as_array((ctypes.c_float * size).from_address(y)).fill(value)


def _raise(y: int) -> None:
    raise OSError("no luck")


@pytest.mark.parametrize(
    "run", [lambda y: None, _fill(0.0), _fill(float("inf")), _raise], ids=["unwritten", "zeros", "inf", "raises"]
)
def test_a_wrong_kernel_is_never_chosen(monkeypatch: pytest.MonkeyPatch, run: Callable[[int], None]) -> None:
    monkeypatch.setitem(KERNELS, "fake", _Fake(run))
    layer = tune_layers([problem()], trials=8, progress=False).layers[0]
    assert "fake" not in {layer.choice.kernel, *(measured.kernel for measured in layer.top)}


def test_a_kernel_that_is_wrong_now_and_then_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    calls = 0

    def run(y: int) -> None:
        nonlocal calls
        calls += 1
        size = int(np.prod(SPEC.out_shape))
        out = np.ctypeslib.as_array((ctypes.c_float * size).from_address(y))
        out[:] = right.reshape(-1) if calls < 3 else 0.0

    bench = timing.CpuBench(p, 1)
    right = ((bench._low.astype(np.float64) + bench._high) / 2)[bench._which]
    monkeypatch.setitem(KERNELS, "fake", _Fake(run))
    for name in ("cpu_direct", "cpu_pointwise"):
        monkeypatch.delitem(KERNELS, name)  # so that it comes into the re-timing however slow it is
    layer = tune_layers([p], trials=8, progress=False).layers[0]
    assert calls > 3
    assert {layer.choice.kernel, *(measured.kernel for measured in layer.top)} == {"dense"}


def test_no_right_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(KERNELS):
        monkeypatch.delitem(KERNELS, name)
    monkeypatch.setitem(KERNELS, "fake", _Fake(_fill(0.0)))
    with pytest.raises(RuntimeError, match=r"no kernel computes .* rightly: \{'fake': '\d+ outputs"):
        tune_layers([problem()], trials=8, progress=False)


# ---- resuming -----------------------------------------------------------------------------------------------


def test_a_finished_run_measures_nothing_again(tmp_path: Path, counted: list[str]) -> None:
    problems = [problem("a"), problem("b", POINTWISE)]
    first = tune_layers(problems, trials=6, storage=tmp_path / "journal", progress=False)
    assert len(counted) == 12
    second = tune_layers(problems, trials=6, storage=tmp_path / "journal", progress=False)
    assert len(counted) == 12
    assert second.layers == first.layers
    assert second.fingerprint == first.fingerprint


def test_an_interrupted_run_goes_on(tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counting = timing.measure

    def interrupt(bench: Any, candidate: Any, best_us: float) -> Any:
        if len(counted) == 4:
            raise KeyboardInterrupt
        return counting(bench, candidate, best_us)

    monkeypatch.setattr(timing, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune_layers([problem()], trials=7, storage=tmp_path / "journal", progress=False)
    monkeypatch.setattr(timing, "measure", counting)
    tune_layers([problem()], trials=7, storage=tmp_path / "journal", progress=False)
    assert len(counted) == len(set(counted)) == 7


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_half_written_line_is_dropped(tmp_path: Path, counted: list[str], cut: int) -> None:
    journal = tmp_path / "journal"
    tune_layers([problem()], trials=5, storage=journal, progress=False)
    journal.write_bytes(journal.read_bytes()[:-cut])
    before = len(counted)
    tune_layers([problem()], trials=5, storage=journal, progress=False)
    assert len(counted) - before <= 1
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_foreign_journal_is_refused_and_kept(tmp_path: Path) -> None:
    for text in ("hello", '{"format": 1}\n', '{"op_code": 0}\nxx\n{"op_code": 0}\n', '{"op_code": 99}\n'):
        path = tmp_path / "journal"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cannot use .*journal"):
            tune_layers([problem()], trials=3, storage=path, progress=False)
        assert path.read_text() == text


def test_another_weight_is_another_study(tmp_path: Path, counted: list[str]) -> None:
    for seed in (0, 1):
        tune_layers([problem(seed=seed)], trials=4, storage=tmp_path / "journal", progress=False)
    assert len(counted) == 8


# ---- look-up ------------------------------------------------------------------------------------------------


def layer_for(p: LayerProblem, kernel: str = "dense", config: Config | None = None) -> files.Layer:
    return files.Layer(
        names=[p.name],
        spec=p.spec.to_dict(),
        sparsity=p.weight.sparsity,
        bucket=bucket_of(p.weight.sparsity),
        nnz=p.weight.nnz,
        fingerprint=p.weight.fingerprint,
        choice=files.Chosen(kernel, KERNELS[kernel].version, config or {"layout": "nchw"}),
        median_us=1.0,
        spread_us=0.0,
        dense_us=None,
        dense_choice_us=None,
        ratio=None,
        trials=1,
        top=[],
    )


def model_of(*layers: files.Layer) -> TunedModel:
    return TunedModel(layers, files.this_device(), files.these_versions())


NCHW, NHWC = {"layout": "nchw"}, {"layout": "nhwc"}


def test_buckets() -> None:
    assert [bucket_of(b / 100) for b in BUCKETS] == list(BUCKETS)
    assert bucket_of(0.9496) == 95.0
    assert bucket_of(1.0) == 99.5
    assert bucket_of(0.1) == 0.0


def test_the_name_goes_before_the_bucket() -> None:
    model = model_of(
        layer_for(problem("a", sparsity=0.85), config=NCHW), layer_for(problem("b", sparsity=0.9), config=NHWC)
    )
    weight = weight_of(SPEC, 0.9, seed=5)
    assert model.choice(SPEC, weight, "a") == Choice("dense", NCHW)
    assert model.choice(SPEC, weight, "b") == Choice("dense", NHWC)
    assert model.choice(SPEC, weight) == Choice("dense", NHWC)


def test_a_far_bucket_or_another_shape_is_unknown() -> None:
    model = model_of(layer_for(problem("a", sparsity=0.9)))
    assert model.choice(SPEC, weight_of(SPEC, 0.93), "a") is not None
    assert model.choice(SPEC, weight_of(SPEC, 0.95), "a") is None
    wider = replace(SPEC, w=9)
    assert model.choice(wider, weight_of(wider, 0.9), "a") is None


def test_the_nearest_batch_size() -> None:
    layers = [
        layer_for(problem("a", SPEC.with_batch(1)), config=NCHW),
        layer_for(problem("a", SPEC.with_batch(8)), config=NHWC),
    ]
    model = model_of(*layers)
    weight = weight_of(SPEC, 0.9)
    assert model.choice(SPEC.with_batch(2), weight) == Choice("dense", NCHW)
    assert model.choice(SPEC.with_batch(16), weight) == Choice("dense", NHWC)
    assert model.choice(SPEC.with_batch(16), weight_of(SPEC, 0.93)) is None


def test_the_dtype_does_not_matter() -> None:
    model = model_of(layer_for(problem("a")))
    assert model.choice(replace(SPEC, dtype="bfloat16"), weight_of(SPEC, 0.9)) == Choice("dense", NCHW)


def test_a_config_that_cannot_run_is_left_out_with_a_warning() -> None:
    model = model_of(layer_for(problem("a"), config={"layout": "chwn"}))
    with pytest.warns(UserWarning, match=r"choice of layer a .* left out: layout must be one of"):
        assert model.choice(SPEC, weight_of(SPEC, 0.9)) is None


def test_the_choice_is_the_callers_own() -> None:
    model = model_of(layer_for(problem("a")))
    found = model.choice(SPEC, weight_of(SPEC, 0.9))
    assert found is not None
    found.config["layout"] = "x"
    assert model.choice(SPEC, weight_of(SPEC, 0.9)) == Choice("dense", NCHW)


# ---- files --------------------------------------------------------------------------------------------------


def test_round_trip(tuned: TunedModel, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned.json")
    again = load(tmp_path / "tuned.json")
    assert again.layers == tuned.layers
    assert again.device == tuned.device
    assert again.versions == tuned.versions
    assert again.created == tuned.created
    assert again.fingerprint == tuned.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


def test_the_fingerprint_tells_choices_apart() -> None:
    one, other = (model_of(layer_for(problem("a"), config=config)) for config in (NCHW, NHWC))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == model_of(layer_for(problem("a"), config=NCHW)).fingerprint


def test_a_failed_save_keeps_the_old_file(tuned: TunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        tuned.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]
    assert path.read_text() == "old"


def _plain(tmp_path: Path) -> dict[str, Any]:
    model_of(layer_for(problem("a"))).save(tmp_path / "plain.json")
    return json.loads((tmp_path / "plain.json").read_text())


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            data = data[part]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", "other", "its format is 'other'"),
        ("version", 2, "its version is 2, but this package reads only version 1"),
        ("device.kind", "cuda", "device"),
        ("device.kind", "tpu", "made for a device of kind 'tpu'"),
        ("device.lanes", 3, "made for vectors of 3 float32 lanes"),
        ("device.arch", "vax", "made for architecture 'vax'"),
        ("layers.0.choice.kernel", "fast", "kernel 'fast' is unknown"),
        ("layers.0.choice.version", 99, "version 99 of kernel 'dense', installed is version"),
        ("layers.0.choice.config", {"layout": 1.5}, "layers"),
        ("layers.0.choice.config", {"layout": True}, "layers"),
        ("layers.0.spec", {}, r"layers\[0\], a"),
        ("layers.0.spec.k", 0, "output channels"),
        ("layers.0.spec.stride", 1, "stride"),
        ("layers.0.bucket", 12.0, "bucket"),
        ("layers.0.sparsity", 1.5, "sparsity"),
        ("layers.0.nnz", 10**9, "nnz"),
        ("layers.0.median_us", -1.0, "median_us"),
        ("layers.0.extra", 1, "extra"),
        ("created", "yesterday", "created"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, path: str, value: Any, words: str) -> None:
    data = _plain(tmp_path)
    _set(path, value)(data)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"(?s)bad\.json.*{words}"):
        load(file)


@pytest.mark.parametrize(
    ("path", "value"),
    [("device.threads", 63), ("device.processor", "Z80"), ("versions.numba", "0.1"), ("versions.torch", None)],
)
def test_other_circumstances_warn(tmp_path: Path, path: str, value: Any) -> None:
    data = _plain(tmp_path)
    _set(path, value)(data)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=rf"old\.json.*{path.split('.')[1]} {value!r} then"):
        load(file)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    blob = json.dumps(_plain(tmp_path)).encode()
    file = tmp_path / "cut.json"
    for size in range(0, len(blob), 37):
        file.write_bytes(blob[:size])
        with pytest.raises(ValueError, match=r"cut\.json"):
            load(file)


_FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _load_or_refuse(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = ""
        try:
            load(file).choice(SPEC, weight_of(SPEC, 0.9), "a")
        except ValueError as error:
            refusal = str(error)
        assert not refusal or file.name in refusal


@_FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, blob: bytes) -> None:
    file = tmp_path / "fuzz.json"
    file.write_bytes(blob)
    with pytest.raises(ValueError, match=r"fuzz\.json"):
        load(file)


def _paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from _paths(value, (*at, key))


@_FUZZ
@given(st.data())
def test_a_mutated_file_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    content = _plain(tmp_path)
    *parents, last = data.draw(st.sampled_from(list(_paths(content))))
    place = content
    for part in parents:
        place = place[part]
    if data.draw(st.booleans()):
        place[last] = data.draw(_JSON)
    else:
        del place[last]
    file = tmp_path / "fuzz.json"
    file.write_text(json.dumps(content))
    _load_or_refuse(file)


# ---- models and report --------------------------------------------------------------------------------------


def test_tune_a_torch_model() -> None:
    torch = pytest.importorskip("torch")
    from autotune import tune

    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False),
        torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    )
    model[1].eval()
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    tuned = tune(model, torch.zeros(2, 4, 6, 6), trials=4, progress=False)
    assert model.training
    assert not model[1].training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [layer.names for layer in tuned.layers] == [["0"], ["3"]]
    spec = ConvSpec.from_dict(tuned.layers[1].spec)
    assert spec.groups == 2
    assert spec.x_shape == (2, 8, 6, 6)


def test_a_module_called_with_several_shapes() -> None:
    torch = pytest.importorskip("torch")
    from autotune.model import problems_of

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Any) -> Any:
            return self.conv(self.conv(self.conv(x))[:, :, ::2, ::2])

    problems = problems_of(Pyramid(), (torch.zeros(1, 4, 8, 8),))
    assert [(p.name, p.spec.h) for p in problems] == [("conv", 8), ("conv", 4)]


def test_a_sparse_module_is_tuned_too() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("numbasparse.nn")
    from autotune.model import problems_of

    conv = torch.nn.Conv2d(4, 4, 3, stride=2, padding=(1, 0))
    sparse = nn.SparseConv2d.from_conv(conv, activation="relu")
    (one,), (other,) = (problems_of(torch.nn.Sequential(m), torch.zeros(1, 4, 8, 8)) for m in (conv, sparse))
    assert one.spec == other.spec
    assert one.weight == other.weight
    assert other.activation == "relu"


def test_models_that_cannot_be_tuned() -> None:
    torch = pytest.importorskip("torch")
    from autotune import tune

    with pytest.raises(ValueError, match="no Conv2d layers"):
        tune(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="example_input must be a torch tensor"):
        tune(torch.nn.Conv2d(1, 1, 1), np.zeros((1, 1, 2, 2)))
    with pytest.raises(TypeError, match="model must be"):
        tune("resnet", torch.zeros(1, 2))


def test_the_report_shows_every_layer(tuned: TunedModel) -> None:
    from rich.console import Console

    from autotune.report import print_report, summary

    rows = layer_rows(tuned)
    assert [row["name"] for row in rows] == ["a", "twin of a", "b"]
    ratios = [row["ratio"] for row in rows]
    assert summary(rows)["ratio"] == pytest.approx(np.prod(ratios) ** (1 / 3))
    console = Console(width=160, record=True, file=io.StringIO())
    print_report(tuned, console)
    text = console.export_text()
    assert "twin of a" in text
    assert "2x8x8x8 -> 8, 3x3" in text


def test_the_progress_bar_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    tune_layers([problem("conv1")], trials=3)
    captured = capsys.readouterr()
    assert "conv1" in captured.out
    assert "1/1" in captured.err


def test_a_layer_named_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tune_layers([problem("[red]a[/b]")], trials=3)
    assert "[red]a[/b]" in capsys.readouterr().out


def test_without_torch_the_dense_columns_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    layer = tune_layers([problem()], trials=3, progress=False).layers[0]
    assert layer.choice.kernel != "dense"
    assert (layer.dense_us, layer.dense_choice_us, layer.ratio) == (None, None, None)


def test_plans_of_all_finalists_agree_with_dense(tuned: TunedModel) -> None:
    p = problem("a")
    x = np.random.default_rng(0).standard_normal(p.spec.x_shape).astype(np.float32)
    expected = Plan(p.spec, p.weight, Choice("dense", NCHW), "none", 1)(x)
    for measured in tuned.layers[0].top:
        y = Plan(p.spec, p.weight, Choice(measured.kernel, measured.config), "none", 1)(x)
        np.testing.assert_allclose(y, expected, atol=1e-4)
