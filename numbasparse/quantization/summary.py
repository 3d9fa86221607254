"""Summary: how small a quantized model's layers are, and how far from what they were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.quantization.huffman import huffman_nbytes
from numbasparse.weight import SparseWeight


@dataclass(frozen=True)
class LayerQuantization:
    """One quantized layer.

    Attributes
    ----------
    name : str
        Qualified name of the layer; empty if the model itself is the layer.
    weight : SparseWeight
        Quantized: what the layer's weight is now.
    nnz_before : int
        Non-zero weights before; those of `weight` that became zero are fewer.
    error : float
        Relative error: norm of the change, divided by the norm of the weight before; 0 for a weight of zeros.
    """

    name: str
    weight: SparseWeight
    nnz_before: int
    error: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        assert self.weight.levels is not None
        return self.weight.levels.bits

    @property
    def size(self) -> int:
        """Number of weights, zeros too."""
        return int(np.prod(self.weight.shape))

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight in float32."""
        return 4 * self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized sparse weight in memory."""
        return self.weight.nbytes

    @cached_property
    def huffman_nbytes(self) -> int:
        """Bytes with Huffman-coded codes and positions (see `numbasparse.quantization.huffman`)."""
        return huffman_nbytes(self.weight)


@dataclass(frozen=True)
class QuantizationReport:
    """Every quantized layer; ``str(report)`` is a plain table."""

    layers: tuple[LayerQuantization, ...]

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """The quantized weight of each layer by its name, as for `numbasparse.save_weights`."""
        return {layer.name: layer.weight for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Return the report in the types of JSON, without the weights."""
        numbers = ("bits", "size", "nnz_before", "error", "dense_nbytes", "nbytes", "huffman_nbytes")
        layers = [
            {"name": x.name, "shape": list(x.weight.shape), "nnz": x.weight.nnz, **{n: getattr(x, n) for n in numbers}}
            for x in self.layers
        ]
        totals = {n: sum(layer[n] for layer in layers) for n in _SUMMED}
        return {**totals, "layers": layers}

    def __str__(self) -> str:
        rows = [_HEADER, *_rows(self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        return "\n".join(_line(row, widths) for row in rows)


def compare(name: str, before: NDArray[np.float32], after: SparseWeight) -> LayerQuantization:
    """Describe a layer whose dense weight ``before`` (of `after`'s shape) became ``after``."""
    norm = float(np.linalg.norm(before.astype(np.float64)))
    change = float(np.linalg.norm(after.to_dense().astype(np.float64) - before.reshape(after.shape)))
    return LayerQuantization(name, after, int(np.count_nonzero(before)), change / norm if norm else 0.0)


def print_report(report: QuantizationReport) -> None:
    """Print a report as a table in the terminal (needs rich)."""
    from rich.console import Console
    from rich.table import Table

    *layers, total = _rows(report)
    table = Table(title="Quantization, sizes in bytes")
    for column in _HEADER:
        name = column == "layer"
        table.add_column(column, justify="left" if name else "right", overflow="fold" if name else "ellipsis")
    for row in layers:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    Console().print(table)


_SUMMED = ("size", "nnz", "dense_nbytes", "nbytes", "huffman_nbytes")
_HEADER = ("layer", "bits", "non-zero", "error", "dense", "sparse", "Huffman")


def _rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    rows = [
        (
            x.name or "(model)",
            f"{x.bits}",
            f"{x.weight.nnz}",
            f"{x.error:.2%}",
            f"{x.dense_nbytes}",
            f"{x.nbytes}",
            f"{x.huffman_nbytes}",
        )
        for x in report.layers
    ]
    totals = report.to_dict()
    sums = (f"{totals[name]}" for name in ("dense_nbytes", "nbytes", "huffman_nbytes"))
    return [*rows, ("total", "", f"{totals['nnz']}", "", *sums)]


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = row
    cells = [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
