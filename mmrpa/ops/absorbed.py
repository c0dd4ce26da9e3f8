"""The whole layer on the CPU where a head has few representatives.

K is needed in K A^T = x (Wk A^T) and P^T K = (P^T x) Wk alone, Q in
Q K_rep^T = x (Wq K_rep^T), and O enters as O Wo = S (V_rep Wo). With few
representatives the right-hand sides take fewer multiply-adds, see
:func:`absorbs`, and are a few large products: the layer costs hardly more than
its projections alone would. Neither Q nor K nor O exist. V does, for the
convolution, and is the one tensor as large as x that backward is left with.

All that is N x M exists for a band of the map's rows at a time, which stays in
the cache. Weights are laid out as in nn.Linear, y = x W^T + b. All tensors
have one dtype, float32 or float64, in which sums are taken.
"""

from typing import Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .fused import (
    Options,
    Representatives,
    interact,
    interact_backward,
    mean_backward,
    softmax_backward,
)
from .naive import MASS_EPS

# Of the tokens of a band, C channels each. Between 1 and 4 MiB the time hardly
# changes on two cores with 512 KiB of L2 each.
BAND_BYTES = 2 * 2**20
# Images are taken one by one; for smaller ones the calls outweigh the gain.
MIN_TOKENS = 1024


class Weights(NamedTuple):
    """The layer's parameters; C channels are h heads of d."""

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
    dwc: Tensor  # (C, 1, size, size)
    dwc_bias: Optional[Tensor]  # (C)

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
    px: Tensor  # P^T x, (B, h * M, C)


