"""Models captured on the CPU: the same results, no Python of their own, memory that is planned, weights once."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.cli.models import captured_or_said
from numbasparse.models.rrdbnet import RRDBNet
from numbasparse.nn import Program, SparseConv2d, SparseLinear, capture, clear_cache, convert
from numbasparse.nn.placing import Piece, place
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.pruning import MagnitudePruning, prune_
from numbasparse.runtime import cpu, openmp


def sparse(c: int, k: int, size: int = 3, activation: str | None = None, **options: Any) -> SparseConv2d:
    conv = nn.Conv2d(c, k, size, padding=size // 2, **options)
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.3)
    return SparseConv2d.from_conv(conv, choice="cpu_direct", activation=activation)


def check(model: nn.Module, *example: Tensor, jobs: list[int] | None = None) -> Program:
    """A program of the model gives what the model gives, again and again, in results that stay as they are."""
    program = capture(model, *example)
    assert isinstance(program, Program)
    assert jobs is None or program.jobs == jobs
    kept = []
    for _ in range(3):
        inputs = [torch.randn_like(x) for x in example]
        with torch.inference_mode():
            kept.append((program(*inputs), model(*inputs)))
    for got, expected in kept:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return program


class Block(nn.Module):
    """Residuals, views, changes in place, shapes asked for, several results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c = sparse(8, 8, activation="relu"), sparse(8, 8), sparse(16, 8, 1)
        self.inplace = nn.ReLU(inplace=True)
        self.head = sparse(4, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        y = self.b(self.a(x), x)  # the residual is not a job's
        z = self.inplace(self.b(y, y)) + 1
        halves = torch.cat([y, z], 1)
        w = self.a(self.c(halves))
        first, second = w.chunk(2, 1)
        n, c, h, v = w.shape
        flat = w.view(n, c, h * v).mean(-1)
        return {"map": self.head(first.contiguous()), "parts": (second, [flat * c]), "same": w, "size": h}


def test_of_everything() -> None:
    torch.manual_seed(0)
    check(Block(), torch.randn(2, 3, 9, 11))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neighbours_are_one_series(threads: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = nn.Sequential(
            *(sparse(16, 16, size, "relu") for size in (3, 1, 3, 1, 3)), nn.MaxPool2d(2), sparse(16, 4)
        )
        program = check(model, torch.randn(1, 16, 20, 20), jobs=[5, 1])
        pools = nn.Sequential(sparse(16, 16), SeparableMaxPool2d(3, 2, 1), sparse(16, 8), SeparableMaxPool2d((1, 2)))
        check(pools, torch.randn(2, 16, 21, 13), jobs=[4])
        x = torch.randn(1, 16, 20, 20)
        with torch.inference_mode():
            expected = model(x)
            for _ in range(200):
                assert torch.equal(program(x), expected)
    finally:
        torch.set_num_threads(before)


def test_without_a_runtime_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "loaded", lambda: None)
    torch.manual_seed(0)
    check(nn.Sequential(sparse(3, 8), sparse(8, 8)), torch.randn(1, 3, 8, 8), jobs=[2])


def test_every_cpu_kernel() -> None:
    torch.manual_seed(0)
    names = ["cpu_pointwise", "cpu_columns", "cpu_direct"]
    convs = [sparse(12, 12, 1) for _ in names]
    for conv, name in zip(convs, names, strict=True):
        conv.choice = name

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(convs)

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = conv(conv(x), x)
            return x

    check(Residual(), torch.randn(2, 12, 7, 9), jobs=[6])


def test_linear_layers_of_one_vector_are_jobs() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(36, 40), nn.Linear(40, 8)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    first, second = (SparseLinear.from_linear(layer, choice="cpu_vector") for layer in layers)
    model = nn.Sequential(sparse(2, 4), nn.Flatten(1), first, nn.Identity(), second)
    check(model, torch.randn(1, 2, 3, 3), jobs=[3])
    check(model, torch.randn(3, 2, 3, 3), jobs=[1])  # several vectors are transposed: not jobs


@pytest.mark.parametrize("shape", [(70, 9), (64, 1), (200, 33), (3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_linear_layers_of_one_vector_are_jobs(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    c, k = shape
    check(nn.Linear(c, k, bias=bias), torch.randn(1, c), jobs=[1])
    check(nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, k, bias=bias)), torch.randn(1, 1, c), jobs=[1, 1])
    check(nn.Linear(c, k, bias=bias), torch.randn(2, c), jobs=[])
    check(nn.Linear(c, k, bias=bias).double(), torch.randn(1, c, dtype=torch.float64), jobs=[])


def test_poolings_of_single_values_are_no_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sparse(3, 4), nn.AdaptiveAvgPool2d(5), nn.Flatten(1), nn.Linear(100, 6))
    check(model, torch.randn(1, 3, 5, 5), jobs=[2])
    check(model, torch.randn(1, 3, 10, 10), jobs=[1, 1])


def test_a_converted_network_with_shared_concatenations() -> None:
    torch.manual_seed(0)
    net = RRDBNet(1, 8, 4).eval()
    prune_(net, MagnitudePruning(sparsity=0.9, scope="layer"))
    check(convert(net, None, torch.rand(1, 3, 8, 8)), torch.rand(1, 3, 8, 8))


def test_no_sparse_layer_at_all_and_other_types() -> None:
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 6, 6), jobs=[])
    half = nn.Sequential(sparse(3, 4), sparse(4, 4))
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    program = capture(half, x)
    with torch.inference_mode():
        assert torch.equal(program(x), half(x))
    assert program(x).dtype == torch.float64


