"""Fuzzed operators: the value of the naive one in float64, or a clear error.
"""

import fuzz
import pytest
import torch
from fuzz import ODD, attempt, mutated, odd_tensors, tensors
from hypothesis import given
from hypothesis import strategies as st

from mmrpa import ops

# What half a mantissa leaves of numbers that cancel.
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1,
          torch.float16: 0.02}
SIZES = st.integers(0, 9)


@st.composite
def attention_args(draw):
    """Arguments of ``rp_attention``, up to two of them odd."""
    b, h, n, m, d = (draw(s) for s in (
        st.integers(0, 2), st.integers(1, 3), SIZES, st.integers(1, 4),
        st.integers(1, 5)))
    dtype = draw(st.sampled_from(fuzz.DTYPES))
    device = draw(st.sampled_from(['cpu', 'cpu', 'cpu', 'meta']))

    def make(*shape):
        return tensors(*shape, dtype=dtype, device=device)

    square = draw(st.sampled_from([(h, d, d), (h * d, h * d)]))
    return draw(mutated(dict(
        q=make(b, h, n, d), k=make(b, h, n, d), v=make(b, h, n, d),
        anchors=make(draw(st.sampled_from([1, h])), m, d),
        interact_weight=make(3, *square),
        interact_proj=st.one_of(st.none(), make(*square)),
        routing=st.sampled_from(['representatives', 'tokens']),
        reduction=st.sampled_from(['mean', 'sum']),
        interact_residual=st.booleans(),
        scale=st.one_of(st.none(), st.floats(0.1, 2)),
        impl=st.sampled_from(ops.IMPLS)), odd=st.one_of(ODD, odd_tensors())))


@st.composite
def qkv_args(draw):
    """Arguments of ``rp_attention_qkv``, up to two of them odd."""
    b, h, m, d, height, width, cls, pad = (draw(s) for s in (
        st.integers(0, 2), st.integers(1, 3), st.integers(1, 4),
        st.integers(1, 4), st.integers(1, 4), st.integers(1, 4),
        st.integers(0, 2), st.integers(0, 2)))
    dtype = draw(st.sampled_from(fuzz.DTYPES))
    device = draw(st.sampled_from(['cpu', 'cpu', 'cpu', 'meta']))
    channels = h * d

    def make(*shape):
        return tensors(*shape, dtype=dtype, device=device)

    return draw(mutated(dict(
        qkv=make(b, height * width + cls, 3 * channels),
        anchors=make(h, m, d), interact_weight=make(3, h, d, d),
        num_heads=st.just(h), hw_shape=st.just((height, width)),
        dwc_weight=make(channels, 1, 2 * pad + 1, 2 * pad + 1),
        dwc_bias=st.one_of(st.none(), make(channels)),
        reduction=st.sampled_from(['mean', 'sum']),
        impl=st.sampled_from(ops.IMPLS)), odd=st.one_of(ODD, odd_tensors())))


