"""CSWin Transformer with representative attention."""

from typing import Any, Mapping, Optional, Sequence

from torch import nn

from ..arguments import check_int
from ..layers import CrossShapedWindowAttention, PatchEmbed
from ..registry import MODELS
from .base import Arch, PerStage, RPBackbone, per_stage


@MODELS.register_module()
class RPCSWin(RPBackbone):
    """CSWin whose cross-shaped windows give way to RPAttention.

    Archs: ``'tiny'``, ``'small'``, ``'base'``. Its own attention is
    ``'cross'``: stripes of width ``split_sizes``, in the last stage one
    window. Stem and downsampling are overlapping convolutions. Further
    arguments: see :class:`RPBackbone`.

    Args:
        split_sizes (sequence[int | None]): Width of the stripes of each
            stage, in cells; None is one window, the whole map.

    Examples:
        >>> import torch
        >>> from mmrpa.backbones import RPCSWin
        >>> backbone = RPCSWin('tiny', out_indices=(-1, ))
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 512, 2, 3)]
    """

    arch_zoo = dict(
        tiny=dict(
            embed_dims=(64, 128, 256, 512),
            depths=(1, 2, 21, 1),
            num_heads=(2, 4, 8, 16),
            mlp_ratios=4),
        small=dict(
            embed_dims=(64, 128, 256, 512),
            depths=(2, 4, 32, 2),
            num_heads=(2, 4, 8, 16),
            mlp_ratios=4),
        base=dict(
            embed_dims=(96, 192, 384, 768),
            depths=(2, 4, 32, 2),
            num_heads=(4, 8, 16, 32),
            mlp_ratios=4))
    own_attention = 'cross'

    def __init__(self,
                 arch: Arch = 'tiny',
                 in_channels: int = 3,
                 attention: PerStage = 'rp',
                 num_representatives: PerStage = (16, 32, 64, 64),
                 rp_cfg: Optional[Mapping[str, Any]] = None,
                 split_sizes: PerStage = (1, 2, 7, None),
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
        self.split_sizes = per_stage('split_sizes', split_sizes,
                                     self.num_stages)
        for size in self.split_sizes:
            if size is not None:
                check_int('split_sizes', size, 1)
        self._build()

    def _build_stem(self) -> nn.Module:
        return PatchEmbed(
            self.in_channels,
            self.arch['embed_dims'][0],
            self.patch_size,
            kernel_size=7,
            padding=2,
            norm_eps=self.norm_eps)

    def _build_downsample(self, stage: int) -> nn.Module:
        dims = self.arch['embed_dims']
        return PatchEmbed(
            dims[stage - 1],
            dims[stage],
            2,
            kernel_size=3,
            padding=1,
            norm_eps=self.norm_eps)

    def _build_own_attention(self, stage: int, block: int,
                             **common: Any) -> nn.Module:
        return CrossShapedWindowAttention(
            split_size=self.split_sizes[stage], **common)
