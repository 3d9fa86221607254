"""The canonical form of a convolution's sparse weight, and its files.

Files are safetensors. Layer number i of :func:`save_weights` has the tensors ``i.data`` (float32, nnz),
``i.indices`` (int32, nnz) and ``i.indptr`` (int32, K + 1); a file of :meth:`SparseWeight.save` has them without
the number. A quantized layer has ``i.codes`` (uint8, bit-packed codes, see `numbasparse.levels`) in place of
``i.data``; ``i.scale`` (float32); ``i.zero`` (uint8) if its levels are linear, ``i.entries`` (float32, codebooks x
codes) if they are not; and its ``i.indices`` are uint16 if it has at most 65536 columns. The metadata has one
entry, ``numbasparse``, whose value is JSON: ``format``, ``version`` and ``layers``, a list of ``{name,
kernel_shape, groups, fingerprint, levels}``, the last being null or ``{kind, bits, channels_per_table}``. One entry
and not several, because the safetensors package writes entries in a random order and equal weights should give
equal files. Version 1 had no quantized layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse

from numbasparse.files import write_whole
from numbasparse.levels import CodebookLevels, Codes, Levels, LinearLevels, pack_codes, unpack_codes
from numbasparse.spec import (
    KernelShape,
    Shape4,
    as_int,
    as_kernel_shape,
    as_weight_shape,
    check_groups,
    check_matrix_shape,
)

_ONE = "numbasparse.SparseWeight"
_MANY = "numbasparse.SparseWeights"
_READERS = {_ONE: "SparseWeight.load", _MANY: "load_weights"}
_VERSION = "2"
_OLD_VERSIONS = ("1",)
_METADATA = "numbasparse"
_INT32_MAX = np.iinfo(np.int32).max


class Quantization(Protocol):
    """What `SparseWeight.quantized` asks of a config; those of `numbasparse.quantization` are such."""

    def fit(self, values: NDArray[np.float32], channels: NDArray[np.int64], k: int) -> Levels:
        """Choose the levels for the non-zero values of a weight.

        Parameters
        ----------
        values : ndarray, float32, (nnz,)
        channels : ndarray, int64, (nnz,)
            Output channel of each value.
        k : int
            Output channels.
        """


class SparseWeight:
    """An immutable sparse weight: a CSR matrix of shape (K, C/groups*R*S) that knows its kernel's shape.

    Column ``(c*R + r)*S + s`` holds the weight of input channel c of the group at kernel position (r, s). The
    matrix is canonical: columns rise strictly within a row and no stored value is zero. Equal weights therefore
    have equal arrays. Make one with :meth:`from_dense` or :meth:`from_scipy`; the constructor takes arrays that
    are canonical already, copies them, and checks everything.

    A quantized weight holds codes of 2 to 8 bits in place of the values, bit-packed, and what they stand for.

    Parameters
    ----------
    data : ndarray, float32, or uint8 with `levels`, shape (nnz,)
        Values, finite and not zero; or codes that stand for such.
    indices : ndarray, int32, shape (nnz,)
        Column of each value.
    indptr : ndarray, int32, shape (K + 1,)
        Row k is ``data[indptr[k]:indptr[k + 1]]``.
    kernel_shape : (int, int, int)
        (C/groups, R, S): channels of ONE group, kernel height and width.
    groups : int
        Groups of the convolution; divides K.
    levels : Levels, optional
        What the codes of a quantized weight stand for.
    copy : bool
        False to share the arrays' memory, which then must not change while the weight lives.

    Raises
    ------
    TypeError
        If an array is no ndarray or has another dtype, or a size is no int.
    ValueError
        If the arrays are not a canonical matrix of that shape.
    """

    __slots__ = ("__weakref__", "_data", "_fingerprint", "_groups", "_indices", "_indptr", "_kernel_shape", "_levels")

    _data: NDArray[np.float32] | Codes
    """Values; of a quantized weight, the packed codes."""
    _levels: Levels | None
    _indices: NDArray[np.int32] | NDArray[np.uint16]
    """uint16 in a quantized weight of few enough columns."""
    _indptr: NDArray[np.int32]
    _kernel_shape: KernelShape
    _groups: int
    _fingerprint: str | None

    def __init__(
        self,
        data: NDArray[np.float32] | Codes,
        indices: NDArray[np.int32],
        indptr: NDArray[np.int32],
        kernel_shape: Sequence[int],
        groups: int = 1,
        levels: Levels | None = None,
        *,
        copy: bool = True,
    ) -> None:
        if levels is not None and not isinstance(levels, Levels):
            raise TypeError(f"levels must be LinearLevels, CodebookLevels or None, got {type(levels).__name__}")
        stored = _read_only(data, np.float32 if levels is None else np.uint8, "data", copy)
        columns = _read_only(indices, np.int32, "indices", copy)
        self._indptr = _read_only(indptr, np.int32, "indptr", copy)
        self._kernel_shape = as_kernel_shape(kernel_shape)
        self._groups = as_int(groups, "groups", least=1)
        self._fingerprint = None
        k, width = len(indptr) - 1, _width(self._kernel_shape)
        check_matrix_shape((k, width), self._kernel_shape)
        check_groups(self._groups, k)
        _check_compressed(self._indptr, columns, len(data), k, width)
        values = stored if levels is None else _checked_values(stored, levels, self._indptr)
        _check_canonical(values, columns, self._indptr, width)
        self._levels = levels
        self._indices = columns if levels is None else _frozen(_narrow(columns, width))
        self._data = stored if levels is None else _frozen(pack_codes(stored, levels.bits))

    @classmethod
    def from_dense(cls, weight: Any, groups: int = 1, quantization: Quantization | None = None) -> SparseWeight:
        """Keep the nonzeros of a dense weight.

        Parameters
        ----------
        weight : ndarray or torch.Tensor, shape (K, C/groups, R, S) or (K, C/groups, S)
            NumPy float16, float32 or float64, or a tensor of any floating type on any device. Three dimensions
            are a 1-D convolution and get R = 1. Values are rounded to float32.
        groups : int
        quantization : optional
            As for `quantized`.

        Returns
        -------
        SparseWeight

        Raises
        ------
        TypeError
            If `weight` is neither, or holds no floating-point numbers.
        ValueError
            If the shape has the wrong number of sizes, a value is NaN, infinite or beyond float32, or `groups`
            does not divide K.
        """
        array = _tensor_to_numpy(weight) if _is_tensor(weight) else weight
        if not isinstance(array, np.ndarray):
            raise TypeError(f"weight must be a NumPy array or a torch tensor, got {type(weight).__name__}")
        values = _as_floats(array)
        k, *kernel_shape = as_weight_shape(values.shape)
        _check_finite(values)
        made = cls._from_csr(sparse.csr_array(values.reshape(k, -1)), as_kernel_shape(kernel_shape), groups)
        return made if quantization is None else made.quantized(quantization)

    @classmethod
    def from_scipy(
        cls, matrix: Any, kernel_shape: Sequence[int], groups: int = 1, quantization: Quantization | None = None
    ) -> SparseWeight:
        """Take a SciPy sparse matrix or array of any format; the caller's is copied and left as it is.

        Duplicates are summed, columns sorted and stored zeros dropped.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix, shape (K, C/groups*R*S)
            float32 or float64; values are rounded to float32.
        kernel_shape : (int, int, int)
            (C/groups, R, S): the channels are those of ONE group, as in torch's weight of shape
            (K, C/groups, R, S), not those of the input.
        groups : int
        quantization : optional
            As for `quantized`.

        Returns
        -------
        SparseWeight

        Raises
        ------
        TypeError
            If `matrix` is not sparse or holds no floating-point numbers.
        ValueError
            If the matrix is malformed (an index out of range, a falling or too long indptr, arrays of different
            lengths), its shape does not fit `kernel_shape` and `groups`, or a value is NaN, infinite or beyond
            float32.
        """
        if not sparse.issparse(matrix):
            raise TypeError(f"expected a scipy.sparse matrix or array, got {type(matrix).__name__}")
        checked_shape = as_kernel_shape(kernel_shape)
        check_matrix_shape(matrix.shape, checked_shape)
        made = cls._from_csr(_checked_csr(matrix), checked_shape, groups)
        return made if quantization is None else made.quantized(quantization)

    @classmethod
    def _from_csr(cls, matrix: Any, kernel_shape: KernelShape, groups: int) -> SparseWeight:
        """Make canonical a well-formed csr_array that is ours to change."""
        _check_int32(matrix.nnz, matrix.shape)
        matrix.sum_duplicates()
        data = _as_float32(matrix.data)
        indices = matrix.indices.astype(np.int32, copy=False)
        indptr = matrix.indptr.astype(np.int32, copy=False)
        rounded = sparse.csr_array((data, indices, indptr), shape=matrix.shape)
        rounded.eliminate_zeros()
        return cls(rounded.data, rounded.indices, rounded.indptr, kernel_shape, groups)

    def quantized(self, quantization: Quantization) -> SparseWeight:
        """Return a weight of few bits whose values are near this one's.

        Values that become zero are left out.

        Parameters
        ----------
        quantization : LinearQuantization, CodebookQuantization, or any object with their ``fit``
            A weight whose values lie on such levels already keeps them exactly.

        Raises
        ------
        TypeError
            If `quantization` has no ``fit``.
        """
        if not callable(getattr(quantization, "fit", None)):
            raise TypeError(
                f"quantization must be a config like LinearQuantization(bits=8), got {type(quantization).__name__}"
            )
        channels, values = self.rows, self.data
        levels = quantization.fit(values, channels, self.k)
        return self._coded(levels.encode(values, channels), levels)

    def scaled(self, factors: NDArray[np.floating]) -> SparseWeight:
        """Return a weight with each output channel multiplied; a quantized one keeps its codes.

        Parameters
        ----------
        factors : ndarray of float, shape (K,)
            For example those of a batch normalization that follows.

        Raises
        ------
        ValueError
            If the shape is another, or a factor or a product is not finite in float32.
        """
        factors = _as_floats(np.asarray(factors))
        if factors.shape != (self.k,):
            raise ValueError(f"factors must have shape ({self.k},), one for each output channel, got {factors.shape}")
        _check_finite(factors)
        if self._levels is not None:
            scale = _as_float32(self._levels.scale * factors)
            return self._coded(self._unpacked(), self._levels.with_scale(scale))
        matrix = self.to_scipy()
        matrix.data = _as_float32(matrix.data * factors[self.rows])
        return self._from_csr(matrix, self._kernel_shape, self._groups)

    def _coded(self, codes: Codes, levels: Levels) -> SparseWeight:
        """A weight with these codes at this one's places, but for those that stand for zero."""
        channels = self.rows
        kept = levels.decode(codes, channels) != 0
        counts = np.bincount(channels[kept], minlength=self.k)
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        return SparseWeight(codes[kept], self.indices[kept], indptr, self._kernel_shape, self._groups, levels)

    @property
    def data(self) -> NDArray[np.float32]:
        """Values, float32, shape (nnz,), read-only; decoded anew at each use if the weight is quantized."""
        if self._levels is None:
            return self._data  # type: ignore[return-value]
        values = self._levels.decode(self._unpacked(), self.rows)
        return _frozen(values)

    @property
    def levels(self) -> Levels | None:
        """What the codes of a quantized weight stand for, or None."""
        return self._levels

    @property
    def codes(self) -> Codes | None:
        """Codes of a quantized weight, uint8, shape (nnz,), unpacked anew at each use; else None."""
        return None if self._levels is None else self._unpacked()

    @property
    def codebook(self) -> NDArray[np.float32] | None:
        """Value of every code of a quantized weight, else None.

        float32, shape (1, 2**bits), or (K, 2**bits) where output channels differ: value number i, of output
        channel k, is ``codebook[k, codes[i]]``.
        """
        return None if self._levels is None else self._levels.codebook(self.k)

    def encoded(self) -> NDArray[np.float32] | Codes:
        """Return all that the weight holds beside its indices, for a buffer of a model.

        The values, float32, (nnz,); of a quantized weight, uint8: the bytes of a safetensors file with ``codes``
        and the levels' arrays, as in the package's files. `from_encoded` reads both.
        """
        if self._levels is None:
            return self._data
        metadata = {_METADATA: json.dumps(msgspec.to_builtins(_described(self._levels)))}
        blob = safetensors.numpy.save({"codes": self._data, **self._levels.arrays}, metadata=metadata)
        return np.frombuffer(blob, np.uint8)

    @classmethod
    def from_encoded(
        cls,
        values: NDArray[np.float32] | Codes,
        indices: NDArray[np.int32],
        indptr: NDArray[np.int32],
        kernel_shape: Sequence[int],
        groups: int = 1,
        *,
        copy: bool = True,
    ) -> SparseWeight:
        """Make a weight of what `encoded` returned and of its indices; ``copy`` is the constructor's.

        Raises
        ------
        TypeError, ValueError
            As the constructor; ValueError for bytes that are not those of a quantized weight.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
            return cls(values, indices, indptr, kernel_shape, groups, copy=copy)
        levels, codes = _parse_encoded(values.tobytes(), len(indices))
        return cls(codes, indices, indptr, kernel_shape, groups, levels, copy=copy)

    def _unpacked(self) -> Codes:
        assert self._levels is not None
        return unpack_codes(self._data, self._levels.bits, self.nnz)  # type: ignore[arg-type]

    @property
    def indices(self) -> NDArray[np.int32]:
        """Column of each value, int32, shape (nnz,), read-only; widened anew if the weight is quantized."""
        return _frozen(self._indices.astype(np.int32, copy=False))

    @property
    def indptr(self) -> NDArray[np.int32]:
        """Where each row starts, int32, shape (K + 1,), read-only."""
        return self._indptr

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row of each value, its output channel, int64, shape (nnz,); made anew."""
        return _rows(self._indptr)

    @property
    def kernel_shape(self) -> KernelShape:
        """(C/groups, R, S)."""
        return self._kernel_shape

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self._groups

    @property
    def k(self) -> int:
        """Output channels."""
        return len(self._indptr) - 1

    @property
    def shape(self) -> Shape4:
        """Shape of the dense weight: (K, C/groups, R, S)."""
        return self.k, *self._kernel_shape

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return len(self._indices)

    @property
    def density(self) -> float:
        """Fraction of the weights that are not zero."""
        return self.nnz / (self.k * _width(self._kernel_shape))

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        """Bytes in memory of values (or packed codes and levels), indices and indptr together."""
        levels = 0 if self._levels is None else self._levels.nbytes
        return self._data.nbytes + levels + self._indices.nbytes + self._indptr.nbytes

    @property
    def fingerprint(self) -> str:
        """Hex digest of shape, groups and arrays: the same for equal weights, on every machine."""
        if self._fingerprint is None:
            digest = blake2b(json.dumps([self.shape, self._groups]).encode(), digest_size=16)
            arrays: list[NDArray[Any]] = [self._indptr, self.indices, self._data]
            if self._levels is not None:
                digest.update(json.dumps(msgspec.structs.asdict(_described(self._levels))).encode())
                arrays += self._levels.arrays.values()
            for array in arrays:
                digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to_scipy(self) -> sparse.csr_array:
        """Return a writable copy as a csr_array, float32, shape (K, C/groups*R*S)."""
        arrays = (self.data, self.indices, self._indptr)
        return sparse.csr_array(arrays, shape=(self.k, _width(self._kernel_shape)), copy=True)

    def to_dense(self) -> NDArray[np.float32]:
        """Return a new dense array, float32, shape (K, C/groups, R, S)."""
        flat = np.zeros((self.k, _width(self._kernel_shape)), np.float32)
        flat[self.rows, self._indices] = self.data
        return flat.reshape(self.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an older file at `path` is replaced only by a complete one.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        _write(path, _ONE, {"": self})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseWeight:
        """Read a file of :meth:`save`, checking everything before use.

        Raises
        ------
        OSError
            If the file cannot be read; FileNotFoundError if there is none.
        ValueError
            If it is truncated, corrupt, or not such a file; the text names the file.
        """
        return _read(path, _ONE)[""]

    def __repr__(self) -> str:
        groups = "" if self._groups == 1 else f", groups={self._groups}"
        levels = "" if self._levels is None else f", {self._levels.kind} {self._levels.bits} bits"
        return f"SparseWeight(shape={self.shape}{groups}, nnz={self.nnz}, sparsity={self.sparsity:.2%}{levels})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseWeight):
            return NotImplemented
        if self is other:  # a plan is looked up at every call: a dictionary of weak references compares by ==
            return True
        return (
            self.shape == other.shape
            and self._groups == other._groups
            and self._levels == other._levels
            and np.array_equal(self._indptr, other._indptr)
            and np.array_equal(self._indices, other._indices)
            and np.array_equal(self._data, other._data)
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor, so that the arrays of the result are read-only too."""
        data = self._data if self._levels is None else self._unpacked()
        return SparseWeight, (data, self.indices, self._indptr, self._kernel_shape, self._groups, self._levels)


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, SparseWeight]) -> None:
    """Write the weights of many layers into one safetensors file, replaced only by a complete one.

    Parameters
    ----------
    path : str or path
    weights : mapping of str to SparseWeight
        Any strings; their order is kept.

    Raises
    ------
    TypeError
        If a name is no string or a value no SparseWeight.
    OSError
        If the file cannot be written.
    """
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, SparseWeight):
            raise TypeError(f"weights must map layer names to SparseWeight, got {name!r}: {type(weight).__name__}")
    _write(path, _MANY, weights)


def load_weights(path: str | os.PathLike[str]) -> dict[str, SparseWeight]:
    """Read a file of :func:`save_weights`; errors as for :meth:`SparseWeight.load`."""
    return _read(path, _MANY)


# ---- arrays -------------------------------------------------------------------------------------------------


def _width(kernel_shape: KernelShape) -> int:
    c_per_group, r, s = kernel_shape
    return c_per_group * r * s


def _rows(indptr: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the row of each stored value."""
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))


