"""The autotuner on a GPU: with a GPU in its place whose clock is what kernels say they cost, and on a real one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import conv_specs, sparse_weights

from autotune import LayerProblem, TunedModel, load, tune_layers
from autotune import tuned as files
from autotune.measure import Benches, DeviceLost, Result
from autotune.space import Candidate, dtype_on
from numbasparse.kernels import KERNELS, CudaKernel, CudaRunner, kernels_for
from numbasparse.kernels.base import Config, Space, check_fields
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.plans import Choice
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, has_layout, to_layout
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

optuna = pytest.importorskip("optuna")
torch = pytest.importorskip("torch")

from autotune import gpu as gpu_module  # noqa: E402
from autotune.compiling import Compilers  # noqa: E402
from autotune.gpu import Gpu, GpuBench, bounds, poisoned  # noqa: E402
from autotune.study import _Search  # noqa: E402

SPEC = ConvSpec.create((3, 8, 6, 6), (8, 8, 3, 3), 1, 1)


def weight_of(spec: ConvSpec, sparsity: float = 0.9, seed: int = 0) -> SparseWeight:
    rng = np.random.default_rng(seed)
    dense = rng.uniform(0.5, 1.0, spec.weight_shape).astype(np.float32)
    dense.reshape(-1)[rng.permutation(dense.size)[: round(sparsity * dense.size)]] = 0.0
    return SparseWeight.from_dense(dense, spec.groups)


def problem(name: str = "conv", spec: ConvSpec = SPEC, **fields: Any) -> LayerProblem:
    return LayerProblem(name, spec, weight_of(spec), **fields)


NO_GPU = cuda.reason_unavailable()


def needs_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))(test))


# ---- a GPU that is none -------------------------------------------------------------------------------------

CONVERSION_US, FLUSH_US, COLD_US = 7.0, 30.0, 5.0


class FakeGpu(Gpu):
    """Tensors on the CPU, and a clock that only kernels, conversions and flushes move on."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.clock_us = 0.0
        self.flushed = False
        self.lost = False

    def convert(self, x: Any, layout: Layout) -> Any:
        if not has_layout(x, layout):
            self.clock_us += CONVERSION_US
        return to_layout(x, layout)

    def flush(self) -> None:
        self.clock_us += FLUSH_US
        self.flushed = True

    def record(self, call: Callable[[], Any], repeats: int) -> Callable[[], None]:
        once = self.us(call)

        def replay() -> None:
            self.clock_us += once * repeats

        return replay

    def us(self, work: Callable[[], Any]) -> float:
        before = self.clock_us
        work()
        return self.clock_us - before

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")


class FakeRunner(CudaRunner):
    nbytes = 0

    def __init__(self, gpu: FakeGpu, spec: ConvSpec, weight: SparseWeight, config: Config, activation: str) -> None:
        self.gpu, self.spec, self.config, self.activation = gpu, spec, config, activation
        self.takes = self.gives = str(config["layout"]).upper()
        self.weight = torch.from_numpy(weight.to_dense())

    def apply(self, x: Any, bias: Any, residual: Any = None, out_layout: Layout | None = None) -> Any:
        gpu, fault = self.gpu, self.config["fault"]
        if fault == "raises":
            raise cuda.CudaError("cannot be launched: too many resources")
        if fault == "lost":
            gpu.lost = True
            raise RuntimeError("an illegal memory access was encountered")
        x = gpu.convert(x, self.takes)
        gpu.clock_us += float(self.config["us"]) + (COLD_US if gpu.flushed else 0.0)
        gpu.flushed = False
        y = torch.empty(self.spec.out_shape, dtype=x.dtype)
        if fault != "unwritten":
            y.copy_(self._right(x, bias))
        if fault == "wrong":
            y[-1, -1, -1, -1] += 1.0
        return gpu.convert(to_layout(y, self.gives), self.gives if out_layout is None else out_layout)

    def _right(self, x: Any, bias: Any) -> Any:
        y = gpu_module.exact_conv2d(x.double(), self.weight.double(), self.spec)
        return y if bias is None else y + bias.double()[:, None, None]


