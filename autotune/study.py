"""The search: one Optuna study per problem, then a re-timing of the best against dense, then the choice.

Order of measurements of a problem: the dense layouts, each sparse kernel's default, the best configs of similar
problems that are done already (nearest valid ones), those that a kernel suggests, then all candidates if they are few
and fit the budget, else what the sampler (TPE) proposes. A proposal that is invalid or was measured before costs
nothing: the nearest candidate not yet measured takes its place. Where compiling takes longer than measuring, as on a
GPU, several proposals are asked for at once and compiled in parallel. When TPE has found nothing better for a while,
and little time has gone, the search climbs: everything that differs in one parameter from the best few, and from the
best of each kernel, is measured, then what is farther away.

A study lives in a journal file if one is given. Its name has the spec, the weight's bucket and fingerprint, the
device and the kernels' spaces, so that a killed run goes on where it stopped, several workers can share one file,
and nothing measured under other circumstances is taken over.

A candidate that makes the GPU unusable for the process (`DeviceLost`) is recorded as failing and ends the run, with a
text that says how to go on. Measuring in a child process would survive it, but costs a second CUDA context (seconds
and half a gigabyte) at every start and hides kernels from debuggers, while such a kernel is a defect that is to be
seen. So that nothing is lost even then, a run on a GPU that was given no journal keeps one until it has ended well.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from autotune.measure import Bench, DeviceLost, GpuTimes, Result, Timing
from autotune.space import Candidate, LayerProblem, ProblemSpace
from autotune.tuned import TunedModel, bucket_of
from numbasparse.kernels import KERNELS
from numbasparse.plans import parse_device
from numbasparse.runtime import cpu

Storage = str | os.PathLike[str] | optuna.storages.BaseStorage
"""Path of a journal file, URL of a database ("postgresql://...", "sqlite:///..."), or a storage of Optuna's."""

DEFAULT_TRIALS = 160
"""Candidates measured for each problem, at most."""

MARGIN = 0.98
"""A sparse candidate is chosen only if its median is below this share of the best dense candidate's, and its best
time too: where other programs run, medians alone wrong dense, whose threads wait for one another."""

BUSY = 2.0
"""A median of this many times the best time says that the machine was busy with something else."""

_FINALISTS = 5
_NATIVE_FINALISTS = 3
_RANDOM_FIRST = 8
_PATIENCE = 16
_PATIENCE_AFTER_SIMILAR = 8
_LEADERS = 3
_SMALL_SPACE = 64
_CLIMB_SECONDS = {"cpu": 1.5, "cuda": 4.0}
_CLIMB_FROM = 1.25
_FROM_SIMILAR = 6
_BETTER = 0.99
_SEARCH_SHARE = 0.85
_ABANDONED_AFTER = timedelta(minutes=10)
_WAITING_AT_MOST = 8  # trials that a killed run or another worker enqueued come first


