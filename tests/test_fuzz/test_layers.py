"""Fuzzed layers, bricks and backbones: constructors and what they are given.
"""

import copy
import inspect

import fuzz
import pytest
import torch
from fuzz import ODD, attempt, mutated, odd_tensors, tensors
from hypothesis import strategies as st

from mmrpa import layers
from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

ODD_INPUTS = st.one_of(ODD, odd_tensors())
COUNT, RATE = st.integers(1, 4), st.floats(0, 0.9)
EVEN = st.sampled_from([4, 8])
COMMON = dict(embed_dims=EVEN, num_heads=st.sampled_from([1, 2]),
              qkv_bias=st.booleans(), proj_drop=RATE)
ATTENTIONS = {
    layers.RPAttention: dict(
        COMMON, num_representatives=COUNT,
        anchors=st.sampled_from(['per_head', 'shared']),
        routing=st.sampled_from(['representatives', 'tokens']),
        reduction=st.sampled_from(['mean', 'sum']),
        interact=st.sampled_from(['grouped', 'full']),
        interact_residual=st.booleans(), interact_proj=st.booleans(),
        dwc_kernel_size=st.sampled_from([0, 1, 3, 5]),
        impl=st.sampled_from(['auto', 'naive', 'fused'])),
    layers.DenseAttention: COMMON,
    layers.SpatialReductionAttention: dict(COMMON, sr_ratio=COUNT),
    layers.WindowAttention: dict(COMMON, window_size=COUNT,
                                 shift=st.booleans()),
    layers.CrossShapedWindowAttention: dict(
        COMMON, num_heads=st.just(2),
        split_size=st.one_of(st.none(), COUNT)),
}
MAPS = {
    layers.PatchEmbed: dict(
        in_channels=COUNT, embed_dims=COUNT, stride=COUNT,
        kernel_size=st.one_of(st.none(), COUNT), padding=st.integers(0, 2),
        norm_eps=st.one_of(st.none(), st.just(1e-5))),
    layers.PatchMerging: dict(in_channels=COUNT, embed_dims=COUNT),
}
OTHERS = {
    layers.DropPath: dict(rate=RATE),
    layers.FFN: dict(embed_dims=COUNT, hidden_dims=COUNT, drop_rate=RATE),
    layers.PositionEmbed: dict(
        embed_dims=COUNT, hw_shape=st.tuples(COUNT, COUNT),
        num_extra=st.integers(0, 2)),
    layers.TransformerBlock: dict(
        attn=st.builds(layers.DenseAttention, st.just(4), st.just(2)),
        embed_dims=st.just(4), mlp_ratio=st.floats(0.5, 4), drop_rate=RATE,
        drop_path_rate=RATE, norm_eps=st.just(1e-5)),
}


@st.composite
def built(draw, kinds, at_most):
    kind = draw(st.sampled_from(sorted(kinds, key=lambda k: k.__name__)))
    return kind, *draw(mutated(kinds[kind], at_most=at_most))


def construct(case):
    """The module, or None where its arguments are refused."""
    kind, args, odd = case
    done, module = attempt(kind, args)
    assert done or odd, 'refused what is right'
    return module if done else None


@st.composite
def attention_calls(draw, at_most):
    case = draw(built(ATTENTIONS, at_most))
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dims = case[1].get('embed_dims')
    dims = dims if isinstance(dims, int) and dims > 0 else 4
    return case, draw(mutated(dict(
        x=tensors(2, height * width, dims, dtype=torch.float32),
        hw_shape=st.just((height, width))), ODD_INPUTS, at_most))


def check_attention(case):
    built_case, (args, odd) = case
    layer = construct(built_case)
    if layer is None:
        return False
    strengthen(layer.eval())
    done, out = attempt(layer, args)
    assert done or odd or built_case[2], 'refused what is right'
    if done:
        x = args['x']
        assert out.shape == x.shape
        if x.device.type != 'meta' and x.numel():
            assert_close(out, defined(layer)(x.double(), args['hw_shape']))
    return done


