"""Pruning: one-shot, the three calls, the schedule, the ready loop; and the quickstart's model and files."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from numbasparse.pruning import (
    CubicSchedule,
    MagnitudePruning,
    Pruner,
    default_filter,
    fold_masks,
    print_report,
    prune_,
    report,
)

State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads than idle cores would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(seed: int = 0) -> Any:
    """Return stem (3 channels), two convolutions to prune, a depthwise one and a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


CHOSEN = ["2", "6"]
SIZES = [16 * 8 * 9, 12 * 16]


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 6, 6, generator=random), torch.randint(4, (8,), generator=random)) for _ in range(count)]


def snapshot(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def bits(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def assert_same(model: nn.Module, before: State) -> None:
    """Assert that a model has the same keys and, bit for bit, the same values (NaN included)."""
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(bits(after[key]), bits(value)), key


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


def zeros(model: nn.Module, names: list[str] = CHOSEN) -> list[int]:
    return [int((weight(model, name) == 0).sum()) for name in names]


# One-shot pruning


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98])
def test_global_sparsity_is_exact(sparsity: float) -> None:
    model = small_model()
    result = prune_(model, MagnitudePruning(sparsity, scope="global"))
    assert sum(zeros(model)) == round(sparsity * sum(SIZES))
    assert [layer.name for layer in result.layers] == CHOSEN
    assert result.sparsity == pytest.approx(sparsity, abs=1 / sum(SIZES))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98])
def test_layer_sparsity_is_exact_in_each_layer(sparsity: float) -> None:
    model = small_model()
    prune_(model, MagnitudePruning(sparsity, scope="layer"))
    assert zeros(model) == [round(sparsity * size) for size in SIZES]


def test_only_chosen_layers_change() -> None:
    model = small_model()
    before = snapshot(model)
    prune_(model, MagnitudePruning(0.9))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in ("2.weight", "6.weight")), key


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_smallest_magnitudes_go_and_the_rest_is_untouched(scope: Any) -> None:
    model = small_model()
    before = snapshot(model)
    prune_(model, MagnitudePruning(0.7, scope=scope))
    groups = [CHOSEN] if scope == "global" else [[name] for name in CHOSEN]
    for names in groups:
        old = torch.cat([before[f"{name}.weight"].flatten() for name in names])
        new = torch.cat([weight(model, name).flatten() for name in names])
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        assert old[~kept].abs().max() <= old[kept].abs().min()


def test_global_takes_more_from_the_layer_of_small_weights() -> None:
    model = small_model()
    with torch.no_grad():
        model[2].weight.mul_(0.1)
    sparse = {layer.name: layer.sparsity for layer in prune_(model, MagnitudePruning(0.5)).layers}
    assert sparse["2"] > 0.5 > sparse["6"]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_ties_keep_the_first_weights(scope: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1))
    for layer in model:
        nn.init.constant_(layer.weight, -1.0)
    prune_(model, MagnitudePruning(0.5, scope=scope))
    first, second = (layer.weight.detach().flatten().tolist() for layer in model)
    if scope == "layer":
        assert first == second == [-1.0] * 4 + [0.0] * 4
    else:
        # One weight is set aside for the second layer; the other seven are the first of sixteen equal ones.
        assert first == [-1.0] * 7 + [0.0]
        assert second == [-1.0] + [0.0] * 7


def test_global_leaves_a_weight_in_every_layer() -> None:
    model = small_model()
    with torch.no_grad():
        model[6].weight.mul_(1e-6)
    best = int(model[6].weight.detach().abs().argmax())
    prune_(model, MagnitudePruning(0.9))
    assert model[6].weight.detach().flatten().nonzero().flatten().tolist() == [best]
    assert sum(zeros(model)) == round(0.9 * sum(SIZES))


def test_layer_scope_leaves_a_weight_in_a_tiny_layer() -> None:
    model = nn.Conv2d(4, 1, 1)
    assert prune_(model, MagnitudePruning(0.99, scope="layer")).nnz == 1


