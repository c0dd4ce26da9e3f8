"""The operator and the layer in half precision, held to float64."""

import copy
from contextlib import nullcontext
from functools import partial

import torch
from stress import (
    ROUNDING,
    check,
    fits,
    largest_change,
    nudge,
    push_keys,
    strain,
)

from mmrpa.layers import RPAttention
from mmrpa.ops import rp_attention_qkv
from mmrpa.optim.half_operators import Float32Products

C, HEADS, M, DIMS = 96, 3, 16, 32
FULL, SMALL = (200, 334), (13, 21)
DTYPES = [torch.bfloat16, torch.float16]


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


def run(tensors, grad, impl, hw_shape, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = rp_attention_qkv(**leaves, num_heads=HEADS, hw_shape=hw_shape,
                           impl=impl, **options)
    grads = dict(zip(leaves, torch.autograd.grad(
        out, list(leaves.values()), grad), strict=True))
    parts = grads.pop('qkv').chunk(3, dim=-1)
    return dict(out=out.detach(), **dict(zip('qkv', parts, strict=True)),
                **grads)


def compare(tensors, grad, dtype, impls, hw_shape, ties=False, floor=1e-3,
            **options):
    """Hold impls to float64's result, and return it."""
    doubles = {name: t.double() for name, t in tensors.items()}

    def in_float64(tensors, grad):
        return run(tensors, grad, 'naive', hw_shape, **options)

    exact, scale, held = exactly(
        lambda grad: in_float64(doubles, grad), grad.double(), dtype)
    changes = {}
    for impl in impls:
        if ties:
            # Triton's kernels round to half in between.
            by = torch.finfo(dtype).eps / 2 if impl == 'triton' else ROUNDING
            changes = largest_change(
                lambda by=by: scaled(in_float64(
                    {n: nudge(t, by) for n, t in doubles.items()}, held),
                    scale),
                scaled(exact, scale))
        actual = run(tensors, (scale * held).to(dtype), impl, hw_shape,
                     **options)
        check(actual, scaled(exact, scale), dtype,
              0.1 if impl == 'triton' else floor, changes)
    return exact


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


def compare_layer(layer, x, grad, dtype, modes, impls, hw_shape, ties=False):
    """Hold a layer to float64's.

    With ``ties``, rounding K decides which representative wins. There float64
    gets Q, K and V as the layer has rounded them, so that nothing is left to
    excuse but what float32 does not know of the logits. It gets the gradient
    of the operator's output so as well: scaled for Q's and K's, of 1e4 and
    more, it is among float16's smallest numbers.
    """
    layer.to(dtype).double()
    x, grad = x.to(dtype).double(), grad.to(dtype).double()
    layer.impl = 'naive'

    def in_float64(grad, projected=None, hold=None):
        return run_layer(layer, x, grad, hw_shape, projected=projected,
                         hold=hold)

    exact, scale, held = exactly(in_float64, grad, dtype)
    changes = {}
    for mode in modes:
        work = dtype if mode == 'pure' else torch.float32
        amp = dtype if mode == 'autocast' else None
        tried = copy.deepcopy(layer).to(work)
        if ties:
            with torch.no_grad(), products(hw_shape), autocast(amp):
                qkv = tried.qkv(x.to(work)).double()
            exact, scale, held = exactly(
                lambda grad, qkv=qkv: in_float64(grad, qkv), grad, dtype)
            hold = partial(as_held, scale=scale, dtype=dtype)
            exact = in_float64(held, qkv, hold)
            changes = largest_change(
                lambda qkv=qkv, scale=scale, held=held, hold=hold: scaled(
                    in_float64(held, nudge(qkv, ROUNDING), hold), scale),
                scaled(exact, scale))
        for impl in impls:
            tried.impl = impl
            actual = run_layer(tried, x.to(work), (scale * held).to(work),
                               hw_shape, amp)
            check(actual, scaled(exact, scale), dtype, changes=changes)
