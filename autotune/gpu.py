"""How a candidate is measured on a GPU: verified against float64, then timed by replays of CUDA graphs.

Two times of a candidate matter. One is the kernel's own, with input and output in the layouts that it takes and gives
(`Result.native_us`): what a layer pays between neighbours that agree on a layout. The other adds what it costs to come
from and go back to NCHW or NHWC, whichever is better: what a layer pays alone, in a model that knows nothing of CHWN.
Candidates are ranked and chosen by the second, since a layer by itself cannot know its neighbours, and a choice that
counts on them can lose to dense where they do not agree; the first is recorded beside it, also for the candidates that
are best by it, so that whoever sees the whole model can choose anew from the file.

In the search the second time is the sum of the first and of conversions that are timed once for a problem; in the
re-timing of the best it is measured whole.

Cold times have a buffer twice the size of the L2 cache written before every call, as Triton's ``do_bench`` does; what
that takes by itself is timed too and subtracted.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.compiling import Compilers
from autotune.measure import ABANDON, RTOL, Bench, Benches, DeviceLost, GpuTimes, Result, Timing, timing_of
from autotune.space import Candidate, LayerProblem
from numbasparse.activations import check_activation, in_torch
from numbasparse.kernels import KERNELS, CudaRunner
from numbasparse.runtime import cuda
from numbasparse.runtime.layouts import Layout, to_layout
from numbasparse.spec import ConvSpec

if TYPE_CHECKING:
    import torch

PLAIN_LAYOUTS: tuple[Layout, ...] = ("NCHW", "NHWC")
"""Layouts that a model's other layers work in."""

UNIT = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding once to a type of storage; for float32, `RTOL` covers it."""

_VENDOR = {"float32": 2.0**-9, "float16": 2.0**-9, "bfloat16": 2.0**-6}
"""What dense convolutions may be wrong by besides, relative as `RTOL` is: a library's partial sums, TF32 if allowed."""

_GRAPH_US = 400.0
_REPEATS = 32
_REPLAYS = 5
_COLD_REPEATS = 8
_ROUNDS = (7, 31)
_ROUNDS_US = 150_000.0
_LAUNCHED_US = 500.0  # a call that is no graph's may take so long on the host: only longer times say something