def test_pruned_weights_are_positive_zeros() -> None:
    model = small_model()
    prune_(model, MagnitudePruning(0.5))
    pruned = weight(model, "2")
    assert not torch.signbit(pruned[pruned == 0]).any()


def test_mixed_dtypes_and_channels_last() -> None:
    model = small_model().to(memory_format=torch.channels_last)
    model[6].to(torch.bfloat16)
    plain = small_model()
    plain[6].to(torch.bfloat16)
    prune_(model, MagnitudePruning(0.8))
    prune_(plain, MagnitudePruning(0.8))
    assert_same(model, snapshot(plain))
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_shared_weight_is_counted_once() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    assert prune_(model, MagnitudePruning(0.5)).size == 16


def test_default_filter() -> None:
    model = small_model()
    assert [name for name, module in model.named_modules() if default_filter(module, name)] == CHOSEN


def test_own_filter() -> None:
    model = small_model()
    result = prune_(model, MagnitudePruning(0.5), filter=lambda module, name: isinstance(module, nn.Linear))
    assert [layer.name for layer in result.layers] == ["9"]
    assert zeros(model, ["9"]) == [24]


# Errors: each says what came, and leaves the model as it was


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 90, math.nan, math.inf, "0.9", None, True])
def test_sparsity_out_of_range(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be .*in \[0, 1\), got"):
        MagnitudePruning(sparsity)


def test_sparsity_in_percent_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"for 90 % pass 0\.9"):
        MagnitudePruning(90)


def test_unknown_scope() -> None:
    with pytest.raises(
        ValueError, match=r"scope must be one of 'global', 'layer', 'uniform\+', 'erk', 'lamp', got 'best'"
    ):
        MagnitudePruning(0.9, scope="best")  # type: ignore[arg-type]


def nothing(model: Any) -> None: ...


def put_nan(model: Any) -> None:
    model[6].weight.data[0, 0] = math.nan


def put_infinity(model: Any) -> None:
    model[6].weight.data[0, 0] = -math.inf


def any_module(module: nn.Module, name: str) -> bool:
    return True


def no_module(module: nn.Module, name: str) -> bool:
    return False


ERRORS: list[tuple[str, Callable[[Any], None], float, Any, type[Exception], str]] = [
    ("nan", put_nan, 0.5, None, ValueError, "layer '6' has 1 NaN or infinite"),
    ("infinite", put_infinity, 0.5, None, ValueError, "layer '6' has 1 NaN or infinite"),
    ("empty", nothing, 0.9999, None, ValueError, "keeps 0 of 1344 weights, but the 2 chosen layers"),
    ("no match", nothing, 0.5, no_module, ValueError, "no layer of Sequential was chosen"),
    ("no weight", nothing, 0.5, any_module, ValueError, "has no parameter 'weight'"),
    ("not callable", nothing, 0.5, "conv", TypeError, "filter must be callable"),
]


@pytest.mark.parametrize(("name", "spoil", "sparsity", "filter", "kind", "text"), ERRORS, ids=[e[0] for e in ERRORS])
def test_errors_leave_the_model_as_it_was(
    name: str, spoil: Callable[[Any], None], sparsity: float, filter: Any, kind: Any, text: str
) -> None:
    model = small_model()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(kind, match=text):
        prune_(model, MagnitudePruning(sparsity), filter)
    assert_same(model, before)
    with pytest.raises(kind, match=text):
        Pruner(model, MagnitudePruning(sparsity), CubicSchedule(0, 10), filter).begin()
    assert_same(model, before)


def test_wrong_kinds_of_argument() -> None:
    model = small_model()
    with pytest.raises(TypeError, match="config must be a pruning config"):
        prune_(model, 0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a pruning config"):
        prune_(model, MagnitudePruning)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        prune_([model], MagnitudePruning(0.9))  # type: ignore[arg-type]


def test_weights_that_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match="has no values"):
        prune_(nn.Conv2d(8, 8, 3, device="meta"), MagnitudePruning(0.9))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="remove parametrizations"):
        prune_(parametrized, MagnitudePruning(0.9), filter=lambda module, name: name == "")


# Schedule