def _checked_values(codes: Codes, levels: Levels, indptr: NDArray[np.int32]) -> NDArray[np.float32]:
    """What the codes stand for; code and levels must fit each other."""
    levels.check_channels(len(indptr) - 1)
    if len(codes) and int(codes.max()) >= 1 << levels.bits:
        raise ValueError(f"codes of {levels.bits} bits must be below {1 << levels.bits}, got {int(codes.max())}")
    if indptr[-1] != len(codes):
        raise ValueError(f"indptr ends with {indptr[-1]}, but {len(codes)} values are stored")
    return levels.decode(codes, _rows(indptr))


def _read_only(array: Any, dtype: type[np.generic], what: str, copy: bool) -> NDArray[Any]:
    """A copy, or a view of the same memory, that cannot be written to."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        came = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{what} must be an ndarray of {np.dtype(dtype)}, got {came}")
    if array.ndim != 1:
        raise ValueError(f"{what} must have one dimension, got shape {array.shape}")
    return _frozen(np.array(array, dtype) if copy else np.ascontiguousarray(array)[:])


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Make an array of our own read-only."""
    array.flags.writeable = False
    return array


def _narrow(indices: NDArray[np.int32], width: int) -> NDArray[np.int32] | NDArray[np.uint16]:
    """Columns of a quantized weight as it holds them."""
    return indices.astype(np.uint16) if width <= 1 << 16 else indices


