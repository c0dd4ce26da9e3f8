"""Cutting a map into rectangular windows and back, at any resolution."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import is_exporting
from .shapes import missing

HW = Tuple[int, int]


def pad_to_multiple(x: Tensor, window: HW) -> Tensor:
    """Zero-pad a (B, H, W, C) map at the right and bottom to whole windows."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, missing(width, window[1]), 0,
                     missing(height, window[0])))


def partition(x: Tensor, window: HW) -> Tensor:
    """Cut (B, H, W, C) into windows (B * num_windows, h * w, C).

    H and W must be multiples of the window; windows go row by row.
    """
    batch, height, width, channels = x.shape
    h, w = window
    x = x.reshape(batch, height // h, h, width // w, w, channels)
    return x.transpose(2, 3).reshape(-1, h * w, channels)


def unpartition(windows: Tensor, window: HW, hw_shape: HW) -> Tensor:
    """Undo :func:`partition`: back to a map (B, H, W, C)."""
    (height, width), (h, w) = hw_shape, window
    rows, cols = height // h, width // w
    x = windows.reshape(-1, rows, cols, h, w, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def roll(x: Tensor, shifts: HW) -> Tensor:
    """Shift a (B, H, W, C) map in a circle, down and to the right."""
    if not is_exporting():
        return x.roll(shifts, dims=(1, 2))
    # ONNX rolls, and takes remainders, by numbers known beforehand only.
    for dim, shift in enumerate(shifts, start=1):
        side = x.shape[dim]
        index = torch.arange(side, device=x.device) - shift
        index = torch.where(index < 0, index + side, index)
        x = x.index_select(dim, torch.where(index < side, index, index - side))
    return x
