"""Sparse convolutions in torch models (needs torch)::

    model = convert(pruned_model)  # or convert(pruned_model, tuned, example_input)
    with torch.inference_mode():
        y = model(x)

Importing this registers the operator ``torch.ops.numbasparse.conv2d``, which programs exported with
``torch.export`` need before they can be loaded.
"""

from numbasparse.nn.captured import CapturedModel, capture
from numbasparse.nn.convert import ConvertedLayer, conversion_report, convert
from numbasparse.nn.linear import SparseLinear
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.operator import clear_cache, conv2d
from numbasparse.nn.program import Program
from numbasparse.nn.saved import load, save

__all__ = [
    "CapturedModel",
    "ConvertedLayer",
    "Program",
    "SparseConv2d",
    "SparseLinear",
    "capture",
    "clear_cache",
    "conv2d",
    "conversion_report",
    "convert",
    "load",
    "save",
]
