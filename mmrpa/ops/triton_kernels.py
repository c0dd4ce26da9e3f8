"""The Triton kernels of RPAttention that go over the tokens.

Tensors of tokens are (B, N, h, d) with any strides but 1 over d; those of
representatives are contiguous, (B * h, M, d) in float32, or in the tokens'
dtype if they are an operand of products with tokens. A program works on
one head of one image; ``BLOCK_*`` are powers of two of at least 16, and masks
cover the rest. Products take their operands in the tokens' dtype and add up in
float32.

Distribute gets K_rep and V_rep less their means over M, over the largest
number of what is left (``triton_interact.centre_kernel``). No softmax over M
and no gradient of one changes by the mean, and the output gets V_rep's again
in float32. So it is what tells representatives apart that is rounded to the
tokens' dtype. These are means over many tokens, and can differ by less than a
half number's rounding.

M may take several blocks. The softmaxes run over all of them, so a program
that sums for one block goes over the others once for the softmax's total.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(ptr, stride, rows, cols, num_rows, num_cols):
    """Rows and columns of a matrix with unit column stride; 0 outside."""
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    return tl.load(
        ptr + rows[:, None].to(tl.int64) * stride + cols[None, :],
        mask=mask,
        other=0.)


@triton.jit
def _put_rows(ptr, stride, rows, cols, num_rows, num_cols, x):
    """Store what ``_rows`` would load."""
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    tl.store(
        ptr + rows[:, None].to(tl.int64) * stride + cols[None, :],
        x.to(ptr.dtype.element_ty),
        mask=mask)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """A product, added up in float32."""
    if PRECISION == 'upcast':
        # For the interpreter, which multiplies the bits of bfloat16.
        return tl.dot(
            a.to(tl.float32), b.to(tl.float32), input_precision='ieee')
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _into_range(a, dtype: tl.constexpr):
    """Float32 a in a dtype, and what each row was divided by: 1, or in float16
    its largest number.

    A routing's weights of one representative may all be 1e-8, and gradients
    are of sums over a mass, which may be 1e-6 or all tokens: further apart
    than float16's numbers, not than bfloat16's.
    """
    if dtype == tl.float16:
        top = tl.max(tl.abs(a), 1)
        top = tl.where(top > 0, top, 1.)
        return (a / top[:, None]).to(dtype), top
    else:
        return a.to(dtype), tl.full([a.shape[0]], 1., tl.float32)


@triton.jit
def _scaled_dot(a, b, PRECISION: tl.constexpr):
    """``_dot`` of a in float32."""
    a, top = _into_range(a, b.dtype)
    return _dot(a, b, PRECISION) * top[:, None]


@triton.jit
def _logits(x, mat, scale, m, M, PRECISION: tl.constexpr):
    """scale * x mat^T, -inf where there is no such representative."""
    logits = _dot(x, tl.trans(mat), PRECISION) * scale
    return tl.where(m[None, :] < M, logits, float('-inf'))


@triton.jit
def _softmax_total(x, mat_ptr, scale, cols, M, D, BLOCK_N: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Maximum, and sum of exp above it, of each row's logits over all M."""
    top = tl.full([BLOCK_N], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in range(BLOCKS):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        mat = _rows(mat_ptr, D, m, cols, M, D).to(x.dtype)
        logits = _logits(x, mat, scale, m, M, PRECISION)
        new = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - new) + tl.sum(
            tl.exp(logits - new[:, None]), 1)
        top = new
    return top, total


