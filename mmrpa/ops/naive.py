"""The definition of RPAttention: Gather, Interact, Distribute.

Written to be read beside ``docs/method.md``; every faster implementation has
to agree with this file. All tensors are per head: B images, h heads, N tokens,
M representatives, d channels a head, C = h * d.

The three functions work in the dtype they are given. :func:`rp_attention`, the
public entry, is the one that raises half precision to float32.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

ROUTINGS = ('representatives', 'tokens')
REDUCTIONS = ('mean', 'sum')
MASS_EPS = 1e-6


def route(k: Tensor,
          anchors: Tensor,
          routing: str = 'representatives') -> Tensor:
    """The routing P: which token belongs to which representative.

    Args:
        k (Tensor): Keys, (B, h, N, d).
        anchors (Tensor): Learned anchors, (h, M, d), or (1, M, d) to share
            them among the heads.
        routing (str): The axis over which the softmax competes:
            ``'representatives'`` (each token is divided among the M
            representatives; our reading of "competitive") or ``'tokens'``
            (each representative divides its attention among the N tokens).

    Returns:
        Tensor: (B, h, N, M), between 0 and 1.
    """
    axis = -1 if routing == 'representatives' else -2
    return (k @ anchors.transpose(-2, -1)).softmax(dim=axis)


def gather(k: Tensor,
           v: Tensor,
           anchors: Tensor,
           routing: str = 'representatives',
           reduction: str = 'mean') -> Tuple[Tensor, Tensor]:
    """Summarise N tokens in M representatives (Gather; figure 2 of the paper).

    Args:
        k (Tensor): Keys, (B, h, N, d).
        v (Tensor): Values, (B, h, N, d).
        anchors (Tensor): Learned anchors; see :func:`route`.
        routing (str): Axis of the routing softmax; see :func:`route`.
        reduction (str): ``'mean'`` divides by the routed mass, ``'sum'`` does
            not. Our choice is the mean: a sum grows with N, so weights would
            not carry over from 224x224 to 800x1333.

    Returns:
        tuple[Tensor, Tensor]: K_rep and Z, each (B, h, M, d). A representative
        that no token is routed to gives zeros under ``'mean'``.
    """
    p = route(k, anchors, routing)  # (B, h, N, M)
    p_t = p.transpose(-2, -1)
    k_rep, z = p_t @ k, p_t @ v  # (B, h, M, d)
    if reduction == 'mean':
        # A clamp rather than "+ eps" keeps the weighted mean exact for every
        # representative that is alive.
        mass = p.sum(dim=-2).clamp(min=MASS_EPS).unsqueeze(-1)
        k_rep, z = k_rep / mass, z / mass
    return k_rep, z


def interact(z: Tensor,
             weight: Tensor,
             proj: Optional[Tensor] = None,
             residual: bool = False) -> Tensor:
    """Self-attention among the representatives (Interact).

    Args:
        z (Tensor): Gathered values, (B, h, M, d).
        weight (Tensor): Wq', Wk', Wv', which multiply from the right: (3, h,
            d, d) for one set a head ("grouped"), (3, C, C) for the "full"
            reading in which all heads are mixed.
        proj (Tensor, optional): An output projection, (h, d, d) or (C, C). The
            figure draws none, so the default is None.
        residual (bool): Add ``z`` to the result. The figure draws no residual.

    Returns:
        Tensor: V_rep, (B, h, M, d).
    """
    q, k, v = (_project(z, w) for w in weight)
    v_rep = _softmax_attention(q, k, v, z.shape[-1]**-0.5)
    if proj is not None:
        v_rep = _project(v_rep, proj)
    return z + v_rep if residual else v_rep


def distribute(q: Tensor, k_rep: Tensor, v_rep: Tensor,
               scale: float) -> Tensor:
    """Let every token read from the representatives (Distribute).

    Args:
        q (Tensor): Queries, (B, h, N, d).
        k_rep (Tensor): Representative keys, (B, h, M, d).
        v_rep (Tensor): Representative values, (B, h, M, d).
        scale (float): Factor of the logits.

    Returns:
        Tensor: (B, h, N, d).
    """
    return _softmax_attention(q, k_rep, v_rep, scale)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor,
                       scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Right-multiply (B, h, M, d) by (h, d, d), or by (C, C) across heads."""
    if weight.dim() == 3:
        return x @ weight
    heads, dims = x.shape[1], x.shape[-1]
    mixed = x.transpose(1, 2).flatten(2) @ weight  # (B, M, C)
    return mixed.unflatten(-1, (heads, dims)).transpose(1, 2)