def test_cubic_schedule_values() -> None:
    schedule = CubicSchedule(10, 110, every=10, initial=0.2)
    assert schedule.sparsity_at(9, 0.9) == 0.0
    assert schedule.sparsity_at(10, 0.9) == pytest.approx(0.2)
    assert schedule.sparsity_at(60, 0.9) == pytest.approx(0.9 - 0.7 * 0.5**3)
    assert schedule.sparsity_at(69, 0.9) == schedule.sparsity_at(60, 0.9)
    assert schedule.sparsity_at(110, 0.9) == 0.9
    assert schedule.sparsity_at(10**6, 0.9) == 0.9


def test_cubic_schedule_rises_and_ends_on_time() -> None:
    values = [CubicSchedule(0, 10, every=4).sparsity_at(step, 0.9) for step in range(12)]
    assert values == sorted(values)
    assert len(set(values)) == 4  # at 0, 4, 8 and, though 4 does not divide it, 10
    assert values[9] < values[10] == 0.9


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((5, 5), "begin_step < end_step"),
        ((-1, 5), "begin_step < end_step"),
        ((0, 5, 0), "every must be 1 or more"),
        ((0, 5.5), "end_step must be an int"),
        ((0, 5, 1, math.nan), r"initial must be in \[0, 1\)"),
    ],
)
def test_schedule_errors(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CubicSchedule(*arguments)


def test_schedule_above_the_target() -> None:
    with pytest.raises(ValueError, match=r"starts at sparsity 0\.6, above the config's 0\.5"):
        Pruner(small_model(), MagnitudePruning(0.5), CubicSchedule(0, 10, initial=0.6))


# The three calls


def training(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[Tensor, Tensor], None]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def update(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return optimizer, update


def masks_of(model: nn.Module) -> list[Tensor]:
    return [model.get_submodule(name).get_buffer("weight_mask").clone() for name in CHOSEN]


def test_three_calls_keep_zeros_and_reach_the_target() -> None:
    model = small_model()
    keys = list(model.state_dict())
    pruner = Pruner(model, MagnitudePruning(0.9), CubicSchedule(2, 12, every=3))
    _, update = training(model)
    pruner.begin()
    assert zeros(model) == [0, 0]
    masks = masks_of(model)
    for x, y in batches(16):
        update(x, y)
        pruner.step()
        new = masks_of(model)
        for name, old, mask in zip(CHOSEN, masks, new, strict=True):
            assert not (mask & ~old).any(), "a pruned weight came back"
            assert not weight(model, name)[~mask].any(), "a pruned weight is not zero"
        masks = new
    assert pruner.sparsity == 0.9
    before = model[2].weight.detach().clone()
    result = pruner.finish()
    assert torch.equal(model[2].weight, before)
    assert list(model.state_dict()) == keys
    assert not list(model[2].named_buffers())
    assert result == report(model)
    assert result.size - result.nnz == sum(zeros(model)) == round(0.9 * sum(SIZES))


def test_without_a_schedule_begin_prunes_at_once() -> None:
    model, other = small_model(), small_model()
    pruner = Pruner(model, MagnitudePruning(0.9))
    pruner.begin()
    prune_(other, MagnitudePruning(0.9))
    assert torch.equal(model[2].weight, other[2].weight)
    _, update = training(model)
    update(*batches(1)[0])
    assert zeros(model) != zeros(other)
    pruner.step()
    assert zeros(model) == zeros(other)


def test_masks_are_bool_buffers_and_not_trained() -> None:
    model = small_model()
    count = len(list(model.parameters()))
    Pruner(model, MagnitudePruning(0.9)).begin()
    mask = model[2].get_buffer("weight_mask")
    assert mask.dtype == torch.bool
    assert mask.shape == model[2].weight.shape
    assert len(list(model.parameters())) == count
    assert "2.weight_mask" in model.state_dict()


def test_resume_from_a_state_dict() -> None:
    schedule = CubicSchedule(0, 12, every=3)
    model, fresh = small_model(), small_model(seed=5)
    pruner = Pruner(model, MagnitudePruning(0.9), schedule)
    pruner.begin()
    optimizer, update = training(model)
    data = batches(14)
    for x, y in data[:7]:
        update(x, y)
        pruner.step()

    resumed = Pruner(fresh, MagnitudePruning(0.9), schedule)
    resumed.begin(step=pruner.steps)
    fresh.load_state_dict(snapshot(model))
    assert_same(fresh, snapshot(model))
    fresh_optimizer, fresh_update = training(fresh)
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in data[7:]:
        for step, owner in ((update, pruner), (fresh_update, resumed)):
            step(x, y)
            owner.step()
    assert_same(fresh, snapshot(model))
    assert pruner.finish() == resumed.finish()


def test_masks_survive_deepcopy_and_fold() -> None:
    model = small_model()
    keys = list(model.state_dict())
    pruner = Pruner(model, MagnitudePruning(0.9))
    pruner.begin()
    twin = copy.deepcopy(model)
    assert_same(twin, snapshot(model))
    fold_masks(twin)
    assert list(twin.state_dict()) == keys
    assert "2.weight_mask" in model.state_dict()
    assert report(twin) == pruner.finish()


def test_calls_in_the_wrong_order() -> None:
    pruner = Pruner(small_model(), MagnitudePruning(0.9))
    for call in (pruner.step, pruner.finish):
        with pytest.raises(RuntimeError, match=r"before begin\(\)"):
            call()
    pruner.begin()
    with pytest.raises(RuntimeError, match="already begun"):
        pruner.begin()


def test_finish_before_the_schedule_ends_warns() -> None:
    pruner = Pruner(small_model(), MagnitudePruning(0.9), CubicSchedule(0, 10))
    pruner.begin()
    pruner.step()
    with pytest.warns(UserWarning, match="step 1 of 10"):
        pruner.finish()


def test_nan_during_training_is_reported() -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.9), CubicSchedule(0, 10))
    pruner.begin()
    put_nan(model)
    with pytest.raises(ValueError, match="layer '6' has 1 NaN"):
        pruner.step()


