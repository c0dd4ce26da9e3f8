"""RPAttention in pieces that fit the cache, in plain torch, on any device.

The N x M routing and the N x M attention of Distribute exist for one piece of
tokens at a time, forward and backward, and are computed again in backward
rather than kept: memory is that of Q, K, V and the output. The equations are
those of ``naive.py``; the gradients are written out below.

Tensors are (B, N, h, d) here, as a Linear lays them out: any strides, so views
of one q, k, v projection do without a copy. Sums and softmaxes are computed
and kept in float32 (float64 for float64 input).
"""

from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .naive import MASS_EPS, compute_dtype, project

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


def _put(out: Tensor, piece: Piece, rows: Tensor) -> None:
    """Write (images * h, n, d) into the piece of ``out`` (B, N, h, d)."""
    part = out[piece].transpose(1, 2)
    part.copy_(rows.view(part.shape))


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
    """Gradients of the sums K and Z, (B, h, M, d), and minus the mass's."""
    divisor = reps.mass.clamp(min=MASS_EPS).unsqueeze(-1)
    grad_k, grad_z = grad_k_rep / divisor, grad_z / divisor
    return grad_k, grad_z, mass_backward(reps, grad_k, grad_z)


def mass_backward(reps: Representatives, grad_k: Tensor,
                  grad_z: Tensor) -> Tensor:
    """Minus the mass's gradient, (B, h, M), from those of the sums.

    It is 0 where the mass is clamped, and so a constant.
    """
    dot = (reps.k * grad_k + reps.z * grad_z).sum(-1)
    return dot * (reps.mass >= MASS_EPS)


def gather_backward(k: Tensor, v: Tensor, anchors: Tensor,
                    reps: Representatives, grad_k_rep: Tensor, grad_z: Tensor,
                    routing: str, reduction: str, grad_k: Tensor,
                    grad_v: Tensor) -> Tensor:
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
        _put(grad_v, piece, torch.bmm(p, g_z))
    return grad_anchors.sum(0)


def distribute(q: Tensor, k_rep: Tensor, v_rep: Tensor,
               scale: float) -> Tensor:
    """Distribute of :func:`mmrpa.ops.distribute`, (B, N, h, d), contiguous.
    """
    if q.device.type == 'cpu' and q.dtype == k_rep.dtype:
        # torch's flash attention for CPUs, which keeps no N x M either.
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k_rep, v_rep,
                                             scale=scale)
        return out.transpose(1, 2).contiguous()
    out = q.new_empty(q.shape)
    keys = k_rep * scale
    for piece in _cut(q, keys.shape[2]):
        s = _attend(_rows(q, piece, keys.dtype), _merge(keys, piece[0]))
        _put(out, piece, torch.bmm(s, _merge(v_rep, piece[0])))
    return out


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


class Interacted(NamedTuple):
    """Interact's result (B, h, M, d), and what its gradient needs."""

    v_rep: Tensor
    qkv: Tensor  # (3, B, h, M, d)
    a: Tensor  # (B, h, M, M)


def interact(z: Tensor, weight: Tensor, proj: Optional[Tensor],
             residual: bool) -> Interacted:
    """:func:`mmrpa.ops.interact` for a gradient."""
    qkv = _project_all(z, weight)
    q, k, v = qkv
    a = ((q * z.shape[-1]**-0.5) @ k.mT).softmax(-1)
    v_rep = a @ v
    if proj is not None:
        v_rep = project(v_rep, proj)
    return Interacted(z + v_rep if residual else v_rep, qkv, a)


def _project_all(z: Tensor, weight: Tensor) -> Tensor:
    """Wq', Wk' and Wv' applied to (B, h, M, d): (3, B, h, M, d)."""
    if weight.dim() == 4:
        return z @ weight.unsqueeze(1)
    return torch.stack([project(z, w) for w in weight])