def rp_attention(q: Tensor,
                 k: Tensor,
                 v: Tensor,
                 anchors: Tensor,
                 interact_weight: Tensor,
                 *,
                 routing: str = 'representatives',
                 reduction: str = 'mean',
                 interact_proj: Optional[Tensor] = None,
                 interact_residual: bool = False,
                 scale: Optional[float] = None) -> Tensor:
    """Global attention in linear cost through M representatives.

    Gather, Interact and Distribute of "Representative Attention For Vision
    Transformers" (arXiv 2605.14913), without the depth-wise convolution and
    the projections, which belong to :class:`mmrpa.layers.RPAttention`.

    Softmaxes, mass and every accumulation run in float32 (float64 for float64
    input), whatever the input's dtype and whatever the autocast: at detection
    size N = 66 800 tokens routed to one representative overflow float16.

    Args:
        q (Tensor): Queries, (B, h, N, d), of any floating dtype.
        k (Tensor): Keys, (B, h, N, d).
        v (Tensor): Values, (B, h, N, d).
        anchors (Tensor): (h, M, d), or (1, M, d) shared among the heads.
        interact_weight (Tensor): (3, h, d, d) grouped, or (3, C, C) full.
        routing (str): ``'representatives'`` or ``'tokens'``; see
            :func:`route`.
        reduction (str): ``'mean'`` or ``'sum'``; see :func:`gather`.
        interact_proj (Tensor, optional): (h, d, d) or (C, C); see
            :func:`interact`.
        interact_residual (bool): See :func:`interact`.
        scale (float, optional): Factor of Distribute's logits. Defaults to
            ``d ** -0.5``.

    Returns:
        Tensor: (B, h, N, d), in the dtype of ``q``.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape does not fit, or an option is unknown.
    """
    _check_arguments(q, k, v, anchors, interact_weight, routing, reduction,
                     interact_proj)
    out_dtype = q.dtype
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    with without_autocast(q.device.type):
        q, k, v, anchors, interact_weight = (
            t.to(dtype) for t in (q, k, v, anchors, interact_weight))
        if interact_proj is not None:
            interact_proj = interact_proj.to(dtype)
        k_rep, z = gather(k, v, anchors, routing, reduction)
        v_rep = interact(z, interact_weight, interact_proj, interact_residual)
        out = distribute(q, k_rep, v_rep,
                         q.shape[-1]**-0.5 if scale is None else scale)
    return out.to(out_dtype)


def without_autocast(device_type: str) -> torch.autocast:
    """A context in which autocast is off for a type of device."""
    # autocast does not know the device 'meta', on which FLOPs are counted.
    return torch.autocast(
        'cpu' if device_type == 'meta' else device_type, enabled=False)


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, anchors: Tensor,
                     interact_weight: Tensor, routing: str, reduction: str,
                     interact_proj: Optional[Tensor]) -> None:
    tensors = dict(
        q=q, k=k, v=v, anchors=anchors, interact_weight=interact_weight)
    if interact_proj is not None:
        tensors['interact_proj'] = interact_proj
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f'{name} must be floating point, got '
                            f'{tensor.dtype}; convert it first')
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError('q, k and v must share one shape (B, heads, N, d), '
                         f'got {tuple(q.shape)}, {tuple(k.shape)} and '
                         f'{tuple(v.shape)}')
    heads, dims = q.shape[1], q.shape[3]
    channels = heads * dims
    if (anchors.dim() != 3 or anchors.shape[0] not in (1, heads)
            or anchors.shape[1] < 1 or anchors.shape[2] != dims):
        raise ValueError(
            f'anchors must be ({heads}, M, {dims}) or (1, M, {dims}) with M '
            f'at least 1 for q of shape {tuple(q.shape)}, got '
            f'{tuple(anchors.shape)}')
    square = ((heads, dims, dims), (channels, channels))
    if tuple(interact_weight.shape) not in tuple((3, *s) for s in square):
        raise ValueError(
            f'interact_weight must be (3, {heads}, {dims}, {dims}) for '
            f'grouped or (3, {channels}, {channels}) for full, got '
            f'{tuple(interact_weight.shape)}')
    if interact_proj is not None and tuple(interact_proj.shape) not in square:
        raise ValueError(f'interact_proj must be {square[0]} or {square[1]}, '
                         f'got {tuple(interact_proj.shape)}')
    for name, value, allowed in (('routing', routing, ROUTINGS),
                                 ('reduction', reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(
                f'{name} must be one of {allowed}, got {value!r}')
