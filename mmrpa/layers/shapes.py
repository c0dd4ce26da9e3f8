"""Argument checks that all attention layers share."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..arguments import check_int, check_pair, check_tensor


def check_heads(embed_dims: int, num_heads: int) -> None:
    """Raise ValueError unless ``num_heads`` divides ``embed_dims``."""
    check_int('embed_dims', embed_dims, 1)
    check_int('num_heads', num_heads, 1)
    if embed_dims % num_heads:
        raise ValueError(
            f'embed_dims must be divisible by num_heads, got embed_dims='
            f'{embed_dims} and num_heads={num_heads}')


def check_tokens(x: Tensor,
                 hw_shape: Optional[Tuple[int, int]],
                 embed_dims: int,
                 allow_cls: bool = False) -> int:
    """Check tokens (B, N, C) against the map that they come from.

    Returns:
        int: The number of CLS tokens in front, 0 or 1.

    Raises:
        TypeError: x is not a floating-point tensor, hw_shape not (H, W).
        ValueError: x is not (B, N, embed_dims), hw_shape is missing, or N is
            neither H * W nor, where ``allow_cls``, H * W + 1.
    """
    check_tensor('x', x)
    if x.dim() != 3 or x.shape[-1] != embed_dims:
        raise ValueError(f'x must be (B, N, {embed_dims}), got '
                         f'{tuple(x.shape)}')
    if hw_shape is None:
        raise ValueError('hw_shape=(H, W) is needed for tokens of shape '
                         f'{tuple(x.shape)}')
    height, width = check_pair('hw_shape', hw_shape)
    num_cls = x.shape[1] - height * width
    if num_cls not in ((0, 1) if allow_cls else (0, )):
        raise ValueError(
            f'x has N={x.shape[1]} tokens, but hw_shape=({height}, {width}) '
            f'asks for {height * width}' +
            (' (or one more with a CLS token)' if allow_cls else ''))
    return num_cls


def check_queries(queries: Tensor, hw_shape: Tuple[int, int]) -> None:
    """Raise ValueError unless these are indices (Q) of tokens of a map."""
    height, width = check_pair('hw_shape', hw_shape)
    if not isinstance(queries, Tensor):
        raise TypeError('queries must be a tensor of integer indices (Q), '
                        f'got {type(queries).__name__}')
    if (queries.dim() != 1 or queries.is_floating_point()
            or queries.dtype == torch.bool):
        raise ValueError('queries must be integer indices (Q), got '
                         f'{tuple(queries.shape)} of {queries.dtype}')
    outside = (queries < 0) | (queries >= height * width)
    if outside.any():
        raise ValueError(f'queries must be in [0, {height * width - 1}] for a '
                         f'map of {height}x{width} tokens, got '
                         f'{queries[outside].tolist()}')


def missing(side: int, multiple: int) -> int:
    """What a side lacks to the next multiple, 0 if it is one.

    Not ``-side % multiple``: in an export sides are symbols, and of this form
    the padded side is ``multiple * ceil(side / multiple)`` without the modulo,
    which the next layer's sizes are then computed from.
    """
    return (side + multiple - 1) // multiple * multiple - side