def test_weights_are_there_once_when_the_model_is_gone() -> None:
    torch.manual_seed(0)
    clear_cache()
    model = nn.Sequential(sparse(4, 8), sparse(8, 8))
    x = torch.randn(1, 4, 9, 9)
    program = capture(model, x)
    with torch.inference_mode():
        expected = program(x)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None
    with torch.inference_mode():
        junk = torch.full((1 << 18,), float("nan"))
        assert torch.equal(program(x), expected)
        del junk


def test_memory_is_used_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse(8, 8) for _ in range(12)))
    program = capture(model, torch.randn(1, 8, 16, 16))
    (storage,) = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(program)}.values()
    assert storage == 2 * 4 * 8 * 16 * 16


def tensors(program: Program) -> list[Tensor]:
    return [value for value in program._constants if isinstance(value, Tensor)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12), st.integers(0, 5)), max_size=25))
def test_places_do_not_overlap(given_pieces: list[tuple[int, int, int]]) -> None:
    pieces = [Piece(64 * size, first, first + length) for size, first, length in given_pieces]
    whole = place(pieces)
    held = np.zeros((20, whole // 64 + 1), int)
    for piece in pieces:
        assert piece.offset % 64 == 0
        assert piece.offset + piece.nbytes <= whole
        held[piece.first : piece.last + 1, piece.offset // 64 : (piece.offset + piece.nbytes) // 64] += 1
    assert held.max(initial=0) <= 1
    assert whole <= sum(piece.nbytes for piece in pieces)


def test_calls_from_several_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sparse(8, 8), nn.ReLU(), sparse(8, 8))
    program = capture(model, torch.randn(1, 8, 12, 12))
    failed: list[Exception] = []

    def work(seed: int) -> None:
        x = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(seed))
        try:
            with torch.inference_mode():
                expected = model(x)
                for _ in range(30):
                    assert torch.equal(program(x), expected)
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_series_of_jobs_waits_for_each() -> None:
    states = cpu.series_states(3, 4)
    assert states.shape == (3, 6, 8)
    assert (states[:, 0, 0] == 1 << 17).all()
    assert states.sum() == 3 << 17


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = sparse(3, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = sparse(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else F.relu(self.conv(x))


def test_what_cannot_be_captured() -> None:
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(ValueError, match=r"Deciding cannot be captured: torch.fx cannot trace it .* the model itself"):
        capture(Deciding(), x)
    with pytest.raises(RuntimeError, match="Stateful cannot be captured: what was recorded gives something else"):
        capture(Stateful(), x)


def test_commands_say_what_cannot_be_captured(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 3, 6, 6)
    model = Deciding()
    assert captured_or_said(model, x) is None
    assert capsys.readouterr().out.startswith("not captured: Deciding cannot be captured")
    assert isinstance(captured_or_said(model.conv, x), Program)


def test_what_a_call_refuses() -> None:
    program = capture(sparse(3, 4), torch.randn(1, 3, 6, 6))
    with pytest.raises(ValueError, match=r"input 0 must be \(1, 3, 6, 6\), torch.float32, .* got \(1, 3, 6, 7\)"):
        program(torch.randn(1, 3, 6, 7))
    with pytest.raises(ValueError, match=r"torch\.float64: capture the model once for each shape"):
        program(torch.randn(1, 3, 6, 6, dtype=torch.float64))
    for wrong in ((), (torch.randn(1, 3, 6, 6),) * 2, (np.zeros((1, 3, 6, 6)),)):
        with pytest.raises(TypeError, match="expected 1 tensors on the CPU"):
            program(*wrong)  # type: ignore[arg-type]


def test_inputs_in_another_order_in_memory_and_within_inference_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sparse(3, 8), sparse(8, 8))
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, 8)
        program = capture(model, x)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(program(last), model(x))
