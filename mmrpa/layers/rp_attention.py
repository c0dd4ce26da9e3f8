"""The RPAttention layer: projections and local path around the operator."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..arguments import (
    check_bool,
    check_dtype,
    check_int,
    check_number,
    check_one_of,
    check_tensor,
)
from ..ops import (
    IMPLS,
    computes_layer,
    route,
    rp_attention_layer,
    rp_attention_qkv,
)
from ..ops.functional import resolve_impl
from ..ops.naive import (
    MASS_EPS,
    REDUCTIONS,
    ROUTINGS,
    compute_dtype,
    without_autocast,
)
from .init import LINEAR_STD, init_vit_
from .plain import is_plain
from .shapes import check_heads, check_queries, check_tokens

# Standard deviation of the routing logits at initialisation, on LayerNorm-ed
# random tokens: the mean entropy of the routing is then about 0.7 of log M,
# far from uniform (1, every representative is the same mean token) and from
# one-hot (0, no gradient); tests/test_layers/test_rp_attention.py measures it.
ROUTING_LOGIT_STD = 1.5


class RPAttention(nn.Module):
    """Representative attention over the tokens of a feature map.

    ``proj(concat_heads(rp_attention(q, k, v)) + DWC(v))`` of "Representative
    Attention For Vision Transformers" (arXiv 2605.14913), figure 2. Cost and
    memory are linear in the number of tokens. What the figure leaves open is
    an argument here; ``docs/method.md`` lists the choices.

    Args:
        embed_dims (int): Channels C.
        num_heads (int): Heads h; must divide ``embed_dims``.
        num_representatives (int): Learned representatives M a head.
        qkv_bias (bool): Bias in the q, k, v projection.
        anchors (str): ``'per_head'``, or ``'shared'`` among the heads.
        routing (str): Axis of the routing softmax, ``'representatives'`` or
            ``'tokens'``; see :func:`mmrpa.ops.route`.
        reduction (str): ``'mean'`` or ``'sum'``; see :func:`mmrpa.ops.gather`.
        interact (str): ``'grouped'``: Wq', Wk', Wv' of d x d for each head;
            ``'full'``: of C x C across heads.
        interact_residual (bool): A residual around Interact.
        interact_proj (bool): An output projection inside Interact.
        dwc_kernel_size (int): Odd kernel size of the depth-wise convolution of
            V; 0 leaves it out.
        proj_drop (float): Dropout rate after the output projection.
        impl (str): ``'auto'``, ``'naive'``, ``'fused'`` or ``'triton'``; see
            :func:`mmrpa.ops.rp_attention`. May be assigned to later.

    Raises:
        TypeError: A value of a wrong type; the message names it.
        ValueError: A value out of range; the message names it.
    """

    def __init__(self,
                 embed_dims: int,
                 num_heads: int,
                 num_representatives: int = 64,
                 *,
                 qkv_bias: bool = True,
                 anchors: str = 'per_head',
                 routing: str = 'representatives',
                 reduction: str = 'mean',
                 interact: str = 'grouped',
                 interact_residual: bool = False,
                 interact_proj: bool = False,
                 dwc_kernel_size: int = 3,
                 proj_drop: float = 0.,
                 impl: str = 'auto') -> None:
        super().__init__()
        check_heads(embed_dims, num_heads)
        check_one_of('impl', impl, IMPLS)
        check_one_of('anchors', anchors, ('per_head', 'shared'))
        check_one_of('routing', routing, ROUTINGS)
        check_one_of('reduction', reduction, REDUCTIONS)
        check_one_of('interact', interact, ('grouped', 'full'))
        check_int('num_representatives', num_representatives, 1)
        check_int('dwc_kernel_size', dwc_kernel_size, 0)
        check_number('proj_drop', proj_drop, 0, 1)
        for name, value in (('qkv_bias', qkv_bias),
                            ('interact_residual', interact_residual),
                            ('interact_proj', interact_proj)):
            check_bool(name, value)
        if dwc_kernel_size and dwc_kernel_size % 2 == 0:
            raise ValueError('dwc_kernel_size must be odd, or 0 for none, got '
                             f'{dwc_kernel_size}')
        head_dims = embed_dims // num_heads
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_representatives = num_representatives
        self.routing = routing
        self.reduction = reduction
        self.interact_residual = interact_residual
        self.impl = impl

        square = ((num_heads, head_dims, head_dims) if interact == 'grouped'
                  else (embed_dims, embed_dims))
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.anchors = nn.Parameter(
            torch.empty(num_heads if anchors == 'per_head' else 1,
                        num_representatives, head_dims))
        self.interact_weight = nn.Parameter(torch.empty(3, *square))
        self.interact_proj = nn.Parameter(
            torch.empty(*square)) if interact_proj else None
        self.dwc = nn.Conv2d(
            embed_dims,
            embed_dims,
            dwc_kernel_size,
            padding=dwc_kernel_size // 2,
            groups=embed_dims) if dwc_kernel_size else None
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters (our choice; the paper gives none)."""
        init_vit_(self)
        # On LayerNorm-ed tokens k has standard deviation LINEAR_STD * sqrt(C),
        # so this makes that of k . a equal to ROUTING_LOGIT_STD.
        head_dims = self.anchors.shape[-1]
        nn.init.normal_(
            self.anchors,
            std=ROUTING_LOGIT_STD /
            (LINEAR_STD * math.sqrt(self.embed_dims * head_dims)))
        for weight in (self.interact_weight, self.interact_proj):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[-1]**-0.5)
        if self.dwc is not None:
            # Keeps V's variance on the local path, whatever the kernel size.
            nn.init.normal_(self.dwc.weight, std=1 / self.dwc.kernel_size[0])

    def forward(self,
                x: Tensor,
                hw_shape: Optional[Tuple[int, int]] = None) -> Tensor:
        """Mix the tokens of x.

        Args:
            x (Tensor): Tokens (B, N, C) with N = H * W, or H * W + 1 with a
                CLS token first, which takes part in Gather and Distribute but
                not in the convolution. Or a map (B, C, H, W).
            hw_shape (tuple[int, int], optional): (H, W); needed for tokens.

        Returns:
            Tensor: The shape and dtype of x (autocast's dtype under autocast).

        Raises:
            ValueError: x and hw_shape do not fit each other or the layer.
        """
        check_tensor('x', x)
        if x.dim() == 4:
            height, width = x.shape[-2:]
            if hw_shape is not None and tuple(hw_shape) != (height, width):
                raise ValueError(f'hw_shape is {tuple(hw_shape)} but the map '
                                 f'is {height}x{width}; leave hw_shape out')
            tokens = self._forward_tokens(
                x.flatten(2).transpose(1, 2), (height, width))
            return tokens.transpose(1, 2).reshape(x.shape).contiguous()
        return self._forward_tokens(x, hw_shape)

    def _forward_tokens(self, x: Tensor,
                        hw_shape: Optional[Tuple[int, int]]) -> Tensor:
        check_tokens(x, hw_shape, self.embed_dims, allow_cls=True)
        if is_plain(self.qkv, nn.Linear):
            check_dtype(x, self.qkv.weight)
        options = dict(
            num_heads=self.num_heads,
            hw_shape=hw_shape,
            dwc_weight=None if self.dwc is None else self.dwc.weight,
            dwc_bias=None if self.dwc is None else self.dwc.bias,
            reduction=self.reduction,
            interact_proj=self.interact_proj,
            interact_residual=self.interact_residual)
        if self._absorbs_projections(x):
            out = rp_attention_layer(
                x,
                self.qkv.weight,
                self.anchors,
                self.interact_weight,
                self.proj.weight,
                qkv_bias=self.qkv.bias,
                out_bias=self.proj.bias,
                **options)
        else:
            out = self.proj(
                rp_attention_qkv(
                    self.qkv(x),
                    self.anchors,
                    self.interact_weight,
                    routing=self.routing,
                    impl=self.impl,
                    **options))
        return self.proj_drop(out)

    def _absorbs_projections(self, x: Tensor) -> bool:
        """Whether one operator computes the projections as well."""
        _, m, head_dims = self.anchors.shape
        impl = resolve_impl(self.impl, x.device.type, x.dtype, head_dims, m,
                            self.routing)
        # Autocast means the Linear layers to run in half precision. A layer
        # that was replaced, or that someone listens to, has to be called.
        return (computes_layer(impl, x.device.type, x.dtype, x.shape[1],
                               self.num_heads, head_dims, m, self.routing)
                and self.dwc is not None and self.anchors.dtype == x.dtype
                and not torch.is_autocast_enabled('cpu')
                and is_plain(self.qkv, nn.Linear)
                and is_plain(self.proj, nn.Linear)
                and is_plain(self.dwc, nn.Conv2d))

    def routing_map(self,
                    x: Tensor,
                    hw_shape: Optional[Tuple[int, int]] = None) -> Tensor:
        """Which part of the map each representative stands for.

        Args:
            x (Tensor): What ``forward`` was given, tokens or a map.
            hw_shape (tuple[int, int], optional): (H, W); needed for tokens.

        Returns:
            Tensor: The routing P as maps (B, h, M, H, W) in float32, without
            the CLS token.
        """
        check_tensor('x', x)
        if x.dim() == 4:
            x, hw_shape = x.flatten(2).transpose(1, 2), x.shape[-2:]
        num_cls = check_tokens(x, hw_shape, self.embed_dims, allow_cls=True)
        check_dtype(x, self.qkv.weight)
        k = self._heads(self._project(x).chunk(3, dim=-1)[1])
        with without_autocast(x.device.type):
            p = route(k.float(), self.anchors.float(), self.routing)
        return p[:, :, num_cls:].transpose(-2, -1).unflatten(-1, hw_shape)

    def query_response(self, x: Tensor, hw_shape: Optional[Tuple[int, int]],
                       queries: Tensor) -> Tensor:
        """How much of each token some queries read through the two factors.

        Distribute's attention S of a query to the representatives times
        Gather's weights, ``sum_m S[n, m] * P[j, m] / mass[m]`` for query n and
        token j: what dense attention would call the row of n. Interact, which
        mixes what was gathered, is left out. The cost is linear in N: the
        matrix of all N x N such responses is not formed.

        Args:
            x (Tensor): What ``forward`` was given, tokens or a map.
            hw_shape (tuple[int, int] | None): (H, W); needed for tokens.
            queries (Tensor): Indices (Q) of tokens in the map, y * W + x.

        Returns:
            Tensor: Maps (B, h, Q, H, W) in float32 (float64 for float64), not
            negative. They add up to 1 over the map; with a CLS token to 1 less
            its part.

        Raises:
            ValueError: x and hw_shape do not fit, or a query is not a token.
        """
        check_tensor('x', x)
        if x.dim() == 4:
            x, hw_shape = x.flatten(2).transpose(1, 2), x.shape[-2:]
        num_cls = check_tokens(x, hw_shape, self.embed_dims, allow_cls=True)
        check_dtype(x, self.qkv.weight)
        check_queries(queries, hw_shape)
        q, k, _ = (self._heads(t) for t in self._project(x).chunk(3, dim=-1))
        dtype = compute_dtype(x.dtype)
        with without_autocast(x.device.type):
            q, k = q[:, :, queries + num_cls].to(dtype), k.to(dtype)
            p_t = route(k, self.anchors.to(dtype),
                        self.routing).transpose(-2, -1)
            mass = p_t.sum(dim=-1, keepdim=True).clamp(min=MASS_EPS)
            weights = p_t / mass  # (B, h, M, N)
            k_rep = (weights if self.reduction == 'mean' else p_t) @ k
            logits = q @ k_rep.transpose(-2, -1) * q.shape[-1]**-0.5
            response = logits.softmax(dim=-1) @ weights
        return response[..., num_cls:].unflatten(-1, hw_shape)

    def _project(self, x: Tensor) -> Tensor:
        """``qkv`` of x, beside a forward pass that may have gradients.

        Autocast must keep no converted weights from it: up to torch 2.9, those
        made under no_grad are taken in the forward pass, and get no gradient.
        """
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return self.qkv(x)
        finally:
            torch.set_autocast_cache_enabled(kept)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, h, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings that the printed submodules do not show."""
        return (f'num_heads={self.num_heads}, '
                f'num_representatives={self.num_representatives}, '
                f'routing={self.routing!r}, reduction={self.reduction!r}, '
                f'impl={self.impl!r}')