# Reports


def test_report_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, -0.0, 2]]).view(2, 4, 1, 1))
        model[1].weight.fill_(1.0)
    result = report(model)
    assert [(x.name, x.shape, x.size, x.nnz, x.sparsity) for x in result.layers] == [
        ("0", (2, 4, 1, 1), 8, 2, 0.75),
        ("1", (2, 5, 1, 1), 10, 10, 0.0),
    ]
    assert (result.size, result.nnz) == (18, 12)
    assert result.sparsity == pytest.approx(1 / 3)
    assert "0      2x4x1x1        8         2    75.00%" in str(result)
    assert str(result).splitlines()[-1].split() == ["total", "18", "12", "33.33%", "72", "120"]
    first = result.layers[0]
    # CSR in float32: 2 values and columns of 4 bytes each, 3 row starts.
    assert (first.dense_bytes, first.sparse_bytes, first.dense_flops) == (32, 2 * 8 + 3 * 4, None)
    assert result.to_dict()["layers"][0]["shape"] == [2, 4, 1, 1]
    print_report(result)
    assert "33.33%" in capsys.readouterr().out


def test_report_counts_operations() -> None:
    model = small_model()
    prune_(model, MagnitudePruning(0.5, scope="layer"))
    result = report(model, example=torch.zeros(2, 3, 6, 6))
    # Two images of 6 x 6 pixels.
    assert [x.dense_flops for x in result.layers] == [2 * size * 72 for size in SIZES]
    assert [x.sparse_flops for x in result.layers] == [size * 72 for size in SIZES]
    assert str(result).splitlines()[0].split()[-4:] == ["dense", "FLOPs", "sparse", "FLOPs"]
    assert str(result).splitlines()[-1].split()[-2:] == [str(2 * sum(SIZES) * 72), str(sum(SIZES) * 72)]
    assert not model[2]._forward_hooks
    assert model.training


# The quickstart's model and files

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def fashion() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fashion", DATA / "fashion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_state(fashion: ModuleType, model: nn.Module, folder: Path, name: str) -> Path:
    path = folder / fashion.FILES[name]
    fashion.write_arrays(fashion.pack_state(model.state_dict()), path)
    return path


