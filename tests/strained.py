"""The operator and the layer in half precision, held to float64."""

import copy
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from stress import (
    BOUNDS,
    CANCELS,
    EMPTY,
    PROJECTED,
    ROUNDING,
    SUMS,
    TIES,
    VANISHES,
    check,
    fits,
    largest_change,
    nudge,
    push_keys,
    rounding_noise,
    strain,
)

from mmrpa.layers import RPAttention
from mmrpa.ops import naive, rp_attention_qkv
from mmrpa.optim.half_operators import Float32Products

C, HEADS, M, DIMS = 96, 3, 16, 32
FULL, SMALL = (200, 334), (13, 21)
DTYPES = [torch.bfloat16, torch.float16]

# What has no relative error to speak of, by case; the reasons are those of
# tests/stress.py. Q's, K's and the anchors' gradients cancel:
# - one: routing is one-hot, and a one-hot softmax has no gradient. That is
#   the anchors' alone; Q's and K's have other parts, small ones.
# - small, tiny: all V_rep are one mean, but for 1e-8 and 1e-16 of it.
# - constant: all representatives are the same, whatever the routing is.
# - winners: all softmaxes are one-hot; so they are on a small map of 1e4.
ROUTED = dict.fromkeys(('q', 'k', 'anchors'), CANCELS)
LISTED = dict(
    one=dict(anchors=CANCELS), small=ROUTED, tiny=ROUTED, constant=ROUTED,
    winners=ROUTED,
    large=dict.fromkeys(('q', 'k', 'anchors', 'interact_weight'), TIES))
# And in float16 these are below 6e-8: an output of 1e-8; sums over tokens of
# gradients times 1e-8; V's gradient where others, of 1e8, have to fit.
LISTED_FLOAT16 = dict(
    one=dict.fromkeys('qk', VANISHES),
    large=dict(v=VANISHES),
    tiny=dict.fromkeys(('out', 'interact_weight', 'dwc_weight'), VANISHES))
# In a layer Q's and K's gradients are parts of larger ones; on a small map,
# with few ties ("few"), of much larger ones.
LAYER_LISTED = {case: {'anchors': listed['anchors']}
                for case, listed in LISTED.items()}
LAYER_LISTED['few'] = LAYER_LISTED['large']
LAYER_LISTED['large'] = dict.fromkeys(
    ('anchors', 'interact_weight', 'qkv.weight', 'qkv.bias', 'x'), TIES)
# Weights as a layer has them at first make outputs of 4e-6 from 1e-4.
LAYER_LISTED_FLOAT16 = dict(
    small=dict.fromkeys(('out', 'interact_weight'), VANISHES),
    tiny=dict(dict.fromkeys(('proj.weight', 'dwc.weight'), EMPTY),
              **dict.fromkeys(('out', 'interact_weight', 'qkv.weight'),
                              VANISHES)))
# Triton's kernels round to half in between: of what cancels, a tenth or a
# hundredth of the bound relative to the largest gradient can be said.
TRITON_LISTED = dict(LISTED, large={})
TRITON_LISTED_FLOAT16 = dict(LISTED_FLOAT16, large={})


def listed_in(case, dtype, always=LISTED, float16=LISTED_FLOAT16):
    """The listed tensors of a case and their reasons."""
    return {**always.get(case, {}),
            **(float16.get(case, {}) if dtype == torch.float16 else {})}


def operands(case, hw_shape):
    """Arguments of ``rp_attention_qkv``, and the gradient of its output."""
    qkv = strain(torch.randn(1, hw_shape[0] * hw_shape[1], 3 * C), case)
    anchors = torch.randn(HEADS, M, DIMS) * 1.5 * DIMS**-0.5
    bias = torch.zeros(HEADS, DIMS)
    push_keys(bias, anchors, case)
    qkv[..., C:2 * C] += bias.flatten()
    tensors = dict(
        qkv=qkv,
        anchors=anchors,
        interact_weight=torch.randn(3, HEADS, DIMS, DIMS) * DIMS**-0.5,
        dwc_weight=torch.randn(C, 1, 3, 3) / 3,
        dwc_bias=strain(torch.randn(1, C), case)[0])
    return tensors, torch.randn(*qkv.shape[:2], C)


