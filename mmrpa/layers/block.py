"""The transformer block around any attention."""

from typing import Tuple

import torch
from torch import Tensor, nn

from ..arguments import check_int, check_number, check_tensor
from .init import init_vit_
from .plain import is_exporting, is_plain

# Hidden activations of a piece of tokens that the FFN takes at a time.
PIECE_BYTES = 4 * 2**20


def _check_drop_path(name: str, rate: float) -> None:
    check_number(name, rate)
    if not 0 <= rate < 1:
        raise ValueError(f'{name} must be in [0, 1), got {rate!r}')


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch for a random part of the images.

    Args:
        rate (float): Probability of dropping, in [0, 1). The images that keep
            the branch have it scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float = 0.) -> None:
        super().__init__()
        _check_drop_path('rate', rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape; the identity in eval mode."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0], ) + (1, ) * (x.dim() - 1)
        return x * torch.empty(
            shape, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The rate."""
        return f'rate={self.rate:.3f}'


class FFN(nn.Sequential):
    """Linear, GELU, Linear, with dropout after each Linear.

    Args:
        embed_dims (int): Channels C in and out.
        hidden_dims (int): Channels in between.
        drop_rate (float): Dropout rate.
    """

    def __init__(self,
                 embed_dims: int,
                 hidden_dims: int,
                 drop_rate: float = 0.) -> None:
        check_int('embed_dims', embed_dims, 1)
        check_int('hidden_dims', hidden_dims, 1)
        check_number('drop_rate', drop_rate, 0, 1)
        super().__init__(
            nn.Linear(embed_dims, hidden_dims), nn.GELU(),
            nn.Dropout(drop_rate), nn.Linear(hidden_dims, embed_dims),
            nn.Dropout(drop_rate))
        init_vit_(self)


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention, then FFN.

    Args:
        attn (nn.Module): An attention layer of :mod:`mmrpa.layers`.
        embed_dims (int): Channels C.
        mlp_ratio (float): Hidden channels of the FFN over C.
        drop_rate (float): Dropout rate of the FFN.
        drop_path_rate (float): Stochastic depth rate of both branches.
        norm_eps (float): Epsilon of the LayerNorms.
    """

    def __init__(self,
                 attn: nn.Module,
                 embed_dims: int,
                 mlp_ratio: float,
                 drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 norm_eps: float = 1e-5) -> None:
        super().__init__()
        if not isinstance(attn, nn.Module):
            raise TypeError(f'attn must be a module, got {attn!r}')
        check_int('embed_dims', embed_dims, 1)
        check_number('mlp_ratio', mlp_ratio)
        _check_drop_path('drop_path_rate', drop_path_rate)
        check_number('norm_eps', norm_eps, 0)
        if int(embed_dims * mlp_ratio) < 1:
            raise ValueError(f'mlp_ratio={mlp_ratio!r} leaves the FFN no '
                             f'hidden channels of {embed_dims}')
        self.norm1 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.ffn = FFN(embed_dims, int(embed_dims * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map (H, W) to the same shape."""
        check_tensor('x', x, 3, '(B, N, C)')
        if x.shape[-1] != self.norm1.normalized_shape[0]:
            raise ValueError(
                f'x must be (B, N, {self.norm1.normalized_shape[0]}), got '
                f'{tuple(x.shape)}')
        x = x + self.drop_path(self.attn(self.norm1(x), hw_shape))
        if self._can_cut(x):
            return self._add_ffn_(x)
        return x + self.drop_path(self.ffn(self.norm2(x)))

    def _can_cut(self, x: Tensor) -> bool:
        """Whether the FFN may take a piece of the tokens at a time.

        On the CPU, in inference; a module that someone listens to is called
        once, on all tokens.
        """
        return (x.device.type == 'cpu' and not torch.is_grad_enabled()
                and not self.training and not is_exporting()
                and x.is_contiguous()
                and is_plain(self.norm2, nn.LayerNorm)
                and is_plain(self.ffn, FFN)
                and all(is_plain(m, type(m)) for m in self.ffn))

    def _add_ffn_(self, x: Tensor) -> Tensor:
        """``x += ffn(norm2(x))``, whose hidden activations stay in the cache.
        """
        hidden = self.ffn[0].out_features
        size = max(1, PIECE_BYTES // (x.itemsize * hidden))
        for piece in x.flatten(0, 1).split(size):
            piece += self.ffn(self.norm2(piece))
        return x
