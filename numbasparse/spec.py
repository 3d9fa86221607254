"""One convolution problem, and every shape rule of the package.

Every other module asks this one whether shapes agree, so that a wrong shape is described in the same words
wherever it is found. Nothing here needs more than the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, cast

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Shape4 = tuple[int, int, int, int]
KernelShape = tuple[int, int, int]

DTYPES = ("float32", "float64", "float16", "bfloat16")

_SIZES = {
    "n": "batch size n",
    "c": "number of input channels c",
    "h": "input height h",
    "w": "input width w",
    "k": "number of output channels k",
    "r": "kernel height r",
    "s": "kernel width s",
    "groups": "groups",
}


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """A 2-D convolution (cross-correlation, as in torch): sizes only, no data.

    Immutable and hashable, so it serves as a dictionary key. :meth:`create` is the comfortable way to make
    one; the constructor takes the fields exactly as they are stored. A 1-D convolution has ``h == r == 1``.

    Parameters
    ----------
    n, c, h, w : int
        Input of shape (N, C, H, W), each at least 1.
    k : int
        Output channels.
    r, s : int
        Kernel height and width.
    stride, dilation : (int, int)
        Vertical and horizontal, each at least 1.
    padding : ((int, int), (int, int))
        ((top, bottom), (left, right)) rows and columns of zeros around the input, each at least 0.
    groups : int
        Divides both `c` and `k`.
    dtype : str
        Type of the activations: one of ``DTYPES``.

    Raises
    ------
    TypeError
        If a field has another type than the ones above (bool is not an int here).
    ValueError
        If a size is out of range, `groups` does not divide, or the kernel does not fit the padded input.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field, words in _SIZES.items():
            _check_int(getattr(self, field), words, least=1)
        _check_pair(self.stride, "stride", "(vertical, horizontal)", least=1)
        _check_pair(self.dilation, "dilation", "(vertical, horizontal)", least=1)
        _check_padding(self.padding)
        _check_dtype(self.dtype)
        check_groups(self.groups, self.k)
        if self.c % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {self.c} input channels; "
                f"choose groups that divide both input and output channels"
            )
        _check_fits("height", self.h, self.r, self.dilation[0], self.padding[0])
        _check_fits("width", self.w, self.s, self.dilation[1], self.padding[1])

    @classmethod
    def create(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        dtype: str = "float32",
        *,
        name: str | None = None,
    ) -> ConvSpec:
        """Make a spec from the shapes of an input and a weight, with the arguments torch takes.

        Parameters
        ----------
        x_shape : sequence of 4 ints
            (N, C, H, W).
        weight_shape : sequence of 4 ints
            (K, C/groups, R, S).
        stride, dilation : int or (int, int)
            One number for both directions, or (vertical, horizontal).
        padding : int, (int, int), ((int, int), (int, int)), "same" or "valid"
            One number for all sides, (vertical, horizontal), or ((top, bottom), (left, right)). "same" keeps
            the input's size, needs stride 1, and like torch puts an odd row or column at the bottom or right.
        groups : int
        dtype : str
        name : str, optional
            The layer's name, only for the text of errors.

        Returns
        -------
        ConvSpec

        Raises
        ------
        TypeError, ValueError
            As for the class, and if the channels of input and weight disagree.
        """
        try:
            return cls._create(x_shape, weight_shape, stride, padding, dilation, groups, dtype)
        except (TypeError, ValueError) as error:
            if name is None:
                raise
            raise type(error)(_with_name(str(error), name)) from None

    @classmethod
    def _create(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int] | Sequence[Sequence[int]],
        dilation: int | Sequence[int],
        groups: int,
        dtype: str,
    ) -> ConvSpec:
        n, c, h, w = _four_sizes(x_shape, "input", "(N, C, H, W)", "insert a height of 1")
        k, c_per_group, r, s = _four_sizes(weight_shape, "weight", "(K, C/groups, R, S)", "insert R of 1")
        groups = as_int(groups, "groups", least=1)
        _check_channels(c, c_per_group, k, groups)
        stride_pair = _pair(stride, "stride", least=1)
        dilation_pair = _pair(dilation, "dilation", least=1)
        padding_pairs = _paddings(padding, (r, s), stride_pair, dilation_pair)
        return cls(n, c, h, w, k, r, s, stride_pair, padding_pairs, dilation_pair, groups, dtype)

    @property
    def x_shape(self) -> Shape4:
        """Shape of the input: (N, C, H, W)."""
        return self.n, self.c, self.h, self.w

    @property
    def c_per_group(self) -> int:
        """Input channels that each output channel sees: C/groups."""
        return self.c // self.groups

    @property
    def k_per_group(self) -> int:
        """Output channels of each group: K/groups."""
        return self.k // self.groups

    @property
    def weight_shape(self) -> Shape4:
        """Shape of the dense weight: (K, C/groups, R, S)."""
        return self.k, self.c_per_group, self.r, self.s

    @property
    def padded_h(self) -> int:
        """Input height with top and bottom padding."""
        return self.h + sum(self.padding[0])

    @property
    def padded_w(self) -> int:
        """Input width with left and right padding."""
        return self.w + sum(self.padding[1])

    @property
    def is_padded(self) -> bool:
        """Whether any side has padding."""
        return self.padding != ((0, 0), (0, 0))

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1 x 1 (stride and padding may still be anything)."""
        return self.r == 1 and self.s == 1

    @property
    def out_h(self) -> int:
        """Output height."""
        return (self.padded_h - _extent(self.r, self.dilation[0])) // self.stride[0] + 1

    @property
    def out_w(self) -> int:
        """Output width."""
        return (self.padded_w - _extent(self.s, self.dilation[1])) // self.stride[1] + 1

    @property
    def out_shape(self) -> Shape4:
        """Shape of the output: (N, K, OH, OW)."""
        return self.n, self.k, self.out_h, self.out_w

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense convolution, taps on padding included."""
        return self.n * self.k * self.out_h * self.out_w * self.c_per_group * self.r * self.s

    @property
    def key(self) -> str:
        """Short readable text, different for different specs; padding is top.bottom.left.right."""
        (top, bottom), (left, right) = self.padding
        return (
            f"n{self.n}_c{self.c}_h{self.h}_w{self.w}_k{self.k}_r{self.r}_s{self.s}"
            f"_st{self.stride[0]}x{self.stride[1]}_p{top}.{bottom}.{left}.{right}"
            f"_d{self.dilation[0]}x{self.dilation[1]}_g{self.groups}_{self.dtype}"
        )

    def with_batch(self, n: int) -> ConvSpec:
        """Return the same convolution for a batch of `n`."""
        return replace(self, n=n)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types: ints, strings and lists."""
        return {field.name: _listed(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvSpec:
        """Make a spec from what :meth:`to_dict` gave; every field must be there.

        Raises
        ------
        TypeError
            If `values` is no mapping or a field has the wrong type.
        ValueError
            If keys are missing or unknown, or a field is out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"expected a mapping of ConvSpec fields, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        missing = [key for key in known if key not in values]
        unknown = [key for key in values if key not in known]
        if missing or unknown:
            raise ValueError(
                f"a ConvSpec needs exactly the keys {', '.join(known)}; missing: "
                f"{_names(missing)}; unknown: {_names(unknown)}"
            )
        return cls(**{key: _tupled(values[key]) for key in known})

    def check_x_shape(self, shape: Sequence[int], *, name: str | None = None) -> None:
        """Raise ValueError unless `shape` is the input's, (N, C, H, W)."""
        _check_shape(shape, self.x_shape, "input", "(N, C, H, W)", name)

    def check_weight_shape(self, shape: Sequence[int], *, name: str | None = None) -> None:
        """Raise ValueError unless `shape` is the dense weight's, (K, C/groups, R, S)."""
        _check_shape(shape, self.weight_shape, "weight", f"(K, C/groups, R, S), groups={self.groups}", name)

    def check_bias_shape(self, shape: Sequence[int], *, name: str | None = None) -> None:
        """Raise ValueError unless `shape` is (K,)."""
        _check_shape(shape, (self.k,), "bias", "(K,)", name)

    def check_out_shape(self, shape: Sequence[int], *, name: str | None = None) -> None:
        """Raise ValueError unless `shape` is the output's, (N, K, OH, OW)."""
        _check_shape(shape, self.out_shape, "output", "(N, K, OH, OW)", name)


