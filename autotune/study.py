"""The search: one Optuna study per problem, then a re-timing of the best against dense, then the choice.

Order of measurements of a problem: the dense layouts, each sparse kernel's default, the best configs of similar
problems that are done already (nearest valid ones), then what the sampler proposes: all candidates if they are few
and fit the budget (`BruteForceSampler`), else TPE. A proposal that is invalid or was measured before costs nothing:
the nearest candidate not yet measured follows it. When TPE has found nothing better for a while, and little time has
gone, the search climbs: everything that differs in one parameter from the best few, and from the best of each
kernel, is measured, then what is farther away.

A study lives in a journal file if one is given. Its name has the spec, the weight's bucket and fingerprint, the
device and the kernels' spaces, so that a killed run goes on where it stopped, several workers can share one file,
and nothing measured under other circumstances is taken over.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import filelock
import msgspec
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from autotune import measure as timing
from autotune import tuned as files
from autotune.measure import Bench, Result, Timing
from autotune.space import DEVICES, Candidate, LayerProblem, ProblemSpace
from autotune.tuned import TunedModel, bucket_of
from numbasparse.kernels import KERNELS
from numbasparse.runtime import cpu

DEFAULT_TRIALS = 160
"""Candidates measured for each problem, at most."""

MARGIN = 0.98
"""A sparse candidate is chosen only if its median is below this share of the best dense candidate's, and its best
time too: where other programs run, medians alone wrong dense, whose threads wait for one another."""

BUSY = 2.0
"""A median of this many times the best time says that the machine was busy with something else."""

_FINALISTS = 5
_RANDOM_FIRST = 8
_PATIENCE = 16
_PATIENCE_AFTER_SIMILAR = 8
_LEADERS = 3
_SMALL_SPACE = 64
_CLIMB_SECONDS = 1.5
_CLIMB_FROM = 1.25
_FROM_SIMILAR = 6
_BETTER = 0.99
_SEARCH_SHARE = 0.85
_ABANDONED_AFTER = timedelta(minutes=10)
_WAITING_AT_MOST = 8  # trials that a killed run or another worker enqueued come first


class _Rejected(Exception):
    """A candidate raised or computed something wrong: its trial fails."""


class _Final(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A re-timed candidate."""

    params: dict[str, int | str]
    us: float
    spread: float
    best: float


class _Finals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The re-timing of a problem, kept with its study; `measured` tells whether it is of the study's last state."""

    measured: int
    entries: list[_Final]
    stock_us: float | None


@dataclass
class _Outcome:
    """A problem that is done: what similar problems start from, and what is exported."""

    problem: LayerProblem
    best: list[Candidate]
    layer: files.Layer
    busy: bool


@dataclass
class _Run:
    """What all problems of a call share."""

    device: str
    trials: int
    threads: int
    storage: Any
    done: list[_Outcome] = field(default_factory=list)


# ---- journal ------------------------------------------------------------------------------------------------


