"""The layer as one operator: against loops, in bands, and by its rule."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from operands import assert_close, make_qkv_inputs, run
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmrpa.layers import RPAttention
from mmrpa.ops import (
    absorbed,
    computes_layer,
    convolution,
    rp_attention_layer,
    rp_attention_qkv,
)

OPTIONS = {
    'default': {},
    'sum': dict(reduction='sum'),
    'residual': dict(interact_residual=True),
    'scale': dict(scale=0.3),
}
FORMS = {
    'grouped': {},
    'no-bias': dict(qkv_bias=False, out_bias=False, bias=False),
    'shared': dict(anchors='shared'),
    'full-proj': dict(weight='full', proj=True),
    'kernel-5': dict(kernel=5),
    'kernel-1': dict(kernel=1),
}


def make_inputs(batch=2, n=7, heads=2, m=3, d=4, qkv_bias=True, out_bias=True,
                dtype=torch.float64, **options):
    """Arguments of ``rp_attention_layer``."""
    tensors = make_qkv_inputs(batch, heads, n, m, d, **options)
    del tensors['qkv']
    c = heads * d
    tensors = dict(x=torch.randn(batch, n, c),
                   qkv_weight=torch.randn(3 * c, c) * c**-0.5,
                   out_weight=torch.randn(c, c) * c**-0.5, **tensors)
    if qkv_bias:
        tensors['qkv_bias'] = torch.randn(3 * c)
    if out_bias:
        tensors['out_bias'] = torch.randn(c)
    return {name: t.to(dtype) for name, t in tensors.items()}


def by_parts(x, qkv_weight, out_weight, qkv_bias=None, out_bias=None, *,
             operator, **rest):
    """The definition: an operator between two Linear layers."""
    out = operator(F.linear(x, qkv_weight, qkv_bias), **rest)
    return F.linear(out, out_weight, out_bias)


def check(tensors, operator, tolerance=1e-9, **options):
    """Values and all gradients, against another operator's."""
    grad = torch.randn(tensors['x'].shape)
    actual = run(rp_attention_layer, tensors, grad, **options)
    if operator is rp_attention_qkv:
        options['impl'] = 'naive'
    expected = run(
        lambda **t: by_parts(**t, operator=operator, **options),
        {name: t.double() for name, t in tensors.items()}, grad)
    assert actual['out'].dtype == tensors['x'].dtype
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_values_and_gradients_equal_loops(form, options):
    check(make_inputs(**form), oracle.rp_attention_qkv, num_heads=2,
          hw_shape=(2, 3), **options)


# Batch, tokens in front, H, W.
MAPS = [(1, 0, 1, 1), (1, 0, 1, 9), (2, 1, 9, 1), (3, 2, 4, 5), (1, 1, 7, 3)]


@pytest.mark.parametrize('size', [1, 100, 1000, 10**6])
@pytest.mark.parametrize('batch,num_cls,height,width', MAPS, ids=str)
def test_bands_change_nothing(monkeypatch, size, batch, num_cls, height,
                              width):
    monkeypatch.setattr(absorbed, 'BAND_BYTES', size)
    check(make_inputs(batch, height * width + num_cls), rp_attention_qkv,
          num_heads=2, hw_shape=(height, width))


def test_bands_cover_every_token_and_row_once(monkeypatch):
    x = torch.zeros(2, 5 * 3 + 1, 2)
    for size in range(1, 200, 7):
        monkeypatch.setattr(absorbed, 'BAND_BYTES', size)
        tokens, rows = torch.zeros(2, 16), torch.zeros(2, 5)
        for band in absorbed.bands(x, (5, 3)):
            tokens[band.image, band.tokens] += 1
            rows[band.image, band.rows] += 1
            part = band.of(x)
            assert len(part) == band.map(part, 3).shape[1] * 3 + band.num_cls
        assert (tokens == 1).all() and (rows == 1).all()


def test_single_precision_stays_close_to_double():
    check(make_inputs(1, 40 * 30, heads=3, m=16, d=32, dtype=torch.float32),
          rp_attention_qkv, tolerance=5e-6, num_heads=3, hw_shape=(40, 30))


