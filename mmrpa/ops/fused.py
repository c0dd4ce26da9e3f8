"""RPAttention in pieces that fit the cache, in plain torch, on any device.

The N x M routing and the N x M attention of Distribute exist for one piece of
tokens at a time, forward and backward, and are computed again in backward
rather than kept: memory is that of Q, K, V and the output. The equations are
those of ``naive.py``; the gradients are written out below.

Tensors are (B, N, h, d) here, as a Linear lays them out: any strides, so views
of one q, k, v projection do without a copy. Sums and softmaxes are computed
and kept in float32 (float64 for float64 input).
"""

from typing import Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shifts
from .naive import MASS_EPS, compute_dtype, interact, project

# What one piece may take, in bytes: Q, K, V and the output of its tokens, and
# twice its routing. Of 2 to 64 MiB, 16 was the fastest on two cores with 2 MiB
# of L2 each; smaller pieces pay for more calls. A GPU wants to be filled.
CPU_PIECE_BYTES = 16 * 2**20
PIECE_BYTES = 512 * 2**20
# Below this the overhead of the calls outweighs what the cache gives.
MIN_PIECE_TOKENS = 256

Piece = Tuple[slice, slice]


class Options(NamedTuple):
    """What is neither tensor nor shape; see :func:`mmrpa.ops.rp_attention`."""

    routing: str
    reduction: str
    residual: bool
    scale: float


class Representatives(NamedTuple):
    """What Gather leaves, small: (B, h, M, d) twice and mass (B, h, M)."""

    k: Tensor
    z: Tensor
    mass: Tensor


