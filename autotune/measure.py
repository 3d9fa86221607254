"""How a candidate is measured: its result is verified first, then calls are timed. Here: in general, and on the CPU.

What is timed on the CPU is the call of a `numbasparse.plans.Plan`, which makes its output: what a layer of a model
pays. The input is a torch tensor where torch is installed, since then its threads run both the dense and the sparse
kernels. The GPU's side is `autotune.gpu`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import Annotated, Any

import msgspec
import numpy as np

from autotune.space import Candidate, LayerProblem
from numbasparse.activations import check_activation, in_torch
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.plans import Plan
from numbasparse.runtime import cpu
from numbasparse.spec import ConvSpec

RTOL = 1e-5
"""Largest error of an output, relative to the sum of the absolute products behind it, plus one."""

ABANDON = 1.3
"""A candidate whose best of the first few calls takes this many times the best so far is not timed further."""

_RUNS = (4, 25)
_ENOUGH_US = 20_000.0
_ROUNDS = (5, 31)
_ROUNDS_US = 300_000.0
_WARM_BELOW_US = 10_000.0


def optional_torch() -> Any:
    """The torch module, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def default_threads() -> int:
    """Threads of torch where a program has loaded it, else those of numbasparse."""
    torch = sys.modules.get("torch")
    return cpu.get_num_threads() if torch is None else min(torch.get_num_threads(), cpu.MAX_THREADS)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Have torch use that many threads, and as many as before at the end."""
    torch = optional_torch()
    before = None if torch is None else torch.get_num_threads()
    try:
        if torch is not None and before != threads:
            torch.set_num_threads(threads)
        yield
    finally:
        if torch is not None and torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _nothing_ahead(problem: LayerProblem, candidates: Sequence[Candidate]) -> None:
    """Compile nothing before it is measured."""


@dataclass(frozen=True)
class Benches:
    """What a call of the tuner measures with.

    Attributes
    ----------
    of
        Makes the bench of a problem.
    ahead
        Begins to compile candidates of a problem that comes later, whose bench is not there yet.
    """

    of: Callable[[LayerProblem], Bench]
    ahead: Callable[[LayerProblem, Sequence[Candidate]], None] = _nothing_ahead


@contextmanager
def cpu_benches(threads: int) -> Iterator[Benches]:
    """Measure on the CPU, on that many threads."""
    with torch_threads(threads):
        yield Benches(lambda problem: CpuBench(problem, threads))


@dataclass(frozen=True)
class Result:
    """What measuring a candidate gave.

    Attributes
    ----------
    us
        Microseconds of a call: the shortest of a few; None for a rejected candidate.
    reason
        Why it was rejected: it raised, or computed something wrong.
    native_us
        Of a GPU kernel: without the conversions of layout that `us` counts.
    """

    candidate: Candidate
    us: float | None
    reason: str | None = None
    native_us: float | None = None


class GpuTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a choice on a GPU beside its time; medians in microseconds.

    Attributes
    ----------
    layout
        "NCHW" or "NHWC": layout of input and output for which the candidate's own time holds, the better of the two.
    takes, gives
        Layouts that the kernel reads and writes without conversion.
    native_us
        With the input in `takes` and the output in `gives`: what a layer pays between neighbours that agree.
    cold_us, native_cold_us
        The same two with nothing of the layer's data in the L2 cache before a call.
    """

    layout: str
    takes: str
    gives: str
    native_us: Annotated[float, msgspec.Meta(ge=0)]
    cold_us: Annotated[float, msgspec.Meta(ge=0)]
    native_cold_us: Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: median, interquartile range and best; the rest of a GPU's times."""

    us: float
    spread: float
    best: float
    gpu: GpuTimes | None = None


class DeviceLost(RuntimeError):
    """A candidate left the device unusable for this process, as an illegal address on a GPU does."""


