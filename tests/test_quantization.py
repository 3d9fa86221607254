"""Quantization: levels, exact k-means, Huffman sizes, models at once and in training, activations, the command."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbasparse import SparseWeight, load_weights
from numbasparse.levels import CodebookLevels, LinearLevels, pack_codes, short_scale, unpack_codes
from numbasparse.quantization import CodebookQuantization, LinearQuantization, huffman_nbytes
from numbasparse.quantization.huffman import code_lengths, gap_symbols
from numbasparse.quantization.kmeans import kmeans

F32 = np.float32
CONFIGS: list[Any] = [
    LinearQuantization(8),
    LinearQuantization(2, range="mse"),
    LinearQuantization(3, granularity="channel", range="percentile", percentile=90),
    LinearQuantization(4, symmetric=False),
    LinearQuantization(5, symmetric=False, granularity="channel", range="mse"),
    LinearQuantization(8, symmetric=False, granularity="channel"),
    LinearQuantization(6, symmetric=False, range="percentile", percentile=99),
    CodebookQuantization(2),
    CodebookQuantization(4),
    CodebookQuantization(8),
    CodebookQuantization(3, "channel_group", 3),
    CodebookQuantization(2, "channel_group", 100),
]


def dense_weight(seed: int, shape: tuple[int, ...] = (7, 5, 3, 3), density: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(F32)
    weight[rng.random(shape) >= density] = 0
    return weight


# --- levels ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packed_codes(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    stream = int.from_bytes(packed.tobytes(), "little")
    assert [stream >> (bits * i) & ((1 << bits) - 1) for i in range(count)] == codes.tolist()
    np.testing.assert_array_equal(unpack_codes(packed, bits, count), codes)


@given(st.floats(2.0**-120, 2.0**119, width=32), st.integers(-255, 255))
def test_short_scales_make_exact_levels(step: float, number: int) -> None:
    scale = short_scale(np.array([step]))[0]
    assert scale <= step
    assert scale > step * (1 - 2**-15)
    assert float(scale * F32(number)) == float(scale) * number


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: LinearLevels(9, np.ones(1, F32), np.zeros(1, np.uint8)),
            ValueError,
            "bits must be an int from 2 to 8",
        ),
        (lambda: LinearLevels(2, np.ones(1, F32), np.full(1, 4, np.uint8)), ValueError, "zero must be codes of 2 bits"),
        (lambda: LinearLevels(2, np.ones(1), np.zeros(1, np.uint8)), TypeError, "scale must be an ndarray of float32"),
        (lambda: LinearLevels(2, np.full(1, np.nan, F32), np.zeros(1, np.uint8)), ValueError, "finite"),
        (lambda: LinearLevels(2, np.ones(3, F32), np.zeros(2, np.uint8)), ValueError, "zero must have 1 value or one"),
        (lambda: CodebookLevels(2, np.ones((1, 5), F32)), ValueError, r"entries must have shape \(T, 4\)"),
        (lambda: CodebookLevels(2, np.full((1, 4), np.inf, F32)), ValueError, "entries must be finite"),
        (lambda: CodebookLevels(2, np.ones((1, 4), F32), -1), ValueError, "channels_per_table"),
    ],
)
def test_wrong_levels(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


# --- k-means ---------------------------------------------------------------------------------------------------


def squared_error(values: np.ndarray, centres: np.ndarray) -> float:
    return float((np.abs(np.asarray(values, np.float64)[:, None] - centres).min(axis=1) ** 2).sum())


def optimum(values: np.ndarray, k: int) -> float:
    """Least squared error over every way to cut the sorted values into at most k runs."""
    ordered = np.sort(values.astype(np.float64))
    cuts = itertools.combinations(range(1, len(ordered)), min(k, len(ordered)) - 1)
    return min(sum(((run - run.mean()) ** 2).sum() for run in np.split(ordered, cut)) for cut in cuts)


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(-4, 4), st.floats(-100, 100, width=32)), min_size=1, max_size=9), st.integers(1, 5)
)
def test_kmeans_is_optimal(values: list[float], k: int) -> None:
    array = np.array(values, F32)
    centres = kmeans(array, k)
    assert centres.dtype == F32
    assert (np.diff(centres) > 0).all()
    assert len(centres) == min(k, len(np.unique(array)))
    # Centres are rounded to float32.
    assert squared_error(array, centres) <= optimum(array, k) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize(("n", "k"), [(500, 4), (3000, 16), (3000, 256)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kmeans_against_the_package(n: int, k: int, offset: float) -> None:
    kmeans1d = pytest.importorskip("kmeans1d")
    values = np.random.default_rng(n + k).standard_normal(n) ** 3 + offset
    theirs = squared_error(values, np.array(kmeans1d.cluster(values, k).centroids))
    assert squared_error(values, kmeans(values, k)) <= theirs * (1 + 1e-6) + n * (offset * 1e-7) ** 2


def test_kmeans_of_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too many values cuts lie on a fine grid: nearly optimal."""
    values = np.random.default_rng(0).standard_normal(5000)
    best = squared_error(values, kmeans(values, 8))
    module = __import__("importlib").import_module("numbasparse.quantization.kmeans")
    monkeypatch.setattr(module, "_MOST_PLACES", 8 * 1000)
    near = squared_error(values, kmeans(values, 8))
    assert best < near <= best * 1.001


