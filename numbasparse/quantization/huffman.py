"""Size of a quantized weight after Huffman coding, as Deep Compression counts it."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from numbasparse.weight import SparseWeight

GAP_BITS = 8
"""Bits of a distance between neighbouring non-zeros: as Deep Compression has for convolutions."""


def code_lengths(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the length in bits of each symbol's Huffman code.

    Parameters
    ----------
    counts : ndarray of int, (n,)
        How often each symbol occurs.

    Returns
    -------
    ndarray, int64, (n,)
        0 for symbols that do not occur; 1 for a symbol that is alone.
    """
    lengths = np.zeros(len(counts), np.int64)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        rare, order, symbols = heapq.heappop(heap)
        next_rare, _, others = heapq.heappop(heap)
        lengths[symbols + others] += 1
        heapq.heappush(heap, (rare + next_rare, order, symbols + others))
    return lengths


def gap_symbols(weight: SparseWeight) -> NDArray[np.int64]:
    """Return the symbols that tell where the non-zeros are.

    Each is the number of zeros between a non-zero and the one before it, in the order of the flattened weight;
    symbol 255 stands for 255 zeros with no non-zero after them yet.
    """
    c_per_group, r, s = weight.kernel_shape
    zeros = np.diff(weight.rows * (c_per_group * r * s) + weight.indices, prepend=-1) - 1
    most = (1 << GAP_BITS) - 1
    skips = zeros // most
    symbols = np.full(len(zeros) + int(skips.sum()), most, np.int64)
    symbols[np.arange(len(zeros)) + np.cumsum(skips)] = zeros % most
    return symbols


def huffman_nbytes(weight: SparseWeight) -> int:
    """Return the bytes of a quantized weight with Huffman-coded codes and gaps.

    Both streams, rounded up to bytes; a byte for the code length of each symbol that can occur, from which a
    decoder makes its table; and the scales, zeros or codebooks.

    Raises
    ------
    ValueError
        If the weight is not quantized.

    Notes
    -----
    Source: Han, Mao and Dally, "Deep compression", 2015, arXiv 1510.00149, sections 2 and 4.
    """
    if weight.levels is None or weight.codes is None:
        raise ValueError("the weight is not quantized: call quantized(config) first")
    streams = ((weight.codes, 1 << weight.levels.bits), (gap_symbols(weight), 1 << GAP_BITS))
    return weight.levels.nbytes + sum(_stream_nbytes(symbols, number) for symbols, number in streams)


def _stream_nbytes(symbols: NDArray[np.integer], number: int) -> int:
    counts = np.bincount(symbols, minlength=number)
    return number + -(-int(np.dot(counts, code_lengths(counts))) // 8)