class _Lock:
    """Lock of a journal that dies with its process: Optuna's own would hold up a resumed run for 30 seconds."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_journal(path: str | os.PathLike[str]) -> optuna.storages.JournalStorage:
    """Open or make a journal file; a half-written last line, left by a kill, is dropped first.

    Raises
    ------
    ValueError
        If the file is no journal or is corrupt elsewhere; the text names it, and it is left as it is.
    OSError
        If it cannot be read or written.
    """
    place = Path(path)
    lock = _Lock(place)
    lock.acquire()
    try:
        _drop_half_line(place)
    finally:
        lock.release()
    backend = JournalFileBackend(str(place), lock_obj=cast(Any, lock))
    try:
        return optuna.storages.JournalStorage(backend)
    except Exception as error:  # records that are JSON but make no sense to Optuna
        raise ValueError(f"cannot use {os.fspath(path)!r} as a journal: {type(error).__name__}: {error}") from error


def _drop_half_line(path: Path) -> None:
    blob = path.read_bytes() if path.exists() else b""
    lines = blob.splitlines(keepends=True)
    whole = [line.endswith(b"\n") and _is_record(line) for line in lines]
    if all(whole):
        return
    first = whole.index(False)
    if first != len(lines) - 1 or (first == 0 and not b'{"op_code"'.startswith(lines[0][:10])):
        raise ValueError(f"cannot use {os.fspath(path)!r} as a journal: line {first + 1} is no record of Optuna's")
    with open(path, "r+b") as file:
        file.truncate(sum(map(len, lines[:first])))


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "op_code" in record


# ---- one problem --------------------------------------------------------------------------------------------


class _Search:
    """The study of one problem."""

    def __init__(self, run: _Run, problem: LayerProblem, deadline: float) -> None:
        self._run = run
        self.problem = problem
        self.space = ProblemSpace(problem, run.threads, run.device)
        if not self.space.candidates:
            raise ValueError(f"no kernel for device {run.device!r} runs {problem.spec.key} (layer {problem.name!r})")
        self._deadline = deadline
        self._began = time.monotonic()
        self._bench: Bench | None = None
        self._similar = _similar(run.done, problem, self.space)
        self.study = optuna.create_study(
            storage=run.storage, sampler=self._sampler(), study_name=self._name(), load_if_exists=True
        )
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        _fail_dead(self.study)
        self.seen: dict[str, Result] = {}
        self._taken: set[str] = set()
        self._proposal: Candidate | None = None
        self._refresh()

    def _sampler(self) -> optuna.samplers.BaseSampler:
        first = 1 if self._similar else _RANDOM_FIRST
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._all_at_once():
                return optuna.samplers.BruteForceSampler(seed=0)
            return optuna.samplers.TPESampler(seed=0, multivariate=True, group=True, n_startup_trials=first)

    def _name(self) -> str:
        problem, device = self.problem, files.this_device(self._run.threads, self._run.device)
        identity = [problem.weight.fingerprint, problem.activation, msgspec.structs.asdict(device), self.space.digest]
        digest = blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        return f"{problem.spec.key} sparsity {bucket_of(problem.weight.sparsity):g} {digest}"

    @property
    def bench(self) -> Bench:
        """Made when something is measured: a resumed study may need none."""
        if self._bench is None:
            self._bench = Bench(self.problem, self._run.threads)
        return self._bench

    # -- what is known

    def _refresh(self) -> None:
        """Take in finished trials, other workers' too."""
        self.seen.clear()
        self._taken.clear()
        deaths: dict[str, int] = {}
        for trial in self.study.get_trials(deepcopy=False):
            candidate = self._candidate_of(trial)
            if candidate is None:
                continue
            result = _result_of(trial, candidate)
            if result is not None:
                self.seen.setdefault(candidate.key, result)
            elif trial.state == TrialState.RUNNING:
                self._taken.add(candidate.key)
            elif "died" in trial.user_attrs:
                deaths[candidate.key] = deaths.get(candidate.key, 0) + 1
        for key, count in deaths.items():
            if count > 1 and key not in self.seen:
                result = Result(self.space.candidates[key], None, "the process ended twice while it was measured")
                self.seen[key] = result

    def _candidate_of(self, trial: FrozenTrial) -> Candidate | None:
        """The candidate of a trial; None if it is none of this space's."""
        try:
            candidate = Candidate.from_params(trial.params)
        except ValueError:
            return None
        return self.space.candidates.get(candidate.key)

    def _unseen(self) -> list[Candidate]:
        return [c for key, c in self.space.candidates.items() if key not in self.seen and key not in self._taken]

    def best_us(self) -> float:
        return min((r.us for r in self.seen.values() if r.us is not None), default=float("inf"))

    def ranked(self, dense: bool) -> list[Candidate]:
        """Measured candidates by rising time."""
        timed = [r for r in self.seen.values() if r.us is not None and self.space.is_dense(r.candidate) == dense]
        return [r.candidate for r in sorted(timed, key=lambda r: r.us or 0.0)]

    def _all_at_once(self) -> bool:
        """Whether the space is small enough to measure every candidate."""
        return len(self.space.candidates) <= min(self._run.trials, _SMALL_SPACE)

    def _spent(self) -> bool:
        return time.monotonic() > self._deadline or len(self.seen) >= self._run.trials

    def _enough(self) -> bool:
        return self._spent() or not self._unseen() or self._patience_over()

    def _patience_over(self) -> bool:
        if self._all_at_once():
            return False
        best, since = float("inf"), 0
        for result in self.seen.values():
            since += 1
            if result.us is not None and result.us < _BETTER * best:
                best, since = result.us, 0
        return since >= (_PATIENCE_AFTER_SIMILAR if self._similar else _PATIENCE)

    # -- measuring

    def run(self) -> None:
        """Measure until the budget, the time, the space or the patience is at its end."""
        for candidate in self.space.dense + self.space.defaults:
            self._measure_next(candidate)
        for candidate in self._similar:
            if not self._enough():
                self._measure_next(candidate)
        while not self._enough():
            self._step()
        self._climb()

    def _climb(self) -> None:
        """Where measuring is cheap: what differs in one parameter from a leader, then what is farther away."""
        while not self._spent() and time.monotonic() - self._began < _CLIMB_SECONDS:
            near = self._around_leaders() or self._farther()
            if not near:
                return
            self._measure_next(near[0])

    def _farther(self) -> list[Candidate]:
        """Unmeasured sparse candidates, nearest to the best one first."""
        leaders = self.ranked(dense=False)
        unseen = [c for c in self._unseen() if not self.space.is_dense(c)]
        return sorted(unseen, key=lambda c: (c.distance(leaders[0]), c.key)) if leaders else unseen

    def _around_leaders(self) -> list[Candidate]:
        """Unmeasured neighbours of the best few sparse candidates and of each kernel's best, if near the best."""
        timed = [r for r in self.seen.values() if r.us is not None and not self.space.is_dense(r.candidate)]
        timed = [r for r in timed if r.us is not None and r.us < _CLIMB_FROM * self.best_us()]
        ranked = [r.candidate for r in sorted(timed, key=lambda r: r.us or 0.0)]
        kernels_best = {c.kernel: c for c in reversed(ranked)}
        leaders = [*ranked[:_LEADERS], *kernels_best.values()]
        unseen = self._unseen()
        return [c for leader in leaders for c in unseen if c.distance(leader) == 1]

    def _measure_next(self, candidate: Candidate) -> None:
        if candidate.key in self.space.candidates and candidate.key in self.seen:
            return
        near = self.space.nearest(candidate, self._unseen())
        if near is None:
            return
        self.study.enqueue_trial(near.params)
        for _ in range(_WAITING_AT_MOST):
            self._step()
            if near.key in self.seen:
                return

    def _step(self) -> None:
        """One trial; where it measured nothing, the next one is the nearest candidate that was not measured."""
        before = len(self.seen)
        self.study.optimize(self._objective, n_trials=1, catch=(_Rejected,))
        self._refresh()
        if len(self.seen) > before:
            return
        near = None if self._proposal is None else self.space.nearest(self._proposal, self._unseen())
        if near is not None:
            self.study.enqueue_trial(near.params)

    def _objective(self, trial: Trial) -> float:
        trial.set_user_attr("worker", self._worker)
        candidate = self._proposal = self._suggest(trial)
        known = self.seen.get(candidate.key)
        if known is not None and known.us is not None:
            return known.us
        if candidate.key not in self.space.candidates or known is not None:
            raise optuna.TrialPruned
        result = timing.measure(self.bench, candidate, self.best_us())
        if result.us is None:
            trial.set_user_attr("rejected", result.reason)
            raise _Rejected(result.reason)
        return result.us

    def _suggest(self, trial: Trial) -> Candidate:
        params: dict[str, Any] = {"kernel": trial.suggest_categorical("kernel", list(self.space.spaces))}
        for name, values in self.space.spaces[params["kernel"]].items():
            key = f"{params['kernel']}.{name}"
            params[key] = trial.suggest_categorical(key, values)
        return Candidate.from_params(params)

    # -- the re-timing

    def finals(self) -> _Finals:
        """Re-time the best few, the dense layouts and stock dense, in turn; or take it from the study."""
        kept = self._kept_finals()
        if kept is not None:
            return kept
        entries, stock = self._time_finals(self.ranked(dense=False)[:_FINALISTS] + self.ranked(dense=True))
        finals = _Finals(
            measured=len(self.seen),
            entries=[_Final(candidate.params, t.us, t.spread, t.best) for candidate, t in entries],
            stock_us=None if stock is None else stock.us,
        )
        self.study.set_user_attr("finals", msgspec.to_builtins(finals))
        return finals

    def _kept_finals(self) -> _Finals | None:
        try:
            kept = msgspec.convert(self.study.user_attrs["finals"], _Finals)
            known = all(Candidate.from_params(entry.params).key in self.space.candidates for entry in kept.entries)
        except (KeyError, ValueError, msgspec.ValidationError):
            return None
        return kept if known and kept.entries and kept.measured == len(self.seen) else None

    def _time_finals(self, finalists: Sequence[Candidate]) -> tuple[list[tuple[Candidate, Timing]], Timing | None]:
        plans = [self.bench.plan(candidate) for candidate in finalists]
        stock = self.bench.stock()
        calls = [self.bench.call(plan) for plan in plans]
        times = timing.interleaved(calls if stock is None else [*calls, stock])
        # Once more, so that a kernel which is right only now and then is found.
        right = [self.bench.wrong(plan) is None for plan in plans]
        entries = [(c, t) for c, t, fine in zip(finalists, times[: len(plans)], right, strict=True) if fine]
        return entries, None if stock is None else times[-1]

    def outcome(self) -> _Outcome:
        """Choose, from the re-timing."""
        finals = self.finals()
        if not finals.entries:
            reasons = {r.candidate.kernel: r.reason for r in self.seen.values() if r.reason is not None}
            raise RuntimeError(f"no kernel computes {self.problem.spec.key} rightly: {reasons}")
        entries = sorted(finals.entries, key=lambda entry: entry.us)
        dense = [e for e in entries if self.space.is_dense(Candidate.from_params(e.params))]
        sparse = [e for e in entries if e not in dense]
        chosen = _chosen(sparse, dense)
        layer = self._layer(chosen, entries, dense[0].us if dense else None, finals.stock_us)
        busy = any(entry.us > BUSY * entry.best for entry in (chosen, *dense[:1]))
        best = self.ranked(dense=False)[:_FROM_SIMILAR]
        return _Outcome(self.problem, best, layer, busy)

    def _layer(
        self, chosen: _Final, entries: Sequence[_Final], dense_choice_us: float | None, stock_us: float | None
    ) -> files.Layer:
        weight, candidate = self.problem.weight, Candidate.from_params(chosen.params)
        dense_us = min((us for us in (dense_choice_us, stock_us) if us is not None), default=None)
        ranked = [(Candidate.from_params(e.params), e.us) for e in entries]
        return files.Layer(
            names=[self.problem.name],
            spec=self.problem.spec.to_dict(),
            sparsity=weight.sparsity,
            bucket=bucket_of(weight.sparsity),
            nnz=weight.nnz,
            fingerprint=weight.fingerprint,
            choice=files.Chosen(candidate.kernel, KERNELS[candidate.kernel].version, candidate.config),
            median_us=chosen.us,
            spread_us=chosen.spread,
            dense_us=dense_us,
            dense_choice_us=dense_choice_us,
            ratio=None if dense_us is None else dense_us / chosen.us,
            trials=len(self.seen),
            top=[files.Measurement(c.kernel, c.config, us) for c, us in ranked],
        )


