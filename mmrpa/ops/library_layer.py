"""absorbed.py as an operator that torch knows; see library.py."""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import absorbed
from .absorbed import Kept, Weights
from .fused import Options, Representatives
from .library import Passes, operator_flops

NUM_TENSORS = 10  # the arguments up to out_bias


def rp_attention_layer(x: Tensor, params: Sequence[Optional[Tensor]],
                       heads: int, hw_shape: Tuple[int, int], reduction: str,
                       interact_residual: bool, scale: float) -> Tensor:
    """Run the operator; arguments are checked by the caller.

    Args:
        x (Tensor): (B, N, C).
        params (sequence[Tensor | None]): In the operator's order.
        heads, hw_shape, reduction, interact_residual, scale: As for
            :func:`mmrpa.ops.rp_attention_layer`.

    Returns:
        Tensor: (B, N, C).
    """
    return torch.ops.mmrpa.rp_attention_layer(
        x, *params, heads, *hw_shape, reduction, interact_residual, scale)[0]


def _weights(heads: int, qkv_weight: Tensor, qkv_bias: Optional[Tensor],
             anchors: Tensor, interact_weight: Tensor,
             interact_proj: Optional[Tensor], dwc_weight: Tensor,
             dwc_bias: Optional[Tensor], out_weight: Tensor,
             out_bias: Optional[Tensor]) -> Weights:
    """The operator's parameters as absorbed has them."""
    channels = len(out_weight)
    zeros = qkv_weight.new_zeros(3 * channels)
    q, k, v = qkv_weight.contiguous().split(channels)
    q_bias, k_bias, v_bias = (zeros if qkv_bias is None else
                              qkv_bias.contiguous()).split(channels)
    return Weights(q, k, v, out_weight.contiguous(), q_bias, k_bias, v_bias,
                   zeros[:channels] if out_bias is None else out_bias,
                   anchors.expand(heads, -1, -1).contiguous(),
                   interact_weight, interact_proj, dwc_weight.contiguous(),
                   dwc_bias)


