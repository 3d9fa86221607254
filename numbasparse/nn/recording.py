"""One run of a model's graph on an example, looked at node by node: what `numbasparse.nn.program` is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from numbasparse.nn.linear import SparseLinear
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.plain import threads
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.runtime import memory
from numbasparse.runtime.cpu_gemv import gemv_job
from numbasparse.runtime.cpu_max_pool import max_pool_job
from numbasparse.runtime.job import Job

_SHAPE_METHODS = ("size", "dim", "numel", "stride", "ndimension", "is_contiguous", "element_size")
_SHAPE_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad")


@dataclass
class Layer:
    """A job: its work, where its operands come from, and the shape of its result as the graph has it.

    Attributes
    ----------
    bias
        Address.
    keep
        What the addresses point to.
    """

    job: Job
    threads: int
    x: fx.Node
    residual: fx.Node | None
    bias: int
    shape: tuple[int, ...]
    keep: Any


@dataclass(frozen=True)
class Form:
    """Shape, strides and offset in its memory, of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class Seen:
    """What one run on an example showed of a node.

    Attributes
    ----------
    value
        The result; but for a constant only until the last node that reads it has run.
    form
        Of a tensor, for ever.
    layer
        If the node is a job.
    constant
        Whether the value is the same in every run.
    base
        The job whose result it is a view of, or shares memory with in any part.
    is_view
        Whether it is nothing but a view of it: one that need not be made again.
    """

    value: Any
    layer: Layer | None = None
    constant: bool = False
    base: fx.Node | None = None
    is_view: bool = False
    form: Form | None = None