def test_dead_representatives_and_the_clamp_of_mass():
    tensors = make_inputs(1, 9, m=2)
    # Of the second representative a mass of about 4.5e-7, under the clamp.
    tensors['qkv_weight'][8:16] = 0
    tensors['qkv_bias'][8:16] = torch.tensor([1., 0, 0, 0] * 2)
    tensors['anchors'] = torch.zeros(2, 2, 4).double()
    tensors['anchors'][:, 1, 0] = -16.8
    check(tensors, oracle.rp_attention_qkv, num_heads=2, hw_shape=(3, 3))
    tensors['anchors'][:, 1, 0] = -1e4
    check(tensors, rp_attention_qkv, num_heads=2, hw_shape=(3, 3))


@pytest.mark.parametrize('layout', [
    lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    lambda t: t.repeat_interleave(2, -1)[..., ::2]], ids=['t', 'strided'])
def test_strides_do_not_matter(layout):
    tensors = {name: layout(t) if t.dim() > 1 else t
               for name, t in make_inputs().items()}
    check(tensors, rp_attention_qkv, num_heads=2, hw_shape=(2, 3))


# The convolution.


@pytest.mark.parametrize('size', [1, 3, 5])
@pytest.mark.parametrize('bias', [False, True], ids=['no-bias', 'bias'])
@pytest.mark.parametrize('batch,height,width', [
    (1, 1, 1), (2, 1, 6), (1, 7, 2), (3, 4, 5)])
@pytest.mark.parametrize('band', [1, 300, 10**6])
def test_bands_equal_one_convolution(monkeypatch, size, bias, batch, height,
                                     width, band):
    monkeypatch.setattr(convolution, 'CPU_BAND_BYTES', band)
    wide = torch.randn(batch, height, width, 8).double()
    maps = wide[..., 2:6].requires_grad_()  # not dense
    weight = torch.randn(4, 1, size, size).double().requires_grad_()
    offset = torch.randn(4).double().requires_grad_() if bias else None
    leaves = [t for t in (maps, weight, offset) if t is not None]
    expected = F.conv2d(maps.permute(0, 3, 1, 2).contiguous(), weight, offset,
                        padding=size // 2, groups=4).permute(0, 2, 3, 1)
    grad = torch.randn(batch, height, width, 4).double()
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    with torch.no_grad():
        out, grad_maps = (torch.full_like(maps, float('nan'))
                          for _ in range(2))
        grad_weight, grad_offset = torch.zeros_like(weight), 0
        for images, rows in convolution.bands(maps):
            out[images, rows] = convolution.convolve(
                maps[images], weight, offset, rows)
            grad_maps[images, rows] = convolution.convolve_input_gradient(
                grad[images], weight, rows)
            parts = convolution.kernel_gradient(
                maps[images], grad[images, rows], weight, bias, rows)
            grad_weight += parts[0]
            grad_offset += parts[1] if bias else 0
    torch.testing.assert_close(out, expected.detach())
    for actual, wanted in zip((grad_maps, grad_weight, grad_offset),
                              expected_grads, strict=False):
        torch.testing.assert_close(actual, wanted)


# The rule.


def macs(n, heads, m, d):
    """Multiply-adds by parts and absorbed, without what both have."""
    c = heads * d
    parts = 3 * n * c * c + 5 * n * m * c  # q, k, v; five products of N x M
    # V; logits, P^T x, logits, S (V_rep Wo); Wk and Wv of P^T x, K_rep Wq and
    # V_rep Wo.
    return parts, n * c * c + 4 * n * heads * m * c + 4 * m * c * c


@pytest.mark.parametrize('heads,d', [(1, 64), (3, 32), (12, 32), (2, 128)])
@pytest.mark.parametrize('m', [1, 8, 16, 17, 20, 32, 40, 64])
@pytest.mark.parametrize('n', [1, 1023, 1024, 3136, 66_800])
def test_rule_is_fewer_multiply_adds_and_large_maps(n, heads, d, m):
    parts, whole = macs(n, heads, m, d)
    assert absorbed.absorbs(n, heads, m, d) == (n >= 1024 and whole < parts)


@pytest.mark.parametrize('impl,device,dtype,routing,expected', [
    ('fused', 'cpu', torch.float32, 'representatives', True),
    ('fused', 'cpu', torch.float64, 'representatives', True),
    ('fused', 'cpu', torch.bfloat16, 'representatives', False),
    ('fused', 'cpu', torch.float32, 'tokens', False),
    ('naive', 'cpu', torch.float32, 'representatives', False),
    ('fused', 'cuda', torch.float32, 'representatives', False),
    ('fused', 'meta', torch.float32, 'representatives', False),
    ('triton', 'cuda', torch.float32, 'representatives', False)])
def test_only_fused_on_the_cpu_computes_layers(impl, device, dtype, routing,
                                               expected):
    assert computes_layer(impl, device, dtype, 3136, 3, 32, 16,
                          routing) == expected


@pytest.fixture
def calls(monkeypatch):
    """How often RPAttention took the whole layer."""
    import mmrpa.layers.rp_attention as module
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[0].shape)
        return rp_attention_layer(*args, **kwargs)

    monkeypatch.setattr(module, 'rp_attention_layer', spy)
    return seen


