from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import conv_specs

from numbasparse import spec as spec_module
from numbasparse.spec import ConvSpec

RESNET = ConvSpec.create((1, 64, 56, 56), (64, 64, 3, 3), padding=1)


def _torch_out_shape(spec: ConvSpec) -> tuple[int, ...]:
    """Ask torch, on the meta device: no arithmetic is done."""
    (top, bottom), (left, right) = spec.padding
    x = torch.nn.functional.pad(torch.empty(spec.x_shape, device="meta"), (left, right, top, bottom))
    weight = torch.empty(spec.weight_shape, device="meta")
    out = torch.nn.functional.conv2d(x, weight, None, spec.stride, 0, spec.dilation, spec.groups)
    return tuple(out.shape)


def test_properties() -> None:
    spec = ConvSpec.create((2, 8, 9, 7), (6, 4, 3, 2), stride=(2, 1), padding=((1, 0), (2, 3)), groups=2)
    assert spec.x_shape == (2, 8, 9, 7)
    assert spec.weight_shape == (6, 4, 3, 2)
    assert (spec.c_per_group, spec.k_per_group) == (4, 3)
    assert (spec.padded_h, spec.padded_w) == (10, 12)
    assert spec.out_shape == (2, 6, 4, 11) == (2, 6, spec.out_h, spec.out_w)
    assert spec.macs == 2 * 6 * 4 * 11 * 4 * 3 * 2
    assert spec.is_padded
    assert not spec.is_pointwise
    assert not ConvSpec.create((1, 1, 1, 1), (1, 1, 1, 1)).is_padded
    assert ConvSpec.create((1, 1, 1, 1), (1, 1, 1, 1)).is_pointwise


@settings(max_examples=200, deadline=None)
@given(conv_specs())
def test_out_shape_is_torchs(spec: ConvSpec) -> None:
    assert spec.out_shape == _torch_out_shape(spec)


@settings(max_examples=100, deadline=None)
@given(conv_specs(max_pixels=30))
def test_strategy_keeps_its_bounds_and_dict_and_key_round_trip(spec: ConvSpec) -> None:
    assert spec.h * spec.w <= 30
    assert ConvSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert _spec_of_key(spec.key) == spec


def _spec_of_key(key: str) -> ConvSpec:
    """Read a key back, which shows that it holds every field."""
    pattern = (
        r"n(\d+)_c(\d+)_h(\d+)_w(\d+)_k(\d+)_r(\d+)_s(\d+)"
        r"_st(\d+)x(\d+)_p(\d+)\.(\d+)\.(\d+)\.(\d+)_d(\d+)x(\d+)_g(\d+)_(\w+)"
    )
    match = re.fullmatch(pattern, key)
    assert match is not None
    *numbers, dtype = match.groups()
    n, c, h, w, k, r, s, sv, sh, top, bottom, left, right, dv, dh, groups = map(int, numbers)
    padding = ((top, bottom), (left, right))
    return ConvSpec(n, c, h, w, k, r, s, (sv, sh), padding, (dv, dh), groups, dtype)


def test_key() -> None:
    assert RESNET.key == "n1_c64_h56_w56_k64_r3_s3_st1x1_p1.1.1.1_d1x1_g1_float32"


def test_is_frozen_slotted_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RESNET.n = 2  # type: ignore[misc]
    assert not hasattr(RESNET, "__dict__")
    assert len({RESNET, RESNET.with_batch(1), RESNET.with_batch(2)}) == 2


def test_with_batch_validates() -> None:
    assert RESNET.with_batch(8).x_shape == (8, 64, 56, 56)
    with pytest.raises(ValueError, match="batch size n must be at least 1, got 0"):
        RESNET.with_batch(0)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), ((0, 1), (2, 3))),
        ([[0, 1], [2, 3]], ((0, 1), (2, 3))),
        ("valid", ((0, 0), (0, 0))),
        ("same", ((1, 1), (1, 2))),
    ],
)
def test_padding_forms(padding: Any, expected: Any) -> None:
    assert ConvSpec.create((1, 1, 8, 8), (1, 1, 3, 4), padding=padding).padding == expected


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_padding_same_is_torchs(kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 7, 9, dtype=torch.float64), torch.randn(1, 1, *kernel, dtype=torch.float64)
    spec = ConvSpec.create(tuple(x.shape), tuple(weight.shape), padding="same", dilation=dilation)
    (top, bottom), (left, right) = spec.padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    ours = torch.nn.functional.conv2d(padded, weight, dilation=dilation)
    torch.testing.assert_close(ours, torch.nn.functional.conv2d(x, weight, padding="same", dilation=dilation))


def test_create_takes_numpy_integers_and_torch_sizes() -> None:
    shape = torch.empty(1, 4, 5, 5).shape
    spec = ConvSpec.create(shape, np.array([2, 4, 3, 3]), np.int64(2), np.int32(1))  # type: ignore[arg-type]
    assert spec == ConvSpec(1, 4, 5, 5, 2, 3, 3, (2, 2), ((1, 1), (1, 1)))
    assert all(type(value) is int for value in spec.stride + spec.padding[0] + spec.weight_shape)


