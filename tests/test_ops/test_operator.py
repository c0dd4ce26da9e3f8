"""What torch knows of the operators: opcheck, compile, checkpoints, FLOPs."""

import math

import pytest
import torch
from operands import (
    IMPLS,
    TRITON,
    make_inputs,
    make_qkv_inputs,
    out_like,
    place,
    run,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmrpa.layers import RPAttention
from mmrpa.ops import fused, rp_attention, rp_attention_qkv

FUSED = ['fused', TRITON]
SETTINGS = ('representatives', 'mean', False, 0.25)
FORMS = {
    'q-k-v-proj': (make_inputs, dict(proj=True, weight='full')),
    'qkv': (make_qkv_inputs, dict(kernel=0)),
    'qkv-dwc': (make_qkv_inputs, dict(bias=False)),
    'qkv-dwc-bias-proj': (make_qkv_inputs, dict(proj=True)),
}


def operands(impl, form):
    """Arguments of the operator, of (B, N, h, d) or (B, N, 3, h, d)."""
    make, options = form
    tensors = place(make(1, 1, n=5, d=16, **options), impl)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    if 'qkv' in tensors:
        qkv = [tensors['qkv'].unflatten(-1, (3, 1, 16))]
    else:
        qkv = [tensors[name].transpose(1, 2) for name in 'qkv']
    params = [tensors.get(name) for name in (
        'anchors', 'interact_weight', 'interact_proj', 'dwc_weight',
        'dwc_bias')]
    return qkv, *params, 2, 2, *SETTINGS, impl


@pytest.mark.parametrize('impl', FUSED)
@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_operators_keep_torchs_rules(impl, form):
    arguments = operands(impl, form)
    torch.library.opcheck(torch.ops.mmrpa.rp_attention, arguments)

    qkv, *params = arguments[:6]
    qkv = [t.detach() for t in qkv]
    params = [None if t is None else t.detach() for t in params]
    with torch.no_grad():
        out, *reps = torch.ops.mmrpa.rp_attention(qkv, *params, *arguments[6:])
    torch.library.opcheck(
        torch.ops.mmrpa.rp_attention_backward,
        (torch.randn_like(out), qkv, *params, *reps, *arguments[6:]))


def test_compiled_layer_equals_eager():
    layer = RPAttention(32, 2, 5)
    torch.compiler.reset()
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend='aot_eager')
    for hw_shape in ((4, 6), (5, 7)):
        x = torch.randn(2, hw_shape[0] * hw_shape[1], 32).requires_grad_()
        grad = torch.randn_like(x)
        wanted = [x, *layer.parameters()]
        results = []
        for function in (compiled, layer):
            out = function(x, hw_shape)
            results.append([out, *torch.autograd.grad(out, wanted, grad)])
        torch.testing.assert_close(*results)
    torch.compiler.reset()


@pytest.mark.parametrize('impl', IMPLS)
def test_checkpointed_equals_kept(impl):
    tensors = place(make_qkv_inputs(heads=1, d=16), impl)
    grad = out_like(tensors)
    options = dict(impl=impl, num_heads=1, hw_shape=(2, 3))

    def checkpointed(**tensors):
        return checkpoint(
            rp_attention_qkv, use_reentrant=False, **tensors, **options)

    torch.testing.assert_close(
        run(checkpointed, tensors, grad),
        run(rp_attention_qkv, tensors, grad, **options), rtol=0, atol=0)


def test_naive_has_gradients_of_gradients():
    tensors = make_qkv_inputs(batch=1, n=3, m=2, d=2)
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def function(*leaves):
        return rp_attention_qkv(
            **dict(zip(names, leaves, strict=True)), num_heads=2,
            hw_shape=(1, 2), impl='naive')

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize('impl', FUSED)
def test_others_refuse_gradients_of_gradients(impl):
    tensors = {name: t.requires_grad_()
               for name, t in place(make_inputs(d=16), impl).items()}
    out = rp_attention(**tensors, impl=impl).square().sum()
    # Of the upstream gradient too, which alone needs no second derivative.
    grads = torch.autograd.grad(out, list(tensors.values()),
                                create_graph=True)
    with pytest.raises(RuntimeError, match='rp_attention_backward.*autograd'):
        sum(g.square().sum() for g in grads).backward()


# FLOPs.


# torch counts baddbmm, but not in place.
IN_PLACE = {
    torch.ops.aten.baddbmm_:
    lambda x, a, b, out_shape: 2 * math.prod(a) * b[-1]
}


def count(function):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize('impl', IMPLS)
def test_flops_grow_linearly_in_n(impl):
    counts = []
    for n in (100, 400, 1600):
        with torch.device('meta'):
            tensors = make_inputs(n=n, m=16, d=16, dtype=torch.float32)
        counts.append(count(lambda t=tensors: rp_attention(**t, impl=impl)))
    # What does not depend on N is the same in all three.
    assert counts[2] - counts[1] == 4 * (counts[1] - counts[0])
    # 5 products of N x M x d: routing, two gathers, two of Distribute.
    assert counts[1] - counts[0] == 2 * 5 * 300 * 16 * 16 * 2 * 2


@pytest.mark.parametrize('impl', FUSED)
def test_flops_of_backward_on_paper(impl):
    batch, heads, n, m, d = 3, 2, 7, 5, 16
    with torch.device('meta'):
        tensors = make_qkv_inputs(batch, heads, n, m, d, dtype=torch.float32)
        grad = torch.empty(batch, n, heads * d)

    def forward():
        rp_attention_qkv(**tensors, **options)

    options = dict(num_heads=heads, hw_shape=(2, 3), impl=impl)
    both = count(lambda: run(rp_attention_qkv, tensors, grad, **options))
    # Distribute: logits and their gradient, then those of Q, K_rep and V_rep.
    # Gather: logits, their gradient from K and V, those of the anchors, of K
    # as key and as gathered, and of V.
    tokens = 5 + 7
    # Interact: both products, and their four gradients.
    pairs = 2 + 4
    # Its three linear maps, and their gradients of input and weight.
    weights = 3 * 3
    macs = heads * (tokens * n * m * d + pairs * m * m * d
                    + weights * m * d * d)
    # The convolution's gradients of its input and of its weight.
    macs += 2 * 6 * 9 * heads * d
    assert both - count(forward) == 2 * batch * macs


@pytest.mark.parametrize('form', [{}, dict(weight='full'), dict(proj=True),
                                  dict(weight='full', proj=True)], ids=str)
def test_flops_are_those_of_the_products_in_fused(form):
    """The registered formulas against torch's count of each product."""
    tensors = make_inputs(d=8, **form)
    grad = out_like(tensors)
    forward = count(lambda: rp_attention(**tensors, impl='fused'))
    both = count(lambda: run(rp_attention, tensors, grad, impl='fused'))
    q, k, v = (tensors[name].transpose(1, 2) for name in 'qkv')
    rest = [tensors.get(name) for name in (
        'anchors', 'interact_weight', 'interact_proj')]
    rest += [None, None, (0, 0), fused.Options(*SETTINGS)]
    kept = []
    # As products, since torch does not count its flash attention for CPUs.
    with sdpa_kernel(SDPBackend.MATH):
        assert forward == count(
            lambda: kept.extend(fused.forward(q, k, v, *rest)))
    grads = [torch.empty_like(q) for _ in range(3)]
    assert both - forward == count(lambda: fused.backward(
        q, k, v, *rest, kept[1], grad.transpose(1, 2), *grads))