class Fake(CudaKernel):
    """Its config says what it costs, which layout it likes and what is wrong with it."""

    version = 1
    FAULTS = ("none", "raises", "wrong", "unwritten", "lost")

    def __init__(self, gpu: FakeGpu, name: str, dense: bool, **space: tuple[int | str, ...]) -> None:
        self.gpu, self.name, self.is_dense = gpu, name, dense  # type: ignore[misc]
        self.choices: Space = {"us": (20,), "layout": ("nchw",), "fault": ("none",)} | space

    def supports(self, spec: ConvSpec, weight: SparseWeight) -> str | None:
        return None

    def space(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Space:
        return self.choices

    def check(self, spec: ConvSpec, weight: SparseWeight, config: Config) -> str | None:
        layouts = ("nchw", "nhwc", "chwn")
        return check_fields(config, {"us": (0, 10**6), "layout": layouts, "fault": self.FAULTS})

    def default(self, spec: ConvSpec, weight: SparseWeight, threads: int) -> Config:
        return {name: values[0] for name, values in self.choices.items()}

    def ptx(self, *_: Any) -> tuple[cuda.Ptx, ...]:
        return ()

    def prepare(self, spec: Any, weight: Any, config: Config, activation: Any = "none") -> CudaRunner:
        return FakeRunner(self.gpu, spec, weight, config, activation)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake in place of the GPU, no CUDA kernels but a dense one of 20 us; tests add theirs."""
    gpu = FakeGpu()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kernel in kernels_for("cuda"):
        monkeypatch.delitem(KERNELS, kernel.name)
    monkeypatch.setitem(KERNELS, "fake_dense", Fake(gpu, "fake_dense", True, layout=("nchw", "nhwc")))

    @contextmanager
    def benches(index: int | None) -> Iterator[Any]:
        yield Benches(lambda problem: GpuBench(problem, gpu))

    monkeypatch.setattr(gpu_module, "benches", benches)
    with cuda.assumed((9, 0)):
        yield gpu
    torch.set_num_threads(threads)


@pytest.fixture
def add(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def add(name: str = "fake", **space: tuple[int | str, ...]) -> None:
        monkeypatch.setitem(KERNELS, name, Fake(fake_gpu, name, False, **space))

    return add


def tuned_layer(*problems: LayerProblem, **arguments: Any) -> files.Layer:
    return tune_layers(problems or [problem()], device="cuda", progress=False, **arguments).layers[0]


def test_the_choice_counts_conversions_and_the_file_has_both(add: Callable[..., None]) -> None:
    add("plain", us=(18,))
    add("gathering", us=(10,), layout=("chwn",))
    layer = tuned_layer()
    assert layer.choice.kernel == "plain"
    assert (layer.median_us, layer.dense_us, layer.ratio) == (18.0, 20.0, pytest.approx(20 / 18))
    assert layer.gpu is not None
    assert (layer.gpu.native_us, layer.gpu.cold_us, layer.gpu.native_cold_us) == (18.0, 18.0 + COLD_US, 18.0 + COLD_US)
    (other,) = [m for m in layer.top if m.kernel == "gathering"]
    assert other.gpu is not None
    assert (other.median_us, other.gpu.native_us) == (10.0 + 2 * CONVERSION_US, 10.0)
    assert other.gpu.cold_us == 10.0 + 2 * CONVERSION_US + COLD_US
    assert (other.gpu.takes, other.gpu.gives, other.gpu.layout) == ("CHWN", "CHWN", "NCHW")


def test_nhwc_counts_as_well_as_nchw(add: Callable[..., None]) -> None:
    add(us=(15,), layout=("nhwc",))
    layer = tuned_layer()
    assert (layer.choice.kernel, layer.median_us) == ("fake", 15.0)
    assert layer.gpu is not None
    assert layer.gpu.layout == "NHWC"


def test_a_layout_that_costs_more_than_it_gains_loses_to_dense(add: Callable[..., None]) -> None:
    add(us=(10,), layout=("chwn",))
    assert tuned_layer().choice.kernel == "fake_dense"
    # With a single image CHWN and NCHW are the same bytes, and nothing is converted.
    assert tuned_layer(problem(spec=SPEC.with_batch(1))).choice.kernel == "fake"


def test_failing_candidates_are_recorded_and_do_not_end_the_study(add: Callable[..., None], tmp_path: Path) -> None:
    add(us=(1, 12), fault=("raises", "wrong", "unwritten", "none"))
    layer = tuned_layer(storage=tmp_path / "journal")
    assert layer.choice.config == {"us": 1, "layout": "nchw", "fault": "none"}
    assert layer.trials == 2 + 8
    reasons = "\n".join(
        json.loads(line)["user_attr"]["rejected"]
        for line in (tmp_path / "journal").read_text().splitlines()
        if "rejected" in json.loads(line).get("user_attr", {})
    )
    assert reasons.count("CudaError: cannot be launched: too many resources") == 2
    assert reasons.count("1 outputs are wrong, the first at (n, k, oh, ow) = (2, 7, 5, 5)") == 2
    assert reasons.count("got nan") == 2


def test_a_lost_gpu_ends_the_run_and_the_journal_goes_on_without_the_culprit(
    add: Callable[..., None], fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    add(us=(12, 13), fault=("none", "lost"))
    with pytest.raises(DeviceLost, match=r"unusable for this process .*start the program again.* in storage=") as lost:
        tuned_layer()
    journal = str(lost.value).rsplit("storage=", 1)[1].strip("'")
    fake_gpu.lost = False  # as in a new process
    with pytest.raises(DeviceLost):  # there are two of them
        tuned_layer(storage=journal)
    fake_gpu.lost = False
    layer = tuned_layer(storage=journal)
    assert layer.choice.config == {"us": 12, "layout": "nchw", "fault": "none"}
    assert layer.trials == 2 + 4


def test_a_run_that_ends_well_leaves_no_journal(
    add: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    add(us=(12,))
    tuned_layer()
    assert list(tmp_path.iterdir()) == []


def test_proposals_come_in_batches_and_none_is_measured_twice(
    add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(us=tuple(range(30, 130)))
    batches: list[list[str]] = []
    monkeypatch.setattr(GpuBench, "ahead", lambda self, candidates: batches.append([c.key for c in candidates]))
    measured: list[str] = []
    prepare = GpuBench.prepare
    monkeypatch.setattr(GpuBench, "prepare", lambda self, c: (measured.append(c.key), prepare(self, c))[1])
    monkeypatch.setattr(GpuBench, "finals", lambda self, candidates: [(c, FAKE_TIMING) for c in candidates])
    layer = tuned_layer(trials=40)
    assert layer.trials <= 40
    assert len(measured) == len(set(measured)) == layer.trials
    assert GpuBench.at_once in {len(batch) for batch in batches}
    assert {key for batch in batches for key in batch} >= set(measured)


def test_the_next_problem_is_compiled_while_one_is_measured(
    add: Callable[..., None], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(us=(12, 13))
    events: list[str] = []

    @contextmanager
    def benches(index: int | None) -> Iterator[Any]:
        def ahead(problem: LayerProblem, candidates: Any) -> None:
            assert [c.config["us"] for c in candidates] == [12]
            events.append(f"compile {problem.name}")

        yield Benches(lambda problem: (events.append(f"measure {problem.name}"), GpuBench(problem, fake_gpu))[1], ahead)

    monkeypatch.setattr(gpu_module, "benches", benches)
    larger = replace(SPEC, h=8, w=8)
    layers = tune_layers([problem("a"), problem("b", larger)], device="cuda", progress=False, trials=4).layers
    assert [layer.choice.config["us"] for layer in layers] == [12, 12]
    assert events == ["compile b", "measure a", "measure b"]


FAKE_TIMING = gpu_module.Timing(1.0, 0.0, 1.0)


def test_what_was_asked_for_but_not_measured_is_free_again(
    add: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(us=tuple(range(30, 130)))
    prepare, count = GpuBench.prepare, 0

    def interrupted(self: GpuBench, candidate: Candidate) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return prepare(self, candidate)

    monkeypatch.setattr(GpuBench, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned_layer(trials=12, storage=tmp_path / "journal")
    records = (tmp_path / "journal").read_text()
    assert "rejected" not in records
    assert '"died"' not in records
    assert tuned_layer(trials=12, storage=tmp_path / "journal").trials == 12


def test_the_dtype_is_part_of_a_problem(add: Callable[..., None]) -> None:
    add(us=(12,))
    specs = [replace(SPEC, dtype=dtype) for dtype in ("float32", "float64", "float16", "bfloat16")]
    problems = [LayerProblem(spec.dtype, spec, weight_of(SPEC), None, "relu") for spec in specs]
    monkey = [replace(p, activation=None) for p in problems]
    tuned = tune_layers(monkey, device="cuda", progress=False)
    assert [layer.names for layer in tuned.layers] == [["float32", "float64"], ["float16"], ["bfloat16"]]
    assert tuned.choice(specs[1], problems[0].weight, "float32") is not None
    only_single = TunedModel(tuned.layers[:1], tuned.device, tuned.versions)
    assert only_single.choice(specs[2], problems[0].weight, "float32") is None


def test_an_activation_that_is_left_out_is_found(add: Callable[..., None]) -> None:
    add(us=(12,))
    with pytest.raises(RuntimeError, match="no kernel computes"):  # the fakes have none
        tuned_layer(problem(activation="relu"))


def test_a_bias_is_verified(add: Callable[..., None]) -> None:
    add(us=(12,))
    assert tuned_layer(problem(bias=np.linspace(-1, 1, 8, dtype=np.float32))).choice.kernel == "fake"


def test_what_a_kernel_suggests_is_measured_first(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    add(us=tuple(range(30, 230)))
    best = {"us": 31, "layout": "nchw", "fault": "none"}
    default = {**best, "us": 99}
    monkeypatch.setattr(Fake, "suggest", lambda self, *arguments: [default, best])
    assert [m.config for m in tuned_layer(trials=4).top if m.kernel == "fake"] == [best, default]


@pytest.mark.parametrize(
    ("us", "order"),
    [
        ((10, 12, None), "a0 b0 a1 b1 a2 c0"),
        ((10, 20, 40), "a0 a1 a2 b0 b1 c0"),
        ((None, 8, None), "b0 b1 a0 a1 a2 c0"),
    ],
)
def test_kernels_take_turns_by_how_good_their_defaults_are(us: tuple[float | None, ...], order: str) -> None:
    suggestions = [[Candidate(name, {"n": i}) for i in range(count)] for name, count in (("a", 3), ("b", 2), ("c", 1))]
    defaults = [suggested[0] for suggested in suggestions]
    seen = {c.key: Result(c, time) for c, time in zip(defaults, us, strict=True)}
    search: Any = SimpleNamespace(seen=seen, space=SimpleNamespace(defaults=defaults, suggestions=suggestions))
    assert " ".join(f"{c.kernel}{c.config['n']}" for c in _Search._promising(search)) == order


# ---- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(add: Callable[..., None], tmp_path: Path) -> Path:
    add(us=(12,))
    tune_layers([problem()], device="cuda", progress=False).save(tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


def test_a_file_comes_back(saved: Path) -> None:
    tuned = load(saved)
    assert tuned.device == files.CudaDevice("H100", "9.0", 132)
    assert tuned.choice(SPEC, weight_of(SPEC), "conv") == Choice("fake", tuned.layers[0].choice.config)
    assert tuned.versions.driver == ""
    assert tuned.layers[0].gpu is not None
    assert "H100, compute capability 9.0" in repr(tuned)


def test_a_file_for_another_capability_is_refused(saved: Path) -> None:
    with (
        cuda.assumed((8, 0)),
        pytest.raises(ValueError, match=r"tuned\.json.*capability 9\.0 \(H100\).* 8\.0 \(A100\)"),
    ):
        load(saved)


@pytest.mark.parametrize(("path", "value"), [("device.name", "H200"), ("versions.driver", "12.8")])
def test_another_gpu_of_its_kind_or_another_driver_warns(saved: Path, path: str, value: str) -> None:
    data = json.loads(saved.read_text())
    room, name = path.split(".")
    data[room][name] = value
    saved.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=rf"{name} '{value}' then"):
        load(saved)


def test_a_kernel_of_another_device_is_refused(saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["layers"][0]["choice"] = {"kernel": "dense", "version": 1, "config": {"layout": "nchw"}}
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="kernel 'dense' runs on device 'cpu', the file is for 'cuda'"):
        load(saved)


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot tune on a GPU: .*CUDA"):
        tune_layers([problem()], device="cuda", progress=False)
    device = files.CudaDevice("H100", "9.0", 132)
    TunedModel([], device, files.these_versions()).save(tmp_path / "tuned.json")
    with pytest.raises(ValueError, match=r"made for a GPU \(H100, compute capability 9\.0\), and there is none to use"):
        load(tmp_path / "tuned.json")


def test_files_of_a_cpu_know_nothing_of_gpus(tmp_path: Path) -> None:
    tune_layers([problem()], trials=3, progress=False).save(tmp_path / "tuned.json")
    text = (tmp_path / "tuned.json").read_text()
    assert json.loads(text)["device"]["kind"] == "cpu"
    assert not any(word in text for word in ("gpu", "driver", "cudnn", "numba_cuda"))
    assert load(tmp_path / "tuned.json").layers[0].gpu is None


# ---- devices and models -------------------------------------------------------------------------------------


def test_dtypes_of_devices() -> None:
    assert dtype_on("cpu", "bfloat16") == "float32"
    with pytest.raises(ValueError, match="dtype must be one of"):
        dtype_on("cuda", "complex64")


def test_a_half_precision_model_makes_half_precision_problems() -> None:
    from autotune.model import problems_of

    model, x = torch.nn.Conv2d(4, 4, 3).bfloat16(), torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert problems_of(model, x, device="cuda")[0].spec.dtype == "bfloat16"
    assert problems_of(model, x)[0].spec.dtype == "float32"


# ---- what is right ------------------------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_bounds_lie_around_the_reference(data: st.DataObject, dtype: str) -> None:
    spec = replace(data.draw(conv_specs(max_pixels=40)), dtype=dtype)
    activation = data.draw(st.sampled_from([None, "relu", "relu6", "silu"]))
    p = LayerProblem("a", spec, data.draw(sparse_weights(spec)), None, activation)
    images = torch.randn(spec.x_shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    bias = torch.linspace(-1, 1, spec.k)
    _assert_around_reference(p, images, bias)


def _assert_around_reference(p: LayerProblem, images: Any, bias: Any) -> None:
    low, high = (t.double().cpu().numpy() for t in bounds(p, images, bias))
    x, b = images.double().cpu().numpy(), bias.cpu().numpy()
    expected = conv2d_reference(x, p.weight.to_dense(), b, p.spec, p.activation)
    np.testing.assert_allclose((low + high) / 2, expected, rtol=1e-6, atol=1e-6)
    assert ((low < expected) & (expected < high)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_rounding_at_every_step_is_right_and_a_missing_weight_is_not(dtype: str, activation: str | None) -> None:
    kind = getattr(torch, dtype)
    p = problem(spec=replace(ConvSpec.create((2, 32, 9, 9), (16, 32, 3, 3), 1, 1), dtype=dtype), activation=activation)
    images = torch.randn(p.spec.x_shape, generator=torch.Generator().manual_seed(0)).to(kind)
    bias = torch.linspace(-1, 1, 16)
    low, high = bounds(p, images, bias)
    weight = torch.from_numpy(p.weight.to_dense())
    acts: dict[str | None, Any] = {None: lambda y: y, "relu": torch.relu, "silu": torch.nn.functional.silu}

    def rounded(w: Any) -> Any:
        y = torch.nn.functional.conv2d(images.float(), w.to(kind).float(), padding=1).to(kind)
        return acts[activation](y + bias.to(kind)[:, None, None]).float()

    y = rounded(weight)
    assert ((y >= low) & (y <= high)).all()
    less = weight.clone()
    less.reshape(-1)[weight.reshape(-1).nonzero()[0]] = 0.0
    y = rounded(less)
    assert not ((y >= low) & (y <= high)).all()


def test_memory_is_poisoned_within_only() -> None:
    with poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- compiling ahead ----------------------------------------------------------------------------------------

can_compile = pytest.mark.skipif(cuda.reason_not_compiling() is not None, reason="no compiler for GPUs")


def _compilable() -> Candidate:
    name = next(k.name for k in kernels_for("cuda") if not k.is_dense and k.supports(SPEC, weight_of(SPEC)) is None)
    return Candidate(name, KERNELS[name].default(SPEC, weight_of(SPEC), 1))


@can_compile
def test_workers_fill_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBASPARSE_CACHE_DIR", str(tmp_path))
    with cuda.assumed((8, 0)) as device, Compilers(device, workers=1) as compilers:
        p, candidate = problem(), _compilable()
        compilers.submit(p, [candidate])
        compilers.submit(p, [candidate])
        assert compilers.wait(p, candidate) is None
        assert compilers.wait(p, Candidate("never submitted", {})) is None
        made = {path.name for path in tmp_path.iterdir()}
        assert any(name.endswith(".cubin") for name in made)
        kernel = KERNELS[candidate.kernel]
        assert isinstance(kernel, CudaKernel)
        for ptx in kernel.ptx(p.spec, p.weight, candidate.config):
            cuda.assemble(ptx)
        assert {path.name for path in tmp_path.iterdir()} == made, "the worker made other files than are needed"


@can_compile
def test_what_is_forgotten_is_not_compiled() -> None:
    """The next problem's first candidate does not wait behind those of one that is done."""
    p, other = problem(), problem(spec=replace(SPEC, h=9))
    with cuda.assumed((8, 0)) as device, Compilers(device, workers=1) as compilers:
        name = _compilable().kernel
        many = [Candidate(name, config) for config in KERNELS[name].suggest(p.spec, p.weight, 1, 24)]
        compilers.submit(p, many)
        compilers.submit(other, many[:1])
        compilers.forget(p)
        assert len(compilers._futures) <= 3  # of `other`, what has begun, and what was handed over meanwhile
        assert compilers.wait(other, many[0]) is None
        assert compilers.wait(p, many[-1]) is None


@can_compile
def test_a_crashed_worker_costs_its_candidate_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with cuda.assumed((8, 0)) as device, Compilers(device, workers=1) as compilers:
        p = problem()
        start = Compilers._start

        def dying(self: Compilers) -> Any:
            process = start(self)
            process.kill()
            process.wait()
            return process

        monkeypatch.setattr(Compilers, "_start", dying)
        candidate = _compilable()
        compilers.submit(p, [candidate])
        assert "ended a worker process with status -9" in str(compilers.wait(p, candidate))
        bench = GpuBench(p, FakeGpu(), compilers)
        with pytest.raises(RuntimeError, match="ended a worker process"):
            bench.prepare(candidate)
        monkeypatch.setattr(Compilers, "_start", start)
        other = Candidate(candidate.kernel, {**candidate.config, "no such parameter": 1})
        compilers.submit(p, [other])
        assert compilers.wait(p, other) is None  # it failed in the worker, and whoever prepares it is told why


# ---- a real GPU ---------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tune_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    spec = replace(ConvSpec.create((4, 32, 14, 14), (32, 32, 3, 3), 1, 1), dtype=dtype)
    problems = [
        LayerProblem("a", spec, weight_of(spec), np.linspace(-1, 1, 32, dtype=np.float32), "relu"),
        LayerProblem("one", spec.with_batch(1), weight_of(spec)),
    ]
    # So few trials that they are the budget that ends, and nothing is left to do the second time.
    tuned = tune_layers(problems, device="cuda", trials=6, storage=tmp_path / "journal", progress=False)
    for layer in tuned.layers:
        assert layer.dense_us is not None
        assert layer.median_us > 0
        assert layer.gpu is not None
        assert layer.gpu.native_us > 0
        assert layer.gpu.cold_us >= 0
        assert len(layer.top) >= 3, "sparse and both layouts of dense"
    tuned.save(tmp_path / "tuned.json")
    assert load(tmp_path / "tuned.json").layers == tuned.layers
    again = tune_layers(problems, device="cuda", trials=6, storage=tmp_path / "journal", progress=False)
    assert again.layers == tuned.layers


@needs_gpu
def test_tune_a_model_on_a_gpu() -> None:
    from autotune import tune

    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 1)).cuda()
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight *= torch.rand_like(conv.weight) > 0.9
    tuned = tune(model, torch.randn(2, 8, 16, 16, device="cuda"), device="cuda", trials=6, progress=False)
    assert [layer.names for layer in tuned.layers] == [["0"], ["2"]]
    torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bounds_on_a_gpu_lie_around_the_reference(dtype: str, activation: str | None) -> None:
    for spec in (
        ConvSpec.create((2, 24, 13, 11), (16, 12, 3, 3), (2, 1), ((1, 0), (2, 1)), (1, 2), 2),
        ConvSpec.create((2, 64, 14, 14), (32, 64, 3, 3), 1, 1),
    ):
        p = LayerProblem("a", replace(spec, dtype=dtype), weight_of(spec), None, activation)
        generator = torch.Generator("cuda").manual_seed(0)
        images = torch.randn(spec.x_shape, generator=generator, device="cuda").to(getattr(torch, dtype))
        _assert_around_reference(p, images, torch.linspace(-1, 1, spec.k, device="cuda"))


