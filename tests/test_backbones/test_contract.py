"""What every backbone promises, for all families and attentions alike."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from zoo import SMALL, attentions, build

from mmrpa.backbones import stage as stage_module
from mmrpa.ops import absorbed

CASES = [(f, a) for f in SMALL for a in attentions(f)]
IDS = [f'{f}-{a}' for f, a in CASES]
every_family = pytest.mark.parametrize('family', SMALL)
every_case = pytest.mark.parametrize('family,attention', CASES, ids=IDS)


@pytest.fixture(autouse=True)
def absorb_projections_of_small_maps(monkeypatch):
    """The contract's maps are small; large ones take another operator."""
    monkeypatch.setattr(absorbed, 'MIN_TOKENS', 16)


def patch(family):
    return SMALL[family][0].patch_size


@every_case
def test_any_image_size_from_one_patch_up(family, attention):
    model = build(family, attention=attention).eval()
    p = patch(family)
    sizes = [(p, p), (64, 64), (p, 3 * p + 1), (67, 45), (33, 128), (64, 64)]
    first = None
    for size in sizes:  # one model, the size changes between batches
        x = torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).view(2, 3, *size)
        maps = model(x)
        assert isinstance(maps, tuple)
        for m, c, s in zip(
                maps, model.out_channels, model.strides, strict=True):
            assert m.shape == (2, c, -(-size[0] // s), -(-size[1] // s))
            assert m.is_contiguous() and m.isfinite().all()
        if size == (64, 64):
            if first is not None:  # nothing is remembered between batches
                for a, b in zip(first, maps, strict=True):
                    torch.testing.assert_close(a, b)
            first = maps


@every_family
@pytest.mark.parametrize('out_indices', [(0, ), (1, 3), (-1, ), (-3, -1), 2])
def test_out_indices(family, out_indices):
    given = copy.copy(out_indices)
    everything = build(family, norm_cfg=None).eval()
    model = build(family, norm_cfg=None, out_indices=out_indices).eval()
    model.load_state_dict(everything.state_dict(), strict=False)
    assert out_indices == given
    wanted = (out_indices, ) if isinstance(out_indices, int) else out_indices
    x = torch.randn(2, 3, 64, 96)
    all_maps, maps = everything(x), model(x)
    assert len(maps) == len(model.out_channels) == len(wanted)
    for m, i, c, s in zip(
            maps, wanted, model.out_channels, model.strides, strict=True):
        torch.testing.assert_close(m, all_maps[i])
        assert c == everything.out_channels[i] and c == m.shape[1]
        assert s == everything.strides[i]


@every_case
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, )],
                         ids=['all', 'partial'])
def test_every_parameter_gets_a_gradient(family, attention, out_indices):
    model = build(family, attention=attention, out_indices=out_indices)
    maps = model(torch.randn(2, 3, 64, 64))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@every_case
