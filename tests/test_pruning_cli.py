"""The prune command: scopes, vectors, calibration, retraining with a checkpoint; wrong combinations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_pruning import one_thread  # noqa: F401

from numbasparse.cli import main

FACTORY = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )


def batches():
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 10, 10, generator=random), torch.arange(8) % 4) for _ in range(4)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


def prune(*options: str, sparsity: float = 0.75) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["prune", "nets.py:make", "--sparsity", str(sparsity), *options])
    return result.exit_code, result.output


def shares() -> list[float]:
    state = load_file("pruned.safetensors")
    return [float((state[f"{name}.weight"] == 0).float().mean()) for name in ("3", "5")]


@pytest.mark.parametrize("scope", ["uniform+", "erk", "lamp"])
def test_scopes_and_vectors(folder: Path, scope: str) -> None:
    code, output = prune("--scope", scope, "--vector", "4")
    assert code == 0, output
    weight = load_file("pruned.safetensors")["3.weight"] != 0
    runs = weight.view(4, 4, -1)
    assert (runs.all(1) == runs.any(1)).all()
    assert (shares()[0] * 1152 + shares()[1] * 128) / 1280 == pytest.approx(0.75, abs=0.01)


def test_two_of_four(folder: Path) -> None:
    code, output = prune("--two-of-four")
    assert code == 0, output
    weight = load_file("pruned.safetensors")["3.weight"] != 0
    assert int(weight.unflatten(1, (-1, 4)).sum(2).max()) == 2
    code, output = prune("--two-of-four", "--calibrate", "nets.py:batches")
    assert code != 0
    assert "OBSPruning has no two_of_four" in output


def test_reordered_channels_give_the_same(folder: Path) -> None:
    code, output = prune("--out", "as_is.safetensors")
    assert code == 0, output
    code, output = prune("--reorder")
    assert code == 0, output
    assert "input channels of 2 layers re-ordered" in output
    given, moved = load_file("as_is.safetensors"), load_file("pruned.safetensors")
    assert not torch.equal(given["3.weight"], moved["3.weight"])
    assert over_two(moved) < over_two(given)
    nets = sys.modules["nets"]
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    results = []
    for state in (given, moved):
        model = nets.make().eval()
        model.load_state_dict(state)
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0])
    code, output = prune("--reorder", "--vector", "4")
    assert code != 0
    assert "neighbours no more" in output


def over_two(state: dict[str, torch.Tensor]) -> int:
    """What four neighbouring input channels hold over two, of both layers."""
    held = [(state[f"{name}.weight"] != 0).unflatten(1, (-1, 4)).sum(2) for name in ("3", "5")]
    return sum(int((counts - 2).clamp(min=0).sum()) for counts in held)


def test_calibration(folder: Path) -> None:
    code, output = prune("--calibrate", "nets.py:batches")
    assert code == 0, output
    assert "75.00%" in output
    assert shares() == [0.75, 0.75]


def test_retraining_resumes_from_its_checkpoint(folder: Path) -> None:
    options = ("--train", "nets.py:batches", "--epochs", "2", "--schedule", "acdc", "--checkpoint", "c.safetensors")
    code, output = prune(*options)
    assert code == 0, output
    assert "resumed" not in output
    before = Path("pruned.safetensors").read_bytes()
    code, output = prune(*options)
    assert code == 0, output
    assert "resumed from c.safetensors after 8 steps" in output
    assert Path("pruned.safetensors").read_bytes() == before
    code, output = prune(*options[:3], "3", *options[4:])
    assert code == 1
    assert "is of another training" in output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--train", "nets.py:batches", "--calibrate", "nets.py:batches"), "exclude each other"),
        (("--checkpoint", "c"), "--checkpoint needs --train"),
        (("--train", "nets.py:batches", "--checkpoint", "no/c"), "there is no folder"),
        (("--calibrate", "nets.py:absent"), "has no 'absent'"),
    ],
)
def test_wrong_combinations(folder: Path, options: tuple[str, ...], text: str) -> None:
    code, output = prune(*options)
    assert code == 1
    assert text in output
    assert not Path("pruned.safetensors").exists()
