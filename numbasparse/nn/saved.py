"""A converted model in one safetensors file, which loads without the model's own code.

The file holds the tensors of every module (sparse weights as they are, quantized ones as codes), and as JSON in its
metadata, under ``numbasparse``: ``format``, ``version``, ``graph`` (the nodes of torch.fx's trace), ``modules`` (kind
and arguments of each) and ``report``. Kinds, functions and methods come from the lists of `graph_json`, so that
loading runs nobody's code and what runs afterwards is torch and this package.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import fx, nn

from numbasparse.files import write_whole
from numbasparse.kernels import kernel
from numbasparse.nn.convert import REPORT, ConvertedLayer, conversion_report, input_shapes
from numbasparse.nn.graph_json import Described, describe_graph, describe_module, make_graph, make_module
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.native import Tracer
from numbasparse.plans import Choice
from numbasparse.spec import ConvSpec, linear_image_shape

_METADATA, _FORMAT, _VERSION = "numbasparse", "model", 1
_ADVICE = (
    "save it as a program of torch instead: torch.export.save(torch.export.export(model, (x,)), 'model.pt2'), to be "
    "loaded after `import numbasparse.nn`"
)
# What constructors, torch.fx and Python's compiler raise for wrong arguments, beside ValueError.
_WRONG = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
)


class _Module(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    arguments: dict[str, Any]


class _Node(msgspec.Struct, forbid_unknown_fields=True):
    op: str
    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    graph: list[_Node]
    modules: dict[str, _Module]
    report: list[dict[str, Any]]


# ---- saving -------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted model into one file; an older one is replaced only by a complete one.

    Parameters
    ----------
    model : nn.Module
        What `convert` returned, on any device. Arguments of its ``forward`` that have a default are left out.
    path : str or path
        Ends in ``.safetensors`` by custom.

    Raises
    ------
    ValueError
        If the model does not come from `convert`; if torch.fx cannot trace it, or it has modules or calls that are
        not in the list of what a file holds: the text names the first, and says what to do instead.
    OSError
        If the file cannot be written.
    """
    report = conversion_report(model)
    graph, tensors = _traced(model), dict[str, torch.Tensor]()
    modules: dict[str, dict[str, Any]] = {}
    try:
        nodes = describe_graph(graph)
        for node in graph.nodes:
            if node.op == "call_module" and node.target not in modules:
                described = describe_module(node.target, model.get_submodule(node.target))
                modules[node.target] = {"kind": described.kind, "arguments": described.arguments}
                tensors |= {f"{node.target}.{name}": tensor for name, tensor in described.tensors.items()}
            elif node.op == "get_attr":
                tensors[node.target] = _attribute(model, node.target)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} cannot be saved: {error}; {_ADVICE}") from None
    header = {"format": _FORMAT, "version": _VERSION, "graph": nodes, "modules": modules}
    header["report"] = [_without_nan(dataclasses.asdict(record)) for record in report]
    # Copies: tensors of a file may share no memory.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(kept, {_METADATA: json.dumps(header)}))


def _traced(model: nn.Module) -> fx.Graph:
    optional = {
        p.name: p.default
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    try:
        graph = Tracer().trace(model, concrete_args=optional or None)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {first}); {_ADVICE}"
        ) from error
    for node in reversed(list(graph.nodes)):
        if not node.users and (_is_check(node) or (node.op == "placeholder" and _base(node) in optional)):
            graph.erase_node(node)
    return graph


def _is_check(node: fx.Node) -> bool:
    """Whether a node without users only checks arguments: that optional ones were left out, or an exported program's
    input has the size that it was exported for."""
    if node.op == "call_method":
        return node.target == "size"
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in ("_assert", "_assert_is_none", "eq", "ne", "ge", "le", "gt", "lt")


def _base(node: fx.Node) -> str:
    """Name of the argument of a placeholder."""
    target = str(node.target)
    return target.rsplit("_", 1)[0] if target.rsplit("_", 1)[-1].isdecimal() else target


def _attribute(model: nn.Module, path: str) -> torch.Tensor:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"attribute {path!r} is a {type(value).__name__}, not a tensor")
    return value


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in record.items()}  # NaN is not itself


# ---- loading ------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], tuned: Any = None, example_input: Any = None) -> fx.GraphModule:
    """Read a file of `save`, checking everything before use.

    Parameters
    ----------
    path : str or path
    tuned, example_input : optional
        What chooses kernels for this machine, as for `choose_kernels`. Without it layers keep those in the file.

    Returns
    -------
    fx.GraphModule
        On the CPU, in eval mode, for inference. `conversion_report` tells what became of each layer.

    Raises
    ------
    OSError
        If the file cannot be read; FileNotFoundError if there is none.
    ValueError
        If it is truncated, corrupt, or not such a file; the text names it.
    """
    blob = Path(path).read_bytes()
    try:
        header, tensors = _read(blob)
        del blob  # a large model should not be held twice, nor each of its tensors once more
        model = _made(header, tensors)
    except _WRONG as error:
        text = " ".join(str(error).split())
        raise ValueError(f"cannot read {os.fspath(path)!r} as a saved model: {text or type(error).__name__}") from error
    if tuned is not None:
        choose_kernels(model, tuned, example_input)
    return model