@st.composite
def layer_args(draw):
    """Arguments of ``rp_attention_layer``, up to two of them odd."""
    h, m, d, height, width, cls = (draw(s) for s in (
        st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
        st.integers(1, 5), st.integers(1, 5), st.integers(0, 2)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    c = h * d

    def make(*shape):
        return tensors(*shape, dtype=dtype)

    return draw(mutated(dict(
        x=make(draw(st.integers(1, 2)), height * width + cls, c),
        qkv_weight=make(3 * c, c), anchors=make(h, m, d),
        interact_weight=make(3, h, d, d), out_weight=make(c, c),
        dwc_weight=make(c, 1, 3, 3), num_heads=st.just(h),
        hw_shape=st.just((height, width)),
        qkv_bias=st.one_of(st.none(), make(3 * c)),
        out_bias=st.one_of(st.none(), make(c)),
        reduction=st.sampled_from(['mean', 'sum']),
        interact_residual=st.booleans()), odd=st.one_of(ODD, odd_tensors())))


def close(out, exact, dtype):
    assert out.shape == exact.shape
    assert out.dtype == dtype
    if out.device.type != 'meta' and out.numel():
        # Relative to the largest of a few numbers; float64's own scale.
        limit = BOUNDS[dtype] * max(1, exact.abs().max().item())
        assert (out.double() - exact).abs().max() <= limit


def in_float64(args):
    return {name: value.double() if isinstance(value, torch.Tensor) else value
            for name, value in args.items()}


def check_attention(case):
    args, odd = case
    done, out = attempt(ops.rp_attention, args)
    if done:
        exact = ops.rp_attention(**{**in_float64(args), 'impl': 'naive'})
        close(out, exact, args['q'].dtype)
    else:
        assert odd or args['impl'] == 'triton', 'refused what is right'


def check_qkv(case):
    args, odd = case
    done, out = attempt(ops.rp_attention_qkv, args)
    if done:
        exact = ops.rp_attention_qkv(**{**in_float64(args), 'impl': 'naive'})
        close(out, exact, args['qkv'].dtype)
    else:
        assert odd or args['impl'] == 'triton', 'refused what is right'


def check_layer(case):
    args, odd = case
    done, out = attempt(ops.rp_attention_layer, args)
    if not done:
        assert odd, 'refused what is right'
        return
    exact = in_float64(args)
    x, weights = exact.pop('x'), {
        n: exact.pop(n, None) for n in ('qkv_weight', 'qkv_bias',
                                        'out_weight', 'out_bias')}
    qkv = torch.nn.functional.linear(x, weights['qkv_weight'],
                                     weights['qkv_bias'])
    exact = torch.nn.functional.linear(
        ops.rp_attention_qkv(qkv, impl='naive', **exact),
        weights['out_weight'], weights['out_bias'])
    close(out, exact, args['x'].dtype)


PARTS = dict(
    route=('k', 'anchors', 'routing'),
    gather=('k', 'v', 'anchors', 'routing', 'reduction'),
    interact=('z', 'weight', 'proj', 'residual'),
    distribute=('q', 'k_rep', 'v_rep', 'scale'))


@st.composite
def part_args(draw):
    """One of the four parts of the definition, and its arguments."""
    name = draw(st.sampled_from(sorted(PARTS)))
    h, n, m, d = (draw(st.integers(1, 4)) for _ in range(4))
    args = dict(
        k=tensors(2, h, n, d, dtype=torch.float32),
        q=tensors(2, h, n, d, dtype=torch.float32),
        v=tensors(2, h, n, d, dtype=torch.float32),
        anchors=tensors(h, m, d, dtype=torch.float32),
        z=tensors(2, h, m, d, dtype=torch.float32),
        k_rep=tensors(2, h, m, d, dtype=torch.float32),
        v_rep=tensors(2, h, m, d, dtype=torch.float32),
        weight=tensors(3, h, d, d, dtype=torch.float32),
        proj=st.one_of(st.none(), tensors(h, d, d, dtype=torch.float32)),
        residual=st.booleans(), scale=st.floats(0.1, 2),
        routing=st.sampled_from(ops.naive.ROUTINGS),
        reduction=st.sampled_from(ops.naive.REDUCTIONS))
    return name, *draw(mutated({a: args[a] for a in PARTS[name]},
                               odd=st.one_of(ODD, odd_tensors())))


def check_part(case):
    name, args, odd = case
    done, out = attempt(getattr(ops, name), args)
    assert done or odd, 'refused what is right'
    if done and out[0].device.type != 'meta':
        for part in out if isinstance(out, tuple) else (out, ):
            assert part.isfinite().all()


CHOICE = dict(
    device_type=st.sampled_from(['cpu', 'cuda', 'meta']),
    dtype=st.sampled_from(fuzz.DTYPES), head_dims=st.integers(1, 200),
    num_representatives=st.integers(1, 300),
    routing=st.sampled_from(['representatives', 'tokens']))


def check_choice(case):
    args, odd = case
    done, impl = attempt(ops.choose_impl, args)
    assert impl in ops.IMPLS[1:] if done else odd


@pytest.mark.parametrize(('check', 'strategy'), [
    (check_attention, attention_args()), (check_qkv, qkv_args()),
    (check_layer, layer_args()), (check_part, part_args()),
    (check_choice, mutated(CHOICE))], ids=lambda v: getattr(v, '__name__', ''))
class TestOperators:

    def test_short(self, check, strategy):
        fuzz.SHORT(given(strategy)(lambda case: check(case)))()

    @pytest.mark.long
    def test_long(self, check, strategy):
        fuzz.LONG(given(strategy)(lambda case: check(case)))()
