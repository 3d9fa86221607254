"""Pruning: the ready loop: learning, checkpoints, resume to equal bits, mixed precision, distillation, two ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from test_pruning import (
    SIZES,
    assert_same,
    batches,
    one_thread,  # noqa: F401
    small_model,
    snapshot,
    zeros,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from numbasparse.pruning import (
    ACDCSchedule,
    AdamWConfig,
    Callback,
    Committee,
    CubicSchedule,
    Distillation,
    FitConfig,
    MagnitudePruning,
    Pruner,
    SGDConfig,
    fit,
)
from numbasparse.pruning.checkpoint import from_bytes, load_checkpoint, to_bytes

TESTS = Path(__file__).resolve().parent


def quiet(epochs: int, **options: Any) -> FitConfig:
    return FitConfig(epochs, progress=False, **options)


def test_fit_learns_and_prunes() -> None:
    model = small_model()
    model.eval()
    keys = list(model.state_dict())
    pruner = Pruner(model, MagnitudePruning(0.8), CubicSchedule(0, 16, every=2))
    history = fit(
        model,
        batches(),
        quiet(12, optimizer=SGDConfig(lr=0.05)),
        pruner=pruner,
        after_epoch=lambda epoch, model: {"training": float(model.training)},
    )
    assert [record.epoch for record in history] == list(range(12))
    assert history[-1].loss < history[0].loss
    assert history[0].lr > history[-1].lr > 0
    assert history[-1].sparsity == 0.8
    assert history[0].metrics == {"training": 0.0}
    assert history[-1].accuracy is not None
    assert not model.training
    assert not pruner.active
    assert list(model.state_dict()) == keys
    assert sum(zeros(model)) == round(0.8 * sum(SIZES))


def test_fit_leaves_a_pruner_that_the_caller_began() -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.8))
    pruner.begin()
    fit(model, batches(), quiet(1), pruner=pruner)
    assert pruner.active
    assert pruner.finish().sparsity == pytest.approx(0.8, abs=1e-3)


def test_fit_with_progress_bar_and_stream(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches(2))

    assert len(fit(small_model(), Stream(), FitConfig(2, label_smoothing=0.1))) == 2
    assert "epoch 2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "epochs", "text"),
    [
        (iter(batches()), 2, "used up after one of 2 epochs"),
        ([], 1, "no batches"),
        (batches(), 2, "schedule ends at step 100, but 2 epochs of 4 batches end at step 8"),
    ],
)
def test_fit_errors_leave_the_model_as_it_was(data: Any, epochs: int, text: str) -> None:
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        fit(model, data, quiet(epochs), pruner=Pruner(model, MagnitudePruning(0.8), CubicSchedule(0, 100)))
    assert_same(model, before)


def test_fit_refuses_another_models_pruner() -> None:
    with pytest.raises(ValueError, match="another model"):
        fit(small_model(), batches(), quiet(1), pruner=Pruner(small_model(), MagnitudePruning(0.5)))


def test_divergence_puts_the_model_back() -> None:
    model = small_model()
    before = snapshot(model)
    pruner = Pruner(model, MagnitudePruning(0.8))
    data = [(x * math.nan, y) for x, y in batches()]
    with pytest.raises(RuntimeError, match="loss became nan in epoch 1"):
        fit(model, data, quiet(1), pruner=pruner)
    assert_same(model, before)
    assert model.training
    assert not pruner.active
    # A pruner that the caller began is put back to where it was.
    pruner.begin()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="loss became nan"):
        fit(model, data, quiet(1), pruner=pruner)
    assert_same(model, before)
    assert (pruner.active, pruner.steps, pruner.sparsity) == (True, 0, 0.8)


@pytest.mark.parametrize("bad", [{"lr": math.nan}, {"lr": -1.0}, {"momentum": 0.0}, {"weight_decay": math.inf}])
def test_sgd_config_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be finite|needs momentum"):
        SGDConfig(**bad)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"epochs": 0}, "epochs must be an int of 1 or more"),
        ({"rate": "step"}, "rate must be one of"),
        ({"warmup_epochs": 2}, r"warmup_epochs must be in \[0, epochs\)"),
        ({"autocast": torch.float32}, "autocast must be"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"checkpoint_steps": 3}, "needs a checkpoint file"),
    ],
)
def test_fit_config_errors(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FitConfig(**{"epochs": 2, **bad})


def test_learning_rates() -> None:
    sgd = SGDConfig(lr=0.4)
    assert [FitConfig(4, sgd, rate="linear").lr_at(e) for e in (0, 1, 4)] == pytest.approx([0.4, 0.3, 0.0])
    assert [FitConfig(4, sgd).lr_at(e) for e in (0, 2, 4)] == pytest.approx([0.4, 0.2, 0.0])
    assert [FitConfig(5, sgd, "linear", 1.0).lr_at(e) for e in (0, 0.5, 1, 3)] == pytest.approx([0.0, 0.2, 0.4, 0.2])
    assert FitConfig(4, sgd, rate="constant").lr_at(3.9) == 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.8))
    history = fit(model, batches(), quiet(4, optimizer=AdamWConfig(lr=0.01), autocast=dtype), pruner=pruner)
    assert history[-1].loss < history[0].loss
    assert model[2].weight.dtype == torch.float32
    assert sum(zeros(model)) == round(0.8 * sum(SIZES))


# Checkpoints


class Noise(Callback):
    """Adds noise from torch's generator to a bias, and counts: both must be resumed."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.count = stop, 0

    def after_step(self, step: int) -> None:
        self.count += 1
        if step == self.stop:
            raise KeyboardInterrupt

    def before_step(self, step: int) -> None:
        assert step == self.count

    def after_epoch(self, epoch: int, model: nn.Module) -> Mapping[str, float]:
        return {"count": self.count}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Own:
    """Batches in an order of its own generator, with noise from the global one."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = batches(5)
        for i in torch.randperm(5, generator=self.random).tolist():
            x, y = data[i]
            yield x + 0.1 * torch.randn(x.shape), y


def loader() -> Any:
    x, y = (torch.cat(part) for part in zip(*batches(5), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def net_with_dropout() -> Any:
    model = small_model()
    model.insert(7, nn.Dropout(0.3))
    return model


def run(source: Any, checkpoint: Path | None, stop: int | None, schedule: Any, dtype: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(11)
    model = net_with_dropout()
    pruner = Pruner(model, MagnitudePruning(0.8, vector=2), schedule)
    noise = Noise(stop)
    config = quiet(
        3,
        optimizer=SGDConfig(lr=0.05),
        rate="linear",
        autocast=dtype,
        checkpoint=checkpoint,
        checkpoint_steps=None if checkpoint is None else 2,
    )
    # A loss large enough that half floats overflow: the scale is lowered on the way, and must be resumed.
    factor = 1.0 if dtype is None else 2000.0
    history = fit(
        model,
        source(),
        config,
        pruner=pruner,
        callbacks=[noise],
        loss=lambda outputs, targets: factor * nn.functional.cross_entropy(outputs, targets),
    )
    return model, history, torch.rand(3)


@pytest.mark.parametrize("stop", [1, 4, 7, 10, 13])
@pytest.mark.parametrize(
    ("source", "schedule", "dtype"),
    [
        (Own, CubicSchedule(0, 12, every=2), None),
        (loader, ACDCSchedule(2, 11, 3, 3), None),
        (loader, CubicSchedule(0, 12, every=2), torch.float16),
    ],
    ids=["own", "loader", "float16"],
)
def test_a_stopped_training_resumes_to_the_same_bits(
    tmp_path: Path, source: Any, schedule: Any, dtype: Any, stop: int
) -> None:
    path = tmp_path / "fit.safetensors"
    straight, history, after = run(source, None, None, schedule, dtype)
    with pytest.raises(KeyboardInterrupt):
        run(source, path, stop, schedule, dtype)
    assert path.exists() == (stop > 2)
    torch.manual_seed(999)
    torch.rand(5)
    resumed, again, after_resumed = run(source, path, None, schedule, dtype)
    assert_same(resumed, snapshot(straight))
    assert torch.equal(after, after_resumed), "the random state differs after the end"

    def parts(records: Any) -> Any:
        return [(r.epoch, r.loss, r.accuracy, r.lr, r.sparsity, r.metrics) for r in records]

    assert parts(again) == parts(history)
    # The file of a finished training gives its result at once.
    before = path.read_bytes()
    finished, _, _ = run(source, path, 1, schedule, dtype)
    assert_same(finished, snapshot(straight))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


KILLED = """
import sys, time
from pathlib import Path
from test_pruning_fit import *
path = Path(sys.argv[1])
class Slow(Noise):
    def after_step(self, step):
        super().after_step(step)
        time.sleep(float(sys.argv[2]))
