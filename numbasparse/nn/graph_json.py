"""Graphs and modules of torch.fx as JSON, from a list of what may be in them: reading one runs nobody's code."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from numbasparse.nn.concatenation import append, reserve
from numbasparse.nn.enlarging import interpolate
from numbasparse.nn.fused import FusedConv2d
from numbasparse.nn.linear import SparseLinear
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.plans import Choice
from numbasparse.weight import SparseWeight

Json = Any

# ---- functions and methods ----------------------------------------------------------------------------------

_OPERATORS = ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv", "neg", "getitem")
_TORCH = (
    "add sub mul div cat stack flatten relu sigmoid tanh softmax mean sum amax amin clamp exp sqrt reshape permute "
    "transpose squeeze unsqueeze chunk split matmul pixel_shuffle maximum minimum"
)
_FUNCTIONAL = (
    "relu relu6 silu gelu leaky_relu hardswish hardsigmoid elu softmax log_softmax interpolate max_pool2d avg_pool2d "
    "adaptive_avg_pool2d adaptive_max_pool2d pad pixel_shuffle pixel_unshuffle dropout normalize linear conv2d"
)
# Operators of exported programs; what reads or writes files is not among them.
_ATEN = (
    "add.Tensor add_.Tensor sub.Tensor mul.Tensor mul_.Tensor div.Tensor cat.default relu.default relu_.default "
    "view.default reshape.default flatten.using_ints mean.dim mean.default adaptive_avg_pool2d.default "
    "max_pool2d.default avg_pool2d.default linear.default conv2d.default dropout.default leaky_relu.default "
    "leaky_relu_.default sigmoid.default silu.default silu_.default hardswish.default hardswish_.default "
    "hardsigmoid.default hardtanh.default hardtanh_.default gelu.default tanh.default softmax.int log_softmax.int "
    "permute.default transpose.int squeeze.dim unsqueeze.default pad.default constant_pad_nd.default clamp.default "
    "pixel_shuffle.default upsample_nearest2d.vec upsample_bilinear2d.vec matmul.default batch_norm.default "
    "slice.Tensor select.int split.Tensor chunk.default contiguous.default clone.default"
)
_METHODS = (
    "add add_ sub mul mul_ div view reshape flatten size mean sum amax permute transpose contiguous relu relu_ "
    "sigmoid tanh softmax squeeze unsqueeze chunk split clamp clamp_ expand float half"
)
METHODS = frozenset(_METHODS.split())
ATTRIBUTES = ("shape", "ndim")
"""What `getattr` may ask a tensor for."""


def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found["getattr"] = getattr
    found |= {"numbasparse.reserve": reserve, "numbasparse.append": append, "numbasparse.interpolate": interpolate}
    found |= {f"torch.{name}": getattr(torch, name) for name in _TORCH.split()}
    found |= {f"functional.{name}": getattr(F, name) for name in _FUNCTIONAL.split()}
    for name in _ATEN.split():
        packet, overload = name.split(".")
        found[f"aten.{name}"] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


FUNCTIONS = _functions()
# The first name of each: torch and torch.nn.functional share some.
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


# ---- modules ------------------------------------------------------------------------------------------------

# Names of the constructor's arguments, which the modules keep as attributes.
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: _CONV,
    FusedConv2d: (*_CONV, "activation"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: (),
    nn.ReLU6: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Hardswish: (),
    nn.Hardsigmoid: (),
    nn.Identity: (),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Dropout: ("p",),
    nn.Dropout2d: ("p",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.MaxPool2d: _POOL,
    SeparableMaxPool2d: _POOL,
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
    nn.UpsamplingNearest2d: ("size", "scale_factor"),
    nn.UpsamplingBilinear2d: ("size", "scale_factor"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ZeroPad2d: ("padding",),
    nn.ReflectionPad2d: ("padding",),
}
_WITH_TENSORS = (nn.Conv2d, FusedConv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.PReLU)
_WITH_BIAS = (nn.Conv2d, FusedConv2d, nn.Linear)
_KINDS = {kind.__name__: kind for kind in _FIELDS}
_SPARSE = {kind.__name__: kind for kind in (SparseConv2d, SparseLinear)}


@dataclass(frozen=True)
class Described:
    """A module without its children: its kind, its arguments, and its tensors by their names in it."""

    kind: str
    arguments: dict[str, Json]
    tensors: dict[str, torch.Tensor]


def describe_module(name: str, module: nn.Module) -> Described:
    """Return what `make_module` makes the module of.

    Raises
    ------
    ValueError
        If it is of no kind in the list, or has hooks; the text names it.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"module {name!r} has forward hooks, which a file cannot hold: remove them first")
    if type(module) in _SPARSE.values():
        assert isinstance(module, SparseConv2d)
        return _describe_sparse(module)
    fields = _FIELDS.get(type(module))
    if fields is None:
        raise ValueError(f"module {name!r} is a {type(module).__name__}, which is not in the list of what a file holds")
    arguments = {field: _plain(getattr(module, field)) for field in fields}
    if isinstance(module, _WITH_BIAS):
        arguments["bias"] = module.bias is not None
    return Described(type(module).__name__, arguments, dict(module.state_dict()))


