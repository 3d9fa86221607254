"""Summary: how sparse a model's layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.layers import Layer, LayerFilter, select_layers, weights_of


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one layer's weight.

    Attributes
    ----------
    name : str
        Qualified name of the layer; empty if the model itself is the layer.
    shape : tuple of int
        Shape of the weight.
    size : int
        Number of weights.
    nnz : int
        Number of weights that are not zero.
    itemsize : int
        Bytes of a weight.
    positions : int or None
        Output positions (images times pixels) of a run on the example input; None without one.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    nnz: int
    itemsize: int = 4
    positions: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero."""
        return 1.0 - self.nnz / self.size

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.size * self.itemsize

    @property
    def sparse_bytes(self) -> int:
        """Bytes as CSR: values, a 32-bit column each, and a 32-bit start of each row."""
        return self.nnz * (self.itemsize + 4) + 4 * (self.shape[0] + 1)

    @property
    def dense_flops(self) -> int | None:
        """Two operations (multiply and add) per weight and output position; None without an example input."""
        return None if self.positions is None else 2 * self.size * self.positions

    @property
    def sparse_flops(self) -> int | None:
        """The same for weights that are not zero."""
        return None if self.positions is None else 2 * self.nnz * self.positions


@dataclass(frozen=True)
class PruningReport:
    """Sparsity of every chosen layer and of all together; ``str(report)`` is a plain table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def size(self) -> int:
        """Number of weights in all chosen layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def nnz(self) -> int:
        """Number of weights in all chosen layers that are not zero."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zero weights over all chosen layers."""
        return 1.0 - self.nnz / self.size

    def to_dict(self) -> dict[str, Any]:
        """Return the report in the types of JSON."""
        layers = [
            {"name": x.name, "shape": list(x.shape), "size": x.size, "nnz": x.nnz, "sparsity": x.sparsity}
            | {key: getattr(x, key) for key in ("dense_bytes", "sparse_bytes", "dense_flops", "sparse_flops")}
            for x in self.layers
        ]
        return {"size": self.size, "nnz": self.nnz, "sparsity": self.sparsity, "layers": layers}

    def __str__(self) -> str:
        rows = [_header(self), *_rows(self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(_line(row, widths) for row in rows)


def count(weights: Mapping[str, Tensor], positions: Mapping[str, int] | None = None) -> PruningReport:
    """Count the non-zero weights of each layer.

    Parameters
    ----------
    weights : mapping of str to Tensor
        Weight of each layer by its qualified name.
    positions : mapping of str to int, optional
        Output positions of each layer.
    """
    with torch.no_grad():
        nnz = {name: int(torch.count_nonzero(weight)) for name, weight in weights.items()}
    return PruningReport(
        tuple(
            LayerSparsity(
                name,
                tuple(weight.shape),
                weight.numel(),
                nnz[name],
                weight.element_size(),
                None if positions is None else positions[name],
            )
            for name, weight in weights.items()
        )
    )


def report(model: nn.Module, filter: LayerFilter | None = None, *, example: Tensor | None = None) -> PruningReport:
    """Report sparsity and bytes of a model's layers (the same default choice as ``prune_``), and operations.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.
    example : Tensor, optional
        An input of the model, which runs once on it: operations are counted for it. A layer that does not run has 0.

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``.
    """
    layers = select_layers(model, filter)
    return count(weights_of(layers), None if example is None else _positions(model, layers, example))


def _positions(model: nn.Module, layers: Mapping[str, Layer], example: Tensor) -> dict[str, int]:
    """Return the output positions of every layer in one run, in eval mode and without gradients."""
    positions = dict.fromkeys(layers, 0)

    def see(name: str, output: Tensor, rows: int) -> None:
        positions[name] += output.numel() // rows

    handles = [
        x.module.register_forward_hook(lambda m, args, out, name=n, rows=x.weight.shape[0]: see(name, out, rows))
        for n, x in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return positions


def print_report(report: PruningReport) -> None:
    """Print a report as a table in the terminal (needs rich)."""
    from rich.console import Console
    from rich.table import Table

    *layers, total = _rows(report)
    table = Table(title="Sparsity")
    for column in _header(report):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in layers:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    Console().print(table)


_HEADER = ("layer", "shape", "weights", "non-zero", "sparsity", "dense bytes", "sparse bytes")
_OPERATIONS = ("dense FLOPs", "sparse FLOPs")


def _has_operations(report: PruningReport) -> bool:
    return all(layer.positions is not None for layer in report.layers)


def _header(report: PruningReport) -> tuple[str, ...]:
    return _HEADER + _OPERATIONS if _has_operations(report) else _HEADER


def _rows(report: PruningReport) -> list[tuple[str, ...]]:
    rows = [
        (x.name or "(model)", "x".join(map(str, x.shape)), f"{x.size}", f"{x.nnz}", f"{x.sparsity:.2%}", *_costs(x))
        for x in report.layers
    ]
    columns = zip(*(_costs(x) for x in report.layers), strict=True)
    sums = (str(sum(int(cell) for cell in column)) for column in columns)
    return [*rows, ("total", "", f"{report.size}", f"{report.nnz}", f"{report.sparsity:.2%}", *sums)]


def _costs(layer: LayerSparsity) -> tuple[str, ...]:
    values = (layer.dense_bytes, layer.sparse_bytes, layer.dense_flops, layer.sparse_flops)
    return tuple(str(value) for value in values if value is not None)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = row
    cells = [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
