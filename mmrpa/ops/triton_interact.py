"""The Triton kernels of RPAttention between Gather and Distribute.

They add up what the splits of the tokens left and do Interact: one program for
one head of one image, on (B * h, M, d) in float32. What the kernels on tokens
multiply with tokens is in the tokens' dtype. See ``triton_kernels.py``.
"""

import triton
import triton.language as tl

from .triton_kernels import _dot, _logits, _put_rows, _rows

# naive.MASS_EPS; a kernel may only use constants of Triton's own kind.
MASS_EPS = tl.constexpr(1e-6)
# Of Interact's small float32 products: three TF32 products each, which leave
# an error near float32's and run on tensor cores.
EXACT = tl.constexpr('tf32x3')


@triton.jit
def _sum_parts(part_ptr, bh, splits, m, cols, M, D, BLOCK_M: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """The sum over the splits of (B * h, splits, M, d), for one B * h."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    part_ptr += bh.to(tl.int64) * splits * M * D
    for split in range(splits):
        total += _rows(part_ptr + split * M * D, D, m, cols, M, D)
    return total


@triton.jit
def _weights(ptr, i, head, H, cols, D):
    """Wq', Wk' or Wv' (i of 0, 1, 2) of a head, from (3, h, d, d)."""
    return _rows(ptr + (i * H + head) * D * D, D, cols, cols, D, D)


@triton.jit
def finish_kernel(k_part, z_part, mass_part, weight_ptr, k_ptr, z_ptr,
                  mass_ptr, v_rep_ptr, splits, M, D, H, interact_scale,
                  MEAN: tl.constexpr, INTERACT: tl.constexpr,
                  RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Add up Gather's splits, divide by the mass; Interact if INTERACT.

    Grid (B * h, blocks of M); Interact needs all M in one block.
    """
    bh = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    k_rep = _sum_parts(k_part, bh, splits, m, cols, M, D, BLOCK_M, BLOCK_D)
    z = _sum_parts(z_part, bh, splits, m, cols, M, D, BLOCK_M, BLOCK_D)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        mass += tl.load(
            mass_part + (bh * splits + split) * M + m, mask=m < M, other=0.)
    if MEAN:
        divisor = tl.maximum(mass, MASS_EPS)[:, None]
        k_rep = k_rep / divisor
        z = z / divisor
    _put_rows(k_ptr + bh * M * D, D, m, cols, M, D, k_rep)
    _put_rows(z_ptr + bh * M * D, D, m, cols, M, D, z)
    tl.store(mass_ptr + bh * M + m, mass, mask=m < M)
    if INTERACT:
        head = bh % H
        q = _dot(z, _weights(weight_ptr, 0, head, H, cols, D), EXACT)
        k = _dot(z, _weights(weight_ptr, 1, head, H, cols, D), EXACT)
        v = _dot(z, _weights(weight_ptr, 2, head, H, cols, D), EXACT)
        logits = _logits(q * interact_scale, k, 1., m, M, EXACT)
        a = tl.exp(logits - tl.max(logits, 1)[:, None])
        v_rep = _dot(a / tl.sum(a, 1)[:, None], v, EXACT)
        if RESIDUAL:
            v_rep += z
        _put_rows(v_rep_ptr + bh * M * D, D, m, cols, M, D, v_rep)


@triton.jit
def _centre(rep_ptr, out_ptr, unit_ptr, cols, M, D, BLOCK_M: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr):
    """Store one head's centred rows and their unit; returns the mean."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(BLOCKS):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        total += tl.sum(_rows(rep_ptr, D, m, cols, M, D), 0)
    mean = total / M
    top = tl.zeros([BLOCK_D], tl.float32)
    for i in range(BLOCKS):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        rest = _rows(rep_ptr, D, m, cols, M, D) - mean[None, :]
        rest = tl.where(m[:, None] < M, tl.abs(rest), 0.)
        top = tl.maximum(top, tl.max(rest, 0))
    unit = tl.max(top, 0)
    unit = tl.where(unit > 0, unit, 1.)
    for i in range(BLOCKS):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        rest = _rows(rep_ptr, D, m, cols, M, D) - mean[None, :]
        _put_rows(out_ptr, D, m, cols, M, D, rest / unit)
    tl.store(unit_ptr, unit)
    return mean


@triton.jit
def centre_kernel(k_rep_ptr, v_rep_ptr, keys_ptr, values_ptr, units_ptr,
                  v_mean_ptr, M, D, BLOCK_M: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr):
    """K_rep and V_rep as Distribute reads them; see ``triton_kernels``.

    Grid (B * h). Writes both less their means over M and over the largest
    number of what is left, which is a unit (B * h, 2), and V_rep's mean
    (B * h, d).
    """
    bh = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    _centre(k_rep_ptr + bh * M * D, keys_ptr + bh * M * D, units_ptr + 2 * bh,
            cols, M, D, BLOCK_M, BLOCK_D, BLOCKS)
    mean = _centre(v_rep_ptr + bh * M * D, values_ptr + bh * M * D,
                   units_ptr + 2 * bh + 1, cols, M, D, BLOCK_M, BLOCK_D,
                   BLOCKS)
    tl.store(v_mean_ptr + bh * D + cols, mean, mask=cols < D)


@triton.jit
def interact_backward_kernel(keys_part, values_part, weight_ptr, k_ptr, z_ptr,
                             mass_ptr, grad_k_ptr, grad_z_ptr, offset_ptr,
                             unit_ptr, grad_weight_ptr, splits, M, D, H,
                             scale, interact_scale, MEAN: tl.constexpr,
                             RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_D: tl.constexpr):
    """From Distribute's backward to what Gather's wants, through Interact.

    Grid (B * h), all M in one block. Writes G_k and G_z, in the tokens' dtype,
    and the offset of ``fused.gather_backward``, divided by ``unit`` (B * h, M)
    each; and the weights' gradients (B * h, 3, d, d).
    """
    bh = tl.program_id(0)
    head = bh % H
    m, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    grad_k = scale * _sum_parts(keys_part, bh, splits, m, cols, M, D, BLOCK_M,
                                BLOCK_D)
    grad_v_rep = _sum_parts(values_part, bh, splits, m, cols, M, D, BLOCK_M,
                            BLOCK_D)
    k_rep = _rows(k_ptr + bh * M * D, D, m, cols, M, D)
    z = _rows(z_ptr + bh * M * D, D, m, cols, M, D)
    w_q = _weights(weight_ptr, 0, head, H, cols, D)
    w_k = _weights(weight_ptr, 1, head, H, cols, D)
    w_v = _weights(weight_ptr, 2, head, H, cols, D)
    q = _dot(z, w_q, EXACT)
    k = _dot(z, w_k, EXACT)
    v = _dot(z, w_v, EXACT)
    # Scaled before: q itself, an operand below, would take more shared memory.
    logits = _logits(q * interact_scale, k, 1., m, M, EXACT)
    a = tl.exp(logits - tl.max(logits, 1)[:, None])
    a = a / tl.sum(a, 1)[:, None]
    grad_a = _dot(grad_v_rep, tl.trans(v), EXACT)
    grad_logits = a * (grad_a - tl.sum(a * grad_a, 1)[:, None])
    grad_logits = grad_logits * interact_scale
    # Rows past M are of no representative: grad_v_rep is 0 there, so they add
    # nothing.
    grad_q = _dot(grad_logits, k, EXACT)
    grad_key = _dot(tl.trans(grad_logits), q, EXACT)
    grad_v = _dot(tl.trans(a), grad_v_rep, EXACT)
    grad_z = _dot(grad_q, tl.trans(w_q), EXACT)
    grad_z += _dot(grad_key, tl.trans(w_k), EXACT)
    grad_z += _dot(grad_v, tl.trans(w_v), EXACT)
    if RESIDUAL:
        grad_z += grad_v_rep
    z_t = tl.trans(z)
    grad_weight_ptr += bh * 3 * D * D
    _put_rows(grad_weight_ptr, D, cols, cols, D, D,
              _dot(z_t, grad_q, EXACT))
    _put_rows(grad_weight_ptr + D * D, D, cols, cols, D, D,
              _dot(z_t, grad_key, EXACT))
    _put_rows(grad_weight_ptr + 2 * D * D, D, cols, cols, D, D,
              _dot(z_t, grad_v, EXACT))
    if MEAN:
        mass = tl.load(mass_ptr + bh * M + m, mask=m < M, other=1.)
        divisor = tl.maximum(mass, MASS_EPS)[:, None]
        grad_k = grad_k / divisor
        grad_z = grad_z / divisor
    unit = tl.maximum(tl.max(tl.abs(grad_k), 1), tl.max(tl.abs(grad_z), 1))
    unit = tl.where(unit > 0, unit, 1.)
    dtype = grad_k_ptr.dtype.element_ty
    grad_k = (grad_k / unit[:, None]).to(dtype).to(tl.float32)
    grad_z = (grad_z / unit[:, None]).to(dtype).to(tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    if MEAN:
        # Of what is stored: to cancel, what tokens and representatives have in
        # common must meet the same half numbers in both of Gather's terms.
        offset = tl.sum(k_rep * grad_k + z * grad_z, 1)
        offset = tl.where(mass >= MASS_EPS, offset, 0.)
    _put_rows(grad_k_ptr + bh * M * D, D, m, cols, M, D, grad_k)
    _put_rows(grad_z_ptr + bh * M * D, D, m, cols, M, D, grad_z)
    tl.store(offset_ptr + bh * M + m, offset, mask=m < M)
    tl.store(unit_ptr + bh * M + m, unit, mask=m < M)