def _chosen(sparse: Sequence[_Final], dense: Sequence[_Final]) -> _Final:
    """The fastest sparse candidate if it beats dense by both median and best time, else the fastest dense one."""
    if not dense:
        return sparse[0]
    median, best = MARGIN * dense[0].us, MARGIN * min(entry.best for entry in dense)
    return next((entry for entry in sparse if entry.us < median and entry.best < best), dense[0])


def _result_of(trial: FrozenTrial, candidate: Candidate) -> Result | None:
    if trial.state == TrialState.COMPLETE and trial.value is not None and 0.0 < trial.value < float("inf"):
        return Result(candidate, trial.value)
    if trial.state == TrialState.FAIL and "rejected" in trial.user_attrs:
        return Result(candidate, None, str(trial.user_attrs["rejected"]))
    return None


def _fail_dead(study: optuna.Study) -> None:
    """Fail the trials of workers that are gone, so that their candidates are free again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_alive(trial):
            continue
        try:
            study._storage.set_trial_user_attr(trial._trial_id, "died", True)
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker was faster
            continue


def _is_alive(trial: FrozenTrial) -> bool:
    """Whether a running trial's worker still runs; where that cannot be seen, its age decides."""
    host, _, pid = str(trial.user_attrs.get("worker", "")).rpartition(":")
    if host == socket.gethostname() and pid.isdecimal() and os.name == "posix":
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return int(pid) != os.getpid()
    started = trial.datetime_start
    return started is not None and datetime.now() - started < _ABANDONED_AFTER


