"""A backbone's stages, and the norms of their output maps."""

from typing import Any, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import TransformerBlock


class Stage(nn.Module):
    """One resolution of a backbone: an optional downsampling, then blocks.

    Args:
        blocks (sequence[TransformerBlock]): The blocks.
        downsample (nn.Module, optional): Maps (B, C_in, H, W) to tokens and
            their grid; None where the stem did so already.
        pos_embed (nn.Module, optional): Adds positions to tokens.
        with_cp (bool): Recompute the blocks in backward to save memory.
    """

    def __init__(self,
                 blocks: Sequence[TransformerBlock],
                 downsample: Optional[nn.Module] = None,
                 pos_embed: Optional[nn.Module] = None,
                 with_cp: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.pos_embed = pos_embed
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor,
                hw_shape: Tuple[int, int]) -> Tuple[Tensor, Tuple[int, int]]:
        """Tokens (B, N, C_in) of (H, W) to tokens of this stage's grid."""
        if self.downsample is not None:
            x = x.transpose(1, 2).unflatten(-1, hw_shape)
            x, hw_shape = self.downsample(x)
        if self.pos_embed is not None:
            x = self.pos_embed(x, hw_shape)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                # Non-reentrant: the reentrant form breaks with frozen stages
                # and DDP, and torch has announced its end.
                x = checkpoint(block, x, hw_shape, use_reentrant=False)
            else:
                x = block(x, hw_shape)
        return x, hw_shape


class OutputNorm(nn.Module):
    """The norm of one output map, on (B, C, H, W).

    Args:
        norm_cfg (dict): ``type`` is ``'LN'`` (over the channels of each
            token), ``'BN'`` or ``'SyncBN'``; the rest goes to the norm.
        num_channels (int): Channels C.
        eps (float): LayerNorm's epsilon where norm_cfg names none.
    """

    types = dict(LN=nn.LayerNorm, BN=nn.BatchNorm2d, SyncBN=nn.SyncBatchNorm)

    def __init__(self, norm_cfg: Mapping[str, Any], num_channels: int,
                 eps: float) -> None:
        super().__init__()
        options = dict(norm_cfg)
        name = options.pop('type', None)
        if not isinstance(name, str) or name not in self.types:
            raise ValueError(f'norm_cfg needs a type out of '
                             f'{tuple(self.types)}, got {dict(norm_cfg)}; '
                             'norm_cfg=None leaves the norm out')
        # mmengine's configs say so where parameters are to be frozen.
        requires_grad = options.pop('requires_grad', True)
        if name == 'LN':
            options.setdefault('eps', eps)
        try:
            self.norm = self.types[name](num_channels, **options)
        except TypeError as error:
            raise TypeError(f'norm_cfg={dict(norm_cfg)}: {error}') from error
        self.norm.requires_grad_(requires_grad)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of (H, W) to a contiguous map (B, C, H, W)."""
        if isinstance(self.norm, nn.LayerNorm):
            return to_map(self.norm(x), hw_shape)
        return self.norm(to_map(x, hw_shape))


def to_map(x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) to a contiguous map (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(-1, hw_shape).contiguous()