# --- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_become_levels(config: Any) -> None:
    for seed, density in ((0, 0.3), (1, 1.0), (2, 0.02)):
        dense = dense_weight(seed, density=density)
        dense[2] = 0
        weight = SparseWeight.from_dense(dense, quantization=config)
        decoded = weight.to_dense()
        assert (decoded[dense == 0] == 0).all()
        assert weight.levels is not None
        assert weight.codes is not None
        assert weight.codebook is not None
        assert weight.levels.bits == config.bits
        assert weight.codes.dtype == np.uint8
        assert weight.codebook.shape in ((1, 1 << config.bits), (7, 1 << config.bits))
        rows = np.repeat(np.arange(7), np.diff(weight.indptr)) if len(weight.codebook) > 1 else 0
        np.testing.assert_array_equal(weight.codebook[rows, weight.codes], weight.data)
        # What lies on levels stays there: from the model's float32 weights come the same values.
        again = SparseWeight.from_dense(decoded, quantization=config)
        np.testing.assert_array_equal(again.to_dense(), decoded)
        assert again.quantized(config) == again


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.booleans(), st.sampled_from(["tensor", "channel"]), st.integers(0, 2**32 - 1))
def test_linear_error_is_half_a_step(bits: int, symmetric: bool, granularity: Any, seed: int) -> None:
    dense = dense_weight(seed) * F32(10.0 ** np.random.default_rng(seed).integers(-8, 8))
    weight = SparseWeight.from_dense(dense, quantization=LinearQuantization(bits, symmetric, granularity))
    assert isinstance(weight.levels, LinearLevels)
    scale = np.broadcast_to(weight.levels.scale, 7)[:, None, None, None]
    # The step is cut to 16 bits, which shortens the range by 2**-15 of itself.
    step = scale * (0.5001 + 2.0 ** (bits - 15))
    assert (np.abs(weight.to_dense() - dense) <= step).all()


def test_ranges() -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(999), [40.0]]).astype(F32).reshape(10, 100, 1, 1)

    def error(config: Any) -> float:
        return float(np.linalg.norm(SparseWeight.from_dense(values, quantization=config).to_dense() - values))

    for symmetric in (True, False):
        errors = {r: error(LinearQuantization(4, symmetric, range=r)) for r in ("minmax", "percentile", "mse")}  # type: ignore[arg-type]
        assert errors["mse"] < errors["minmax"]
    clipped = SparseWeight.from_dense(values, quantization=LinearQuantization(8, range="percentile", percentile=99))
    assert 2 < clipped.data.max() < 3
    assert error(CodebookQuantization(4)) < min(errors.values())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 3.4e38])
def test_extreme_weights(config: Any, size: float) -> None:
    dense = dense_weight(0)
    dense = (dense / np.abs(dense).max()).astype(np.float64) * size
    weight = SparseWeight.from_dense(dense.astype(F32), quantization=config)
    assert np.isfinite(weight.data).all()
    if size > 1e-40:
        assert np.linalg.norm(weight.to_dense() / size - dense / size) < np.linalg.norm(dense / size)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_of_zeros(config: Any) -> None:
    weight = SparseWeight.from_dense(np.zeros((4, 3, 1, 1), F32), quantization=config)
    assert weight.nnz == 0
    assert weight.levels is not None
    assert not weight.to_dense().any()
    assert weight.quantized(config) == weight


