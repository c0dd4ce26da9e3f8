"""What a query reads from each token, in every attention of mmrpa.

All functions compute the rows of the queries that are asked for, never the
N x N matrix, and return maps (B, h, Q, H, W), float32 (float64 for float64).
What a query reads from a CLS token or from padding is left out, so a map adds
up to 1 or less.
"""

from functools import singledispatch
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..layers import (
    CrossShapedWindowAttention,
    DenseAttention,
    RPAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from ..layers.shapes import check_queries, check_tokens
from ..layers.twins import shift_mask
from ..layers.windows import HW, pad_to_multiple, partition
from ..ops.naive import compute_dtype, without_autocast

ATTENTIONS = (RPAttention, DenseAttention, SpatialReductionAttention,
              WindowAttention, CrossShapedWindowAttention)


@singledispatch
def query_response(layer: nn.Module, x: Tensor, hw_shape: HW,
                   queries: Tensor) -> Tensor:
    """How much of each token some queries read in an attention layer.

    RPAttention: see its method of this name. Dense, window and cross-shaped
    window attention: the rows of the softmax, zero outside of the query's
    window. Spatial reduction: the row over the reduced tokens, each spread
    evenly over the tokens that it was made from.

    Args:
        layer (nn.Module): An attention layer of :mod:`mmrpa.layers`.
        x (Tensor): Tokens (B, N, C) that its ``forward`` was given.
        hw_shape (tuple[int, int]): (H, W) of their map.
        queries (Tensor): Indices (Q) of tokens in the map, y * W + x.

    Returns:
        Tensor: Maps (B, h, Q, H, W) that add up to 1 or, where a CLS token or
        padding is read as well, less.

    Raises:
        TypeError: A layer of another kind.
        ValueError: x and hw_shape do not fit, or a query is not a token.
    """
    raise TypeError(f'layer must be one of {[t.__name__ for t in ATTENTIONS]},'
                    f' got {type(layer).__name__}')


@query_response.register
def _rp(layer: RPAttention, x: Tensor, hw_shape: HW,
        queries: Tensor) -> Tensor:
    return layer.query_response(x, hw_shape, queries)


@query_response.register
def _dense(layer: DenseAttention, x: Tensor, hw_shape: HW,
           queries: Tensor) -> Tensor:
    num_cls = check_tokens(x, hw_shape, layer.embed_dims, allow_cls=True)
    check_queries(queries, hw_shape)
    q, k, _ = layer.qkv(x).chunk(3, dim=-1)
    rows = _rows(q[:, queries + num_cls], k, layer.num_heads)
    return rows[..., num_cls:].unflatten(-1, hw_shape)


@query_response.register
def _spatial_reduction(layer: SpatialReductionAttention, x: Tensor,
                       hw_shape: HW, queries: Tensor) -> Tensor:
    check_tokens(x, hw_shape, layer.embed_dims)
    check_queries(queries, hw_shape)
    (height, width), ratio = hw_shape, layer.sr_ratio
    k = layer.kv(layer.reduce(x, hw_shape)).chunk(2, dim=-1)[0]
    rows = _rows(layer.q(x[:, queries]), k, layer.num_heads)
    reduced = (max(height // ratio, 1), max(width // ratio, 1))
    rows = rows / (min(ratio, height) * min(ratio, width))
    blocks = rows.unflatten(-1, reduced).repeat_interleave(
        ratio, -2).repeat_interleave(ratio, -1)[..., :height, :width]
    # What the strided convolution drops at the right and bottom is not read.
    return nn.functional.pad(blocks, (0, width - blocks.shape[-1], 0,
                                      height - blocks.shape[-2]))


@query_response.register
def _window(layer: WindowAttention, x: Tensor, hw_shape: HW,
            queries: Tensor) -> Tensor:
    check_tokens(x, hw_shape, layer.embed_dims)
    check_queries(queries, hw_shape)
    side = layer.window_size
    x = pad_to_multiple(x.unflatten(1, hw_shape), (side, side))
    padded = tuple(x.shape[1:3])
    shifts = layer.shifts(padded)
    windows, which, where = _find_windows(hw_shape, padded, (side, side),
                                          shifts, queries)
    index = layer.relative_position_index.view(side**2, side**2)[where]
    bias = layer.relative_position_bias_table[index].permute(2, 0, 1)
    if any(shifts):
        mask = shift_mask(padded, side, shifts, bias)
        bias = bias + mask[which, where]
    rows = _window_rows(layer.qkv, x, windows, where, layer.num_heads, bias)
    return _scatter(rows, windows, padded, hw_shape)


@query_response.register
def _cross(layer: CrossShapedWindowAttention, x: Tensor, hw_shape: HW,
           queries: Tensor) -> Tensor:
    check_tokens(x, hw_shape, layer.embed_dims)
    check_queries(queries, hw_shape)
    x = x.unflatten(1, hw_shape)
    if layer.split_size is not None:
        x = pad_to_multiple(x, (layer.split_size, ) * 2)
    padded = tuple(x.shape[1:3])
    stripes = layer.stripes(padded)
    heads = layer.num_heads // len(stripes)
    maps = []
    for i, stripe in enumerate(stripes):
        windows, _, where = _find_windows(hw_shape, padded, stripe, (0, 0),
                                          queries)
        rows = _window_rows(layer.qkv, x, windows, where, layer.num_heads)
        maps.append(
            _scatter(rows[:, i * heads:(i + 1) * heads], windows, padded,
                     hw_shape))
    return torch.cat(maps, dim=1)


def _rows(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """Softmax rows (B, h, Q, N) of q (B, Q, C) over k (B, N, C)."""
    dtype = compute_dtype(q.dtype)
    q, k = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(dtype)
            for t in (q, k))
    with without_autocast(q.device.type):
        logits = q @ k.transpose(-2, -1) * q.shape[-1]**-0.5
        return logits.softmax(dim=-1)


def _find_windows(hw_shape: HW, padded: HW, window: HW, shifts: HW,
                  queries: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The window of each query.

    Returns:
        tuple: Its tokens' indices in the padded map (Q, A) for windows of A
        tokens, its number (Q), and the query's place in it (Q).
    """
    index = torch.arange(padded[0] * padded[1], device=queries.device)
    index = index.view(1, *padded, 1)
    index = index.roll((-shifts[0], -shifts[1]), dims=(1, 2))
    windows = partition(index, window).squeeze(-1)
    area = window[0] * window[1]
    at = torch.empty_like(windows).flatten()
    at[windows.flatten()] = torch.arange(at.numel(), device=queries.device)
    width = hw_shape[1]
    at = at[queries // width * padded[1] + queries % width]
    return windows[at // area], at // area, at % area


def _window_rows(qkv: nn.Linear, x: Tensor, windows: Tensor, where: Tensor,
                 num_heads: int, bias: Optional[Tensor] = None) -> Tensor:
    """Rows (B, h, Q, A) of queries over the tokens of their windows.

    Args:
        qkv (nn.Linear): The projection.
        x (Tensor): The padded map (B, H, W, C).
        windows (Tensor): See :func:`_find_windows`.
        where (Tensor): See :func:`_find_windows`.
        num_heads (int): Heads h.
        bias (Tensor, optional): Added to the logits, (h, Q, A).
    """
    projected = qkv(x.flatten(1, 2)[:, windows])  # (B, Q, A, 3C)
    dtype = compute_dtype(projected.dtype)
    q, k, _ = projected.to(dtype).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    q = q[:, torch.arange(len(where), device=where.device), where]
    with without_autocast(x.device.type):
        logits = torch.einsum('bqhd,bqahd->bhqa', q, k) * q.shape[-1]**-0.5
        if bias is not None:
            logits = logits + bias.to(dtype)
        return logits.softmax(dim=-1)


def _scatter(rows: Tensor, windows: Tensor, padded: HW,
             hw_shape: HW) -> Tensor:
    """Rows (B, h, Q, A) over windows to maps (B, h, Q, H, W)."""
    maps = rows.new_zeros((*rows.shape[:3], padded[0] * padded[1]))
    maps.scatter_(-1, windows.expand(rows.shape), rows)
    height, width = hw_shape
    return maps.unflatten(-1, padded)[..., :height, :width]
