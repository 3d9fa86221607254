"""Vectors: the unit of pruning, V successive output channels of one weight column (V x 1).

The weight of a layer is seen as a matrix of ``rows = K`` output channels and ``columns = C / groups * R * S``. With
granularity V the rows of each group are cut into runs of V, the last run shorter where V does not divide
``K / groups``; a run's weights in one column live or die together. V = 1 is unstructured pruning.

Source: Chen, Qu, Liu, Ding and Xie, "Efficient tensor core-based GPU kernels for structured sparsity under reduced
precision", SC 2021 (column vectors).

Beside that, masks can be held to two of every four neighbouring input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VECTORS = (1, 2, 4, 8, 16)
"""The granularities that kernels know."""


@dataclass(frozen=True)
class VectorGrid:
    """How a weight is cut into vectors.

    Attributes
    ----------
    shape : tuple of int
        Shape of the weight, output channels first.
    groups : int
        Groups of the convolution; no vector spans two.
    vector : int
        V, rows of a vector.
    """

    shape: tuple[int, ...]
    groups: int
    vector: int

    @property
    def group_rows(self) -> int:
        """Output channels of a group."""
        return self.shape[0] // self.groups

    @property
    def group_vectors(self) -> int:
        """Runs of rows of a group."""
        return -(-self.group_rows // self.vector)

    def padded(self, values: Tensor, fill: float | bool) -> Tensor:
        """View (K, ...) as (groups, runs, V, columns), the missing rows of last runs filled."""
        view = values.reshape(self.groups, self.group_rows, -1)
        missing = self.group_vectors * self.vector - self.group_rows
        if missing:
            view = torch.cat([view, view.new_full((self.groups, missing, view.shape[2]), fill)], 1)
        return view.reshape(self.groups, self.group_vectors, self.vector, -1)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of every vector, (groups * runs, columns), of values of the weight's shape."""
        if self.vector == 1:
            return values.reshape(self.shape[0], -1)
        return self.padded(values, 0.0).sum(2).flatten(0, 1) / self.sizes(values.device)

    def all(self, flags: Tensor) -> Tensor:
        """Return for every vector, (groups * runs, columns), whether all its flags are true."""
        if self.vector == 1:
            return flags.reshape(self.shape[0], -1)
        return self.padded(flags, True).all(2).flatten(0, 1)

    def beyond_two(self, scores: Tensor) -> Tensor:
        """Mark all but the best two of every four neighbouring input channels at a place of the kernel.

        Parameters
        ----------
        scores : Tensor
            (groups * runs, columns), of `mean`.

        Returns
        -------
        Tensor
            bool, of the same shape. Of equal scores the first are the best.

        Notes
        -----
        Sparse tensor cores hold two of four (NVIDIA's 2:4 form; Mishra et al., "Accelerating sparse deep neural
        networks", 2021, arXiv 2104.08378).
        """
        channels = self.shape[1]
        places = scores.reshape(len(scores), channels, -1)
        quads = F.pad(places, (0, 0, 0, -channels % 4), value=-torch.inf).unflatten(1, (-1, 4))
        order = torch.sort(quads, stable=True, dim=2, descending=True).indices
        ranks = torch.arange(4, device=order.device)[:, None].expand_as(order)
        beyond = torch.empty_like(order).scatter_(2, order, ranks) >= 2
        return beyond.flatten(1, 2)[:, :channels].reshape(scores.shape)

    def sizes(self, device: torch.device) -> Tensor:
        """Return the weights in each vector of a run, int64 of shape (groups * runs, 1)."""
        sizes = torch.full((self.group_vectors,), self.vector, dtype=torch.int64)
        sizes[-1] = self.group_rows - (self.group_vectors - 1) * self.vector
        return sizes.repeat(self.groups)[:, None].to(device)

    def expand(self, mask: Tensor) -> Tensor:
        """Return a mask of vectors, (groups * runs, columns), as one of weights, in the weight's shape."""
        if self.vector == 1:
            return mask.reshape(self.shape)
        rows = mask.view(self.groups, self.group_vectors, -1).repeat_interleave(self.vector, 1)
        return rows[:, : self.group_rows].reshape(self.shape)


def check_vector(value: object) -> int:
    """Return ``value`` as a granularity, or raise ``ValueError``."""
    if isinstance(value, bool) or value not in VECTORS:
        raise ValueError(
            f"vector must be one of {', '.join(map(str, VECTORS))} (output channels that share a column's fate), "
            f"got {value!r}"
        )
    return int(value)