import test_pruning_fit
test_pruning_fit.Noise = Slow
model, history, _ = run(Own, path, None, CubicSchedule(0, 12, every=2), None)
torch.save(model.state_dict(), sys.argv[3])
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    checkpoint, result = tmp_path / "fit.safetensors", tmp_path / "result.pt"

    def start(pause: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(pause), str(result)]
        env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=TESTS, env=env)

    process = start(0.2)
    end = time.monotonic() + 100
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not result.exists()
    assert load_checkpoint(checkpoint)["steps"] in range(2, 15)
    assert start(0.0).wait(timeout=100) == 0
    straight, _, _ = run(Own, None, None, CubicSchedule(0, 12, every=2), None)
    assert_same(straight, torch.load(result))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    fit(small_model(), batches(), quiet(1, checkpoint=path))
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="is of another training: its config was"):
        fit(model, batches(), quiet(2, checkpoint=path))
    with pytest.raises(ValueError, match="its batches was 4, now it is 3"):
        fit(model, batches(3), quiet(1, checkpoint=path))
    with pytest.raises(ValueError, match="its pruning was None"):
        fit(model, batches(), quiet(1, checkpoint=path), pruner=Pruner(model, MagnitudePruning(0.5)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a checkpoint of this package, or is damaged"):
        fit(model, batches(), quiet(1, checkpoint=path))
    with pytest.raises(ValueError, match="there is no folder"):
        fit(model, batches(), quiet(1, checkpoint=tmp_path / "no" / "c"))
    assert_same(model, before)


def test_checkpoint_trees() -> None:
    shared = torch.arange(6.0).view(2, 3)
    tree = {
        0: [shared, shared.t(), (1, 2.5, None, True)],
        "x": {"last": torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)},
        "numbers": [0.1, math.inf, 2**70],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0),
    }
    again = from_bytes(to_bytes(tree))
    assert torch.equal(again[0][0], shared)
    assert torch.equal(again[0][1], shared.t())
    assert again[0][2] == (1, 2.5, None, True)
    assert again["x"]["last"].is_contiguous(memory_format=torch.channels_last)
    assert again["numbers"] == [0.1, math.inf, 2**70]
    assert again["scalar"].shape == ()
    assert again["half"].dtype == torch.bfloat16
    assert again["empty"].shape == (0,)
    with pytest.raises(TypeError, match="'a' is a set"):
        to_bytes({"a": {1}})