class Bench(ABC):
    """Input, expected output and clock of one problem on one kind of device."""

    at_once = 1
    """Proposals of the sampler that are asked for together, so that they can be compiled in parallel."""

    @abstractmethod
    def prepare(self, candidate: Candidate) -> Any:
        """Pack and compile a candidate; what `wrong` and `race` take."""

    @abstractmethod
    def wrong(self, candidate: Candidate, ready: Any) -> str | None:
        """Run a candidate into an output full of NaN; says what is wrong with the result, or None."""

    @abstractmethod
    def race(self, candidate: Candidate, ready: Any, best_us: float) -> Result:
        """Time a right candidate, as long as it may beat ``best_us``."""

    @abstractmethod
    def finals(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Timing]]:
        """Time candidates in turns, then verify them once more: those that are right and their times."""

    def stock_us(self) -> float | None:
        """Of the last `finals`: the median of a dense convolution that is no candidate, None if there is none."""
        return None

    def ahead(self, candidates: Sequence[Candidate]) -> None:
        """These come next: their compilation may begin."""
        return

    def no_more(self) -> None:
        """The search is over: what is still to be compiled ahead is not wanted."""
        return

    def check_device(self, candidate: Candidate, reason: str) -> None:
        """Raise `DeviceLost`, with the reason in its text, if a candidate's failure left the device unusable."""
        return


class CpuBench(Bench):
    """Input, expected output and clock of one problem on the CPU.

    The batch is made of two random images in an irregular order, so that the reference of two images (slow, made
    once) checks every image of the batch.
    """

    def __init__(self, problem: LayerProblem, threads: int) -> None:
        self.problem = problem
        self.threads = threads
        spec = problem.spec
        rng = np.random.default_rng(0)
        images = rng.standard_normal((2, *spec.x_shape[1:]), np.float32)
        self._which = rng.integers(0, 2, spec.n)
        self._which[-1] = 1
        self._which[0] = 0
        bias = np.zeros(spec.k, np.float32) if problem.bias is None else np.asarray(problem.bias, np.float32)
        self._low, self._high = _bounds(problem, images, bias)
        torch = optional_torch()
        self._wrap: Callable[[np.ndarray], Any] = (lambda a: a) if torch is None else torch.from_numpy
        self.x: Any = self._wrap(np.ascontiguousarray(images[self._which]))
        self.bias: Any = self._wrap(bias)
        self._out = np.empty(spec.out_shape, np.float32)
        self._out_view = self._wrap(self._out)
        self._stock_us: float | None = None

    def prepare(self, candidate: Candidate) -> Plan:
        problem = self.problem
        activation = check_activation(problem.activation)
        return Plan(problem.spec, problem.weight, candidate.choice, activation, self.threads)

    def wrong(self, candidate: Candidate, ready: Plan) -> str | None:
        self._out.fill(np.nan)
        ready(self.x, self.bias, self._out_view)
        for number, which in enumerate(self._which):
            image = self._out[number]
            # NaN is in no range, so that outputs left unwritten are found too
            right = (image >= self._low[which]) & (image <= self._high[which])
            if not right.all():
                at = tuple(int(i) for i in np.argwhere(~right)[0])
                middle = (float(self._low[which][at]) + float(self._high[which][at])) / 2
                return (
                    f"{right.size - np.count_nonzero(right)} outputs of image {number} are wrong, the first at "
                    f"(k, oh, ow) = {at}: got {float(image[at]):.6g}, expected {middle:.6g}"
                )
        return None

    def race(self, candidate: Candidate, ready: Plan, best_us: float) -> Result:
        return Result(candidate, _race(self._call(ready), best_us))

    def finals(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Timing]]:
        plans = [self.prepare(candidate) for candidate in candidates]
        stock = self._stock()
        calls = [self._call(plan) for plan in plans]
        times = interleaved(calls if stock is None else [*calls, stock])
        self._stock_us = None if stock is None else times[-1].us
        # Once more, so that a kernel which is right only now and then is found.
        right = [self.wrong(c, plan) is None for c, plan in zip(candidates, plans, strict=True)]
        return [(c, t) for c, t, fine in zip(candidates, times[: len(plans)], right, strict=True) if fine]

    def stock_us(self) -> float | None:
        return self._stock_us

    def _call(self, plan: Plan) -> Callable[[], Any]:
        x, bias = self.x, self.bias
        return lambda: plan(x, bias)

    def _stock(self) -> Callable[[], Any] | None:
        """Dense convolution of torch with input, weight and output in channels-last order, nothing converted."""
        torch = optional_torch()
        if torch is None:
            return None
        conv = _stock(torch, self.problem.spec, self.problem.activation)
        last = torch.channels_last
        weight = torch.from_numpy(self.problem.weight.to_dense()).contiguous(memory_format=last)
        x, bias = self.x.contiguous(memory_format=last), self.bias

        def call() -> Any:
            with torch.inference_mode():
                return conv(x, weight, bias)

        return call


