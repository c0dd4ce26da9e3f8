"""The public operators, and which implementation computes them."""

from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import (
    check_bool,
    check_int,
    check_number,
    check_pair,
    check_tensor,
)
from . import absorbed, library, library_layer, naive
from .naive import REDUCTIONS, ROUTINGS

IMPLS = ('auto', 'naive', 'fused', 'triton')
# What the Triton kernels take.
TRITON_HEAD_DIMS = (16, 128)
TRITON_MAX_REPRESENTATIVES = 256
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_impl(device_type: str,
                dtype: torch.dtype,
                head_dims: int,
                num_representatives: int,
                routing: str = 'representatives') -> str:
    """What ``impl='auto'`` stands for.

    ``'triton'`` on CUDA, where the Triton kernels take the dtype and sizes;
    ``'fused'`` everywhere else. Nothing else is looked at.

    Args:
        device_type (str): ``'cuda'``, ``'cpu'`` and so on.
        dtype (torch.dtype): Of Q, K and V.
        head_dims (int): Channels d of a head.
        num_representatives (int): M.
        routing (str): See :func:`rp_attention`.

    Returns:
        str: One of ``IMPLS[1:]``.
    """
    check_int('head_dims', head_dims, 1)
    check_int('num_representatives', num_representatives, 1)
    fits = _why_not_triton(dtype, head_dims, num_representatives,
                           routing) is None
    return 'triton' if device_type == 'cuda' and fits else 'fused'


def resolve_impl(impl: str, device_type: str, dtype: torch.dtype,
                 head_dims: int, num_representatives: int,
                 routing: str) -> str:
    """``impl`` with ``'auto'`` replaced, or an error that says why not.

    Args:
        impl (str): One of ``IMPLS``; the others are as for
            :func:`choose_impl`.

    Raises:
        ValueError: An unknown impl, or one that can not compute this.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl must be one of {IMPLS}, got {impl!r}')
    if impl == 'auto':
        return choose_impl(device_type, dtype, head_dims, num_representatives,
                           routing)
    if impl == 'triton':
        reason = _why_not_triton(dtype, head_dims, num_representatives,
                                 routing)
        if (reason is None and device_type not in ('cuda', 'meta')
                and not _interpreting()):
            reason = (f'tensors on CUDA, got {device_type!r} (or, to test, '
                      'TRITON_INTERPRET=1 in the environment)')
        if reason is not None:
            raise ValueError(f"impl='triton' needs {reason}; use impl='auto'")
    return impl


def _interpreting() -> bool:
    try:
        from .triton_launch import interpreting
    except ImportError:
        return False
    return interpreting()


def _why_not_triton(dtype: torch.dtype, head_dims: int,
                    num_representatives: int, routing: str) -> Optional[str]:
    """What the Triton kernels need that this is not; None where it fits."""
    low, high = TRITON_HEAD_DIMS
    if dtype not in TRITON_DTYPES:
        return f'float32, bfloat16 or float16, got {dtype}'
    if not low <= head_dims <= high:
        return f'{low} to {high} channels a head, got {head_dims}'
    if num_representatives > TRITON_MAX_REPRESENTATIVES:
        return (f'at most {TRITON_MAX_REPRESENTATIVES} representatives, got '
                f'{num_representatives}')
    if routing != 'representatives':
        return f"routing='representatives', got {routing!r}"
    return None


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
                 scale: Optional[float] = None,
                 impl: str = 'auto') -> Tensor:
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
        impl (str): ``'naive'``: the definition, differentiable any number of
            times. ``'fused'``: in pieces, recomputed in backward, on any
            device. ``'triton'``: GPU kernels. ``'auto'``: see
            :func:`choose_impl`.

    Returns:
        Tensor: (B, h, N, d), in the dtype of ``q``.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape or dtype does not fit, tensors are on several
            devices, an option is unknown, or impl can not compute this.
    """
    _check_tensors(
        dict(
            q=q,
            k=k,
            v=v,
            anchors=anchors,
            interact_weight=interact_weight),
        dict(interact_proj=interact_proj), same_dtype=3)
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError('q, k and v must share one shape (B, heads, N, d), '
                         f'got {tuple(q.shape)}, {tuple(k.shape)} and '
                         f'{tuple(v.shape)}')
    _check_arguments(q.shape[1], q.shape[3], anchors, interact_weight,
                     interact_proj, routing, reduction)
    _check_options(interact_residual, scale)
    impl = resolve_impl(impl, q.device.type, q.dtype, q.shape[3],
                        anchors.shape[1], routing)
    scale = q.shape[-1]**-0.5 if scale is None else float(scale)
    if impl == 'naive':
        return naive.rp_attention(q, k, v, anchors, interact_weight,
                                  interact_proj, routing, reduction,
                                  interact_residual, scale)
    out = library.rp_attention([t.transpose(1, 2) for t in (q, k, v)],
                               anchors, interact_weight, interact_proj, None,
                               None, (0, 0), routing, reduction,
                               interact_residual, scale, impl)
    return out.transpose(1, 2)


