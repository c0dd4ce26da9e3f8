"""The attentions that RPAttention replaces, one a backbone family.

A stage of any backbone can keep its family's own attention, so the dense or
local twin that a comparison needs is the same class with another argument. All
layers here map tokens (B, N, C) of a map ``hw_shape = (H, W)`` to (B, N, C).
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_bool, check_dtype, check_int, check_number
from .embed import resize_table
from .init import LINEAR_STD, init_vit_
from .plain import is_exporting
from .shapes import check_heads, check_tokens
from .windows import HW, pad_to_multiple, partition, roll, unpartition


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, h, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(q: Tensor,
            k: Tensor,
            v: Tensor,
            num_heads: int,
            bias: Optional[Tensor] = None) -> Tensor:
    """Softmax attention of (B, N, C) tensors, split into heads inside."""
    out = F.scaled_dot_product_attention(
        *(_heads(t, num_heads) for t in (q, k, v)), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def _check_common(embed_dims: int, num_heads: int, qkv_bias: bool,
                  proj_drop: float) -> None:
    check_heads(embed_dims, num_heads)
    check_bool('qkv_bias', qkv_bias)
    check_number('proj_drop', proj_drop, 0, 1)


class DenseAttention(nn.Module):
    """Multi-head self-attention over all tokens, quadratic in N (ViT, DeiT).

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads; must divide ``embed_dims``.
        qkv_bias (bool): Bias in the q, k, v projection.
        proj_drop (float): Dropout rate after the output projection.
    """

    def __init__(self,
                 embed_dims: int,
                 num_heads: int,
                 qkv_bias: bool = True,
                 proj_drop: float = 0.) -> None:
        super().__init__()
        _check_common(embed_dims, num_heads, qkv_bias, proj_drop)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        init_vit_(self)

    def forward(self, x: Tensor, hw_shape: HW) -> Tensor:
        """Mix tokens (B, N, C); a CLS token may stand first."""
        check_tokens(x, hw_shape, self.embed_dims, allow_cls=True)
        check_dtype(x, self.proj.weight)
        out = _attend(*self.qkv(x).chunk(3, dim=-1), self.num_heads)
        return self.proj_drop(self.proj(out))


class SpatialReductionAttention(nn.Module):
    """Attention to keys and values of a map reduced by a strided conv (PVT).

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads; must divide ``embed_dims``.
        sr_ratio (int): Kernel and stride of the reduction; 1 is dense.
        qkv_bias (bool): Bias in the q and kv projections.
        proj_drop (float): Dropout rate after the output projection.
    """

    def __init__(self,
                 embed_dims: int,
                 num_heads: int,
                 sr_ratio: int,
                 qkv_bias: bool = True,
                 proj_drop: float = 0.) -> None:
        super().__init__()
        _check_common(embed_dims, num_heads, qkv_bias, proj_drop)
        check_int('sr_ratio', sr_ratio, 1)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
        self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio,
                            sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(embed_dims) if sr_ratio > 1 else None
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        init_vit_(self)

    def forward(self, x: Tensor, hw_shape: HW) -> Tensor:
        """Mix tokens (B, N, C)."""
        check_tokens(x, hw_shape, self.embed_dims)
        check_dtype(x, self.proj.weight)
        k, v = self.kv(self.reduce(x, hw_shape)).chunk(2, dim=-1)
        return self.proj_drop(
            self.proj(_attend(self.q(x), k, v, self.num_heads)))

    def reduce(self, x: Tensor, hw_shape: HW) -> Tensor:
        """Tokens (B, N, C) to the fewer ones that are attended to."""
        if self.sr is None:
            return x
        source = x.transpose(1, 2).unflatten(-1, hw_shape)
        # As PVT, the conv drops what is left over at the right and bottom;
        # only a map smaller than its kernel has to be padded.
        height, width = hw_shape
        source = F.pad(source, (0, torch.sym_max(self.sr_ratio - width, 0), 0,
                                torch.sym_max(self.sr_ratio - height, 0)))
        return self.norm(self.sr(source).flatten(2).transpose(1, 2))


class WindowAttention(nn.Module):
    """Self-attention inside square windows, shifted or not (Swin).

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads; must divide ``embed_dims``.
        window_size (int): Side of the windows.
        shift (bool): Shift the windows by half their side. As in Swin, an axis
            that fits into one window is not shifted.
        qkv_bias (bool): Bias in the q, k, v projection.
        proj_drop (float): Dropout rate after the output projection.
    """

    def __init__(self,
                 embed_dims: int,
                 num_heads: int,
                 window_size: int = 7,
                 shift: bool = False,
                 qkv_bias: bool = True,
                 proj_drop: float = 0.) -> None:
        super().__init__()
        _check_common(embed_dims, num_heads, qkv_bias, proj_drop)
        check_int('window_size', window_size, 1)
        check_bool('shift', shift)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = window_size // 2 if shift else 0
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1)**2, num_heads))
        # Follows from window_size, so it does not belong in checkpoints.
        self.register_buffer(
            'relative_position_index',
            _relative_position_index(window_size),
            persistent=False)
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        init_vit_(self)
        nn.init.trunc_normal_(
            self.relative_position_bias_table, std=LINEAR_STD)

    def forward(self, x: Tensor, hw_shape: HW) -> Tensor:
        """Mix tokens (B, N, C)."""
        check_tokens(x, hw_shape, self.embed_dims)
        check_dtype(x, self.proj.weight)
        window = (self.window_size, ) * 2
        height, width = hw_shape
        x = pad_to_multiple(x.unflatten(1, hw_shape), window)
        padded = x.shape[1:3]
        shifts = self.shifts(padded)
        x = roll(x, (-shifts[0], -shifts[1]))
        windows = partition(x, window)  # (B * num_windows, w * w, C)
        out = _attend(*self.qkv(windows).chunk(3, dim=-1), self.num_heads,
                      self._bias(windows, padded, shifts))
        out = unpartition(out, window, padded)
        out = roll(out, shifts)[:, :height, :width].flatten(1, 2)
        return self.proj_drop(self.proj(out))

    def shifts(self, padded: HW) -> HW:
        """By how many tokens the windows of a padded map are shifted."""
        # No branch: a side may be a symbol. One window is not shifted.
        return tuple(
            self.shift_size * torch.sym_min(side // self.window_size - 1, 1)
            for side in padded)

    def _bias(self, windows: Tensor, padded: HW, shifts: HW) -> Tensor:
        """Position bias (1, h, w², w²), with the shift mask per window."""
        area = self.window_size**2
        bias = self.relative_position_bias_table[
            self.relative_position_index.flatten()]
        bias = bias.view(1, area, area, -1).permute(0, 3, 1, 2)
        if self.shift_size and (is_exporting() or any(shifts)):
            mask = shift_mask(padded, self.window_size, shifts, bias)
            images = windows.shape[0] // mask.shape[0]
            bias = (bias + mask.unsqueeze(1)).repeat(images, 1, 1, 1)
        return bias.to(windows.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + 'relative_position_bias_table'
        if key in state_dict:
            side = 2 * self.window_size - 1
            state_dict[key] = resize_table(state_dict[key].unsqueeze(0),
                                           (side, side), key).squeeze(0)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each (query, key) pair, (w², w²)."""
    axis = torch.arange(window_size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing='ij')).flatten(1)
    offset = grid[:, :, None] - grid[:, None, :] + window_size - 1
    return offset[0] * (2 * window_size - 1) + offset[1]