def _bounds(problem: LayerProblem, images: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest right output of two images, float32."""
    spec, weight = problem.spec.with_batch(2), problem.weight.to_dense()
    expected = conv2d_reference(images, weight, bias, spec, problem.activation)
    slack = RTOL * (conv2d_reference(np.abs(images), np.abs(weight), np.abs(bias), spec) + 1.0)
    return (expected - slack).astype(np.float32), (expected + slack).astype(np.float32)


def _stock(torch: Any, spec: ConvSpec, activation: str | None) -> Callable[[Any, Any, Any], Any]:
    F = torch.nn.functional
    (top, bottom), (left, right) = spec.padding
    even = top == bottom and left == right
    padding = (top, left) if even else (0, 0)
    act = in_torch(activation or "none", inplace=True)

    def conv(x: Any, weight: Any, bias: Any) -> Any:
        x = x if even else F.pad(x, (left, right, top, bottom))
        return act(F.conv2d(x, weight, bias, spec.stride, padding, spec.dilation, spec.groups))

    return conv


def once(call: Callable[[], Any]) -> float:
    """Microseconds of one call."""
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e6


def measure(bench: Bench, candidate: Candidate, best_us: float) -> Result:
    """Verify a candidate, then time it, as long as it may still win.

    Never raises for what a kernel does wrong: that is a result with a reason.

    Parameters
    ----------
    best_us
        The shortest of the other candidates so far, infinite if there is none.

    Raises
    ------
    DeviceLost
        If the candidate took the device with it: nothing more can be measured in this process.
    """
    try:
        ready = bench.prepare(candidate)
        reason = bench.wrong(candidate, ready)
        if reason is None:
            return bench.race(candidate, ready, best_us)
    except Exception as error:  # whatever a kernel stumbles over, the candidate is at fault
        reason = f"{type(error).__name__}: {error}"
        bench.check_device(candidate, reason)
    return Result(candidate, None, reason)


def _race(call: Callable[[], Any], best_us: float) -> float:
    """The shortest of several runs: what disturbs a run only ever adds, and the best few are timed again later."""
    times = [once(call) for _ in range(_RUNS[0])]
    if min(times) <= ABANDON * best_us:
        while sum(times) < _ENOUGH_US and len(times) < _RUNS[1]:
            times.append(once(call))
    return min(times)


def interleaved(calls: Sequence[Callable[[], Any]]) -> list[Timing]:
    """Time several calls in turn, round after round, so that a change of the machine's speed meets all alike.

    Short calls run twice in each turn and the second counts: the first finds the caches full of another's data.
    """
    firsts = [min(once(call), once(call)) for call in calls]
    rounds = int(min(max(_ROUNDS[0], _ROUNDS_US / max(sum(firsts), 1.0)), _ROUNDS[1]))
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            if firsts[i] < _WARM_BELOW_US:
                calls[i]()
            times[i].append(once(calls[i]))
    return [timing_of(t) for t in times]


def timing_of(times: list[float]) -> Timing:
    """Median, spread and best of at least two times."""
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return Timing(middle, high - low, min(times))
