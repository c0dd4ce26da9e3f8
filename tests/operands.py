"""Inputs of the operators and runs of them, for the tests of every impl."""

import importlib.util

import oracle
import pytest
import torch

from mmrpa.ops import rp_attention, rp_attention_qkv

# Wheels of torch for the CPU, and those for macOS, come without Triton.
TRITON = pytest.param(
    'triton',
    marks=pytest.mark.skipif(
        importlib.util.find_spec('triton') is None,
        reason='Triton is not installed'))
IMPLS = ['naive', 'fused', TRITON]
# Relative to a tensor's root mean square: rounding, and little more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def dtype_of(impl):
    """The highest precision that an impl computes in."""
    return torch.float32 if impl == 'triton' else torch.float64


def place(tensors, impl):
    """The tensors where and as an impl takes them; shapes of Triton's too."""
    cuda = impl == 'triton' and torch.cuda.is_available()
    return {
        name: t.detach().to('cuda' if cuda else 'cpu', dtype_of(impl))
        for name, t in tensors.items()
    }


def make_inputs(batch=2, heads=2, n=7, m=3, d=4, anchors='per_head',
                weight='grouped', proj=False, dtype=torch.float64):
    """Arguments of ``rp_attention``: every softmax decided, none one-hot."""
    square = (heads, d, d) if weight == 'grouped' else (heads * d, ) * 2
    shapes = dict(
        q=(batch, heads, n, d),
        k=(batch, heads, n, d),
        v=(batch, heads, n, d),
        anchors=(heads if anchors == 'per_head' else 1, m, d),
        interact_weight=(3, *square))
    if proj:
        shapes['interact_proj'] = square
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors['anchors'] *= 3 * d**-0.5
    tensors['interact_weight'] *= 1.5 * square[-1]**-0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def make_qkv_inputs(batch=2, heads=2, n=7, m=3, d=4, kernel=3, bias=True,
                    dtype=torch.float64, **options):
    """Arguments of ``rp_attention_qkv``; a kernel of 0 leaves it out."""
    tensors = make_inputs(batch, heads, n, m, d, dtype=dtype, **options)
    channels = heads * d
    parts = [tensors.pop(name).transpose(1, 2).reshape(batch, n, channels)
             for name in 'qkv']
    tensors['qkv'] = torch.cat(parts, dim=-1)
    if kernel:
        tensors['dwc_weight'] = torch.randn(channels, 1, kernel,
                                            kernel).to(dtype)
        if bias:
            tensors['dwc_bias'] = torch.randn(channels).to(dtype)
    return tensors


def run(function, tensors, grad, **options):
    """The output and the gradients of all tensors, which keep their strides.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()),
                                grad.to(out.device, out.dtype))
    return {
        'out': out.detach(),
        **dict(zip((f'gradient of {name}' for name in leaves), grads,
                   strict=True))
    }


def assert_close(actual, expected, tolerance, floor=0.2):
    """Two results of ``run``: errors relative to the root mean square.

    Where the expected values all but vanish, ``floor`` takes its place (the
    inputs' is about 1), because what cancels there leaves rounding, more or
    less of it by the CPU.
    """
    assert list(actual) == list(expected)
    for name, e in expected.items():
        a, e = actual[name].cpu().double(), e.cpu().double()
        assert a.shape == e.shape, name
        if not e.numel():
            continue
        error = (a - e).square().mean().sqrt().item()
        bound = tolerance * max(floor, e.square().mean().sqrt().item())
        # Written so that NaN fails.
        assert error <= bound, f'{name}: {error:.3g} is above {bound:.3g}'


def out_like(tensors):
    """Random numbers in the shape of the output."""
    if 'q' in tensors:
        return torch.randn(tensors['q'].shape)
    batch, num_tokens, channels = tensors['qkv'].shape
    return torch.randn(batch, num_tokens, channels // 3)


def check(impl, tensors, against, grad=None, tolerance=None, floor=0.2,
          **options):
    """Values and all gradients of an impl, on tensors of any strides.

    ``against`` is ``'loops'``, or ``'naive'`` where those would take too long;
    it computes in float64, from contiguous tensors.
    """
    grad = out_like(tensors) if grad is None else grad
    qkv = 'qkv' in tensors
    function = rp_attention_qkv if qkv else rp_attention
    actual = run(function, tensors, grad, impl=impl, **options)
    if against == 'loops':
        function = oracle.rp_attention_qkv if qkv else oracle.rp_attention
    else:
        options['impl'] = 'naive'
    expected = run(
        function,
        {name: t.cpu().double().contiguous() for name, t in tensors.items()},
        grad.contiguous(), **options)
    dtype = next(iter(tensors.values())).dtype
    assert actual['out'].dtype == dtype
    assert_close(actual, expected, tolerance or TOLERANCE[dtype], floor)
