"""Arrays in kept memory: one owner at a time, and nothing is kept beyond the limit."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from numbasparse.runtime import memory
from numbasparse.runtime.memory import Blocks, empty, empty_tensor

GRAIN = 1 << 21


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocks]:
    made = Blocks(16 * GRAIN)
    monkeypatch.setattr(memory, "blocks", made)
    yield made
    gc.collect()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_blocks_are_used_again() -> None:
    blocks = Blocks(8 * GRAIN)
    first = blocks.take(2 * GRAIN + 1)
    assert len(first) == 3 * GRAIN
    blocks.give(first)
    assert blocks.nbytes == 3 * GRAIN
    for size in (3 * GRAIN, 2 * GRAIN):
        assert blocks.take(size) is first
        blocks.give(first)
    assert blocks.take(GRAIN) is not first  # a much larger block would be wasted
    assert blocks.take(5) is not first
    blocks.clear()
    assert blocks.nbytes == 0


def test_the_oldest_go_when_there_are_too_many() -> None:
    blocks = Blocks(4 * GRAIN)
    made = [blocks.take(size * GRAIN) for size in (1, 2, 3)]
    for block in made:
        blocks.give(block)
    assert blocks.nbytes == 3 * GRAIN
    assert blocks.take(3 * GRAIN) is made[2]
    huge = blocks.take(9 * GRAIN)
    blocks.give(huge)
    assert blocks.nbytes == 0


def test_memory_goes_back_with_the_last_view(fresh: Blocks) -> None:
    array = empty((2, 1 << 20))
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == (
        (2, 1 << 20),
        np.float32,
        True,
        True,
    )
    place = address(array)
    view = array[1, 5:].reshape(-1)
    array[1] = 7.0
    del array
    other = empty((2, 1 << 20))
    assert address(other) != place
    other[:] = 0.0
    assert (view == 7.0).all()
    del view
    assert address(empty((2, 1 << 20))) == place
    assert fresh.nbytes == 4 * GRAIN


def test_tensors_too(fresh: Blocks) -> None:
    tensor = empty_tensor((1, 4, 512, 512))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((1, 4, 512, 512), torch.float32, True)
    place, part = tensor.data_ptr(), tensor[:, 1:].detach()
    del tensor
    assert fresh.nbytes == 0
    with torch.inference_mode():
        assert empty_tensor((1, 4, 512, 512)).data_ptr() != place
    del part
    assert empty_tensor((1 << 20,)).data_ptr() == place
    assert not isinstance(empty((4, 4)).base, memory._Owner)
    assert empty_tensor((4, 4)).shape == (4, 4)
    assert empty((0, 5)).shape == (0, 5)


def test_threads_never_share() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(30):
            array = empty((1 + (number + turn) % 3, 1 << 18))
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_its_own(fresh: Blocks) -> None:
    kept = empty((1 << 18,))
    kept[:] = 1.0
    free = empty((1 << 18,))
    place = address(free)
    del free
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the child will not have
        child = os.fork()
    if child == 0:
        again = empty((1 << 18,))
        again[:] = kept[:] = 2.0
        os._exit(0 if address(again) == place else 1)
    again = empty((1 << 18,))
    again[:] = 3.0
    assert os.waitpid(child, 0)[1] == 0
    assert (again == 3.0).all()
    assert (kept == 1.0).all()


def test_too_much() -> None:
    with pytest.raises(MemoryError, match=r"no memory for an array of \d+ bytes"):
        empty((1 << 55,))
