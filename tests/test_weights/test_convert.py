"""Converted weights compute what their source computes."""

import re

import pytest
import torch
from source_models import DIMS, PVT_DIMS, SOURCES, images, source_of
from torch import nn

from mmrpa.backbones import RPPVT, RPSwin
from mmrpa.weights import ConversionError, convert


def load(backbone, state_dict, report):
    """Load all that was converted; what is new may stay."""
    result = backbone.state_dict()
    assert {k for k in result if k not in state_dict} == {
        k for k, start in report.new.items() if start == 'init'}
    backbone.load_state_dict({**result, **state_dict})
    return backbone


def outputs(backbone):
    with torch.no_grad():
        return backbone(images())


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', SOURCES)
def test_the_twin_computes_what_the_source_computes(name):
    source = source_of(name)
    twin = source.twin()
    state, report = convert(source.state_dict, twin)
    assert report.carried_fraction == 1
    assert not (report.new or report.missing or report.misshapen
                or report.unexpected or report.resized)
    assert sum(report.carried.values()) == sum(
        p.numel() for p in twin.parameters())
    maps = outputs(load(twin, state, report))
    assert len(maps) == len(source.maps)
    for ours, theirs in zip(maps, source.maps, strict=True):
        assert theirs.abs().max() > 0.1
        assert_same(ours, theirs)


# Biases that options of the source's own code leave out everywhere:
# qkv_bias=False, with which nn.MultiheadAttention has none at all; mmseg's
# patch_bias=False.
@pytest.mark.parametrize('name, without, count', [
    ('official_pvt', r'attn\.(q|kv)\.bias', 12),
    ('timm_swin', r'attn\.qkv\.bias', 7),
    ('mmdet_swin', r'attn\.w_msa\.qkv\.bias', 7),
    ('official_cswin', r'\.qkv\.bias', 6),
    ('mmpretrain_deit', r'attn\.qkv\.bias', 3),
    ('mmdet_pvt', r'attn\.(in_proj_bias|out_proj\.bias)', 18),
    ('mmseg_deit', r'patch_embed\.projection\.bias', 1)])
def test_a_layer_without_a_bias_has_a_bias_of_zero(name, without, count):
    source = source_of(name)
    bare = {k: v for k, v in source.state_dict.items()
            if not re.search(without, k)}
    assert len(bare) < len(source.state_dict)
    zeros = {k: v if k in bare else torch.zeros_like(v)
             for k, v in source.state_dict.items()}
    twin = source.twin()
    state, report = convert(bare, twin)
    expected, _ = convert(zeros, twin)
    assert report.carried_fraction == 1
    assert set(report.new.values()) == {'zeros, the source has no such bias'}
    assert len(report.new) == count
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)


@pytest.mark.parametrize('name, lost, ours', [
    ('timm_swin', r'layers\.0\.blocks\.0\.attn\.qkv\.bias',
     ['stages.0.blocks.0.attn.qkv.bias']),
    ('official_swin', r'layers\.0\.downsample\.norm\.bias',
     ['stages.1.downsample.norm.bias']),
    ('mmdet_swin', r'stages\.2\.blocks\.1\.attn\.w_msa\.proj\.bias',
     ['stages.2.blocks.1.attn.proj.bias']),
    ('official_pvt', r'block1\.0\.attn\.q\.bias',
     ['stages.0.blocks.0.attn.q.bias']),
    ('official_pvt', r'.*\.attn\.kv\.bias',
     [f'stages.{i}.blocks.{j}.attn.kv.bias'
      for i, depth in enumerate(PVT_DIMS['depths']) for j in range(depth)]),
    ('official_pvt', r'block1\.0\.attn\.sr\.bias',
     ['stages.0.blocks.0.attn.sr.bias']),
    ('mmdet_pvt', r'.*\.out_proj\.bias',
     [f'stages.{i}.blocks.{j}.attn.proj.bias'
      for i, depth in enumerate(PVT_DIMS['depths']) for j in range(depth)]),
    ('official_cswin', r'stage1\.0\.attns\.0\.get_v\.bias',
     ['stages.0.blocks.0.attn.lepe.0.bias']),
    ('official_cswin', r'stage2\.0\.norm1\.bias',
     ['stages.1.blocks.0.norm1.bias']),
    ('official_cswin', r'norm\.bias', ['norm3.norm.bias']),
    ('timm_deit_plain', r'patch_embed\.proj\.bias',
     ['stem.patch_embed.projection.bias']),
    ('mmpretrain_deit', r'layers\.1\.ffn\.layers\.1\.bias',
     ['stages.1.blocks.0.ffn.3.bias']),
])
def test_a_lost_bias_is_missing(name, lost, ours):
    source = source_of(name)
    left = {k: v for k, v in source.state_dict.items()
            if not re.fullmatch(lost, k)}
    assert len(left) == len(source.state_dict) - len(ours)
    twin = source.twin(norm_cfg=dict(type='LN'))
    whole, before = convert(source.state_dict, twin)
    state, report = convert(left, twin, min_carried=0)
    assert report.missing == {k: whole[k].numel() for k in ours}
    assert report.new == before.new
    assert state.keys() == whole.keys() - set(ours)
    assert report.carried_fraction == 1 - len(ours) / len(whole)
    problem, = report.problems()
    assert problem.startswith(
        f'{len(ours)} not in the file: {", ".join(ours[:3])}')


