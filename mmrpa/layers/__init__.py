"""Attention layers and bricks of the backbones; needs torch alone."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .block import FFN, DropPath, TransformerBlock
from .embed import PatchEmbed, PatchMerging, PositionEmbed
from .rp_attention import RPAttention
from .twins import (
                    CrossShapedWindowAttention,
                    DenseAttention,
                    SpatialReductionAttention,
                    WindowAttention,
)

__all__ = [
    'FFN', 'CrossShapedWindowAttention', 'DenseAttention', 'DropPath',
    'PatchEmbed', 'PatchMerging', 'PositionEmbed', 'RPAttention',
    'SpatialReductionAttention', 'TransformerBlock', 'WindowAttention'
]