def _is_tensor(value: object) -> bool:
    """Recognise a torch tensor, or a subclass such as Parameter, without importing torch."""
    return any(
        kind.__name__ == "Tensor" and kind.__module__.partition(".")[0] == "torch" for kind in type(value).__mro__
    )


def _tensor_to_numpy(tensor: Any) -> NDArray[np.floating]:
    if not tensor.is_floating_point():
        raise TypeError(f"weight must be floating-point, got a tensor of {tensor.dtype}")
    if tensor.is_meta:
        raise ValueError("weight is a tensor on the 'meta' device, which has a shape but no values")
    tensor = tensor.detach().cpu().to_dense()
    if str(tensor.dtype) != "torch.float64":
        tensor = tensor.float()  # NumPy has no bfloat16 or float8
    return tensor.resolve_neg().numpy()


def _as_floats(array: Any) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return float64 as it is and float16 as float32, in which SciPy can add; refuse every other type."""
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise TypeError(
            f"weight must be float16, float32 or float64, got {array.dtype}; convert it with .astype(np.float32)"
        )
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)


def _as_float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Round to float32; finite values that it cannot hold, or whose sum was infinite, are refused."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32, copy=False)
    too_large = int(np.count_nonzero(~np.isfinite(rounded)))
    if too_large:
        raise ValueError(f"weight has {too_large} values beyond the range of float32; rescale the weight")
    return rounded


def _check_finite(values: NDArray[np.floating]) -> None:
    bad = ~np.isfinite(values)
    count = int(np.count_nonzero(bad))
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        place = first[0] if len(first) == 1 else first
        raise ValueError(
            f"weight has {count} NaN or infinite values of {bad.size}, the first at position {place}; "
            f"every weight must be finite"
        )


def _check_int32(nnz: int, shape: Iterable[int]) -> None:
    """Refuse what int32 indices cannot address."""
    if max(nnz, *shape) > _INT32_MAX:
        raise ValueError(
            f"weight matrix of shape {tuple(shape)} with {nnz} stored values is too large for int32 indices"
        )


def _check_compressed(
    indptr: NDArray[np.integer], indices: NDArray[np.integer], values: int, major: int, minor: int
) -> None:
    """Check the index arrays of a CSR matrix (or CSC, with rows and columns exchanged) before any use.

    `values` is the number of stored values, `major` the number of rows, `minor` that of columns.
    """
    if len(indptr) != major + 1:
        raise ValueError(f"indptr must have {major + 1} entries, got {len(indptr)}")
    if len(indices) != values:
        raise ValueError(f"data and indices must have the same length, got {values} and {len(indices)}")
    if indptr[0] != 0:
        raise ValueError(f"indptr must start with 0, got {indptr[0]}")
    if np.any(indptr[1:] < indptr[:-1]):
        raise ValueError("indptr must not fall from one entry to the next")
    if indptr[-1] > values:
        raise ValueError(f"indptr ends with {indptr[-1]}, but only {values} values are stored")
    _check_range(indices[: int(indptr[-1])], minor, "indices")


def _check_range(indices: NDArray[np.integer], size: int, what: str) -> None:
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise ValueError(f"{what} must lie between 0 and {size - 1}, got {indices.min()} to {indices.max()}")


def _check_canonical(
    data: NDArray[np.float32], indices: NDArray[np.int32], indptr: NDArray[np.int32], width: int
) -> None:
    """Check what a canonical matrix has beyond a well-formed one."""
    _check_int32(len(data), (len(indptr) - 1, width))
    if indptr[-1] != len(data):
        raise ValueError(f"indptr ends with {indptr[-1]}, but {len(data)} values are stored")
    falls = indices[1:] <= indices[:-1]
    starts = indptr[1:-1]
    falls[starts[(starts > 0) & (starts < len(data))] - 1] = False  # a row may begin where it likes
    if np.any(falls):
        raise ValueError("columns must rise strictly within each row; use SparseWeight.from_scipy to sort them")
    _check_finite(data)
    zeros = len(data) - int(np.count_nonzero(data))
    if zeros:
        raise ValueError(f"{zeros} stored values are zero; use SparseWeight.from_scipy to drop them")


# ---- SciPy matrices -----------------------------------------------------------------------------------------


def _checked_csr(matrix: Any) -> Any:
    """Return a new csr_array of a matrix of any format, whose arrays are not trusted.

    New, because the flags of the caller's matrix (sorted, no duplicates) may be wrong, and because SciPy's
    methods change the matrix they are called on.
    """
    if matrix.format in ("csr", "csc"):
        return _checked_compressed(matrix)
    if matrix.format != "coo":
        try:
            _check_lil(matrix)
            matrix = matrix.copy().tocoo()
        except Exception as error:  # whatever SciPy stumbles over, it is the matrix that is malformed
            raise ValueError(f"malformed {matrix.format} matrix: {error}") from error
    return _checked_coo(matrix)


def _check_lil(matrix: Any) -> None:
    """Refuse a lil matrix with more columns than values in a row: SciPy would fill up with stray memory."""
    if matrix.format == "lil":
        for number, (row, values) in enumerate(zip(matrix.rows, matrix.data, strict=True)):
            if len(row) != len(values):
                raise ValueError(f"row {number} has {len(row)} columns but {len(values)} values")


def _checked_compressed(matrix: Any) -> Any:
    """Return a new csr_array of a csr or csc matrix."""
    values = _one_dimension(matrix.data, "data")
    indices = _index_array(matrix.indices, "indices")
    indptr = _index_array(matrix.indptr, "indptr")
    major, minor = matrix.shape if matrix.format == "csr" else reversed(matrix.shape)
    try:
        _check_compressed(indptr, indices, len(values), major, minor)
    except ValueError as error:
        raise ValueError(f"malformed {matrix.format} matrix: {error}") from None
    used = int(indptr[-1])
    floats = _as_floats(values[:used])
    _check_finite(floats)
    kind = sparse.csr_array if matrix.format == "csr" else sparse.csc_array
    return kind((floats, indices[:used], indptr), shape=matrix.shape, copy=True).tocsr()


def _checked_coo(matrix: Any) -> Any:
    """Return a new csr_array of a coo matrix."""
    values = _one_dimension(matrix.data, "data")
    coords = [_index_array(coord, "coords") for coord in matrix.coords]
    if len(coords) != 2 or any(len(coord) != len(values) for coord in coords):
        lengths = [len(coord) for coord in coords]
        raise ValueError(f"malformed coo matrix: {len(values)} values but coordinates of lengths {lengths}")
    try:
        _check_range(coords[0], matrix.shape[0], "rows")
        _check_range(coords[1], matrix.shape[1], "columns")
    except ValueError as error:
        raise ValueError(f"malformed coo matrix: {error}") from None
    floats = _as_floats(values)
    _check_finite(floats)
    return sparse.coo_array((floats, tuple(coords)), shape=matrix.shape).tocsr()


def _one_dimension(array: Any, what: str) -> NDArray[Any]:
    array = np.asarray(array)
    if array.ndim != 1:
        raise ValueError(f"{what} of a sparse matrix must have one dimension, got shape {array.shape}")
    return array


def _index_array(array: Any, what: str) -> NDArray[np.integer]:
    array = _one_dimension(array, what)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} of a sparse matrix must be integers, got {array.dtype}")
    return array


# ---- files --------------------------------------------------------------------------------------------------


class _Levels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["linear", "codebook"]
    bits: int
    channels_per_table: int


class _Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    kernel_shape: tuple[int, int, int]
    groups: int
    fingerprint: str
    levels: _Levels | None = None


class _Header(msgspec.Struct, frozen=True):
    """`layers` is looked at only when format and version are right."""

    format: str
    version: str
    layers: list[Any]


def _described(levels: Levels) -> _Levels:
    return _Levels(levels.kind, levels.bits, levels.channels_per_table)


def _prefix(file_format: str, number: int) -> str:
    """Return what precedes "data", "indices" and "indptr" in the tensor names of a layer."""
    return "" if file_format == _ONE else f"{number}."


def _write(path: str | os.PathLike[str], file_format: str, weights: Mapping[str, SparseWeight]) -> None:
    tensors: dict[str, NDArray[Any]] = {}
    layers: list[dict[str, Any]] = []
    for number, (name, weight) in enumerate(weights.items()):
        prefix = _prefix(file_format, number)
        levels = weight.levels
        if levels is None:
            tensors[prefix + "data"] = weight.data
        else:
            tensors[prefix + "codes"] = weight._data
            tensors |= {prefix + key: array for key, array in levels.arrays.items()}
        tensors[prefix + "indices"] = weight._indices
        tensors[prefix + "indptr"] = weight.indptr
        described = None if levels is None else _described(levels)
        layers.append(
            msgspec.to_builtins(_Layer(name, weight.kernel_shape, weight.groups, weight.fingerprint, described))
        )
    header = json.dumps({"format": file_format, "version": _VERSION, "layers": layers})
    write_whole(path, safetensors.numpy.save(tensors, metadata={_METADATA: header}))


def _read(path: str | os.PathLike[str], file_format: str) -> dict[str, SparseWeight]:
    blob = Path(path).read_bytes()
    try:
        return _parse(blob, file_format)
    except ValueError as error:
        raise ValueError(f"cannot read {os.fspath(path)!r} as a {file_format} file: {error}") from error


def _parse(blob: bytes, file_format: str) -> dict[str, SparseWeight]:
    tensors, header = _parse_tensors(blob)
    layers = _parse_layers(header, file_format)
    weights: dict[str, SparseWeight] = {}
    for number, layer in enumerate(layers):
        if layer.name in weights:
            raise ValueError(f"layer {layer.name!r} occurs twice")
        try:
            weights[layer.name] = _parse_weight(tensors, _prefix(file_format, number), layer)
        except ValueError as error:
            raise ValueError(f"{error} (layer {layer.name!r})" if layer.name else str(error)) from None
    if tensors:
        raise ValueError(f"it has tensors that no layer uses: {', '.join(sorted(tensors))}")
    return weights


def _parse_tensors(blob: bytes) -> tuple[dict[str, Any], Any]:
    """Return the tensors of a safetensors file, and the package's metadata."""
    try:
        tensors = dict(safetensors.deserialize(blob))
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file, or a truncated or corrupt one ({error})") from error
    end = 8 + int.from_bytes(blob[:8], "little")
    text = (json.loads(blob[8:end]).get("__metadata__") or {}).get(_METADATA)
    if text is None:
        raise ValueError(f"it has no {_METADATA!r} metadata; it was written by another program")
    try:
        return tensors, json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None