def _describe_sparse(module: SparseConv2d) -> Described:
    choice = module.choice
    arguments = {
        "kernel_shape": list(module.kernel_shape),
        "groups": module.groups,
        "stride": list(module.stride),
        "padding": [list(module.padding[:2]), list(module.padding[2:])],
        "dilation": list(module.dilation),
        "activation": module.activation,
        "choice": None if choice is None else {"kernel": choice.kernel, "config": dict(choice.config)},
        "out_layout": module.out_layout,
    }
    tensors = {name: t for name, t in module.state_dict().items() if t is not None}
    if max(1, module.kernel_shape[0] * module.kernel_shape[1] * module.kernel_shape[2]) <= 1 << 16:
        tensors["indices"] = tensors["indices"].to(torch.uint16)  # half of the bytes
    return Described(type(module).__name__, arguments, tensors)


def make_module(described: Described) -> nn.Module:
    """Make a module, in eval mode, that holds the tensors given.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        If kind, arguments and tensors do not fit each other.
    """
    if described.kind in _SPARSE:
        return _make_sparse(described).eval()
    kind: Any = _KINDS.get(described.kind)
    if kind is None:
        raise ValueError(f"unknown kind of module {described.kind!r}")
    fields = {*_FIELDS[kind], *(("bias",) if kind in _WITH_BIAS else ())}
    if set(described.arguments) != fields:
        raise ValueError(f"a {described.kind} needs the arguments {sorted(fields)}, got {sorted(described.arguments)}")
    arguments = {name: _unplain(value) for name, value in described.arguments.items()}
    if kind not in _WITH_TENSORS:
        if described.tensors:
            raise ValueError(f"a {described.kind} has no tensors, got {sorted(described.tensors)}")
        return kind(**arguments).eval()
    # On the meta device nothing is allocated for sizes that a wrong file may ask for.
    made: nn.Module = kind(**arguments, device="meta")
    if set(made.state_dict()) != set(described.tensors):
        raise ValueError(f"expected the tensors {sorted(made.state_dict())}, got {sorted(described.tensors)}")
    made.load_state_dict(described.tensors, assign=True)
    return made.requires_grad_(False).eval()


def _make_sparse(described: Described) -> SparseConv2d:
    given, tensors = dict(described.arguments), dict(described.tensors)
    bias = tensors.pop("bias", None)
    if set(tensors) != {"values", "indices", "indptr"}:
        raise ValueError(f"expected the tensors values, indices and indptr, got {sorted(tensors)}")
    if tensors["indices"].dtype not in (torch.uint16, torch.int32):  # others could change by the cast below
        raise ValueError(f"indices must be uint16 or int32, got {tensors['indices'].dtype}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be of a floating-point type, got {bias.dtype}")
    values, indices, indptr = (tensors[name].numpy() for name in ("values", "indices", "indptr"))
    shape, groups, choice = given.pop("kernel_shape"), given.pop("groups"), given.pop("choice")
    # Every index is checked here.
    weight = SparseWeight.from_encoded(values, indices.astype("int32"), indptr, shape, groups)
    if choice is not None and set(choice) != {"kernel", "config"}:
        raise ValueError(f"a choice has kernel and config, got {sorted(choice)}")
    made = None if choice is None else Choice(choice["kernel"], dict(choice["config"]))
    return _SPARSE[described.kind](weight, bias, choice=made, **given)


# ---- values -------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Json:
    """A constructor's argument: numbers, texts, None and tuples of them."""
    return {"tuple": [_plain(v) for v in value]} if isinstance(value, (tuple, list)) else value


def _unplain(value: Json) -> Any:
    return tuple(_unplain(v) for v in value["tuple"]) if isinstance(value, Mapping) else value