class _Final(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A re-timed candidate."""

    params: dict[str, int | str]
    us: float
    spread: float
    best: float
    gpu: GpuTimes | None = None

    @classmethod
    def of(cls, candidate: Candidate, timing: Timing) -> _Final:
        return cls(candidate.params, timing.us, timing.spread, timing.best, timing.gpu)


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

    kind: str
    trials: int
    threads: int
    storage: Any
    benches: timing.Benches
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


def open_storage(storage: Storage) -> Any:
    """Open what several workers may share: a journal file, a database by its URL, or a storage of Optuna's.

    Raises
    ------
    ValueError
        If the file is no journal, or the URL names no database that can be used; passwords are not repeated.
    ImportError
        If the database's driver is missing.
    OSError
        If a journal cannot be read or written.
    """
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not (isinstance(storage, str) and "://" in storage):
        return open_journal(storage)
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(storage)
        # Two workers that write at once wait for each other.
        patience: Any = {"connect_args": {"timeout": 60}} if url.get_backend_name() == "sqlite" else {}
        return optuna.storages.RDBStorage(storage, engine_kwargs={"pool_pre_ping": True, **patience})
    except ImportError as error:
        shown = make_url(storage).render_as_string(hide_password=True)
        raise ImportError(f"{shown} needs a driver that is not installed: {error}", name=error.name) from error
    except (SQLAlchemyError, ValueError) as error:
        shown = storage.partition("://")[0] + "://..."
        with contextlib.suppress(SQLAlchemyError):
            shown = make_url(storage).render_as_string(hide_password=True)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot use the database {shown}: {first}") from error


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

    def __init__(self, run: _Run, problem: LayerProblem, space: ProblemSpace, deadline: float) -> None:
        self._run = run
        self.problem = problem
        self.space = space
        if not self.space.candidates:
            raise ValueError(f"no kernel for device {run.kind!r} runs {problem.spec.key} (layer {problem.name!r})")
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
        self._refresh()

    def _sampler(self) -> optuna.samplers.BaseSampler:
        first = 1 if self._similar else _RANDOM_FIRST
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # constant_liar: proposals that are asked for together differ.
            return optuna.samplers.TPESampler(
                seed=0, multivariate=True, group=True, n_startup_trials=first, constant_liar=True
            )

    def _name(self) -> str:
        problem, device = self.problem, files.this_device(self._run.threads, self._run.kind)
        identity = [problem.weight.fingerprint, problem.activation, msgspec.to_builtins(device), self.space.digest]
        digest = blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        return f"{problem.spec.key} sparsity {bucket_of(problem.weight.sparsity):g} {digest}"

    @property
    def bench(self) -> Bench:
        """Made when something is measured: a resumed study may need none."""
        if self._bench is None:
            self._bench = self._run.benches.of(self.problem)
        return self._bench

    # -- what is known

    def _refresh(self) -> None:
        """Take in finished trials, other workers' too, and set free what workers left that are gone."""
        _fail_dead(self.study, but=self._worker)
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
        must = self.space.dense + self.space.defaults
        self._ahead(must)
        self._measure_each(must, always=True)
        if self._all_at_once():
            then = list(self.space.candidates.values())
        else:
            then = [*self._similar, *self._promising()]
        self._ahead(then[: max(0, self._run.trials - len(self.seen))])
        self._measure_each(then)
        while not self._enough():
            self._round(self.bench.at_once)
        self._climb()
        if self._bench is not None:
            self._bench.no_more()

    def _promising(self) -> list[Candidate]:
        """What the kernels suggest, a kernel's next the later, the farther its default was from the best of them."""
        us = {r.candidate.key: r.us for r in self.seen.values() if r.us is not None}
        best = min((us[c.key] for c in self.space.defaults if c.key in us), default=1.0)
        order: list[tuple[float, int, Candidate]] = []
        for number, (default, suggested) in enumerate(zip(self.space.defaults, self.space.suggestions, strict=True)):
            behind = us.get(default.key, float("inf")) / best
            order += [((place + 1) * behind**2, number, c) for place, c in enumerate(suggested)]
        return [candidate for _, _, candidate in sorted(order, key=lambda item: item[:2])]

    def _measure_each(self, candidates: Iterable[Candidate], always: bool = False) -> None:
        for candidate in candidates:
            if not always and self._enough():
                return
            self._measure_next(candidate)

    def _ahead(self, candidates: Sequence[Candidate]) -> None:
        """Have those compiled in the background that are still to be measured; makes no bench for nothing."""
        wanted = [c for c in candidates if c.key in self.space.candidates and c.key not in self.seen]
        if wanted and not self._spent():
            self.bench.ahead(wanted)

    def _climb(self) -> None:
        """Where measuring is cheap: what differs in one parameter from a leader, then what is farther away."""
        while not self._spent() and time.monotonic() - self._began < _CLIMB_SECONDS[self._run.kind]:
            near = self._around_leaders() or self._farther()
            if not near:
                return
            self.bench.ahead(near[: self.bench.at_once])
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
        unseen = {c.key for c in self._unseen()}
        return [c for leader in leaders for c in self.space.neighbours(leader) if c.key in unseen]

    def _measure_next(self, candidate: Candidate) -> None:
        if candidate.key in self.space.candidates and candidate.key in self.seen:
            return
        near = self.space.nearest(candidate, self._unseen())
        if near is None:
            return
        self.study.enqueue_trial(near.params)
        for _ in range(_WAITING_AT_MOST):
            self._round()
            if near.key in self.seen:
                return

    def _round(self, count: int = 1) -> None:
        """Ask for candidates that were not measured, have them compiled together, measure one after the other."""
        asked = self._ask(max(1, min(count, self._run.trials - len(self.seen))))
        if len(asked) > 1:
            self.bench.ahead([candidate for _, candidate in asked])
        try:
            while asked:
                self._try(*asked.pop(0))
                if self._spent():
                    break
        finally:
            for trial, _ in asked:  # nothing is known of them
                self.study.tell(trial, state=TrialState.FAIL)
            self._refresh()

    def _ask(self, count: int) -> list[tuple[Trial, Candidate]]:
        """Trials of candidates to measure; a proposal that is none is replaced by the nearest that is."""
        asked: dict[str, tuple[Trial, Candidate]] = {}
        for _ in range(2 * count):  # a useless proposal, then its replacement
            trial = self.study.ask()
            trial.set_user_attr("worker", self._worker)
            candidate = self._suggest(trial)
            unseen = {c.key: c for c in self._unseen() if c.key not in asked}
            if candidate.key in unseen and self._has_claim(trial, candidate):
                asked[candidate.key] = trial, candidate
                if len(asked) == count:
                    break
                continue
            self._settle(trial, candidate)
            unseen.pop(candidate.key, None)
            near = self.space.nearest(candidate, unseen.values())
            if near is None:
                break
            self.study.enqueue_trial(near.params)
        return list(asked.values())

    def _has_claim(self, trial: Trial, candidate: Candidate) -> bool:
        """Whether no other worker measures a candidate; of two that ask for it at the same time the first has it.

        Both may miss each other and measure it, in the moment between asking and looking: one result counts then.
        """
        others = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for other in others:
            if other.number >= trial.number or other.user_attrs.get("worker") == self._worker:
                continue
            found = self._candidate_of(other)
            if found is not None and found.key == candidate.key:
                self._taken.add(candidate.key)
                return False
        return True

    def _settle(self, trial: Trial, candidate: Candidate) -> None:
        """End a trial that needs no measurement: its time is known, or it cannot run."""
        known = self.seen.get(candidate.key)
        if known is None or known.us is None:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, known.us)

    def _try(self, trial: Trial, candidate: Candidate) -> None:
        """Measure a trial's candidate; what comes of it is in the study in any case."""
        trial.set_user_attr("measuring", True)
        try:
            result = timing.measure(self.bench, candidate, self.best_us())
        except BaseException as error:
            if isinstance(error, DeviceLost):
                trial.set_user_attr("rejected", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        if result.native_us is not None:
            trial.set_user_attr("native_us", result.native_us)
        if result.us is None:
            trial.set_user_attr("rejected", result.reason)
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, result.us)
        self.seen[candidate.key] = result

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
        entries = self.bench.finals(self._finalists())
        finals = _Finals(
            measured=len(self.seen),
            entries=[_Final.of(candidate, times) for candidate, times in entries],
            stock_us=self.bench.stock_us(),
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

    def _finalists(self) -> list[Candidate]:
        """The best sparse ones, those that are best without conversions of layout, and every dense one."""
        sparse = [r for r in self.seen.values() if r.native_us is not None and not self.space.is_dense(r.candidate)]
        native = [r.candidate for r in sorted(sparse, key=lambda r: r.native_us or 0.0)]
        best = self.ranked(dense=False)[:_FINALISTS] + native[:_NATIVE_FINALISTS]
        return list({c.key: c for c in best}.values()) + self.ranked(dense=True)

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
        ranked = [(Candidate.from_params(e.params), e) for e in entries]
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
            top=[files.Measurement(c.kernel, c.config, e.us, e.gpu) for c, e in ranked],
            gpu=chosen.gpu,
        )