def _parse_encoded(blob: bytes, nnz: int) -> tuple[Levels, Codes]:
    """Return what `SparseWeight.encoded` wrote for a quantized weight of ``nnz`` values."""
    tensors, described = _parse_tensors(blob)
    levels = _take_levels(tensors, "", msgspec.convert(described, _Levels))
    codes = _take_codes(tensors, "codes", levels.bits, nnz)
    if tensors:
        raise ValueError(f"it has tensors of no use: {', '.join(sorted(tensors))}")
    return levels, codes


def _parse_layers(metadata: Any, file_format: str) -> list[_Layer]:
    """Return the layers named in the metadata."""
    header = msgspec.convert(metadata, _Header)
    if header.format != file_format:
        reader = _READERS.get(header.format)
        advice = f"; use {reader}" if reader else ""
        raise ValueError(f"its format is {header.format!r}{advice}")
    if header.version not in (_VERSION, *_OLD_VERSIONS):
        raise ValueError(f"its version is {header.version!r}, but this package reads only up to {_VERSION!r}")
    layers = msgspec.convert(header.layers, list[_Layer])
    if file_format == _ONE and [layer.name for layer in layers] != [""]:
        raise ValueError("it must hold exactly one layer, without a name")
    return layers


def _parse_weight(tensors: dict[str, Any], prefix: str, layer: _Layer) -> SparseWeight:
    """Take the tensors of a layer out of `tensors`."""
    narrow = layer.levels is not None and _width(as_kernel_shape(layer.kernel_shape)) <= 1 << 16
    indices = _take(tensors, prefix + "indices", "U16" if narrow else "I32").astype(np.int32, copy=False)
    indptr = _take(tensors, prefix + "indptr", "I32")
    if layer.levels is None:
        data, levels = _take(tensors, prefix + "data", "F32"), None
    else:
        levels = _take_levels(tensors, prefix, layer.levels)
        data = _take_codes(tensors, prefix + "codes", levels.bits, len(indices))
    try:
        weight = SparseWeight(data, indices, indptr, layer.kernel_shape, layer.groups, levels)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if weight.fingerprint != layer.fingerprint:
        raise ValueError("its values are not the ones that were saved (the fingerprint differs)")
    return weight