@pytest.mark.parametrize("different", [1, 3, 4])
def test_few_values_are_kept_by_codebooks(different: int) -> None:
    values = np.random.default_rng(different).standard_normal(different).astype(F32)
    dense = values[np.random.default_rng(1).integers(0, different, (6, 4, 1, 1))]
    np.testing.assert_array_equal(
        SparseWeight.from_dense(dense, quantization=CodebookQuantization(2)).to_dense(), dense
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LinearQuantization(1), "bits must be an int from 2 to 8, got 1"),
        (lambda: LinearQuantization(9), "bits must be an int from 2 to 8, got 9"),
        (lambda: CodebookQuantization(4.0), "bits must be an int"),  # type: ignore[arg-type]
        (lambda: CodebookQuantization(True), "bits must be an int"),
        (lambda: LinearQuantization(symmetric=1), "symmetric must be True or False"),  # type: ignore[arg-type]
        (lambda: LinearQuantization(granularity="layer"), "granularity must be one of 'tensor', 'channel'"),  # type: ignore[arg-type]
        (lambda: LinearQuantization(range="max"), "range must be one of"),  # type: ignore[arg-type]
        (lambda: LinearQuantization(percentile=0.5), "percentile must be a number in"),
        (lambda: CodebookQuantization(granularity="channel"), "granularity must be one of"),  # type: ignore[arg-type]
        (lambda: CodebookQuantization(granularity="channel_group"), "needs group"),
        (lambda: CodebookQuantization(granularity="channel_group", group=0), "needs group"),
        (lambda: CodebookQuantization(group=4), "group is for granularity='channel_group' only"),
    ],
)
def test_wrong_configs(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_wrong_weights() -> None:
    dense = dense_weight(0)
    dense[1, 2, 0, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite values of 315, the first at position \(1, 2, 0, 1\)"):
        SparseWeight.from_dense(dense, quantization=CodebookQuantization(4))
    with pytest.raises(TypeError, match="quantization must be a config like LinearQuantization"):
        SparseWeight.from_dense(dense_weight(0)).quantized(4)  # type: ignore[arg-type]


# --- Huffman ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([], []),
        ([0, 0], [0, 0]),
        ([0, 5, 0], [0, 1, 0]),
        ([1, 1], [1, 1]),
        ([45, 13, 12, 16, 9, 5], [1, 3, 3, 3, 4, 4]),  # the example of Cormen et al., Introduction to Algorithms
    ],
)
def test_code_lengths(counts: list[int], lengths: list[int]) -> None:
    assert code_lengths(np.array(counts, np.int64)).tolist() == lengths


@given(st.lists(st.integers(0, 50), min_size=2, max_size=60))
def test_code_lengths_are_those_of_a_code(counts: list[int]) -> None:
    array = np.array(counts)
    used, lengths = array[array > 0], code_lengths(array)[array > 0]
    if len(used) < 2:
        return
    assert (2.0**-lengths).sum() == 1, "a full prefix code"
    p = used / used.sum()
    entropy = float(-(p * np.log2(p)).sum())
    assert entropy - 1e-9 <= float((p * lengths).sum()) < entropy + 1


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_gaps_tell_the_places(density: float, seed: int) -> None:
    dense = dense_weight(seed, (3, 200, 1, 2), density**3)
    weight = SparseWeight.from_dense(dense)
    place, places = -1, []
    for symbol in gap_symbols(weight):
        place += int(symbol) + (symbol < 255)
        if symbol < 255:
            places.append(place)
    assert places == np.flatnonzero(dense).tolist()


def test_huffman_size() -> None:
    dense = np.zeros((4, 64, 1, 1), F32)
    dense[:, ::2] = 0.5
    weight = SparseWeight.from_dense(dense, quantization=CodebookQuantization(2))
    # 128 codes and 128 gaps of one bit each (one kind of code; gaps of 0 once and 1 else), lengths, codebook, scale.
    assert huffman_nbytes(weight) == (16 + 4) + (16 + 256) + (4 * 4 + 4)
    with pytest.raises(ValueError, match="not quantized"):
        huffman_nbytes(SparseWeight.from_dense(dense))


def test_configs_and_levels_pickle() -> None:
    for config in CONFIGS:
        assert pickle.loads(pickle.dumps(config)) == config
        weight = SparseWeight.from_dense(dense_weight(0), quantization=config)
        again = pickle.loads(pickle.dumps(weight))
        assert again == weight
        assert again.levels == weight.levels
        assert not again.levels.scale.flags.writeable


# --- models ----------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from numbasparse.pruning import (  # noqa: E402
    CubicSchedule,
    FitConfig,
    MagnitudePruning,
    Pruner,
    SGDConfig,
    fit,
    prune_,
)
from numbasparse.quantization import (  # noqa: E402
    ActivationQuantization,
    FakeQuantize,
    Quantizer,
    QuantizerCallback,
    fold_quantization,
    print_report,
    quantize_,
    quantize_activations_,
)

TRAINED = [
    LinearQuantization(3),
    LinearQuantization(4, symmetric=False, granularity="channel", range="mse"),
    CodebookQuantization(2),
    CodebookQuantization(3, "channel_group", 5),
]


def make(sparsity: float = 0.7) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    if sparsity:
        prune_(model, MagnitudePruning(sparsity, "layer"))
    return model


def batches(number: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, 6, 6, generator=generator), torch.randint(4, (5,), generator=generator))
        for _ in range(number)
    ]


