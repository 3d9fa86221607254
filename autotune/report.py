"""The table of a tuned model, as plain data and for the terminal, and the progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from numbasparse.spec import ConvSpec

if TYPE_CHECKING:
    from autotune.tuned import TunedModel


def layer_rows(tuned: TunedModel) -> list[dict[str, Any]]:
    """One dict for each layer's name, in the file's order.

    Keys: ``name``, ``shape`` (short text), ``sparsity`` (fraction), ``kernel``, ``config`` (dict), ``dense_us``,
    ``median_us``, ``spread_us``, ``ratio`` (dense_us and ratio may be None), ``trials``.
    """
    return [
        {
            "name": name,
            "shape": short_shape(ConvSpec.from_dict(layer.spec)),
            "sparsity": layer.sparsity,
            "kernel": layer.choice.kernel,
            "config": dict(layer.choice.config),
            "dense_us": layer.dense_us,
            "median_us": layer.median_us,
            "spread_us": layer.spread_us,
            "ratio": layer.ratio,
            "trials": layer.trials,
        }
        for layer in tuned.layers
        for name in layer.names
    ]


def short_shape(spec: ConvSpec) -> str:
    """For example ``"8x64x56x56 -> 128, 3x3 /2"``."""
    text = f"{spec.n}x{spec.c}x{spec.h}x{spec.w} -> {spec.k}, {spec.r}x{spec.s}"
    if spec.stride != (1, 1):
        same = spec.stride[0] == spec.stride[1]
        text += f" /{spec.stride[0]}" if same else f" /{spec.stride[0]}x{spec.stride[1]}"
    return text if spec.groups == 1 else f"{text} g{spec.groups}"


def short_config(kernel: str, config: Mapping[str, int | str]) -> str:
    """The kernel and the values of its config in its order, for example ``"cpu_direct 8,8,14x1,copied,22,1"``."""
    return f"{kernel} {','.join(str(value) for value in config.values())}"


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over rows of `layer_rows`: ``ratio`` (geometric mean), ``dense_us`` and ``median_us`` (totals)."""
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    dense = [row["dense_us"] for row in rows]
    known = bool(dense) and all(us is not None for us in dense)
    return {
        "ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        "dense_us": sum(dense) if known else None,
        "median_us": sum(row["median_us"] for row in rows),
    }


def table(tuned: TunedModel) -> Table:
    """The end table: every layer, then totals and the geometric mean of the ratios."""
    rows = layer_rows(tuned)
    total = summary(rows)
    out = Table(title=tuned.device.label, show_footer=True)
    out.add_column("layer", footer="total, geometric mean", overflow="fold")
    out.add_column("shape")
    out.add_column("zeros", justify="right")
    out.add_column("choice", overflow="fold")
    out.add_column("dense µs", justify="right", footer=_us(total["dense_us"]))
    out.add_column("chosen µs", justify="right", footer=_us(total["median_us"]))
    out.add_column("ratio", justify="right", footer=_ratio(total["ratio"]))
    for row in rows:
        choice = short_config(row["kernel"], row["config"])
        times = (_us(row["dense_us"]), _us(row["median_us"]), _ratio(row["ratio"]))
        out.add_row(row["name"], row["shape"], f"{100 * row['sparsity']:.1f}%", choice, *times)
    return out


def print_report(tuned: TunedModel, console: Console | None = None) -> None:
    """Print the end table."""
    (console or Console()).print(table(tuned), markup=False)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """Give a function ``advance(layers, name)`` that moves a bar on standard error, if it is to be shown."""
    if not show:
        yield lambda layers, name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[layer]}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tuning", total=total, layer="")
        yield lambda layers, name: bar.update(task, advance=layers, layer=name)
