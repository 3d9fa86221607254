"""Summary: how sparse a model's layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numbasparse.pruning.layers import LayerFilter, select_layers, weights_of


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
    """

    name: str
    shape: tuple[int, ...]
    size: int
    nnz: int

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero."""
        return 1.0 - self.nnz / self.size


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
            for x in self.layers
        ]
        return {"size": self.size, "nnz": self.nnz, "sparsity": self.sparsity, "layers": layers}

    def __str__(self) -> str:
        rows = [_HEADER, *_rows(self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        return "\n".join(_line(row, widths) for row in rows)


def count(weights: Mapping[str, Tensor]) -> PruningReport:
    """Count the non-zero weights of each layer.

    Parameters
    ----------
    weights : mapping of str to Tensor
        Weight of each layer by its qualified name.
    """
    with torch.no_grad():
        nnz = {name: int(torch.count_nonzero(weight)) for name, weight in weights.items()}
    return PruningReport(
        tuple(LayerSparsity(name, tuple(weight.shape), weight.numel(), nnz[name]) for name, weight in weights.items())
    )


def report(model: nn.Module, filter: LayerFilter | None = None) -> PruningReport:
    """Report the sparsity of a model's layers (the same default choice as ``prune_``).

    Parameters
    ----------
    model : nn.Module
        Not changed.
    filter : callable, optional
        ``(module, qualified_name) -> bool`` chooses the layers; ``default_filter`` if not given.

    Raises
    ------
    TypeError, ValueError
        As ``select_layers``.
    """
    return count(weights_of(select_layers(model, filter)))


def print_report(report: PruningReport) -> None:
    """Print a report as a table in the terminal (needs rich)."""
    from rich.console import Console
    from rich.table import Table

    *layers, total = _rows(report)
    table = Table(title="Sparsity")
    for column in _HEADER:
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in layers:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    Console().print(table)


_HEADER = ("layer", "shape", "weights", "non-zero", "sparsity")


def _rows(report: PruningReport) -> list[tuple[str, ...]]:
    rows = [
        (x.name or "(model)", "x".join(map(str, x.shape)), f"{x.size}", f"{x.nnz}", f"{x.sparsity:.2%}")
        for x in report.layers
    ]
    return [*rows, ("total", "", f"{report.size}", f"{report.nnz}", f"{report.sparsity:.2%}")]


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = row
    cells = [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