@triton.jit
def gather_kernel(k_ptr, v_ptr, anchors_ptr, k_part, z_part, mass_part, k_sb,
                  k_sn, k_sh, v_sb, v_sn, v_sh, anchors_sh, N, M, D, H,
                  split_tokens, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Sums of P^T K, P^T V and P over the tokens of one split.

    Grid (splits, B * h, blocks of M). Writes (B * h, splits, M, d) twice and
    (B * h, splits, M).
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    k_ptr += batch * k_sb + head * k_sh
    v_ptr += batch * v_sb + head * v_sh
    anchors_ptr += head * anchors_sh
    cols = tl.arange(0, BLOCK_D)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    anchors = _rows(anchors_ptr, D, m, cols, M, D).to(k_ptr.dtype.element_ty)
    k_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    z_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, k_sn, n, cols, N, D)
        v = _rows(v_ptr, v_sn, n, cols, N, D)
        logits = _logits(k, anchors, 1., m, M, PRECISION)
        if BLOCKS == 1:
            top = tl.max(logits, 1)
            p = tl.exp(logits - top[:, None])
            p = p / tl.sum(p, 1)[:, None]
        else:
            top, total = _softmax_total(k, anchors_ptr, 1., cols, M, D,
                                        BLOCK_N, BLOCK_M, BLOCKS, PRECISION)
            p = tl.exp(logits - top[:, None]) / total[:, None]
        p = tl.where(n[:, None] < N, p, 0.)
        p_t, top_p = _into_range(tl.trans(p), k.dtype)
        k_sum += _dot(p_t, k, PRECISION) * top_p[:, None]
        z_sum += _dot(p_t, v, PRECISION) * top_p[:, None]
        # Of the rounded weights, so that the mean's weights add up to 1.
        mass += tl.sum(p_t.to(tl.float32), 1) * top_p
    part = bh.to(tl.int64) * splits + split
    _put_rows(k_part + part * M * D, D, m, cols, M, D, k_sum)
    _put_rows(z_part + part * M * D, D, m, cols, M, D, z_sum)
    tl.store(mass_part + part * M + m, mass, mask=m < M)


@triton.jit
def _neighbours(ptr, stride, n, dy, dx, num_cls, height, width, cols, D):
    """Rows of the tokens dy below and dx right of tokens n; 0 outside."""
    y = (n - num_cls) // width + dy
    x = (n - num_cls) % width + dx
    inside = (n >= num_cls) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rows = num_cls + y * width + x
    return tl.load(
        ptr + rows[:, None].to(tl.int64) * stride + cols[None, :],
        mask=inside[:, None] & (cols[None, :] < D),
        other=0.).to(tl.float32)


@triton.jit
def _tap(ptr, channels, D_mask, tap, TAPS: tl.constexpr):
    """The weight of one tap for a head's channels, from (C, 1, K, K)."""
    return tl.load(
        ptr + channels * TAPS + tap, mask=D_mask, other=0.).to(tl.float32)