def _similar(done: Sequence[_Outcome], problem: LayerProblem, space: ProblemSpace) -> list[Candidate]:
    """Best candidates of a problem of equal image and kernel sizes that is done, as this space has them."""

    def shape(p: LayerProblem) -> tuple[Any, ...]:
        return p.spec.r, p.spec.s, p.spec.stride, p.spec.dilation, p.spec.h, p.spec.w, p.spec.groups == 1

    def distance(outcome: _Outcome) -> tuple[Any, ...]:
        spec, other = problem.spec, outcome.problem.spec
        channels = (spec.c, spec.k) != (other.c, other.k)
        return channels, spec.n != other.n, abs(outcome.problem.weight.sparsity - problem.weight.sparsity)

    near = min((o for o in done if shape(o.problem) == shape(problem)), key=distance, default=None)
    if near is None:
        return []
    sparse = [c for c in space.candidates.values() if not space.is_dense(c)]
    found = [space.nearest(c, [s for s in sparse if s.kernel == c.kernel]) for c in near.best]
    return list({c.key: c for c in found if c is not None}.values())


# ---- all problems -------------------------------------------------------------------------------------------


def tune_layers(
    problems: Sequence[LayerProblem],
    *,
    device: str = "cpu",
    trials: int = DEFAULT_TRIALS,
    timeout: float | None = None,
    storage: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> TunedModel:
    """Choose a kernel and a config for every problem, by measurement.

    Parameters
    ----------
    problems
        Problems of equal spec, weight and activation are tuned once.
    device
        Kind of device: ``"cpu"``.
    trials
        Candidates measured for each problem, at most; those always measured (dense, each kernel's default) count,
        but are measured even if they are more.
    timeout
        Seconds for everything. Each problem gets an equal share of what is left, so that a large one does not
        use it up; the candidates always measured are not cut, so it can be overrun by them.
    storage
        Path of a journal file. A run that was interrupted goes on where it stopped when it is called again, and
        several processes can share the file. None keeps everything in memory.
    threads
        How many threads a layer may use; None takes those of torch if it is loaded, else of numbasparse.
    progress
        Whether to show a progress bar, and a table at the end.

    Returns
    -------
    TunedModel

    Raises
    ------
    TypeError, ValueError
        For arguments that make no sense, or a `storage` that is no journal.
    RuntimeError
        If for a problem every kernel, dense too, computes something wrong.
    KeyboardInterrupt
        Passes through; what was measured is in the journal.
    """
    problems = list(problems)
    _check_arguments(problems, device, trials, timeout)
    count = _threads(threads)
    groups = _grouped(problems)
    with _quiet_optuna(), timing.torch_threads(count):
        run = _Run(device, trials, count, None if storage is None else open_journal(storage))
        layers = _tune_all(run, groups, timeout, progress)
    _warn_if_busy(run.done)
    tuned = TunedModel(layers, files.this_device(count, device), files.these_versions())
    if progress:
        from autotune.report import print_report

        print_report(tuned)
    return tuned


def _tune_all(
    run: _Run, groups: Sequence[list[LayerProblem]], timeout: float | None, progress: bool
) -> list[files.Layer]:
    from autotune.report import progress_bar

    end = None if timeout is None else time.monotonic() + timeout
    layers: dict[int, files.Layer] = {}
    with progress_bar(len(groups), progress) as advance:
        for place, number in enumerate(_similar_together(groups)):
            group = groups[number]
            advance(0, group[0].name)
            search = _Search(run, group[0], _share(end, len(groups) - place))
            search.run()
            outcome = search.outcome()
            run.done.append(outcome)
            names = list(dict.fromkeys(problem.name for problem in group))
            layers[number] = msgspec.structs.replace(outcome.layer, names=names)
            advance(1, group[0].name)
    return [layers[number] for number in range(len(groups))]


def _warn_if_busy(done: Sequence[_Outcome]) -> None:
    busy = sum(outcome.busy for outcome in done)
    if busy:
        warnings.warn(
            f"the machine was busy with something else while {busy} of {len(done)} layers were timed: their times and "
            "ratios are unreliable; tune again when it is idle",
            stacklevel=3,
        )


def _share(end: float | None, left: int) -> float:
    """When the search of a problem ends; the rest of its share is for the re-timing."""
    now = time.monotonic()
    return float("inf") if end is None else now + _SEARCH_SHARE * max(0.0, end - now) / left


def _grouped(problems: Sequence[LayerProblem]) -> list[list[LayerProblem]]:
    groups: dict[Any, list[LayerProblem]] = {}
    for problem in problems:
        groups.setdefault(problem.identity, []).append(problem)
    return list(groups.values())


def _similar_together(groups: Sequence[list[LayerProblem]]) -> list[int]:
    """Order in which problems that help each other follow one another; otherwise as given."""

    def shape(number: int) -> tuple[Any, ...]:
        spec = groups[number][0].spec
        return spec.r, spec.s, spec.stride, spec.h, spec.w, spec.c, spec.k

    first: dict[Any, int] = {}
    for number in range(len(groups)):
        first.setdefault(shape(number), number)
    return sorted(range(len(groups)), key=lambda number: (first[shape(number)], number))


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """A failed trial is a result here, no news."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    random_state = random.getstate()
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
        random.setstate(random_state)


def _check_arguments(problems: Sequence[Any], device: str, trials: int, timeout: float | None) -> None:
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(map(repr, DEVICES))}, got {device!r}")
    if not problems:
        raise ValueError("there are no layers to tune: the list is empty")
    for problem in problems:
        if not isinstance(problem, LayerProblem):
            raise TypeError(f"expected a list of LayerProblem, got one of type {type(problem).__name__}")
    if isinstance(trials, bool) or not isinstance(trials, int):
        raise TypeError(f"trials must be an int, got {trials!r}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")


def _threads(threads: int | None) -> int:
    if threads is None:
        return timing.default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int or None, got {threads!r}")
    if not 1 <= threads <= cpu.MAX_THREADS:
        raise ValueError(f"threads must be from 1 to {cpu.MAX_THREADS}, got {threads}")
    return threads
