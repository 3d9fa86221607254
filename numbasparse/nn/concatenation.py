"""Dense blocks without their copies: where each convolution sees the outputs of all before it.

``torch.cat((x, a), 1)``, ``torch.cat((x, a, b), 1)`` and so on copy ``x`` again for each.  Here all of them are the
beginnings of one buffer, into which every part is copied once.  That needs one image: then the first channels of a
buffer lie in memory as a tensor of their own would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from numbasparse.nn.epilogue import changes_nothing
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.plain import is_plain
from numbasparse.runtime import memory


def reserve(x: Tensor, more: int) -> Tensor:
    """Return ``x`` (N, C, H, W); if it is `_usable`, as the beginning of a buffer with room for ``more`` channels."""
    if has_torch_function((x,)):  # as torch's own functions do, for those who trace
        traced: Tensor = handle_torch_function(reserve, (x,), x, more)
        return traced
    if not _usable(x):
        return x
    n, c, h, w = x.shape
    shape = (n, c + more, h, w)
    buffer = memory.empty_tensor(shape) if x.dtype is torch.float32 else x.new_empty(shape)
    return buffer[:, :c].copy_(x)


def append(x: Tensor, part: Tensor, capacity: int) -> Tensor:
    """Return ``torch.cat((x, part), 1)``: in the buffer that ``x`` is the beginning of, if it is.

    ``x`` comes from `reserve` or from here, and nothing was appended to it before; ``capacity`` is how many channels
    still had room behind it.
    """
    if has_torch_function((x, part)):
        traced: Tensor = handle_torch_function(append, (x, part), x, part, capacity)
        return traced
    n, c, h, w = x.shape
    plane = h * w * x.element_size()
    k = part.shape[1] if part.dim() == 4 else 0
    fits = part.shape == (n, k, h, w) and part.dtype == x.dtype and part.device == x.device and 0 < k <= capacity
    whole = x.storage_offset() == 0 and x.untyped_storage().nbytes() == (c + capacity) * plane if _usable(x) else False
    if not (fits and whole and _usable(part)):
        return torch.cat((x, part), 1)
    grown = x.as_strided((n, c + k, h, w), ((c + k) * h * w, h * w, w, 1))
    grown[:, c:].copy_(part)
    return grown


def _usable(x: Tensor) -> bool:
    """Whether it is one image that `is_plain`."""
    return is_plain(x) and x.shape[0] == 1


# ---- graphs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chain:
    """Concatenations, each of which has one part more than the one before; and the channels of each part added."""

    start: fx.Node
    nodes: tuple[fx.Node, ...]
    added: tuple[fx.Node, ...]
    channels: tuple[int, ...]


def share_concatenations(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Let the dense blocks of a graph use one buffer each; tells whether there were any.

    They are left as they are if anything in the graph may change a tensor in place, or if others than convolutions
    see what is concatenated: they could keep it, and with it the whole buffer.
    """
    chains = _chains(graph, modules)
    for chain in chains:
        _rewrite(graph, chain)
    graph.lint()
    return bool(chains)


def _chains(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[_Chain]:
    joins: dict[tuple[fx.Node, ...], fx.Node] = {p: node for node in graph.nodes if (p := _parts(node)) is not None}
    if len(joins) < 2 or not all(_harmless(node, modules) for node in graph.nodes):
        return []
    chains, starts = [], [parts for parts in joins if parts[:-1] not in joins and len(parts) == 2]
    for parts in starts:
        line: list[tuple[fx.Node, ...]] = [parts]
        while following := [other for other in joins if other[:-1] == line[-1]]:
            if len(following) > 1:
                break  # both would be written to the same place
            line += following
        nodes, added = [joins[p] for p in line], [p[-1] for p in line]
        channels = [_channels(node, modules) for node in added]
        if len(line) > 1 and all(channels) and all(_only_convolved(node, modules) for node in nodes):
            chains.append(_Chain(parts[0], tuple(nodes), tuple(added), tuple(channels)))
    return chains


def _parts(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """What a node concatenates along channels, if it does that."""
    if node.op != "call_function" or node.target is not torch.cat or not node.args:
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors = given.get("tensors")
    if set(given) != {"tensors", "dim"} or given["dim"] != 1 or not isinstance(tensors, Sequence):
        return None
    nodes = tuple(t for t in tensors if isinstance(t, fx.Node))
    return nodes if len(nodes) == len(tensors) else None


def _harmless(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "output" or _parts(node) is not None or changes_nothing(node, modules)


def _convolution(node: fx.Node, modules: Mapping[str, nn.Module]) -> SparseConv2d | nn.Conv2d | None:
    """The convolution that a node calls, if it calls one."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, (SparseConv2d, nn.Conv2d)) else None


def _channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """Channels of a convolution's result; 0 if it is something else's."""
    if node.op == "call_module" and type(modules[str(node.target)]) is nn.Identity:
        before = node.args[0]  # `convert` leaves these of modules that it folded
        return _channels(before, modules) if isinstance(before, fx.Node) else 0
    module = _convolution(node, modules)
    return 0 if module is None else module.out_channels


def _only_convolved(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether only convolutions see a value, as what they convolve."""
    return all(
        _convolution(user, modules) is not None and user.args[0] is node and node not in user.args[1:]
        for user in node.users
    )


def _rewrite(graph: fx.Graph, chain: _Chain) -> None:
    room = sum(chain.channels)
    with graph.inserting_before(chain.nodes[0]):
        before = graph.call_function(reserve, (chain.start, room))
    for node, part, channels in zip(chain.nodes, chain.added, chain.channels, strict=True):
        with graph.inserting_before(node):
            joined = graph.call_function(append, (before, part, room))
        room -= channels
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        before = joined
    for node in reversed(chain.nodes):
        graph.erase_node(node)
