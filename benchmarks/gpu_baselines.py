"""What stands beside our kernels in benchmarks/gpu.py and is no candidate of the tuner: cuSPARSE on im2col.

The matrix of input columns is made before and not timed, which favours cuSPARSE: a convolution would have to make it,
R*S times the size of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from numbasparse import ConvSpec, SparseWeight

# A function that computes, and one that turns what it returns into (N, K, OH, OW).
Baseline = tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]


def columns(x: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """The im2col matrix, (C*R*S, N*OH*OW), row-major; for symmetric padding."""
    padding = (spec.padding[0][0], spec.padding[1][0])
    if spec.is_pointwise and spec.stride == (1, 1) and padding == (0, 0):
        unfolded = x.reshape(spec.n, spec.c, -1)
    else:
        unfolded = F.unfold(x, (spec.r, spec.s), spec.dilation, padding, spec.stride)
    return unfolded.permute(1, 0, 2).reshape(unfolded.shape[1], -1).contiguous()


def _csr(weight: SparseWeight, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(weight.indptr).to(device),
        torch.tensor(weight.indices).to(device),
        torch.tensor(weight.data).to(device),
    )


def cusparse_torch(weight: SparseWeight, b: torch.Tensor, spec: ConvSpec) -> Baseline:
    """cuSPARSE's SpMM through torch: CSR times a row-major matrix."""
    indptr, indices, data = _csr(weight, b.device)
    matrix = torch.sparse_csr_tensor(indptr, indices, data, (spec.k, b.shape[0]), check_invariants=False)

    def back(y: torch.Tensor) -> torch.Tensor:
        return y.reshape(spec.k, spec.n, spec.out_h, spec.out_w).permute(1, 0, 2, 3)

    return lambda: torch.sparse.mm(matrix, b), back


def cusparse_cupy(weight: SparseWeight, b: torch.Tensor, spec: ConvSpec) -> Baseline:
    """cuSPARSE's SpMM through CuPy, which wants column-major matrices.

    Raises
    ------
    ImportError
        If CuPy is not installed.
    """
    import cupy
    from cupyx import cusparse
    from cupyx.scipy.sparse import csr_matrix

    indptr, indices, data = (cupy.from_dlpack(t) for t in _csr(weight, b.device))
    matrix = csr_matrix((data, indices, indptr), shape=(spec.k, b.shape[0]))
    column_major = cupy.from_dlpack(b.T.contiguous()).T
    out = cupy.empty((spec.k, b.shape[1]), cupy.float32, order="F")

    def call() -> Any:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return cusparse.spmm(matrix, column_major, out, 1.0, 0.0)

    def back(y: Any) -> torch.Tensor:
        t = torch.from_dlpack(y)
        return t.reshape(spec.k, spec.n, spec.out_h, spec.out_w).permute(1, 0, 2, 3)

    return call, back
