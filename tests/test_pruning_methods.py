"""Pruning: scopes, vectors, first-order and second-order criteria, AC/DC, compiled and captured steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import (
    CHOSEN,
    SIZES,
    assert_same,
    batches,
    one_thread,  # noqa: F401
    put_nan,
    small_model,
    snapshot,
    weight,
    zeros,
)
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.pruning import (
    ACDCSchedule,
    CubicSchedule,
    FirstOrderPruning,
    LayerwisePruning,
    MagnitudePruning,
    OBSPruning,
    Pruner,
    fold_masks,
    prune_,
    prune_with_data_,
    recalibrate_batch_norm_,
)
from numbasparse.pruning.layers import Layer
from numbasparse.pruning.obs import collect_hessians, least_squares, unfold_inputs
from numbasparse.pruning.vectors import VectorGrid


def every_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1


def densities(model: nn.Module, config: Any, filter: Any = every_layer) -> dict[str, float]:
    return {layer.name: 1.0 - layer.sparsity for layer in prune_(model, config, filter).layers}


# Scopes


@pytest.mark.parametrize("scope", ["global", "layer", "uniform+", "erk", "lamp"])
@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
def test_every_scope_meets_the_total(scope: Any, vector: int) -> None:
    model = small_model()
    result = prune_(model, MagnitudePruning(0.7, scope, vector))
    slack = len(SIZES) * vector  # a vector per layer
    assert abs(result.nnz - 0.3 * sum(SIZES)) <= slack + 1
    if vector == 1:
        assert abs(result.nnz - 0.3 * sum(SIZES)) <= 1


def test_uniform_plus() -> None:
    model = small_model()
    result = densities(model, MagnitudePruning(0.75, "uniform+"))
    # "0" is the first convolution: dense. "9" is the last layer: 20 % of 48, rounded. "2" and "6" bear the rest.
    assert result["0"] == 1.0
    size = 3 * 8 * 9 + sum(SIZES) + 48
    rest = (0.25 * size - 216 - 0.2 * 48) / sum(SIZES)
    assert rest < 0.2
    assert result["9"] == pytest.approx(0.2, abs=1 / 48)
    assert result["2"] == pytest.approx(rest, abs=2e-3)
    assert result["6"] == pytest.approx(rest, abs=1e-2)
    # Where the same sparsity for all is below 80 %, the last layer has it too.
    mild = densities(small_model(), MagnitudePruning(0.5, "uniform+"))
    assert mild["9"] == pytest.approx(mild["2"], abs=0.02)
    # By the default filter neither end is chosen, and all are alike.
    plain = densities(small_model(), MagnitudePruning(0.75, "uniform+"), None)
    assert plain == pytest.approx({"2": 0.25, "6": 0.25})


def test_uniform_plus_that_cannot_be_met() -> None:
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'uniform\+' cannot reach sparsity 0.9"):
        prune_(model, MagnitudePruning(0.9, "uniform+"), every_layer)
    assert_same(model, before)


def test_erk_follows_the_dimensions() -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 4, 1))
    result = densities(model, MagnitudePruning(0.8, "erk"))
    # Raw densities of the first two, (sum of dimensions) / (product); the last is small enough to stay dense.
    raw = [(8 + 32 + 6) / (8 * 32 * 9), (32 + 64 + 6) / (32 * 64 * 9)]
    assert result["2"] == 1.0
    assert result["0"] / result["1"] == pytest.approx(raw[0] / raw[1], rel=0.01)
    kept = sum(density * m.weight.numel() for density, m in zip(result.values(), model, strict=True))
    assert kept == pytest.approx(0.2 * sum(m.weight.numel() for m in model), abs=0.6)


def test_lamp_scores_by_hand() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 1, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.75, -3.0, 4.0]).view(1, 4, 1, 1))
        model[1].weight.copy_(torch.tensor([0.01, 0.01, -0.01, 0.01]).view(1, 4, 1, 1))
    # Squares over the sums of squares as large: 0.03, 0.23, 0.36, 1 and, of equal ones, 0.25, 0.33, 0.5, 1. With
    # magnitudes instead of squares 2.75 would score 0.28 and stay.
    prune_(model, MagnitudePruning(0.25, "lamp"))
    assert model[0].weight.flatten().tolist() == [0.0, 0.0, -3.0, 4.0]
    assert model[1].weight.count_nonzero() == 4


def test_lamp_of_a_layer_of_zeros() -> None:
    model = small_model()
    nn.init.zeros_(model[6].weight)
    prune_(model, MagnitudePruning(0.5, "lamp"))
    assert zeros(model)[0] == sum(SIZES) // 2 - SIZES[1] + 1


def test_layerwise_sparsities() -> None:
    model = small_model()
    prune_(model, LayerwisePruning({"2": 0.9, "6": 0.5}))
    assert zeros(model) == [round(0.9 * SIZES[0]), SIZES[1] // 2]
    model = small_model()
    pruner = Pruner(model, LayerwisePruning({"6": 0.5}), CubicSchedule(0, 4))
    pruner.begin()
    seen = []
    for _ in range(4):
        pruner.step()
        seen.append(zeros(model))
    pruner.finish()
    assert [x[0] for x in seen] == [0] * 4
    assert [x[1] for x in seen] == sorted(x[1] for x in seen)
    assert seen[-1][1] == SIZES[1] // 2
    with pytest.raises(ValueError, match="names '7', but the chosen layers are '2', '6'"):
        prune_(small_model(), LayerwisePruning({"7": 0.5}))
    with pytest.raises(ValueError, match=r"sparsity of '2' must be in \[0, 1\)"):
        LayerwisePruning({"2": 1.0})
    with pytest.raises(ValueError, match="names no layer"):
        LayerwisePruning({})


# Vectors


@pytest.mark.parametrize("bad", [0, 3, 32, -1, True, 2.5, None])
def test_unknown_granularity(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"vector must be one of 1, 2, 4, 8, 16"):
        MagnitudePruning(0.5, vector=bad)


def assert_vectors(pruned: Tensor, groups: int, vector: int) -> None:
    """Assert that runs of rows within groups live or die together."""
    for rows in pruned.flatten(1).tensor_split(groups):
        for run in rows.split(vector):
            alive = run != 0
            assert torch.equal(alive.all(0), alive.any(0))


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 19),
    channels=st.integers(1, 4),
    kernel=st.integers(1, 3),
    vector=st.sampled_from([1, 2, 4, 8, 16]),
    sparsity=st.floats(0.0, 0.95),
    scope=st.sampled_from(["global", "layer", "lamp", "erk"]),
)
def test_vectors_live_or_die_together(
    groups: int, rows: int, channels: int, kernel: int, vector: int, sparsity: float, scope: Any
) -> None:
    torch.manual_seed(rows)
    layer = nn.Conv2d(groups * channels, groups * rows, kernel, groups=groups)
    old = layer.weight.detach().clone()
    size, fullest = old.numel(), min(vector, rows)
    if size - round(sparsity * size) < fullest:
        return
    result = prune_(layer, MagnitudePruning(sparsity, scope, vector), filter=lambda module, name: True)
    new = layer.weight.detach()
    assert_vectors(new, groups, vector)
    assert torch.equal(new[new != 0], old[new != 0])
    assert 0 <= size - round(sparsity * size) - result.nnz < vector
    # No vector that was cut has a larger mean than one that was kept, but for the last of another size.
    grid = VectorGrid(tuple(old.shape), groups, vector)
    means, alive = grid.mean(old.abs()), ~grid.all(new == 0)
    if alive.any() and not alive.all():
        assert means[~alive].max() <= means[alive].min() + 1e-6


def test_a_vector_scores_the_mean_of_its_weights() -> None:
    layer = nn.Conv2d(2, 3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 2.0], [-4.0, 2.0], [1.0, 3.0]]).view(3, 2, 1, 1))
    # Means: the run (0, 1) has 4 and 2, the short run (2) has 1 and 3. Three of six weights may stay. By sums the 4
    # of the second column would go before the 3, and be too large for what is left.
    prune_(layer, MagnitudePruning(0.5, vector=2), filter=lambda module, name: True)
    assert layer.weight.flatten(1).tolist() == [[4.0, 0.0], [-4.0, 0.0], [0.0, 3.0]]


def test_a_finer_mask_first_and_a_coarser_one_on_top() -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.5, vector=1))
    pruner.begin()
    held = model[2].weight_mask.clone()
    second = Pruner(model, MagnitudePruning(0.7, vector=4))
    second.begin()
    assert not (model[2].weight_mask & ~held).any()


def test_first_vector_of_every_layer_is_needed() -> None:
    with pytest.raises(ValueError, match=r"need at least one vector each \(28 weights\)"):
        prune_(small_model(), MagnitudePruning(0.985, vector=16))


def most_of_four(weight: Tensor) -> int:
    """Return the most living weights of four neighbouring input channels at one place of the kernel."""
    k, c = weight.shape[:2]
    living = F.pad((weight != 0).reshape(k, c, -1).int(), (0, 0, 0, -c % 4))
    return int(living.unflatten(1, (-1, 4)).sum(2).max())


@pytest.mark.parametrize("scope", ["global", "layer", "lamp"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("vector", [1, 4])
def test_two_of_four(scope: Any, sparsity: float, vector: int) -> None:
    model, plain = small_model(), small_model()
    prune_(model, MagnitudePruning(sparsity, scope, vector, two_of_four=True))
    prune_(plain, MagnitudePruning(sparsity, scope, vector))
    assert sum(zeros(model)) == pytest.approx(sum(zeros(plain)), abs=vector)
    for name in CHOSEN:
        assert most_of_four(weight(model, name)) <= 2
    if vector == 1 and sparsity <= 0.8:
        assert most_of_four(weight(plain, "2")) > 2


def test_two_of_four_takes_the_largest_that_it_may() -> None:
    model = nn.Sequential(nn.Conv2d(6, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([4.0, -6.0, 5.0, 3.0, 0.5, -1.0])[None, :, None, None]
    prune_(model, MagnitudePruning(0.5, "layer", two_of_four=True), every_layer)
    assert model[0].weight.flatten().tolist() == [0.0, -6.0, 5.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("scope", ["erk", "uniform+"])
def test_two_of_four_where_a_scope_keeps_more(scope: Any) -> None:
    """Small layers would stay dense: they keep half, and the model becomes sparser."""
    model = small_model()
    prune_(model, MagnitudePruning(0.6, scope, two_of_four=True))
    assert sum(zeros(model)) >= round(0.6 * sum(SIZES))
    assert max(most_of_four(weight(model, name)) for name in CHOSEN) <= 2


@pytest.mark.parametrize("acdc", [False, True])
def test_two_of_four_is_decided_at_the_end_of_a_schedule(acdc: bool) -> None:
    model = small_model()
    schedule = ACDCSchedule(0, 8, 2, 2) if acdc else CubicSchedule(0, 6, every=1)
    pruner = Pruner(model, MagnitudePruning(0.8, two_of_four=True), schedule)
    pruner.begin()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    most = []
    for x, y in batches() * 3:
        F.cross_entropy(model(x), y).backward()
        sgd.step()
        sgd.zero_grad()
        pruner.step()
        most.append(max(most_of_four(weight(model, name)) for name in CHOSEN))
    pruner.finish()
    assert max(most) > 2
    assert max(most_of_four(weight(model, name)) for name in CHOSEN) <= 2
    assert 0.8 * sum(SIZES) - 1 < sum(zeros(model)) < 0.83 * sum(SIZES)


def test_two_of_four_by_gradients() -> None:
    model = small_model()
    prune_with_data_(model, batches(), FirstOrderPruning(0.8, two_of_four=True))
    assert max(most_of_four(weight(model, name)) for name in CHOSEN) <= 2


def test_two_of_four_is_no_option_of_obs() -> None:
    with pytest.raises(ValueError, match="OBSPruning has no two_of_four"):
        OBSPruning(0.5, two_of_four=True)
    with pytest.raises(ValueError, match="two_of_four must be True or False, got 2"):
        MagnitudePruning(0.5, two_of_four=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keeps half of the weights at most: sparsity 0\.4 is"):
        MagnitudePruning(0.4, two_of_four=True)


# Data


def regression() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, stride=2, padding="valid"),
        nn.ReLU(),
        nn.Conv2d(20, 12, (3, 1), padding=(1, 0), groups=2, dilation=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(12, 10, 1),
    )


def images(count: int = 2, each: int = 12) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(each, 3, 11, 10, generator=random) for _ in range(count)]


def output_error(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().mean()) for x in data)


@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("scope", ["layer", "erk", "lamp", "uniform+", "global"])
@pytest.mark.parametrize(("sparsity", "sequential"), [(0.5, True), (0.5, False), (0.8, False)])
def test_obs_beats_magnitude(scope: Any, vector: int, sparsity: float, sequential: bool) -> None:
    dense, plain = regression(), regression()
    prune_(plain, MagnitudePruning(sparsity, scope, vector))
    model = regression()
    model.train()
    before = snapshot(model)
    result = prune_with_data_(model, images(), OBSPruning(sparsity, scope, vector, block=16, sequential=sequential))
    assert result.sparsity == pytest.approx(sparsity, abs=0.02)
    share = 0.75 if scope != "global" else 0.9
    assert output_error(model, dense, images()) < share * output_error(plain, dense, images())
    assert_vectors(model[4].weight.detach(), 2, vector)
    assert_vectors(model[2].weight.detach(), 1, vector)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key.endswith("bias"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def layer_of(module: Any) -> Layer:
    return Layer("", module, False, False)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2),
    nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"),
    nn.Linear(7, 5),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_unfolded_inputs_give_the_layers_output(module: Any) -> None:
    module = copy.deepcopy(module).double()
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
    columns = unfold_inputs(module, x)
    groups = getattr(module, "groups", 1)
    matrix = module.weight.detach().reshape(groups, module.weight.shape[0] // groups, -1)
    expected = module(x) - module.bias.view(1, -1, 1, 1) if isinstance(module, nn.Conv2d) else module(x) - module.bias
    got = matrix @ columns
    if isinstance(module, nn.Conv2d):
        expected = expected.transpose(0, 1).reshape(groups, -1, got.shape[2])
    else:
        expected = expected.reshape(-1, 5).T[None]
    torch.testing.assert_close(got, expected.detach())


def test_hessians_do_not_depend_on_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    x = torch.randn(6, 4, 5, 5)
    layers = {"": layer_of(module)}
    whole = collect_hessians(module, layers, [x])[""]
    columns = unfold_inputs(module, x).double()
    torch.testing.assert_close(whole, columns @ columns.mT / 6, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("numbasparse.pruning.obs._CHUNK_BYTES", 1)
    parts = collect_hessians(module, layers, [x[:1], (x[1:], None)])[""]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


def test_least_squares_is_the_best_for_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 40, generator=random, dtype=torch.float64)
    dense = torch.randn(2, 5, 9, generator=random, dtype=torch.float64)
    mask = torch.rand(2, 5, 9, generator=random) < 0.4
    mask[0, 1] = False
    mask[1, 2] = True
    got = least_squares(dense, x @ x.mT, mask)
    for group in range(2):
        for row in range(5):
            columns = mask[group, row]
            assert not got[group, row, ~columns].any()
            best = torch.linalg.lstsq(x[group, columns].T, x[group].T @ dense[group, row]).solution
            torch.testing.assert_close(got[group, row, columns], best)
    assert torch.allclose(got[1, 2], dense[1, 2])
    monkeypatch.setattr("numbasparse.pruning.obs._CHUNK_BYTES", 1)
    torch.testing.assert_close(least_squares(dense, x @ x.mT, mask), got)


def test_obs_finds_the_best_single_weight_to_keep() -> None:
    """Against all masks of a small layer: the error is near the best there is."""
    torch.manual_seed(4)
    mix = torch.randn(6, 6)
    x = torch.randn(64, 6) @ mix
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        module = nn.Linear(6, 1, bias=False)
        dense = copy.deepcopy(module)
        prune_with_data_(module, [x], OBSPruning(0.5, "layer", damping=1e-6), filter=lambda module, name: True)
        target = dense(x)[:, 0].detach()
        best = math.inf
        for keep in torch.combinations(torch.arange(6), 3):
            solution = torch.linalg.lstsq(x[:, keep], target).solution
            best = min(best, float((x[:, keep] @ solution - target).square().sum()))
        errors.append(float((module(x)[:, 0] - target).square().sum().detach()) / best)
        plain = copy.deepcopy(dense)
        prune_(plain, MagnitudePruning(0.5), filter=lambda module, name: True)
        assert errors[-1] * best <= float((plain(x)[:, 0] - target).square().sum().detach()) * (1 + 1e-6)
    assert sum(errors) / len(errors) < 3.0
    assert min(errors) < 1.001


@pytest.mark.parametrize("block", [1, 2, 128])
def test_obs_keeps_one_of_two_equal_inputs(block: int) -> None:
    """Each alone could go for nothing; when the first went, the second is worth much."""
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    x[:, 4] = x[:, 0]
    module = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.3, -0.4, 0.5, 0.9, 0.2]]))
    prune_with_data_(module, [x], OBSPruning(0.5, block=block, damping=1e-6), filter=lambda module, name: True)
    pair = module.weight.detach()[0, [0, 4]]
    assert float(pair.sum()) == pytest.approx(1.9, abs=0.15)
    assert int((pair != 0).sum()) == 1
    assert module.weight.detach()[0, 3] != 0


def test_obs_with_one_image_warns_and_works() -> None:
    model, dense = regression(), regression()
    with pytest.warns(UserWarning, match="saw .* input vectors of length"):
        prune_with_data_(model, [images()[0][:1]], OBSPruning(0.5))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert output_error(model, dense, [images()[0][:1]]) < output_error_of_magnitude([images()[0][:1]])


def output_error_of_magnitude(data: list[Tensor]) -> float:
    plain = regression()
    prune_(plain, MagnitudePruning(0.5, "layer"))
    return output_error(plain, regression(), data)


def test_obs_with_inputs_that_are_always_zero() -> None:
    model = regression()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = -1.0  # four dead channels after the activation
    prune_with_data_(model, images(), OBSPruning(0.8))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model[2].weight[:, :4].any(), "weights on dead inputs go first"


def test_first_order_scores_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 1, bias=False)
    data = [(torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3)) for _ in range(3)]
    scores = torch.zeros_like(layer.weight)
    for x, y in data:
        (gradient,) = torch.autograd.grad(F.mse_loss(layer(x), y), layer.weight)
        scores += (gradient * layer.weight.detach()).abs()
    kept = scores.flatten().argsort(descending=True)[:6].sort().values
    prune_with_data_(layer, iter(data), FirstOrderPruning(0.5), filter=lambda m, n: True, loss=F.mse_loss)
    assert torch.equal(layer.weight.detach().flatten().nonzero().flatten(), kept)
    assert layer.weight.grad is None


@pytest.mark.parametrize("scope", ["global", "layer", "lamp", "erk"])
@pytest.mark.parametrize("vector", [1, 8])
def test_first_order_of_a_classifier(scope: Any, vector: int) -> None:
    model = small_model()
    result = prune_with_data_(model, batches(), FirstOrderPruning(0.7, scope, vector))
    assert result.sparsity == pytest.approx(0.7, abs=0.02)
    assert model.training


def put_infinite_image(data: list[Any]) -> None:
    data[1][0][0, 0, 0, 0] = math.inf


DATA_ERRORS: list[tuple[str, Any, Any, Any, str]] = [
    ("obs none", OBSPruning(0.5), [], None, "no batches|no images"),
    ("first none", FirstOrderPruning(0.5), [], None, "no batches"),
    ("obs infinite", OBSPruning(0.5), "infinite", None, "calibration inputs of layer '2' are NaN or infinite"),
    ("obs infinite in turn", OBSPruning(0.5, sequential=True), "infinite", None, "are NaN or infinite"),
    ("first infinite", FirstOrderPruning(0.5), "infinite", None, "gradients of layer '2' are NaN or infinite"),
    ("first plain", FirstOrderPruning(0.5), [torch.zeros(1, 3, 6, 6)], None, r"needs batches of \(inputs, targets\)"),
    ("no match", OBSPruning(0.5), batches(), lambda m, n: False, "no layer of Sequential was chosen"),
    ("kind", OBSPruning(0.5), batches(), lambda m, n: n == "3", "knows nn.Conv2d and nn.Linear"),
    ("every weight", OBSPruning(0.9999, "erk"), batches(), None, "need at least one each"),
]


@pytest.mark.parametrize(("name", "config", "data", "filter", "text"), DATA_ERRORS, ids=[e[0] for e in DATA_ERRORS])
def test_errors_with_data_leave_the_model_as_it_was(name: str, config: Any, data: Any, filter: Any, text: str) -> None:
    if data == "infinite":
        data = batches()
        put_infinite_image(data)
    model = small_model()
    model[3].eval()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=text):
        prune_with_data_(model, data, config, filter)
    assert_same(model, before)
    assert model.training
    assert not model[3].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_configs_in_the_wrong_place() -> None:
    with pytest.raises(TypeError, match=r"OBSPruning needs data: call prune_with_data_"):
        prune_(small_model(), OBSPruning(0.5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"for those that need none call prune_"):
        prune_with_data_(small_model(), batches(), MagnitudePruning(0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping must be above 0"):
        OBSPruning(0.5, damping=0.0)
    with pytest.raises(ValueError, match="block must be"):
        OBSPruning(0.5, block=0)
    with pytest.raises(ValueError, match="not positive definite in float64: raise damping"):
        prune_with_data_(regression(), [images()[0][:1]], OBSPruning(0.5, damping=1e-30))
    model = small_model()
    Pruner(model, MagnitudePruning(0.5)).begin()
    with pytest.raises(ValueError, match=r"layer '2' is being pruned: call pruner\.finish"):
        prune_with_data_(model, batches(), OBSPruning(0.5))
    model = small_model()
    put_nan(model)
    with pytest.raises(ValueError, match="layer '6' has 1 NaN"):
        prune_with_data_(model, batches(), OBSPruning(0.5))


def test_a_layer_that_never_runs() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).mean((2, 3))

    data = [(torch.randn(8, 4, 6, 6), torch.zeros(8, dtype=torch.int64))]
    for config in (OBSPruning(0.5), OBSPruning(0.5, sequential=True)):
        with pytest.raises(ValueError, match="layer 'idle' is not used"):
            prune_with_data_(Idle(), data, config)
    with pytest.raises(ValueError, match="does not depend on layer 'idle'"):
        prune_with_data_(Idle(), data, FirstOrderPruning(0.5))


def test_recalibrated_batch_norm() -> None:
    model = small_model()
    data = [x for x, _ in batches()]
    recalibrate_batch_norm_(model, data)
    with torch.no_grad():
        seen = torch.stack([model[2](model[1](model[0](x))).mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(model[3].running_mean, seen)
    assert model[3].momentum == 0.1
    assert model.training
    before = snapshot(model)
    with pytest.raises(ValueError, match="no batches"):
        recalibrate_batch_norm_(model, [])
    assert_same(model, before)


# AC/DC


def test_acdc_phases() -> None:
    schedule = ACDCSchedule(4, 20, compressed_steps=3, dense_steps=2)
    phases = [schedule.sparsity_at(step, 0.9) for step in range(25)]
    assert phases == [0.0] * 4 + ([0.9] * 3 + [0.0] * 2) * 3 + [0.9] * 6
    for bad, text in (
        ((5, 5, 1, 1), "begin_step < end_step"),
        ((0, 5, 0, 1), "1 or more optimizer steps"),
        ((0, 5, 1, 1.5), "dense_steps must be an int"),
    ):
        with pytest.raises(ValueError, match=text):
            ACDCSchedule(*bad)  # type: ignore[arg-type]


def test_acdc_frees_and_compresses() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = ACDCSchedule(2, 12, compressed_steps=3, dense_steps=2)
    pruner = Pruner(model, MagnitudePruning(0.8, "layer"), schedule, optimizer=optimizer)
    pruner.begin()
    masks = []
    for step, (x, y) in enumerate(batches(15), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if schedule.sparsity_at(step - 1, 0.8) == 0.0 and step > 5:
            with torch.no_grad():  # these few gradients are small: move the freed weights farther
                model[2].weight.add_(torch.randn(model[2].weight.shape))
        before = None if not masks else masks[-1]
        pruner.step()
        mask = model[2].weight_mask.clone()
        masks.append(mask)
        if schedule.sparsity_at(step, 0.8) == 0.0:
            assert mask.all()
            momentum = optimizer.state[model[2].weight]["momentum_buffer"]
            if before is not None and not before.all():
                assert not momentum[~before].any(), "momentum of weights that come back"
                assert not weight(model, "2")[~before].any()
                assert momentum[before].any()
        else:
            assert zeros(model)[0] == round(0.8 * SIZES[0])
    assert not torch.equal(masks[3], masks[-1]), "weights that came back may live"
    assert torch.equal(masks[12], masks[14])
    assert pruner.finish().sparsity == pytest.approx(0.8, abs=1e-3)


# Compiled and captured steps


def test_masks_survive_compile_and_a_compiled_step() -> None:
    model, plain = small_model(), small_model()
    compiled: Any = torch.compile(model, backend="eager")
    pruner = Pruner(compiled, MagnitudePruning(0.8), CubicSchedule(0, 6, every=2))
    other = Pruner(plain, MagnitudePruning(0.8), CubicSchedule(0, 6, every=2))
    for owner in (pruner, other):
        owner.begin()

    def update(network: nn.Module, owner: Pruner) -> Any:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def go(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        return go

    tail = torch.compile(pruner.apply, backend="eager", fullgraph=True)
    first, second = update(compiled, pruner), update(plain, other)
    for x, y in batches(8):
        first(x, y)
        tail()
        pruner.step(apply=False)
        second(x, y)
        other.step()
        assert_same(model, snapshot(plain))
    assert "2.weight_mask" in model.state_dict()
    twin = copy.deepcopy(model)
    fold_masks(twin)
    assert pruner.finish().sparsity == other.finish().sparsity
    assert_same(twin, snapshot(model))
    x = batches(1)[0][0]
    assert torch.equal(compiled.eval()(x), plain.eval()(x))


def test_new_masks_lie_in_the_same_memory() -> None:
    """A CUDA graph captured between two updates must see the second."""
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.8), CubicSchedule(0, 6, every=2))
    pruner.begin()
    pointers = [f.data_ptr() for f in pruner._masks._factors]
    assert len(pointers) == len(CHOSEN)
    for _ in range(6):
        pruner.step()
    assert [f.data_ptr() for f in pruner._masks._factors] == pointers


def test_a_step_between_updates_does_not_synchronize(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = Pruner(small_model(), MagnitudePruning(0.8), CubicSchedule(0, 100, every=50))
    pruner.begin()

    def forbidden(*args: Any) -> Any:
        raise AssertionError("read a value")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, forbidden)
    pruner.step()


def test_a_moved_model_and_a_lost_mask() -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.5))
    pruner.begin()
    model.double()
    with torch.no_grad():
        model[2].weight.add_(1.0)
    pruner.step()
    assert zeros(model)[0] > 0
    del model[2].weight_mask
    with pytest.raises(RuntimeError, match="the mask of layer '2' is gone"):
        pruner.step()


def test_forgotten_steps_are_seen() -> None:
    model = small_model()
    pruner = Pruner(model, MagnitudePruning(0.5))
    pruner.begin()
    pruner.check_zeros()
    with torch.no_grad():
        model[6].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"layer '6' are not zero: call pruner\.step"):
        pruner.check_zeros()