def test_fashion_model_is_traceable_and_small(fashion: ModuleType) -> None:
    model = fashion.fashion_resnet()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 696_042
    x = torch.from_numpy(fashion.normalize(np.full((2, 28, 28), 7, np.uint8)))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_fashion_weights_round_trip(fashion: ModuleType, tmp_path: Path, name: str) -> None:
    model = fashion.fashion_resnet()
    if name == "pruned":
        prune_(model, MagnitudePruning(0.9))
    path = write_state(fashion, model, tmp_path, name)
    assert_same(fashion.load_model(name, tmp_path), snapshot(model))
    assert (path.stat().st_size < 700_000) == (name == "pruned")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_fashion_files_missing_or_bad(fashion: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one of 'dense', 'pruned', got 'tiny'"):
        fashion.load_model("tiny")
    for load in (lambda: fashion.load_model("dense", tmp_path), lambda: fashion.load_images(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"make_fashion\.py"):
            load()
    (tmp_path / fashion.FILES["dense"]).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        fashion.load_model("dense", tmp_path)
    fashion.write_arrays({"a": np.zeros(3, np.float32)}, tmp_path / fashion.FILES["dense"])
    with pytest.raises(ValueError, match="does not hold the weights"):
        fashion.load_model("dense", tmp_path)
    arrays = {"a.values": np.ones(2, np.float32), "a.indices": np.array([0, 9], np.int32), "a.shape": np.array([3])}
    fashion.write_arrays(arrays, tmp_path / fashion.FILES["pruned"])
    with pytest.raises(ValueError, match="ascending index below 3"):
        fashion.load_model("pruned", tmp_path)


def test_fashion_images_round_trip(fashion: ModuleType, tmp_path: Path) -> None:
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    fashion.write_arrays({"images": images, "labels": np.array([3, 9], np.uint8)}, tmp_path / fashion.IMAGES_FILE)
    got, labels = fashion.load_images(tmp_path)
    assert np.array_equal(got, images)
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 9]
    fashion.write_arrays({"images": images, "labels": np.array([3, 10], np.uint8)}, tmp_path / fashion.IMAGES_FILE)
    with pytest.raises(ValueError, match="labels must be less than 10, got 10"):
        fashion.load_images(tmp_path)


def test_normalize(fashion: ModuleType) -> None:
    images = np.zeros((1, 28, 28), np.uint8)
    images[0, 0, 0] = 255
    x = fashion.normalize(images)
    assert x.dtype == np.float32
    assert x.shape == (1, 1, 28, 28)
    assert x[0, 0, 0, 0] == pytest.approx((1 - 0.2860) / 0.3530)
    assert x[0, 0, 0, 1] == pytest.approx(-0.2860 / 0.3530)
    with pytest.raises(ValueError, match="images must be uint8"):
        fashion.normalize(x)


def idx(*shape: int, magic: bytes = b"\0\0\x08", extra: int = 0) -> bytes:
    head = magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return gzip.compress(head + bytes(range(math.prod(shape) + extra)))


def test_read_idx(fashion: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(idx(2, 3, 4))
    assert np.array_equal(fashion.read_idx(path), np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    whole = idx(2, 3, 4)
    bad = {
        "magic 000008, got 00000d02": idx(2, 3, magic=b"\0\0\x0d"),
        r"must hold 6 bytes for shape \(2, 3\), got 7": idx(2, 3, extra=1),
        r"must hold 6 bytes for shape \(2, 3\), got 5": idx(2, 3, extra=-1),
        "not a whole gzip file": whole[:-9],
        "not a whole gzip file ": b"plain",
        "not an idx file": gzip.compress(b"\0\0"),
    }
    for text, raw in bad.items():
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=text):
            fashion.read_idx(path)
    with pytest.raises(FileNotFoundError, match="four Fashion-MNIST files"):
        fashion.read_idx(tmp_path / "none.gz")


def test_pruning_does_not_need_rich() -> None:
    code = "import sys; sys.modules['rich'] = None; import numbasparse.pruning as p; print(p.prune_.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=DATA.parent)
    assert done.stdout.strip() == "prune_", done.stderr