class Gpu:
    """Memory, graphs and clock of torch's current GPU: all that a bench asks of it."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # graphs never run at once, so they share their memory
        self._beyond_l2 = torch.empty(2 * cuda.current().l2_bytes, dtype=torch.uint8, device=self.device)
        # The pool goes with the last graph of it, and no other can then be recorded: one stays.
        self._anchor = self._capture(lambda: self._beyond_l2[:1].zero_(), 1)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def convert(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The tensor in a layout: itself or a copy."""
        return to_layout(x, layout)

    def flush(self) -> None:
        """Put other data into the L2 cache."""
        self._beyond_l2.zero_()

    def record(self, call: Callable[[], Any], repeats: int) -> Callable[[], None]:
        """Capture ``repeats`` calls as a graph; returns what replays it."""
        return self._capture(call, repeats).replay

    def _capture(self, call: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries choose their algorithms, which cannot be captured
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph, which empties the allocator's cache each time.
            with _no_collection():
                graph.capture_begin(pool=self._pool)
                try:
                    for _ in range(repeats):
                        call()
                finally:
                    graph.capture_end()
        return graph

    def us(self, work: Callable[[], Any]) -> float:
        """Microseconds that the GPU takes for what ``work`` starts."""
        self._begin.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e3

    def check(self) -> None:
        """Wait for the GPU; raises if its context is lost. Memory that failed work held is given back."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within, Python collects no cycles: one with an older graph in it would call CUDA while another is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Loop:
    """A call, recorded several times in a graph."""

    gpu: Gpu
    replay: Callable[[], None]
    repeats: int

    @classmethod
    def of(cls, gpu: Gpu, call: Callable[[], Any], repeats: int) -> Loop:
        return cls(gpu, gpu.record(call, repeats), repeats)

    def us(self) -> float:
        """Microseconds of one call, the mean over a replay. One more replay comes before, so that caches are warm."""
        self.replay()
        return self.gpu.us(self.replay) / self.repeats


@dataclass(frozen=True)
class _Contest:
    """A finalist and its loops; `layout` is the better plain one."""

    candidate: Candidate
    ready: CudaRunner
    layout: Layout
    alone: Loop
    native: Loop
    cold: Loop
    native_cold: Loop

    @property
    def loops(self) -> list[Loop]:
        return list(dict.fromkeys((self.alone, self.native, self.cold, self.native_cold)))


class GpuBench(Bench):
    """Input, expected output and clock of one problem on a GPU.

    As on the CPU the batch is made of two random images in an irregular order. Their expected outputs, and how far
    from them an output may be, are computed by `bounds` on the GPU.
    """

    at_once = 8

    def __init__(self, problem: LayerProblem, gpu: Gpu, compilers: Compilers | None = None) -> None:
        import torch

        self.problem = problem
        self._gpu = gpu
        self._compilers = compilers
        spec = problem.spec
        self._dtype = getattr(torch, spec.dtype)
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.standard_normal((2, *spec.x_shape[1:]), np.float32)).to(gpu.device, self._dtype)
        which = rng.integers(0, 2, spec.n)
        which[-1], which[0] = 1, 0
        self._places = [torch.from_numpy(np.flatnonzero(which == i)).to(gpu.device) for i in range(2)]
        self._bias: torch.Tensor | None = None
        if problem.bias is not None:
            self._bias = torch.from_numpy(np.array(problem.bias, np.float32)).to(gpu.device)
        self._x: dict[str, torch.Tensor] = {"NCHW": images[torch.from_numpy(which).to(gpu.device)]}
        self._bounds = {dense: bounds(problem, images, self._bias, dense=dense) for dense in (False, True)}
        self._conversions: dict[tuple[str, str, bool], float] = {}

    def ahead(self, candidates: Sequence[Candidate]) -> None:
        if self._compilers is not None:
            self._compilers.submit(self.problem, candidates)

    def no_more(self) -> None:
        if self._compilers is not None:
            self._compilers.forget(self.problem)

    def prepare(self, candidate: Candidate) -> CudaRunner:
        problem = self.problem
        crashed = None if self._compilers is None else self._compilers.wait(problem, candidate)
        if crashed is not None:
            raise RuntimeError(crashed)
        kernel = KERNELS[candidate.kernel]
        activation = check_activation(problem.activation)
        runner = kernel.prepare(problem.spec, problem.weight, dict(candidate.config), activation)
        assert isinstance(runner, CudaRunner)
        return runner

    def wrong(self, candidate: Candidate, ready: CudaRunner) -> str | None:
        with poisoned():
            y = ready.apply(self._x["NCHW"], self._bias, None, "NCHW")
        return self.judge(y, KERNELS[candidate.kernel].is_dense)

    def judge(self, y: torch.Tensor, dense: bool) -> str | None:
        """What is wrong with an output for `input`, or None; see `bounds` for ``dense``."""
        if tuple(y.shape) != self.problem.spec.out_shape or y.dtype != self._dtype:
            return f"the output is {tuple(y.shape)}, {y.dtype}, expected {self.problem.spec.out_shape}, {self._dtype}"
        low, high = self._bounds[dense]
        for image, places in enumerate(self._places):
            if len(places):
                reason = _outside(y.index_select(0, places).float(), low[image], high[image], places)
                if reason is not None:
                    return reason
        return None

    def race(self, candidate: Candidate, ready: CudaRunner, best_us: float) -> Result:
        call = self.call(ready, ready.takes, ready.gives)
        _, around = self.better_layout(ready)
        native = min(self._gpu.us(call), self._gpu.us(call))
        if native <= max(ABANDON * best_us, _LAUNCHED_US):
            loop = Loop.of(self._gpu, call, repeats_for(native))
            native = min(loop.us() for _ in range(_REPLAYS))
        return Result(candidate, native + around, native_us=native)

    def finals(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Timing]]:
        contests = [c for c in map(self._contest, candidates) if c is not None]
        flush = Loop.of(self._gpu, self._gpu.flush, _COLD_REPEATS)
        loops = [flush, *(loop for contest in contests for loop in contest.loops)]
        times = interleaved(loops)
        flush_us = median(times[id(flush)])
        right = [c for c in contests if self.wrong(c.candidate, c.ready) is None]
        return [(c.candidate, _timing_of(c, times, flush_us)) for c in right]

    def check_device(self, candidate: Candidate, reason: str) -> None:
        try:
            self._gpu.check()
        except Exception as error:
            raise DeviceLost(
                f"{candidate.key} made the GPU unusable for this process ({reason}): it is recorded as failing and "
                "will be left out; start the program again, with the same storage, to go on"
            ) from error

    def input(self, layout: Layout) -> torch.Tensor:
        """The problem's input, in a layout."""
        if layout not in self._x:
            self._x[layout] = self._gpu.convert(self._x["NCHW"], layout)
        return self._x[layout]

    def call(self, ready: CudaRunner, takes: Layout, gives: Layout) -> Callable[[], Any]:
        """A call of a candidate with input and output in those layouts."""
        x, bias = self.input(takes), self._bias
        return lambda: ready.apply(x, bias, None, gives)

    def better_layout(self, ready: CudaRunner) -> tuple[Layout, float]:
        """The plain layout around which a kernel costs least, and what the conversions cost there."""
        costs = {
            layout: self._conversion_us(layout, ready.takes, False) + self._conversion_us(ready.gives, layout, True)
            for layout in PLAIN_LAYOUTS
        }
        best = min(costs, key=lambda layout: costs[layout])
        return best, costs[best]

    def _conversion_us(self, source: Layout, target: Layout, output: bool) -> float:
        """Microseconds of converting the problem's input or output; timed once."""
        import torch

        key = source, target, output
        if key not in self._conversions:
            x = self._x["NCHW"]
            if output:
                x = torch.zeros(self.problem.spec.out_shape, dtype=self._dtype, device=self._gpu.device)
            x = self._gpu.convert(x, source)
            same = source == target or to_layout(x, target).data_ptr() == x.data_ptr()
            self._conversions[key] = 0.0 if same else self._converting_us(x, target)
        return self._conversions[key]

    def _converting_us(self, x: torch.Tensor, target: Layout) -> float:
        def call() -> Any:
            return self._gpu.convert(x, target)

        call()
        loop = Loop.of(self._gpu, call, repeats_for(self._gpu.us(call)))
        return min(loop.us() for _ in range(_REPLAYS))

    def _contest(self, candidate: Candidate) -> _Contest | None:
        """Prepare a finalist; None if that fails, for want of memory as it may be."""
        try:
            ready = self.prepare(candidate)
            layout, _ = self.better_layout(ready)
            native = self.call(ready, ready.takes, ready.gives)
            warm, cold = self._loops(native)
            if ready.takes == ready.gives == layout:
                return _Contest(candidate, ready, layout, warm, warm, cold, cold)
            return _Contest(candidate, ready, layout, *self._both(self.call(ready, layout, layout), warm, cold))
        except Exception as error:
            self.check_device(candidate, f"{type(error).__name__}: {error}")
            return None

    def _both(self, alone: Callable[[], Any], warm: Loop, cold: Loop) -> tuple[Loop, Loop, Loop, Loop]:
        alone_warm, alone_cold = self._loops(alone)
        return alone_warm, warm, alone_cold, cold

    def _loops(self, call: Callable[[], Any]) -> tuple[Loop, Loop]:
        """Of a call: with the caches as the call before left them, and with others' data in them."""

        def cold() -> None:
            self._gpu.flush()
            call()

        call()
        repeats = repeats_for(self._gpu.us(call))
        warm = Loop.of(self._gpu, call, repeats)
        return warm, Loop.of(self._gpu, cold, min(repeats, _COLD_REPEATS))


def repeats_for(us: float) -> int:
    """How many calls of ``us`` make a graph that is long beside the clock's steps."""
    return max(1, min(_REPEATS, round(_GRAPH_US / max(us, 1.0))))


def interleaved(loops: Sequence[Loop]) -> dict[int, list[float]]:
    """Time loops in turns, every other round backwards; all times, by the loops' ids."""
    times: dict[int, list[float]] = {id(loop): [loop.us()] for loop in loops}
    total = sum(times[id(loop)][0] * loop.repeats for loop in loops)
    rounds = int(min(max(_ROUNDS[0], _ROUNDS_US / max(total, 1.0)), _ROUNDS[1]))
    for number in range(1, rounds):
        for loop in reversed(loops) if number % 2 else loops:
            times[id(loop)].append(loop.us())
    return times


def _timing_of(contest: _Contest, times: dict[int, list[float]], flush_us: float) -> Timing:
    alone = timing_of(times[id(contest.alone)])
    rest = GpuTimes(
        layout=contest.layout,
        takes=contest.ready.takes,
        gives=contest.ready.gives,
        native_us=median(times[id(contest.native)]),
        cold_us=max(0.0, median(times[id(contest.cold)]) - flush_us),
        native_cold_us=max(0.0, median(times[id(contest.native_cold)]) - flush_us),
    )
    return Timing(alone.us, alone.spread, alone.best, rest)


# ---- what is right ------------------------------------------------------------------------------------------


def bounds(
    problem: LayerProblem, images: torch.Tensor, bias: torch.Tensor | None, *, dense: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest right output of some images, float32 in (images, K, OH, OW).

    The convolution of float64 that torch has, on the device of the images. An output may differ from it by what
    float32 sums may differ, `RTOL` of the sum of the absolute products plus one; with a storage type of less
    precision also by the rounding of the weights to that type, and of the output after sum, bias and activation.

    Parameters
    ----------
    images : tensor (images, C, H, W) of the problem's dtype
    bias : tensor (K,), float32, optional
    dense
        Whether it is for dense convolutions of a library, which may be less precise (`_VENDOR`).
    """
    import torch

    spec = problem.spec
    x, weight = images.double(), torch.from_numpy(problem.weight.to_dense()).to(images.device)
    w = weight.double()
    b = torch.zeros_like(w[:, 0, 0, 0]) if bias is None else bias.double()
    b = b[:, None, None]
    before = exact_conv2d(x, w, spec) + b
    magnitude = exact_conv2d(x.abs(), w.abs(), spec) + b.abs()
    slack = (RTOL + (_VENDOR[spec.dtype] if dense else 0.0)) * (magnitude + 1.0)
    if UNIT[spec.dtype]:
        rounding = (weight.to(images.dtype).double() - w).abs()
        slack += exact_conv2d(x.abs(), rounding, spec)
        slack += 4 * UNIT[spec.dtype] * (before.abs() + b.abs())
    expected = in_torch(problem.activation or "none")(before)
    return (expected - slack).float(), (expected + slack).float()


def exact_conv2d(x: torch.Tensor, weight: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """Convolution in float64 for any padding; batch sizes may differ from the spec's."""
    from torch.nn import functional as F

    (top, bottom), (left, right) = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, None, spec.stride, 0, spec.dilation, spec.groups)


def _outside(y: torch.Tensor, low: torch.Tensor, high: torch.Tensor, places: torch.Tensor) -> str | None:
    """What is wrong with outputs of one image at several places of the batch, (places, K, OH, OW), or None."""
    wrong = ~((y >= low) & (y <= high))  # NaN is in no range, so that outputs left unwritten are found too
    count = int(wrong.sum())
    if not count:
        return None
    place, *at = (int(i) for i in wrong.nonzero()[0])
    k, oh, ow = at
    middle = (float(low[k, oh, ow]) + float(high[k, oh, ow])) / 2
    return (
        f"{count} outputs are wrong, the first at (n, k, oh, ow) = {(int(places[place]), k, oh, ow)}: got "
        f"{float(y[place, k, oh, ow]):.6g}, expected {middle:.6g}"
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that torch hands out uninitialised is full of NaN."""
    import torch

    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic: only the filling is wanted
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


# ---- a call of the tuner ------------------------------------------------------------------------------------


@contextmanager
def benches(index: int | None) -> Iterator[Benches]:
    """Measure on a GPU, torch's current one if ``index`` is None.

    Raises
    ------
    numbasparse.runtime.cuda.CudaError
        If there is no such GPU, or none that can be used.
    """
    reason = cuda.reason_unavailable()
    if reason is not None:
        raise cuda.CudaError(f"cannot tune on a GPU: {reason}")
    import torch

    if index is not None and index >= torch.cuda.device_count():
        raise cuda.CudaError(f"cannot tune on GPU {index}: there are only {torch.cuda.device_count()}, numbered from 0")
    with torch.cuda.device(index), torch.inference_mode(), Compilers(cuda.current()) as compilers:
        gpu = Gpu()
        yield Benches(lambda problem: GpuBench(problem, gpu, compilers), compilers.submit)
