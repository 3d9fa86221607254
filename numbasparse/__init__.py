"""numbasparse: direct sparse convolution for pruned CNNs, in numba, chosen and tuned per layer.

Importing the package loads neither torch, numba nor CUDA: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from numbasparse.functional import clear_cache, conv2d
    from numbasparse.plans import Choice, Plan, plan
    from numbasparse.runtime.cpu import get_num_threads, set_num_threads
    from numbasparse.spec import ConvSpec
    from numbasparse.weight import SparseWeight, load_weights, save_weights

_HOMES = {
    "Choice": "plans",
    "ConvSpec": "spec",
    "Plan": "plans",
    "SparseWeight": "weight",
    "clear_cache": "functional",
    "conv2d": "functional",
    "get_num_threads": "runtime.cpu",
    "load_weights": "weight",
    "plan": "plans",
    "save_weights": "weight",
    "set_num_threads": "runtime.cpu",
}

__all__ = [
    "Choice",
    "ConvSpec",
    "Plan",
    "SparseWeight",
    "__version__",
    "clear_cache",
    "conv2d",
    "get_num_threads",
    "load_weights",
    "plan",
    "save_weights",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # Kept, so that the next use is a plain look-up.
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
