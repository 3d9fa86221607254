"""Pruning: masks, schedules and retraining of PyTorch models (needs torch).

One call prunes at once, from the weights alone or with calibration data::

    report = prune_(model, MagnitudePruning(sparsity=0.9, scope="global"))
    report = prune_with_data_(model, batches, OBSPruning(sparsity=0.8))

Three calls prune in a training loop of one's own: ``Pruner.begin``, ``step`` and ``finish``. ``fit`` is a
ready loop around them.
"""

from numbasparse.pruning.allocation import Allocation
from numbasparse.pruning.criteria import Criterion, LayerwisePruning, MagnitudePruning, PruningConfig, magnitude
from numbasparse.pruning.distillation import Committee, Distillation
from numbasparse.pruning.first_order import FirstOrderPruning
from numbasparse.pruning.fit_config import AdamWConfig, FitConfig, SGDConfig
from numbasparse.pruning.layers import LayerFilter, default_filter
from numbasparse.pruning.loop import Callback, EpochRecord, fit
from numbasparse.pruning.masks import fold_masks
from numbasparse.pruning.obs import OBSPruning, recalibrate_batch_norm_
from numbasparse.pruning.one_shot import prune_, prune_with_data_
from numbasparse.pruning.pruner import Pruner
from numbasparse.pruning.reorder import Reordering, reorder_channels, reorder_inputs
from numbasparse.pruning.schedules import ACDCSchedule, CubicSchedule
from numbasparse.pruning.search import SearchConfig, SearchResult, fine_tune, search_sparsity
from numbasparse.pruning.sensitivity import measure_sensitivity
from numbasparse.pruning.speed import SpeedAllocation, allocate_for_speed
from numbasparse.pruning.summary import LayerSparsity, PruningReport, print_report, report

__all__ = [
    "ACDCSchedule",
    "AdamWConfig",
    "Allocation",
    "Callback",
    "Committee",
    "Criterion",
    "CubicSchedule",
    "Distillation",
    "EpochRecord",
    "FirstOrderPruning",
    "FitConfig",
    "LayerFilter",
    "LayerSparsity",
    "LayerwisePruning",
    "MagnitudePruning",
    "OBSPruning",
    "Pruner",
    "PruningConfig",
    "PruningReport",
    "Reordering",
    "SGDConfig",
    "SearchConfig",
    "SearchResult",
    "SpeedAllocation",
    "allocate_for_speed",
    "default_filter",
    "fine_tune",
    "fit",
    "fold_masks",
    "magnitude",
    "measure_sensitivity",
    "print_report",
    "prune_",
    "prune_with_data_",
    "recalibrate_batch_norm_",
    "reorder_channels",
    "reorder_inputs",
    "report",
    "search_sparsity",
]
