"""Plain loops over arrays, compiled by numba, which is loaded when the first of them is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled; those that its module names in ``_HELPERS`` are too, for it to call."""
    import numba

    names = function.__globals__
    for name in names.get("_HELPERS", ()):
        if not hasattr(names[name], "py_func"):
            names[name] = numba.njit(cache=True)(names[name])
    return numba.njit(cache=True)(function)


def population(v: Any) -> Any:
    """Bits of a uint64 that are set: by halving (Hacker's Delight, 5-1)."""
    v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
    v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((v * np.uint64(0x0101010101010101)) >> np.uint64(56))
