"""A convolutional net in an ONNX file as a module built of ordinary torch modules."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from torch import fx, nn

from numbasparse.onnx_io.builder import Builder, NodeContext, UnsupportedNode, Value
from numbasparse.onnx_io.fallback import OnnxRuntimeModel
from numbasparse.onnx_io.operators import OPERATORS
from numbasparse.onnx_io.source import Source, UnsupportedOnnxError, read_onnx


@dataclass(frozen=True)
class Imported:
    """An imported model and what is known of it.

    Attributes
    ----------
    module : fx.GraphModule
        In eval mode; convolutions are ``nn.Conv2d`` and so on.
    input_shape : tuple
        Of the input, as the file declares it (``None``: open) with the sizes that the caller gave.
    open_axes : tuple of int
        Axes of the input, the batch aside, whose sizes the file leaves open and that stay open in the module.
    layers : tuple of (str, str, str)
        Operator, node's name in the file, and module's name, for every node that became a module.
    opset : int
    """

    module: fx.GraphModule
    input_shape: tuple[int | None, ...]
    open_axes: tuple[int, ...]
    layers: tuple[tuple[str, str, str], ...]
    opset: int


def load_onnx(path: str | os.PathLike[str], shape: Sequence[int] | None = None, *, fallback: bool = False) -> nn.Module:
    """Load an ONNX file as a torch module in eval mode.

    Parameters
    ----------
    path
        The file; external data lie beside it.
    shape
        Sizes of the input for those that the file leaves open; only a few operators need them (``auto_pad`` with a
        stride, for example).
    fallback
        If some nodes cannot be imported, return an `OnnxRuntimeModel` with a warning instead of raising.

    Raises
    ------
    OSError
        If there is no such file, or its external data are missing or outside its folder.
    UnsupportedOnnxError
        A ``ValueError``: some nodes cannot be imported; the text names all of them.
    ValueError
        If it is no valid model of one input of floats.
    """
    try:
        return import_onnx(path, shape).module
    except UnsupportedOnnxError as error:
        if not fallback:
            raise
        warnings.warn(
            f"{path} runs as a whole through onnxruntime, NOTHING of it is accelerated: {'; '.join(error.nodes)}",
            stacklevel=2,
        )
        return OnnxRuntimeModel(path)


def import_onnx(path: str | os.PathLike[str], shape: Sequence[int] | None = None) -> Imported:
    """Load an ONNX file with what is known of it; parameters and errors as `load_onnx`."""
    source = read_onnx(path, shape)
    build = Builder(source)
    build.values.update(source.constants)
    build.values[source.input] = build.graph.placeholder("x")
    reasons, layers = _build_nodes(build)
    outputs = [build.values[name] for name in source.outputs]
    tensors = [value for value in outputs if isinstance(value, fx.Node)]
    if len(tensors) < len(outputs):
        reasons.append(f"outputs {source.outputs}: one of them is a constant, or made of sizes")
    if reasons:
        raise UnsupportedOnnxError(path, reasons)
    build.graph.output(tensors[0] if len(tensors) == 1 else tuple(tensors))
    module = fx.GraphModule(build.root, build.graph).eval()
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    kept = {name for name, _ in module.named_modules()}
    return Imported(
        module=module,
        input_shape=_input_shape(source, shape),
        open_axes=() if build.fixed_sizes else tuple(i for i, s in enumerate(source.declared) if i and s is None),
        layers=tuple(layer for layer in layers if layer[2] in kept),
        opset=source.opset,
    )


def _input_shape(source: Source, shape: Sequence[int] | None) -> tuple[int | None, ...]:
    return source.declared if shape is None else (source.declared[0], *shape[1:])


def _build_nodes(build: Builder) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Build every node; why some cannot be, and the modules made.

    A node that cannot be built gets outputs that stand for its own, so that all of the file is looked at; nothing that
    follows from them is an error of its own.
    """
    reasons: list[str] = []
    layers: list[tuple[str, str, str]] = []
    guessed: set[str] = set()
    for number, node in enumerate(build.source.nodes):
        try:
            results = _build_node(build, node)
        except UnsupportedNode as error:
            if error.value not in guessed:  # or else the node before it is at fault
                reasons.append(_describe(node, number, str(error)))
            results = [build.graph.placeholder(build.new_name("unsupported")) for _ in node.output]
            guessed.update(node.output)
        if guessed.intersection(node.input):
            guessed.update(node.output)
        build.values.update(zip(node.output, results, strict=False))
        if results and isinstance(results[0], fx.Node) and results[0].op == "call_module":
            layers.append((node.op_type, node.name or f"number {number}", str(results[0].target)))
    return reasons, layers


def _is_known(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in OPERATORS


def _build_node(build: Builder, node: onnx.NodeProto) -> list[Value]:
    if not _is_known(node):
        domain = f" of domain {node.domain!r}" if node.domain not in ("", "ai.onnx") else ""
        raise UnsupportedNode(f"no such operator{domain} here")
    try:
        result = OPERATORS[node.op_type](NodeContext(node, build))
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        # Attributes that contradict each other: the checker looks at types and names alone.
        raise UnsupportedNode(f"its attributes or inputs do not fit: {error}") from error
    return result if isinstance(result, list) else [result]


def _describe(node: onnx.NodeProto, number: int, reason: str) -> str:
    return f"{node.op_type} {node.name!r} (node {number}): {reason}"
