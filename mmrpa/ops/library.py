"""The fused and Triton implementations as operators that torch knows.

Registered with :mod:`torch.library`: shapes without data, gradients and FLOPs,
so torch.compile, autocast, activation checkpointing, the meta device and
torch's FLOP counter see through them. Gradients of gradients are not
registered: ``impl='naive'`` has them.
"""

import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import fused
from .fused import Options, Representatives
from .naive import compute_dtype, without_autocast


def rp_attention(qkv: Sequence[Tensor], anchors: Tensor,
                 interact_weight: Tensor, interact_proj: Optional[Tensor],
                 dwc_weight: Optional[Tensor], dwc_bias: Optional[Tensor],
                 hw_shape: Tuple[int, int], routing: str, reduction: str,
                 interact_residual: bool, scale: float, impl: str) -> Tensor:
    """Run the operator; arguments are checked by the callers.

    Args:
        qkv (sequence[Tensor]): One (B, N, 3, h, d), or three (B, N, h, d).
        hw_shape (tuple[int, int]): (H, W) of the convolution's map.
        impl (str): ``'fused'`` or ``'triton'``.

    The others are as for :func:`mmrpa.ops.rp_attention_qkv`.

    Returns:
        Tensor: (B, N, h, d).
    """
    return torch.ops.mmrpa.rp_attention(
        list(qkv), anchors, interact_weight, interact_proj, dwc_weight,
        dwc_bias, *hw_shape, routing, reduction, interact_residual, scale,
        impl)[0]


def _unpack(qkv: Sequence[Tensor]) -> Tuple[Tensor, ...]:
    return qkv[0].unbind(2) if len(qkv) == 1 else tuple(qkv)


def _kernels(impl: str) -> Any:
    """The module with ``forward`` and ``backward`` of an implementation."""
    if impl == 'fused':
        return fused
    try:
        from . import triton_launch
    except ImportError as error:
        raise ImportError("impl='triton', which 'auto' stands for on CUDA, "
                          'needs the package triton: pip install triton, or '
                          "choose impl='fused'") from error
    return triton_launch


@torch.library.custom_op('mmrpa::rp_attention', mutates_args=())
def _rp_attention(
        qkv: Sequence[Tensor], anchors: Tensor, interact_weight: Tensor,
        interact_proj: Optional[Tensor], dwc_weight: Optional[Tensor],
        dwc_bias: Optional[Tensor], height: int, width: int, routing: str,
        reduction: str, interact_residual: bool, scale: float,
        impl: str) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = _raise(_unpack(qkv), impl)
    options = Options(routing, reduction, interact_residual, scale)
    # A Triton kernel is launched on the current device, wherever q is.
    with without_autocast(q.device.type), torch.cuda.device_of(q):
        out, reps = _kernels(impl).forward(
            q, k, v, *_compute_in(q.dtype, anchors, interact_weight,
                                  interact_proj), dwc_weight, dwc_bias,
            (height, width), options)
    return (out.to(qkv[0].dtype), *reps)


@_rp_attention.register_fake
def _(qkv, anchors, interact_weight, interact_proj, dwc_weight, dwc_bias,
      height, width, routing, reduction, interact_residual, scale, impl):
    q = _unpack(qkv)[0]
    batch, _, heads, dims = q.shape
    m = anchors.shape[1]
    small = anchors.new_empty((), dtype=compute_dtype(q.dtype))
    return (q.new_empty(q.shape), small.new_empty(batch, heads, m, dims),
            small.new_empty(batch, heads, m, dims),
            small.new_empty(batch, heads, m))


def _raise(tensors: Sequence[Tensor], impl: str) -> List[Tensor]:
    """Tensors in the dtype in which an implementation reads and writes.

    The fused one adds up two parts of the output, and of V's gradient. If the
    first was rounded to half precision already, the second rounds all tokens
    alike where it is alike for all, and the gradient of the bias, their sum,
    is off by percents.
    """
    return [t.to(compute_dtype(t.dtype)) if impl == 'fused' else t
            for t in tensors]


def _compute_in(dtype: torch.dtype,
                *tensors: Optional[Tensor]) -> List[Optional[Tensor]]:
    """Parameters in the dtype in which sums are computed."""
    dtype = compute_dtype(dtype)
    return [None if t is None else t.detach().to(dtype) for t in tensors]


