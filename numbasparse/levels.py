"""What the codes of a quantized weight stand for: evenly spaced levels, or the entries of codebooks.

A code is an unsigned integer of 2 to 8 bits. Its value depends on the output channel too:

- `LinearLevels`: ``scale[channel] * (code - zero[channel])``,
- `CodebookLevels`: ``scale[channel] * entries[channel // channels_per_table, code]``.

Codes are stored bit-packed (`pack_codes`): code number i takes the bits ``i * bits`` .. ``(i + 1) * bits`` of a
little-endian bit stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]

LEAST_BITS, MOST_BITS = 2, 8

_LOW_BYTE = np.uint32(0xFF)


def check_bits(bits: object) -> int:
    """Return ``bits`` if it is an int from 2 to 8.

    Raises
    ------
    ValueError
        If it is not.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits must be an int from {LEAST_BITS} to {MOST_BITS}, got {bits!r}")
    return bits


def pack_codes(codes: Codes, bits: int) -> Codes:
    """Pack codes (uint8, (n,), each below ``2**bits``) into ``ceil(n * bits / 8)`` bytes."""
    as_bits = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(as_bits, bitorder="little")


def unpack_codes(packed: Codes, bits: int, count: int) -> Codes:
    """Return the ``count`` codes of `pack_codes`, uint8."""
    as_bits = np.unpackbits(packed, count=count * bits, bitorder="little")
    return np.packbits(as_bits.reshape(count, bits), axis=1, bitorder="little").ravel()


def short_scale(step: NDArray[np.floating]) -> Floats:
    """Cut steps between levels to 16 significant bits.

    The product with an integer of up to 8 bits is then exact in float32: levels are the same numbers however
    they are computed, and the step can be found again from the levels. Relative change below 2**-15, downwards.
    Steps below float32's smallest normal number become that.
    """
    limits = np.finfo(np.float32)
    normal = np.clip(step, limits.tiny, limits.max).astype(np.float32)
    return (normal.view(np.uint32) & ~_LOW_BYTE).view(np.float32)