def pieces(batch: int, num_tokens: int, size: int) -> Iterator[Piece]:
    """Cut (B, N) into pieces of at most ``size`` tokens, or of one image.

    Several small images share a piece; a large one is cut evenly, so that no
    short rest remains.
    """
    if not batch or not num_tokens:
        return
    images = max(1, size // num_tokens)
    cuts = -(-num_tokens // size)
    step = -(-num_tokens // cuts)
    for first in range(0, batch, images):
        for start in range(0, num_tokens, step):
            yield (slice(first, min(first + images, batch)),
                   slice(start, min(start + step, num_tokens)))


def _cut(x: Tensor, m: int) -> Iterator[Piece]:
    batch, num_tokens, heads, dims = x.shape
    per_token = compute_dtype(x.dtype).itemsize * heads * (4 * dims + 2 * m)
    limit = CPU_PIECE_BYTES if x.device.type == 'cpu' else PIECE_BYTES
    return pieces(batch, num_tokens, max(MIN_PIECE_TOKENS, limit // per_token))


def _rows(x: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The tokens of a piece, heads first: (images * h, n, d)."""
    part = x[piece].transpose(1, 2)
    return part.reshape(-1, *part.shape[-2:]).to(dtype)


def _merge(x: Tensor, images: slice) -> Tensor:
    """Per-head matrices (B, h, M, d) of a piece's images: (images * h, M, d).
    """
    return x[images].flatten(0, 1)


def _put(out: Tensor, piece: Piece, rows: Tensor,
         accumulate: bool = False) -> None:
    """Write (images * h, n, d) into the piece of ``out`` (B, N, h, d)."""
    part = out[piece].transpose(1, 2)
    rows = rows.view(part.shape)
    if accumulate:
        part += rows
    else:
        part.copy_(rows)


def _expand(anchors: Tensor, batch: int, heads: int) -> Tensor:
    """Anchors (h or 1, M, d) for every image and head: (B, h, M, d)."""
    return anchors.expand(batch, heads, -1, -1)


def softmax_backward(p: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the logits of p = softmax over the last axis, one pass."""
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)


def _route(k: Tensor, anchors: Tensor, log_total: Optional[Tensor]) -> Tensor:
    """The routing of a piece, (images * h, n, M).

    ``log_total`` (images * h, M) is the logarithm of the sum over all tokens
    where the softmax competes there, None where it is over the M.
    """
    logits = torch.bmm(k, anchors.transpose(1, 2))
    if log_total is None:
        return logits.softmax(-1)
    return logits.sub_(log_total.unsqueeze(1)).exp_()


def _log_total(k: Tensor, anchors: Tensor, routing: str) -> Optional[Tensor]:
    """log sum_n exp(k_n . a_m), (B, h, M); None if the softmax is over M."""
    if routing == 'representatives':
        return None
    batch, _, heads, _ = k.shape
    anchors = _expand(anchors, batch, heads)
    total = anchors.new_full(anchors.shape[:3], float('-inf'))
    for piece in _cut(k, anchors.shape[2]):
        here = _merge(anchors, piece[0])
        logits = torch.bmm(_rows(k, piece, here.dtype), here.transpose(1, 2))
        part = _merge(total, piece[0])
        part.copy_(torch.logaddexp(part, logits.logsumexp(1)))
    return total


def gather(k: Tensor, v: Tensor, anchors: Tensor, routing: str,
           reduction: str) -> Representatives:
    """Gather of :func:`mmrpa.ops.gather`, from (B, N, h, d)."""
    batch, _, heads, _ = k.shape
    log_total = _log_total(k, anchors, routing)
    anchors = _expand(anchors, batch, heads)
    # Not views of one tensor: an operator's outputs must not overlap.
    k_rep, z = (anchors.new_zeros(anchors.shape) for _ in range(2))
    mass = anchors.new_zeros(anchors.shape[:3])
    for piece in _cut(k, anchors.shape[2]):
        images = piece[0]
        k_rows, v_rows = (_rows(t, piece, anchors.dtype) for t in (k, v))
        p = _route(k_rows, _merge(anchors, images),
                   None if log_total is None else _merge(log_total, images))
        p_t = p.transpose(1, 2)
        _merge(k_rep, images).baddbmm_(p_t, k_rows)
        _merge(z, images).baddbmm_(p_t, v_rows)
        _merge(mass, images).add_(p.sum(1))
    if routing == 'tokens':
        mass.fill_(1)  # by definition; the sum is 1 up to rounding
    if reduction == 'mean':
        divisor = mass.clamp(min=MASS_EPS).unsqueeze(-1)
        k_rep /= divisor
        z /= divisor
    return Representatives(k_rep, z, mass)


def mean_backward(reps: Representatives, grad_k_rep: Tensor,
                  grad_z: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sums K and Z, (B, h, M, d), and minus the mass's.

    The last, (B, h, M), is 0 where the mass is clamped, and so a constant.
    """
    divisor = reps.mass.clamp(min=MASS_EPS).unsqueeze(-1)
    grad_k, grad_z = grad_k_rep / divisor, grad_z / divisor
    dot = (reps.k * grad_k + reps.z * grad_z).sum(-1)
    return grad_k, grad_z, dot * (reps.mass >= MASS_EPS)


def gather_backward(k: Tensor, v: Tensor, anchors: Tensor,
                    reps: Representatives, grad_k_rep: Tensor, grad_z: Tensor,
                    routing: str, reduction: str, grad_k: Tensor,
                    grad_v: Tensor, accumulate_v: bool) -> Tensor:
    """Write the gradients of k and v; return that of the anchors, (h, M, d).

    With G = [grad K_rep, grad Z] / mass, the routing's gradient is
    dP[n, m] = k_n . G_k[m] + v_n . G_z[m] - (K_rep . G_k + Z . G_z)[m], whose
    last term is the mass's; the rest is a softmax's backward.
    """
    batch, _, heads, _ = k.shape
    dot = torch.zeros_like(reps.mass)
    # A softmax over tokens subtracts what the mean's mass does; its mass is 1.
    if reduction == 'mean' or routing == 'tokens':
        grad_k_rep, grad_z, dot = mean_backward(reps, grad_k_rep, grad_z)
    log_total = _log_total(k, anchors, routing)
    anchors = _expand(anchors, batch, heads)
    grad_anchors = torch.zeros_like(
        anchors, memory_format=torch.contiguous_format)
    for piece in _cut(k, anchors.shape[2]):
        images = piece[0]
        here, g_k, g_z, offset = (
            _merge(t, images) for t in (anchors, grad_k_rep, grad_z, dot))
        k_rows, v_rows = (_rows(t, piece, here.dtype) for t in (k, v))
        p = _route(k_rows, here,
                   None if log_total is None else _merge(log_total, images))
        grad_p = torch.baddbmm(
            -offset.unsqueeze(1), k_rows, g_k.transpose(1, 2))
        grad_p.baddbmm_(v_rows, g_z.transpose(1, 2))
        grad_logits = (
            softmax_backward(p, grad_p)
            if log_total is None else grad_p.mul_(p))
        _merge(grad_anchors, images).baddbmm_(
            grad_logits.transpose(1, 2), k_rows)
        _put(grad_k, piece, torch.bmm(p, g_k).baddbmm_(grad_logits, here))
        _put(grad_v, piece, torch.bmm(p, g_z), accumulate_v)
    return grad_anchors.sum(0)


def distribute(q: Tensor, k_rep: Tensor, v_rep: Tensor, scale: float,
               out: Tensor, accumulate: bool) -> None:
    """Distribute of :func:`mmrpa.ops.distribute` into ``out`` (B, N, h, d).
    """
    keys = k_rep * scale
    for piece in _cut(q, keys.shape[2]):
        s = _attend(_rows(q, piece, keys.dtype), _merge(keys, piece[0]))
        _put(out, piece, torch.bmm(s, _merge(v_rep, piece[0])), accumulate)


def _attend(q: Tensor, keys: Tensor) -> Tensor:
    """A piece's attention to the representatives, (images * h, n, M)."""
    return torch.bmm(q, keys.transpose(1, 2)).softmax(-1)


def distribute_backward(q: Tensor, k_rep: Tensor, v_rep: Tensor, scale: float,
                        grad_out: Tensor,
                        grad_q: Tensor) -> Tuple[Tensor, Tensor]:
    """Write the gradient of q; return those of K_rep and V_rep."""
    keys = k_rep * scale
    grad_keys, grad_v_rep = keys.new_zeros(2, *keys.shape).unbind()
    for piece in _cut(q, keys.shape[2]):
        images = piece[0]
        here = _merge(keys, images)
        q_rows, grad_rows = (
            _rows(t, piece, keys.dtype) for t in (q, grad_out))
        s = _attend(q_rows, here)
        grad_s = torch.bmm(grad_rows, _merge(v_rep, images).transpose(1, 2))
        grad_logits = softmax_backward(s, grad_s)
        _put(grad_q, piece, torch.bmm(grad_logits, here))
        _merge(grad_keys, images).baddbmm_(
            grad_logits.transpose(1, 2), q_rows)
        _merge(grad_v_rep, images).baddbmm_(s.transpose(1, 2), grad_rows)
    return grad_keys * scale, grad_v_rep


def interact_backward(
        z: Tensor, weight: Tensor, proj: Optional[Tensor], residual: bool,
        grad: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of z, weight and proj of :func:`mmrpa.ops.interact`."""
    scale = z.shape[-1]**-0.5
    q, k, v = (project(z, w) for w in weight)
    a = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
    grad_z = grad if residual else torch.zeros_like(grad)
    grad_proj = None
    if proj is not None:
        grad_proj = _outer(a @ v, grad, proj)
        grad = project(grad, proj.mT)
    grad_logits = softmax_backward(a, grad @ v.transpose(-2, -1)) * scale
    grads = (grad_logits @ k, grad_logits.transpose(-2, -1) @ q,
             a.transpose(-2, -1) @ grad)
    for g, w in zip(grads, weight, strict=True):
        grad_z = grad_z + project(g, w.mT)
    grad_weight = torch.stack(
        [_outer(z, g, w) for g, w in zip(grads, weight, strict=True)])
    return grad_z, grad_weight, grad_proj


def _outer(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of ``project(x, weight)``."""
    if weight.dim() == 3:
        return torch.einsum('bhmi,bhmj->hij', x, grad)
    x, grad = (t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (x, grad))
    return x.T @ grad


def convolve(v: Tensor, weight: Tensor, bias: Optional[Tensor],
             hw_shape: Tuple[int, int]) -> Tensor:
    """Depth-wise convolution of V's map, (B, N, h, d) to the same.

    The N - H * W tokens in front are not of the map, and get zeros.
    """
    maps, num_cls = _to_map(v, hw_shape)
    weight = weight.to(v.dtype)
    bias = None if bias is None else bias.to(v.dtype)
    if _shifts_pay(v):
        out = v.new_empty(v.shape)
        out[:, :num_cls] = 0
        shifts.convolve_all(maps, shifts.taps(weight), bias,
                            _to_map(out, hw_shape)[0])
        return out
    local = F.conv2d(
        _channels_last(maps), weight, bias, padding=weight.shape[-1] // 2,
        groups=weight.shape[0])
    local = local.permute(0, 2, 3, 1).reshape(v[:, num_cls:].shape)
    return F.pad(local, (0, 0, 0, 0, num_cls, 0)) if num_cls else local


def convolve_backward(
        v: Tensor, weight: Tensor, bias: Optional[Tensor],
        hw_shape: Tuple[int, int], grad_out: Tensor,
        grad_v: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Write the gradient of v; return those of weight and bias."""
    maps, num_cls = _to_map(v, hw_shape)
    grad_maps, _ = _to_map(grad_out, hw_shape)
    weight = weight.to(v.dtype)
    grad_v[:, :num_cls].zero_()
    if _shifts_pay(v):
        # A correlation with the same taps, the other way round.
        shifts.convolve_all(grad_maps, shifts.taps(weight).flip(0), None,
                            _to_map(grad_v, hw_shape)[0])
        grad_taps = shifts.kernel_gradient_all(maps, grad_maps,
                                               weight.shape[-1])
        return (grad_taps.t().reshape(weight.shape),
                None if bias is None else grad_maps.sum((0, 1, 2)))
    grad_map, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _channels_last(grad_maps), _channels_last(maps), weight,
        None if bias is None else list(bias.shape),
        [1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0],
        weight.shape[0], [True, True, bias is not None])
    grad_v[:, num_cls:].copy_(
        grad_map.permute(0, 2, 3, 1).reshape(v[:, num_cls:].shape))
    return grad_weight, grad_bias


def _shifts_pay(x: Tensor) -> bool:
    """Shifts round each of their sums, which half precision can not afford."""
    return (x.device.type == 'cpu'
            and x.dtype in (torch.float32, torch.float64))


def _to_map(x: Tensor, hw_shape: Tuple[int, int]) -> Tuple[Tensor, int]:
    """Tokens (B, N, h, d) to a view (B, H, W, C), and how many are before.
    """
    num_cls = x.shape[1] - hw_shape[0] * hw_shape[1]
    return x[:, num_cls:].unflatten(1, hw_shape).flatten(3), num_cls


def _channels_last(maps: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W), channels last.

    The copy pays: on a strided view torch's depth-wise convolution takes
    several times as long.
    """
    return maps.permute(0, 3, 1, 2).contiguous(
        memory_format=torch.channels_last)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    proj: Optional[Tensor],
    dwc_weight: Optional[Tensor],
    dwc_bias: Optional[Tensor],
    hw_shape: Tuple[int, int],
    options: Options,
) -> Tuple[Tensor, Representatives]:
    """Gather, Interact, Distribute and the convolution.

    Args:
        q, k, v (Tensor): (B, N, h, d).
        anchors, weight, proj (Tensor): In the dtype to compute in.
        dwc_weight, dwc_bias (Tensor, optional): Of the convolution.
        hw_shape (tuple[int, int]): (H, W) of its map.
        options (Options): The rest.

    Returns:
        tuple[Tensor, Representatives]: The output (B, N, h, d), contiguous,
        and what backward wants to have kept.
    """
    if dwc_weight is None:
        out = q.new_empty(q.shape)
    else:
        out = convolve(v, dwc_weight, dwc_bias, hw_shape).contiguous()
    reps = gather(k, v, anchors, options.routing, options.reduction)
    v_rep = interact(reps.z, weight, proj, options.residual)
    distribute(q, reps.k, v_rep, options.scale, out, dwc_weight is not None)
    return out, reps


def backward(
    q: Tensor, k: Tensor, v: Tensor, anchors: Tensor, weight: Tensor,
    proj: Optional[Tensor], dwc_weight: Optional[Tensor],
    dwc_bias: Optional[Tensor], hw_shape: Tuple[int, int], options: Options,
    reps: Representatives, grad_out: Tensor, grad_q: Tensor, grad_k: Tensor,
    grad_v: Tensor
) -> Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor],
           Optional[Tensor]]:
    """Write the gradients of q, k, v; return those of the parameters.

    In the order of the arguments. That of the anchors is (h, M, d) also where
    the heads share them.
    """
    v_rep = interact(reps.z, weight, proj, options.residual)
    grad_k_rep, grad_v_rep = distribute_backward(q, reps.k, v_rep,
                                                 options.scale, grad_out,
                                                 grad_q)
    grad_z, grad_weight, grad_proj = interact_backward(
        reps.z, weight, proj, options.residual, grad_v_rep)
    grad_dwc = (None, None)
    if dwc_weight is not None:
        grad_dwc = convolve_backward(v, dwc_weight, dwc_bias, hw_shape,
                                     grad_out, grad_v)
    grad_anchors = gather_backward(k, v, anchors, reps, grad_k_rep, grad_z,
                                   options.routing, options.reduction, grad_k,
                                   grad_v, dwc_weight is not None)
    return (grad_anchors, grad_weight, grad_proj, *grad_dwc)
