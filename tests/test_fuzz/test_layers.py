"""Fuzzed layers, bricks and backbones: constructors and what they are given.
"""

import copy
import inspect

import fuzz
import pytest
import torch
from fuzz import ODD, attempt, mutated, odd_tensors, tensors
from hypothesis import given
from hypothesis import strategies as st

from mmrpa import layers
from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

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
def built(draw, kinds):
    kind = draw(st.sampled_from(sorted(kinds, key=lambda k: k.__name__)))
    return kind, *draw(mutated(kinds[kind]))


def construct(case):
    """The module, or None where its arguments are refused."""
    kind, args, odd = case
    done, module = attempt(kind, args)
    assert done or odd, 'refused what is right'
    return module if done else None


@st.composite
def attention_calls(draw):
    case = draw(built(ATTENTIONS))
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dims = case[1].get('embed_dims')
    dims = dims if isinstance(dims, int) and dims > 0 else 4
    return case, draw(mutated(dict(
        x=tensors(2, height * width, dims, dtype=torch.float32),
        hw_shape=st.just((height, width))), odd=st.one_of(ODD, odd_tensors())))


def check_attention(case):
    built_case, (args, odd) = case
    layer = construct(built_case)
    if layer is None:
        return
    layer.eval()
    done, out = attempt(layer, args)
    assert done or odd or built_case[2], 'refused what is right'
    if done:
        x = args['x']
        assert out.shape == x.shape
        if x.device.type == 'meta' or not x.numel():
            return
        exact = copy.deepcopy(layer).double()
        if hasattr(exact, 'impl'):
            exact.impl = 'naive'
        expected = exact(x.double(), args['hw_shape'])
        assert (out - expected).abs().max() <= 1e-3 * max(
            1, expected.abs().max().item())


@st.composite
def map_calls(draw):
    case = draw(built(MAPS))
    channels = case[1].get('in_channels')
    channels = channels if isinstance(channels, int) and channels > 0 else 3
    x = tensors(2, channels, draw(st.integers(1, 7)), draw(st.integers(1, 7)),
                dtype=torch.float32)
    return case, draw(mutated(dict(x=x), odd=st.one_of(ODD, odd_tensors())))


def check_map(case):
    built_case, (args, _) = case
    layer = construct(built_case)
    if layer is None:
        return
    done, out = attempt(layer, args)
    if done:
        tokens, hw_shape = out
        assert tokens.shape[1] == hw_shape[0] * hw_shape[1]
        if not odd_kernel(built_case[1]):
            stride = built_case[1].get('stride', 2)
            assert hw_shape == tuple(
                -(-side // stride) for side in args['x'].shape[-2:])


def odd_kernel(args):
    """Whether the grid is not that of whole strides."""
    return (args.get('padding', 0) != 0
            or args.get('kernel_size') not in (None, args.get('stride')))


def check_other(case):
    construct(case)


def check_positions(case):
    args, odd = case
    layer = layers.PositionEmbed(4, (3, 3), num_extra=1)
    done, out = attempt(layer, args)
    assert done or odd
    if done:
        assert out.shape == args['x'].shape


DIMS = dict(embed_dims=(4, 8), depths=(1, 1), num_heads=(1, 2), mlp_ratios=2)
PLAIN = dict(embed_dims=4, depths=2, num_heads=2, mlp_ratios=2)
FAMILIES = {RPDeiT: (PLAIN, 'dense'), RPPVT: (DIMS, 'sr'),
            RPSwin: (DIMS, 'window'), RPCSWin: (dict(DIMS, num_heads=2),
                                                'cross')}


@st.composite
def backbone_calls(draw):
    kind = draw(st.sampled_from(list(FAMILIES)))
    arch, own = FAMILIES[kind]
    arch = draw(st.one_of(st.just(arch), st.fixed_dictionaries({
        key: st.one_of(st.just(value), st.just(value), ODD)
        for key, value in arch.items()})))
    attention = st.sampled_from(['rp', 'dense', own])
    valid = dict(
        arch=st.just(arch), in_channels=COUNT,
        attention=st.one_of(attention, st.tuples(attention, attention)),
        num_representatives=st.one_of(COUNT, st.tuples(COUNT, COUNT)),
        rp_cfg=st.sampled_from([None, dict(), dict(routing='tokens'),
                                dict(impl='naive', dwc_kernel_size=5),
                                dict(foo=1), dict(num_heads=2)]),
        qkv_bias=st.booleans(), drop_rate=RATE, drop_path_rate=RATE,
        out_indices=st.sampled_from([(0, ), (1, ), (0, 1), (-1, )]),
        frozen_stages=st.integers(-1, 2),
        norm_cfg=st.sampled_from([None, dict(type='LN'), dict(type='BN'),
                                  dict(type='GN'), dict(type='BN', foo=1)]),
        with_cp=st.booleans())
    own_args = dict(
        img_size=st.sampled_from([16, 32]), window_size=COUNT,
        split_sizes=st.one_of(COUNT, st.tuples(COUNT, st.none())),
        with_cls_token=st.booleans(),
        out_type=st.sampled_from(['featmap', 'cls_token', 'avg_featmap']))
    known = inspect.signature(kind.__init__).parameters
    valid.update({n: s for n, s in own_args.items() if n in known})
    args, odd = draw(mutated(valid))
    channels = args['in_channels']
    channels = channels if isinstance(channels, int) and channels > 0 else 3
    x = tensors(2, channels, draw(st.integers(1, 40)),
                draw(st.integers(1, 40)), dtype=torch.float32)
    return kind, args, odd, draw(
        mutated(dict(x=x), odd=st.one_of(ODD, odd_tensors())))


def check_backbone(case):
    kind, args, _, (inputs, _) = case
    done, backbone = attempt(kind, args)
    if not done:
        return
    backbone.eval()
    done, maps = attempt(lambda x: backbone(x), inputs, ['images'])
    if not done:
        return
    assert len(maps) == len(backbone.out_indices)
    x = inputs['x']
    for out, channels, stride in zip(maps, backbone.out_channels,
                                     backbone.strides, strict=True):
        if out.dim() == 4:
            assert out.shape == (len(x), channels, *(
                -(-side // stride) for side in x.shape[-2:]))
        else:
            assert out.shape == (len(x), channels)
    if x.numel():
        exact = copy.deepcopy(backbone).double()(x.double())
        for out, e in zip(maps, exact, strict=True):
            assert (out - e).abs().max() <= 1e-2 * max(1, e.abs().max())


@pytest.mark.parametrize(('check', 'strategy'), [
    (check_attention, attention_calls()), (check_map, map_calls()),
    (check_other, built(OTHERS)), (check_backbone, backbone_calls()),
    (check_positions, mutated(dict(
        x=tensors(2, 13, 4, dtype=torch.float32), hw_shape=st.just((3, 4))),
        odd=st.one_of(ODD, odd_tensors())))],
    ids=lambda v: getattr(v, '__name__', ''))
class TestLayers:

    def test_short(self, check, strategy):
        fuzz.SHORT(given(strategy)(lambda case: check(case)))()

    @pytest.mark.long
    def test_long(self, check, strategy):
        fuzz.LONG(given(strategy)(lambda case: check(case)))()
