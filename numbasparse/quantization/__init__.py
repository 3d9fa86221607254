"""Quantization: weights of 2 to 8 bits, with linear levels or codebooks.

The configs need no torch::

    weight = SparseWeight.from_dense(array, quantization=CodebookQuantization(bits=4))

All else is for PyTorch models. One call quantizes at once::

    report = quantize_(model, LinearQuantization(bits=8))

Three calls retrain in a training loop of one's own: ``Quantizer.begin``, ``step`` and ``finish``;
`QuantizerCallback` does so in ``numbasparse.pruning.fit``. The report's ``weights`` make a model that runs codes::

    converted = convert(model, example_input=x, quantized=report.weights)
    tuned = autotune.tune(converted, x)
    converted = convert(model, tuned, x, quantized=report.weights)

``quantize_activations_`` simulates activations of few bits.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from numbasparse.quantization.codebook import CodebookQuantization
from numbasparse.quantization.huffman import huffman_nbytes
from numbasparse.quantization.linear import LinearQuantization
from numbasparse.quantization.summary import LayerQuantization, QuantizationReport, print_report

if TYPE_CHECKING:
    from numbasparse.quantization.activations import ActivationQuantization, FakeQuantize, quantize_activations_
    from numbasparse.quantization.layers import quantize_
    from numbasparse.quantization.training import Quantizer, QuantizerCallback, fold_quantization

# Modules that load torch.
_HOMES = {
    "ActivationQuantization": "activations",
    "FakeQuantize": "activations",
    "Quantizer": "training",
    "QuantizerCallback": "training",
    "fold_quantization": "training",
    "quantize_": "layers",
    "quantize_activations_": "activations",
}

__all__ = [
    "ActivationQuantization",
    "CodebookQuantization",
    "FakeQuantize",
    "LayerQuantization",
    "LinearQuantization",
    "QuantizationReport",
    "Quantizer",
    "QuantizerCallback",
    "fold_quantization",
    "huffman_nbytes",
    "print_report",
    "quantize_",
    "quantize_activations_",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
