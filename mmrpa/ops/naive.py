"""The definition of RPAttention: Gather, Interact, Distribute.

Written to be read beside ``docs/method.md``; every faster implementation has
to agree with this file. All tensors are per head: B images, h heads, N tokens,
M representatives, d channels a head, C = h * d.

The functions work in the dtype they are given. The public entry,
:func:`mmrpa.ops.rp_attention`, is what raises half precision to float32.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..arguments import (
    check_bool,
    check_number,
    check_one_of,
    check_tensor,
)

ROUTINGS = ('representatives', 'tokens')
REDUCTIONS = ('mean', 'sum')
MASS_EPS = 1e-6
_HEADS = '(B, h, N, d)'


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

    Raises:
        TypeError: A tensor is not one, or not floating point.
        ValueError: A shape or ``routing`` does not fit.
    """
    _check_keys(k, anchors)
    check_one_of('routing', routing, ROUTINGS)
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

    Raises:
        TypeError, ValueError: As :func:`route`.
    """
    check_tensor('v', v, 4, _HEADS)
    check_one_of('reduction', reduction, REDUCTIONS)
    p = route(k, anchors, routing)  # (B, h, N, M)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f'v must have the shape and dtype of k, {_of(k)}, '
                         f'got {_of(v)}')
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

    Raises:
        TypeError: A tensor is not one, or not floating point.
        ValueError: A shape or dtype does not fit.
    """
    check_tensor('z', z, 4, '(B, h, M, d)')
    check_bool('residual', residual)
    _, heads, _, dims = z.shape
    square = ((heads, dims, dims), (heads * dims, ) * 2)
    three = tuple((3, *s) for s in square)
    params = [('weight', weight, three)]
    if proj is not None:
        params.append(('proj', proj, square))
    for name, tensor, allowed in params:
        check_tensor(name, tensor)
        if tuple(tensor.shape) not in allowed or tensor.dtype != z.dtype:
            raise ValueError(f'{name} must be {" or ".join(map(str, allowed))}'
                             f' of {z.dtype}, got {_of(tensor)}')
    q, k, v = (project(z, w) for w in weight)
    v_rep = _softmax_attention(q, k, v, z.shape[-1]**-0.5)
    if proj is not None:
        v_rep = project(v_rep, proj)
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
    check_tensor('q', q, 4, _HEADS)
    check_number('scale', scale)
    shape = (*q.shape[:2], k_rep.shape[2] if isinstance(k_rep, Tensor)
             and k_rep.dim() == 4 else 'M', q.shape[3])
    for name, tensor in (('k_rep', k_rep), ('v_rep', v_rep)):
        check_tensor(name, tensor, 4, '(B, h, M, d)')
        if tuple(tensor.shape) != shape or tensor.dtype != q.dtype:
            raise ValueError(f'{name} must be {shape} of {q.dtype}, got '
                             f'{_of(tensor)}')
    return _softmax_attention(q, k_rep, v_rep, scale)


def _of(tensor: Tensor) -> str:
    return f'{tuple(tensor.shape)} of {tensor.dtype}'


def _check_keys(k: Tensor, anchors: Tensor) -> None:
    check_tensor('k', k, 4, _HEADS)
    check_tensor('anchors', anchors, 3, '(h, M, d) or (1, M, d)')
    if (anchors.shape[0] not in (1, k.shape[1]) or anchors.shape[1] < 1
            or anchors.shape[2] != k.shape[3] or anchors.dtype != k.dtype):
        raise ValueError(
            f'anchors must be ({k.shape[1]}, M, {k.shape[3]}) or (1, M, '
            f'{k.shape[3]}) of {k.dtype}, M at least 1, got {_of(anchors)}')


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor,
                       scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Right-multiply (B, h, M, d) by (h, d, d), or by (C, C) across heads."""
    if weight.dim() == 3:
        return x @ weight
    heads, dims = x.shape[1], x.shape[-1]
    mixed = x.transpose(1, 2).flatten(2) @ weight  # (B, M, C)
    return mixed.unflatten(-1, (heads, dims)).transpose(1, 2)


def rp_attention(q: Tensor, k: Tensor, v: Tensor, anchors: Tensor,
                 interact_weight: Tensor, interact_proj: Optional[Tensor],
                 routing: str, reduction: str, interact_residual: bool,
                 scale: float) -> Tensor:
    """The three in a row, (B, h, N, d) to the same; checks nothing.

    Tensors of half precision are raised to float32 first.
    """
    out_dtype = q.dtype
    dtype = compute_dtype(out_dtype)
    with without_autocast(q.device.type):
        q, k, v, anchors, interact_weight = (
            t.to(dtype) for t in (q, k, v, anchors, interact_weight))
        if interact_proj is not None:
            interact_proj = interact_proj.to(dtype)
        k_rep, z = gather(k, v, anchors, routing, reduction)
        v_rep = interact(z, interact_weight, interact_proj, interact_residual)
        return distribute(q, k_rep, v_rep, scale).to(out_dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and softmaxes: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> torch.autocast:
    """A context in which autocast is off for a type of device."""
    # autocast does not know the device 'meta', on which FLOPs are counted.
    return torch.autocast(
        'cpu' if device_type == 'meta' else device_type, enabled=False)
