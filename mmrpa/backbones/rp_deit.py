"""DeiT, a plain vision transformer, with representative attention."""

from typing import Any, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_int, check_one_of
from ..layers import PatchEmbed, PositionEmbed
from ..layers.init import LINEAR_STD
from ..registry import MODELS
from .base import Arch, PerStage, RPBackbone


class DeiTStem(nn.Module):
    """Patches, an optional CLS token in front, and positions.

    Args:
        in_channels (int): Channels of the images.
        embed_dims (int): Channels C of the tokens.
        patch_size (int): Side of a patch, in pixels.
        img_size (int): Image side for which the position table is made.
        with_cls_token (bool): Put a learned CLS token first.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int,
                 img_size: int, with_cls_token: bool) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size)
        self.cls_token = nn.Parameter(torch.empty(
            1, 1, embed_dims)) if with_cls_token else None
        if with_cls_token:
            nn.init.trunc_normal_(self.cls_token, std=LINEAR_STD)
        side = -(-img_size // patch_size)
        self.pos_embed = PositionEmbed(
            embed_dims, (side, side), num_extra=int(with_cls_token))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Images to tokens (B, H * W or H * W + 1, C) and (H, W)."""
        x, hw_shape = self.patch_embed(x)
        if self.cls_token is not None:
            # Not len(x), which makes a number of the batch in an export.
            cls_token = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat((cls_token, x), dim=1)
        return self.pos_embed(x, hw_shape), hw_shape


@MODELS.register_module()
class RPDeiT(RPBackbone):
    """DeiT whose dense attention gives way to RPAttention.

    Archs: ``'tiny'``, ``'small'``, ``'base'``, all with patches of 16. Its own
    attention is ``'dense'``. What other families call a stage is a block here,
    so ``out_indices``, ``frozen_stages`` and per-stage arguments count blocks.
    Dict archs take one number for ``embed_dims``, ``depths``, ``num_heads``
    and ``mlp_ratios``. Further arguments: see :class:`RPBackbone`.

    Args:
        img_size (int): Image side, in pixels, for which the position table is
            made; it is resized to other images.
        with_cls_token (bool): Prepend a CLS token. It takes part in the
            attention; maps leave it out.
        out_type (str): ``'featmap'`` returns maps (B, C, H/16, W/16) for dense
            tasks, ``'cls_token'`` and ``'avg_featmap'`` vectors (B, C) for
            classifiers. With ``'cls_token'`` nothing reads the convolution
            of the last block, which then starts, and stays, at zero.

    Examples:
        >>> import torch
        >>> from mmrpa.backbones import RPDeiT
        >>> backbone = RPDeiT('tiny', out_indices=(2, 5, 8, 11))
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6)]
    """

    arch_zoo = dict(
        tiny=dict(embed_dims=192, depths=12, num_heads=3, mlp_ratios=4),
        small=dict(embed_dims=384, depths=12, num_heads=6, mlp_ratios=4),
        base=dict(embed_dims=768, depths=12, num_heads=12, mlp_ratios=4))
    own_attention = 'dense'
    patch_size = 16
    norm_eps = 1e-6

    def __init__(self,
                 arch: Arch = 'small',
                 in_channels: int = 3,
                 attention: PerStage = 'rp',
                 num_representatives: PerStage = 64,
                 rp_cfg: Optional[Mapping[str, Any]] = None,
                 img_size: int = 224,
                 with_cls_token: bool = True,
                 out_type: str = 'featmap',
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 out_indices: Sequence[int] = (-1, ),
                 frozen_stages: int = -1,
                 norm_cfg: Optional[Mapping[str, Any]] = dict(type='LN'),
                 with_cp: bool = False,
                 init_cfg: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__(arch, in_channels, attention, num_representatives,
                         rp_cfg, qkv_bias, drop_rate, drop_path_rate,
                         out_indices, frozen_stages, norm_cfg, with_cp,
                         init_cfg)
        check_bool('with_cls_token', with_cls_token)
        check_one_of('out_type', out_type,
                     ('featmap', 'cls_token', 'avg_featmap'))
        if out_type == 'cls_token' and not with_cls_token:
            raise ValueError("out_type='cls_token' needs with_cls_token=True, "
                             "or use out_type='avg_featmap'")
        check_int('img_size', img_size)
        if img_size < self.patch_size:
            raise ValueError(f'img_size must be at least {self.patch_size}, '
                             f'got {img_size}')
        self.img_size = img_size
        self.with_cls_token = with_cls_token
        self.out_type = out_type
        self._build()
        last = self.stages[-1].blocks[-1].attn
        if out_type == 'cls_token' and getattr(last, 'dwc', None) is not None:
            # The CLS token skips the convolution, so a classifier that reads
            # nothing else cannot train the last one. Zeros leave it out, and
            # a dense task that starts from the classifier can learn it.
            nn.init.zeros_(last.dwc.weight)

    def _build_stem(self) -> nn.Module:
        return DeiTStem(self.in_channels, self.arch['embed_dims'][0],
                        self.patch_size, self.img_size, self.with_cls_token)

    def _stride(self, stage: int) -> int:
        return self.patch_size

    def _num_stages(self, arch: Mapping[str, Any]) -> int:
        for key in self.arch_keys:
            if isinstance(arch[key], Sequence):
                raise ValueError(f"arch['{key}'] of RPDeiT needs one number, "
                                 f'got {arch[key]!r}')
        check_int("arch['depths']", arch['depths'], 1)
        return arch['depths']

    def _parse_arch(self, arch: Arch) -> dict:
        parsed = super()._parse_arch(arch)
        return dict(parsed, depths=(1, ) * len(parsed['depths']))

    def _format_output(self, stage: int, x: Tensor,
                       hw_shape: Tuple[int, int]) -> Tensor:
        if self.out_type == 'featmap':
            return super()._format_output(
                stage, x[:, int(self.with_cls_token):], hw_shape)
        # A norm of all tokens as if they were a column, whatever its kind.
        column = super()._format_output(stage, x, (x.shape[1], 1))
        if self.out_type == 'cls_token':
            return column[:, :, 0, 0]
        return column[:, :, int(self.with_cls_token):, 0].mean(dim=-1)