def choose_kernels(model: nn.Module, tuned: Any, example_input: Any = None) -> None:
    """Let the sparse layers of a loaded model take the kernels that were chosen for them, and say so in its report.

    A layer without a choice keeps its kernel; so does one for which a dense kernel was chosen, as the file has no
    dense weight of it: convert the original model by the tuned file instead.

    Parameters
    ----------
    model : nn.Module
        Of `load`; changed only after every choice has been made.
    tuned
        As for `convert`: an object with ``choice(spec, weight, name)``, for example a tuned file, or one with
        ``choice_by_name(name)``, which needs no ``example_input``.
    example_input : Tensor, tuple of arguments, or dict of keyword arguments, optional
        The model is run on it once to learn the shapes of its layers' inputs.

    Raises
    ------
    TypeError
        If ``tuned`` is nothing of the kind.
    ValueError
        If it needs an ``example_input``.

    Warns
    -----
    UserWarning
        If dense kernels were chosen for layers that stay sparse.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseConv2d)}
    choices = {name: choice for name, choice in _choices(model, layers, tuned, example_input).items() if choice}
    records = {record.name: record for record in conversion_report(model)}
    stay = sorted(name for name, choice in choices.items() if kernel(choice.kernel).is_dense)
    for name, choice in choices.items():
        reason = f"tuned: {choice.kernel}" + (", but the file holds it sparse" if name in stay else "")
        chosen = layers[name].choice if name in stay else choice
        layers[name].choice = chosen
        if name in records:
            chosen_kernel = None if chosen is None else chosen.kernel
            records[name] = dataclasses.replace(records[name], reason=reason, kernel=chosen_kernel)
    setattr(model, REPORT, tuple(records.values()))
    if stay:
        warnings.warn(
            f"dense kernels were chosen for layers that the file holds sparse, and that stay so: {', '.join(stay)}; "
            f"convert the original model with this tuned file to have them dense",
            stacklevel=2,
        )


def _choices(
    model: nn.Module, layers: Mapping[str, SparseConv2d], tuned: Any, example_input: Any
) -> dict[str, Choice | None]:
    by_name, by_spec = (getattr(tuned, name, None) for name in ("choice_by_name", "choice"))
    if example_input is None and by_name is not None:
        return {name: by_name(name) for name in layers}
    if by_spec is None:
        raise TypeError(
            f"tuned must have choice(spec, weight, name) or choice_by_name(name), got {type(tuned).__name__}: a path "
            f"goes to autotune.load first"
        )
    if example_input is None:
        raise ValueError(
            f"{type(tuned).__name__} chooses by the shape of each layer's input: give load an example_input"
        )
    seen = input_shapes(model, list(layers), example_input)
    return {
        name: by_spec(_spec(layers[name], *found, name), layers[name].weight_matrix(), name)
        for name, found in seen.items()
    }


def _spec(layer: SparseConv2d, shape: tuple[int, ...], dtype: str, name: str) -> ConvSpec:
    if layer.takes_vectors:
        shape = linear_image_shape(shape)
    top, bottom, left, right = layer.padding
    weight_shape = (layer.out_channels, *layer.kernel_shape)
    padding = ((top, bottom), (left, right))
    return ConvSpec.create(shape, weight_shape, layer.stride, padding, layer.dilation, layer.groups, dtype, name=name)


def _made(header: _Header, tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    """The model; takes the tensors out of ``tensors``."""
    names = dict[str, dict[str, torch.Tensor]]()
    attributes = dict[str, torch.Tensor]()
    while tensors:
        name = next(iter(tensors))
        owner, _, own = name.rpartition(".")
        if owner in header.modules:
            names.setdefault(owner, {})[own] = tensors.pop(name)
        else:
            attributes[name] = tensors.pop(name)

    root = nn.Module()
    for path, entry in header.modules.items():
        try:
            module = make_module(Described(entry.kind, entry.arguments, names.pop(path, {})))
        except _WRONG as error:
            raise ValueError(f"module {path!r}: {error}") from error
        _place(root, path, module)
    for path, tensor in attributes.items():
        _place(root, path, tensor)
    nodes = [msgspec.to_builtins(node) for node in header.graph]
    known = {"call_module": set(header.modules), "get_attr": set(attributes)}
    graph = make_graph(nodes, lambda op, path: path in known.get(op, ()))
    used = {node.target for node in graph.nodes if node.op in known}
    unused = sorted((known["call_module"] | known["get_attr"]) - used)
    if unused:
        raise ValueError(f"it has modules or tensors of no use: {', '.join(unused)}")
    model = fx.GraphModule(root, graph)
    setattr(model, REPORT, tuple(_record(record) for record in header.report))
    return cast(fx.GraphModule, model.eval())


def _read(blob: bytes) -> tuple[_Header, dict[str, torch.Tensor]]:
    try:
        tensors = safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file, or a truncated or corrupt one ({error})") from error
    end = 8 + int.from_bytes(blob[:8], "little")
    try:
        text = (json.loads(blob[8:end]).get("__metadata__") or {}).get(_METADATA)
        if text is None:
            raise ValueError(f"it has no {_METADATA!r} metadata; it was written by another program")
        header = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None
    kind, version = (header.get(key) if isinstance(header, dict) else None for key in ("format", "version"))
    if kind != _FORMAT:
        raise ValueError(f"its format is {kind!r}, expected {_FORMAT!r}")
    if version != _VERSION:
        raise ValueError(f"its version is {version!r}, but this package reads only {_VERSION}")
    return msgspec.convert(header, _Header), tensors


def _place(root: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    *parents, last = path.split(".")
    owner = root
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = cast(nn.Module, owner._modules[part])
    if isinstance(value, nn.Module):
        owner.add_module(last, value)
    else:
        owner.register_buffer(last, value)


def _record(record: Mapping[str, Any]) -> ConvertedLayer:
    known = {field.name for field in dataclasses.fields(ConvertedLayer)}
    if set(record) != known:
        raise ValueError(f"a record of a layer has the entries {sorted(record)}, expected {sorted(known)}")
    unknown = record["sparsity"] is None
    made = msgspec.convert({**record, "sparsity": 0.0} if unknown else record, ConvertedLayer)
    return dataclasses.replace(made, sparsity=float("nan")) if unknown else made
