"""The attention layers that RPAttention is measured against."""

import math
import resource
import sys
import time
from typing import Callable, Dict, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrpa.layers import (
    DenseAttention,
    RPAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from mmrpa.ops import rp_attention

HEAD_DIMS = 32
COPY_BYTES = 512 * 2**20  # far beyond every cache
Inputs = Tuple[Tensor, ...]


class Case(NamedTuple):
    """A layer's size: the map, channels C and representatives M."""

    height: int
    width: int
    channels: int
    representatives: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.height * self.width

    @property
    def heads(self) -> int:
        """Heads of ``HEAD_DIMS`` channels."""
        return self.channels // HEAD_DIMS

    @property
    def sr_ratio(self) -> int:
        """The reduction of PVT's stage with as many channels: 8, 4, 2, 1 for
        its 64, 128, 320, 512 and for Swin's 96, 192, 384, 768."""
        steps = ((96, 8), (192, 4), (384, 2))
        return next((r for c, r in steps if self.channels <= c), 1)

    @property
    def agent_side(self) -> int:
        """Side of the smallest square grid of at least M agents."""
        return math.isqrt(self.representatives - 1) + 1

    def __str__(self) -> str:
        return 'x'.join(map(str, self))


class PooledAgentAttention(nn.Module):
    """Attention through agents that are pooled queries (Agent Attention).

    The agents read all tokens, all tokens read the agents, each by scaled dot
    products, and a 3x3 depth-wise convolution of V is added. Agent Attention's
    position biases are left out: they cost time, and nothing here needs them.

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads; divides ``embed_dims``.
        agent_side (int): Side of the grid of agents.
    """

    def __init__(self, embed_dims: int, num_heads: int,
                 agent_side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.agent_side = agent_side
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.dwc = nn.Conv2d(embed_dims, embed_dims, 3, padding=1,
                             groups=embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Mix tokens (B, N, C) of the map (H, W)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = F.adaptive_avg_pool2d(
            q.transpose(1, 2).unflatten(-1, hw_shape), self.agent_side)
        local = self.dwc(v.transpose(1, 2).unflatten(-1, hw_shape))
        q, k, v, agents = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (q, k, v, agents.flatten(2).transpose(1, 2)))
        attend = F.scaled_dot_product_attention
        out = attend(q, agents, attend(agents, k, v)).transpose(1, 2)
        return self.proj(out.flatten(2) + local.flatten(2).transpose(1, 2))


class Projections(nn.Module):
    """The qkv and proj of an attention layer, without what is between."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Inputs:
        """Both of tokens (B, N, C), (B, N, 3C) and (B, N, C)."""
        return self.qkv(x), self.proj(x)


class ChainedProjections(Projections):
    """The same in a backbone: proj is applied to what would be V."""

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) to (B, N, C)."""
        return self.proj(self.qkv(x)[..., -x.shape[-1]:])


# The first is what all are compared with.
LAYERS: Dict[str, Callable[[Case], nn.Module]] = dict(
    projections=lambda case: Projections(case.channels),
    dense=lambda case: DenseAttention(case.channels, case.heads),
    sr=lambda case: SpatialReductionAttention(case.channels, case.heads,
                                              case.sr_ratio),
    window=lambda case: WindowAttention(case.channels, case.heads, 7,
                                        shift=True),
    agent=lambda case: PooledAgentAttention(case.channels, case.heads,
                                            case.agent_side))


def layer_peers(case: Case, peers: Sequence[str], impls: Sequence[str]
                ) -> Dict[str, nn.Module]:
    """The layers of a case by name, ``'rp-<impl>'`` for those of mmrpa."""
    layers = {}
    if 'rp' in peers:
        layers = {
            f'rp-{impl}': RPAttention(case.channels, case.heads,
                                      case.representatives, impl=impl)
            for impl in impls
        }
    return dict(layers, **{
        name: build(case) for name, build in LAYERS.items() if name in peers})


def flash_or_default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA: by its flash kernel for half precision on a GPU."""
    if q.is_cuda and q.dtype != torch.float32:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def operator_peers(case: Case, peers: Sequence[str], impls: Sequence[str],
                   batch: int, like: Tensor
                   ) -> Dict[str, Tuple[Callable, Inputs, Inputs]]:
    """Functions of q, k, v without projections, their inputs, and nothing.

    The inputs lie as the layer has them, side by side in one (B, N, 3C).
    ``floor`` copies ``COPY_BYTES``, whatever the case.
    """
    half = torch.empty(COPY_BYTES // 2, dtype=torch.int8, device=like.device)
    dest = torch.empty_like(half)
    functions = dict(floor=(dest.copy_, (half, ), ()))
    qkv = torch.randn(batch, case.tokens, 3, case.heads, HEAD_DIMS,
                      dtype=like.dtype, device=like.device)
    qkv = tuple(t.transpose(1, 2).requires_grad_() for t in qkv.unbind(2))
    weights = [torch.randn(*shape, dtype=like.dtype, device=like.device)
               .mul_(HEAD_DIMS**-0.5).requires_grad_()
               for shape in ((case.heads, case.representatives, HEAD_DIMS),
                             (3, case.heads, HEAD_DIMS, HEAD_DIMS))]
    wanted = [*(impls if 'rp' in peers else ()),
              *(p for p in peers if p == 'naive')]
    for impl in dict.fromkeys(wanted):
        functions[f'rp-{impl}'] = (
            lambda *inputs, impl=impl: rp_attention(*inputs, impl=impl),
            (*qkv, *weights), ())
    if 'sdpa' in peers:
        functions['sdpa'] = (flash_or_default, qkv, ())
    return functions


def million(tokens: int, impl: str, device: str) -> Dict[str, float]:
    """Forward and backward of one RPAttention layer, once, and its memory.

    Meant for a fresh process: the peak is that of the process's life.

    Returns:
        dict: ``tokens``, ``seconds``, ``peak_resident_bytes`` and, on a GPU,
        ``peak_gpu_bytes``.
    """
    layer = RPAttention(HEAD_DIMS, 1, 16, impl=impl).to(device)
    x = torch.randn(1, tokens, HEAD_DIMS, device=device, requires_grad=True)
    start = time.perf_counter()
    layer(x, (1, tokens)).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    # macOS counts bytes, all others kilobytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result = dict(tokens=tokens, seconds=seconds, peak_resident_bytes=usage)
    if x.is_cuda:
        result['peak_gpu_bytes'] = torch.cuda.max_memory_allocated()
    return result