class Recording:
    """Runs a model's graph on an example, node by node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.seen: dict[fx.Node, Seen] = {}
        self.storages: dict[int, fx.Node] = {}
        # Tensors of inference mode do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            self.model, self.inputs = model, iter([x.clone() for x in inputs])
            last = {source: node for node in graph.nodes for source in node.all_input_nodes}
            for node in graph.nodes:
                if node.op == "output":
                    continue
                seen = self.seen[node] = self._look(node)
                seen.form = _form_of(seen.value)
                for done in {*node.all_input_nodes, node}:
                    if last.get(done, node) is node:
                        self._release(done)

    def _release(self, node: fx.Node) -> None:
        """Let go of a value that nothing reads any more: its memory may be another's then."""
        seen = self.seen[node]
        if seen.constant:
            return
        seen.value = None
        if seen.base is None:
            return
        held = any(other.value is not None for other in self.seen.values() if other.base is seen.base)
        if not held:
            self.storages = {address: base for address, base in self.storages.items() if base is not seen.base}

    def _look(self, node: fx.Node) -> Seen:
        if node.op == "placeholder":
            # Left out ones have their default, which the trace knows.
            return Seen(next(self.inputs, None))
        if node.op == "get_attr":
            owner: Any = self.model
            for name in str(node.target).split("."):
                owner = getattr(owner, name)
            return Seen(owner, constant=True)
        args, kwargs = (map_arg(a, lambda n: self.seen[n].value) for a in (node.args, node.kwargs))
        layer = self._layer(node, args, kwargs)
        if layer is not None:
            value = self._run(layer)
            self.storages[value.untyped_storage().data_ptr()] = node
            return Seen(value, layer, base=node)
        return self._call(node, args, kwargs)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Seen:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = _changes(given)
        value = call_of(node, self.modules)(*args, **kwargs)
        if self._gives_its_input(node, args, value):
            value = args[0]
        unchanged = before == _changes(given)
        bases = [self.storages.get(t.untyped_storage().data_ptr()) for t in tree_leaves(value) if _has_memory(t)]
        base = next((found for found in bases if found is not None), None)
        sources = [self.seen[n] for n in node.all_input_nodes]
        if base is None and unchanged and _of_shapes_only(node, value, sources):
            return Seen(value, constant=True)
        return Seen(value, base=base, is_view=base is not None and unchanged and isinstance(value, Tensor))

    def _gives_its_input(self, node: fx.Node, args: Any, value: Any) -> bool:
        """Whether a pooling has windows of one value, so that its result may be its input itself."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.AdaptiveAvgPool2d or not args or not isinstance(args[0], Tensor):
            return False
        return not _has_hooks(module) and args[0].shape == value.shape

    def _run(self, layer: Layer) -> Tensor:
        x, y, job = self.seen[layer.x].value, memory.empty_tensor(layer.shape), layer.job
        if layer.residual is not None:
            job.add(self.seen[layer.residual].value.data_ptr(), y.data_ptr())
        job.run(x.data_ptr(), y.data_ptr(), layer.bias, layer.threads)
        return y

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> Layer | None:
        """The node as a job, if it is a layer of ours that code of ours computes on these."""
        module: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) not in (SparseConv2d, SparseLinear, SeparableMaxPool2d, nn.Linear):
            return None
        names = ("input",) if type(module) is nn.Linear else ("x", "residual")
        nodes: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        values = dict(zip(names, args, strict=False)) | kwargs
        first = nodes.get(names[0])
        if _has_hooks(module) or not isinstance(first, fx.Node) or not _is_plain(values[names[0]]):
            return None
        if type(module) is nn.Linear:
            return _product(module, first, values["input"])
        if type(module) is SeparableMaxPool2d:
            return _pooling(module, first, values["x"])
        return _convolution(module, nodes, values["x"], values.get("residual"))


def _product(module: nn.Linear, node: fx.Node, x: Tensor) -> Layer | None:
    """A dense linear layer on one vector."""
    weight, bias = module.weight.detach(), module.bias
    if x.shape[-1:] != weight.shape[1:] or x.numel() != weight.shape[1] or not _is_plain(weight):
        return None
    added = torch.zeros(len(weight)) if bias is None else bias.detach()
    if not _is_plain(added):
        return None
    job = gemv_job(len(weight), weight.shape[1], weight.data_ptr())
    shape = (*x.shape[:-1], len(weight))
    return Layer(job, threads(), node, None, added.data_ptr(), shape, (weight, added))


def _pooling(module: SeparableMaxPool2d, node: fx.Node, x: Tensor) -> Layer | None:
    pool = module.as_pool(x)
    if pool is None:
        return None
    return Layer(max_pool_job(pool), threads(), node, None, 0, (*x.shape[:-2], *pool.out), None)


def _convolution(module: SparseConv2d, nodes: dict[str, Any], x: Tensor, residual: Tensor | None) -> Layer | None:
    image = module.as_image(x)
    if image is None or (residual is not None and (module.takes_vectors or not _is_plain(residual))):
        return None
    plan = module.plan_for(image)
    job = plan.job(residual is not None)
    if job is None or (residual is not None and tuple(residual.shape) != plan.spec.out_shape):
        return None
    bias = None if module.bias is None else module.bias.detach().float().contiguous()
    address = plan.zero_bias if bias is None else bias.data_ptr()
    shape = (*x.shape[:-1], module.out_channels) if module.takes_vectors else plan.spec.out_shape
    return Layer(job, plan.threads, nodes["x"], nodes.get("residual"), address, tuple(shape), (plan, bias))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def call_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """What a node calls."""
    if node.op == "call_module":
        return modules[str(node.target)]
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    name = str(node.target)
    return lambda owner, *args, **kwargs: getattr(owner, name)(*args, **kwargs)


def _form_of(value: Any) -> Form | None:
    return Form(tuple(value.shape), value.stride(), value.storage_offset()) if _has_memory(value) else None


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0


def _changes(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was changed in place; parameters that were made in inference mode do not count it."""
    return [0 if t.is_inference() else t._version for t in tensors]


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _of_shapes_only(node: fx.Node, value: Any, sources: list[Seen]) -> bool:
    """Whether a result is the same for all inputs of the same shapes."""
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
        return False
    if all(source.constant for source in sources):
        return True
    asks = node.op == "call_method" and node.target in _SHAPE_METHODS
    return asks or (node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES)