def shift_mask(padded: HW, window_size: int, shifts: HW,
                like: Tensor) -> Tensor:
    """Mask (num_windows, w², w²): 0, or -inf between tokens that only the
    cyclic shift made neighbours."""
    regions = like.new_zeros((1, *padded, 1))
    for axis, (side, shift) in enumerate(zip(padded, shifts, strict=True)):
        # In an export all axes: where the shift is 0 the regions below differ
        # between windows only, and nothing is masked.
        if is_exporting() or shift:
            position = torch.arange(side, device=like.device)
            region = ((position >= side - window_size).int() +
                      (position >= side - shift).int())
            shape = (1, -1, 1, 1) if axis == 0 else (1, 1, -1, 1)
            regions = regions * 3 + region.view(shape)
    regions = partition(regions, (window_size, ) * 2).squeeze(-1)
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return torch.zeros_like(
        differ, dtype=like.dtype).masked_fill(differ, float('-inf'))


class CrossShapedWindowAttention(nn.Module):
    """Self-attention inside stripes, half of the heads each way (CSWin).

    Half of the channels attend inside vertical stripes, half inside horizontal
    ones; a depth-wise convolution of V inside the stripe is added (LePE).

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads; must divide ``embed_dims`` and, for stripes, be
            even.
        split_size (int, optional): Width of the stripes. None: one window, the
            whole map, for all heads (CSWin's last stage).
        qkv_bias (bool): Bias in the q, k, v projection.
        proj_drop (float): Dropout rate after the output projection.
    """

    def __init__(self,
                 embed_dims: int,
                 num_heads: int,
                 split_size: Optional[int],
                 qkv_bias: bool = True,
                 proj_drop: float = 0.) -> None:
        super().__init__()
        _check_common(embed_dims, num_heads, qkv_bias, proj_drop)
        if split_size is not None:
            check_int('split_size', split_size)
        if split_size is not None and (split_size < 1 or num_heads % 2):
            raise ValueError(
                'cross-shaped windows need split_size of at least 1 and an '
                f'even num_heads, got split_size={split_size} and num_heads='
                f'{num_heads}; split_size=None attends to the whole map')
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.split_size = split_size
        branches = 1 if split_size is None else 2
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.lepe = nn.ModuleList(
            nn.Conv2d(dims, dims, 3, padding=1, groups=dims)
            for dims in (embed_dims // branches, ) * branches)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        init_vit_(self)

    def forward(self, x: Tensor, hw_shape: HW) -> Tensor:
        """Mix tokens (B, N, C)."""
        check_tokens(x, hw_shape, self.embed_dims)
        check_dtype(x, self.proj.weight)
        height, width = hw_shape
        x = x.unflatten(1, hw_shape)
        if self.split_size is not None:
            x = pad_to_multiple(x, (self.split_size, ) * 2)
        stripes = self.stripes(tuple(x.shape[1:3]))
        qkv = self.qkv(x).unflatten(-1, (3, len(stripes), -1))
        branches = zip(qkv.unbind(-2), stripes, self.lepe, strict=True)
        out = torch.cat([self._branch(*branch) for branch in branches], dim=-1)
        out = out[:, :height, :width].flatten(1, 2)
        return self.proj_drop(self.proj(out))

    def stripes(self, padded: HW) -> List[HW]:
        """Height and width of each branch's stripes on a padded map."""
        if self.split_size is None:
            return [padded]
        return [(padded[0], self.split_size), (self.split_size, padded[1])]

    def _branch(self, qkv: Tensor, stripe: HW, lepe: nn.Conv2d) -> Tensor:
        """Stripes of (B, H, W, 3, C / branches) attend to themselves."""
        hw_shape = qkv.shape[1:3]
        q, k, v = (partition(t, stripe) for t in qkv.unbind(3))
        local = lepe(v.transpose(1, 2).unflatten(-1, stripe))
        out = _attend(q, k, v, self.num_heads // len(self.lepe))
        out = out + local.flatten(2).transpose(1, 2)
        return unpartition(out, stripe, hw_shape)