def strengthen(module):
    """Weights of which each part has its share in the output.

    Those that training starts from are so small that what is wrong in an
    attention would hardly be seen behind it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in module.parameters():
            noise = torch.randn(weights.shape, generator=generator)
            weights.copy_(weights + noise / max(1, weights.shape[-1])**0.5)


def assert_close(out, exact):
    assert (out - exact).abs().max() <= 1e-4 * exact.abs().max()


def defined(module):
    """A copy that computes what is defined, in float64."""
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if isinstance(part, layers.RPAttention):
            part.impl = 'naive'
    return exact


@st.composite
def map_calls(draw, at_most):
    case = draw(built(MAPS, at_most))
    channels = case[1].get('in_channels')
    channels = channels if isinstance(channels, int) and channels > 0 else 3
    # A map smaller than the kernel, of at most 4, is refused.
    side = st.integers(1 if at_most else 4, 7)
    x = tensors(2, channels, draw(side), draw(side), dtype=torch.float32)
    return case, draw(mutated(dict(x=x), ODD_INPUTS, at_most))


def check_map(case):
    built_case, (args, _) = case
    layer = construct(built_case)
    if layer is None:
        return False
    done, out = attempt(layer, args)
    if done:
        tokens, hw_shape = out
        assert tokens.shape[1] == hw_shape[0] * hw_shape[1]
        if not odd_kernel(built_case[1]):
            stride = built_case[1].get('stride', 2)
            assert hw_shape == tuple(
                -(-side // stride) for side in args['x'].shape[-2:])
    return done


def odd_kernel(args):
    """Whether the grid is not that of whole strides."""
    return (args.get('padding', 0) != 0
            or args.get('kernel_size') not in (None, args.get('stride')))


def check_other(case):
    return construct(case) is not None


def check_positions(case):
    args, odd = case
    layer = layers.PositionEmbed(4, (3, 3), num_extra=1)
    done, out = attempt(layer, args)
    assert done or odd
    if done:
        assert out.shape == args['x'].shape
    return done


DIMS = dict(embed_dims=(4, 8), depths=(1, 1), num_heads=(1, 2), mlp_ratios=2)
PLAIN = dict(embed_dims=4, depths=2, num_heads=2, mlp_ratios=2)
FAMILIES = {RPDeiT: (PLAIN, 'dense'), RPPVT: (DIMS, 'sr'),
            RPSwin: (DIMS, 'window'), RPCSWin: (dict(DIMS, num_heads=2),
                                                'cross')}


# Arguments of RPAttention that rp_cfg may hold.
RP_CFG = {name: values
          for name, values in ATTENTIONS[layers.RPAttention].items()
          if name not in (*COMMON, 'num_representatives')}
# Besides what is odd for all: right for one argument, wrong for another, or
# for none.
ODD_PARTS = st.one_of(
    ODD, st.sampled_from([
        dict(foo=1), dict(num_heads=2), dict(impl='nothing'),
        dict(type='GN'), dict(type='BN', foo=1), (1, 0), (2, ), (0, 1, 1),
        'rp', ('rp', 'sr'), 'cls_token']),
    *(st.fixed_dictionaries({
        key: st.one_of(st.just(value), st.just(value), ODD)
        for key, value in arch.items()}) for arch in (DIMS, PLAIN)))


@st.composite
def backbone_calls(draw, at_most):
    """A family, its arguments, and images."""
    kind = draw(st.sampled_from(list(FAMILIES)))
    arch, own = FAMILIES[kind]
    attention = st.sampled_from(['rp', 'dense', own])
    valid = dict(
        arch=st.just(arch), in_channels=COUNT,
        attention=st.one_of(attention, st.tuples(attention, attention)),
        num_representatives=st.one_of(COUNT, st.tuples(COUNT, COUNT)),
        rp_cfg=st.one_of(st.none(),
                         st.fixed_dictionaries({}, optional=RP_CFG)),
        qkv_bias=st.booleans(), drop_rate=RATE, drop_path_rate=RATE,
        out_indices=st.sampled_from([(0, ), (1, ), (0, 1), (-1, )]),
        frozen_stages=st.integers(-1, 2),
        norm_cfg=st.sampled_from([None, dict(type='LN'), dict(type='BN'),
                                  dict(type='LN', eps=1e-6)]),
        with_cp=st.booleans())
    with_cls_token = draw(st.booleans())
    out_types = ['featmap', 'avg_featmap'] + ['cls_token'] * with_cls_token
    own_args = dict(
        img_size=st.sampled_from([16, 32]), window_size=COUNT,
        split_sizes=st.one_of(COUNT, st.tuples(COUNT, st.none())),
        with_cls_token=st.just(with_cls_token),
        out_type=st.sampled_from(out_types))
    known = inspect.signature(kind.__init__).parameters
    valid.update({n: s for n, s in own_args.items() if n in known})
    args, odd = draw(mutated(valid, ODD_PARTS, at_most))
    channels = args['in_channels']
    channels = channels if isinstance(channels, int) and channels > 0 else 3
    side, small = st.integers(kind.patch_size, 40), st.integers(1, 15)
    images = tensors(2, channels, draw(side), draw(side), dtype=torch.float32)
    return kind, args, odd, draw(mutated(dict(x=images), st.one_of(
        ODD_INPUTS,
        tensors(2, channels, draw(small), draw(small), dtype=torch.float32)),
        at_most))


def check_backbone(case):
    kind, args, odd, (inputs, odd_inputs) = case
    done, backbone = attempt(kind, args)
    assert done or odd, 'refused what is right'
    if not done:
        return False
    strengthen(backbone.eval())
    done, maps = attempt(lambda x: backbone(x), inputs, ['images'])
    assert done or odd or odd_inputs, 'refused what is right'
    if not done:
        return False
    assert len(maps) == len(backbone.out_indices)
    x = inputs['x']
    for out, channels, stride in zip(maps, backbone.out_channels,
                                     backbone.strides, strict=True):
        if out.dim() == 4:
            assert out.shape == (len(x), channels, *(
                -(-side // stride) for side in x.shape[-2:]))
        else:
            assert out.shape == (len(x), channels)
    if not x.numel():
        return False
    for out, exact in zip(maps, defined(backbone)(x.double()), strict=True):
        assert_close(out, exact)
    return True


def position_calls(at_most):
    return mutated(dict(x=tensors(2, 13, 4, dtype=torch.float32),
                        hw_shape=st.just((3, 4))), ODD_INPUTS, at_most)


KINDS = dict(
    attention=(check_attention, attention_calls),
    map=(check_map, map_calls),
    other=(check_other, lambda at_most: built(OTHERS, at_most)),
    backbone=(check_backbone, backbone_calls),
    positions=(check_positions, position_calls))


@pytest.mark.parametrize('right', [True, False], ids=['right', 'odd'])
@pytest.mark.parametrize('kind', KINDS)
class TestLayers:

    def test_short(self, kind, right):
        self.run(fuzz.SHORT, kind, right)

    @pytest.mark.long
    def test_long(self, kind, right):
        self.run(fuzz.LONG, kind, right)

    def run(self, profile, kind, right):
        check, calls = KINDS[kind]
        fuzz.run(profile, check, calls(0 if right else 2), right, 10)
