"""autotune: chooses the fastest kernel and config for every layer, by measurement, and keeps the choice in a file.

`tune` takes a torch model, `tune_layers` a list of `LayerProblem`; both give a `TunedModel`, which is saved as
JSON and answers ``choice(spec, weight, name)``, so that it can stand wherever numbasparse takes a config.

Importing the package loads neither torch nor Optuna: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.model import tune
    from autotune.report import layer_rows, print_report
    from autotune.space import LayerProblem
    from autotune.study import tune_layers
    from autotune.tables import measure_time_tables, time_tables
    from autotune.tuned import BUCKETS, TunedModel, bucket_of, load

_HOMES = {
    "BUCKETS": "tuned",
    "LayerProblem": "space",
    "TunedModel": "tuned",
    "bucket_of": "tuned",
    "layer_rows": "report",
    "load": "tuned",
    "measure_time_tables": "tables",
    "print_report": "report",
    "time_tables": "tables",
    "tune": "model",
    "tune_layers": "study",
}

__all__ = [
    "BUCKETS",
    "LayerProblem",
    "TunedModel",
    "bucket_of",
    "layer_rows",
    "load",
    "measure_time_tables",
    "print_report",
    "time_tables",
    "tune",
    "tune_layers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