def rp_attention_qkv(qkv: Tensor,
                     anchors: Tensor,
                     interact_weight: Tensor,
                     *,
                     num_heads: int,
                     hw_shape: Tuple[int, int] = (0, 0),
                     dwc_weight: Optional[Tensor] = None,
                     dwc_bias: Optional[Tensor] = None,
                     routing: str = 'representatives',
                     reduction: str = 'mean',
                     interact_proj: Optional[Tensor] = None,
                     interact_residual: bool = False,
                     scale: Optional[float] = None,
                     impl: str = 'auto') -> Tensor:
    """RPAttention between its projections: ``concat_heads(O) + DWC(V)``.

    One operator on what the q, k, v projection returns, without a copy to
    split heads or merge gradients.

    Args:
        qkv (Tensor): (B, N, 3C): Q, K and V, each C = h * d with the channels
            of a head side by side.
        anchors (Tensor): (h, M, d), or (1, M, d) shared among the heads.
        interact_weight (Tensor): (3, h, d, d) grouped, or (3, C, C) full.
        num_heads (int): Heads h.
        hw_shape (tuple[int, int]): (H, W) of the convolution's map; the N - H
            * W tokens in front (a CLS token) take no part in it.
        dwc_weight (Tensor, optional): Depth-wise kernels (C, 1, K, K), K odd;
            None leaves the convolution out.
        dwc_bias (Tensor, optional): Its bias (C).
        routing, reduction, interact_proj, interact_residual, scale, impl: As
            for :func:`rp_attention`.

    Returns:
        Tensor: (B, N, C), in the dtype of ``qkv``.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: As :func:`rp_attention`.
    """
    _check_tensors(
        dict(qkv=qkv, anchors=anchors, interact_weight=interact_weight),
        dict(
            interact_proj=interact_proj,
            dwc_weight=dwc_weight,
            dwc_bias=dwc_bias))
    check_int('num_heads', num_heads, 1)
    if (qkv.dim() != 3 or qkv.shape[2] < 1
            or qkv.shape[2] % (3 * num_heads)):
        raise ValueError(
            'qkv must be (B, N, 3 * num_heads * d), got '
            f'{tuple(qkv.shape)} with num_heads={num_heads}')
    batch, num_tokens, channels = qkv.shape
    channels //= 3
    dims = channels // num_heads
    _check_arguments(num_heads, dims, anchors, interact_weight, interact_proj,
                     routing, reduction)
    _check_convolution(channels, num_tokens, hw_shape, dwc_weight, dwc_bias)
    _check_options(interact_residual, scale)
    impl = resolve_impl(impl, qkv.device.type, qkv.dtype, dims,
                        anchors.shape[1], routing)
    scale = dims**-0.5 if scale is None else float(scale)
    if impl != 'naive':
        heads = qkv.unflatten(-1, (3, num_heads, dims))
        out = library.rp_attention([heads], anchors, interact_weight,
                                   interact_proj, dwc_weight, dwc_bias,
                                   tuple(hw_shape), routing, reduction,
                                   interact_residual, scale, impl)
        return out.flatten(2)
    # Raised once, so that sums of two parts are rounded once, too.
    out_dtype, qkv = qkv.dtype, qkv.to(naive.compute_dtype(qkv.dtype))
    heads = qkv.unflatten(-1, (3, num_heads, dims))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
    out = naive.rp_attention(q, k, v, anchors, interact_weight, interact_proj,
                             routing, reduction, interact_residual, scale)
    out = out.transpose(1, 2).flatten(2)  # (B, N, C)
    if dwc_weight is None:
        return out.to(out_dtype)
    num_cls = num_tokens - hw_shape[0] * hw_shape[1]
    local = qkv[:, num_cls:, 2 * channels:].transpose(1, 2)
    with naive.without_autocast(qkv.device.type):
        local = F.conv2d(
            local.unflatten(-1, hw_shape),
            dwc_weight.to(qkv.dtype),
            None if dwc_bias is None else dwc_bias.to(qkv.dtype),
            padding=dwc_weight.shape[-1] // 2,
            groups=channels)
    local = local.flatten(2).transpose(1, 2)
    return (out + F.pad(local, (0, 0, num_cls, 0))).to(out_dtype)


