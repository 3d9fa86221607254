"""What ``numbasparse import`` and ``numbasparse export-onnx`` do."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from numbasparse.cli.models import check_out, example_input, load_model, parse_shape
from numbasparse.files import write_whole
from numbasparse.onnx_io import (
    Imported,
    OnnxRuntimeModel,
    StoredWeight,
    UnsupportedOnnxError,
    export_program,
    import_onnx,
    save_onnx_sparse,
)
from numbasparse.onnx_io.program import example_of
from numbasparse.onnx_io.source import shape_text

TOLERANCE = 1e-4
"""Largest difference from onnxruntime, relative to the largest output where that is above 1."""


def import_file(path: Path, out: Path, shape: str | None, report: bool, fallback: bool) -> None:
    """Write an ONNX file as an exported program, after comparing its outputs with onnxruntime's.

    Raises
    ------
    ValueError
        If the file cannot be imported, or the outputs differ: then nothing is written.
    """
    check_out(out)
    sizes = None if shape is None else parse_shape(shape)
    try:
        imported = import_onnx(path, sizes)
    except UnsupportedOnnxError as error:
        if not fallback:
            raise
        _run_fallback(path, error, sizes)
        return
    blob, open_axes = export_program(imported)
    difference = _compare(path, imported)
    write_whole(out, blob)
    if report:
        _print_layers(imported)
    counts = Counter(type(module).__name__ for module in imported.module.modules())
    convolutions = sum(counts[name] for name in ("Conv1d", "Conv2d", "Conv3d"))
    click.echo(f"opset {imported.opset}, {convolutions} convolutions ({counts['Conv2d']} of them on images)")
    click.echo(f"outputs differ from onnxruntime's by at most {difference:.1e} on a random input")
    click.echo(f"wrote {out}, for inputs of {_open_shape(imported, open_axes)} (?: open)")


def _open_shape(imported: Imported, open_axes: tuple[int, ...]) -> str:
    sizes = (imported.input_shape[0] or 1, *imported.input_shape[1:])
    return shape_text([None if axis in open_axes else size for axis, size in enumerate(sizes)])


def _compare(path: Path, imported: Imported) -> float:
    """The largest difference from onnxruntime's outputs; ValueError above the tolerance."""
    x = example_of(imported, imported.input_shape[0] or 1)
    with torch.inference_mode():
        expected, actual = OnnxRuntimeModel(path)(x), imported.module(x)
    difference = 0.0
    for one, other in zip(_tuple(expected), _tuple(actual), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"{path}: the imported model gives {tuple(other.shape)}, onnxruntime {tuple(one.shape)}")
        scale = max(1.0, one.abs().max().item())
        difference = max(difference, (one - other).abs().max().item() / scale)
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not difference <= (1e-2 if half else TOLERANCE):  # NaN too
        raise ValueError(f"{path}: outputs differ from onnxruntime's by {difference:.1e}: nothing was written")
    return difference


def _tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _run_fallback(path: Path, error: UnsupportedOnnxError, shape: list[int] | None) -> None:
    """Run the file once as a whole, and say that nothing is accelerated."""
    click.echo(f"{len(error.nodes)} node(s) cannot be imported:", err=True)
    for node in error.nodes:
        click.echo(f"  {node}", err=True)
    model = OnnxRuntimeModel(path)
    if shape is None:
        raise ValueError("the fall-back runs the model once: give the input's shape, as in --input 1,3,224,224")
    outputs = _tuple(model(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    shapes = ", ".join(str(tuple(y.shape)) for y in outputs)
    click.echo(f"onnxruntime runs the whole model: {tuple(shape)} -> {shapes}")
    click.echo("NOTHING is accelerated, and no file was written: no layer can be pruned, tuned or converted.")


def _print_layers(imported: Imported) -> None:
    table = Table("operator", "node", "module", "shape", "zeros")
    for operator, node, name in imported.layers:
        module = imported.module.get_submodule(name)
        weight = getattr(module, "weight", None)
        shape, zeros = "", ""
        if isinstance(weight, torch.Tensor):
            shape, zeros = "x".join(map(str, weight.shape)), f"{(weight == 0).float().mean().item():.1%}"
        table.add_row(operator, node, f"{name}: {type(module).__name__}", shape, zeros)
    Console().print(table)


def export_file(model: str, weights: Path | None, shape: str | None, out: Path, threshold: float) -> None:
    """Write a model or an ONNX file as ONNX with sparse initializers.

    Raises
    ------
    ValueError
        If the model cannot be exported, or no shape is given for one that is no ONNX file.
    """
    check_out(out)
    if model.endswith(".onnx"):
        if weights is not None:
            raise ValueError("--weights is for torch models: an ONNX file has its own")
        stored = save_onnx_sparse(Path(model), out, threshold=threshold)
    elif shape is None:
        raise ValueError("give the input's shape, as in --input 1,3,224,224: a torch model is exported by running it")
    else:
        module = load_model(model, weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)  # torch's own, when it copies a graph
            stored = save_onnx_sparse(module, out, example_input(shape, module), threshold=threshold)
    _print_stored(stored, threshold)
    click.echo(f"wrote {out} ({out.stat().st_size} bytes)")


def _print_stored(stored: tuple[StoredWeight, ...], threshold: float) -> None:
    if not stored:
        click.echo(f"no weight has {threshold:.0%} zeros or more: none is stored sparse")
        return
    table = Table("weight", "shape", "zeros", "bytes dense", "bytes sparse")
    for weight in stored:
        shape = "x".join(map(str, weight.shape))
        table.add_row(weight.name, shape, f"{weight.sparsity:.1%}", str(weight.dense_bytes), str(weight.stored_bytes))
    Console().print(table)
    click.echo("onnxruntime and ONNX's tools make these dense on loading: the file is smaller there, not faster.")
