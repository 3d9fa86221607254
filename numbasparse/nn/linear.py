"""`SparseLinear`: a module in place of ``nn.Linear``, computed as a pointwise convolution.

A linear layer on M vectors is a 1x1 convolution on one image of 1 x M pixels: the same kernels run it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from numbasparse.activations import in_torch
from numbasparse.nn.module import ChoiceLike, SparseConv2d
from numbasparse.spec import linear_image_shape
from numbasparse.weight import SparseWeight, as_convolution


class SparseLinear(SparseConv2d):
    """A linear layer with a fixed sparse weight, on the CPU or a GPU.

    Parameters, buffers and attributes are those of `SparseConv2d` with a kernel of 1x1; the weight is (K, C, 1, 1).
    """

    takes_vectors = True

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        weight: SparseWeight | None = None,
        choice: ChoiceLike = None,
        activation: str | None = None,
    ) -> SparseLinear:
        """Take the non-zero weights of a dense layer, which is left as it is; the result is on its device.

        ``weight`` takes the place of the layer's own, for example the same one quantized.

        Raises
        ------
        TypeError
            If ``linear`` is no ``nn.Linear``.
        ValueError
            If its weight holds NaN or infinity.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        own = SparseWeight.from_dense(as_convolution(linear.weight)) if weight is None else weight
        return cls(own, linear.bias, choice=choice, activation=activation).to(linear.weight.device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Multiply vectors (..., C); the result is (..., K) of ``x``'s dtype.

        ``residual`` is added before the activation, as torch adds.

        Raises
        ------
        ValueError
            If the last dimension is not C.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_channels:
            raise ValueError(f"expected vectors of {self.in_channels} values, got an input of {tuple(x.shape)}")
        shape = (*x.shape[:-1], self.out_channels)
        if x.numel() == 0:
            y = x.new_empty(shape)
        else:
            image = x.reshape(-1, self.in_channels).t().contiguous().view(linear_image_shape(tuple(x.shape)))
            inside = self.activation if residual is None else "none"
            y = self._convolve(image, inside, None).view(self.out_channels, -1).t().contiguous().view(shape)
        return y if residual is None else in_torch(self.activation)(y + residual)

    def as_image(self, x: Tensor) -> Tensor | None:
        """One vector as an image of one pixel; None for several, which would have to be transposed."""
        single = x.dim() > 0 and x.shape[-1] == self.in_channels == x.numel()
        return x.reshape(1, self.in_channels, 1, 1) if single else None

    def to_dense(self) -> nn.Linear:  # type: ignore[override]  # what it is the sparse form of
        """Return the dense layer, without the activation."""
        linear = nn.Linear(self.in_channels, self.out_channels, bias=self.bias is not None, device="meta")
        dense = self.weight_matrix().to_dense().reshape(self.out_channels, self.in_channels)
        linear.weight = nn.Parameter(torch.from_numpy(dense).to(self.values.device))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)
