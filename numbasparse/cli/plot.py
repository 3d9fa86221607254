"""Pictures for the terminal user: one bar chart of a tuned model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numbasparse.files import write_whole


def layer_bars(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the time of the layers, dense and chosen, into a PNG; ``rows`` as of `autotune.layer_rows`."""
    from autotune import pictures

    write_whole(path, pictures.layer_bars(rows, title).png())