def computes_layer(impl: str, device_type: str, dtype: torch.dtype,
                   num_tokens: int, num_heads: int, head_dims: int,
                   num_representatives: int,
                   routing: str = 'representatives') -> bool:
    """Whether an implementation computes the projections as well.

    ``'fused'`` does, as :func:`rp_attention_layer`, on the CPU in float32 and
    float64, for the routing's softmax over the representatives, where that
    takes fewer multiply-adds and an image has at least 1 024 tokens: with
    heads of d channels, from about M = d / 2 downwards.

    Args:
        impl (str): As returned by :func:`choose_impl`.
        device_type (str): ``'cpu'``, ``'cuda'`` and so on.
        dtype (torch.dtype): Of the layer's input and parameters.
        num_tokens (int): N.
        num_heads (int): Heads h.
        head_dims (int): Channels d of a head.
        num_representatives (int): M.
        routing (str): See :func:`rp_attention`.
    """
    for name, value in (('num_tokens', num_tokens), ('num_heads', num_heads),
                        ('head_dims', head_dims),
                        ('num_representatives', num_representatives)):
        check_int(name, value, 0)
    return (impl == 'fused' and device_type == 'cpu'
            and dtype in (torch.float32, torch.float64)
            and routing == 'representatives' and absorbed.absorbs(
                num_tokens, num_heads, num_representatives, head_dims))