def _take_levels(tensors: dict[str, Any], prefix: str, described: _Levels) -> Levels:
    bits, scale = described.bits, _take(tensors, prefix + "scale", "F32")
    if described.kind == "linear":
        return LinearLevels(bits, scale, _take(tensors, prefix + "zero", "U8"))
    entries = _take(tensors, prefix + "entries", "F32", dimensions=2)
    return CodebookLevels(bits, entries, described.channels_per_table, scale)


def _take_codes(tensors: dict[str, Any], name: str, bits: int, count: int) -> Codes:
    packed = _take(tensors, name, "U8")
    if len(packed) != -(-count * bits // 8):
        raise ValueError(
            f"tensor {name!r} must have {-(-count * bits // 8)} bytes for {count} codes, got {len(packed)}"
        )
    return unpack_codes(packed, bits, count)


def _take(tensors: dict[str, Any], name: str, dtype: str, dimensions: int = 1) -> NDArray[Any]:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    tensor = tensors.pop(name)
    if tensor["dtype"] != dtype or len(tensor["shape"]) != dimensions:
        raise ValueError(
            f"tensor {name!r} must be {dtype} with {'one dimension' if dimensions == 1 else 'two dimensions'}, "
            f"got {tensor['dtype']} of shape {tuple(tensor['shape'])}"
        )
    little = np.frombuffer(tensor["data"], {"F32": "<f4", "I32": "<i4", "U16": "<u2", "U8": "u1"}[dtype]).reshape(
        tensor["shape"]
    )
    return little.astype(little.dtype.newbyteorder("="), copy=False)


def as_convolution(weight: Any) -> Any:
    """A linear layer's weight (K, C), array or tensor, as a 1x1 convolution's (K, C, 1, 1); others as they are."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight
