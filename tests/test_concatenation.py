"""Dense blocks that use one buffer: the same results, fewer copies, and nothing where that would not be safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from numbasparse.models.rrdbnet import DenseBlock, RRDBNet
from numbasparse.nn import convert, load, save
from numbasparse.nn.concatenation import append, reserve, share_concatenations
from numbasparse.pruning import MagnitudePruning, prune_


def pruned(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    prune_(model, MagnitudePruning(sparsity=0.9, scope="layer"))
    return model.eval()


def targets(model: nn.Module) -> list[Any]:
    graphs = [m.graph for m in model.modules() if isinstance(m, fx.GraphModule)]
    return [node.target for graph in graphs for node in graph.nodes]


def test_a_dense_block_copies_each_part_once() -> None:
    net = pruned(nn.Sequential(DenseBlock(8, 4), DenseBlock(8, 4)))
    x = torch.randn(1, 8, 9, 10)
    model = convert(net, None, x)
    called = targets(model)
    assert called.count(reserve) == 2
    assert called.count(append) == 8
    assert torch.cat not in called
    for images in (1, 3):
        x = torch.randn(images, 8, 9, 10)
        with torch.inference_mode():
            assert torch.allclose(model(x), net(x), atol=1e-5)
        assert torch.allclose(model(x), net(x), atol=1e-5)
    x = torch.randn(1, 8, 9, 10, requires_grad=True)
    got, expected = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, net))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_whole_network_is_saved_and_exported(tmp_path: Path) -> None:
    net, x = pruned(RRDBNet(1, 8, 4)), torch.rand(1, 3, 8, 8)
    model = convert(net, None, x)
    assert append in targets(model)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert append in targets(loaded)
    exported = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        expected = net(x)
        for made in (model, loaded, exported):
            assert torch.allclose(made(x), expected, atol=1e-5)


def test_the_buffer() -> None:
    x, a, b = (torch.randn(1, c, 3, 4) for c in (2, 1, 3))
    with torch.no_grad():
        first = reserve(x, 4)
        second = append(first, a, 4)
        third = append(second, b, 3)
    assert torch.equal(third, torch.cat((x, a, b), 1))
    assert torch.equal(second, torch.cat((x, a), 1))
    assert first.data_ptr() == second.data_ptr() == third.data_ptr() != x.data_ptr()
    assert second.is_contiguous()


@pytest.mark.parametrize(
    ("x", "part"),
    [
        (torch.randn(2, 2, 3, 4), torch.randn(2, 1, 3, 4)),
        (torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 1, 3, 4)),
        (torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4, requires_grad=True)),
        (torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4, dtype=torch.float64)),
        (torch.randn(1, 2, 3, 4), torch.randn(1, 4, 3, 4)),
    ],
)
def test_where_there_is_no_buffer_torch_concatenates(x: Tensor, part: Tensor) -> None:
    room = reserve(x, 3)
    after = torch.full((1, 3, 3, 4), 7.0)
    joined = append(room, part, 3)
    assert torch.equal(joined, torch.cat((x, part), 1))
    assert joined.dtype == torch.cat((x, part), 1).dtype
    again = append(joined, after, 3 - part.shape[1]) if len(x) == 1 and joined.dtype == after.dtype else None
    assert again is None or torch.equal(again, torch.cat((x, part, after), 1))


def test_a_tensor_of_others_is_not_written_to() -> None:
    """The first channels of somebody's tensor look like the beginning of a buffer."""
    whole = torch.zeros(1, 5, 2, 2)
    with torch.no_grad():
        append(reserve(whole[:, :2], 3), torch.ones(1, 1, 2, 2), 3)
    assert not whole.any()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat((x, a), 1))
        return self.c(torch.cat((x, a, b), dim=1))


class Folded(Block):
    """Modules of its own after each convolution, which `convert` folds into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.ReLU(), nn.ReLU(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(self.a(x))
        b = self.second(self.norm(self.b(torch.cat((x, a), 1))))
        return self.c(torch.cat((x, a, b), 1))


def test_folded_modules_do_not_hide_a_dense_block() -> None:
    net, x = pruned(nn.Sequential(Folded())), torch.randn(1, 4, 5, 6)
    model = convert(net, None, x)
    assert targets(model).count(append) == 2
    with torch.inference_mode():
        assert torch.allclose(model(x), net(x), atol=1e-5)


class Changed(Block):
    """Something is changed in place after it was concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat((x, a), 1))
        a.add_(1.0)
        return self.c(torch.cat((x, a, b), dim=1))


class Kept(Block):
    """What is concatenated is given away."""

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        first = torch.cat((x, a), 1)
        return self.c(torch.cat((x, a, self.b(first)), dim=1)), first


class Twice(Block):
    """Two continue from the same beginning."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat((x, a), 1))
        return self.c(torch.cat((x, a, b), 1)) + self.c(torch.cat((x, a, a), 1))


class Along(Block):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.a(torch.cat((x, a), 2))
        return torch.cat((x, a, b), 2)


@pytest.mark.parametrize(("kind", "count"), [(Block, 1), (Changed, 0), (Kept, 0), (Twice, 0), (Along, 0)])
def test_what_is_left_as_it_is(kind: type[Block], count: int) -> None:
    torch.manual_seed(1)
    net = kind().eval()
    model = fx.symbolic_trace(net)
    assert share_concatenations(model.graph, dict(model.named_modules())) == bool(count)
    model.recompile()
    assert torch.cat in targets(model) or count
    with torch.inference_mode():
        x = torch.randn(1, 4, 5, 6)
        got, expected = model(x), net(x)
    for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, expected)), strict=True):
        assert torch.equal(one, other)
