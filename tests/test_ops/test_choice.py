"""Which implementation computes what, and what is refused."""

import pytest
import torch
from operands import IMPLS, TRITON, make_inputs, make_qkv_inputs, place

from mmrpa.ops import choose_impl, rp_attention, rp_attention_qkv

F16, BF16, F32, F64 = (torch.float16, torch.bfloat16, torch.float32,
                       torch.float64)
CHOICES = [
    # device, dtype, d, M, routing, chosen
    ('cuda', F32, 32, 64, 'representatives', 'triton'),
    ('cuda', BF16, 32, 64, 'representatives', 'triton'),
    ('cuda', F16, 32, 64, 'representatives', 'triton'),
    ('cuda', F64, 32, 64, 'representatives', 'fused'),
    ('cuda', BF16, 15, 64, 'representatives', 'fused'),
    ('cuda', BF16, 16, 64, 'representatives', 'triton'),
    ('cuda', BF16, 40, 64, 'representatives', 'triton'),
    ('cuda', BF16, 128, 64, 'representatives', 'triton'),
    ('cuda', BF16, 129, 64, 'representatives', 'fused'),
    ('cuda', BF16, 32, 1, 'representatives', 'triton'),
    ('cuda', BF16, 32, 256, 'representatives', 'triton'),
    ('cuda', BF16, 32, 257, 'representatives', 'fused'),
    ('cuda', BF16, 32, 64, 'tokens', 'fused'),
    ('cpu', F32, 32, 64, 'representatives', 'fused'),
    ('cpu', BF16, 32, 64, 'representatives', 'fused'),
    ('cpu', F64, 4, 300, 'tokens', 'fused'),
    ('mps', F16, 32, 64, 'representatives', 'fused'),
    ('xpu', F32, 32, 64, 'representatives', 'fused'),
    ('meta', F32, 32, 64, 'representatives', 'fused'),
    ('meta', F64, 8, 64, 'tokens', 'fused'),
]


@pytest.mark.parametrize('case', CHOICES,
                         ids=lambda case: '-'.join(map(str, case)))
def test_auto_follows_the_rule(case):
    assert choose_impl(*case[:-1]) == case[-1]


def test_auto_ignores_the_batch_the_tokens_and_the_interpreter():
    tensors = make_inputs(batch=1, n=1, d=16, dtype=torch.float32)
    assert torch.equal(
        rp_attention(**tensors), rp_attention(**tensors, impl='fused'))


REFUSED = {
    'dtype': (dict(dtype=F64), {}, 'float16, got torch.float64'),
    'few-channels': (dict(d=8), {}, '16 to 128 channels a head, got 8'),
    'many-channels': (dict(d=256), {}, '16 to 128 channels a head, got 256'),
    'representatives': (dict(m=300), {}, 'at most 256 .*, got 300'),
    'routing': ({}, dict(routing='tokens'),
                "routing='representatives', got 'tokens'"),
}


@pytest.mark.parametrize('sizes,options,match', REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize('packed', [False, True], ids=['q-k-v', 'qkv'])
def test_triton_says_what_it_does_not_take(sizes, options, match, packed):
    sizes = {**dict(d=16, dtype=torch.float32), **sizes}
    with pytest.raises(ValueError, match=f"impl='triton' needs .*{match}; "
                       "use impl='auto'"):
        if packed:
            rp_attention_qkv(**make_qkv_inputs(**sizes), num_heads=2,
                             hw_shape=(2, 3), impl='triton', **options)
        else:
            rp_attention(**make_inputs(**sizes), impl='triton', **options)


@pytest.mark.parametrize('impl', [TRITON])
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch, impl):
    from mmrpa.ops import triton_launch
    monkeypatch.setattr(triton_launch, 'interpreting', lambda: False)
    tensors = make_inputs(d=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="tensors on CUDA, got 'cpu'.*"
                       "TRITON_INTERPRET=1.*use impl='auto'"):
        rp_attention(**tensors, impl=impl)
    # On the meta device nothing is launched.
    with torch.device('meta'):
        tensors = make_inputs(d=16, dtype=torch.float32)
    assert rp_attention(**tensors, impl=impl).shape == tensors['q'].shape


@pytest.mark.parametrize('impl', ['', 'cuda', 'Triton', None])
def test_unknown_impl_is_named(impl):
    match = rf"impl must be one of \('auto', .*got {impl!r}"
    with pytest.raises(ValueError, match=match):
        rp_attention(**make_inputs(), impl=impl)
    with pytest.raises(ValueError, match=match):
        rp_attention_qkv(**make_qkv_inputs(), num_heads=2, hw_shape=(2, 3),
                         impl=impl)


# Arguments. They are checked before the implementation is looked at.

