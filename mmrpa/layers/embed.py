"""Turning images into tokens, and position tables at any resolution."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import (
    check_dtype,
    check_int,
    check_number,
    check_pair,
    check_tensor,
)
from .init import LINEAR_STD, init_vit_
from .plain import is_exporting
from .shapes import missing


def resize_grid(grid: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
    """Resize a (1, h * w, C) table given as (1, h, w, C) to (1, H * W, C).

    Bicubic, as DeiT does; the identity where the size fits already.
    """
    # An export is for all sizes; resizing to the same one changes no bit.
    if is_exporting() or tuple(grid.shape[1:3]) != tuple(hw_shape):
        dtype = grid.dtype
        grid = F.interpolate(
            grid.permute(0, 3, 1, 2).float(),
            size=tuple(hw_shape),
            mode='bicubic',
            align_corners=False).permute(0, 2, 3, 1).to(dtype)
    return grid.flatten(1, 2)


def resize_table(table: Tensor,
                 hw_shape: Tuple[int, int],
                 name: str,
                 num_extra: int = 0) -> Tensor:
    """Resize the table of a checkpoint that was made at another resolution.

    Args:
        table (Tensor): (1, num_extra + side * side, C).
        hw_shape (tuple[int, int]): The grid to resize to.
        name (str): What to call the table in errors.
        num_extra (int): Rows in front that are not part of the grid (CLS).

    Returns:
        Tensor: (1, num_extra + H * W, C).

    Raises:
        ValueError: The table has to be resized and its grid is not a square.
    """
    rows = table.shape[1] - num_extra
    if rows == hw_shape[0] * hw_shape[1]:
        return table
    side = round(max(rows, 0)**0.5)
    if side * side != rows or rows < 1:
        raise ValueError(
            f'{name} in the checkpoint has {rows} grid rows, which is not a '
            f'square, so it cannot be resized to {hw_shape}; build the '
            'backbone with the img_size that the checkpoint was trained at')
    extra, grid = table[:, :num_extra], table[:, num_extra:]
    grid = resize_grid(grid.unflatten(1, (side, side)), hw_shape)
    return torch.cat((extra, grid), dim=1)


class PositionEmbed(nn.Module):
    """A learned position table, resized to any map in forward and on load.

    Args:
        embed_dims (int): Channels C.
        hw_shape (tuple[int, int]): Grid of the table.
        num_extra (int): Rows in front for tokens outside the grid (CLS).
    """

    def __init__(self,
                 embed_dims: int,
                 hw_shape: Tuple[int, int],
                 num_extra: int = 0) -> None:
        super().__init__()
        check_int('embed_dims', embed_dims, 1)
        check_int('num_extra', num_extra, 0)
        self.hw_shape = check_pair('hw_shape', hw_shape)
        self.num_extra = num_extra
        self.pos_embed = nn.Parameter(
            torch.empty(1, num_extra + hw_shape[0] * hw_shape[1], embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=LINEAR_STD)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Add the table to tokens (B, num_extra + H * W, C)."""
        channels = self.pos_embed.shape[-1]
        what = f'(B, {self.num_extra} + H * W, {channels})'
        check_tensor('x', x, 3, what)
        height, width = check_pair('hw_shape', hw_shape)
        if (x.shape[-1] != channels
                or x.shape[1] != self.num_extra + height * width):
            raise ValueError(f'x must be {what} for hw_shape={height, width}, '
                             f'got {tuple(x.shape)}')
        extra = self.pos_embed[:, :self.num_extra]
        grid = self.pos_embed[:, self.num_extra:].unflatten(1, self.hw_shape)
        return x + torch.cat((extra, resize_grid(grid, hw_shape)), dim=1)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + 'pos_embed'
        if key in state_dict:
            state_dict[key] = resize_table(state_dict[key], self.hw_shape, key,
                                           self.num_extra)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_map(x: Tensor, weight: Tensor, channels: int) -> Tuple[int, int]:
    """Check a map (B, C_in, H, W), and return H and W."""
    what = f'a map (B, {channels}, H, W)'
    check_tensor('x', x, 4, what)
    if x.shape[1] != channels or min(x.shape[-2:]) < 1:
        raise ValueError(f'x must be {what}, got {tuple(x.shape)}')
    check_dtype(x, weight)
    return x.shape[-2], x.shape[-1]


class PatchEmbed(nn.Module):
    """A strided convolution from a map to tokens, with or without overlap.

    Args:
        in_channels (int): Channels of the input map.
        embed_dims (int): Channels of the tokens.
        stride (int): Pixels a token, on each axis.
        kernel_size (int, optional): Defaults to ``stride`` (no overlap).
        padding (int): Zero padding of the convolution on every side.
        norm_eps (float, optional): Epsilon of the LayerNorm after the
            convolution. None leaves the norm out.
    """

    def __init__(self,
                 in_channels: int,
                 embed_dims: int,
                 stride: int,
                 kernel_size: Optional[int] = None,
                 padding: int = 0,
                 norm_eps: Optional[float] = None) -> None:
        super().__init__()
        for name, value, low in (('in_channels', in_channels, 1),
                                 ('embed_dims', embed_dims, 1),
                                 ('stride', stride, 1),
                                 ('padding', padding, 0)):
            check_int(name, value, low)
        if kernel_size is not None:
            check_int('kernel_size', kernel_size, 1)
        if norm_eps is not None:
            check_number('norm_eps', norm_eps, 0)
        self.stride = stride
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size
                                    or stride, stride, padding)
        self.norm = None if norm_eps is None else nn.LayerNorm(
            embed_dims, eps=norm_eps)
        init_vit_(self)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Map (B, C_in, H, W) to tokens and their grid.

        Returns:
            tuple: (B, N, C) and (ceil(H / stride), ceil(W / stride)): the
            input is zero-padded at the right and bottom to whole strides.
        """
        height, width = _check_map(x, self.projection.weight,
                                   self.projection.in_channels)
        x = F.pad(x, (0, missing(width, self.stride), 0,
                      missing(height, self.stride)))
        kernel, padding = (self.projection.kernel_size[0],
                           self.projection.padding[0])
        # By the strides alone where they suffice: sides may be symbols.
        if (kernel > self.stride + 2 * padding
                and min(x.shape[-2:]) + 2 * padding < kernel):
            raise ValueError(f'x is {height}x{width}, smaller than the kernel '
                             f'of {kernel}x{kernel}; enlarge or pad it')
        x = self.projection(x)
        hw_shape = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        return (x if self.norm is None else self.norm(x)), hw_shape


class PatchMerging(nn.Module):
    """Halve the map by a linear layer over 2 x 2 neighbours (Swin).

    Args:
        in_channels (int): Channels before.
        embed_dims (int): Channels after.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        check_int('in_channels', in_channels, 1)
        check_int('embed_dims', embed_dims, 1)
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, embed_dims, bias=False)
        init_vit_(self)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Map (B, C_in, H, W) to (B, N, C) and (ceil(H / 2), ceil(W / 2))."""
        height, width = _check_map(x, self.reduction.weight,
                                   self.reduction.in_features // 4)
        x = F.pad(x, (0, missing(width, 2), 0, missing(height, 2)))
        x = x.permute(0, 2, 3, 1)
        # The order of the official weights: top left, bottom left, top right,
        # bottom right.
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        hw_shape = tuple(x.shape[1:3])
        return self.reduction(self.norm(x.flatten(1, 2))), hw_shape
