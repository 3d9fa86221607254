"""Time tables: how long each layer takes at several sparsities, for the choice of sparsities.

They are plain data, ``{layer: {sparsity: microseconds}}``, as `numbasparse.pruning.allocate_for_speed` takes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.model import problems_of
from autotune.study import tune_layers
from autotune.tuned import TunedModel

if TYPE_CHECKING:
    import torch

    from numbasparse.pruning import LayerFilter

TimeTables = dict[str, dict[float, float]]


def time_tables(tuned: Mapping[float, TunedModel]) -> TimeTables:
    """Make time tables from tuned files of one model, pruned to several sparsities.

    Parameters
    ----------
    tuned
        Each file under the sparsity, in [0, 1), that its model's layers were pruned to. All on the same device.

    Returns
    -------
    dict of str to dict of float to float
        Median microseconds of every layer that is in all files; the sum, for a layer that runs with several shapes.
        Where ``tuned`` has no entry 0.0, the table's is the dense convolution's time in the files, if they have it.

    Raises
    ------
    ValueError
        If there is no file, a sparsity is out of its range, the files are of different devices, or no layer is in all.
    """
    if not tuned:
        raise ValueError("tuned has no files: expected at least one {sparsity: tuned file}")
    wrong = [sparsity for sparsity in tuned if not 0.0 <= sparsity < 1.0]
    if wrong:
        raise ValueError(f"sparsities must be in [0, 1), got {wrong[0]!r}")
    labels = sorted({model.device.label for model in tuned.values()})
    if len(labels) > 1:
        raise ValueError(f"times of different devices cannot be compared, got {'; '.join(labels)}")
    columns = {sparsity: _sums(tuned[sparsity], "median_us") for sparsity in sorted(tuned)}
    if 0.0 not in columns:
        # Measured once per file: the least disturbed counts.
        dense = [_sums(model, "dense_choice_us") for model in tuned.values()]
        columns = {0.0: {name: min(times[name] for times in dense) for name in _common(dense)}, **columns}
    names = _common([column for sparsity, column in columns.items() if sparsity in tuned])
    if not names:
        raise ValueError("no layer is in all tuned files: make them from the same model")
    return {name: {s: column[name] for s, column in columns.items() if name in column} for name in names}


def _sums(model: TunedModel, field: str) -> dict[str, float]:
    """Return a time of every layer by name, without those that lack it."""
    times: dict[str, list[float | None]] = {}
    for layer in model.layers:
        for name in layer.names:
            times.setdefault(name, []).append(getattr(layer, field))
    return {name: math.fsum(x for x in values if x is not None) for name, values in times.items() if None not in values}


def _common(columns: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names that every column has, in the order of the first."""
    return [name for name in columns[0] if all(name in column for column in columns)]


def measure_time_tables(
    model: torch.nn.Module,
    example_input: Any,
    sparsities: Sequence[float],
    *,
    vector: int = 1,
    filter: LayerFilter | None = None,
    **options: Any,
) -> TimeTables:
    """Tune a model's layers at several sparsities and return their time tables.

    Parameters
    ----------
    model
        Not changed: copies are pruned by magnitude, every chosen layer to the same sparsity.
    example_input
        As in `tune`.
    sparsities
        In [0, 1).
    vector
        Granularity of pruning.
    filter
        Chooses the layers; `numbasparse.pruning.default_filter` if not given.
    options
        Of `tune_layers`: device, trials, storage, threads and so on.

    Raises
    ------
    ValueError
        As `problems_of`, `numbasparse.pruning.prune_` and `tune_layers`.
    """
    from numbasparse.pruning import MagnitudePruning, prune_

    configs = {float(sparsity): MagnitudePruning(sparsity, "layer", vector) for sparsity in sparsities}
    device = options.get("device", "cpu")
    tuned = {}
    for sparsity, config in configs.items():
        pruned = copy.deepcopy(model)
        chosen = {layer.name for layer in prune_(pruned, config, filter).layers}
        problems = [p for p in problems_of(pruned, example_input, device=device) if p.name in chosen]
        tuned[sparsity] = tune_layers(problems, **options)
    return time_tables(tuned)