@pytest.mark.parametrize('name', SOURCES)
def test_a_file_that_lost_its_biases_is_refused(name):
    source = source_of(name)
    left = {k: v for k, v in source.state_dict.items()
            if not k.endswith(('.bias', '_bias'))}
    with pytest.raises(ConversionError, match=r'not in the file: .*bias'):
        convert(left, source.twin())


def test_a_lost_bias_of_half_a_projection():
    """PVT's q without a bias, for one q, k, v projection."""
    source = source_of('official_pvt')
    left = {k: v for k, v in source.state_dict.items()
            if k != 'block1.0.attn.q.bias'}
    _, report = convert(left, source.twin(attention='rp'), min_carried=0)
    assert list(report.missing) == ['stages.0.blocks.0.attn.qkv.bias']
    assert list(report.unexpected) == ['block1.0.attn.kv.bias']


@pytest.mark.parametrize('lost', [
    'norm1.norm.bias', 'stages.1.blocks.0.attn.dwc.bias',
    'stages.0.blocks.0.attn.qkv.bias'])
def test_a_lost_bias_of_an_own_checkpoint(lost):
    backbone = RPSwin(arch=DIMS, num_representatives=3, norm_cfg=dict(
        type='LN'))
    state = backbone.state_dict()
    numel = state.pop(lost).numel()
    _, report = convert(state, backbone, min_carried=0)
    assert report.missing == {lost: numel}
    assert not report.new


@pytest.mark.parametrize(
    'name', [n for n in SOURCES if n not in ('mmdet_pvt',
                                             'timm_deit_distilled')])
def test_output_norms_are_carried(name):
    source = source_of(name)
    twin = source.twin(norm_cfg=dict(type='LN'))
    state, report = convert(source.state_dict, twin)
    maps = outputs(load(twin, state, report))
    assert source.normed
    for i, theirs in source.normed.items():
        assert_same(maps[i], theirs)
    missing = set(twin.out_indices) - set(source.normed)
    assert set(report.new) == {f'norm{i}.norm.{part}' for i in missing
                               for part in ('weight', 'bias')}