class Levels(ABC):
    """What the codes of one weight stand for; immutable.

    Attributes
    ----------
    bits : int
        2 to 8.
    scale : ndarray, float32, (1,) or (K,)
        Factor of all output channels, or of each; finite. Read-only, as all arrays here.
    """

    kind: Literal["linear", "codebook"]
    bits: int
    scale: Floats

    @property
    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that the levels consist of beside ``bits`` and `channels_per_table`, by name."""

    @property
    @abstractmethod
    def channels_per_table(self) -> int:
        """Output channels that share a codebook; 0: all of them."""

    @abstractmethod
    def tables(self) -> tuple[Floats, NDArray[np.int64]]:
        """Values by code, before the scale.

        Returns
        -------
        table : ndarray, float32, (n,)
        first : ndarray, int64, (1,) or (K,)
            Place of code 0: code ``c`` of channel ``k`` stands for ``scale[k] * table[first[k] + c]``. At least
            ``2**bits`` places follow each.
        """

    @abstractmethod
    def check_channels(self, k: int) -> None:
        """Raise ValueError unless the levels are those of a weight with ``k`` output channels."""

    @abstractmethod
    def with_scale(self, scale: Floats) -> Levels:
        """The same levels with another scale, (1,) or (K,)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @abstractmethod
    def encode(self, values: Floats, channels: NDArray[np.integer]) -> Codes:
        """Return the code of the level nearest to each value, uint8, (n,).

        Parameters
        ----------
        values : ndarray, float32, (n,)
        channels : ndarray of int, (n,)
            Output channel of each.
        """

    def decode(self, codes: Codes, channels: NDArray[np.integer]) -> Floats:
        """Return the value of each code.

        Parameters
        ----------
        codes : ndarray, uint8, (n,)
        channels : ndarray of int, (n,)
            Output channel of each.
        """
        values = self.tables()[0][self.places(codes, channels)]
        with np.errstate(over="ignore"):  # a weight refuses infinite values
            return values * _of_channel(self.scale, channels)

    def places(self, codes: Codes | int, channels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Place of each code in the table of `tables`, int64; parameters as in `decode`, or one code for all."""
        starts: NDArray[np.int64] = _of_channel(self.tables()[1], channels)
        return np.asarray(starts + codes, np.int64)

    def codebook(self, k: int) -> Floats:
        """Value of every code, float32, (1, 2**bits) or (K, 2**bits) where output channels differ."""
        table, first = self.tables()
        channels = np.arange(1 if len(first) == len(self.scale) == 1 else k)
        places = self.places(0, channels)[:, None] + np.arange(1 << self.bits)
        return table[places] * _of_channel(self.scale, channels)[:, None]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Levels):
            return NotImplemented
        same_kind = (self.kind, self.bits, self.channels_per_table) == (
            other.kind,
            other.bits,
            other.channels_per_table,
        )
        return same_kind and all(np.array_equal(a, other.arrays[name]) for name, a in self.arrays.items())

    def __hash__(self) -> int:
        return hash((self.kind, self.bits, *(array.tobytes() for array in self.arrays.values())))


class LinearLevels(Levels):
    """Evenly spaced levels ``scale * (code - zero)``, zero among them.

    Parameters
    ----------
    bits : int
        2 to 8.
    scale : ndarray, float32, (1,) or (K,)
        Distance of two levels: one for all output channels, or one for each.
    zero : ndarray, uint8, (1,) or (K,)
        The code that stands for zero.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of another type.
    """

    kind: Literal["linear", "codebook"] = "linear"

    def __init__(self, bits: int, scale: Floats, zero: Codes) -> None:
        self.bits = check_bits(bits)
        self.scale = _checked_scale(scale)
        self.zero: Codes = _frozen(zero, np.uint8, "zero", 1)
        if len(zero) == 0 or (len(zero) > 1 and len(scale) > 1 and len(zero) != len(scale)):
            raise ValueError(f"zero must have 1 value or one for each channel, got {len(zero)} for scale {len(scale)}")
        if int(zero.max()) >= 1 << bits:
            raise ValueError(f"zero must be codes of {bits} bits, got {int(zero.max())}")

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"scale": self.scale, "zero": self.zero}

    @property
    def channels_per_table(self) -> int:
        return 0

    def tables(self) -> tuple[Floats, NDArray[np.int64]]:
        most = (1 << self.bits) - 1
        return np.arange(-most, most + 1, dtype=np.float32), most - self.zero.astype(np.int64)

    def check_channels(self, k: int) -> None:
        for name, array in self.arrays.items():
            _check_length(array, k, name)

    def with_scale(self, scale: Floats) -> LinearLevels:
        return LinearLevels(self.bits, scale, self.zero)

    def encode(self, values: Floats, channels: NDArray[np.integer]) -> Codes:
        """As `Levels.encode`; values beyond the range get the last level."""
        steps = np.rint(values / _of_channel(self.scale, channels)) + _of_channel(self.zero, channels)
        return np.clip(steps, 0, (1 << self.bits) - 1).astype(np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return LinearLevels, (self.bits, self.scale, self.zero)


class CodebookLevels(Levels):
    """Any levels, listed in one codebook for all output channels or in one for each group of them.

    Parameters
    ----------
    bits : int
        2 to 8.
    entries : ndarray, float32, (T, 2**bits)
        Finite. Entries that no weight needs repeat another one.
    channels_per_table : int
        Neighbouring output channels that share a codebook: T is ``ceil(K / channels_per_table)``; 0: all, T is 1.
    scale : ndarray, float32, (1,) or (K,), optional
        Factor of each output channel.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of another type.
    """

    kind: Literal["linear", "codebook"] = "codebook"

    def __init__(self, bits: int, entries: Floats, channels_per_table: int = 0, scale: Floats | None = None) -> None:
        self.bits = check_bits(bits)
        self.entries: Floats = _frozen(entries, np.float32, "entries", 2)
        self.scale = _checked_scale(np.ones(1, np.float32) if scale is None else scale)
        if entries.shape[1] != 1 << bits or len(entries) == 0:
            raise ValueError(f"entries must have shape (T, {1 << bits}) for {bits} bits, got {entries.shape}")
        if not np.isfinite(entries).all():
            raise ValueError("entries must be finite")
        if isinstance(channels_per_table, bool) or not isinstance(channels_per_table, int) or channels_per_table < 0:
            raise ValueError(f"channels_per_table must be an int of 0 or more, got {channels_per_table!r}")
        self._channels_per_table = channels_per_table

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"entries": self.entries, "scale": self.scale}

    @property
    def channels_per_table(self) -> int:
        return self._channels_per_table

    def tables(self) -> tuple[Floats, NDArray[np.int64]]:
        size, per_table = 1 << self.bits, self._channels_per_table
        starts = np.arange(len(self.entries), dtype=np.int64) * size
        return self.entries.ravel(), np.repeat(starts, per_table) if per_table else starts

    def check_channels(self, k: int) -> None:
        _check_length(self.scale, k, "scale")
        expected = -(-k // self._channels_per_table) if self._channels_per_table else 1
        if len(self.entries) != expected:
            raise ValueError(
                f"{k} output channels, {self._channels_per_table or k} to a codebook, need {expected} codebooks, "
                f"got {len(self.entries)}"
            )

    def with_scale(self, scale: Floats) -> CodebookLevels:
        return CodebookLevels(self.bits, self.entries, self._channels_per_table, scale)

    def encode(self, values: Floats, channels: NDArray[np.integer]) -> Codes:
        """As `Levels.encode`; the first of equal entries."""
        values = values / _of_channel(self.scale, channels)
        codes = np.empty(len(values), np.uint8)
        tables = channels // self._channels_per_table if self._channels_per_table else np.zeros_like(channels)
        for number, entries in enumerate(self.entries):
            members = tables == number
            different, first = np.unique(entries, return_index=True)
            # In float64: the middle of two neighbouring float32 numbers is none itself.
            middles = (different[1:].astype(np.float64) + different[:-1]) / 2
            codes[members] = first[np.searchsorted(middles, values[members])]
        return codes

    def __reduce__(self) -> tuple[Any, ...]:
        return CodebookLevels, (self.bits, self.entries, self._channels_per_table, self.scale)


def _of_channel(array: NDArray[Any], channels: NDArray[np.integer]) -> NDArray[Any]:
    """What an array of shape (1,) or (K,) holds for each channel."""
    return array if len(array) == 1 else array[channels]


def _frozen(array: Any, dtype: type[np.generic], what: str, dimensions: int) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != dimensions:
        came = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{what} must be an ndarray of {np.dtype(dtype)} with {dimensions} dimension(s), got {came}")
    copy = np.array(array, dtype)
    copy.flags.writeable = False
    return copy


def _checked_scale(scale: Any) -> Floats:
    frozen = _frozen(scale, np.float32, "scale", 1)
    if len(frozen) == 0 or not np.isfinite(frozen).all():
        raise ValueError(f"scale must hold one or more finite numbers, got {len(frozen)} numbers")
    return frozen


def _check_length(array: NDArray[Any], k: int, what: str) -> None:
    if len(array) not in (1, k):
        raise ValueError(f"{what} must have 1 value or one for each of {k} output channels, got {len(array)}")