def rp_attention_layer(x: Tensor,
                       qkv_weight: Tensor,
                       anchors: Tensor,
                       interact_weight: Tensor,
                       out_weight: Tensor,
                       dwc_weight: Tensor,
                       *,
                       num_heads: int,
                       hw_shape: Tuple[int, int],
                       qkv_bias: Optional[Tensor] = None,
                       out_bias: Optional[Tensor] = None,
                       dwc_bias: Optional[Tensor] = None,
                       reduction: str = 'mean',
                       interact_proj: Optional[Tensor] = None,
                       interact_residual: bool = False,
                       scale: Optional[float] = None) -> Tensor:
    """RPAttention with its projections, in one operator.

    ``linear(rp_attention_qkv(linear(x, qkv_weight, qkv_bias), ...),
    out_weight, out_bias)``, with the products associated otherwise, so that Q,
    K and O never exist: fewer multiply-adds where heads have few
    representatives (:func:`computes_layer`), and less memory. It is made for
    the CPU, one image at a time, in bands of the map's rows.

    Args:
        x (Tensor): (B, N, C), float32 or float64.
        qkv_weight (Tensor): (3C, C), of an nn.Linear.
        anchors, interact_weight: As for :func:`rp_attention_qkv`.
        out_weight (Tensor): (C, C), of an nn.Linear.
        dwc_weight (Tensor): Depth-wise kernels (C, 1, K, K), K odd.
        num_heads (int): Heads h; divides C.
        hw_shape (tuple[int, int]): (H, W) of the map; the N - H * W tokens in
            front (a CLS token) take no part in the convolution.
        qkv_bias, out_bias (Tensor, optional): (3C) and (C).
        dwc_bias, reduction, interact_proj, interact_residual, scale: As for
            :func:`rp_attention_qkv`.

    Returns:
        Tensor: (B, N, C).

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape, dtype or device does not fit.
    """
    check_tensor('x', x)
    check_int('num_heads', num_heads, 1)
    if x.dim() != 3 or x.shape[2] < 1 or x.shape[2] % num_heads:
        raise ValueError('x must be (B, N, num_heads * d), got '
                         f'{tuple(x.shape)} with num_heads={num_heads}')
    params = dict(qkv_weight=qkv_weight, qkv_bias=qkv_bias, anchors=anchors,
                  interact_weight=interact_weight,
                  interact_proj=interact_proj, dwc_weight=dwc_weight,
                  dwc_bias=dwc_bias, out_weight=out_weight, out_bias=out_bias)
    optional = ('qkv_bias', 'interact_proj', 'dwc_bias', 'out_bias')
    _check_tensors(
        dict(x=x, **{n: t for n, t in params.items() if n not in optional}),
        {n: params[n] for n in optional}, same_dtype=1 + len(params))
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'x must be float32 or float64, got {x.dtype}; use '
                         'rp_attention_qkv')
    channels = x.shape[2]
    _check_arguments(num_heads, channels // num_heads, anchors,
                     interact_weight, interact_proj, 'representatives',
                     reduction)
    _check_convolution(channels, x.shape[1], hw_shape, dwc_weight, dwc_bias)
    _check_options(interact_residual, scale)
    for name, shape in dict(qkv_weight=(3 * channels, channels),
                            qkv_bias=(3 * channels, ),
                            out_weight=(channels, channels),
                            out_bias=(channels, )).items():
        if params[name] is not None:
            _check_shape(name, params[name], [shape])
    scale = (channels // num_heads)**-0.5 if scale is None else float(scale)
    return library_layer.rp_attention_layer(
        x, list(params.values()), num_heads, hw_shape, reduction,
        interact_residual, scale)


def _check_options(interact_residual: bool, scale: Optional[float]) -> None:
    check_bool('interact_residual', interact_residual)
    if scale is not None:
        check_number('scale', scale)


def _check_tensors(tensors: dict, optional: dict,
                   same_dtype: int = 0) -> None:
    """Floating point, on one device; the first few of one dtype."""
    first_name, first = next(iter(tensors.items()))
    given = {n: t for n, t in optional.items() if t is not None}
    for i, (name, tensor) in enumerate({**tensors, **given}.items()):
        check_tensor(name, tensor)
        if tensor.device != first.device:
            raise ValueError(
                f'{name} is on {tensor.device} but {first_name} on '
                f'{first.device}; move one of them')
        if i < same_dtype and tensor.dtype != first.dtype:
            raise ValueError(
                f'{name} is {tensor.dtype} but {first_name} {first.dtype}; '
                'they must share one dtype')


def _check_arguments(heads: int, dims: int, anchors: Tensor,
                     interact_weight: Tensor,
                     interact_proj: Optional[Tensor], routing: str,
                     reduction: str) -> None:
    channels = heads * dims
    # Not `in (1, heads)`, here and below: torch.compile of torch 2.6 takes a
    # number for unequal to a size that may vary.
    if (anchors.dim() != 3
            or (anchors.shape[0] != 1 and anchors.shape[0] != heads)
            or anchors.shape[1] < 1 or anchors.shape[2] != dims):
        raise ValueError(
            f'anchors must be ({heads}, M, {dims}) or (1, M, {dims}) with M '
            f'at least 1 for {heads} heads of {dims} channels, got '
            f'{tuple(anchors.shape)}')
    square = ((heads, dims, dims), (channels, channels))
    _check_shape('interact_weight', interact_weight,
                 [(3, *s) for s in square])
    if interact_proj is not None:
        _check_shape('interact_proj', interact_proj, square)
    for name, value, allowed in (('routing', routing, ROUTINGS),
                                 ('reduction', reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(
                f'{name} must be one of {allowed}, got {value!r}')


def _check_convolution(channels: int, num_tokens: int,
                       hw_shape: Tuple[int, int],
                       weight: Optional[Tensor],
                       bias: Optional[Tensor]) -> None:
    # Without a convolution, too, since operators take it as two integers.
    height, width = check_pair('hw_shape', hw_shape, 0)
    if weight is None:
        if bias is not None:
            raise ValueError('dwc_bias without dwc_weight; give both')
        return
    size = weight.shape[-1] if weight.dim() else 0
    _check_shape('dwc_weight', weight, [(channels, 1, size, size)])
    if size % 2 == 0:
        raise ValueError(f'dwc_weight must have an odd kernel size, got '
                         f'{size}')
    if bias is not None:
        _check_shape('dwc_bias', bias, [(channels, )])
    if height < 1 or width < 1 or height * width > num_tokens:
        raise ValueError(
            f'hw_shape=({height}, {width}) must be a map of at least one and '
            f'at most N={num_tokens} tokens; without a map leave dwc_weight '
            'out')


def _check_shape(name: str, tensor: Tensor,
                 allowed: Sequence[Tuple[Any, ...]]) -> None:
    for shape in allowed:
        if tuple(tensor.shape) == shape:
            return
    shapes = ' or '.join(str(tuple(s)) for s in allowed)
    raise ValueError(f'{name} must be {shapes}, got {tuple(tensor.shape)}')
