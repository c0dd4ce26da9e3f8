"""The whole layer on the CPU: RPAttention with its projections.

Two things make it faster than ``fused.py`` between two Linear layers.

**Bands.** Q, K, the N x M matrices and the gradients of Q, K and V exist for
a band of the map's rows at a time, which stays in the cache; of all tensors as
large as the input only V is kept for backward.

**Association.** K is needed in K A^T = x (Wk A^T) and P^T K = (P^T x) Wk
alone, Q in Q K_rep^T = x (Wq K_rep^T), and O Wo = S (V_rep Wo). A head with few
representatives is cheaper on the right-hand sides, in which neither Q nor K
nor O exist; see :func:`absorbs`.

Weights are laid out as in nn.Linear, y = x W^T + b. All tensors have one
dtype, float32 or float64, in which sums are taken.
"""

from typing import Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import shifts
from .fused import (
    Options,
    Representatives,
    interact_backward,
    mean_backward,
    softmax_backward,
)
from .naive import MASS_EPS, interact

# Of a band's tokens, C channels each. Between 1 and 4 MiB the time hardly
# changes on two cores with 512 KiB of L2 each; the calls tell below, memory
# above.
BAND_BYTES = 2 * 2**20


class Weights(NamedTuple):
    """The layer's parameters, heads apart: C channels are h heads of d."""

    q: Tensor  # (C, C), as k, v and out
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor  # (C), as the others; zeros where there is none
    k_bias: Tensor
    v_bias: Tensor
    out_bias: Tensor
    anchors: Tensor  # (h, M, d)
    interact: Tensor  # (3, h, d, d) or (3, C, C)
    interact_proj: Optional[Tensor]
    taps: Optional[Tensor]  # (size * size, C)
    taps_bias: Optional[Tensor]  # (C)

    def heads(self, weight: Tensor) -> Tensor:
        """Rows of (C, C) or (C) by head: (h, d, C) or (h, d, 1)."""
        heads, _, dims = self.anchors.shape
        return weight.view(heads, dims, -1)

    @property
    def out_heads(self) -> Tensor:
        """Columns of the output projection by head, (h, d, C)."""
        return self.heads(self.out.t())


class Kept(NamedTuple):
    """What backward wants beside the inputs."""

    v: Tensor  # (B, N, C)
    reps: Representatives
    px: Tensor  # P^T x, (B, h * M, C); empty where K is not absorbed


class Band(NamedTuple):
    """Images, tokens of each and the rows of the map among them."""

    images: slice
    tokens: slice
    rows: slice
    num_cls: int

    def of(self, x: Tensor) -> Tensor:
        """The band's part of (B, N, ...), contiguous where x is."""
        return x[self.images, self.tokens]

    def flat(self, x: Tensor) -> Tensor:
        """The same, images and tokens in one: (b * n, C)."""
        return self.of(x).view(-1, x.shape[-1])

    def map(self, part: Tensor, width: int) -> Tensor:
        """The rows (b, rows, W, C) among the band's tokens (b, n, C)."""
        return part[:, self.num_cls:].unflatten(1, (-1, width))


def absorbs(num_tokens: int, heads: int, m: int, dims: int) -> bool:
    """Whether the absorbed form takes fewer multiply-adds an image.

    It saves 2C + 5M - 4hM of them a token and channel, and pays 4MC a channel
    for the weights that it makes of each image's representatives.
    """
    channels = heads * dims
    saved = 2 * channels + 5 * m - 4 * heads * m
    return num_tokens * saved > 4 * m * channels


