"""Activations that a convolution applies before it writes its output: their names, and what they are in torch.

``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` and ``"leaky_relu(SLOPE)"``, with the factor of negative values in
the name: ``"leaky_relu(0.2)"``.  ``"leaky_relu"`` alone has torch's usual slope, 0.01.  All keep NaN, as torch does.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Activation = str
"""A name as `check_activation` returns it."""

SIMPLE = ("none", "relu", "relu6", "silu")

_LEAKY = re.compile(r"leaky_relu(?:\((.+)\))?")
USUAL_SLOPE = 0.01
"""That of torch where none is given."""


def check_activation(activation: str | None) -> Activation:
    """The one name of an activation; None is ``"none"``.

    Raises
    ------
    ValueError
        If it is none of those above, or its slope is negative or not finite.
    """
    if activation is None or activation in SIMPLE:
        return activation or "none"
    match = _LEAKY.fullmatch(activation) if isinstance(activation, str) else None
    if match is None:
        raise ValueError(f"activation must be None, 'relu', 'relu6', 'silu' or 'leaky_relu(SLOPE)', got {activation!r}")
    return leaky_relu(USUAL_SLOPE if match[1] is None else _number(match[1]))


def leaky_relu(slope: float) -> Activation:
    """The name of max(x, 0) + slope * min(x, 0).

    Raises
    ------
    ValueError
        If the slope is negative (the gradient could not be told from the result) or not finite.
    """
    if not (math.isfinite(slope) and slope >= 0):
        raise ValueError(f"the slope of leaky_relu must be a finite number of at least 0, got {slope}")
    return f"leaky_relu({float(slope)!r})"


def slope_of(activation: Activation) -> float | None:
    """The slope of a leaky ReLU; None for the others."""
    match = _LEAKY.fullmatch(activation)
    return None if match is None else float(match[1])


@functools.cache
def in_torch(activation: Activation, inplace: bool = False) -> Callable[[Tensor], Tensor]:
    """A function that does the same in torch; ``inplace`` lets it change its argument."""
    from torch.nn import functional as F

    slope = slope_of(activation)
    if slope is not None:
        return functools.partial(F.leaky_relu, negative_slope=slope, inplace=inplace)
    if activation == "none":
        return lambda y: y
    functions: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}
    return functools.partial(functions[activation], inplace=inplace)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
