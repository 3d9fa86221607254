"""What ``numbasparse quantize`` does."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from numbasparse.pruning import FitConfig, SGDConfig, fit
from numbasparse.quantization import (
    CodebookQuantization,
    LinearQuantization,
    QuantizationReport,
    Quantizer,
    QuantizerCallback,
    print_report,
    quantize_,
)
from numbasparse.quantization.layers import QuantizationConfig
from numbasparse.quantization.linear import Range


def config_of(
    bits: int, levels: str, *, group: int | None, affine: bool, per_channel: bool, range_: str
) -> LinearQuantization | CodebookQuantization:
    """The config that the options ask for.

    Raises
    ------
    ValueError
        If an option is one of the other kind of levels.
    """
    if levels == "linear":
        if group is not None:
            raise ValueError("--group is for --levels codebook only")
        granularity: Literal["tensor", "channel"] = "channel" if per_channel else "tensor"
        return LinearQuantization(bits, not affine, granularity, cast(Range, range_))
    if affine or per_channel or range_ != "minmax":
        raise ValueError("--affine, --per-channel and --range are for --levels linear only")
    return CodebookQuantization(bits, "layer" if group is None else "channel_group", group)


def quantize_at_once(model: nn.Module, config: QuantizationConfig) -> QuantizationReport:
    """Quantize in place and print the report."""
    report = quantize_(model, config)
    print_report(report)
    return report


def quantize_with_retraining(
    model: nn.Module, batches: Any, config: QuantizationConfig, *, epochs: int, lr: float, device: str
) -> QuantizationReport:
    """Quantize in place while retraining, and print the report."""
    if callable(batches) and not hasattr(batches, "__iter__"):
        batches = batches()
    callback = QuantizerCallback(Quantizer(model, config))
    fit(model, batches, FitConfig(epochs=epochs, optimizer=SGDConfig(lr=lr)), callbacks=[callback], device=device)
    model.to("cpu")
    assert callback.report is not None
    print_report(callback.report)
    return callback.report
