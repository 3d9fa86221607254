"""Several processes that tune together, one of which is killed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autotune import load, measure, tune_layers
from autotune.space import Candidate
from autotune.study import open_storage
from autotune.workers import Place, own_number, places, run_together

WORKER = """
import sys, time
import numpy as np
from autotune import measure, tune_layers
from autotune.space import LayerProblem
from numbasparse import ConvSpec, SparseWeight

TRIALS = 6

def problems():
    made = []
    for number, size in enumerate((10, 12)):
        spec = ConvSpec.create((1, 16, size, size), (16, 16, 3, 3), padding=1)
        rng = np.random.default_rng(number)
        dense = rng.standard_normal(spec.weight_shape) * (rng.random(spec.weight_shape) > 0.9)
        made.append(LayerProblem(f"layer{number}", spec, SparseWeight.from_dense(dense.astype(np.float32))))
    return made

if __name__ == "__main__":
    calls, whole = [], measure.measure

    def stuck(*arguments):
        calls.append(1)
        if len(calls) > 2:
            time.sleep(600)
        return whole(*arguments)

    measure.measure = stuck
    tune_layers(problems(), trials=TRIALS, storage=sys.argv[1], threads=1, progress=False, worker=(1, 2))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with problems, which as a program is a worker that never ends its third measurement."""
    path = tmp_path / "a_worker.py"
    path.write_text(WORKER)
    spec = importlib.util.spec_from_file_location("a_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trials(storage: str) -> list[Any]:
    opened = open_storage(storage)
    return [t for study in opened.get_all_studies() for t in opened.get_all_trials(study._study_id, deepcopy=False)]


def wait_for(storage: str, count: int) -> None:
    """Until so many measurements have begun."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if sum("measuring" in trial.user_attrs for trial in trials(storage)) >= count:
            return
        time.sleep(0.05)
    pytest.fail("the worker measured nothing")


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_two_workers_one_killed(kind: str, worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = {
        "journal": str(tmp_path / "journal"),
        "sqlite": f"sqlite:///{tmp_path}/study.db",
        "postgresql": os.environ.get("NUMBASPARSE_TEST_POSTGRESQL", ""),
    }[kind]
    if not storage:
        pytest.skip("NUMBASPARSE_TEST_POSTGRESQL is not set to the URL of an empty database")
    open_storage(storage)  # made before both, so that the test may look into it
    other = subprocess.Popen([sys.executable, worker.__file__, storage])
    try:
        wait_for(storage, 3)
        # Both are at work: this process measures for the first time while the other is in the middle of it.
        whole = measure.measure

        def kill_first(*arguments: Any) -> Any:
            if other.poll() is None:
                other.kill()
                other.wait()
            return whole(*arguments)

        monkeypatch.setattr(measure, "measure", kill_first)
        options: Any = {"trials": worker.TRIALS, "storage": storage, "threads": 1, "progress": False}
        tuned = tune_layers(worker.problems(), worker=(0, 2), **options)
    finally:
        other.kill()
    assert [layer.names for layer in tuned.layers] == [["layer0"], ["layer1"]]

    opened = open_storage(storage)
    died, measured = 0, []
    for study in opened.get_all_studies():
        counted: Counter[str] = Counter()
        for trial in opened.get_all_trials(study._study_id):
            assert trial.state != TrialState.RUNNING, "nothing is left that nobody will end"
            died += "died" in trial.user_attrs
            if trial.state == TrialState.COMPLETE and "measuring" in trial.user_attrs:
                counted[Candidate.from_params(trial.params).key] += 1
        assert set(counted.values()) == {1}, "each candidate was measured once"
        measured.append(len(counted))
    assert died == 1
    assert sorted(measured) == sorted(layer.trials for layer in tuned.layers)
    # Who comes later finds everything measured, and gets the same.
    before = len(trials(storage))
    assert tune_layers(worker.problems(), **options).layers == tuned.layers
    assert len(trials(storage)) == before


def test_workers_begin_with_different_layers(worker: Any) -> None:
    first = []
    for number in range(2):
        storage = optuna.storages.InMemoryStorage()
        options: Any = {"trials": 1, "storage": storage, "threads": 1, "progress": False}
        tune_layers(worker.problems(), worker=(number, 2), **options)
        first.append(storage.get_all_studies()[0].study_name.split()[0])
    assert "h10" in first[0]
    assert "h12" in first[1]


@pytest.mark.parametrize("worker", [(1, 1), (-1, 2), (2, 2)])
def test_wrong_worker_numbers(worker: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="worker must be"):
        tune_layers([_problem()], trials=1, progress=False, worker=worker)


def _problem() -> Any:
    import numpy as np

    from autotune.space import LayerProblem
    from numbasparse import ConvSpec, SparseWeight

    spec = ConvSpec.create((1, 4, 6, 6), (4, 4, 3, 3))
    return LayerProblem("a", spec, SparseWeight.from_dense(np.eye(4, 36, dtype=np.float32).reshape(spec.weight_shape)))


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("nothing://here", ValueError, "cannot use the database"),
        ("sqlite:////nowhere/at/all/study.db", ValueError, "cannot use the database sqlite:////nowhere"),
        ("postgresql+pg8000://me:secret@127.0.0.1:1/db", ImportError, "needs a driver that is not installed"),
    ],
)
def test_wrong_databases(url: str, error: type[Exception], words: str) -> None:
    if error is ImportError and _there("pg8000"):
        pytest.skip("the driver is installed")
    with pytest.raises(error, match=words) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- places -------------------------------------------------------------------------------------------------


def test_places_on_a_cpu() -> None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = places("cpu", count, 1)
    assert len({core for place in found for core in place.cores}) == count
    for threads in (None, 2):
        with pytest.raises(ValueError, match="workers on a CPU need"):
            places("cpu", count, threads)


def test_places_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.gpu for place in places("cuda", 2, None)] == ["3", "5"]
    with pytest.raises(ValueError, match="3 workers need 3 GPUs"):
        places("cuda", 3, None)


def test_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys, pathlib; from autotune.workers import own_number; n, count = own_number();"
        "cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [];"
        f"pathlib.Path({str(tmp_path)!r}, str(n)).write_text(f'{{count}} {{cores}}'); sys.exit(n)"
    )
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset([0])
    one = frozenset([min(cores)])
    assert run_together([sys.executable, "-c", script], [Place(None, cores), Place(None, one)]) == [0, 1]
    assert (tmp_path / "0").read_text().startswith("2 ")
    if hasattr(os, "sched_getaffinity"):
        assert (tmp_path / "1").read_text() == f"2 {sorted(one)}"
        assert frozenset(os.sched_getaffinity(0)) == cores
    monkeypatch.setenv("NUMBASPARSE_WORKER", "2/2")
    with pytest.raises(ValueError, match="number/count"):
        own_number()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_command_with_two_workers(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))\n"
        "    for conv in model: conv.weight.data *= torch.rand_like(conv.weight) > 0.8\n"
        "    return model\n"
    )
    command = [sys.executable, "-m", "numbasparse", "tune", "net.py:net", "--input", "1,3,12,12", "--trials", "1"]
    done = subprocess.run(
        [*command, "--workers", "2", "--threads", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(load(tmp_path / "tuned.json").layers) == 2
    done = subprocess.run([*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "need a number of threads" in done.stderr
