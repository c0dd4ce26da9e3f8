"""Pyramid Vision Transformer with representative attention."""

from typing import Any, Mapping, Optional, Sequence

from torch import nn

from ..arguments import check_int
from ..layers import PatchEmbed, PositionEmbed, SpatialReductionAttention
from ..registry import MODELS
from .base import Arch, PerStage, RPBackbone

# PVT's patch embeddings keep LayerNorm's default while its blocks use 1e-6.
LAYER_NORM_EPS = 1e-5


@MODELS.register_module()
class RPPVT(RPBackbone):
    """PVT (v1) whose spatial-reduction attention gives way to RPAttention.

    Archs: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``. Its own
    attention is ``'sr'``, with reductions of 8, 4, 2, 1. Every stage starts
    with a learned position table, resized to any map. Further arguments: see
    :class:`RPBackbone`.

    Args:
        img_size (int): Image side, in pixels, for which the position tables
            are made.

    Examples:
        >>> import torch
        >>> from mmrpa.backbones import RPPVT
        >>> backbone = RPPVT('tiny', out_indices=(2, 3))
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 320, 4, 6), (1, 512, 2, 3)]
    """

    arch_zoo = {
        name: dict(
            embed_dims=(64, 128, 320, 512),
            depths=depths,
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4))
        for name, depths in (('tiny', (2, 2, 2, 2)), ('small', (3, 4, 6, 3)),
                             ('medium', (3, 4, 18, 3)), ('large',
                                                         (3, 8, 27, 3)))
    }
    own_attention = 'sr'
    norm_eps = 1e-6
    sr_ratios = (8, 4, 2, 1)

    def __init__(self,
                 arch: Arch = 'tiny',
                 in_channels: int = 3,
                 attention: PerStage = 'rp',
                 num_representatives: PerStage = (16, 32, 64, 64),
                 rp_cfg: Optional[Mapping[str, Any]] = None,
                 img_size: int = 224,
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 frozen_stages: int = -1,
                 norm_cfg: Optional[Mapping[str, Any]] = dict(type='LN'),
                 with_cp: bool = False,
                 init_cfg: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__(arch, in_channels, attention, num_representatives,
                         rp_cfg, qkv_bias, drop_rate, drop_path_rate,
                         out_indices, frozen_stages, norm_cfg, with_cp,
                         init_cfg)
        check_int('img_size', img_size)
        if img_size < self.patch_size:
            raise ValueError(f'img_size must be at least {self.patch_size}, '
                             f'got {img_size}')
        self.img_size = img_size
        self._build()

    def _build_stem(self) -> nn.Module:
        return PatchEmbed(
            self.in_channels,
            self.arch['embed_dims'][0],
            self.patch_size,
            norm_eps=LAYER_NORM_EPS)

    def _build_downsample(self, stage: int) -> nn.Module:
        dims = self.arch['embed_dims']
        return PatchEmbed(
            dims[stage - 1], dims[stage], 2, norm_eps=LAYER_NORM_EPS)

    def _build_pos_embed(self, stage: int) -> nn.Module:
        side = -(-self.img_size // self._stride(stage))
        return PositionEmbed(self.arch['embed_dims'][stage], (side, side))

    def _build_own_attention(self, stage: int, block: int,
                             **common: Any) -> nn.Module:
        # Archs of more than four stages go on without a reduction.
        ratio = self.sr_ratios[stage] if stage < len(self.sr_ratios) else 1
        return SpatialReductionAttention(sr_ratio=ratio, **common)