# Distillation


def test_distillation_pulls_towards_the_teacher() -> None:
    teacher = small_model()
    x = [batch for batch, _ in batches()]
    student = small_model()
    pruner = Pruner(student, MagnitudePruning(0.7))
    distillation = Distillation(student, teacher, match="mse", features=["2", "6"])
    history = fit(
        student,
        x,
        quiet(20, optimizer=AdamWConfig(lr=0.01), rate="linear"),
        pruner=pruner,
        distillation=distillation,
    )
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].accuracy is None
    distillation.close()
    assert not student[2]._forward_hooks
    assert not teacher[2]._forward_hooks
    assert not teacher.training


def test_distillation_terms() -> None:
    model = small_model().eval()
    x, y = batches(1)[0]
    distillation = Distillation(model, weight=0.25, temperature=2.0, features=["2"], feature_weight=3.0)
    assert float(distillation(x, model(x)).detach()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        model[9].bias.add_(torch.tensor([1.0, 0, 0, 0]))
        model[2].weight.mul_(2.0)
        model[2].bias.mul_(2.0)
        outputs = model(x)
        wanted = distillation.teacher(x)
        distillation._seen[1].clear()
        student, teacher = ((out / 2.0).softmax(1) for out in (outputs, wanted))
        divergence = (teacher * (teacher / student).log()).sum(1).mean() * 4.0
        task = nn.functional.cross_entropy(outputs, y)
        # Features are twice the teacher's: the mean squared difference is its mean square.
        assert float(distillation(x, outputs, task)) == pytest.approx(
            float(0.75 * task + 0.25 * divergence + 3.0), rel=1e-4
        )
    with pytest.raises(ValueError, match="did not run"):
        distillation(x, outputs)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"weight": 1.5}, "weight must be in"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"match": "cosine"}, "match must be one of"),
        ({"features": ["99"]}, "feature layer '99' is not in Sequential"),
        ({"feature_weight": math.nan}, "feature_weight must be finite"),
    ],
)
def test_distillation_errors(bad: dict[str, Any], text: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=text):
        Distillation(model, **bad)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_committee_teaches_by_its_mean() -> None:
    student, x = small_model(), batches(1)[0][0]
    members = [small_model() for _ in range(2)]
    with torch.no_grad():
        members[1][9].bias.add_(torch.tensor([2.0, 0, 0, 0]))
    distillation = Distillation(student, Committee(members), weight=1.0, match="mse")
    expected = sum(member.eval()(x) for member in members) / 2
    torch.testing.assert_close(distillation.teacher(x), expected)
    outputs = student(x)
    torch.testing.assert_close(distillation(x, outputs), nn.functional.mse_loss(outputs, expected))
    with pytest.raises(ValueError, match="at least one model"):
        Committee([])
    with pytest.raises(ValueError, match=r"same shape in one member and another, got \(\d+, 4\) and \(\d+, 3\)"):
        Committee([nn.Linear(2, 4), nn.Linear(2, 3)])(torch.zeros(5, 2))