def _chosen(sparse: Sequence[_Final], dense: Sequence[_Final]) -> _Final:
    """The fastest sparse candidate if it beats dense by both median and best time, else the fastest dense one."""
    if not dense:
        return sparse[0]
    median, best = MARGIN * dense[0].us, MARGIN * min(entry.best for entry in dense)
    return next((entry for entry in sparse if entry.us < median and entry.best < best), dense[0])


def _result_of(trial: FrozenTrial, candidate: Candidate) -> Result | None:
    if trial.state == TrialState.COMPLETE and trial.value is not None and 0.0 < trial.value < float("inf"):
        return Result(candidate, trial.value, native_us=trial.user_attrs.get("native_us"))
    if trial.state == TrialState.FAIL and "rejected" in trial.user_attrs:
        return Result(candidate, None, str(trial.user_attrs["rejected"]))
    return None


def _fail_dead(study: optuna.Study, but: str | None = None) -> None:
    """Fail the trials of workers that are gone, so that their candidates are free again; not those of worker ``but``.

    What a worker died of is the candidate that it measured, not those that it had only asked for.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if (but is not None and trial.user_attrs.get("worker") == but) or _is_alive(trial):
            continue
        try:
            if "measuring" in trial.user_attrs:
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
        spec = p.spec
        return spec.r, spec.s, spec.stride, spec.dilation, spec.h, spec.w, spec.groups == 1, spec.dtype

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
    storage: Storage | None = None,
    threads: int | None = None,
    progress: bool = True,
    worker: tuple[int, int] = (0, 1),
) -> TunedModel:
    """Choose a kernel and a config for every problem, by measurement.

    Parameters
    ----------
    problems
        Problems of equal spec, weight and activation are tuned once.
    device
        ``"cpu"``, ``"cuda"`` (torch's current GPU) or a certain GPU, as ``"cuda:1"``. On the CPU the dtype of a spec
        does not matter, on a GPU it is part of the problem (float64 is computed in float32).
    trials
        Candidates measured for each problem, at most; those always measured (dense, each kernel's default) count,
        but are measured even if they are more.
    timeout
        Seconds for everything. Each problem gets an equal share of what is left, so that a large one does not
        use it up; the candidates always measured are not cut, so it can be overrun by them.
    storage
        Path of a journal file, or URL of a database (``"postgresql://..."``, ``"sqlite:///..."``). A run that was
        interrupted goes on where it stopped when it is called again, and several processes, on several hosts of equal
        devices, can share it. None keeps everything in memory, or, on a GPU, in a temporary file that is left, and
        named in the error, only if a kernel made the GPU unusable.
    threads
        How many threads a layer may use; None takes those of torch if it is loaded, else of numbasparse. Without
        meaning on a GPU.
    progress
        Whether to show a progress bar, and a table at the end.
    worker
        Number of this process, from 0, and how many share the `storage`: each begins with another layer, and joins the
        others where nothing else is left. All return the whole model.

    Returns
    -------
    TunedModel

    Raises
    ------
    TypeError, ValueError
        For arguments that make no sense, or a `storage` that is no journal and no database.
    RuntimeError
        If for a problem every kernel, dense too, computes something wrong; if there is no usable GPU.
    DeviceLost
        A RuntimeError: a kernel made the GPU unusable for this process. The text says how to go on.
    KeyboardInterrupt
        Passes through; what was measured is in the journal.
    """
    problems = list(problems)
    kind, index = parse_device(device)
    _check_arguments(problems, trials, timeout)
    if not 0 <= worker[0] < worker[1]:
        raise ValueError(f"worker must be (number, count) with 0 <= number < count, got {worker!r}")
    count = _threads(threads) if kind == "cpu" else 1
    groups = _grouped([problem.on(kind) for problem in problems])
    with _quiet_optuna(), _benches(kind, index, count) as benches, _journal(storage, kind) as journal:
        run = _Run(kind, trials, count, journal, benches)
        layers = _tune_all(run, groups, timeout, progress, worker)
        tuned = TunedModel(layers, files.this_device(count, kind), files.these_versions(kind))
    _warn_if_busy(run.done)
    if progress:
        from autotune.report import print_report

        print_report(tuned)
    return tuned


def _benches(kind: str, index: int | None, threads: int) -> AbstractContextManager[timing.Benches]:
    """What a call measures with, which sets and restores what its benches share."""
    if kind == "cuda":
        from autotune.gpu import benches

        return benches(index)
    return timing.cpu_benches(threads)


@contextmanager
def _journal(storage: Storage | None, kind: str) -> Iterator[Any]:
    """The caller's journal; without one, memory, or on a GPU a temporary file that outlives only a lost device."""
    if storage is not None or kind == "cpu":
        yield None if storage is None else open_storage(storage)
        return
    folder = tempfile.mkdtemp(prefix="numbasparse-tune-")
    path = os.path.join(folder, "journal")
    keep = False
    try:
        yield open_journal(path)
    except DeviceLost as lost:
        keep = True
        raise DeviceLost(f"{lost}; what was measured so far is in storage={path!r}") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _tune_all(
    run: _Run, groups: Sequence[list[LayerProblem]], timeout: float | None, progress: bool, worker: tuple[int, int]
) -> list[files.Layer]:
    from autotune.report import progress_bar

    end = None if timeout is None else time.monotonic() + timeout
    layers: dict[int, files.Layer] = {}
    with progress_bar(len(groups), progress) as advance:
        order = _similar_together(groups)
        first = worker[0] * len(order) // worker[1]
        order = order[first:] + order[:first]
        space = ProblemSpace(groups[order[0]][0], run.threads, run.kind)
        for place, number in enumerate(order):
            group = groups[number]
            advance(0, group[0].name)
            search = _Search(run, group[0], space, _share(end, len(groups) - place))
            if place + 1 < len(order):
                # What is always measured of the next problem is compiled while this one is measured.
                following = groups[order[place + 1]][0]
                space = ProblemSpace(following, run.threads, run.kind)
                run.benches.ahead(following, space.defaults)
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
        return spec.r, spec.s, spec.stride, spec.h, spec.w, spec.c, spec.k, spec.dtype

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


def _check_arguments(problems: Sequence[Any], trials: int, timeout: float | None) -> None:
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