@torch.library.custom_op('mmrpa::rp_attention_backward', mutates_args=())
def _rp_attention_backward(
        grad_out: Tensor, qkv: Sequence[Tensor], anchors: Tensor,
        interact_weight: Tensor, interact_proj: Optional[Tensor],
        dwc_weight: Optional[Tensor], dwc_bias: Optional[Tensor],
        k_rep: Tensor, z: Tensor, mass: Tensor, height: int, width: int,
        routing: str, reduction: str, interact_residual: bool, scale: float,
        impl: str) -> Tuple[List[Tensor], List[Tensor]]:
    q, k, v, grad_out = _raise((*_unpack(qkv), grad_out), impl)
    grads = [torch.empty_like(t, dtype=q.dtype,
                              memory_format=torch.contiguous_format)
             for t in qkv]
    options = Options(routing, reduction, interact_residual, scale)
    params = (anchors, interact_weight, interact_proj, dwc_weight, dwc_bias)
    with without_autocast(q.device.type), torch.cuda.device_of(q):
        param_grads = _kernels(impl).backward(
            q, k, v, *_compute_in(q.dtype, *params[:3]), dwc_weight, dwc_bias,
            (height, width), options, Representatives(k_rep, z, mass),
            grad_out, *_unpack(grads))
    anchor_grad, *rest = param_grads
    if anchors.shape[0] == 1:
        anchor_grad = anchor_grad.sum(0, keepdim=True)
    return [grad.to(t.dtype) for grad, t in zip(grads, qkv, strict=True)], [
        grad.to(param.dtype).reshape(param.shape).contiguous()
        for param, grad in zip(params, (anchor_grad, *rest), strict=True)
        if param is not None
    ]


@_rp_attention_backward.register_fake
def _(grad_out, qkv, anchors, interact_weight, interact_proj, dwc_weight,
      dwc_bias, k_rep, z, mass, height, width, routing, reduction,
      interact_residual, scale, impl):
    params = (anchors, interact_weight, interact_proj, dwc_weight, dwc_bias)
    return ([t.new_empty(t.shape) for t in qkv],
            [t.new_empty(t.shape) for t in params if t is not None])


def _setup_context(ctx: Any, inputs: Tuple[Any, ...],
                   output: Tuple[Tensor, ...]) -> None:
    qkv, *params = inputs[:6]
    ctx.options = inputs[6:]
    ctx.num_qkv = len(qkv)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*qkv, *params, *output[1:])


def _autograd(ctx: Any, grad_out: Tensor, *_: Any) -> Tuple[Any, ...]:
    saved = ctx.saved_tensors
    qkv = list(saved[:ctx.num_qkv])
    params = saved[ctx.num_qkv:-3]
    grads, param_grads = torch.ops.mmrpa.rp_attention_backward(
        grad_out, qkv, *params, *saved[-3:], *ctx.options)
    rest = iter(param_grads)
    return (grads, *(None if p is None else next(rest) for p in params),
            *(None for _ in ctx.options))


_rp_attention.register_autograd(_autograd, setup_context=_setup_context)


class Passes(NamedTuple):
    """How often the products of each kind occur."""

    tokens: int  # N x M x d, of a head
    pairs: int  # M x M x d, of a head
    weights: int  # Wq', Wk', Wv' on all representatives
    proj: int  # Interact's output projection on them
    convolutions: int


def operator_flops(qkv_shape: Sequence[Sequence[int]],
                   anchors_shape: Sequence[int], weight_shape: Sequence[int],
                   proj_shape: Optional[Sequence[int]],
                   dwc_shape: Optional[Sequence[int]], height: int,
                   width: int, passes: Passes) -> int:
    """Two a multiply-add of all products."""
    batch, num_tokens, *_, heads, dims = qkv_shape[0]
    m = anchors_shape[1]
    macs = heads * dims * m * (passes.tokens * num_tokens + passes.pairs * m)
    # (h, d, d) or (C, C) each, for every representative.
    macs += passes.weights * m * 3 * math.prod(weight_shape[1:])
    if proj_shape is not None:
        macs += passes.proj * m * math.prod(proj_shape)
    if dwc_shape is not None:
        macs += passes.convolutions * height * width * math.prod(dwc_shape)
    return 2 * batch * macs


@register_flop_formula(torch.ops.mmrpa.rp_attention)
def _forward_flops(qkv, anchors, interact_weight, interact_proj, dwc_weight,
                   dwc_bias, height, width, *args, out_shape=None,
                   **kwargs) -> int:
    return operator_flops(qkv, anchors, interact_weight, interact_proj,
                          dwc_weight, height, width, Passes(5, 2, 1, 1, 1))


@register_flop_formula(torch.ops.mmrpa.rp_attention_backward)
def _backward_flops(grad_out, qkv, anchors, interact_weight, interact_proj,
                    dwc_weight, dwc_bias, k_rep, z, mass, height, width,
                    *args, out_shape=None, **kwargs) -> int:
    # Routing, attention and Interact are recomputed; a gradient of Interact's
    # projection takes what was projected once more.
    pairs = 6 if interact_proj is None else 7
    return operator_flops(qkv, anchors, interact_weight, interact_proj,
                          dwc_weight, height, width,
                          Passes(12, pairs, 3, 3, 2))
