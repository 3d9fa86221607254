"""Pruning: masks, gradual schedules and retraining of PyTorch models (needs torch).

One call prunes at once::

    report = prune_(model, MagnitudePruning(sparsity=0.9, scope="global"))

Three calls prune in a training loop of one's own: ``Pruner.begin``, ``step`` and ``finish``. ``retrain`` is a
ready loop around them.
"""

from numbasparse.pruning.allocation import Allocation
from numbasparse.pruning.criteria import Criterion, MagnitudePruning, PruningConfig, magnitude
from numbasparse.pruning.masks import LayerFilter, default_filter, fold_masks, prune_, report
from numbasparse.pruning.schedule import CubicSchedule, EpochRecord, Pruner, SGDConfig, retrain
from numbasparse.pruning.summary import LayerSparsity, PruningReport, print_report

__all__ = [
    "Allocation",
    "Criterion",
    "CubicSchedule",
    "EpochRecord",
    "LayerFilter",
    "LayerSparsity",
    "MagnitudePruning",
    "Pruner",
    "PruningConfig",
    "PruningReport",
    "SGDConfig",
    "default_filter",
    "fold_masks",
    "magnitude",
    "print_report",
    "prune_",
    "report",
    "retrain",
]