def first_head(tensors, grad):
    """The part of :func:`operands` that one head takes."""
    qkv = torch.cat([part[..., :DIMS] for part in
                     tensors['qkv'].chunk(3, dim=-1)], dim=-1)
    return dict(
        qkv=qkv,
        anchors=tensors['anchors'][:1],
        interact_weight=tensors['interact_weight'][:, :1],
        dwc_weight=tensors['dwc_weight'][:DIMS],
        dwc_bias=tensors['dwc_bias'][:DIMS]), grad[..., :DIMS]


def run(tensors, grad, impl, hw_shape, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = rp_attention_qkv(**leaves, num_heads=len(leaves['anchors']),
                           hw_shape=hw_shape, impl=impl, **options)
    grads = dict(zip(leaves, torch.autograd.grad(
        out, list(leaves.values()), grad), strict=True))
    parts = grads.pop('qkv').chunk(3, dim=-1)
    return dict(out=out.detach(), **dict(zip('qkv', parts, strict=True)),
                **grads)


def compare(tensors, grad, dtype, impls, hw_shape, listed=None, floor=1e-2,
            rounded=False, **options):
    """Hold impls to float64's result, and return it.

    For Triton's kernels alone: ``floor`` is that of ``half_noise``, and with
    ``rounded`` float64 gets representatives that are rounded as theirs.
    """
    doubles = {name: t.double() for name, t in tensors.items()}
    listed = listed or {}

    def in_float64(tensors, grad):
        with rounded_representatives(dtype) if rounded else nullcontext():
            return run(tensors, grad, 'naive', hw_shape, **options)

    exact, scale, held = exactly(
        lambda grad: in_float64(doubles, grad), grad.double(), dtype)
    goal = scaled(exact, scale)
    for impl in impls:
        actual = run(tensors, (scale * held).to(dtype), impl, hw_shape,
                     **options)
        noise = {}
        if TIES in listed.values():
            noise = largest_change(
                lambda: scaled(in_float64(
                    {n: nudge(t, ROUNDING) for n, t in doubles.items()}, held),
                    scale), goal)
        elif CANCELS in listed.values():
            noise = (half_noise(goal, dtype, floor) if impl == 'triton' else
                     rounding_noise(lambda: in_float64(doubles, scale * held),
                                    goal))
        check(actual, goal, dtype, listed, noise)
    return exact


def rounded_representatives(dtype):
    """Let the naive operator round K_rep and V_rep as Triton's kernels do,
    forward: less their means over M, over the largest number of the rest."""
    distribute = naive.distribute

    def as_theirs(reps):
        rest = reps - reps.mean(-2, keepdim=True)
        unit = rest.abs().amax((-2, -1), keepdim=True)
        held = unit * (rest / unit).to(dtype).to(rest.dtype)
        return reps + (held - rest).detach()

    def rounded(q, k_rep, v_rep, scale):
        return distribute(q, as_theirs(k_rep), as_theirs(v_rep), scale)

    return patch.object(naive, 'distribute', rounded)


def half_noise(exact, dtype, floor):
    """What may be left of what cancels in Triton's kernels, over SUMS.

    They round to half in between. With it, a tensor's error is relative to
    ``floor`` times the largest gradient, if that is more than the tensor.
    """
    largest = max(t.norm().item() for name, t in exact.items()
                  if name != 'out')
    return {name: BOUNDS[dtype] / SUMS
            * max(0, floor * largest - e.norm().item())
            for name, e in exact.items()}


def as_held(grad, scale, dtype):
    """What is left of a float64 gradient that is scaled and rounded."""
    return (scale * grad).to(dtype).double() / scale


def exactly(run, grad, dtype):
    """float64's results for the gradient that ``dtype`` can hold.

    Scaled so that the largest of the results fits, the gradient itself may be
    among float16's smallest numbers, which have few digits left.

    Args:
        run (callable): Results from a gradient of the output.
        grad (Tensor): That, in float64.

    Returns:
        tuple: The results for what is held, the scale, and what is held, not
        scaled, in float64.
    """
    exact = run(grad)
    scale = fits(exact, dtype)
    held = as_held(grad, scale, dtype)
    assert held.count_nonzero() > 0.5 * held.numel()
    if not held.equal(grad):
        exact = run(held)
    return exact, scale, held


def scaled(results, scale):
    """The results for a gradient ``scale`` times as large."""
    return {name: t if name == 'out' else scale * t
            for name, t in results.items()}


def layer_and_tokens(case, hw_shape):
    layer = RPAttention(C, HEADS, M)
    with torch.no_grad():
        push_keys(layer.qkv.bias[C:2 * C].view(HEADS, DIMS), layer.anchors,
                  case)
    x = strain(torch.randn(1, hw_shape[0] * hw_shape[1], C), case)
    return layer, x, torch.randn(x.shape)


def products(hw_shape):
    """At full size torch's own products in half would take minutes here."""
    return Float32Products() if hw_shape == FULL else nullcontext()


def autocast(amp):
    return torch.autocast('cpu', dtype=amp or torch.bfloat16,
                          enabled=amp is not None)


def run_layer(layer, x, grad, hw_shape, amp=None, projected=None, hold=None):
    """Output and gradients of a copy of the layer.

    ``projected`` takes the place of what the q, k, v projection gives, and
    ``hold`` of the gradient that comes to the operator its own result.
    """
    layer = copy.deepcopy(layer)
    if hold is not None:
        layer.proj.register_full_backward_hook(
            lambda m, grads, out: (hold(grads[0]), ))
    if projected is not None:
        layer.qkv.register_forward_hook(
            lambda m, args, out: out + (projected - out).detach())
    x = x.detach().requires_grad_()
    with products(hw_shape):
        with autocast(amp):
            out = layer(x, hw_shape)
        out.backward(grad.to(out.dtype))
    return dict(out=out.detach(), x=x.grad, **{
        name: p.grad for name, p in layer.named_parameters()})


def compare_layer(layer, x, grad, dtype, modes, impls, hw_shape,
                  listed=None):
    """Hold a layer to float64's.

    With ties, rounding K decides which representative wins. There float64
    gets Q, K and V as the layer has rounded them, so that nothing is left to
    excuse but what float32 does not know of the logits. It gets the gradient
    of the operator's output so as well: scaled for Q's and K's, of 1e4 and
    more, it is among float16's smallest numbers. A layer that absorbs its
    projections, in mode ``'float32'``, has no Q, K and V that it could round:
    it starts from the tokens and the weights, and so does float64.
    """
    layer.to(dtype).double()
    x, grad = x.to(dtype).double(), grad.to(dtype).double()
    layer.impl = 'naive'
    listed = listed or {}

    def in_float64(grad, projected=None, hold=None):
        return run_layer(layer, x, grad, hw_shape, projected=projected,
                         hold=hold)

    def from_nudged(grad):
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            for p in moved.parameters():
                p.copy_(nudge(p, ROUNDING))
        return run_layer(moved, nudge(x, ROUNDING), grad, hw_shape)

    exact, scale, held = exactly(in_float64, grad, dtype)
    noise = {}
    if CANCELS in listed.values():
        noise = rounding_noise(lambda: in_float64(scale * held),
                               scaled(exact, scale))
    for mode in modes:
        work = dtype if mode == 'pure' else torch.float32
        amp = dtype if mode == 'autocast' else None
        tried = copy.deepcopy(layer).to(work)
        if mode != 'float32' and {TIES, PROJECTED} & set(listed.values()):
            with torch.no_grad(), products(hw_shape), autocast(amp):
                qkv = tried.qkv(x.to(work)).double()
        if PROJECTED in listed.values():
            given = in_float64(held, qkv)
            noise = {name: scale * (given[name] - e).norm().item()
                     for name, e in exact.items()}
        if TIES in listed.values() and mode == 'float32':
            noise = largest_change(
                lambda scale=scale, held=held: from_nudged(scale * held),
                scaled(exact, scale))
        elif TIES in listed.values():
            exact, scale, held = exactly(
                lambda grad, qkv=qkv: in_float64(grad, qkv), grad, dtype)
            hold = partial(as_held, scale=scale, dtype=dtype)
            exact = in_float64(held, qkv, hold)
            noise = largest_change(
                lambda qkv=qkv, scale=scale, held=held, hold=hold: scaled(
                    in_float64(held, nudge(qkv, ROUNDING), hold), scale),
                scaled(exact, scale))
        for impl in impls:
            tried.impl = impl
            actual = run_layer(tried, x.to(work), (scale * held).to(work),
                               hw_shape, amp)
            check(actual, scaled(exact, scale), dtype, listed, noise)
