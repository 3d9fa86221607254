"""How many bytes a model's sparse weights take in each form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numbasparse.quantization import CodebookQuantization
from numbasparse.quantization.huffman import huffman_nbytes
from numbasparse.weight import SparseWeight

BITS = (8, 4, 3)


@dataclass(frozen=True)
class Form:
    """One way to keep every layer, and the bytes of all of them together."""

    name: str
    nbytes: int


def footprint(weights: Mapping[str, SparseWeight]) -> list[Form]:
    """Bytes of all layers: dense, CSR, and coded with and without Huffman.

    Weights that are quantized are counted with the codes that they have. If none is, codebooks of 8, 4 and 3 bits
    are made of them (k-means, one codebook a layer).

    Parameters
    ----------
    weights : mapping of str to SparseWeight
        As of `numbasparse.weight.load_weights`.

    Raises
    ------
    ValueError
        If there is no layer, or some are quantized and others not.
    """
    layers = list(weights.values())
    coded = [weight.levels is not None for weight in layers]
    if not layers:
        raise ValueError("the file of weights has no layer")
    if any(coded) != all(coded):
        raise ValueError(f"{sum(coded)} of {len(coded)} layers are quantized: give a file of all or of none")
    forms = [
        Form("dense, float32", sum(4 * int(np.prod(weight.shape)) for weight in layers)),
        Form("CSR, float32", sum(csr_nbytes(weight) for weight in layers)),
    ]
    if all(coded):
        bits = sorted({weight.levels.bits for weight in layers if weight.levels is not None})
        return forms + _coded_forms(layers, " and ".join(map(str, bits)))
    for bits_ in BITS:
        forms += _coded_forms([weight.quantized(CodebookQuantization(bits=bits_)) for weight in layers], str(bits_))
    return forms


def csr_nbytes(weight: SparseWeight) -> int:
    """Bytes of float32 values, int32 columns and int32 row pointers."""
    return 8 * weight.nnz + weight.indptr.nbytes


def _coded_forms(layers: list[SparseWeight], bits: str) -> list[Form]:
    return [
        Form(f"codes of {bits} bits", sum(weight.nbytes for weight in layers)),
        Form(f"{bits} bits, Huffman", sum(huffman_nbytes(weight) for weight in layers)),
    ]