def test_channel_mismatch_names_layer_and_groups() -> None:
    text = "weight has 64 input channels but input has 32 (layer 'conv1', groups=1)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ConvSpec.create((1, 32, 8, 8), (16, 64, 3, 3), name="conv1")


def test_channel_mismatch_proposes_groups() -> None:
    with pytest.raises(ValueError, match=r"but input has 32; with groups=4 they would agree \(groups=1\)$"):
        ConvSpec.create((1, 32, 8, 8), (16, 8, 3, 3))


GOOD: dict[str, Any] = {"x_shape": (1, 4, 8, 8), "weight_shape": (4, 4, 3, 3)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x_shape": (1, 4, 8)}, ValueError, "3 sizes.*1-D"),
        ({"x_shape": (0, 4, 8, 8)}, ValueError, "at least 1, got 0"),
        ({"x_shape": (1, 4, 8.0, 8)}, TypeError, "int"),
        ({"x_shape": (True, 4, 8, 8)}, TypeError, "int"),
        ({"x_shape": 5}, TypeError, "sequence of ints"),
        ({"x_shape": "1488"}, TypeError, "sequence of ints"),
        ({"weight_shape": (4, 4, 9, 3)}, ValueError, "kernel of height 9"),
        ({"weight_shape": (4, 4, 3, 9)}, ValueError, "kernel of width 9"),
        ({"weight_shape": (4, 0, 3, 3)}, ValueError, "at least 1"),
        ({"dilation": 4}, ValueError, "spans 9.*height 8"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "two ints"),
        ({"stride": "2"}, TypeError, "stride must be an int"),
        ({"stride": None}, TypeError, "stride must be an int"),
        ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": ((1, 1), (1, -1))}, ValueError, "padding must be at least 0"),
        ({"padding": ((1, 1), 1)}, ValueError, r"\(top, bottom\)"),
        ({"padding": (1, 2, 3, 4)}, ValueError, "two ints"),
        ({"padding": "full"}, ValueError, "'same', 'valid'"),
        ({"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
        ({"padding": 1.5}, TypeError, "int"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": True}, TypeError, "groups must be an int"),
        ({"groups": 3, "weight_shape": (4, 4, 3, 3), "x_shape": (1, 12, 8, 8)}, ValueError, "groups=3 does not"),
        ({"dtype": "int8"}, ValueError, "float32"),
        ({"dtype": np.float32}, TypeError, "string"),
    ],
)
def test_create_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ConvSpec.create(**{**GOOD, **change})
    with pytest.raises(error, match="layer 'stem'"):
        ConvSpec.create(**{**GOOD, **change}, name="stem")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"n": np.int64(1)}, TypeError),
        ({"n": True}, TypeError),
        ({"n": 0}, ValueError),
        ({"stride": 1}, TypeError),
        ({"stride": [1, 1]}, TypeError),
        ({"stride": (1, 1.0)}, TypeError),
        ({"padding": (1, 1)}, TypeError),
        ({"padding": ((1, 1), [1, 1])}, TypeError),
        ({"padding": ((1, 1),)}, TypeError),
        ({"dilation": (0, 1)}, ValueError),
        ({"groups": 3}, ValueError),
        ({"c": 63, "groups": 2}, ValueError),
        ({"r": 60}, ValueError),
        ({"dtype": "float"}, ValueError),
    ],
)
def test_constructor_refuses(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        dataclasses.replace(RESNET, **change)


def test_from_dict_refuses() -> None:
    good = RESNET.to_dict()
    with pytest.raises(ValueError, match="missing: 'h'; unknown: none"):
        ConvSpec.from_dict({key: value for key, value in good.items() if key != "h"})
    with pytest.raises(ValueError, match="missing: none; unknown: 'height'"):
        ConvSpec.from_dict({**good, "height": 3})
    with pytest.raises(TypeError, match="mapping"):
        ConvSpec.from_dict([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int"):
        ConvSpec.from_dict({**good, "n": 1.0})
    with pytest.raises(TypeError, match="stride"):
        ConvSpec.from_dict({**good, "stride": {"a": 1}})


def test_shape_checks() -> None:
    RESNET.check_x_shape((1, 64, 56, 56))
    RESNET.check_weight_shape([64, 64, 3, 3])
    RESNET.check_bias_shape((64,))
    RESNET.check_out_shape(torch.empty(1, 64, 56, 56).shape)
    with pytest.raises(ValueError, match=r"bias must have shape \(64,\) = \(K,\), got \(64, 1\) \(layer 'a'\)"):
        RESNET.check_bias_shape((64, 1), name="a")
    for check in (RESNET.check_x_shape, RESNET.check_weight_shape, RESNET.check_out_shape):
        with pytest.raises(ValueError, match=r"got \(1, 64, 56\)"):
            check((1, 64, 56))


def test_helpers_for_weights() -> None:
    assert spec_module.as_weight_shape((8, 4, 3)) == (8, 4, 1, 3)
    with pytest.raises(ValueError, match="got 2 sizes"):
        spec_module.as_kernel_shape((1, 2))
    spec_module.check_matrix_shape((8, 36), (4, 3, 3))
    with pytest.raises(ValueError, match=r"shape \(K, 36\).*got \(8, 72\).*one group"):
        spec_module.check_matrix_shape((8, 72), (4, 3, 3))
