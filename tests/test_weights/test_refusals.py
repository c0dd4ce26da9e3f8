"""Weights of another size, family or kind are named, not forced in."""

import re

import pytest
import torch
from helpers import mmdet_models
from source_models import DIMS, source_of

from mmrpa.weights import ConversionError, convert
from mmrpa.weights.identify import look_at
from mmrpa.weights.sources import STYLES, Canonical


@pytest.mark.parametrize('change,arch', [
    ('deeper', dict(DIMS, depths=(2, 2, 4, 1))),
    ('shallower', dict(DIMS, depths=(2, 2, 1, 1))),
    ('wider', dict(DIMS, embed_dims=(16, 16, 32, 64))),
])
def test_weights_of_another_size_are_refused(change, arch):
    source = source_of('timm_swin')
    with pytest.raises(ConversionError) as info:
        convert(source.state_dict, source.twin(arch=arch))
    text = str(info.value)
    assert 'embed_dims (8, 16, 32, 64) and depths (2, 2, 2, 1)' in text
    assert ('no arch has its size: describe it by --options '
            'arch.embed_dims=8,16,32,64 arch.depths=2,2,2,1 '
            'arch.num_heads=1,2,4,4 arch.mlp_ratios=4,4,4,4') in text
    report = info.value.report
    assert bool(report.missing) == (change == 'deeper')
    assert bool(report.unexpected) == (change == 'shallower')
    assert bool(report.misshapen) == (change == 'wider')
    fraction = report.carried_fraction
    _, again = convert(source.state_dict, source.twin(arch=arch),
                       min_carried=fraction - 0.01)
    assert 0 < again.carried_fraction < 0.99
    problem = dict(
        deeper='26 not in the file: stages.2.blocks.2.',
        shallower='13 unexpected: layers.2.blocks.1.',
        wider='of another shape: stem.projection.weight (8, 3, 4, 4) for (16')
    assert problem[change] in text
    assert problem[change] in '\n'.join(again.lines())


def test_small_tensors_that_change_the_function_count():
    """A ViT that normalises Q and K: few parameters, many tensors."""
    source = source_of('timm_deit_plain')
    state = dict(source.state_dict)
    for i in range(3):
        for kind in 'qk':
            state[f'blocks.{i}.attn.{kind}_norm.weight'] = torch.ones(8)
    with pytest.raises(ConversionError, match='only 8') as info:
        convert(state, source.twin())
    report = info.value.report
    assert report.carried_fraction == len(report.carried) / (
        len(report.carried) + 6)


@pytest.mark.parametrize('name', ['timm_swin', 'official_pvt',
                                  'mmpretrain_deit', 'official_cswin'])
def test_weights_of_another_family_are_refused(name):
    source = source_of(name)
    other = source_of('official_pvt' if 'pvt' not in name else 'timm_swin')
    title = dict(timm_swin='Swin', official_pvt='PVT', mmpretrain_deit='DeiT',
                 official_cswin='CSWin')[name]
    with pytest.raises(ConversionError, match=f'looks like {title} with'):
        convert(source.state_dict, other.twin())


@pytest.mark.parametrize('shape', [(), (5, 3), (1, 2, 3, 1)])
@pytest.mark.parametrize('name', ['official_pvt', 'mmdet_swin', 'timm_deit3',
                                  'official_cswin'])
def test_shapes_that_make_no_sense_are_told(name, shape):
    """In every tensor of a block, and around the blocks."""
    source = source_of(name)
    twin = source.twin()
    kinds = {re.sub(r'\d+', '', k): k for k in source.state_dict}
    for key in kinds.values():
        state = {**source.state_dict, key: torch.ones(shape)}
        try:
            _, report = convert(state, twin)
        except ConversionError:
            continue
        # What has no place in the backbone does not matter.
        assert key in report.left_out or report.problems(), key


@pytest.mark.parametrize('names,match', [
    (['layer1.0.conv1.weight', 'fc.weight'], 'a ResNet'),
    (['block1.0.mlp.dwconv.dwconv.weight', 'block1.0.attn.q.weight'],
     'PVT v2'),
    (['layers.0.blocks.0.attn.logit_scale'], 'Swin V2'),
    (['encoder.weight'], r'other kind \(encoder.weight'),
])
def test_other_networks_are_named(names, match):
    state = {name: torch.zeros(1) for name in names}
    with pytest.raises(ConversionError, match=match):
        convert(state, source_of('timm_swin').twin())


# From the official repositories: sizes and heads of what they publish.
PUBLISHED = {
    'rp_deit_tiny': ('DeiT', [192], [12], 4),
    'rp_deit_small': ('DeiT', [384], [12], 4),
    'rp_deit_base': ('DeiT', [768], [12], 4),
    'rp_pvt_tiny': ('PVT', [64, 128, 320, 512], [2, 2, 2, 2], (8, 8, 4, 4)),
    'rp_pvt_small': ('PVT', [64, 128, 320, 512], [3, 4, 6, 3], (8, 8, 4, 4)),
    'rp_pvt_medium': ('PVT', [64, 128, 320, 512], [3, 4, 18, 3],
                      (8, 8, 4, 4)),
    'rp_pvt_large': ('PVT', [64, 128, 320, 512], [3, 8, 27, 3], (8, 8, 4, 4)),
    'rp_swin_tiny': ('Swin', [96, 192, 384, 768], [2, 2, 6, 2], 4),
    'rp_swin_small': ('Swin', [96, 192, 384, 768], [2, 2, 18, 2], 4),
    'rp_swin_base': ('Swin', [128, 256, 512, 1024], [2, 2, 18, 2], 4),
    'rp_cswin_tiny': ('CSWin', [64, 128, 256, 512], [1, 2, 21, 1], 4),
    'rp_cswin_small': ('CSWin', [64, 128, 256, 512], [2, 4, 32, 2], 4),
    'rp_cswin_base': ('CSWin', [96, 192, 384, 768], [2, 4, 32, 2], 4),
}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_the_arch_of_published_weights_is_named(arch):
    family, dims, depths, ratios = PUBLISHED[arch]
    if family == 'DeiT':
        dims, depths = dims * depths[0], [1] * depths[0]
    ratios = ratios if isinstance(ratios, tuple) else (ratios, ) * len(dims)
    tensors = {}
    for i, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        for j in range(depth):
            name = f'stages.{i}.blocks.{j}'
            tensors[f'{name}.norm1.weight'] = torch.empty(c)
            tensors[f'{name}.ffn.0.weight'] = torch.empty(
                int(ratios[i] * c), 0)
    tensors[{
        'DeiT': 'stem.patch_embed.projection.weight',
        'PVT': 'stages.0.pos_embed.pos_embed',
        'Swin': 'stages.1.downsample.reduction.weight',
        'CSWin': 'stem.projection.weight'
    }[family]] = torch.empty(0, 3, 7, 7)
    look = look_at(Canonical(STYLES[0], '', tensors))
    assert str(look).startswith(f'{family} with')
    assert look.advice() == f'--arch {arch} fits it'


def test_pvt_v2_of_mmdet_is_not_taken_for_pvt():
    state = mmdet_models().PyramidVisionTransformerV2(
        embed_dims=8, num_layers=[1] * 4).state_dict()
    with pytest.raises(ConversionError, match='PVT v2'):
        convert(state, source_of('mmdet_pvt').twin())