BAD = {
    'q-dims': (dict(q=(2, 7, 4)), 'must share one shape'),
    'k-shape': (dict(k=(2, 2, 8, 4)), r'\(2, 2, 8, 4\)'),
    'anchor-heads': (dict(anchors=(3, 3, 4)), 'anchors must be'),
    'anchor-dims': (dict(anchors=(2, 3, 5)), r'anchors .* got \(2, 3, 5\)'),
    'no-anchor': (dict(anchors=(2, 0, 4)), 'M at least 1'),
    'weight': (dict(interact_weight=(2, 4, 4)), 'interact_weight must be'),
    'proj': (dict(interact_proj=(3, 3)), 'interact_proj must be'),
    'k-dtype': (dict(k=F32), 'k is torch.float32 but q torch.float64'),
    'v-dtype': (dict(v=F16), 'v is torch.float16 .* must share one dtype'),
    'v-device': (dict(v='meta'), 'v is on meta but q on cpu; move one'),
    'anchors-device': (dict(anchors='meta'), 'anchors is on meta but q on'),
    'proj-device': (dict(interact_proj='meta'), 'interact_proj is on meta'),
}
BAD_QKV = {
    'qkv-dims': (dict(qkv=(2, 2, 7, 24)), r'qkv must be .*\(2, 2, 7, 24\)'),
    'qkv-channels': (dict(qkv=(2, 7, 25)), r'\(2, 7, 25\) with num_heads=2'),
    'no-heads': (dict(num_heads=0), 'num_heads must be at least 1, got 0'),
    'heads': (dict(num_heads=4), r'anchors must be \(4, M, 2\)'),
    'dwc-shape': (dict(dwc_weight=(8, 1, 3, 5)), 'dwc_weight must be'),
    'dwc-channels': (dict(dwc_weight=(4, 1, 3, 3)),
                     r'dwc_weight must be \(8, 1, 3, 3\), got \(4, 1, 3, 3'),
    'dwc-scalar': (dict(dwc_weight=()), 'dwc_weight must be'),
    'dwc-even': (dict(dwc_weight=(8, 1, 4, 4)), 'odd kernel size, got 4'),
    'dwc-none': (dict(dwc_weight=(8, 1, 0, 0)), 'odd kernel size, got 0'),
    'dwc-bias': (dict(dwc_bias=(4, )), r'dwc_bias must be \(8,\), got \(4,'),
    'bias-alone': (dict(dwc_weight=None), 'dwc_bias without dwc_weight'),
    'large-map': (dict(hw_shape=(2, 4)),
                  r'hw_shape=\(2, 4\) must be a map .* at most N=7 tokens'),
    'empty-map': (dict(hw_shape=(0, 5)), r'hw_shape=\(0, 5\) must be a map'),
    'negative-map': (dict(hw_shape=(-1, -2)),
                     'hw_shape must be at least 0, got -1'),
    'dwc-device': (dict(dwc_weight='meta'), 'dwc_weight is on meta but qkv'),
    'bias-device': (dict(dwc_bias='meta'), 'dwc_bias is on meta but qkv on'),
}


def spoil(arguments, bad):
    """Give arguments another shape, dtype, device or value."""
    for name, value in bad.items():
        if isinstance(value, tuple) and name != 'hw_shape':
            value = torch.zeros(value, dtype=torch.float64)
        elif isinstance(value, (str, torch.dtype)):
            value = arguments[name].to(value)
        arguments[name] = value
    return arguments


@pytest.mark.parametrize('impl', ['auto', *IMPLS])
@pytest.mark.parametrize('bad,match', BAD.values(), ids=BAD)
def test_bad_arguments_are_named(impl, bad, match):
    with pytest.raises(ValueError, match=match):
        rp_attention(**spoil(make_inputs(proj=True), bad), impl=impl)


@pytest.mark.parametrize('impl', ['auto', *IMPLS])
@pytest.mark.parametrize('bad,match', BAD_QKV.values(), ids=BAD_QKV)
def test_bad_arguments_of_qkv_are_named(impl, bad, match):
    arguments = dict(make_qkv_inputs(), num_heads=2, hw_shape=(2, 3))
    with pytest.raises(ValueError, match=match):
        rp_attention_qkv(**spoil(arguments, bad), impl=impl)


@pytest.mark.parametrize('impl', ['auto', *IMPLS])
@pytest.mark.parametrize('hw_shape', [None, 6, (2, 3.), 'ab'])
def test_no_map_is_named(impl, hw_shape):
    """Also where there is no convolution to need one."""
    arguments = dict(make_qkv_inputs(), num_heads=2, hw_shape=hw_shape)
    for spoiled in (arguments, dict(arguments, dwc_weight=None,
                                    dwc_bias=None)):
        with pytest.raises(TypeError, match='hw_shape must be'):
            rp_attention_qkv(**spoiled, impl=impl)


@pytest.mark.parametrize('name', make_qkv_inputs(proj=True))
def test_integers_are_refused(name):
    arguments = dict(make_qkv_inputs(proj=True), num_heads=2, hw_shape=(2, 3))
    arguments[name] = arguments[name].long()
    with pytest.raises(TypeError, match=f'{name} must be floating point, got '
                       'torch.int64'):
        rp_attention_qkv(**arguments)


def test_bad_options_are_named():
    tensors = make_inputs()
    with pytest.raises(ValueError, match="routing must be one of.*'rows'"):
        rp_attention(**tensors, routing='rows')
    with pytest.raises(ValueError, match="reduction must be one of.*'max'"):
        rp_attention(**tensors, reduction='max')
    with pytest.raises(TypeError, match='k must be floating point'):
        rp_attention(**dict(tensors, k=tensors['k'].long()))


@pytest.mark.parametrize('impl', IMPLS)
def test_parameters_may_be_of_another_dtype(impl):
    tensors = {name: t.to(BF16 if name in 'qkv' else F32)
               for name, t in place(make_inputs(d=16), impl).items()}
    assert rp_attention(**tensors, impl=impl).dtype == BF16