@needs_gpu
def test_a_wrong_kernel_is_found_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(k for k in kernels_for("cuda") if k.is_dense)
    prepare = type(real).prepare

    def halved(self: Any, spec: Any, weight: Any, config: Any, activation: Any = "none") -> Any:
        half = SparseWeight.from_dense(weight.to_dense() / 2, weight.groups)
        return prepare(self, spec, half, config, activation)

    monkeypatch.setattr(type(real), "prepare", halved)
    for kernel in kernels_for("cuda"):
        if kernel is not real:
            monkeypatch.delitem(KERNELS, kernel.name)
    with pytest.raises(RuntimeError, match="outputs are wrong"):
        tune_layers([problem()], device="cuda", progress=False)


@needs_gpu
def test_loops_measure_on_a_gpu() -> None:
    gpu = Gpu()
    small, large = (torch.zeros(n, device="cuda") for n in (1 << 20, 1 << 26))
    us = [gpu_module.Loop.of(gpu, lambda t=t: t.add_(1.0), 8).us() for t in (small, large)]
    assert all(math.isfinite(t) and t > 0 for t in us)
    assert us[1] > us[0], "64 times the bytes take longer"
    with poisoned():
        assert torch.empty(1000, device="cuda").isnan().all()


@needs_gpu
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_lost_context_is_told_on_a_gpu(run_python: Callable[..., str]) -> None:
    """In a process of its own, whose CUDA context is destroyed by an illegal address."""
    code = """
import os, sys
import numpy as np
from autotune.gpu import Gpu, GpuBench
from autotune.measure import DeviceLost, Result
from autotune.space import Candidate
from numbasparse.runtime import cuda

def wild(x):
    x[1 << 40] = np.float32(1.0)

bench = object.__new__(GpuBench)
bench._gpu = Gpu()
ptx = cuda.compile_ptx(wild, ("float32[::1]",), "wild", capability=cuda.current().capability, threads=32)
cuda.load(ptx).launch((1, 1, 1), 32, 0, cuda.current_stream(), cuda.array_arguments(0, 1, 4))
try:
    bench.check_device(Candidate("wild", {}), "it failed")
except DeviceLost as lost:
    print("lost" if "start the program again" in str(lost) else lost)
sys.stdout.flush()
os._exit(0)  # torch cannot tidy up a context that is lost
"""
    assert run_python(code) == "lost"