def train(
    model: nn.Module, quantizer: Quantizer, steps: int = 4, lr: float = 0.05, pruner: Pruner | None = None
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()
        quantizer.step()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_quantize_at_once(config: Any, tmp_path: Path) -> None:
    model, before = make(), weights_of(make())
    report = quantize_(model, config)
    assert [layer.name for layer in report.layers] == ["2", "5"]
    after = weights_of(model)
    for name in before:
        # Layer 5 has no more weights than a codebook of 3 bits has entries.
        may_change = name == "2.weight" or (name == "5.weight" and config != TRAINED[3])
        assert torch.equal(before[name], after[name]) != may_change, name
    for layer in report.layers:
        old, new = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        assert (new[old == 0] == 0).all()
        np.testing.assert_array_equal(layer.weight.to_dense(), new)
        assert layer.error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert layer.nnz_before == int(old.count_nonzero())
        assert layer.nbytes == layer.weight.nbytes
        assert layer.weight.groups == model.get_submodule(layer.name).groups
    rows = str(report).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert json.loads(json.dumps(report.to_dict()))["nbytes"] == sum(layer.nbytes for layer in report.layers)
    print_report(report)
    quantize_(model, config)
    assert_same(weights_of(model), after)


def test_quantize_chosen_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(2, 3, 2), nn.Linear(5, 5))
    model[2].weight = nn.Parameter(torch.zeros(5, 5))
    report = quantize_(model, CodebookQuantization(2), lambda module, name: hasattr(module, "weight"))
    assert [layer.weight.shape for layer in report.layers] == [(5, 6, 1, 1), (3, 2, 1, 2), (5, 5, 1, 1)]
    assert len(model[0].weight.unique()) <= 5
    assert report.layers[2].error == 0
    model[2].weight = model[0].weight
    shared = quantize_(model, LinearQuantization(8), lambda module, name: isinstance(module, nn.Linear))
    assert [layer.name for layer in shared.layers] == ["0"]


@pytest.mark.parametrize("start", ["quantize_", "begin"])
def test_wrong_models_stay_as_they_are(start: str) -> None:
    def run(model: Any, config: Any = TRAINED[0], filter: Any = None) -> None:
        if start == "quantize_":
            quantize_(model, config, filter)
        else:
            Quantizer(model, config, filter).begin()

    with pytest.raises(TypeError, match="model must be a torch"):
        run(3)
    with pytest.raises(TypeError, match="config must be a quantization config like"):
        run(make(), MagnitudePruning(0.5))
    with pytest.raises(TypeError, match="filter must be callable"):
        run(make(), filter=3)
    with pytest.raises(ValueError, match="no layer of Sequential was chosen: expected at least one that the filter"):
        run(make(), filter=lambda module, name: False)
    with pytest.raises(ValueError, match=r"layer '1' \(ReLU\) was chosen but has no parameter 'weight'"):
        run(make(), filter=lambda module, name: name == "1")
    with pytest.raises(ValueError, match=r"the weight of layer '2' \(Conv2d\) must be float32, got torch.float16"):
        run(make().half())
    model = make()
    with torch.no_grad():
        model[5].weight[0, 1] = math.inf
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"weight has 1 NaN or infinite values of 16.*\(layer '5'\)"):
        run(model)
    assert_same(weights_of(model), before)


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_training_keeps_levels_and_zeros(config: Any) -> None:
    model, quantized = make(), make()
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    keys = list(model.state_dict())
    quantizer = Quantizer(model, config)
    quantizer.begin()
    quantize_(quantized, config)
    for name in ("2.weight", "5.weight"):
        assert torch.equal(model.state_dict()[name], quantized.state_dict()[name])
    for _ in range(3):
        train(model, quantizer, 2)
        quantizer.refit()
    train(model, quantizer, 2)
    trained = weights_of(model)
    assert not torch.equal(trained["2.weight"], quantized.state_dict()["2.weight"])
    report = quantizer.finish()
    assert list(model.state_dict()) == keys
    for layer in report.layers:
        key = f"{layer.name}.weight"
        assert torch.equal(model.state_dict()[key], trained[key])
        assert (trained[key][zeros[key]] == 0).all()
        np.testing.assert_array_equal(layer.weight.to_dense(), trained[key])
        assert 0 < layer.error < 1 or layer.weight.nnz <= 2**config.bits


