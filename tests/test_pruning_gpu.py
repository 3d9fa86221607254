"""Pruning on a GPU: no synchronization in a step, captured steps, the same masks as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_pruning import assert_same, batches, small_model, snapshot, zeros  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from numbasparse.pruning import (  # noqa: E402
    ACDCSchedule,
    CubicSchedule,
    FitConfig,
    MagnitudePruning,
    OBSPruning,
    Pruner,
    SGDConfig,
    fit,
    prune_,
    prune_with_data_,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def data() -> list[tuple[Any, Any]]:
    return [(x.cuda(), y.cuda()) for x, y in batches(8)]


@pytest.mark.parametrize("scope", ["global", "layer", "uniform+", "erk", "lamp"])
@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("two_of_four", [False, True])
def test_masks_are_those_of_the_cpu(scope: Any, vector: int, two_of_four: bool) -> None:
    model, plain = small_model().cuda(), small_model()
    config = MagnitudePruning(0.8, scope, vector, two_of_four)
    prune_(model, config)
    prune_(plain, config)
    for name in ("2", "6"):
        kept, expected = (m.get_submodule(name).weight.detach().cpu() != 0 for m in (model, plain))
        # Means of vectors may differ by a rounding, and so one vector at the edge.
        assert int((kept != expected).sum()) <= (0 if vector == 1 else 2 * vector)


def test_a_step_between_updates_does_not_synchronize() -> None:
    model = small_model().cuda()
    pruner = Pruner(model, MagnitudePruning(0.8), CubicSchedule(0, 100, every=50))
    pruner.begin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.cuda.synchronize()
    pairs = data()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in pairs:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            pruner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("schedule", [CubicSchedule(0, 6, every=2), ACDCSchedule(1, 6, 2, 2)], ids=["cubic", "acdc"])
def test_a_captured_step_follows_the_schedule(schedule: Any) -> None:
    def make() -> tuple[Any, Any, Pruner]:
        model = small_model().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = Pruner(model, MagnitudePruning(0.8), schedule, optimizer=optimizer)
        pruner.begin()
        return model, optimizer, pruner

    model, optimizer, pruner = make()
    x, y = data()[0]

    def step(model: Any, optimizer: Any, pruner: Pruner) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.apply()

    start = snapshot(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer, pruner)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, pruner)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(start[key])
    plain = make()
    for _ in range(8):
        graph.replay()
        pruner.step(apply=False)
        step(*plain)
        plain[2].step(apply=False)
        assert zeros(model) == zeros(plain[0])
    assert pruner.finish().sparsity == pytest.approx(0.8, abs=1e-3)


def test_obs_and_fit_run() -> None:
    model = small_model().cuda()
    report = prune_with_data_(model, [x for x, _ in batches(16)], OBSPruning(0.7, "erk", 4))
    assert report.sparsity == pytest.approx(0.7, abs=0.02)
    torch.manual_seed(0)
    results = []
    for dtype in (torch.bfloat16, torch.float16):
        model = small_model()
        config = FitConfig(3, SGDConfig(lr=0.05), autocast=dtype, progress=False)
        history = fit(model, batches(), config, pruner=Pruner(model, MagnitudePruning(0.8)), device="cuda")
        results.append(history[-1].loss)
        assert sum(zeros(model)) == round(0.8 * (16 * 8 * 9 + 12 * 16))
    assert results[0] == pytest.approx(results[1], rel=0.1)


def test_resume_on_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(checkpoint: Any, stop: int | None) -> Any:
        torch.manual_seed(0)
        model = small_model()
        config = FitConfig(3, SGDConfig(lr=0.05), checkpoint=checkpoint, progress=False)

        def after_epoch(epoch: int, model: Any) -> dict[str, float]:
            if epoch == stop:
                raise KeyboardInterrupt
            return {}

        pruner = Pruner(model, MagnitudePruning(0.8, "lamp"), CubicSchedule(0, 8))
        fit(model, batches(), config, pruner=pruner, device="cuda", after_epoch=after_epoch)
        return model

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        straight = run(None, None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "c", 1)
        assert_same(run(tmp_path / "c", None), snapshot(straight))
    finally:
        torch.use_deterministic_algorithms(False)
