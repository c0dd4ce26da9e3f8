"""Swin Transformer with representative attention."""

from typing import Any, Mapping, Optional, Sequence

from torch import nn

from ..arguments import check_int
from ..layers import PatchEmbed, PatchMerging, WindowAttention
from ..registry import MODELS
from .base import Arch, PerStage, RPBackbone


@MODELS.register_module()
class RPSwin(RPBackbone):
    """Swin Transformer whose shifted windows give way to RPAttention.

    Archs: ``'tiny'``, ``'small'``, ``'base'``. Its own attention is
    ``'window'``, shifted in every second block; it alone has relative
    position biases. Further arguments: see :class:`RPBackbone`.

    Args:
        window_size (int): Side of the windows of ``'window'`` stages.

    Examples:
        >>> import torch
        >>> from mmrpa.backbones import RPSwin
        >>> backbone = RPSwin('tiny')
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    arch_zoo = dict(
        tiny=dict(
            embed_dims=(96, 192, 384, 768),
            depths=(2, 2, 6, 2),
            num_heads=(3, 6, 12, 24),
            mlp_ratios=4),
        small=dict(
            embed_dims=(96, 192, 384, 768),
            depths=(2, 2, 18, 2),
            num_heads=(3, 6, 12, 24),
            mlp_ratios=4),
        base=dict(
            embed_dims=(128, 256, 512, 1024),
            depths=(2, 2, 18, 2),
            num_heads=(4, 8, 16, 32),
            mlp_ratios=4))
    own_attention = 'window'

    def __init__(self,
                 arch: Arch = 'tiny',
                 in_channels: int = 3,
                 attention: PerStage = 'rp',
                 num_representatives: PerStage = (16, 32, 64, 64),
                 rp_cfg: Optional[Mapping[str, Any]] = None,
                 window_size: int = 7,
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
        check_int('window_size', window_size, 1)
        self.window_size = window_size
        self._build()

    def _build_stem(self) -> nn.Module:
        return PatchEmbed(
            self.in_channels,
            self.arch['embed_dims'][0],
            self.patch_size,
            norm_eps=self.norm_eps)

    def _build_downsample(self, stage: int) -> nn.Module:
        return PatchMerging(*self.arch['embed_dims'][stage - 1:stage + 1])

    def _build_own_attention(self, stage: int, block: int,
                             **common: Any) -> nn.Module:
        return WindowAttention(
            window_size=self.window_size, shift=block % 2 == 1, **common)