def as_int(value: object, words: str, least: int) -> int:
    """Return `value` as a plain int; NumPy integers are accepted, bool is not.

    Raises
    ------
    TypeError
        If `value` is no integer; `words` names it in the text.
    ValueError
        If it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{words} must be an int, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < least:
        raise ValueError(f"{words} must be at least {least}, got {number}")
    return number


def as_weight_shape(shape: Sequence[int]) -> Shape4:
    """Return (K, C/groups, R, S) for the shape of a dense weight; 3-D (K, C/groups, S) gets R = 1.

    Raises
    ------
    ValueError
        If there are not 3 or 4 sizes or one is 0.
    """
    sizes = tuple(shape)
    if len(sizes) == 3:
        sizes = (sizes[0], sizes[1], 1, sizes[2])
    return _four_sizes(sizes, "weight", "(K, C/groups, R, S) or, for 1-D, (K, C/groups, S)", None)


def as_kernel_shape(shape: Iterable[int]) -> KernelShape:
    """Return (C/groups, R, S) as plain ints.

    Raises
    ------
    TypeError
        If `shape` is no sequence of ints.
    ValueError
        If there are not 3 sizes or one is below 1.
    """
    sizes = _sizes(shape, "kernel_shape")
    if len(sizes) != 3:
        raise ValueError(f"kernel_shape must be (C/groups, R, S), got {len(sizes)} sizes: {sizes}")
    c_per_group, r, s = sizes
    return c_per_group, r, s


def check_groups(groups: int, k: int) -> None:
    """Raise ValueError unless `groups` divides the `k` output channels."""
    if k % groups:
        raise ValueError(
            f"groups={groups} does not divide the {k} output channels; "
            f"choose groups that divide both input and output channels"
        )


def check_matrix_shape(shape: Sequence[int], kernel_shape: KernelShape) -> None:
    """Raise ValueError unless a weight matrix of `shape` is (K, C/groups*R*S) for `kernel_shape`."""
    c_per_group, r, s = kernel_shape
    width = c_per_group * r * s
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise ValueError(
            f"weight matrix must have shape (K, {width}) for kernel_shape (C/groups, R, S) = {kernel_shape}, "
            f"got {tuple(shape)}; note that C counts the channels of one group"
        )


def _with_name(text: str, name: str) -> str:
    """Add the layer's name, into the remark that `text` ends with if it is the one on groups."""
    start, bracket, remark = text.rpartition(" (groups=")
    if bracket:
        return f"{start} (layer {name!r}, groups={remark}"
    return f"{text} (layer {name!r})"