@pytest.mark.parametrize("config", TRAINED[:2], ids=str)
def test_linear_training_is_straight_through(config: Any) -> None:
    """Against a master parameter whose rounding has the gradient of the identity."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    levels = SparseWeight.from_dense(model[0].weight, quantization=config).levels
    assert isinstance(levels, LinearLevels)
    scale, zero = (torch.from_numpy(np.array(a, F32)).view(-1, 1, 1, 1) for a in (levels.scale, levels.zero))
    master = model[0].weight.detach().clone().requires_grad_(True)
    bias = model[0].bias.detach().clone()
    quantizer = Quantizer(model, config)
    quantizer.begin()
    theirs, ours = torch.optim.SGD([master], 0.3, momentum=0.9), torch.optim.SGD([model[0].weight], 0.3, momentum=0.9)
    for _ in range(5):
        x = torch.randn(3, 4, 7, 7)
        rounded = (torch.clamp(torch.round(master / scale) + zero, 0, 2**config.bits - 1) - zero) * scale
        passed = master + (rounded - master).detach()
        for optimizer, weight in ((theirs, passed), (ours, model[0].weight)):
            optimizer.zero_grad()
            nn.functional.conv2d(x, weight, bias).square().sum().mul(1e-3).backward()
            optimizer.step()
        quantizer.step()
        # The sum of the two roundings may differ in the last place, and so, rarely, a weight by one level.
        torch.testing.assert_close(model[0].weight_master, master.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", TRAINED[2:], ids=str)
def test_entries_follow_summed_gradients(config: Any) -> None:
    """Against codebooks as parameters: autograd sums the gradients of the members."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 7, 3))
    with torch.no_grad():
        model[0].weight[torch.rand_like(model[0].weight) < 0.5] = 0
    sparse = SparseWeight.from_dense(model[0].weight, quantization=config)
    assert isinstance(sparse.levels, CodebookLevels)
    assert sparse.codes is not None
    group = sparse.levels.channels_per_table or 7
    rows = np.repeat(np.arange(7), np.diff(sparse.indptr))
    places = torch.from_numpy((rows // group) * 2**config.bits + sparse.codes)
    columns = torch.from_numpy(sparse.indices.astype(np.int64))
    entries = torch.from_numpy(sparse.levels.entries.copy()).flatten().requires_grad_(True)
    members = torch.bincount(places, minlength=len(entries)).clamp(min=1)
    quantizer = Quantizer(model, config)
    quantizer.begin()
    optimizer = torch.optim.SGD([model[0].weight], 0.2)
    for _ in range(5):
        x = torch.randn(3, 4, 7, 7)
        dense = torch.zeros(7, 36).index_put((torch.from_numpy(rows), columns), entries[places])
        losses = [nn.functional.conv2d(x, w).square().mean() for w in (dense.view(7, 4, 3, 3), model[0].weight)]
        entries.grad = None
        optimizer.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        with torch.no_grad():
            entries -= 0.2 * entries.grad / members
        optimizer.step()
        quantizer.step()
        # Every weight now belongs to the entry nearest to its master.
        tables = entries.detach().view(-1, 2**config.bits).sort(dim=1).values
        entries.data.copy_(tables.flatten())
        torch.testing.assert_close(model[0].weight_entries, tables, rtol=1e-5, atol=1e-6)
        table = torch.from_numpy(rows // group)
        masters = model[0].weight_master.flatten(1)[torch.from_numpy(rows), columns]
        places = table * 2**config.bits + (masters[:, None] - tables[table]).abs().argmin(dim=1)
        members = torch.bincount(places, minlength=len(entries)).clamp(min=1)


def test_sums_do_not_depend_on_the_order() -> None:
    from numbasparse.quantization.training import _move_entries

    torch.manual_seed(0)
    codes, change = torch.randint(16, (5000,), dtype=torch.int32), torch.randn(5000) ** 3
    results = []
    for _ in range(3):
        order = torch.randperm(5000)
        entries = torch.linspace(-1, 1, 16).view(1, 16)
        _move_entries(entries, codes[order], change[order], torch.ones(5000, dtype=torch.bool))
        results.append(entries)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    expected = torch.linspace(-1, 1, 16).double()
    for code in range(16):
        expected[code] += change[codes == code].double().mean()
    torch.testing.assert_close(results[0].flatten(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_a_step_never_waits_for_the_device(config: Any) -> None:
    """Tensors without values cannot be read on the host: whatever would wait for a GPU raises here."""
    model = make()
    quantizer = Quantizer(model, config)
    quantizer.begin()
    model.to("meta")
    quantizer.step()


@pytest.mark.parametrize("config", [TRAINED[1], TRAINED[3]], ids=str)
def test_training_with_a_pruner(config: Any) -> None:
    model = make(0)
    pruner = Pruner(model, MagnitudePruning(0.8, "layer"), schedule=CubicSchedule(0, 4))
    quantizer = Quantizer(model, config)
    pruner.begin()
    quantizer.begin()
    train(model, quantizer, 6, pruner=pruner)
    masks = {name: model.get_submodule(name).weight_mask.clone() for name in ("2", "5")}
    copied = copy.deepcopy(model)
    report = quantizer.finish()
    pruner.finish()
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert mask.float().mean() < 0.25
        assert (weight[~mask] == 0).all()
        assert torch.equal(copied.get_submodule(name).weight, weight)
    assert len(report.layers) == 2


@pytest.mark.parametrize("config", [TRAINED[1], TRAINED[3]], ids=str)
def test_resume_is_bit_exact(config: Any) -> None:
    def started() -> tuple[nn.Module, Quantizer]:
        model = make()
        quantizer = Quantizer(model, config)
        quantizer.begin()
        return model, quantizer

    model, quantizer = started()
    train(model, quantizer)
    state = copy.deepcopy(model.state_dict())
    train(model, quantizer)
    other, resumed = started()
    train(other, resumed, lr=0.3)
    other.load_state_dict(state)
    train(other, resumed)
    assert_same(weights_of(model), weights_of(other))


def test_copies_compile_and_fold() -> None:
    model = make()
    quantizer = Quantizer(model, CodebookQuantization(3))
    compiled = torch.compile(model, backend="eager")
    quantizer.begin()
    train(compiled, quantizer)
    model.eval()
    copied = copy.deepcopy(model)
    x = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))
        assert torch.equal(compiled(x), model(x))
        fold_quantization(copied)
        assert list(copied.state_dict()) == list(make().state_dict())
        assert torch.equal(copied(x), model(x))
    assert hasattr(model[2], "weight_master")


def test_calls_in_the_wrong_order() -> None:
    quantizer = Quantizer(make(), CodebookQuantization(4))
    for call in (quantizer.step, quantizer.refit, quantizer.finish):
        with pytest.raises(RuntimeError, match="before begin"):
            call()
    quantizer.begin()
    with pytest.raises(RuntimeError, match="already begun"):
        quantizer.begin()
    quantizer.finish()
    with pytest.raises(RuntimeError, match=r"step\(\) was called before begin"):
        quantizer.step()


def test_diverged_training() -> None:
    model = make()
    quantizer = Quantizer(model, LinearQuantization(4))
    quantizer.begin()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    quantizer.step()
    for call in (quantizer.refit, quantizer.finish):
        with pytest.raises(ValueError, match=r"NaN or infinite values.*layer '2'"):
            call()
    assert quantizer.active
    assert hasattr(model[2], "weight_master")
    quantizer.cancel()
    assert list(model.state_dict()) == list(make().state_dict())


def test_fit_with_quantization() -> None:
    model = make()
    zeros = model[2].weight == 0
    callback = QuantizerCallback(Quantizer(model, CodebookQuantization(2)), refit_every=3)
    config = FitConfig(epochs=2, optimizer=SGDConfig(lr=0.02), progress=False)
    fit(model, batches(), config, callbacks=[callback])
    assert callback.report is not None
    assert len(model[2].weight.unique()) <= 5
    assert (model[2].weight[zeros] == 0).all()
    np.testing.assert_array_equal(callback.report.weights["2"].to_dense(), model[2].weight.detach())

    failing = make()
    before = weights_of(failing)
    callback = QuantizerCallback(Quantizer(failing, LinearQuantization(4)))

    def fail(epoch: int, model: nn.Module) -> dict[str, float]:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(failing, batches(), config, callbacks=[callback], after_epoch=fail)
    assert_same(weights_of(failing), before)
    with pytest.raises(ValueError, match="made for another model"):
        fit(make(), batches(), config, callbacks=[QuantizerCallback(Quantizer(make(), LinearQuantization(4)))])
    with pytest.raises(ValueError, match="refit_every must be"):
        QuantizerCallback(Quantizer(make(), LinearQuantization(4)), refit_every=0)


# --- activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_activations(kind: Any) -> None:
    model, original = make(), make()
    data = [x for x, _ in batches()]
    ranges = quantize_activations_(model, data, ActivationQuantization(8, kind, 99.0))
    assert list(ranges) == ["2", "5"]
    assert ranges["2"][0] == 0, "after a ReLU"
    assert model.training
    assert torch.equal(model[2].layer.weight, original[2].weight)
    with torch.no_grad():
        seen = torch.cat([original.eval()[:2](x) for x in data]).flatten()
        if kind == "minmax":
            assert ranges["2"][1] == float(seen.max())
        else:
            assert float(seen.quantile(0.98)) < ranges["2"][1] < float(seen.max())
        model.eval()
        rounded = model[2].quantize(seen)
        scale = float(model[2].quantize.scale)
        assert len(rounded.unique()) <= 256
        inside = seen <= ranges["2"][1]
        assert float((rounded - seen)[inside].abs().max()) <= scale / 2 * 1.001
        assert (rounded[seen == 0] == 0).all()
        y, wanted = model(data[0]), original(data[0])
        assert 0 < float((y - wanted).norm() / wanted.norm()) < 0.1
        assert torch.equal(copy.deepcopy(model)(data[0]), y)
    x = torch.tensor([0.5, 1e6], requires_grad=True)
    model[2].quantize(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0]


def test_activations_of_one_image_with_training_and_conversion() -> None:
    from numbasparse.nn import SparseConv2d, convert

    model = make(0.8)
    x = batches(1)[0][0][:1]
    quantize_activations_(model, [(x, None)], ActivationQuantization(4))
    quantizer = Quantizer(model, CodebookQuantization(4))
    quantizer.begin()
    train(model, quantizer)
    quantizer.finish()
    converted = convert(model.eval(), example_input=x)
    assert isinstance(converted[2].layer, SparseConv2d)
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)


def test_module_used_twice_is_replaced_twice() -> None:
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    quantize_activations_(model, [torch.randn(1, 4, 3, 3)])
    assert model[0] is model[2]
    assert isinstance(model[0].quantize, FakeQuantize)


def test_wrong_calibration_changes_nothing() -> None:
    model = make()
    for data, text in (
        ([], "no calibration batches"),
        ([torch.full((1, 3, 6, 6), math.nan)], "input of layer '2' holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=text):
            quantize_activations_(model, data)
    with pytest.raises(ValueError, match="model itself is a layer"):
        quantize_activations_(nn.Conv2d(4, 4, 1), [torch.randn(1, 4, 3, 3)])
    with pytest.raises(TypeError, match="config must be an ActivationQuantization"):
        quantize_activations_(model, [], LinearQuantization(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be"):
        ActivationQuantization(16)
    model.add_module("unused", nn.Identity())
    model.unused.conv = nn.Conv2d(4, 4, 1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no batch reaches layer 'unused\.conv'"):
        quantize_activations_(model, [batches(1)[0][0]])
    assert isinstance(model[2], nn.Conv2d)
    assert not model[2]._forward_pre_hooks
    assert model.training


# --- command ---------------------------------------------------------------------------------------------------

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) > 0.8)
    return model

batches = [(torch.randn(4, 4, 6, 6), torch.arange(4))] * 3
"""


@pytest.mark.filterwarnings("ignore:the machine was busy")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner
    from safetensors.torch import load_file

    from numbasparse.cli import main

    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["quantize", "net.py:make", *arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    output = run("--bits", "3", "--sparse", "layers.safetensors")
    assert "Huffman" in output
    assert "wrote quantized.safetensors" in output
    values = load_file("quantized.safetensors")["0.weight"]
    assert len(values.unique()) <= 9
    weight = load_weights("layers.safetensors")["0"]
    np.testing.assert_array_equal(weight.to_dense(), values)
    run("--bits", "4", "--levels", "linear", "--affine", "--per-channel", "--range", "mse", "--out", "b.safetensors")
    assert len(load_file("b.safetensors")["0.weight"].unique()) > 9
    run("--bits", "2", "--train", "net.py:batches", "--epochs", "1", "--out", "c.safetensors")
    assert len(load_file("c.safetensors")["0.weight"].unique()) <= 5
    tuning = ["net.py:make", "--input", "1,4,8,8", "--weights", "quantized.safetensors"]
    tuning += ["--quantized", "layers.safetensors"]
    result = CliRunner().invoke(main, ["tune", *tuning, "--trials", "1", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert '"entries": "' in Path("tuned.json").read_text()
    result = CliRunner().invoke(main, ["bench", *tuning, "--tuned", "tuned.json", "--seconds", "0.1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["bench", *tuning[:4], "c.safetensors", *tuning[5:], "--seconds", "0.1"])
    assert result.exit_code == 1
    assert "differs from the layer's" in result.output
    assert "linear only" in run("--bits", "2", "--affine", code=1)
    assert "codebook only" in run("--bits", "2", "--levels", "linear", "--group", "2", code=1)
    assert "is not in the range 2<=x<=8" in run("--bits", "9", code=2)
    assert "cannot write" in run("--bits", "4", "--sparse", "no/folder/x", code=1)


# --- converted models ------------------------------------------------------------------------------------------


def converted_pair(config: Any, fuse: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantized model with lively batch statistics, and what it is converted to."""
    from numbasparse.nn import convert

    model = make(0.8).eval()
    batch_norm = model[3]
    with torch.no_grad():
        batch_norm.running_mean.normal_()
        batch_norm.running_var.uniform_(0.1, 3)
        batch_norm.weight.normal_()
        batch_norm.weight[1] = 0
    report = quantize_(model, config)
    x = batches(1)[0][0]
    return model, convert(model, example_input=x, fuse=fuse, quantized=report.weights), x


@pytest.mark.parametrize("config", TRAINED, ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_converted_models_keep_codes(config: Any, fuse: bool) -> None:
    model, converted, x = converted_pair(config, fuse)
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    for name in ("2", "5"):
        layer: Any = converted.get_submodule(name)
        assert layer.values.dtype == torch.uint8
        weight = layer.weight_matrix()
        assert weight.levels.bits == config.bits
        own = model.get_submodule(name).weight.detach()
        if name == "5" or not fuse:
            assert torch.equal(torch.from_numpy(weight.to_dense()), own)
        else:
            assert len(weight.levels.scale) == 8
            assert weight.nnz == int(own.count_nonzero()) - int(own[1].count_nonzero()), "channel 1 is switched off"


def test_converted_models_load_save_and_export(tmp_path: Path) -> None:
    from numbasparse.nn import SparseConv2d

    model, converted, x = converted_pair(CodebookQuantization(3))
    wanted = converted(x)
    other = converted_pair(LinearQuantization(5))[1]
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), wanted)
    plain = SparseConv2d.from_conv(model[2], activation="relu")
    plain.load_state_dict({k: v for k, v in converted[2].state_dict().items() if k != "bias"})
    assert plain.values.dtype == torch.uint8
    exported = torch.export.export(converted, (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), wanted)
    assert converted.half()[2].values.dtype == torch.uint8
    broken = converted.state_dict()
    broken["2.values"] = broken["2.values"][:-1]
    with pytest.raises(RuntimeError, match=r"2: no sparse weight of shape .*corrupt"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_through_codes(activation: str | None) -> None:
    from numbasparse.nn import SparseConv2d

    conv = make(0.5)[5]
    weight = SparseWeight.from_dense(conv.weight, 2, CodebookQuantization(2))
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight.to_dense()))
    layer: Any = SparseConv2d.from_conv(conv, weight=weight, activation=activation)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)

    def gradient(run: Any) -> Tensor:
        return torch.autograd.grad(run(x).square().sum(), x)[0]

    wanted = gradient(lambda x: nn.functional.silu(conv(x)) if activation else conv(x))
    torch.testing.assert_close(gradient(layer), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(torch.compile(layer, backend="aot_eager")), wanted, rtol=1e-4, atol=1e-5)


def test_convert_refuses_other_weights() -> None:
    from numbasparse.nn import convert

    model = make(0.8)
    weights = quantize_(model, CodebookQuantization(2)).weights
    with pytest.raises(ValueError, match=r"quantized must map the model's layers to SparseWeight, got 'x'"):
        convert(model, quantized={"x": weights["2"]})
    with pytest.raises(ValueError, match=r"quantized must map .* got '2': int"):
        convert(model, quantized={"2": 3})  # type: ignore[dict-item]
    with torch.no_grad():
        model[2].weight *= 2
    with pytest.raises(ValueError, match="weight of layer '2' differs from the layer's"):
        convert(model, quantized=weights)


@pytest.mark.filterwarnings("ignore:the machine was busy")
def test_tuned_codes() -> None:
    """A converted model is tuned with its codes; the result applies to the next conversion."""
    autotune = pytest.importorskip("autotune")
    pytest.importorskip("optuna")
    from autotune.model import problems_of
    from numbasparse.nn import convert

    model = make(0.9).eval()
    weights = quantize_(model, CodebookQuantization(4)).weights
    x = batches(1)[0][0]
    ready = convert(model, example_input=x, quantized=weights)
    coded = {problem.name: problem.weight.levels is not None for problem in problems_of(ready, x)}
    assert coded == {"0": False, "2": True, "5": True}
    tuned = autotune.tune(ready, x, trials=3, threads=1, progress=False)
    converted = convert(model, tuned, x, quantized=weights)
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)


def test_conv2d_of_codes() -> None:
    from numbasparse import conv2d

    weight = SparseWeight.from_dense(dense_weight(0), quantization=LinearQuantization(4, granularity="channel"))
    x = np.random.default_rng(0).standard_normal((2, 5, 9, 9)).astype(F32)
    y = conv2d(x, weight, padding=1)
    wanted = nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(weight.to_dense()), padding=1)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_configs_need_no_torch(run_python: Any) -> None:
    code = """
import sys
import numpy as np
from numbasparse import SparseWeight
from numbasparse.quantization import CodebookQuantization, LinearQuantization, huffman_nbytes
w = SparseWeight.from_dense(np.ones((2, 2, 1, 1), np.float32), quantization=CodebookQuantization(4))
print(huffman_nbytes(w) > 0, "torch" in sys.modules)
"""
    assert run_python(code) == "True False"