HW = (32, 33)


def make_layer(**options):
    layer = RPAttention(64, 2, 8, **options)
    return layer, torch.randn(1, HW[0] * HW[1], 64)


def test_layer_by_the_rule_equals_naive(calls):
    layer, x = make_layer()
    x.requires_grad_()
    wanted = [x, *layer.parameters()]
    grad = torch.randn_like(x)
    results = []
    for impl in ('auto', 'naive'):
        layer.impl = impl
        out = layer(x, HW)
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    assert calls == [x.shape]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class Scaled(torch.nn.Linear):
    """A replacement that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('name', ['qkv', 'proj', 'dwc'])
@pytest.mark.parametrize('kind', ['pre', 'post', 'backward'])
def test_layers_that_someone_listens_to_are_called(calls, name, kind):
    layer, x = make_layer(impl='fused')
    if name == 'dwc':
        layer.dwc = torch.nn.utils.parametrizations.weight_norm(layer.dwc)
    else:
        module, seen = getattr(layer, name), []
        hook = dict(pre='register_forward_pre_hook',
                    post='register_forward_hook',
                    backward='register_full_backward_hook')[kind]
        getattr(module, hook)(lambda *args: seen.append(1))
    layer(x, HW).sum().backward()
    assert not calls
    if name != 'dwc':
        assert seen == [1]


def test_replaced_layers_are_called(calls):
    layer, x = make_layer(impl='fused')
    layer.proj = Scaled(64, 64)
    expected = layer(x, HW)
    layer.impl = 'naive'
    torch.testing.assert_close(expected, layer(x, HW), rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize('case', ['autocast', 'no-dwc', 'few-tokens',
                                  'many-representatives', 'mixed-dtypes'])
def test_layer_by_parts_elsewhere(calls, case):
    layer, x = make_layer(dwc_kernel_size=0 if case == 'no-dwc' else 3)
    hw_shape = HW
    if case == 'few-tokens':
        x, hw_shape = x[:, :1000], (10, 100)
    if case == 'many-representatives':
        layer = RPAttention(64, 2, 48)
    if case == 'mixed-dtypes':
        layer.anchors.data = layer.anchors.data.double()
    with torch.autocast('cpu', torch.bfloat16, enabled=case == 'autocast'):
        out = layer(x, hw_shape)
    assert out.dtype == (torch.bfloat16 if case == 'autocast' else
                         torch.float32)
    assert not calls


# What torch knows of it.


def operands(**options):
    tensors = make_inputs(1, 7, **options)
    names = ('x', 'qkv_weight', 'qkv_bias', 'anchors', 'interact_weight',
             'interact_proj', 'dwc_weight', 'dwc_bias', 'out_weight',
             'out_bias')
    tensors = [tensors.get(name) for name in names]
    return tensors, (2, 2, 3, 'mean', False, 0.5)


@pytest.mark.parametrize('options', [
    {}, dict(proj=True, weight='full'),
    dict(qkv_bias=False, out_bias=False, bias=False, anchors='shared'),
    dict(kernel=1)], ids=str)
def test_operators_keep_torchs_rules(options):
    tensors, settings = operands(**options)
    leaves = [None if t is None else t.clone().requires_grad_()
              for t in tensors]
    torch.library.opcheck(torch.ops.mmrpa.rp_attention_layer,
                          (*leaves, *settings))
    out, *kept = torch.ops.mmrpa.rp_attention_layer(*tensors, *settings)
    torch.library.opcheck(torch.ops.mmrpa.rp_attention_layer_backward,
                          (torch.randn_like(out), *tensors, *kept, *settings))


def test_compiled_layer_equals_eager(calls):
    layer, x = make_layer()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x.requires_grad_()
    results = []
    for function in (compiled, layer):
        out = function(x, HW)
        results.append([out, *torch.autograd.grad(
            out.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results)
    torch.compiler.reset()


def test_checkpointed_equals_kept():
    tensors, grad = make_inputs(), torch.randn(2, 7, 8)
    options = dict(num_heads=2, hw_shape=(2, 3))

    def checkpointed(**tensors):
        return checkpoint(rp_attention_layer, use_reentrant=False, **tensors,
                          **options)

    torch.testing.assert_close(
        run(checkpointed, tensors, grad),
        run(rp_attention_layer, tensors, grad, **options), rtol=0, atol=0)


@pytest.mark.parametrize('form', [{}, dict(weight='full', proj=True)],
                         ids=['grouped', 'full-proj'])
def test_flops_are_those_of_the_parts(form):
    tensors = make_inputs(**form)
    counts = []
    for function in (
            rp_attention_layer,
            lambda **t: by_parts(operator=rp_attention_qkv, **t)):
        with FlopCounterMode(display=False) as counter:
            function(**tensors, num_heads=2, hw_shape=(2, 3))
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            run(function, tensors, torch.randn(tensors['x'].shape),
                num_heads=2, hw_shape=(2, 3))
        counts.append((forward, counter.get_total_flops() - forward))
    assert counts[0][0] == counts[1][0]
    # By parts, Distribute's and Gather's logits are computed again, Interact
    # too: two products of N x M x d, two of M x M x d, and its weights.
    batch, n, heads, m, d = 2, 7, 2, 3, 4
    again = heads * (2 * n * m * d + 2 * m * m * d)
    again += m * 3 * tensors['interact_weight'][0].numel()
    if form:
        again += m * tensors['interact_proj'].numel() + heads * m * m * d
    assert counts[1][1] - counts[0][1] == 2 * batch * again


# What it refuses.

BAD = {
    'qkv_weight': (torch.zeros(8, 8), r'qkv_weight must be \(24, 8\)'),
    'qkv_bias': (torch.zeros(8), r'qkv_bias must be \(24,\)'),
    'out_weight': (torch.zeros(8, 4), r'out_weight must be \(8, 8\)'),
    'out_bias': (torch.zeros(9), r'out_bias must be \(8,\)'),
    'dwc_weight': (torch.zeros(8, 1, 2, 2), 'odd kernel size, got 2'),
    'anchors': (torch.zeros(3, 3, 4), r'anchors must be \(2, M, 4\)'),
    'x': (torch.zeros(2, 7), r'x must be \(B, N, num_heads \* d\)'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_shapes_are_named(name):
    tensors = make_inputs()
    value, match = BAD[name]
    tensors[name] = value.double()
    with pytest.raises(ValueError, match=match):
        rp_attention_layer(**tensors, num_heads=2, hw_shape=(2, 3))


def test_bad_dtypes_and_maps_are_named():
    half = make_inputs(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='float32 or float64, got '
                       'torch.bfloat16; use rp_attention_qkv'):
        rp_attention_layer(**half, num_heads=2, hw_shape=(2, 3))
    tensors = make_inputs()
    with pytest.raises(ValueError, match=r'hw_shape=\(3, 3\) must be a map'):
        rp_attention_layer(**tensors, num_heads=2, hw_shape=(3, 3))
    with pytest.raises(ValueError, match='anchors is torch.float32 but x '
                       'torch.float64; they must share one dtype'):
        rp_attention_layer(**dict(tensors, anchors=tensors['anchors'].float()
                                  ), num_heads=2, hw_shape=(2, 3))
    with pytest.raises(TypeError, match='x must be floating point'):
        rp_attention_layer(**dict(tensors, x=tensors['x'].long()),
                           num_heads=2, hw_shape=(2, 3))


def test_no_images_give_none_back():
    tensors = make_inputs(batch=0)
    results = run(rp_attention_layer, tensors, torch.zeros(0, 7, 8),
                  num_heads=2, hw_shape=(2, 3))
    assert results.pop('out').shape == (0, 7, 8)
    for result in results.values():
        assert (result == 0).all()