def _check_int(value: object, words: str, least: int) -> None:
    """Stricter than `as_int`: stored fields are plain ints, so that equal specs have equal JSON."""
    if type(value) is not int:
        raise TypeError(f"{words} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{words} must be at least {least}, got {value}")


def _check_pair(value: object, words: str, parts: str, least: int) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{words} must be a tuple of two ints {parts}, got {value!r}")
    for number in value:
        _check_int(number, words, least)


def _check_padding(value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"padding must be the tuple ((top, bottom), (left, right)), got {value!r}")
    _check_pair(value[0], "vertical padding", "(top, bottom)", least=0)
    _check_pair(value[1], "horizontal padding", "(left, right)", least=0)


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a string such as 'float32', got {dtype!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _extent(size: int, dilation: int) -> int:
    """Rows or columns of input that a dilated kernel spans."""
    return dilation * (size - 1) + 1


def _check_fits(direction: str, size: int, kernel: int, dilation: int, padding: Pair) -> None:
    extent, padded = _extent(kernel, dilation), size + sum(padding)
    if extent > padded:
        raise ValueError(
            f"kernel of {direction} {kernel} with dilation {dilation} spans {extent}, but the padded input "
            f"has only {direction} {padded} ({size} plus padding {padding[0]} and {padding[1]}); "
            f"use a larger input, more padding, or a smaller kernel or dilation"
        )


def _check_channels(c: int, c_per_group: int, k: int, groups: int) -> None:
    if c_per_group * groups == c:
        return
    per_group = "" if groups == 1 else f" ({c_per_group} per group)"
    advice = ""
    if c % c_per_group == 0 and k % (c // c_per_group) == 0:
        advice = f"; with groups={c // c_per_group} they would agree"
    raise ValueError(
        f"weight has {c_per_group * groups} input channels{per_group} but input has {c}{advice} (groups={groups})"
    )


def _check_shape(shape: Sequence[int], expected: tuple[int, ...], what: str, axes: str, name: str | None) -> None:
    if tuple(shape) != expected:
        layer = "" if name is None else f" (layer {name!r})"
        raise ValueError(f"{what} must have shape {expected} = {axes}, got {tuple(shape)}{layer}")


def _sizes(shape: Iterable[int], what: str) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise TypeError(f"{what} must be a sequence of ints, got {shape!r}")
    return tuple(as_int(size, f"every size of {what}", least=1) for size in shape)


def _four_sizes(shape: Iterable[int], what: str, axes: str, hint: str | None) -> Shape4:
    sizes = _sizes(shape, f"the {what}'s shape")
    if len(sizes) != 4:
        advice = f"; for a 1-D convolution {hint}" if hint and len(sizes) == 3 else ""
        raise ValueError(f"{what} must have shape {axes}, got {len(sizes)} sizes: {sizes}{advice}")
    a, b, c, d = sizes
    return a, b, c, d


def _pair(value: int | Sequence[int], what: str, least: int) -> Pair:
    """Return (vertical, horizontal) for one int or two."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        number = as_int(value, what, least)
        return number, number
    if len(value) != 2:
        raise ValueError(f"{what} must be an int or two ints, got {len(value)} of them: {tuple(value)}")
    return as_int(value[0], what, least), as_int(value[1], what, least)


def _paddings(
    padding: int | str | Sequence[int] | Sequence[Sequence[int]], kernel: Pair, stride: Pair, dilation: Pair
) -> Padding:
    if isinstance(padding, str):
        return _named_padding(padding, kernel, stride, dilation)
    if isinstance(padding, Sequence) and any(isinstance(part, Sequence) for part in padding):
        if len(padding) != 2 or not all(isinstance(part, Sequence) and len(part) == 2 for part in padding):
            raise ValueError(f"padding must be given as ((top, bottom), (left, right)), got {padding!r}")
        vertical, horizontal = cast("Sequence[Sequence[int]]", padding)
        return _pair(vertical, "padding", least=0), _pair(horizontal, "padding", least=0)
    vertical_pad, horizontal_pad = _pair(cast("int | Sequence[int]", padding), "padding", least=0)
    return (vertical_pad, vertical_pad), (horizontal_pad, horizontal_pad)


def _named_padding(padding: str, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid', an int or ints, got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding 'same' needs stride 1, got stride {stride}; give the padding in numbers")
    return _same(kernel[0], dilation[0]), _same(kernel[1], dilation[1])


def _same(kernel: int, dilation: int) -> Pair:
    total = _extent(kernel, dilation) - 1
    return total // 2, total - total // 2


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (list, tuple)) else value


def _names(keys: Sequence[object]) -> str:
    return ", ".join(map(repr, keys)) if keys else "none"


def linear_image_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The image (1, C, 1, M) as which M vectors (..., C) go through the 1x1 convolution of a linear layer."""
    *batch, c = shape
    return 1, c, 1, math.prod(batch)