class Band(NamedTuple):
    """Some tokens of an image, and the rows of the map among them."""

    image: int
    tokens: slice
    rows: slice
    num_cls: int

    def of(self, x: Tensor) -> Tensor:
        """The band's part (n, C) of (B, N, C)."""
        return x[self.image, self.tokens]

    def map(self, part: Tensor, width: int) -> Tensor:
        """The rows (1, rows, W, C) among the band's tokens (n, C)."""
        return part[self.num_cls:].unflatten(0, (1, -1, width))

    def whole_map(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """The map (1, H, W, C) of the band's image, from (B, N, C)."""
        num_cls = x.shape[1] - hw_shape[0] * hw_shape[1]
        return x[self.image, num_cls:].unflatten(0, (1, *hw_shape))


class Mixing(NamedTuple):
    """The weights of Distribute that an image's representatives make."""

    logits: Tensor  # (B, h * M, C), of x -> Q K_rep^T
    logits_bias: Tensor  # (B, h * M)
    values: Tensor  # (B, h * M, C), V_rep Wo


def absorbs(num_tokens: int, heads: int, m: int, dims: int) -> bool:
    """Whether this form takes fewer multiply-adds, and few images.

    It saves 2C + 5M - 4hM of them a token and channel, and pays 4MC a channel
    for the weights that it makes of each image's representatives.
    """
    channels = heads * dims
    saved = 2 * channels + 5 * m - 4 * heads * m
    return (num_tokens >= MIN_TOKENS
            and num_tokens * saved > 4 * m * channels)


def bands(x: Tensor, hw_shape: Tuple[int, int]) -> Iterator[Band]:
    """Cut tokens (B, N, C) into bands of whole rows of the map (H, W).

    The N - H * W tokens in front are in the first band of each image.
    """
    batch, num_tokens, channels = x.shape
    height, width = hw_shape
    num_cls = num_tokens - height * width
    limit = max(1, BAND_BYTES // (x.itemsize * channels))  # tokens
    step = -(-height // min(height, -(-num_tokens // limit)))
    for image in range(batch):
        for top in range(0, height, step):
            bottom = min(top + step, height)
            first = num_cls + top * width if top else 0
            yield Band(image, slice(first, num_cls + bottom * width),
                       slice(top, bottom), 0 if top else num_cls)


def forward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
            options: Options) -> Tuple[Tensor, Kept]:
    """The layer's output (B, N, C) for contiguous tokens x (B, N, C).

    Args:
        x (Tensor): (B, N, C), N at least 1; the N - H * W tokens in front take
            no part in the convolution.
        w (Weights): The parameters.
        hw_shape (tuple[int, int]): (H, W) of the map.
        options (Options): ``routing`` has to be ``'representatives'``.

    Returns:
        tuple[Tensor, Kept]: The output, and what backward wants to have kept.
    """
    kept = _gather(x, w, hw_shape, options)
    v_rep = interact(kept.reps.z, w.interact, w.interact_proj,
                     options.residual).v_rep
    return _distribute(x, w, hw_shape, kept, v_rep, options.scale), kept


def _softmax(logits: Tensor, m: int) -> Tensor:
    """Softmax of (n, h * M) over each head's M."""
    return logits.view(-1, m).softmax(-1).view(logits.shape)


def _softmax_backward(p: Tensor, grad: Tensor, m: int) -> Tensor:
    return softmax_backward(p.view(-1, m), grad.view(-1, m)).view(p.shape)


def _routing_weights(w: Weights) -> Tuple[Tensor, Tensor]:
    """The weight (h * M, C) and bias (h * M) of x -> K A^T."""
    return (torch.bmm(w.anchors, w.heads(w.k)).flatten(0, 1),
            torch.bmm(w.anchors, w.heads(w.k_bias)).flatten())


def _gather(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
            options: Options) -> Kept:
    heads, m, _ = w.anchors.shape
    weight, bias = _routing_weights(w)
    v = torch.empty_like(x)
    px = x.new_zeros(len(x), heads * m, x.shape[-1])
    mass = x.new_zeros(len(x), heads * m)
    for band in bands(x, hw_shape):
        part = band.of(x)
        torch.addmm(w.v_bias, part, w.v.t(), out=band.of(v))
        p = _softmax(torch.addmm(bias, part, weight.t()), m)
        px[band.image].addmm_(p.t(), part)
        mass[band.image] += p.sum(0)
    mass = mass.unflatten(1, (heads, m))
    by_head = px.unflatten(1, (heads, m))
    k, z = (by_head @ w.heads(weight).mT
            + mass.unsqueeze(-1) * w.heads(bias).mT
            for weight, bias in ((w.k, w.k_bias), (w.v, w.v_bias)))
    if options.reduction == 'mean':
        divisor = mass.clamp(min=MASS_EPS).unsqueeze(-1)
        k, z = k / divisor, z / divisor
    return Kept(v, Representatives(k, z, mass), px)


def _mixing(w: Weights, keys: Tensor, v_rep: Tensor) -> Mixing:
    """From scaled K_rep and V_rep, (B, h, M, d)."""
    return Mixing((keys @ w.heads(w.q)).flatten(1, 2),
                  (keys @ w.heads(w.q_bias)).flatten(1),
                  (v_rep @ w.out_heads).flatten(1, 2))


def _attend(x: Tensor, mixing: Mixing, band: Band, m: int) -> Tensor:
    """A band's attention to its image's representatives, (n, h * M)."""
    return _softmax(
        torch.addmm(mixing.logits_bias[band.image], band.of(x),
                    mixing.logits[band.image].t()), m)


def _convolve(maps: Tensor, w: Weights, band: Band, hw_shape: Tuple[int, int],
              backward: bool = False) -> Tensor:
    """DWC of a band of ``maps`` (B, N, C), or its gradient: (n, C).

    Zeros for tokens outside of the map.
    """
    whole = band.whole_map(maps, hw_shape)
    if backward:
        part = convolution.convolve_input_gradient(whole, w.dwc, band.rows)
    else:
        part = convolution.convolve(whole, w.dwc, w.dwc_bias, band.rows)
    part = part.flatten(0, 2)
    return F.pad(part, (0, 0, band.num_cls, 0)) if band.num_cls else part


def _distribute(x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
                v_rep: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    mixing = _mixing(w, kept.reps.k * scale, v_rep)
    for band in bands(x, hw_shape):
        s = _attend(x, mixing, band, w.anchors.shape[1])
        local = _convolve(kept.v, w, band, hw_shape)
        here = torch.addmm(w.out_bias, local, w.out.t(), out=band.of(out))
        here.addmm_(s, mixing.values[band.image])
    return out


def backward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
             options: Options, kept: Kept, grad_out: Tensor,
             grad: Weights) -> Tensor:
    """The gradient of x (B, N, C); those of the parameters go into ``grad``.

    Args:
        x, w, hw_shape, options: What ``forward`` was given.
        kept (Kept): What it returned.
        grad_out (Tensor): Of its output, contiguous.
        grad (Weights): Zeros in the shapes of ``w``, to be added to.

    Returns:
        Tensor: (B, N, C).
    """
    reps = kept.reps
    done = interact(reps.z, w.interact, w.interact_proj, options.residual)
    grad_x, grad_local = torch.empty_like(x), torch.empty_like(x)
    grad.out_bias.copy_(grad_out.sum((0, 1)))
    grad_keys, grad_v_rep = _distribute_backward(
        x, w, hw_shape, kept, reps.k * options.scale, done.v_rep, grad_out,
        grad, grad_x, grad_local)
    grad_z, grad_interact, grad_proj = interact_backward(
        reps.z, w.interact, w.interact_proj, options.residual, done,
        grad_v_rep)
    grad.interact.copy_(grad_interact)
    if grad_proj is not None:
        grad.interact_proj.copy_(grad_proj)
    grad_k, dot = grad_keys * options.scale, torch.zeros_like(reps.mass)
    if options.reduction == 'mean':
        grad_k, grad_z, dot = mean_backward(reps, grad_k, grad_z)
    _gather_backward(x, w, hw_shape, kept, grad_k, grad_z, dot, grad_local,
                     grad, grad_x)
    return grad_x


def _add_linear(grad_weight: Tensor, grad_bias: Tensor, grad: Tensor,
                x: Tensor) -> None:
    """Add what y = x W^T + b gives W and b, from x and the gradient of y."""
    grad_weight.addmm_(grad.t(), x)
    grad_bias += grad.sum(0)


def _distribute_backward(
        x: Tensor, w: Weights, hw_shape: Tuple[int, int], kept: Kept,
        keys: Tensor, v_rep: Tensor, grad_out: Tensor, grad: Weights,
        grad_x: Tensor, grad_local: Tensor) -> Tuple[Tensor, Tensor]:
    """The gradients of the scaled K_rep and of V_rep, (B, h, M, d).

    Writes that of x as far as Q goes, and that of DWC(V).
    """
    heads, m, _ = w.anchors.shape
    mixing = _mixing(w, keys, v_rep)
    grads = Mixing(*(torch.zeros_like(t) for t in mixing))
    for band in bands(x, hw_shape):
        i, part, grad_part = band.image, band.of(x), band.of(grad_out)
        s = _attend(x, mixing, band, m)
        grad_s = grad_part @ mixing.values[i].t()
        grad_logits = _softmax_backward(s, grad_s, m)
        grads.values[i].addmm_(s.t(), grad_part)
        _add_linear(grads.logits[i], grads.logits_bias[i], grad_logits, part)
        torch.mm(grad_logits, mixing.logits[i], out=band.of(grad_x))
        torch.mm(grad_part, w.out, out=band.of(grad_local))
        local = _convolve(kept.v, w, band, hw_shape)
        grad.out.addmm_(grad_part.t(), local)
    logits, bias, values = (t.unflatten(1, (heads, m)) for t in grads)
    bias = bias.unsqueeze(-1)
    grad.heads(grad.q).add_((keys.mT @ logits).sum(0))
    grad.heads(grad.q_bias).add_((keys.mT @ bias).sum(0))
    grad.out_heads.add_((v_rep.mT @ values).sum(0))
    return (logits @ w.heads(w.q).mT + bias @ w.heads(w.q_bias).mT,
            values @ w.out_heads.mT)


def _gather_backward(x: Tensor, w: Weights, hw_shape: Tuple[int, int],
                     kept: Kept, grad_k: Tensor, grad_z: Tensor, dot: Tensor,
                     grad_local: Tensor, grad: Weights,
                     grad_x: Tensor) -> None:
    """Add the gradients of x and of the parameters; see fused.py.

    From those of the sums P^T K and P^T V, (B, h, M, d), and minus that of
    the mass (B, h, M).
    """
    heads, m, _ = w.anchors.shape
    weight, bias = _routing_weights(w)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    # dP[n, m] = x_n . grad_px[m] + offset[m], with K and V written out.
    grad_px = (grad_k @ w.heads(w.k) + grad_z @ w.heads(w.v)).flatten(1, 2)
    offset = (grad_k @ w.heads(w.k_bias) + grad_z @ w.heads(w.v_bias)
              ).squeeze(-1).sub_(dot).flatten(1)
    for band in bands(x, hw_shape):
        i, part = band.image, band.of(x)
        p = _softmax(torch.addmm(bias, part, weight.t()), m)
        grad_p = torch.addmm(offset[i], part, grad_px[i].t())
        grad_logits = _softmax_backward(p, grad_p, m)
        _add_linear(grad_weight, grad_bias, grad_logits, part)
        grad_v = _convolve(grad_local, w, band, hw_shape, backward=True)
        _add_linear(grad.v, grad.v_bias, grad_v, part)
        _kernel_gradient(kept.v, grad_local, band, hw_shape, grad)
        band.of(grad_x).addmm_(p, grad_px[i]).addmm_(
            grad_logits, weight).addmm_(grad_v, w.v)
    grad_weight = grad_weight.unflatten(0, (heads, m))
    grad_bias = grad_bias.view(heads, m, 1)
    grad.anchors.copy_(grad_weight @ w.heads(w.k).mT
                       + grad_bias @ w.heads(w.k_bias).mT)
    grad.heads(grad.k).add_(w.anchors.mT @ grad_weight)
    grad.heads(grad.k_bias).add_(w.anchors.mT @ grad_bias)
    px = kept.px.unflatten(1, (heads, m))
    mass = kept.reps.mass.unsqueeze(-1)
    for grad_sum, of_weight, of_bias in (
            (grad_k, grad.k, grad.k_bias), (grad_z, grad.v, grad.v_bias)):
        grad.heads(of_weight).add_((grad_sum.mT @ px).sum(0))
        grad.heads(of_bias).add_((grad_sum.mT @ mass).sum(0))


def _kernel_gradient(v: Tensor, grad_local: Tensor, band: Band,
                     hw_shape: Tuple[int, int], grad: Weights) -> None:
    grads = convolution.kernel_gradient(
        band.whole_map(v, hw_shape),
        band.map(band.of(grad_local), hw_shape[1]), grad.dwc,
        grad.dwc_bias is not None, band.rows)
    grad.dwc.add_(grads[0])
    if grad.dwc_bias is not None:
        grad.dwc_bias.add_(grads[1])
