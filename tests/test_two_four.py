"""Packing to 2:4: nothing is lost on any mask, and the operands are what the instructions want."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tensor_emulation import opened, opened_dense, well_formed

from numbasparse.kernels import two_four

MASKS = ["random", "dense rows", "dense columns", "few rows", "empty", "full", "blocks of four"]


def matrix(kind: str, rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    """A float32 matrix whose values float16 and bfloat16 have exactly."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 128, (rows, columns)).astype(np.float32) * rng.choice([-1.0, 1.0], (rows, columns))
    mask = rng.random((rows, columns)) < density
    if kind == "dense rows":
        mask[rng.integers(0, rows, 1 + rows // 50)] = True
    elif kind == "dense columns":
        mask[:, rng.integers(0, columns, 1 + columns // 50)] = True
    elif kind == "few rows":
        mask[rng.random(rows) < 0.8] = False
    elif kind == "empty":
        mask[:] = False
    elif kind == "full":
        mask[:] = True
    elif kind == "blocks of four":
        mask = np.repeat(mask[:, ::4], 4, axis=1)[:, :columns]
    return np.where(mask, dense, 0).astype(np.float32)


def csr(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = sparse.csr_array(dense)
    return found.indptr.astype(np.int32), found.indices.astype(np.int32), found.data


def gathered(dense: np.ndarray, most_extra: float) -> tuple[two_four.Steps | str, np.ndarray]:
    indptr, indices, data = csr(dense)
    blocks = two_four.order_rows(indptr, indices, dense.shape[1])
    return two_four.gather_steps(indptr, indices, data, dense.shape[1], blocks, most_extra), blocks


def read_gathered(steps: two_four.Steps, blocks: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The matrix as tensor cores multiply with it."""
    back = np.zeros(shape, np.float32)
    registers = two_four.fragments(steps.values, dtype)
    for block, rows in enumerate(blocks):
        for step in range(steps.first[block], steps.first[block + 1]):
            part = opened(registers[step], steps.metadata[step], dtype)
            there = steps.columns[step] >= 0
            assert not part[rows < 0].any()
            assert not part[:, ~there].any()
            back[np.ix_(rows[rows >= 0], steps.columns[step][there])] += part[np.ix_(rows >= 0, there)]
    return back


@given(
    kind=st.sampled_from(MASKS),
    rows=st.integers(1, 150),
    columns=st.integers(1, 90),
    density=st.sampled_from([0.001, 0.02, 0.1, 0.2, 0.5]),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
@settings(max_examples=40, deadline=None)
def test_gathering_loses_nothing(kind: str, rows: int, columns: int, density: float, seed: int, dtype: str) -> None:
    dense = matrix(kind, rows, columns, density, seed)
    steps, blocks = gathered(dense, 1.0)
    assert isinstance(steps, two_four.Steps)
    assert sorted(blocks[blocks >= 0]) == list(range(rows))
    assert well_formed(steps.metadata)
    np.testing.assert_array_equal(read_gathered(steps, blocks, dense.shape, dtype), dense)


@pytest.mark.parametrize(("density", "most"), [(0.2, 0.03), (0.1, 0.01), (0.05, 0.01), (0.02, 0.01), (0.001, 0.01)])
def test_random_masks_need_few_extra_columns(density: float, most: float) -> None:
    dense = matrix("random", 256, 64 * 9, density, 1)
    steps, _ = gathered(dense, most)
    assert isinstance(steps, two_four.Steps)


def test_too_few_zeros() -> None:
    dense = matrix("full", 64, 96, 1.0, 0)
    refused, _ = gathered(dense, 0.5)
    assert isinstance(refused, str)
    assert "at most 50 % extra columns (96 columns of 64-row blocks are needed): it has too few zeros" in refused
    taken, _ = gathered(dense, 1.0)
    assert isinstance(taken, two_four.Steps)
    assert taken.count == 6


def test_rows_are_ordered_for_empty_columns() -> None:
    rng = np.random.default_rng(0)
    # Two kinds of rows that use different halves of the columns, mixed, and dead rows among them.
    dense = np.zeros((192, 128), np.float32)
    kinds = rng.permutation(np.repeat([0, 1, 2], 64))
    for kind in range(2):
        dense[np.ix_(kinds == kind, np.arange(64) + 64 * kind)] = rng.random((64, 64)) < 0.5
    indptr, indices, _ = csr(dense)
    blocks = two_four.order_rows(indptr, indices, 128)
    assert [set(kinds[rows]) for rows in blocks[:2]] in ([{0}, {1}], [{1}, {0}])
    assert set(kinds[blocks[2]]) == {2}
    steps, _ = gathered(dense, 1.0)
    assert isinstance(steps, two_four.Steps)
    assert steps.first[-1] == steps.first[-2]


def octets_of(columns: int, parts: int) -> int:
    """Of a part, a multiple of four."""
    return -(-columns // 32 // parts) * 4


def covered(dense: np.ndarray, parts: int, aligned: bool = False) -> tuple[two_four.Steps, two_four.Rest]:
    """Rows cut into blocks of 64, columns into ``parts`` ranges of whole steps."""
    octets = octets_of(dense.shape[1], parts)
    row, column = np.nonzero(dense)
    part = row // 64 * parts + column // 8 // octets
    total = -(-len(dense) // 64) * parts
    arguments = (part, row % 64, column // 8 % octets, column % 8, dense[row, column], total, octets)
    return two_four.cover_steps(*arguments, aligned)


def read_covered(
    steps: two_four.Steps, rest: two_four.Rest, shape: tuple[int, int], parts: int, dtype: str
) -> np.ndarray:
    octets = octets_of(shape[1], parts)
    back = np.zeros((-(-shape[0] // 64) * 64, octets * 8 * parts), np.float32)
    registers, rest_registers = (two_four.fragments(a.values, dtype) for a in (steps, rest))
    for part in range(len(steps.first) - 1):
        here = back[part // parts * 64 :, part % parts * octets * 8 :][:64, : octets * 8]
        for step in range(steps.first[part], steps.first[part + 1]):
            start, distance = steps.columns[step]
            assert 0 <= start <= start + 3 * distance < octets
            product = opened(registers[step], steps.metadata[step], dtype)
            for j in range(4):
                at = (start + j * distance) * 8
                here[:, at : at + 8] += product[:, j * 8 : j * 8 + 8]
        for chunk in range(rest.first[part], rest.first[part + 1]):
            product = opened_dense(rest_registers[chunk], dtype)
            for row in range(64):
                np.add.at(here[row], rest.columns[chunk, row // 16], product[row])
    return back[: shape[0], : shape[1]]


@given(
    kind=st.sampled_from(MASKS),
    rows=st.integers(1, 130),
    columns=st.integers(1, 200),
    parts=st.integers(1, 3),
    density=st.sampled_from([0.001, 0.02, 0.1, 0.2, 0.5]),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    aligned=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_covering_loses_nothing(
    kind: str, rows: int, columns: int, parts: int, density: float, seed: int, dtype: str, aligned: bool
) -> None:
    dense = matrix(kind, rows, columns, density, seed)
    steps, rest = covered(dense, parts, aligned)
    if aligned:
        assert (steps.columns % [4, 2] == [0, 1]).all()
        assert (rest.columns[..., ::2] % 2 == 0).all()
        assert (rest.columns[..., 1::2] == rest.columns[..., ::2] + 1).all()
    assert well_formed(steps.metadata)
    np.testing.assert_array_equal(read_covered(steps, rest, dense.shape, parts, dtype), dense)


@pytest.mark.parametrize(("density", "chunks"), [(0.2, 6), (0.1, 1), (0.02, 0)])
def test_few_steps_and_a_small_rest(density: float, chunks: int) -> None:
    steps, rest = covered(matrix("random", 64, 288, density, 2), 1)
    assert steps.count <= 9 + (density < 0.1)
    assert rest.count <= chunks


def test_rows_of_the_rest_meet_different_banks() -> None:
    _, rest = covered(matrix("random", 64, 288 * 4, 0.2, 2), 4)
    different = [len(set(chunk)) for chunk in rest.columns.reshape(-1, 8) % 8]
    assert min(different) >= 4
    # Columns in a random order would have 5.25 of 8.
    assert np.mean(different) > 6.5


def test_pairs_of_the_rest_meet_different_banks() -> None:
    _, rest = covered(matrix("random", 64, 288 * 4, 0.2, 2), 4, aligned=True)
    different = [len(set(chunk)) for chunk in rest.columns.reshape(-1, 8)[:, ::2] // 2 % 4]
    # Pairs in a random order would have 2.7 of 4.
    assert np.mean(different) > 3.4


@pytest.mark.parametrize(("density", "chunks"), [(0.2, 9), (0.1, 3), (0.05, 1), (0.02, 0)])
def test_an_aligned_rest_is_small(density: float, chunks: int) -> None:
    steps, rest = covered(matrix("random", 64, 288, density, 2), 1, aligned=True)
    assert steps.count <= 9 + (density > 0.1)
    assert rest.count <= chunks


@pytest.mark.parametrize("aligned", [False, True])
def test_dense_takes_every_octet_twice(aligned: bool) -> None:
    steps, rest = covered(matrix("full", 64, 288, 1.0, 3), 1, aligned)
    assert (steps.count, rest.count) == (18, 0)


def test_equal_input_gives_equal_output() -> None:
    dense = matrix("random", 200, 300, 0.2, 4)
    for made, again in (
        (gathered(dense, 1.0)[0], gathered(dense, 1.0)[0]),
        *zip(covered(dense, 2), covered(dense, 2), strict=True),
        *zip(covered(dense, 2, True), covered(dense, 2, True), strict=True),
    ):
        for name, array in vars(made).items():
            np.testing.assert_array_equal(array, vars(again)[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_to_nearest(dtype: str) -> None:
    import torch

    values = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(two_four.narrow(values, dtype), expected)