def test_checkpointing_changes_no_output_and_no_gradient(
        family, attention, monkeypatch):
    used = []

    def spy(*args, use_reentrant):
        used.append(use_reentrant)
        return torch_checkpoint(*args, use_reentrant=use_reentrant)

    monkeypatch.setattr(stage_module, 'checkpoint', spy)
    options = dict(attention=attention, drop_path_rate=0.5, drop_rate=0.1)
    plain = build(family, **options)
    recomputed = build(family, with_cp=True, **options)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    results = []
    for model in (plain, recomputed):
        torch.manual_seed(1)  # the same drop path and dropout
        maps = model(x)
        sum(m.square().sum() for m in maps).backward()
        results.append([*maps, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    # Each block of the second model went through it, not reentrantly.
    assert used == [False] * sum(plain.arch['depths'])


@every_case
def test_bfloat16_autocast_stays_close_to_float32(family, attention):
    model = build(family, attention=attention, with_cp=True)
    x = torch.randn(2, 3, 67, 45)
    expected = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = model(x)
    for m, e in zip(maps, expected, strict=True):
        assert (m.float() - e).norm() < 0.05 * e.norm()
    sum(m.float().square().mean() for m in maps).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@every_family
@pytest.mark.parametrize('norm', ['LN', 'BN'])
@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(family, norm, frozen):
    model = build(family, frozen_stages=frozen, norm_cfg=dict(type=norm))

    def is_frozen(name):
        part, _, rest = name.partition('.')
        if part == 'stem':
            return frozen >= 0
        number = rest.split('.')[0] if part == 'stages' else part[4:]
        return int(number) < frozen

    def check():
        for name, p in model.named_parameters():
            assert p.requires_grad != is_frozen(name), name

    check()
    assert model.train() is model
    check()
    for name, module in model.named_modules():
        if name and '.' in name:  # stages and norms, not their containers
            assert module.training != is_frozen(name), name
    if frozen < 4:  # what is not frozen learns, what is frozen stays
        sum(m.sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
        for name, p in model.named_parameters():
            assert (p.grad is None) == is_frozen(name), name
    assert model.eval() is model
    assert not any(m.training for m in model.modules())


@every_family
def test_drop_path_grows_over_all_blocks(family):
    model = build(family, drop_path_rate=0.4)
    rates = [b.drop_path.rate for s in model.stages for b in s.blocks]
    expected = [0.4 * i / (len(rates) - 1) for i in range(len(rates))]
    assert rates == pytest.approx(expected)
    partial = build(family, drop_path_rate=0.4, out_indices=(1, ))
    rates_partial = [b.drop_path.rate for s in partial.stages
                     for b in s.blocks]
    assert rates_partial == pytest.approx(expected[:len(rates_partial)])


@every_family
@pytest.mark.parametrize('norm_cfg', [
    None,
    dict(type='LN', eps=1e-3),
    dict(type='BN', momentum=0.2),
    dict(type='BN', requires_grad=False)
], ids=str)  # yapf: disable
def test_norm_of_the_outputs(family, norm_cfg):
    bare = build(family, norm_cfg=None)
    model = build(family, norm_cfg=norm_cfg)
    model.load_state_dict(bare.state_dict(), strict=False)
    x = torch.randn(3, 3, 64, 96)
    for m, raw in zip(model(x), bare(x), strict=True):
        if norm_cfg is None:
            torch.testing.assert_close(m, raw)
            continue
        axis, eps = ((1, ), 1e-3) if norm_cfg['type'] == 'LN' else ((0, 2, 3),
                                                                    1e-5)
        mean = raw.mean(axis, keepdim=True)
        std = (raw.var(axis, keepdim=True, unbiased=False) + eps).sqrt()
        torch.testing.assert_close(
            m, (raw - mean) / std, rtol=1e-3, atol=1e-3)
    if norm_cfg is not None:
        norm = model.norm0.norm
        assert norm.weight.requires_grad == norm_cfg.get('requires_grad', True)
        assert 'momentum' not in norm_cfg or norm.momentum == 0.2


@every_case
def test_checkpoint_of_another_resolution_is_resized(family, attention):
    sizes = dict(img_size=96) if family in ('deit', 'pvt') else (
        dict(window_size=5) if family == 'swin' else {})
    source = build(family, attention=attention)
    target = build(family, attention=attention, **sizes)
    load_state_dict(target, source.state_dict(), strict=True)
    own = target.state_dict()
    resized = 0
    for name, value in source.state_dict().items():
        if value.shape == own[name].shape:
            torch.testing.assert_close(own[name], value)
            continue
        resized += 1
        table = name.endswith('relative_position_bias_table')
        extra = 1 if family == 'deit' else 0  # the CLS token's row
        old, new = (t if table else t[0] for t in (value, own[name]))
        torch.testing.assert_close(new[:extra], old[:extra])
        sides = [round(len(t[extra:])**0.5) for t in (old, new)]
        grid = old[extra:].view(sides[0], sides[0], -1).permute(2, 0, 1)
        expected = torch.nn.functional.interpolate(
            grid[None], (sides[1], sides[1]), mode='bicubic')[0]
        torch.testing.assert_close(new[extra:], expected.flatten(1).T)
    expects = (family in ('deit', 'pvt') or
               (family == 'swin' and attention == 'window'))
    assert (resized > 0) == expects


@every_family
def test_state_dict_round_trip_is_exact(family):
    source, target = build(family), build(family)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(source(x)[-1], target(x)[-1])
    target.load_state_dict(source.state_dict(), strict=True)
    for a, b in zip(source(x), target(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_family
def test_attention_and_representatives_a_stage(family):
    own = SMALL[family][0].own_attention
    model = build(
        family,
        attention=['rp', own, 'dense', 'rp'],
        num_representatives=[2, 3, 4, 6],
        rp_cfg=dict(anchors='shared', dwc_kernel_size=5))
    names = [type(s.blocks[0].attn).__name__ for s in model.stages]
    assert names[0] == names[3] == 'RPAttention'
    assert names[2] == 'DenseAttention' and names[1] != 'RPAttention'
    first, last = (model.stages[i].blocks[0].attn for i in (0, 3))
    assert first.anchors.shape[:2] == (1, 2)
    assert last.anchors.shape[:2] == (1, 6)
    assert last.dwc.kernel_size == (5, 5)


@every_family
def test_layer_depth(family):
    model = build(family)
    total = sum(model.arch['depths'])
    depths = {
        name: model.get_layer_depth('backbone.' + name, 'backbone.')
        for name, _ in model.named_parameters()
    }
    assert {n for _, n in depths.values()} == {total + 2}
    assert sorted({d for d, _ in depths.values()}) == list(range(total + 2))
    block = 0
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            block += 1
            prefix = f'stages.{i}.blocks.{j}.'
            for name, (depth, _) in depths.items():
                if name.startswith(prefix):
                    assert depth == block
        if i and stage.downsample is not None:
            first = block - len(stage.blocks) + 1
            assert depths[f'stages.{i}.downsample.norm.weight'][0] == first
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (total + 1,
                                                                    total + 2)


@every_family
def test_gradients_reach_every_pixel(family):
    # Global attention: one output cell depends on the whole image.
    model = build(family, out_indices=(0, ), norm_cfg=None)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(x)[0][0, :, 0, 0].square().sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()


BAD = {
    'arch': (dict(arch='huge'), ValueError, "no arch 'huge'.*tiny"),
    'arch-keys': (dict(arch=dict(depths=(1, ))), ValueError, 'with the keys'),
    'typo': (dict(drop_path=0.1), TypeError,
             "no argument 'drop_path'; did you mean 'drop_path_rate'.*Allowed"
             ),
    'attention': (dict(attention='agent'), ValueError, "out of.*'agent'"),
    'attention-length': (dict(attention=['rp', 'rp']), ValueError,
                         'attention needs one value or 4'),
    'representatives': (dict(num_representatives=0), ValueError,
                        'num_representatives must be at least 1, got 0'),
    'representatives-length': (dict(num_representatives=(1, 2)), ValueError,
                               r'num_representatives.*\(1, 2\)'),
    'out-high': (dict(out_indices=(4, )), ValueError, r'\[-4, 3\].*\(4,\)'),
    'out-low': (dict(out_indices=(-5, )), ValueError, r'\[-4, 3\]'),
    'out-empty': (dict(out_indices=()), ValueError, 'one or more'),
    'out-twice': (dict(out_indices=(1, 1)), ValueError, 'different'),
    'out-falling': (dict(out_indices=(2, 1)), ValueError, 'rising'),
    'frozen': (dict(frozen_stages=5), ValueError, r'\[-1, 4\], got 5'),
    'norm': (dict(norm_cfg=dict(type='GN')), ValueError, "norm_cfg.*'GN'"),
    'rp-cfg': (dict(rp_cfg=dict(anchor='shared')), TypeError, "'anchor'"),
    'rp-cfg-twice': (dict(rp_cfg=dict(num_representatives=8)), ValueError,
                     'rp_cfg has num_representatives=8; set it by the'),
    'drop-path': (dict(drop_path_rate=1.), ValueError, r'got 1\.0'),
}


@every_family
@pytest.mark.parametrize('options,error,match', BAD.values(), ids=BAD)
def test_bad_arguments_are_named(family, options, error, match):
    with pytest.raises(error, match=match):
        build(family, **options)


@every_family
def test_subclass_that_hands_its_arguments_on(family):
    cls, defaults = SMALL[family]

    class Extended(cls):

        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    assert Extended(extra=3, **defaults).extra == 3
    with pytest.raises(TypeError, match="no argument 'drop_path'"):
        Extended(extra=3, drop_path=0.1, **defaults)


@every_family
def test_bad_images_are_named(family):
    model = build(family)
    p = patch(family)
    with pytest.raises(ValueError, match=f'at least {p}x{p}.*got {p - 1}x50'):
        model(torch.zeros(1, 3, p - 1, 50))
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\), got \(1, 4'):
        model(torch.zeros(1, 4, 64, 64))