@triton.jit
def distribute_kernel(q_ptr, keys_ptr, values_ptr, units_ptr, v_mean_ptr,
                      v_ptr, dwc_weight, dwc_bias, out_ptr, q_sb, q_sn, q_sh,
                      v_sb, v_sn, v_sh, out_sb, out_sn, out_sh, scale, N, M, D,
                      H, height, width, KERNEL: tl.constexpr,
                      BIAS: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
                      PRECISION: tl.constexpr):
    """softmax(Q K_rep^T) V_rep, plus the convolution of V if KERNEL.

    Grid (blocks of N, B * h). Keys and values are what ``centre_kernel`` made
    of K_rep and V_rep.
    """
    bh = tl.program_id(1)
    batch, head = (bh // H).to(tl.int64), bh % H
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    q = _rows(q_ptr + batch * q_sb + head * q_sh, q_sn, n, cols, N, D)
    keys_ptr += bh * M * D
    values_ptr += bh * M * D
    scale *= tl.load(units_ptr + 2 * bh)
    top = tl.full([BLOCK_N], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(BLOCKS):
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        keys = _rows(keys_ptr, D, m, cols, M, D)
        values = _rows(values_ptr, D, m, cols, M, D)
        logits = _logits(q, keys, scale, m, M, PRECISION)
        new = tl.maximum(top, tl.max(logits, 1))
        s = tl.exp(logits - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(s, 1)
        out = out * shrink[:, None] + _dot(s.to(q.dtype), values, PRECISION)
        top = new
    v_mean = tl.load(v_mean_ptr + bh * D + cols, mask=cols < D, other=0.)
    v_unit = tl.load(units_ptr + 2 * bh + 1)
    out = out * v_unit / total[:, None] + v_mean[None, :]
    if KERNEL > 0:
        num_cls = N - height * width
        v_ptr += batch * v_sb + head * v_sh
        channels = head * D + cols
        for tap in tl.static_range(KERNEL * KERNEL):
            out += _neighbours(
                v_ptr, v_sn, n, tap // KERNEL - KERNEL // 2,
                tap % KERNEL - KERNEL // 2, num_cls, height, width, cols,
                D) * _tap(dwc_weight, channels, cols < D, tap,
                          KERNEL * KERNEL)[None, :]
        if BIAS:
            bias = _tap(dwc_bias, channels, cols < D, 0, 1)
            out += tl.where(n[:, None] >= num_cls, bias[None, :], 0.)
    _put_rows(out_ptr + batch * out_sb + head * out_sh, out_sn, n, cols, N, D,
              out)


@triton.jit
def distribute_backward_kernel(
        q_ptr, keys_ptr, values_ptr, units_ptr, grad_ptr, grad_q_ptr,
        keys_part, values_part, q_sb, q_sn, q_sh, grad_sb, grad_sn, grad_sh,
        grad_q_sb, grad_q_sn, grad_q_sh, scale, N, M, D, H, split_tokens,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of Q, and one split's part of those of K_rep and V_rep.

    Grid (splits, B * h, blocks of M). Keys and values are those of
    ``distribute_kernel``; ``keys_part`` is of scale * K_rep. The programs of
    the first block of M write the gradient of Q.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    bh, block = tl.program_id(1), tl.program_id(2)
    batch, head = (bh // H).to(tl.int64), bh % H
    q_ptr += batch * q_sb + head * q_sh
    grad_ptr += batch * grad_sb + head * grad_sh
    grad_q_ptr += batch * grad_q_sb + head * grad_q_sh
    keys_ptr += bh * M * D
    values_ptr += bh * M * D
    scale *= tl.load(units_ptr + 2 * bh)
    v_unit = tl.load(units_ptr + 2 * bh + 1)
    cols = tl.arange(0, BLOCK_D)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = q_ptr.dtype.element_ty
    keys = _rows(keys_ptr, D, m, cols, M, D)
    values = _rows(values_ptr, D, m, cols, M, D)
    keys_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    values_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q = _rows(q_ptr, q_sn, n, cols, N, D)
        # Rows past the end are zeros here, so they add nothing below.
        grad = _rows(grad_ptr, grad_sn, n, cols, N, D)
        logits = _logits(q, keys, scale, m, M, PRECISION)
        grad_s = _dot(grad, tl.trans(values), PRECISION) * v_unit
        if BLOCKS == 1:
            s = tl.exp(logits - tl.max(logits, 1)[:, None])
            s = s / tl.sum(s, 1)[:, None]
            mean = tl.sum(s * grad_s, 1)
        else:
            top, total = _softmax_total(q, keys_ptr, scale, cols, M, D,
                                        BLOCK_N, BLOCK_M, BLOCKS, PRECISION)
            s = tl.exp(logits - top[:, None]) / total[:, None]
            mean = tl.zeros([BLOCK_N], tl.float32)
            for i in range(BLOCKS):
                other = i * BLOCK_M + tl.arange(0, BLOCK_M)
                k_i = _rows(keys_ptr, D, other, cols, M, D)
                v_i = _rows(values_ptr, D, other, cols, M, D)
                s_i = tl.exp(_logits(q, k_i, scale, other, M, PRECISION) -
                             top[:, None])
                mean += tl.sum(
                    s_i * _dot(grad, tl.trans(v_i), PRECISION), 1)
            mean = mean * v_unit / total
        grad_logits = s * (grad_s - mean[:, None])
        keys_sum += _scaled_dot(tl.trans(grad_logits), q, PRECISION)
        values_sum += _dot(tl.trans(s.to(dtype)), grad, PRECISION)
        if block == 0:
            grad_q = _scaled_dot(grad_logits, keys, PRECISION)
            if BLOCKS > 1:
                for i in range(1, BLOCKS):
                    other = i * BLOCK_M + tl.arange(0, BLOCK_M)
                    k_i = _rows(keys_ptr, D, other, cols, M, D)
                    v_i = _rows(values_ptr, D, other, cols, M, D)
                    s_i = tl.exp(_logits(q, k_i, scale, other, M, PRECISION) -
                                 top[:, None]) / total[:, None]
                    grad_s_i = _dot(grad, tl.trans(v_i), PRECISION) * v_unit
                    grad_logits_i = s_i * (grad_s_i - mean[:, None])
                    grad_q += _scaled_dot(grad_logits_i, k_i, PRECISION)
            _put_rows(grad_q_ptr, grad_q_sn, n, cols, N, D, grad_q * scale)
    part = bh.to(tl.int64) * splits + split
    _put_rows(keys_part + part * M * D, D, m, cols, M, D, keys_sum)
    _put_rows(values_part + part * M * D, D, m, cols, M, D, values_sum)


@triton.jit
def gather_backward_kernel(
        k_ptr, v_ptr, anchors_ptr, g_k_ptr, g_z_ptr, offset_ptr, unit_ptr,
        grad_ptr, dwc_weight, grad_k_ptr, grad_v_ptr, anchors_part, dwc_part,
        k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, anchors_sh, grad_sb, grad_sn,
        grad_sh, grad_k_sb, grad_k_sn, grad_k_sh, grad_v_sb, grad_v_sn,
        grad_v_sh, N, M, D, H, height, width, split_tokens,
        KERNEL: tl.constexpr, BLOCK_TAPS: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of K and V, one split's part of the anchors' and of DWC's.

    Grid (splits, B * h, blocks of M). The programs of the first block of M
    write those of K and V, with the convolution's, whose weights' part is
    (B * h, splits, KERNEL * KERNEL + 1, d), the last row the bias's.

    G_k, G_z and the offset are divided by ``unit`` (B * h, M), the largest
    number of each representative's.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    bh, block = tl.program_id(1), tl.program_id(2)
    batch, head = (bh // H).to(tl.int64), bh % H
    k_ptr += batch * k_sb + head * k_sh
    v_ptr += batch * v_sb + head * v_sh
    grad_ptr += batch * grad_sb + head * grad_sh
    grad_k_ptr += batch * grad_k_sb + head * grad_k_sh
    grad_v_ptr += batch * grad_v_sb + head * grad_v_sh
    anchors_ptr += head * anchors_sh
    g_k_ptr += bh * M * D
    g_z_ptr += bh * M * D
    offset_ptr += bh * M
    unit_ptr += bh * M
    cols = tl.arange(0, BLOCK_D)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = k_ptr.dtype.element_ty
    anchors = _rows(anchors_ptr, D, m, cols, M, D).to(dtype)
    g_k = _rows(g_k_ptr, D, m, cols, M, D)
    g_z = _rows(g_z_ptr, D, m, cols, M, D)
    offset = tl.load(offset_ptr + m, mask=m < M, other=0.)
    unit = tl.load(unit_ptr + m, mask=m < M, other=0.)
    anchors_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    taps = tl.arange(0, BLOCK_TAPS)
    taps_sum = tl.zeros([BLOCK_TAPS, BLOCK_D], tl.float32)
    channels = head * D + cols
    num_cls = N - height * width
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, k_sn, n, cols, N, D)
        v = _rows(v_ptr, v_sn, n, cols, N, D)
        logits = _logits(k, anchors, 1., m, M, PRECISION)
        grad_p = _dot(k, tl.trans(g_k), PRECISION)
        grad_p += _dot(v, tl.trans(g_z), PRECISION)
        grad_p = (grad_p - offset[None, :]) * unit[None, :]
        if BLOCKS == 1:
            p = tl.exp(logits - tl.max(logits, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None]
            mean = tl.sum(p * grad_p, 1)
        else:
            top, total = _softmax_total(k, anchors_ptr, 1., cols, M, D,
                                        BLOCK_N, BLOCK_M, BLOCKS, PRECISION)
            p = tl.exp(logits - top[:, None]) / total[:, None]
            mean = tl.zeros([BLOCK_N], tl.float32)
            for i in range(BLOCKS):
                other = i * BLOCK_M + tl.arange(0, BLOCK_M)
                a_i = _rows(anchors_ptr, D, other, cols, M, D).to(dtype)
                p_i = tl.exp(_logits(k, a_i, 1., other, M, PRECISION) -
                             top[:, None])
                mean += tl.sum(
                    p_i * _grad_p(k, v, g_k_ptr, g_z_ptr, offset_ptr, unit_ptr,
                                  other, cols, M, D, PRECISION), 1)
            mean = mean / total
        # Rows past N are not stored, and must not scale the others.
        p = tl.where(n[:, None] < N, p, 0.)
        grad_logits = p * (grad_p - mean[:, None])
        anchors_sum += _scaled_dot(tl.trans(grad_logits), k, PRECISION)
        if block == 0:
            weight = p * unit[None, :]
            grad_k = _scaled_dot(weight, g_k, PRECISION)
            grad_k += _scaled_dot(grad_logits, anchors, PRECISION)
            grad_v = _scaled_dot(weight, g_z, PRECISION)
            if BLOCKS > 1:
                for i in range(1, BLOCKS):
                    other = i * BLOCK_M + tl.arange(0, BLOCK_M)
                    a_i = _rows(anchors_ptr, D, other, cols, M, D).to(dtype)
                    p_i = tl.exp(_logits(k, a_i, 1., other, M, PRECISION) -
                                 top[:, None]) / total[:, None]
                    grad_p_i = _grad_p(k, v, g_k_ptr, g_z_ptr, offset_ptr,
                                       unit_ptr, other, cols, M, D, PRECISION)
                    grad_logits_i = p_i * (grad_p_i - mean[:, None])
                    unit_i = tl.load(
                        unit_ptr + other, mask=other < M, other=0.)
                    weight_i = p_i * unit_i[None, :]
                    g_k_i = _rows(g_k_ptr, D, other, cols, M, D)
                    g_z_i = _rows(g_z_ptr, D, other, cols, M, D)
                    grad_k += _scaled_dot(weight_i, g_k_i, PRECISION)
                    grad_k += _scaled_dot(grad_logits_i, a_i, PRECISION)
                    grad_v += _scaled_dot(weight_i, g_z_i, PRECISION)
            if KERNEL > 0:
                for tap in tl.static_range(KERNEL * KERNEL):
                    grad = _neighbours(grad_ptr, grad_sn, n,
                                       KERNEL // 2 - tap // KERNEL,
                                       KERNEL // 2 - tap % KERNEL, num_cls,
                                       height, width, cols, D)
                    # Padding rows wrap to tokens that are in the map.
                    grad = tl.where(n[:, None] < N, grad, 0.)
                    grad_v += grad * _tap(dwc_weight, channels, cols < D,
                                          tap, KERNEL * KERNEL)[None, :]
                    part = tl.sum(grad * v.to(tl.float32), 0)
                    taps_sum += tl.where(taps[:, None] == tap, part[None, :],
                                         0.)
                    if tap == KERNEL * KERNEL // 2:
                        taps_sum += tl.where(
                            taps[:, None] == KERNEL * KERNEL,
                            tl.sum(grad, 0)[None, :], 0.)
            _put_rows(grad_k_ptr, grad_k_sn, n, cols, N, D, grad_k)
            _put_rows(grad_v_ptr, grad_v_sn, n, cols, N, D, grad_v)
    part = bh.to(tl.int64) * splits + split
    _put_rows(anchors_part + part * M * D, D, m, cols, M, D, anchors_sum)
    if KERNEL > 0:
        if block == 0:
            _put_rows(dwc_part + part * (KERNEL * KERNEL + 1) * D, D, taps,
                      cols, KERNEL * KERNEL + 1, D, taps_sum)


@triton.jit
def _grad_p(k, v, g_k_ptr, g_z_ptr, offset_ptr, unit_ptr, m, cols, M, D,
            PRECISION: tl.constexpr):
    """The routing's gradient for one block of M; see gather_backward."""
    g_k = _rows(g_k_ptr, D, m, cols, M, D)
    g_z = _rows(g_z_ptr, D, m, cols, M, D)
    grad_p = _dot(k, tl.trans(g_k), PRECISION)
    grad_p += _dot(v, tl.trans(g_z), PRECISION)
    grad_p -= tl.load(offset_ptr + m, mask=m < M, other=0.)[None, :]
    return grad_p * tl.load(unit_ptr + m, mask=m < M, other=0.)[None, :]