@torch.library.custom_op('mmrpa::rp_attention_layer', mutates_args=())
def _layer(x: Tensor, qkv_weight: Tensor, qkv_bias: Optional[Tensor],
           anchors: Tensor, interact_weight: Tensor,
           interact_proj: Optional[Tensor], dwc_weight: Tensor,
           dwc_bias: Optional[Tensor], out_weight: Tensor,
           out_bias: Optional[Tensor], heads: int, height: int, width: int,
           reduction: str, interact_residual: bool, scale: float
           ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = _weights(heads, qkv_weight, qkv_bias, anchors, interact_weight,
                       interact_proj, dwc_weight, dwc_bias, out_weight,
                       out_bias)
    out, kept = absorbed.forward(
        x.contiguous(), weights, (height, width),
        Options('representatives', reduction, interact_residual, scale))
    return (out, kept.v, *kept.reps, kept.px)


@_layer.register_fake
def _(x, qkv_weight, qkv_bias, anchors, interact_weight, interact_proj,
      dwc_weight, dwc_bias, out_weight, out_bias, heads, height, width,
      reduction, interact_residual, scale):
    batch, num_tokens, channels = x.shape
    m, dims = anchors.shape[1:]
    reps = [x.new_empty(batch, heads, m, dims) for _ in range(2)]
    return (x.new_empty(x.shape), x.new_empty(x.shape), *reps,
            x.new_empty(batch, heads, m),
            x.new_empty(batch, heads * m, channels))


@torch.library.custom_op('mmrpa::rp_attention_layer_backward',
                         mutates_args=())
def _layer_backward(
        grad_out: Tensor, x: Tensor, qkv_weight: Tensor,
        qkv_bias: Optional[Tensor], anchors: Tensor, interact_weight: Tensor,
        interact_proj: Optional[Tensor], dwc_weight: Tensor,
        dwc_bias: Optional[Tensor], out_weight: Tensor,
        out_bias: Optional[Tensor], v: Tensor, k_rep: Tensor, z: Tensor,
        mass: Tensor, px: Tensor, heads: int, height: int, width: int,
        reduction: str, interact_residual: bool, scale: float
) -> List[Tensor]:
    params = (qkv_weight, qkv_bias, anchors, interact_weight, interact_proj,
              dwc_weight, dwc_bias, out_weight, out_bias)
    weights = _weights(heads, *params)
    qkv_grad = torch.zeros_like(qkv_weight,
                                memory_format=torch.contiguous_format)
    bias_grad = qkv_grad.new_zeros(len(qkv_weight))
    grad = Weights(
        *qkv_grad.chunk(3), torch.zeros_like(weights.out),
        *bias_grad.chunk(3),
        *(None if t is None else x.new_zeros(t.shape) for t in weights[7:]))
    grad_x = absorbed.backward(
        x.contiguous(), weights, (height, width),
        Options('representatives', reduction, interact_residual, scale),
        Kept(v, Representatives(k_rep, z, mass), px), grad_out.contiguous(),
        grad)
    anchors_grad = grad.anchors
    if anchors.shape[0] == 1:
        anchors_grad = anchors_grad.sum(0, keepdim=True)
    grads = (qkv_grad, bias_grad, anchors_grad, grad.interact,
             grad.interact_proj, grad.dwc, grad.dwc_bias, grad.out,
             grad.out_bias)
    return [grad_x] + [g for g, p in zip(grads, params, strict=True)
                       if p is not None]


@_layer_backward.register_fake
def _(grad_out, x, *args):
    params = args[:NUM_TENSORS - 1]
    return [t.new_empty(t.shape) for t in (x, *params) if t is not None]


def _setup_context(ctx: Any, inputs: Tuple[Any, ...],
                   output: Tuple[Tensor, ...]) -> None:
    ctx.options = inputs[NUM_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output[1:])


def _autograd(ctx: Any, grad_out: Tensor, *_: Any) -> Tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them for it
    grads = iter(torch.ops.mmrpa.rp_attention_layer_backward(
        grad_out, *saved, *ctx.options))
    return (*(None if t is None else next(grads)
              for t in saved[:NUM_TENSORS]), *(None for _ in ctx.options))


_layer.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: List[int], anchors: List[int], weight: List[int],
           proj: Optional[List[int]], dwc: List[int], heads: int,
           height: int, width: int, projections: int, passes: Passes) -> int:
    batch, num_tokens, channels = x
    qkv = [[batch, num_tokens, heads, channels // heads]]
    return (operator_flops(qkv, anchors, weight, proj, dwc, height, width,
                           passes)
            + 2 * projections * batch * num_tokens * channels**2)


# Of the layer's definition, so that they agree with all other impls and
# devices: that products are associated otherwise, and some computed again, is
# the implementation's affair.
@register_flop_formula(torch.ops.mmrpa.rp_attention_layer)
def _forward_flops(x, qkv_weight, qkv_bias, anchors, interact_weight,
                   interact_proj, dwc_weight, dwc_bias, out_weight, out_bias,
                   heads, height, width, *args, out_shape=None,
                   **kwargs) -> int:
    return _flops(x, anchors, interact_weight, interact_proj, dwc_weight,
                  heads, height, width, 4, Passes(5, 2, 1, 1, 1))


@register_flop_formula(torch.ops.mmrpa.rp_attention_layer_backward)
def _backward_flops(grad_out, x, qkv_weight, qkv_bias, anchors,
                    interact_weight, interact_proj, dwc_weight, dwc_bias,
                    out_weight, out_bias, v, k_rep, z, mass, px, heads,
                    height, width, *args, out_shape=None, **kwargs) -> int:
    return _flops(x, anchors, interact_weight, interact_proj, dwc_weight,
                  heads, height, width, 8, Passes(10, 4, 2, 2, 2))