@pytest.mark.parametrize('name', SOURCES)
@pytest.mark.parametrize('rp_first', [True, False])
def test_mixed_stages(name, rp_first):
    """The stages with the source's attention compute what it computes from
    the source's own maps; the others have its projections."""
    source = source_of(name)
    own = source.options['attention']
    count = len(source.maps)
    rp = [(i < count // 2) == rp_first for i in range(count)]
    mixed = source.twin(
        attention=['rp' if is_rp else own for is_rp in rp],
        num_representatives=3)
    state, report = convert(source.state_dict, mixed)
    assert report.carried_fraction == 1
    load(mixed, state, report)
    dense = load(source.twin(attention='dense'), *convert(
        source.state_dict, source.twin(attention='dense')))
    for i in range(count):
        for j, block in enumerate(mixed.stages[i].blocks):
            attn = block.attn
            other = dense.stages[i].blocks[j]
            assert_same(attn.proj.weight, other.attn.proj.weight)
            assert_same(block.ffn[3].weight, other.ffn[3].weight)
            if rp[i]:
                assert_same(attn.qkv.weight, other.attn.qkv.weight)
                assert_same(attn.qkv.bias, other.attn.qkv.bias)
                assert attn.dwc.weight.abs().max() == 0
                assert attn.dwc.bias.abs().max() == 0
        if i and not rp[i] and own != 'dense':
            before = source.maps[i - 1]
            with torch.no_grad():
                ours, hw_shape = mixed.stages[i](
                    before.flatten(2).transpose(1, 2), before.shape[-2:])
            assert_same(ours.transpose(1, 2).unflatten(-1, hw_shape),
                        source.maps[i])
    expected = {
        f'stages.{i}.blocks.{j}.attn.{part}': start
        for i in range(count) if rp[i]
        for j in range(len(mixed.stages[i].blocks))
        for part, start in (('anchors', 'init'), ('interact_weight', 'init'),
                            ('dwc.weight', 'zeros'), ('dwc.bias', 'zeros'))
    }
    assert report.new == expected


@pytest.mark.parametrize('name', ['official_pvt', 'timm_swin'])
def test_fused_projections_are_those_of_the_source(name):
    """Against the source's own tensors, not against another conversion."""
    source = source_of(name)
    state, _ = convert(source.state_dict, source.twin(attention='rp'))
    theirs = source.state_dict
    if name == 'official_pvt':
        block = 'block2.1'
        q, kv = (theirs[f'{block}.attn.{part}.weight'] for part in ('q', 'kv'))
        expected = torch.cat((q, kv))
        fc1 = theirs[f'{block}.mlp.fc1.weight']
    else:
        block = 'layers.1.blocks.1'
        expected = theirs[f'{block}.attn.qkv.weight']
        fc1 = theirs[f'{block}.mlp.fc1.weight']
    assert torch.equal(state['stages.1.blocks.1.attn.qkv.weight'], expected)
    assert torch.equal(state['stages.1.blocks.1.ffn.0.weight'], fc1)


PREFIXES = ['module.', 'model.', 'backbone.', 'module.backbone.',
            'model.detector.backbone.', 'ema_model.module.backbone.', 'net_.']


@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('name', ['timm_swin', 'mmdet_pvt', 'official_cswin',
                                  'mmpretrain_deit'])
def test_prefixes_are_found(name, prefix):
    source = source_of(name)
    plain, _ = convert(source.state_dict, source.twin())
    state = {prefix + k: v for k, v in source.state_dict.items()}
    state['neck.convs.0.weight'] = torch.zeros(3)
    found, report = convert(state, source.twin())
    assert report.prefix == prefix
    assert report.left_out['neck.convs.0.weight'] == 'outside of the backbone'
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_two_backbones_in_one_file():
    source = source_of('timm_swin')
    state = {f'student.{k}': v for k, v in source.state_dict.items()}
    state.update((f'teacher.{k}', v + 1)
                 for k, v in source.state_dict.items())
    with pytest.raises(ConversionError, match=r"'student\.', 'teacher\.'"):
        convert(state, source.twin())
    found, _ = convert(state, source.twin(), prefix='teacher')
    weight = source.state_dict['patch_embed.proj.weight'] + 1
    assert torch.equal(found['stem.projection.weight'], weight)
    state = {k.replace('teacher.', 'ema.'): v for k, v in state.items()}
    found, report = convert(state, source.twin())
    assert report.prefix == 'ema.'
    assert torch.equal(found['stem.projection.weight'], weight)
    with pytest.raises(ConversionError, match="under the prefix 'other.'"):
        convert(state, source.twin(), prefix='other')


def bicubic(grid, side):
    """(side², C) resized by torch, in float32 as DeiT does."""
    old = round(grid.shape[0]**0.5)
    grid = grid.float().t().reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(side, side), mode='bicubic')
    return grid[0].flatten(1).t().double()


@pytest.mark.parametrize('name,extra,shape', [
    ('timm_deit_plain', 1, (1, 17, 16)),
    ('timm_deit_distilled', 2, (1, 17, 16)),
    ('timm_deit3', 0, (1, 17, 16)),
])
def test_deit_positions_are_resized(name, extra, shape):
    source = source_of(name)
    state, report = convert(source.state_dict, source.twin(img_size=64))
    table = state['stem.pos_embed.pos_embed']
    theirs = source.state_dict['pos_embed']
    assert table.shape == shape
    assert_same(table[0, 1:], bicubic(theirs[0, extra:], 4))
    first = theirs[0, 0] if extra else torch.zeros(16).double()
    assert_same(table[0, 0], first)
    assert list(report.resized) == ['stem.pos_embed.pos_embed']
    assert report.resized['stem.pos_embed.pos_embed'] == (
        (1, 65, 16), (1, 17, 16))
    without, report = convert(
        source.state_dict, source.twin(img_size=64, with_cls_token=False))
    assert_same(without['stem.pos_embed.pos_embed'], table[:, 1:])
    assert 'stem.cls_token' not in without
    assert 'no class token' in report.left_out['cls_token']


def test_pvt_positions_are_resized_without_the_class_token():
    source = source_of('official_pvt')
    state, report = convert(source.state_dict, source.twin(img_size=64))
    for i, side in enumerate((16, 8, 4, 2)):
        theirs = source.state_dict[f'pos_embed{i + 1}'][0, int(i == 3):]
        assert_same(state[f'stages.{i}.pos_embed.pos_embed'][0],
                    bicubic(theirs, side))
    assert len(report.resized) == 4
    assert 'cls_token' in report.left_out


def test_swin_tables_are_resized_to_another_window():
    source = source_of('timm_swin')
    twin = source.twin(window_size=6, attention=['window'] + ['rp'] * 3)
    state, report = convert(source.state_dict, twin)
    key = 'blocks.1.attn.relative_position_bias_table'
    theirs = source.state_dict[f'layers.0.{key}']
    assert_same(state[f'stages.0.{key}'], bicubic(theirs, 11))
    assert len(report.resized) == 2
    assert not [k for k in state if 'table' in k and 'stages.0' not in k]
    assert report.left_out[f'layers.1.{key}'] == (
        'of an attention that the stage has not')


def test_a_batch_norm_does_not_take_a_layer_norm():
    source = source_of('mmdet_swin')
    twin = source.twin(norm_cfg=dict(type='BN'))
    state, report = convert(source.state_dict, twin)
    assert not [k for k in state if k.startswith('norm')]
    assert report.carried_fraction == 1
    assert report.left_out['norm0.weight'] == (
        'the backbone has no such output norm')


def test_the_same_norm_is_carried():
    source = RPSwin(arch=DIMS, window_size=4, num_representatives=3,
                    norm_cfg=dict(type='BN'))
    source(torch.randn(2, 3, 64, 64))  # moves the running statistics
    state, report = convert(source.state_dict(), source)
    assert not report.new and not report.unexpected
    assert all(torch.equal(state[k], v)
               for k, v in source.state_dict().items())


def test_two_final_norms():
    source = source_of('official_swin_detection')
    state = {**source.state_dict, 'norm.weight': torch.zeros(64)}
    twin = source.twin(norm_cfg=dict(type='LN'))
    found, report = convert(state, twin)
    assert torch.equal(found['norm3.norm.weight'], state['norm3.weight'])
    assert report.left_out['norm.weight'] == 'a classifier'


@pytest.mark.parametrize('start', ['zero', 'average', 'lepe', 'init'])
def test_start_of_the_convolution(start):
    source = source_of('official_cswin')
    options = dict(attention='rp', num_representatives=3)
    twin = source.twin(**options)
    state, report = convert(source.state_dict, twin, dwc=start)
    name = 'stages.2.blocks.1.attn.dwc.weight'
    if start == 'init':
        assert name not in state and report.new[name] == 'init'
        return
    weight = state[name]
    assert weight.shape == (32, 1, 3, 3)
    if start == 'zero':
        assert weight.abs().max() == 0
    elif start == 'average':
        value = torch.randn(1, 32, 6, 6).double()
        out = nn.functional.conv2d(value, weight, padding=1, groups=32)
        assert_same(out[..., 2, 3], value[..., 1:4, 2:5].mean((-1, -2)))
    else:
        vertical, horizontal = (
            source.state_dict[f'stage3.1.attns.{i}.get_v.weight']
            for i in (0, 1))
        # Stripes of 4: of 4 cells, 3 have their neighbour inside.
        assert_same(weight[:16, :, :, 1], vertical[..., 1])
        assert_same(weight[:16, :, :, [0, 2]], vertical[..., [0, 2]] * 0.75)
        assert_same(weight[16:, :, [0, 2]], horizontal[:, :, [0, 2]] * 0.75)
        bias = torch.cat([source.state_dict[f'stage3.1.attns.{i}.get_v.bias']
                          for i in (0, 1)])
        assert_same(state[name.replace('weight', 'bias')], bias)
        # Stripes of 1 see no neighbour beside, one window sees all.
        first = state['stages.0.blocks.0.attn.dwc.weight']
        assert first[:4, :, :, [0, 2]].abs().max() == 0
        assert_same(state['stages.3.blocks.0.attn.dwc.weight'],
                    source.state_dict['stage4.0.attns.0.get_v.weight'])


def test_lepe_is_for_cswin_and_arguments_are_checked():
    source = source_of('timm_swin')
    with pytest.raises(ValueError, match="dwc='lepe' is for CSWin"):
        convert(source.state_dict, source.twin(), dwc='lepe')
    with pytest.raises(ValueError, match='dwc must be one of'):
        convert(source.state_dict, source.twin(), dwc='ones')
    with pytest.raises(ValueError, match=r'min_carried .* got 99'):
        convert(source.state_dict, source.twin(), min_carried=99)


def test_own_checkpoints_change_their_attention():
    """From this project's RPSwin to its twin and back."""
    rp = RPSwin(arch=DIMS, window_size=4, num_representatives=3)
    twin = RPSwin(arch=DIMS, window_size=4, attention='window')
    state, report = convert(rp.state_dict(), twin)
    assert report.carried_fraction == 1
    assert all(v.endswith('has not') for v in report.left_out.values())
    assert {k.rpartition('.')[2] for k in report.new} == {
        'relative_position_bias_table'}
    wrapped = {f'backbone.{k}': v for k, v in twin.state_dict().items()}
    back, report = convert(wrapped, rp)
    for name, value in back.items():
        if '.dwc.' not in name:
            assert torch.equal(value, twin.state_dict()[name]), name
    same, report = convert(rp.state_dict(), rp)
    assert not report.new and same.keys() == rp.state_dict().keys()
    assert all(torch.equal(same[k], v) for k, v in rp.state_dict().items())


def test_own_pvt_splits_its_projections():
    arch = dict(DIMS, mlp_ratios=(2, 2, 2, 2))
    rp = RPPVT(arch=arch, img_size=64, num_representatives=3)
    twin = RPPVT(arch=arch, img_size=64, attention='sr')
    state, report = convert(rp.state_dict(), twin)
    qkv = rp.stages[0].blocks[0].attn.qkv.weight
    assert torch.equal(state['stages.0.blocks.0.attn.q.weight'], qkv[:8])
    assert torch.equal(state['stages.0.blocks.0.attn.kv.weight'], qkv[8:])
    assert {re.sub(r'.*attn\.', '', k) for k in report.new} == {
        'sr.weight', 'sr.bias', 'norm.weight', 'norm.bias'}


def test_stages_that_are_not_built_are_left_out():
    source = source_of('timm_swin')
    _, report = convert(source.state_dict, source.twin(out_indices=(0, 1)))
    assert report.carried_fraction == 1
    assert 'out_indices' in report.left_out['layers.3.blocks.0.norm1.weight']