def interact_backward(
        z: Tensor, weight: Tensor, proj: Optional[Tensor], residual: bool,
        done: Interacted,
        grad: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of z, weight and proj of :func:`mmrpa.ops.interact`."""
    q, k, v = done.qkv
    scale = z.shape[-1]**-0.5
    grad_z = grad if residual else None
    grad_proj = None
    if proj is not None:
        grad_proj = _outer(done.a @ v, grad, proj)
        grad = project(grad, proj.mT)
    grad_logits = softmax_backward(done.a, grad @ v.mT) * scale
    grads = torch.stack(
        (grad_logits @ k, grad_logits.mT @ q, done.a.mT @ grad))
    if weight.dim() == 4:
        through = (grads @ weight.mT.unsqueeze(1)).sum(0)
        grad_weight = (z.mT @ grads).sum(1)
    else:
        through = sum(project(g, w.mT)
                      for g, w in zip(grads, weight, strict=True))
        grad_weight = torch.stack(
            [_outer(z, g, w) for g, w in zip(grads, weight, strict=True)])
    return through if grad_z is None else grad_z + through, grad_weight, \
        grad_proj


def _outer(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of ``project(x, weight)``."""
    if weight.dim() == 3:
        return torch.einsum('bhmi,bhmj->hij', x, grad)
    x, grad = (t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (x, grad))
    return x.T @ grad


def add_convolution(out: Tensor, v: Tensor, weight: Tensor,
                    bias: Optional[Tensor], hw_shape: Tuple[int, int]) -> None:
    """Add the depth-wise convolution of V's map to ``out``, (B, N, h, d).

    The N - H * W tokens in front are not of the map, and get nothing.
    """
    maps, out_maps = _to_map(v, hw_shape), _to_map(out, hw_shape)
    weight, bias = _cast(v.dtype, weight, bias)
    for images, rows in convolution.bands(maps):
        out_maps[images, rows] += convolution.convolve(
            maps[images], weight, bias, rows)


def convolve_backward(
        v: Tensor, weight: Tensor, bias: Optional[Tensor],
        hw_shape: Tuple[int, int], grad_out: Tensor,
        grad_v: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Add the gradient of v; return those of weight and bias."""
    maps, grad_maps, grad_v_maps = (
        _to_map(t, hw_shape) for t in (v, grad_out, grad_v))
    dtype = compute_dtype(v.dtype)
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    grad_bias = None if bias is None else bias.new_zeros(bias.shape,
                                                         dtype=dtype)
    weight, = _cast(v.dtype, weight)
    for images, rows in convolution.bands(maps):
        grad_v_maps[images, rows] += convolution.convolve_input_gradient(
            grad_maps[images], weight, rows)
        grads = convolution.kernel_gradient(
            maps[images], grad_maps[images, rows], weight, bias is not None,
            rows)
        grad_weight += grads[0]
        if bias is not None:
            grad_bias += grads[1]
    return grad_weight, grad_bias


def _cast(dtype: torch.dtype,
          *tensors: Optional[Tensor]) -> List[Optional[Tensor]]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _to_map(x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
    """Tokens (B, N, h, d) to a view (B, H, W, C) of those of the map."""
    num_cls = x.shape[1] - hw_shape[0] * hw_shape[1]
    return x[:, num_cls:].unflatten(1, hw_shape).flatten(3)


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
    reps = gather(k, v, anchors, options.routing, options.reduction)
    v_rep = interact(reps.z, weight, proj, options.residual).v_rep
    out = distribute(q, reps.k, v_rep, options.scale)
    if dwc_weight is not None:
        add_convolution(out, v, dwc_weight, dwc_bias, hw_shape)
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
    done = interact(reps.z, weight, proj, options.residual)
    grad_k_rep, grad_v_rep = distribute_backward(
        q, reps.k, done.v_rep, options.scale, grad_out, grad_q)
    grad_z, grad_weight, grad_proj = interact_backward(
        reps.z, weight, proj, options.residual, done, grad_v_rep)
    grad_anchors = gather_backward(k, v, anchors, reps, grad_k_rep, grad_z,
                                   options.routing, options.reduction, grad_k,
                                   grad_v)
    grad_dwc = (None, None)
    if dwc_weight is not None:
        grad_dwc = convolve_backward(v, dwc_weight, dwc_bias, hw_shape,
                                     grad_out, grad_v)
    return (grad_anchors, grad_weight, grad_proj, *grad_dwc)
