"""How a candidate is measured: its result is verified first, then calls are timed.

What is timed is the call of a `numbasparse.plans.Plan`, which makes its output: what a layer of a model pays. The
input is a torch tensor where torch is installed, since then its threads run both the dense and the sparse kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import Any

import numpy as np

from autotune.space import Candidate, LayerProblem
from numbasparse.kernels.reference import conv2d_reference
from numbasparse.plans import Plan, check_activation
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


@dataclass(frozen=True)
class Result:
    """What measuring a candidate gave.

    Attributes
    ----------
    us
        Microseconds of a call: the shortest of a few; None for a rejected candidate.
    reason
        Why it was rejected: it raised, or computed something wrong.
    """

    candidate: Candidate
    us: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: median, interquartile range and best."""

    us: float
    spread: float
    best: float


class Bench:
    """Input, expected output and clock of one problem.

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

    def plan(self, candidate: Candidate) -> Plan:
        """Pack and compile a candidate."""
        problem = self.problem
        activation = check_activation(problem.activation)
        return Plan(problem.spec, problem.weight, candidate.choice, activation, self.threads)

    def wrong(self, plan: Plan) -> str | None:
        """Run the plan into an output full of NaN; says what is wrong with the result, or None."""
        self._out.fill(np.nan)
        plan(self.x, self.bias, self._out_view)
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

    def call(self, plan: Plan) -> Callable[[], Any]:
        x, bias = self.x, self.bias
        return lambda: plan(x, bias)

    def stock(self) -> Callable[[], Any] | None:
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
    acts = {"relu": torch.relu_, "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0), "silu": lambda y: F.silu(y, inplace=True)}
    act = acts.get(activation or "", lambda y: y)

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
    """
    try:
        plan = bench.plan(candidate)
        reason = bench.wrong(plan)
    except Exception as error:  # whatever a kernel stumbles over, the candidate is at fault
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        return Result(candidate, None, reason)
    return Result(candidate, _race(bench.call(plan), best_us))


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
    return [_timing(t) for t in times]


def _timing(times: list[float]) -> Timing:
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return Timing(middle, high - low, min(times))
