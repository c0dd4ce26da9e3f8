"""The operator and the layer in half precision, held to float64."""

import copy
from contextlib import nullcontext

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

    def exactly(tensors):
        return run(tensors, grad.double(), 'naive', hw_shape, **options)

    exact = exactly(doubles)
    scale = fits(exact, dtype)
    changes = {}
    for impl in impls:
        if ties:
            # Triton's kernels round to half in between.
            by = torch.finfo(dtype).eps / 2 if impl == 'triton' else ROUNDING
            changes = largest_change(
                lambda by=by: scaled(exactly(
                    {n: nudge(t, by) for n, t in doubles.items()}), scale),
                scaled(exact, scale))
        check(run(tensors, scale * grad, impl, hw_shape, **options),
              scaled(exact, scale), dtype, 0.1 if impl == 'triton' else floor,
              changes)
    return exact


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


def run_layer(layer, x, grad, hw_shape, amp=None, projected=None):
    """``projected`` takes the place of what the q, k, v projection gives."""
    layer = copy.deepcopy(layer)
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
    excuse but what float32 does not know of the logits.
    """
    layer.to(dtype).double()
    x, grad = x.to(dtype).double(), grad.to(dtype).double()
    layer.impl = 'naive'
    exact = run_layer(layer, x, grad, hw_shape)
    scale = fits(exact, dtype)
    changes = {}
    for mode in modes:
        work = dtype if mode == 'pure' else torch.float32
        amp = dtype if mode == 'autocast' else None
        tried = copy.deepcopy(layer).to(work)
        if ties:
            with torch.no_grad(), products(hw_shape), autocast(amp):
                qkv = tried.qkv(x.to(work)).double()
            exact = run_layer(layer, x, grad, hw_shape, projected=qkv)
            scale = fits(exact, dtype)
            changes = largest_change(
                lambda qkv=qkv, scale=scale: scaled(
                    run_layer(layer, x, grad, hw_shape,
                              projected=nudge(qkv, ROUNDING)), scale),
                scaled(exact, scale))
        for impl in impls:
            tried.impl = impl
            actual = run_layer(tried, x.to(work), (scale * grad).to(work),
                               hw_shape, amp)
            check(actual, scaled(exact, scale), dtype, changes=changes)