def test_batches_without_targets_need_distillation() -> None:
    with pytest.raises(ValueError, match="no targets: pass"):
        fit(small_model(), [x for x, _ in batches()], quiet(1))
    model = small_model()
    with pytest.raises(ValueError, match="the same model"):
        Distillation(model, model)


# Two ranks

RANKS = """
import os
import pathlib
import sys
import torch
from torch import distributed
from test_pruning_fit import *
distributed.init_process_group("gloo")
rank = distributed.get_rank()

class Watch(Noise):
    masks = 0
    def after_step(self, step):
        for name in ("2", "6"):
            assert equal_on_ranks(self.model.get_submodule(name).weight_mask.to(torch.uint8)), "masks differ"
            self.masks += 1
        super().after_step(step)
    def begin(self, model):
        self.model = model

def equal_on_ranks(value):
    other = value.clone()
    distributed.broadcast(other, 0)
    return torch.equal(value, other)

def train(checkpoint, stop):
    torch.manual_seed(5 + rank)
    model = small_model(seed=rank)  # other weights on each rank: those of rank 0 count
    pruner = Pruner(model, MagnitudePruning(0.8, vector=4), CubicSchedule(0, 5, every=1, initial=0.3))
    watch = Watch(stop)
    x, y = (torch.cat(part) for part in zip(*batches(6)))
    sampler = torch.utils.data.DistributedSampler(range(len(x)), seed=1)
    source = DataLoader(TensorDataset(x, y), batch_size=8, sampler=sampler)
    config = quiet(2, optimizer=SGDConfig(lr=0.05), checkpoint=checkpoint, checkpoint_steps=1 if checkpoint else None)
    history = fit(model, source, config, pruner=pruner, callbacks=[watch])
    assert equal_on_ranks(torch.cat([v.flatten() for v in model.parameters()])), "weights differ"
    return model, [r.loss for r in history], watch

straight, losses, watch = train(None, None)
assert watch.masks == 12
assert len(losses) == 2
assert sum(zeros(straight)) >= round(0.8 * sum(SIZES)) - 4
try:
    train(sys.argv[1], 4)
    raise SystemExit("was not stopped")
except KeyboardInterrupt:
    pass
resumed, again, watch = train(sys.argv[1], None)
assert watch.masks == 6
assert again == losses
assert_same(resumed, snapshot(straight))
(pathlib.Path(sys.argv[1]).parent / f"right{rank}").touch()  # not printed: lines of two processes may mix
distributed.barrier()
distributed.destroy_process_group()
(pathlib.Path(sys.argv[1]).parent / f"left{rank}").touch()
# DistributedDataParallel keeps gloo's threads alive behind the group's end, in a script with nothing else too. Rarely
# one meets an interpreter that is gone, and aborts the process ("terminate called without an active exception").
os._exit(0)
"""


def test_two_ranks_have_equal_masks_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "fit.safetensors")],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    # What is there tells how far a rank came that failed.
    assert sorted(p.name for p in tmp_path.glob("*t[01]")) == ["left0", "left1", "right0", "right1"], done.stderr
    assert done.returncode == 0, done.stderr


def test_torchrun_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        fit(small_model(), batches(), quiet(1))


def test_records_are_json() -> None:
    from dataclasses import asdict

    history = fit(small_model(), batches(), quiet(1))
    assert json.loads(json.dumps([asdict(r) for r in history]))[0]["epoch"] == 0