def bands(x: Tensor, hw_shape: Tuple[int, int]) -> Iterator[Band]:
    """Cut tokens (B, N, C) into bands of rows, or of several small images."""
    batch, num_tokens, channels = x.shape
    height, width = hw_shape
    num_cls = num_tokens - height * width
    limit = max(1, BAND_BYTES // (x.itemsize * channels))  # tokens
    images = max(1, limit // num_tokens)
    cuts = min(height, -(-num_tokens // limit))
    step = -(-height // cuts)
    for first in range(0, batch, images):
        for top in range(0, height, step):
            bottom = min(top + step, height)
            yield Band(
                slice(first, min(first + images, batch)),
                slice(num_cls + top * width if top else 0,
                      num_cls + bottom * width), slice(top, bottom),
                0 if top else num_cls)


def forward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
            options: Options) -> Tuple[Tensor, Kept]:
    """The layer's output (B, N, C) for contiguous tokens x (B, N, C).

    Args:
        x (Tensor): (B, N, C), not empty; the N - H * W tokens in front take
            no part in the convolution.
        w (Weights): The parameters.
        hw_shape (tuple[int, int]): (H, W) of the map.
        options (Options): ``routing`` has to be ``'representatives'``.
    """
    heads, m, dims = w.anchors.shape
    if absorbs(x.shape[1], heads, m, dims):
        kept = _gather_absorbed(x, w, hw_shape, options)
        distribute = _distribute_absorbed
    else:
        kept = _gather(x, w, hw_shape, options)
        distribute = _distribute
    v_rep = interact(kept.reps.z, w.interact, w.interact_proj,
                     options.residual)
    return distribute(x, w, hw_shape, kept, v_rep, options.scale), kept


def _split(x: Tensor, band_images: int, heads: int) -> Tensor:
    """Flat tokens (b * n, C) by image and head, (b * h, n, d)."""
    x = x.view(band_images, -1, heads, x.shape[-1] // heads).transpose(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _join(rows: Tensor, like: Tensor, heads: int) -> Tensor:
    """Rows (b * h, n, d) side by side again, in the shape of (b, n, C)."""
    rows = rows.unflatten(0, (like.shape[0], heads)).transpose(1, 2)
    return rows.reshape(like.shape)


def _flat_heads(x: Tensor, images: slice) -> Tensor:
    """Matrices (B, h, M, d) of some images, (b * h, M, d)."""
    return x[images].flatten(0, 1)


def _softmax(logits: Tensor, m: int) -> Tensor:
    """Softmax of (..., h * M) over each head's M."""
    return logits.view(-1, m).softmax(-1).view(logits.shape)


def _mean(k: Tensor, z: Tensor, mass: Tensor,
          options: Options) -> Representatives:
    if options.reduction == 'mean':
        divisor = mass.clamp(min=MASS_EPS).unsqueeze(-1)
        k, z = k / divisor, z / divisor
    return Representatives(k, z, mass)


def _gather(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
            options: Options) -> Kept:
    heads, m, dims = w.anchors.shape
    v = torch.empty_like(x)
    k_sum, z_sum = (x.new_zeros(len(x), heads, m, dims) for _ in range(2))
    mass = x.new_zeros(len(x), heads, m)
    for band in bands(x, hw_shape):
        flat, images = band.flat(x), len(band.of(x))
        k = _split(torch.addmm(w.k_bias, flat, w.k.t()), images, heads)
        v_flat = torch.addmm(w.v_bias, flat, w.v.t(), out=band.flat(v))
        p = _route(k, w.anchors)
        p_t = p.transpose(1, 2)
        _flat_heads(k_sum, band.images).baddbmm_(p_t, k)
        _flat_heads(z_sum, band.images).baddbmm_(
            p_t, _split(v_flat, images, heads))
        mass[band.images] += p.sum(1).view(images, heads, m)
    return Kept(v, _mean(k_sum, z_sum, mass, options), x.new_empty(0))


def _route(k: Tensor, anchors: Tensor) -> Tensor:
    """The routing of (b * h, n, d), (b * h, n, M)."""
    anchors = anchors.mT.expand(len(k) // len(anchors), -1, -1, -1)
    return torch.bmm(k, anchors.flatten(0, 1)).softmax(-1)


def _absorbed_anchors(w: Weights) -> Tuple[Tensor, Tensor]:
    """The weight (h * M, C) and bias (h * M) of x -> K A^T."""
    return (torch.bmm(w.anchors, w.heads(w.k)).flatten(0, 1),
            torch.bmm(w.anchors, w.heads(w.k_bias)).flatten())


def _gather_absorbed(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
                     options: Options) -> Kept:
    heads, m, _ = w.anchors.shape
    weight, bias = _absorbed_anchors(w)
    v = torch.empty_like(x)
    px = x.new_zeros(len(x), heads * m, x.shape[-1])
    mass = x.new_zeros(len(x), heads * m)
    for band in bands(x, hw_shape):
        flat, part = band.flat(x), band.of(x)
        torch.addmm(w.v_bias, flat, w.v.t(), out=band.flat(v))
        p = _softmax(torch.addmm(bias, flat, weight.t()), m)
        p = p.view(*part.shape[:2], -1)
        px[band.images].baddbmm_(p.mT, part)
        mass[band.images] += p.sum(1)
    mass = mass.unflatten(1, (heads, m))
    by_head = px.unflatten(1, (heads, m))
    sums = [by_head @ w.heads(weight).mT
            + mass.unsqueeze(-1) * w.heads(bias).mT
            for weight, bias in ((w.k, w.k_bias), (w.v, w.v_bias))]
    return Kept(v, _mean(*sums, mass, options), px)


def _convolve(w: Weights, v: Tensor, band: Band, hw_shape: Tuple[int, int]
              ) -> Tensor:
    """DWC(V) of a band, (b, n, C); zeros for tokens outside of the map."""
    part = band.of(v)
    if w.taps is None:
        return torch.zeros_like(part)
    out = torch.empty_like(part)
    out[:, :band.num_cls] = 0
    maps = _maps(v, hw_shape)[band.images]
    shifts.convolve(maps, w.taps, w.taps_bias, band.rows,
                    band.map(out, hw_shape[1]))
    return out


def _maps(x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
    """The map (B, H, W, C) among tokens (B, N, C)."""
    num_cls = x.shape[1] - hw_shape[0] * hw_shape[1]
    return x[:, num_cls:].unflatten(1, hw_shape)


def _distribute(x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
                v_rep: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    keys = kept.reps.k * scale
    for band in bands(x, hw_shape):
        mixed, *_ = _attend(x, w, hw_shape, kept, band, keys, v_rep)
        torch.addmm(w.out_bias, mixed.view(-1, x.shape[-1]), w.out.t(),
                    out=band.flat(out))
    return out


def _attend(x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
            band: Band, keys: Tensor, v_rep: Tensor
            ) -> Tuple[Tensor, Tensor, Tensor]:
    """O + DWC(V) of a band (b, n, C), its queries and its attention."""
    heads = len(w.anchors)
    q = torch.addmm(w.q_bias, band.flat(x), w.q.t())
    q = _split(q, len(band.of(x)), heads)
    s = torch.bmm(q, _flat_heads(keys, band.images).mT).softmax(-1)
    o = torch.bmm(s, _flat_heads(v_rep, band.images))
    mixed = _convolve(w, kept.v, band, hw_shape)
    by_head = mixed.unflatten(-1, (heads, -1)).transpose(1, 2)
    by_head += o.view(by_head.shape)
    return mixed, q, s


class Absorbed(NamedTuple):
    """Each image's weights of Distribute, and what they are made of."""

    logits: Tensor  # (B, h * M, C)
    logits_bias: Tensor  # (B, h * M)
    values: Tensor  # (B, h * M, C)


def _absorb_queries(w: Weights, keys: Tensor, v_rep: Tensor) -> Absorbed:
    return Absorbed((keys @ w.heads(w.q)).flatten(1, 2),
                    (keys @ w.heads(w.q_bias)).flatten(1),
                    (v_rep @ w.out_heads).flatten(1, 2))


def _distribute_absorbed(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
                         kept: Kept, v_rep: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    a = _absorb_queries(w, kept.reps.k * scale, v_rep)
    for band in bands(x, hw_shape):
        s = _attend_absorbed(x, a, band, w.anchors.shape[1])
        local = _convolve(w, kept.v, band, hw_shape)
        torch.addmm(w.out_bias, local.view(-1, x.shape[-1]), w.out.t(),
                    out=band.flat(out))
        band.of(out).baddbmm_(s, a.values[band.images])
    return out


def _attend_absorbed(x: Tensor, a: Absorbed, band: Band, m: int) -> Tensor:
    """The attention of a band, (b, n, h * M)."""
    images = band.images
    return _softmax(
        torch.baddbmm(a.logits_bias[images].unsqueeze(1), band.of(x),
                      a.logits[images].mT), m)


def backward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
             options: Options, kept: Kept, grad_out: Tensor,
             grad: Weights) -> Tensor:
    """The gradient of x (B, N, C); those of the parameters go into ``grad``.

    Args:
        x, w, hw_shape, options: What ``forward`` was given.
        kept (Kept): What it returned.
        grad_out (Tensor): Of its output, contiguous.
        grad (Weights): Zeros in the shapes of ``w``, to be added to.
    """
    v_rep = interact(kept.reps.z, w.interact, w.interact_proj,
                     options.residual)
    keys = kept.reps.k * options.scale
    absorbed = kept.px.numel() > 0
    grad_x, grad_mixed = torch.empty_like(x), torch.empty_like(x)
    step = (_distribute_absorbed_backward if absorbed else
            _distribute_backward)
    grad_keys, grad_v_rep = step(x, w, hw_shape, kept, keys, v_rep, grad_out,
                                 grad, grad_x, grad_mixed)
    grad.out_bias.copy_(grad_out.sum((0, 1)))
    grad_z, grad_interact, grad_proj = interact_backward(
        kept.reps.z, w.interact, w.interact_proj, options.residual,
        grad_v_rep)
    grad.interact.copy_(grad_interact)
    if grad_proj is not None:
        grad.interact_proj.copy_(grad_proj)
    grad_k = grad_keys * options.scale
    dot = torch.zeros_like(kept.reps.mass)
    if options.reduction == 'mean':
        grad_k, grad_z, dot = mean_backward(kept.reps, grad_k, grad_z)
    step = _gather_absorbed_backward if absorbed else _gather_backward
    step(x, w, hw_shape, kept, grad_k, grad_z, dot, grad_mixed, grad, grad_x)
    return grad_x


def _distribute_backward(
        x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
        keys: Tensor, v_rep: Tensor, grad_out: Tensor, grad: Weights,
        grad_x: Tensor, grad_mixed: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of the scaled K_rep and of V_rep.

    Writes those of the queries' x and of O + DWC(V).
    """
    heads = len(w.anchors)
    grad_keys, grad_v_rep = torch.zeros_like(keys), torch.zeros_like(v_rep)
    for band in bands(x, hw_shape):
        mixed, q, s = _attend(x, w, hw_shape, kept, band, keys, v_rep)
        grad_flat = band.flat(grad_out)
        grad.out.addmm_(grad_flat.t(), mixed.view(grad_flat.shape))
        grad_o = torch.mm(grad_flat, w.out, out=band.flat(grad_mixed))
        grad_o = _split(grad_o, len(mixed), heads)
        grad_s = torch.bmm(grad_o, _flat_heads(v_rep, band.images).mT)
        grad_logits = softmax_backward(s, grad_s)
        _flat_heads(grad_v_rep, band.images).baddbmm_(s.mT, grad_o)
        _flat_heads(grad_keys, band.images).baddbmm_(grad_logits.mT, q)
        grad_q = torch.bmm(grad_logits, _flat_heads(keys, band.images))
        grad_q = _join(grad_q, mixed, heads).view(grad_flat.shape)
        torch.mm(grad_q, w.q, out=band.flat(grad_x))
        _add_linear(grad.q, grad.q_bias, grad_q, band.flat(x))
    return grad_keys, grad_v_rep


def _add_linear(grad_weight: Tensor, grad_bias: Tensor, grad: Tensor,
                x: Tensor) -> None:
    """Add what y = x W^T + b gives W and b, from flat x and gradient of y."""
    grad_weight.addmm_(grad.t(), x)
    grad_bias += grad.sum(0)


def _softmax_backward(p: Tensor, grad: Tensor, m: int) -> Tensor:
    """As :func:`softmax_backward`, over each head's M of (..., h * M)."""
    return softmax_backward(p.view(-1, m), grad.view(-1, m)).view(p.shape)


def _distribute_absorbed_backward(
        x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
        keys: Tensor, v_rep: Tensor, grad_out: Tensor, grad: Weights,
        grad_x: Tensor, grad_mixed: Tensor) -> Tuple[Tensor, Tensor]:
    """As :func:`_distribute_backward`, where O and Q do not exist."""
    heads, m, _ = w.anchors.shape
    a = _absorb_queries(w, keys, v_rep)
    grad_a = Absorbed(*(torch.zeros_like(t) for t in a))
    for band in bands(x, hw_shape):
        images = band.images
        s = _attend_absorbed(x, a, band, m)
        local = _convolve(w, kept.v, band, hw_shape)
        grad_part, grad_flat = band.of(grad_out), band.flat(grad_out)
        grad.out.addmm_(grad_flat.t(), local.view(grad_flat.shape))
        torch.mm(grad_flat, w.out, out=band.flat(grad_mixed))
        grad_s = torch.bmm(grad_part, a.values[images].mT)
        grad_logits = _softmax_backward(s, grad_s, m)
        grad_a.values[images].baddbmm_(s.mT, grad_part)
        grad_a.logits[images].baddbmm_(grad_logits.mT, band.of(x))
        grad_a.logits_bias[images] += grad_logits.sum(1)
        torch.bmm(grad_logits, a.logits[images], out=band.of(grad_x))
    logits, bias, values = (
        t.unflatten(1, (heads, m)) for t in grad_a)  # (B, h, M, ...)
    bias = bias.unsqueeze(-1)
    grad.heads(grad.q).add_((keys.mT @ logits).sum(0))
    grad.heads(grad.q_bias).add_((keys.mT @ bias).sum(0))
    grad.out_heads.add_((v_rep.mT @ values).sum(0))
    return (logits @ w.heads(w.q).mT + bias @ w.heads(w.q_bias).mT,
            values @ w.out_heads.mT)


def _convolve_backward(w: Weights, v: Tensor, band: Band,
                       hw_shape: Tuple[int, int], grad_mixed: Tensor,
                       grad: Weights) -> Tensor:
    """What DWC gives V's gradient, (b, n, C); adds to that of its kernel."""
    part = band.of(grad_mixed)
    if w.taps is None:
        return torch.zeros_like(part)
    out = torch.empty_like(part)
    out[:, :band.num_cls] = 0
    # A correlation with the same taps, the other way round.
    shifts.convolve(_maps(grad_mixed, hw_shape)[band.images], w.taps.flip(0),
                    None, band.rows, band.map(out, hw_shape[1]))
    rows = band.map(part, hw_shape[1])
    shifts.kernel_gradient(_maps(v, hw_shape)[band.images], rows, band.rows,
                           grad.taps)
    if grad.taps_bias is not None:
        grad.taps_bias.add_(rows.sum((0, 1, 2)))
    return out


def _gather_backward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
                     kept: Kept, grad_k_sum: Tensor, grad_z_sum: Tensor,
                     dot: Tensor, grad_mixed: Tensor, grad: Weights,
                     grad_x: Tensor) -> None:
    """Add the gradients of x and the parameters; see fused.gather_backward.
    """
    heads, m, dims = w.anchors.shape
    grad_anchors = x.new_zeros(len(x), heads, m, dims)
    for band in bands(x, hw_shape):
        flat, images = band.flat(x), len(band.of(x))
        g_k, g_z, offset = (_flat_heads(t, band.images)
                            for t in (grad_k_sum, grad_z_sum, dot))
        k = _split(torch.addmm(w.k_bias, flat, w.k.t()), images, heads)
        v = _split(band.flat(kept.v), images, heads)
        p = _route(k, w.anchors)
        grad_p = torch.baddbmm(-offset.unsqueeze(1), k, g_k.mT)
        grad_logits = softmax_backward(p, grad_p.baddbmm_(v, g_z.mT))
        _flat_heads(grad_anchors, band.images).baddbmm_(grad_logits.mT, k)
        anchors = w.anchors.expand(images, -1, -1, -1).flatten(0, 1)
        grad_k = torch.bmm(p, g_k).baddbmm_(grad_logits, anchors)
        grad_v = _convolve_backward(w, kept.v, band, hw_shape, grad_mixed,
                                    grad)
        grad_v += _join(torch.bmm(p, g_z), grad_v, heads)
        parts = ((_join(grad_k, grad_v, heads), w.k, grad.k, grad.k_bias),
                 (grad_v, w.v, grad.v, grad.v_bias))
        for part, weight, grad_weight, grad_bias in parts:
            part = part.view(flat.shape)
            band.flat(grad_x).addmm_(part, weight)
            _add_linear(grad_weight, grad_bias, part, flat)
    grad.anchors.add_(grad_anchors.sum(0))


def _gather_absorbed_backward(
        x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
        grad_k_sum: Tensor, grad_z_sum: Tensor, dot: Tensor,
        grad_mixed: Tensor, grad: Weights, grad_x: Tensor) -> None:
    """As :func:`_gather_backward`, where K does not exist."""
    heads, m, _ = w.anchors.shape
    weight, bias = _absorbed_anchors(w)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    # Of P^T x, and what the biases and the mass add to that of P.
    grad_px = grad_k_sum @ w.heads(w.k) + grad_z_sum @ w.heads(w.v)
    offset = (grad_k_sum @ w.heads(w.k_bias)
              + grad_z_sum @ w.heads(w.v_bias)).squeeze(-1) - dot
    grad_px, offset = grad_px.flatten(1, 2), offset.flatten(1).unsqueeze(1)
    for band in bands(x, hw_shape):
        flat, part, images = band.flat(x), band.of(x), band.images
        p = _softmax(torch.addmm(bias, flat, weight.t()), m)
        p = p.view(*part.shape[:2], -1)
        grad_p = torch.baddbmm(offset[images], part, grad_px[images].mT)
        grad_logits = _softmax_backward(p, grad_p, m).view(len(flat), -1)
        _add_linear(grad_weight, grad_bias, grad_logits, flat)
        grad_v = _convolve_backward(w, kept.v, band, hw_shape, grad_mixed,
                                    grad).view(flat.shape)
        _add_linear(grad.v, grad.v_bias, grad_v, flat)
        band.of(grad_x).baddbmm_(p, grad_px[images])
        band.flat(grad_x).addmm_(grad_logits, weight).addmm_(grad_v, w.v)
    grad_weight = grad_weight.unflatten(0, (heads, m))
    grad_bias = grad_bias.view(heads, m, 1)
    grad.anchors.add_(grad_weight @ w.heads(w.k).mT
                      + grad_bias @ w.heads(w.k_bias).mT)
    grad.heads(grad.k).add_(w.anchors.mT @ grad_weight)
    grad.heads(grad.k_bias).add_(w.anchors.mT @ grad_bias)
    px = kept.px.unflatten(1, (heads, m))
    mass = kept.reps.mass.unsqueeze(-1)
    for grad_sum, of_weight, of_bias in (
            (grad_k_sum, grad.k, grad.k_bias),
            (grad_z_sum, grad.v, grad.v_bias)):
        grad.heads(of_weight).add_((grad_sum.mT @ px).sum(0))
        grad.heads(of_bias).add_((grad_sum.mT @ mass).sum(0))
