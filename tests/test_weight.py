from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from strategies import conv_specs, sparse_weights

from numbasparse.levels import CodebookLevels, LinearLevels, pack_codes
from numbasparse.weight import SparseWeight, load_weights, save_weights

FORMATS = ["bsr", "coo", "csc", "csr", "dia", "dok", "lil"]
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _dense(shape: tuple[int, ...] = (6, 4, 3, 2), dtype: Any = np.float32, density: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    values[rng.random(shape) >= density] = 0
    return values.astype(dtype)


def _weight() -> SparseWeight:
    return SparseWeight.from_dense(_dense(), groups=2)


def _small() -> SparseWeight:
    """One row [0, 5, 7], the next empty."""
    return SparseWeight.from_dense(np.array([0, 5, 7, 0, 0, 0], np.float32).reshape(2, 3, 1, 1))


def _levels(bits: int, channels_per_table: int) -> LinearLevels | CodebookLevels:
    """Linear levels with a scale for each of 6 channels; or codebooks, if channels share them."""
    if channels_per_table == 0:
        return LinearLevels(bits, np.arange(1, 7, dtype=np.float32), np.full(6, 1, np.uint8))
    tables = -(-6 // channels_per_table)
    entries = np.arange(1, tables * 2**bits + 1, dtype=np.float32).reshape(tables, -1) / 3
    return CodebookLevels(bits, entries, channels_per_table, np.array([2], np.float32))


def _coded(bits: int, channels_per_table: int) -> SparseWeight:
    """The places of `_weight`, with codes."""
    plain = _weight()
    codes = np.random.default_rng(1).choice([c for c in range(2**bits) if c != 1], plain.nnz).astype(np.uint8)
    levels = _levels(bits, channels_per_table)
    return SparseWeight(codes, plain.indices, plain.indptr, plain.kernel_shape, plain.groups, levels)


# ---- from_dense ---------------------------------------------------------------------------------------------


def test_properties() -> None:
    dense = _dense()
    weight = _weight()
    nnz = np.count_nonzero(dense)
    assert weight.shape == (6, 4, 3, 2)
    assert (weight.k, weight.kernel_shape, weight.groups, weight.nnz) == (6, (4, 3, 2), 2, nnz)
    assert weight.density == pytest.approx(nnz / dense.size)
    assert weight.sparsity == pytest.approx(1 - nnz / dense.size)
    assert weight.nbytes == 8 * nnz + 4 * 7
    assert (weight.data.dtype, weight.indices.dtype, weight.indptr.dtype) == (np.float32, np.int32, np.int32)
    assert repr(weight) == (
        f"SparseWeight(shape=(6, 4, 3, 2), groups=2, nnz={nnz}, sparsity={1 - nnz / dense.size:.2%})"
    )
    np.testing.assert_array_equal(weight.to_dense(), dense)
    assert weight.to_dense().dtype == np.float32
    np.testing.assert_array_equal(weight.rows, np.nonzero(dense)[0])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trips(data: st.DataObject) -> None:
    spec = data.draw(conv_specs())
    weight = data.draw(sparse_weights(spec))
    assert weight.shape == spec.weight_shape
    assert SparseWeight.from_dense(weight.to_dense(), weight.groups) == weight
    assert SparseWeight.from_scipy(weight.to_scipy(), weight.kernel_shape, weight.groups) == weight
    assert weight.to_scipy().has_canonical_format


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_from_dense_numpy_types_and_strides(dtype: Any) -> None:
    dense = _dense(dtype=dtype)
    expected = SparseWeight.from_dense(dense.astype(np.float32))
    assert SparseWeight.from_dense(dense) == expected
    assert SparseWeight.from_dense(np.asfortranarray(dense)) == expected
    assert SparseWeight.from_dense(dense[:, ::-1]) == SparseWeight.from_dense(dense[:, ::-1].copy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_dense_torch_types(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(_dense()).to(dtype)
    expected = SparseWeight.from_dense(tensor.float().numpy())
    assert SparseWeight.from_dense(tensor) == expected
    assert SparseWeight.from_dense(torch.nn.Parameter(tensor)) == expected
    channels_last = tensor.to(memory_format=torch.channels_last)
    assert SparseWeight.from_dense(channels_last) == expected
    assert SparseWeight.from_dense(tensor.to_sparse()) == expected


def test_from_dense_one_dimensional_kernel() -> None:
    dense = _dense((6, 4, 5))
    weight = SparseWeight.from_dense(dense)
    assert weight.shape == (6, 4, 1, 5)
    np.testing.assert_array_equal(weight.to_dense()[:, :, 0], dense)


def test_from_dense_does_not_share_memory() -> None:
    dense = np.ones((2, 2, 1, 1), np.float32)
    weight = SparseWeight.from_dense(dense)
    dense[:] = 3
    assert set(weight.data) == {1.0}


def test_values_that_round_to_zero_are_dropped() -> None:
    weight = SparseWeight.from_dense(np.array([1e-60, -0.0, 0.0, 2.0]).reshape(1, 4, 1, 1))
    assert weight.nnz == 1
    weight = SparseWeight.from_dense(np.zeros((3, 2, 1, 1)))
    assert (weight.nnz, weight.sparsity) == (0, 1.0)


@pytest.mark.parametrize(
    ("weight", "groups", "error", "text"),
    [
        ([[[[1.0]]]], 1, TypeError, "NumPy array or a torch tensor, got list"),
        (np.ones((1, 1, 1, 1), np.int32), 1, TypeError, "int32"),
        (np.ones((1, 1, 1, 1), bool), 1, TypeError, "bool"),
        (np.ones((1, 1, 1, 1), complex), 1, TypeError, "complex"),
        (np.ones((1, 1, 1, 1), np.longdouble), 1, TypeError, "float16, float32 or float64"),
        (torch.ones(1, 1, 1, 1, dtype=torch.int8), 1, TypeError, "torch.int8"),
        (torch.ones(1, 1, 1, 1, device="meta"), 1, ValueError, "meta"),
        (np.ones((1, 1)), 1, ValueError, "2 sizes"),
        (np.float32(1), 1, TypeError, "got float32"),
        (np.ones((0, 1, 1, 1)), 1, ValueError, "at least 1"),
        (np.ones((3, 1, 1, 1)), 2, ValueError, "groups=2 does not divide the 3 output channels"),
        (np.ones((3, 1, 1, 1)), 0, ValueError, "groups must be at least 1"),
        (np.ones((3, 1, 1, 1)), 1.0, TypeError, "groups must be an int"),
        (np.full((3, 1, 1, 1), 1e300), 1, ValueError, "3 values beyond the range of float32"),
    ],
)
def test_from_dense_refuses(weight: Any, groups: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SparseWeight.from_dense(weight, groups)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_from_dense_refuses_non_finite(value: float) -> None:
    dense = _dense()
    dense[1, 2, 0, 1] = dense[5, 0, 0, 0] = value
    text = r"2 NaN or infinite values of 144, the first at position \(1, 2, 0, 1\)"
    with pytest.raises(ValueError, match=text):
        SparseWeight.from_dense(dense)
    with pytest.raises(ValueError, match=text):
        SparseWeight.from_dense(torch.from_numpy(dense))


def test_does_not_import_torch() -> None:
    code = "import sys, numbasparse.weight; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---- from_scipy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("old_style", [False, True])
def test_from_scipy_formats(name: str, dtype: Any, old_style: bool) -> None:
    dense = _dense(dtype=dtype)
    kind = sparse.csr_matrix if old_style else sparse.csr_array
    matrix = kind(dense.reshape(6, -1)).asformat(name)
    before = copy.deepcopy(matrix)
    weight = SparseWeight.from_scipy(matrix, (4, 3, 2), groups=2)
    assert weight == SparseWeight.from_dense(dense, groups=2)
    assert type(matrix) is type(before)
    assert (matrix != before).nnz == 0


def test_from_scipy_float16() -> None:
    """SciPy makes no such matrix, but one whose values were exchanged may hold float16."""
    assert SparseWeight.from_scipy(_replaced("csr", data=np.array([5, 7], np.float16)), (3, 1, 1)) == _small()


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_array, sparse.csr_matrix])
def test_from_scipy_makes_canonical_without_touching_the_callers(kind: Any) -> None:
    data = np.array([1.0, 2.0, 4.0, 0.0, 3.0, -3.0])
    indices, indptr = np.array([2, 0, 2, 1, 1, 1]), np.array([0, 3, 4, 6])
    matrix = kind((data, indices, indptr), shape=(3, 3))
    matrix.has_sorted_indices = matrix.has_canonical_format = True  # a lie, which must not be believed
    dense = np.zeros((3, 3))
    dense[0, 0], dense[0, 2] = 2, 5
    expected = dense.T if matrix.format == "csc" else dense
    saved = [array.copy() for array in (matrix.data, matrix.indices, matrix.indptr)]
    weight = SparseWeight.from_scipy(matrix, (3, 1, 1))
    np.testing.assert_array_equal(weight.to_dense().reshape(3, 3), expected)
    assert weight.nnz == 2
    for array, old in zip((matrix.data, matrix.indices, matrix.indptr), saved, strict=True):
        np.testing.assert_array_equal(array, old)
        assert array.flags.writeable
    matrix.data[:] = 9
    np.testing.assert_array_equal(weight.to_dense().reshape(3, 3), expected)


def test_from_scipy_sums_duplicates_of_coo() -> None:
    matrix = sparse.coo_array((np.array([1.0, 2.0, 3.0], np.float32), ([1, 0, 1], [2, 1, 2])), shape=(2, 3))
    weight = SparseWeight.from_scipy(matrix, (3, 1, 1))
    np.testing.assert_array_equal(weight.to_dense().reshape(2, 3), [[0, 2, 0], [0, 0, 4]])


def test_from_scipy_ignores_slack_after_the_last_row() -> None:
    matrix = _small().to_scipy()
    matrix.data = np.append(matrix.data, np.float32(np.nan))
    matrix.indices = np.append(matrix.indices, np.int32(99))
    assert SparseWeight.from_scipy(matrix, (3, 1, 1)) == _small()


def test_from_scipy_refuses_a_sum_beyond_float32() -> None:
    big = np.float32(3e38)
    matrix = sparse.coo_array(([big, big], ([0, 0], [0, 0])), shape=(1, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="beyond the range of float32"):
        SparseWeight.from_scipy(matrix, (1, 1, 1))


@pytest.mark.parametrize(
    ("matrix", "kernel_shape", "groups", "error", "text"),
    [
        (np.eye(3), (3, 1, 1), 1, TypeError, "scipy.sparse"),
        (sparse.eye_array(3, dtype=np.int32), (3, 1, 1), 1, TypeError, "int32"),
        (sparse.eye_array(3, dtype=bool), (3, 1, 1), 1, TypeError, "bool"),
        (sparse.eye_array(3), (1, 3, 3), 1, ValueError, r"\(K, 9\)"),
        (sparse.eye_array(3), (3, 1), 1, ValueError, "kernel_shape"),
        (sparse.eye_array(3), (3, 1, 1.0), 1, TypeError, "kernel_shape"),
        (sparse.eye_array(3), 3, 1, TypeError, "kernel_shape"),
        (sparse.eye_array(3), (3, 1, -1), 1, ValueError, "at least 1"),
        (sparse.eye_array(3), (3, 1, 1), 2, ValueError, "groups=2"),
        (sparse.eye_array(3), (3, 1, 1), True, TypeError, "groups"),
        (sparse.coo_array(np.ones(3)), (3, 1, 1), 1, ValueError, r"\(K, 3\)"),
        (sparse.csr_array((0, 3)), (3, 1, 1), 1, ValueError, r"\(K, 3\)"),
        (sparse.csr_array([[1.0, np.nan]]), (2, 1, 1), 1, ValueError, "1 NaN or infinite"),
    ],
)
def test_from_scipy_refuses(matrix: Any, kernel_shape: Any, groups: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SparseWeight.from_scipy(matrix, kernel_shape, groups)


def _replaced(name: str, **arrays: Any) -> Any:
    """A matrix like `_small` whose arrays were exchanged after it was made, which SciPy does not check."""
    matrix = _small().to_scipy().asformat(name)
    for attribute, array in arrays.items():
        setattr(matrix, attribute, array)
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        _replaced("csr", indices=np.array([-1, 2])),
        _replaced("csr", indices=np.array([1, 3])),
        _replaced("csr", indices=np.array([1, 2**40])),
        _replaced("csr", indices=np.array([1])),
        _replaced("csr", indices=np.array([1.0, 2.0])),
        _replaced("csr", indices=np.array([[1, 2]])),
        _replaced("csr", indptr=np.array([0, 2])),
        _replaced("csr", indptr=np.array([1, 2, 2])),
        _replaced("csr", indptr=np.array([0, 3, 2])),
        _replaced("csr", indptr=np.array([0, -5, 2])),
        _replaced("csr", indptr=np.array([0, 2, 10**12])),
        _replaced("csr", indptr=np.array([0, 0, -1])),
        _replaced("csr", indptr=np.array([0, 2**64 - 1, 2], np.uint64)),
        _replaced("csr", indptr=np.array([])),
        _replaced("csr", data=np.array([1.0])),
        _replaced("csr", data=np.array([[1.0, 2.0]])),
        _replaced("csc", indices=np.array([0, 2])),
        _replaced("csc", indptr=np.array([0, 5, 1, 2])),
        _replaced("coo", coords=(np.array([0, 0]), np.array([1, 3]))),
        _replaced("coo", coords=(np.array([0, -1]), np.array([1, 2]))),
        _replaced("coo", coords=(np.array([0]), np.array([1, 2]))),
        _replaced("coo", coords=(np.array([0, 0]),)),
        _replaced("bsr", indices=np.array([7, 8])),
        _replaced("bsr", indptr=np.array([0, 1000])),
        _replaced("bsr", indptr=np.array([0, -1000, 2])),
        _replaced("dia", offsets=np.array([0, 1, 2, 3, 4])),
        _replaced("lil", rows=np.array([[1, 9], []], object)),
        _replaced("lil", rows=np.array([[1, 1, 1, 1, 1], []], object)),
        _replaced("dok", _dict={(0, 9): 1.0}),
    ],
    ids=lambda matrix: matrix.format,
)
def test_from_scipy_refuses_malformed(matrix: Any) -> None:
    with pytest.raises(ValueError, match=f"malformed {matrix.format} matrix: .|of a sparse matrix must "):
        SparseWeight.from_scipy(matrix, (3, 1, 1))


# ---- the object ---------------------------------------------------------------------------------------------


def _assert_read_only(weight: SparseWeight) -> None:
    for array in (weight.data, weight.indices, weight.indptr):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_is_immutable() -> None:
    weight = _weight()
    _assert_read_only(weight)
    with pytest.raises(AttributeError):
        weight.data = weight.data  # type: ignore[misc]
    with pytest.raises(AttributeError):
        weight.other = 1  # type: ignore[attr-defined]
    weight.to_scipy().data[:] = 0
    weight.to_dense()[:] = 0
    assert weight == _weight()


def test_pickle_and_deepcopy_stay_immutable() -> None:
    for other in (pickle.loads(pickle.dumps(_weight())), copy.deepcopy(_weight())):
        assert other == _weight()
        _assert_read_only(other)


def test_equality_and_fingerprint() -> None:
    weight = _weight()
    assert weight == _weight()
    assert weight.fingerprint == _weight().fingerprint
    assert hash(weight) == hash(_weight())
    assert weight != "weight"
    dense = _dense()
    changed = dense.copy()
    changed[tuple(np.argwhere(dense)[0])] += 1
    others = [
        SparseWeight.from_dense(dense),
        SparseWeight.from_dense(changed, 2),
        SparseWeight.from_dense(dense.reshape(6, 4, 2, 3), 2),
        SparseWeight.from_dense(dense.transpose(0, 1, 3, 2), 2),
    ]
    assert all(weight != other for other in others)
    assert len({weight.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_fingerprint_is_stable() -> None:
    assert _small().fingerprint == "b71d7009c3e7abde5f9710f653ee5d2f"


@pytest.mark.parametrize(
    ("data", "indices", "indptr", "error", "text"),
    [
        ([5.0, 7.0], [2, 1], [0, 2, 2], ValueError, "rise strictly"),
        ([5.0, 7.0], [1, 1], [0, 2, 2], ValueError, "rise strictly"),
        ([5.0, 0.0], [1, 2], [0, 2, 2], ValueError, "1 stored values are zero"),
        ([5.0, np.nan], [1, 2], [0, 2, 2], ValueError, "position 1"),
        ([5.0, 7.0], [1, 2], [0, 1, 1], ValueError, "indptr ends with 1, but 2"),
        ([5.0, 7.0], [1, 3], [0, 2, 2], ValueError, "between 0 and 2"),
        ([[5.0, 7.0]], [1, 2], [0, 2, 2], ValueError, "one dimension"),
        ([], [], [0], ValueError, r"\(K, 3\)"),
        ([], [], [], ValueError, r"\(K, 3\)"),
    ],
)
def test_constructor_refuses(data: Any, indices: Any, indptr: Any, error: type[Exception], text: str) -> None:
    arrays = np.array(data, np.float32), np.array(indices, np.int32), np.array(indptr, np.int32)
    with pytest.raises(error, match=text):
        SparseWeight(*arrays, (3, 1, 1))


def test_constructor_refuses_other_types() -> None:
    small = _small()
    with pytest.raises(TypeError, match="data must be an ndarray of float32, got float64"):
        SparseWeight(small.data.astype(float), small.indices, small.indptr, (3, 1, 1))
    with pytest.raises(TypeError, match="indices must be an ndarray of int32, got list"):
        SparseWeight(small.data, [1, 2], small.indptr, (3, 1, 1))  # type: ignore[arg-type]


def test_constructor_takes_rows_that_fall_between_rows() -> None:
    data, indices, indptr = np.ones(2, np.float32), np.array([2, 0], np.int32), np.array([0, 1, 2], np.int32)
    assert SparseWeight(data, indices, indptr, (3, 1, 1)).nnz == 2


# ---- files --------------------------------------------------------------------------------------------------

NAMES = ["conv1", "", "layer.0/конв", "__metadata__", "0.data", "a\x00b\n", "\ud800"]


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    for weight in (_weight(), _small(), SparseWeight.from_dense(np.zeros((2, 1, 1, 1)))):
        weight.save(path)
        loaded = SparseWeight.load(str(path))
        assert loaded == weight
        assert not any(array.flags.writeable for array in (loaded.data, loaded.indices, loaded.indptr))
    assert [file.name for file in tmp_path.iterdir()] == ["weight.safetensors"]


def test_save_and_load_many(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = {name: (_weight(), _small())[i % 2] for i, name in enumerate(NAMES)}
    save_weights(path, weights)
    loaded = load_weights(path)
    assert loaded == weights
    assert list(loaded) == list(weights)
    save_weights(path, {})
    assert load_weights(path) == {}


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    blobs = set()
    for number in range(5):
        save_weights(tmp_path / str(number), {"a": _weight(), "b": _small()})
        blobs.add((tmp_path / str(number)).read_bytes())
    assert len(blobs) == 1


def test_save_refuses_other_types(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="layer names to SparseWeight"):
        save_weights(tmp_path / "x", {"a": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="layer names to SparseWeight"):
        save_weights(tmp_path / "x", {3: _small()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weight.safetensors"
    _small().save(path)

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        _weight().save(path)
    monkeypatch.undo()
    assert SparseWeight.load(path) == _small()
    assert [file.name for file in tmp_path.iterdir()] == ["weight.safetensors"]


def test_missing_files_and_folders_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SparseWeight.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        _small().save(tmp_path / "none" / "weight")


def test_the_two_kinds_of_file_name_each_others_reader(tmp_path: Path) -> None:
    _small().save(tmp_path / "one")
    save_weights(tmp_path / "many", {"a": _small()})
    with pytest.raises(ValueError, match=r"many.*use load_weights"):
        SparseWeight.load(tmp_path / "many")
    with pytest.raises(ValueError, match=r"one.*use SparseWeight\.load"):
        load_weights(tmp_path / "one")


TENSORS: dict[str, np.ndarray] = {
    "data": np.array([5, 7], np.float32),
    "indices": np.array([1, 2], np.int32),
    "indptr": np.array([0, 2, 2], np.int32),
}
LAYER: dict[str, Any] = {
    "name": "",
    "kernel_shape": [3, 1, 1],
    "groups": 1,
    "fingerprint": "b71d7009c3e7abde5f9710f653ee5d2f",
}
HEADER: dict[str, Any] = {
    "format": "numbasparse.SparseWeight",
    "version": "2",
    "layers": [{**LAYER, "levels": None}],
}


def _blob(header: Any = HEADER, **tensors: Any) -> bytes:
    """A file made without the package; `tensors` replace the right ones."""
    metadata = {"numbasparse": header if isinstance(header, str) else json.dumps(header)}
    return safetensors.numpy.save({**TENSORS, **tensors}, metadata=metadata)


def test_file_is_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    path.write_bytes(_blob())
    assert SparseWeight.load(path) == _small()
    _small().save(path)
    assert path.read_bytes() == _blob()


def test_file_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    path.write_bytes(_blob({**HEADER, "version": "1", "layers": [LAYER]}))
    assert SparseWeight.load(path) == _small()


def _layer(**changes: Any) -> dict[str, Any]:
    return {**HEADER, "layers": [{**LAYER, **changes}]}


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 something else entirely", "no safetensors file"),
        (_blob()[:-1], "truncated"),
        (_blob() + b"\0", "safetensors"),
        (safetensors.numpy.save(TENSORS), "another program"),
        (safetensors.numpy.save(TENSORS, metadata={"format": "pt"}), "another program"),
        (_blob("no json"), "."),
        (_blob("[" * 50_000), "nested too deeply"),
        (_blob([]), "."),
        (_blob({}), "format"),
        (_blob({**HEADER, "format": "other"}), "format is 'other'"),
        (_blob({**HEADER, "version": "3"}), "version is '3'"),
        (_blob({**HEADER, "version": 1}), "version"),
        (_blob({**HEADER, "layers": {}}), "layers"),
        (_blob({**HEADER, "layers": []}), "exactly one layer"),
        (_blob({**HEADER, "layers": [LAYER, LAYER]}), "exactly one layer"),
        (_blob(_layer(name="a")), "exactly one layer"),
        (_blob(_layer(extra=1)), "extra"),
        (_blob(_layer(kernel_shape=[3, 1])), "length 3"),
        (_blob(_layer(kernel_shape=[3, 1, 1.5])), "int"),
        (_blob(_layer(kernel_shape=[3, 1, 0])), "at least 1"),
        (_blob(_layer(kernel_shape=[3, True, 1])), "int"),
        (_blob(_layer(kernel_shape=[2, 1, 1])), "between 0 and 1"),
        (_blob(_layer(kernel_shape=[3, 1, 10**30])), "."),
        (_blob(_layer(kernel_shape=[3, 2**31, 1])), "too large for int32"),
        (_blob(_layer(groups=3)), "groups=3"),
        (_blob(_layer(groups=0)), "at least 1"),
        (_blob(_layer(fingerprint="0")), "fingerprint"),
        (_blob(data=np.array([5, 7.5], np.float32)), "fingerprint"),
        (_blob(data=np.array([5, 7], np.float64)), "'data' must be F32"),
        (_blob(data=np.array([[5, 7]], np.float32)), r"\(1, 2\)"),
        (_blob(data=np.array([5, np.nan], np.float32)), "1 NaN or infinite"),
        (_blob(data=np.array([5, np.inf], np.float32)), "1 NaN or infinite"),
        (_blob(data=np.array([5, 0], np.float32)), "zero"),
        (_blob(data=np.array([5], np.float32)), "same length"),
        (_blob(indices=np.array([1, 2], np.int64)), "'indices' must be I32"),
        (_blob(indices=np.array([-1, 2], np.int32)), "between 0 and 2, got -1"),
        (_blob(indices=np.array([1, 3], np.int32)), "between 0 and 2, got 1 to 3"),
        (_blob(indices=np.array([2, 1], np.int32)), "rise strictly"),
        (_blob(indptr=np.array([0, 3, 2], np.int32)), "fall"),
        (_blob(indptr=np.array([0, -2, 2], np.int32)), "fall"),
        (_blob(indptr=np.array([0, 1, 1], np.int32)), "indptr ends with 1"),
        (_blob(indptr=np.array([0, 2, 9], np.int32)), "indptr ends with 9"),
        (_blob(indptr=np.array([], np.int32)), r"\(K, 3\)"),
        (_blob(indptr=np.array([0, 2, 2], np.uint32)), "'indptr' must be I32"),
        (_blob(other=np.array([1], np.int32)), "no layer uses: other"),
        (safetensors.numpy.save({"data": TENSORS["data"]}, {"numbasparse": json.dumps(HEADER)}), "missing"),
    ],
)
def test_load_refuses(tmp_path: Path, blob: bytes, text: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=rf"cannot read '.*broken\.safetensors' as a .*{text}"):
        SparseWeight.load(path)


def test_load_many_refuses(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    tensors = {f"{i}.{name}": array for i in range(2) for name, array in TENSORS.items()}

    def write(layers: list[Any]) -> None:
        header = {"format": "numbasparse.SparseWeights", "version": "2", "layers": layers}
        path.write_bytes(safetensors.numpy.save(tensors, {"numbasparse": json.dumps(header)}))

    write([{**LAYER, "name": "a"}, {**LAYER, "name": "b"}])
    assert load_weights(path) == {"a": _small(), "b": _small()}
    write([{**LAYER, "name": "a"}, {**LAYER, "name": "a"}])
    with pytest.raises(ValueError, match="'a' occurs twice"):
        load_weights(path)
    write([{**LAYER, "name": "a"}])
    with pytest.raises(ValueError, match=r"no layer uses: 1\.data"):
        load_weights(path)
    write([{**LAYER, "name": "a"}, {**LAYER, "name": "b", "groups": 7}])
    with pytest.raises(ValueError, match=r"groups=7.*layer 'b'"):
        load_weights(path)


# ---- quantized weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "channels_per_table"), [(2, 0), (3, 0), (8, 0), (2, 4), (5, 6), (8, 1)])
def test_quantized_weight(bits: int, channels_per_table: int, tmp_path: Path) -> None:
    weight, plain = _coded(bits, channels_per_table), _weight()
    rows = np.repeat(np.arange(6), np.diff(plain.indptr))
    codes, levels = weight.codes, weight.levels
    assert codes is not None
    assert levels is not None
    assert weight.codebook is not None
    if isinstance(levels, LinearLevels):
        expected = (rows + 1) * (codes.astype(np.float32) - 1)
    else:
        expected = levels.entries[rows // channels_per_table, codes] * 2
    np.testing.assert_array_equal(weight.data, expected.astype(np.float32))
    np.testing.assert_array_equal(weight.to_scipy().data, weight.data)
    np.testing.assert_array_equal(weight.to_dense()[plain.to_dense() != 0], weight.data)
    used = weight.codebook[rows if len(weight.codebook) > 1 else 0, codes]
    np.testing.assert_array_equal(used, weight.data)
    assert weight.nnz == plain.nnz
    packed = -(-weight.nnz * bits // 8)
    assert weight.nbytes == packed + 2 * weight.nnz + 4 * 7 + sum(a.nbytes for a in levels.arrays.values())
    kind = "linear" if channels_per_table == 0 else "codebook"
    assert repr(weight).endswith(f"%, {kind} {bits} bits)")
    assert plain.codes is plain.codebook is plain.levels is None
    weight.save(tmp_path / "w")
    for again in (SparseWeight.load(tmp_path / "w"), pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        assert again == weight
        assert hash(again) == hash(weight)
        assert again.nbytes == weight.nbytes
        np.testing.assert_array_equal(again.codes, codes)
        for array in (again.data, *again.levels.arrays.values()):  # type: ignore[union-attr]
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


@pytest.mark.parametrize("weight", [_weight(), _coded(3, 0), _coded(2, 4)], ids=str)
def test_encoded(weight: SparseWeight) -> None:
    encoded = weight.encoded()
    assert encoded.dtype == (np.float32 if weight.levels is None else np.uint8)
    places = weight.indices, weight.indptr, weight.kernel_shape, weight.groups
    assert SparseWeight.from_encoded(encoded, *places) == weight
    if weight.levels is None:
        return
    for broken in (encoded[:-1], encoded[:0], np.zeros(9, np.uint8)):
        with pytest.raises(ValueError, match="truncated or corrupt"):
            SparseWeight.from_encoded(broken, *places)
    with pytest.raises(ValueError, match=r"must have \d+ bytes for 8 codes"):
        SparseWeight.from_encoded(encoded, np.arange(8, dtype=np.int32), *places[1:])


def test_quantized_weight_of_many_columns(tmp_path: Path) -> None:
    for width in (1 << 16, (1 << 16) + 1):
        indices, indptr = np.array([3, width - 1], np.int32), np.array([0, 2], np.int32)
        levels = CodebookLevels(2, np.ones((1, 4), np.float32))
        weight = SparseWeight(np.array([0, 3], np.uint8), indices, indptr, (width, 1, 1), 1, levels)
        np.testing.assert_array_equal(weight.indices, indices)
        assert weight.indices.dtype == np.int32
        weight.save(tmp_path / "w")
        assert SparseWeight.load(tmp_path / "w") == weight
        assert weight.nbytes == 1 + (4 if width <= 1 << 16 else 8) + 8 + 4 * 4 + 4


def test_quantized_equality() -> None:
    weight = _coded(3, 0)
    assert weight == _coded(3, 0)
    decoded = SparseWeight.from_dense(weight.to_dense(), 2)
    assert isinstance(weight.levels, LinearLevels)
    other_scale = weight.scaled(np.full(6, 2.0))
    others = [decoded, _coded(3, 4), _coded(4, 0), other_scale, _weight()]
    assert all(weight != other for other in others)
    assert len({w.fingerprint for w in (weight, *others)}) == len(others) + 1


@pytest.mark.parametrize("weight", [_weight(), _coded(3, 0), _coded(2, 4), _coded(4, 6)], ids=str)
def test_scaled(weight: SparseWeight) -> None:
    factors = np.array([2, -0.5, 0, 1, 3, 0.25])
    scaled = weight.scaled(factors)
    np.testing.assert_allclose(scaled.to_dense(), weight.to_dense() * factors[:, None, None, None], rtol=1e-6)
    assert (scaled.levels is None) == (weight.levels is None)
    assert scaled.nnz == weight.nnz - (weight.indptr[3] - weight.indptr[2])
    with pytest.raises(ValueError, match=r"factors must have shape \(6,\)"):
        weight.scaled(factors[:5])
    with pytest.raises(ValueError, match="finite"):
        weight.scaled(factors + np.inf)
    with pytest.raises(ValueError, match=r"beyond the range of float32|finite"):
        weight.scaled(factors + 1e40)


def _reject(text: str, change: dict[str, Any], error: type[Exception] = ValueError) -> None:
    weight = _coded(2, 0)
    arguments: dict[str, Any] = {
        "data": weight.codes,
        "indices": weight.indices,
        "indptr": weight.indptr,
        "kernel_shape": weight.kernel_shape,
        "groups": 2,
        "levels": weight.levels,
    }
    with pytest.raises(error, match=text):
        SparseWeight(**arguments | change)


def test_constructor_refuses_codes() -> None:
    codes = _coded(2, 0).codes
    assert codes is not None
    _reject("codes of 2 bits must be below 4, got 7", {"data": codes | 4})
    _reject("stored values are zero", {"data": np.full_like(codes, 1)})
    _reject("indptr ends with", {"data": codes[:-1], "indices": _coded(2, 0).indices[:-1]})
    _reject("data must be an ndarray of uint8", {"data": codes.astype(np.float32)}, TypeError)
    _reject("levels must be LinearLevels, CodebookLevels or None", {"levels": 4}, TypeError)
    six = np.ones(5, np.float32)
    _reject("scale must have 1 value or one for each of 6", {"levels": LinearLevels(2, six, np.ones(1, np.uint8))})
    _reject("need 2 codebooks, got 1", {"levels": CodebookLevels(2, np.ones((1, 4), np.float32), 4)})
    huge = CodebookLevels(2, np.full((1, 4), 3e38, np.float32), scale=np.full(1, 3e38, np.float32))
    _reject("NaN or infinite", {"levels": huge})


def test_quantized_file_is_as_documented(tmp_path: Path) -> None:
    codes, described = np.array([3, 2], np.uint8), {"kind": "linear", "bits": 3, "channels_per_table": 0}
    levels = LinearLevels(3, np.array([0.5], np.float32), np.array([1], np.uint8))
    weight = SparseWeight(codes, TENSORS["indices"], TENSORS["indptr"], (3, 1, 1), 1, levels)

    def write(name: str, levels: Any = described, **changes: Any) -> Path:
        tensors = {
            "codes": pack_codes(codes, 3),
            "scale": np.array([0.5], np.float32),
            "zero": np.array([1], np.uint8),
            "indices": TENSORS["indices"].astype(np.uint16),
            "indptr": TENSORS["indptr"],
        }
        layer = {**LAYER, "fingerprint": weight.fingerprint, "levels": levels}
        metadata = {"numbasparse": json.dumps({**HEADER, "layers": [layer]})}
        (tmp_path / name).write_bytes(safetensors.numpy.save(tensors | changes, metadata))
        return tmp_path / name

    good = write("good")
    assert SparseWeight.load(good) == weight
    weight.save(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == good.read_bytes()
    for text, path in {
        "must have 1 bytes for 2 codes, got 2": write("a", codes=np.zeros(2, np.uint8)),
        "bits must be an int from 2 to 8, got 9": write("b", {**described, "bits": 9}),
        "kind": write("c", {**described, "kind": "other"}),
        "tensor 'entries' is missing": write("d", {**described, "kind": "codebook"}),
        "'zero' must be U8": write("e", zero=np.array([1], np.int32)),
        "finite": write("f", scale=np.array([np.nan], np.float32)),
        "scale must": write("g", scale=np.array([], np.float32)),
        "fingerprint differs": write("h", scale=np.array([0.25], np.float32)),
        "are zero": write("i", zero=np.array([3], np.uint8)),
        "'indices' must be U16": write("k", indices=TENSORS["indices"]),
        "no layer uses: more": write("j", more=np.array([3], np.uint8)),
    }.items():
        with pytest.raises(ValueError, match=rf"cannot read '.*{path.name}' as .*{text}"):
            SparseWeight.load(path)


# ---- fuzzing the readers: whatever the bytes, the answer is right or a ValueError ---------------------------


def _saved(path: Path, many: bool) -> tuple[bytes, Callable[[], Any], Any]:
    """The bytes of a good file, a function that reads `path`, and what the good file holds."""
    if many:
        weights = {"a": _small(), "b": _weight(), "c": _coded(3, 0), "d": _coded(2, 4)}
        save_weights(path, weights)
        return path.read_bytes(), lambda: load_weights(path), weights
    _weight().save(path)
    return path.read_bytes(), lambda: SparseWeight.load(path), _weight()


def _read_or_value_error(path: Path, blob: bytes, read: Callable[[], Any]) -> Any:
    path.write_bytes(blob)
    try:
        return read()
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError("the error does not name the file") from error
        return None


def _values(loaded: Any) -> list[SparseWeight]:
    return list(loaded.values()) if isinstance(loaded, dict) else [loaded]


@fuzz
@given(blob=st.binary(max_size=300), many=st.booleans())
def test_random_bytes(tmp_path: Path, blob: bytes, many: bool) -> None:
    _, read, _ = _saved(tmp_path / "f", many)
    assert _read_or_value_error(tmp_path / "f", blob, read) is None


@pytest.mark.parametrize("many", [False, True])
def test_truncations(tmp_path: Path, many: bool) -> None:
    good, read, _ = _saved(tmp_path / "f", many)
    for length in range(0, len(good), 3):
        assert _read_or_value_error(tmp_path / "f", good[:length], read) is None


@pytest.mark.parametrize("many", [False, True])
def test_bit_flips(tmp_path: Path, many: bool) -> None:
    """Only flips in a layer's name or in padding may go unseen: values never change silently."""
    good, read, expected = _saved(tmp_path / "f", many)
    rng = np.random.default_rng(0)
    for place in range(len(good)):
        blob = bytearray(good)
        blob[place] ^= 1 << int(rng.integers(8))
        loaded = _read_or_value_error(tmp_path / "f", bytes(blob), read)
        assert loaded is None or _values(loaded) == _values(expected)


@fuzz
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), min_size=1, max_size=4), many=st.booleans())
def test_mutated_headers(tmp_path: Path, edits: list[tuple[float, bytes]], many: bool) -> None:
    """Overwrite parts of the header and, so that it is looked at, set its length right."""
    good, read, expected = _saved(tmp_path / "f", many)
    end = 8 + int.from_bytes(good[:8], "little")
    header = bytearray(good[8:end])
    for place, text in edits:
        at = int(place * len(header))
        header[at : at + len(text)] = text
    blob = len(header).to_bytes(8, "little") + bytes(header) + good[end:]
    loaded = _read_or_value_error(tmp_path / "f", blob, read)
    assert loaded is None or _values(loaded) == _values(expected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@fuzz
@given(key=st.sampled_from([*HEADER, *LAYER]), value=JSON)
def test_mutated_metadata(tmp_path: Path, key: str, value: Any) -> None:
    header = {**HEADER, key: value} if key in HEADER else _layer(**{key: value})
    blob = _blob(header)
    loaded = _read_or_value_error(tmp_path / "f", blob, lambda: SparseWeight.load(tmp_path / "f"))
    assert loaded is None or loaded == _small()


@fuzz
@given(
    name=st.sampled_from(list(TENSORS)),
    values=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 3), max_size=4),
    bits=st.booleans(),
)
def test_mutated_tensors(tmp_path: Path, name: str, values: list[int], bits: bool) -> None:
    """`bits`: take the integers as the bits of floats, which gives NaNs, infinities and subnormals."""
    array = np.array(values, np.int32)
    if name == "data":
        array = array.view(np.float32) if bits else array.astype(np.float32)
    path = tmp_path / "f"
    loaded = _read_or_value_error(path, _blob(**{name: array}), lambda: SparseWeight.load(path))
    assert loaded is None or loaded == _small()