def _encode(value: Any) -> Json:
    """An argument of a node."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}  # also infinity
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encode(v)] for key, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise ValueError(f"an argument of type {type(value).__name__}")


def _decode(value: Json, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, Mapping):
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise ValueError(f"an argument {value!r}")
    ((kind, inner),) = value.items()
    if kind == "float":
        return float(inner)
    if kind == "node":
        if inner not in nodes:
            raise ValueError(f"node {inner!r} is used before it is computed")
        return nodes[inner]
    if kind in ("list", "tuple", "slice"):
        items = [_decode(v, nodes) for v in inner]
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if kind == "dict":
        return {str(key): _decode(v, nodes) for key, v in inner}
    if kind == "ellipsis":
        return Ellipsis
    named = getattr(torch, inner, None) if kind in ("dtype", "memory_format") else None
    if not isinstance(named, torch.dtype if kind == "dtype" else torch.memory_format):
        raise ValueError(f"an argument {value!r}")
    return named


# ---- graphs -------------------------------------------------------------------------------------------------

# A part of a module's path.  torch.fx writes one that is no identifier as a string in quotes: no quotes, no backslash.
_PART = re.compile(r"[\w -]+")
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")


def describe_graph(graph: fx.Graph) -> list[Json]:
    """Return the nodes as JSON.

    Raises
    ------
    ValueError
        If a node calls something that is not in the list, has an argument of an unknown type, or a name that
        `make_graph` would refuse; the text names it.
    """
    nodes = [_describe_node(node) for node in graph.nodes]
    make_graph(nodes, lambda op, path: True)  # nothing is written that cannot be read
    return nodes


def _describe_node(node: fx.Node) -> Json:
    target: Any = node.target
    if node.op == "call_function":
        target = _NAMES.get(target)
    elif node.op == "call_method" and node.target not in METHODS:
        target = None
    if target is None:
        raise ValueError(f"node {node.name!r} calls {node.target}, which is not in the list of what a file holds")
    try:
        arguments = [_encode(value) for value in node.args]
        named = {name: _encode(value) for name, value in node.kwargs.items()}
    except ValueError as error:
        raise ValueError(f"node {node.name!r} has {error}, which a file cannot hold") from None
    return {"op": node.op, "name": node.name, "target": target, "args": arguments, "kwargs": named}


def make_graph(nodes: Iterable[Json], known: Callable[[str, str], bool]) -> fx.Graph:
    """Make a graph.  ``known(op, path)`` tells whether there is a module, or a tensor, of that path.

    torch.fx writes graphs as Python, so every name is checked to be one.

    Raises
    ------
    ValueError, TypeError, KeyError
        If it is none.
    """
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for node in nodes:
        op, name, target = node["op"], node["name"], node["target"]
        if op not in _OPS or not _is_name(name) or name in made:
            raise ValueError(f"a node {name!r} of kind {op!r}")
        arguments = tuple(_decode(value, made) for value in node["args"])
        named = {key: _decode(value, made) for key, value in node["kwargs"].items() if _checked_name(key)}
        if target == "getattr" and (len(arguments) != 2 or arguments[1] not in ATTRIBUTES or named):
            raise ValueError(f"node {name!r} gets another attribute than {' or '.join(ATTRIBUTES)}: {node['args'][1:]}")
        made[name] = graph.create_node(op, _target(op, target, known), arguments, named, name)
    _check_ends(graph)
    graph.lint()
    return graph


def _check_ends(graph: fx.Graph) -> None:
    """Raise ValueError unless inputs come first, as arguments of one function may, and the only output last."""
    ops = [node.op for node in graph.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise ValueError(f"a graph without an output at its end, or with others: {ops.count('output')} in all")
    last = list(graph.nodes)[-1]
    if len(last.args) != 1 or last.kwargs:
        raise ValueError("a graph's output must be one value")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in inputs]
    if "placeholder" in ops[len(inputs) :]:
        raise ValueError("a graph with an input after other nodes")
    if len({*names, "self"}) != len(names) + 1:
        raise ValueError(f"inputs must have names of their own, and none is 'self', got {names}")
    defaults = [bool(node.args) for node in inputs]
    if any(len(node.args) > 1 or node.kwargs or node.all_input_nodes for node in inputs) or defaults != sorted(
        defaults
    ):
        raise ValueError(f"inputs must have at most a default each, those that have one last: {names}")


def _target(op: str, target: Any, known: Callable[[str, str], bool]) -> Any:
    if not isinstance(target, str):
        raise ValueError(f"a target {target!r}")
    if op == "call_function":
        if target not in FUNCTIONS:
            raise ValueError(f"unknown function {target!r}")
        return FUNCTIONS[target]
    good = {
        "call_method": target in METHODS,
        "placeholder": _is_name(target),
        "output": target == "output",
    }.get(op, _is_path(target) and known(op, target))
    if not good:
        raise ValueError(f"unknown target {target!r} of a node of kind {op!r}")
    return target


def _is_path(text: str) -> bool:
    return all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in text.split("."))


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def _checked_name(text: Any) -> bool:
    if not _is_name(text):
        raise ValueError(f"an argument named {text!r}")
    return True
