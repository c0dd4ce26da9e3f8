"""Adaptive pooling that can be exported for maps of any size."""

from typing import Tuple

import torch
from torch import Tensor, nn


class AdaptiveAvgPool(nn.Module):
    """What ``nn.AdaptiveAvgPool2d`` computes, as two products of matrices.

    Bin i of S on an axis of L cells averages the cells from ``floor(i * L /
    S)`` to ``ceil((i + 1) * L / S) - 1``. Bins differ in size unless S divides
    L, which ONNX's poolings cannot express; weights of 1 / size can, and the
    mean over a rectangle is the mean over its rows and columns.

    Args:
        output_size (tuple[int | None, int | None]): Bins (height, width); None
            keeps the axis as it is.
    """

    def __init__(self, output_size: Tuple) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *output_size)."""
        for dim, bins in zip((-2, -1), self.output_size, strict=True):
            if bins == 1:
                x = x.mean(dim=dim, keepdim=True)
            elif bins is not None:
                weight = bin_weights(bins, x.shape[dim], x)
                x = weight @ x if dim == -2 else x @ weight.t()
        return x

    def extra_repr(self) -> str:
        """The bins."""
        return f'output_size={self.output_size}'


def bin_weights(bins: int, length: int, like: Tensor) -> Tensor:
    """Matrix (bins, length) whose product with an axis averages its bins.

    Args:
        bins (int): Number of bins S.
        length (int): Cells L of the axis; may be a symbol.
        like (Tensor): Gives dtype and device.
    """
    cell = torch.arange(length, device=like.device)
    index = torch.arange(bins, device=like.device).unsqueeze(1)
    start = index * length // bins
    end = ((index + 1) * length + bins - 1) // bins
    inside = ((cell >= start) & (cell < end)).to(like.dtype)
    return inside / (end - start).to(like.dtype)


def replace_pooling(module: nn.Module) -> int:
    """Put :class:`AdaptiveAvgPool` in the place of ``nn.AdaptiveAvgPool2d``.

    Args:
        module (nn.Module): Changed in place, at all depths.

    Returns:
        int: How many were replaced.
    """
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            size = tuple(size) if isinstance(size, (tuple, list)) else (
                size, size)
            setattr(module, name, AdaptiveAvgPool(size))
            count += 1
        else:
            count += replace_pooling(child)
    return count
