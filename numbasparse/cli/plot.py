"""Pictures for the terminal user: one bar chart of a tuned model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def layer_bars(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the time of every layer, dense and chosen, into a PNG; ``rows`` as of `autotune.layer_rows`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [f"{row['name']}\n{row['sparsity']:.0%} zeros" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows))
    height = 0.38
    dense = [row["dense_us"] or 0.0 for row in rows]
    chosen = [row["median_us"] for row in rows]
    axes.barh([p - height / 2 for p in places], dense, height, color="#b0b7bf", label="dense (best of torch)")
    axes.barh([p + height / 2 for p in places], chosen, height, color="#1f77b4", label="chosen by the tuner")
    for p, row in zip(places, rows, strict=True):
        if row["ratio"]:
            axes.annotate(
                f"{row['ratio']:.1f}x", (row["median_us"], p + height / 2), (4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds (median)")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    beside = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(beside, dpi=130, format="png")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        plt.close(figure)
