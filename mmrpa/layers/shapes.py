"""Argument checks that all attention layers share."""

from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor


def check_heads(embed_dims: int, num_heads: int) -> None:
    """Raise ValueError unless ``num_heads`` divides ``embed_dims``."""
    if num_heads < 1 or embed_dims < 1 or embed_dims % num_heads:
        raise ValueError(
            f'embed_dims must be divisible by num_heads, got embed_dims='
            f'{embed_dims} and num_heads={num_heads}')


def check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f'{name} must be one of {tuple(allowed)}, got {value!r}')


def check_tokens(x: Tensor,
                 hw_shape: Optional[Tuple[int, int]],
                 embed_dims: int,
                 allow_cls: bool = False) -> int:
    """Check tokens (B, N, C) against the map that they come from.

    Returns:
        int: The number of CLS tokens in front, 0 or 1.

    Raises:
        ValueError: x is not (B, N, embed_dims), hw_shape is missing, or N is
            neither H * W nor, where ``allow_cls``, H * W + 1.
    """
    if x.dim() != 3 or x.shape[-1] != embed_dims:
        raise ValueError(f'x must be (B, N, {embed_dims}), got '
                         f'{tuple(x.shape)}')
    if hw_shape is None:
        raise ValueError('hw_shape=(H, W) is needed for tokens of shape '
                         f'{tuple(x.shape)}')
    height, width = hw_shape
    num_cls = x.shape[1] - height * width
    if num_cls not in ((0, 1) if allow_cls else (0, )):
        raise ValueError(
            f'x has N={x.shape[1]} tokens, but hw_shape=({height}, {width}) '
            f'asks for {height * width}' +
            (' (or one more with a CLS token)' if allow_cls else ''))
    return num_cls


def check_queries(queries: Tensor, hw_shape: Tuple[int, int]) -> None:
    """Raise ValueError unless these are indices (Q) of tokens of a map."""
    height, width = hw_shape
    if (queries.dim() != 1 or queries.is_floating_point()
            or queries.dtype == torch.bool):
        raise ValueError('queries must be integer indices (Q), got '
                         f'{tuple(queries.shape)} of {queries.dtype}')
    outside = (queries < 0) | (queries >= height * width)
    if outside.any():
        raise ValueError(f'queries must be in [0, {height * width - 1}] for a '
                         f'map of {height}x{width} tokens, got '
                         f'{queries[outside].tolist()}')
