"""Each parameter learns at the rate of its depth, in all hosts."""

import re

import pytest
import torch
from helpers import mmdet_models
from mmengine.optim import LinearLR, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from zoo import build

from mmrpa.optim import layer_decay

LR, WD, RATE = 0.1, 0.3, 0.5
# Of tests/test_backbones/zoo.py's Swin, the first to the last depth.
BLOCKS = ['stages.0.blocks.0', 'stages.1.blocks.0', 'stages.1.blocks.1',
          'stages.2.blocks.0', 'stages.3.blocks.0']
DIMS = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4),
    mlp_ratios=2)
BACKBONE = dict(
    type='mmrpa.RPSwin', arch=DIMS, window_size=3, num_representatives=3,
    attention=['rp', 'rp', 'rp', 'window'])


def wrapper(model, rate=RATE, **paramwise):
    return build_optim_wrapper(model, dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=LR, weight_decay=WD),
        constructor='mmrpa.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=rate, **paramwise)))


def moves(model, optim):
    """(learning rate, weight decay) of each parameter, from one step with
    gradients of 1: p - lr * (1 + wd * p)."""
    found = {}
    params = dict(model.named_parameters())
    for start in (0., 1.):
        with torch.no_grad():
            for p in params.values():
                p.fill_(start)
                p.grad = torch.ones_like(p) if p.requires_grad else None
        optim.optimizer.step()
        for name, p in params.items():
            found.setdefault(name, []).append(start - p.flatten()[0].item())
    return {name: (first, (second / first - 1) if first else 0.)
            for name, (first, second) in found.items()}


def expected_lr(name, backbone):
    """The closed form, from the name alone."""
    if not name.startswith(backbone):
        return LR
    name = name[len(backbone):]
    if name.startswith('stem.'):
        return LR * RATE**6
    for depth, block in enumerate(BLOCKS, 1):
        stage = block.rpartition('.blocks')[0]
        if name.startswith(block + '.') or (
                name.startswith((f'{stage}.downsample.',
                                 f'{stage}.pos_embed.'))
                and block.endswith('0')):
            return LR * RATE**(6 - depth)
    return LR


def check(model, optim, backbone, norms):
    for name, (lr, wd) in moves(model, optim).items():
        assert lr == pytest.approx(expected_lr(name, backbone), rel=1e-4), name
        owner, _, last = name.rpartition('.')
        exempt = (last == 'bias' or owner in norms
                  or last in ('anchors', 'relative_position_bias_table'))
        assert wd == pytest.approx(0 if exempt else WD, abs=1e-4), name


def norms_of(model):
    return {name for name, m in model.named_modules()
            if 'Norm' in type(m).__name__}


CLASSIFIER = dict(
    type='ImageClassifier', backbone=dict(BACKBONE, out_indices=(3, )),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32))
SEGMENTOR = dict(
    type='EncoderDecoder', backbone=BACKBONE,
    decode_head=dict(type='FCNHead', in_channels=32, in_index=3, channels=8,
                     num_convs=1, concat_input=False, num_classes=2,
                     norm_cfg=dict(type='BN')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
DETECTOR = dict(
    type='RetinaNet', backbone=BACKBONE,
    neck=dict(type='FPN', in_channels=[8, 16, 24, 32], out_channels=8,
              norm_cfg=dict(type='GN', num_groups=2), num_outs=5),
    bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8,
                   stacked_convs=1, feat_channels=8))
# A detector inside of a model, as semi-supervised training has two.
WRAPPED = dict(
    type='SemiBaseDetector', detector=DETECTOR,
    semi_train_cfg=dict(freeze_teacher=True))
HOSTS = dict(mmpretrain=(CLASSIFIER, ['backbone.']),
             mmseg=(SEGMENTOR, ['backbone.']),
             mmdet=(DETECTOR, ['backbone.']),
             wrapped=(WRAPPED, ['student.backbone.', 'teacher.backbone.']))


@pytest.mark.parametrize('host', HOSTS)
def test_hosts(host):
    cfg, backbones = HOSTS[host]
    if cfg in (DETECTOR, WRAPPED):
        mmdet_models()
    init_default_scope('mmdet' if host == 'wrapped' else host)
    model = MODELS.build(cfg)
    optim = wrapper(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (host == 'wrapped')
    trained = [p for g in optim.optimizer.param_groups for p in g['params']]
    names = [n for n, _ in model.named_parameters() if n not in frozen]
    assert {id(p) for p in trained} == {
        id(p) for n, p in model.named_parameters() if n not in frozen}
    assert len(trained) == len(names)
    student = nn.ModuleDict({'m': model.student})['m'] if frozen else model
    prefix = backbones[0].replace('student.', '')
    check(student, optim, prefix, norms_of(student))


def test_a_detector_in_a_detector_and_ddp():
    """``model.detector.backbone``, and the ``module`` of a wrapper."""
    model = nn.ModuleDict(dict(detector=nn.ModuleDict(dict(
        backbone=build('swin'), head=nn.Linear(3, 3)))))
    wrapped = nn.Module()
    wrapped.module = model
    check(model, wrapper(wrapped), 'detector.backbone.', norms_of(model))


def test_schedules_keep_the_ratios():
    model = build('swin')
    optim = wrapper(model)
    before = [g['lr'] for g in optim.optimizer.param_groups]
    LinearLR(optim, start_factor=0.25, end=10)
    after = [g['lr'] for g in optim.optimizer.param_groups]
    assert after == pytest.approx([0.25 * lr for lr in before])


@pytest.mark.parametrize('family,tables', [
    ('deit', {'stem.cls_token', 'stem.pos_embed.pos_embed'}),
    ('pvt', {f'stages.{i}.pos_embed.pos_embed' for i in range(4)}),
    ('cswin', set())])
def test_position_tables_are_exempt(family, tables):
    model = build(family)
    found = moves(model, wrapper(model))
    exempt = {n for n, (_, wd) in found.items() if abs(wd) < 1e-3}
    assert tables <= exempt
    assert {n for n in exempt if n.endswith(('.weight', 'interact_weight'))
            } == {n for n in found if re.search(r'norm\d?\.(norm\.)?weight$',
                                                n)}


def test_custom_keys_and_multipliers():
    model = nn.ModuleDict(dict(backbone=build('swin'), head=nn.Linear(3, 3)))
    found = moves(model, wrapper(
        model, norm_decay_mult=0.5, bias_decay_mult=2., embed_decay_mult=0.25,
        custom_keys={
            'backbone': dict(lr_mult=0.5),
            'backbone.stages.1': dict(lr_mult=0.1, decay_mult=3.),
            'head': dict(lr_mult=10., momentum=0.),
        }))

    def near(name, lr, wd):
        assert found[name] == (pytest.approx(lr, rel=1e-3),
                               pytest.approx(wd, abs=1e-3)), name

    near('head.weight', 10 * LR, WD)
    near('head.bias', 10 * LR, 2 * WD)
    near('backbone.stem.projection.weight', 0.5 * LR * RATE**6, WD)
    near('backbone.stem.norm.weight', 0.5 * LR * RATE**6, 0.5 * WD)
    near('backbone.stages.0.blocks.0.attn.anchors', 0.5 * LR * RATE**5,
         0.25 * WD)
    # The longest key that fits counts; only a decay_mult lifts an exemption.
    near('backbone.stages.1.blocks.1.norm1.weight', 0.1 * LR * RATE**3, 3 * WD)
    near('backbone.norm0.norm.bias', 0.5 * LR, 0.5 * WD)


def test_frozen_stages_and_no_weight_decay(monkeypatch):
    lines = []
    monkeypatch.setattr(layer_decay, 'print_log',
                        lambda text, logger: lines.extend(text.splitlines()))
    model = build('swin', frozen_stages=1)
    optim = build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=LR),
        constructor='mmrpa.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=RATE)))
    assert all(g['weight_decay'] == 0 for g in optim.optimizer.param_groups)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert lines[-1].split() == ['frozen', str(frozen)] and frozen > 0
    assert not any('stages.0' in line for line in lines)


def test_the_table(monkeypatch):
    lines = []
    monkeypatch.setattr(layer_decay, 'print_log',
                        lambda text, logger: lines.extend(text.splitlines()))
    model = nn.ModuleDict(dict(backbone=build('swin'), head=nn.Linear(3, 3)))
    optim = wrapper(model, custom_keys={'nothing': dict(lr_mult=2.)})
    groups = optim.optimizer.param_groups
    assert f'{len(groups)} groups' in lines[0]
    # One group for each depth and each of two weight decays.
    assert len(groups) == 14
    rows = [line.split(maxsplit=4) for line in lines[2:-1]]
    assert [row[4] for row in rows] == [
        'backbone.stem', *(f'backbone.{b}' for b in BLOCKS),
        'output norms and all that is not the backbone']
    for depth, row in enumerate(rows):
        scale = RATE**(6 - depth)
        assert float(row[0]) == pytest.approx(LR * scale, rel=1e-3)
        assert float(row[1]) == pytest.approx(scale, abs=1e-4)
        for column, decay in ((2, WD), (3, 0.)):
            count = sum(
                p.numel() for g in groups for p in g['params']
                if g['lr'] == pytest.approx(LR * scale)
                and g['weight_decay'] == decay)
            assert int(row[column]) == count
    total = sum(int(row[2]) + int(row[3]) for row in rows)
    assert total == sum(p.numel() for p in model.parameters())
    assert lines[-1].endswith('has in its name: nothing')


@pytest.mark.parametrize('paramwise,match', [
    (dict(decay_rate=0.9), "'decay_rate'; did you mean 'layer_decay_rate'"),
    (dict(), 'needs layer_decay_rate'),
    (dict(layer_decay_rate=1.5), 'got 1.5'),
    (dict(layer_decay_rate='0.9'), "got '0.9'"),
    (dict(layer_decay_rate=0.9, custom_keys={'a': dict(lr_mul=2)}),
     "'lr_mul' under 'a'"),
])
def test_bad_options(paramwise, match):
    with pytest.raises(ValueError, match=match):
        build_optim_wrapper(build('swin'), dict(
            optimizer=dict(type='SGD', lr=LR, weight_decay=WD),
            constructor='mmrpa.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=paramwise))


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match='Linear has none'):
        wrapper(nn.Linear(3, 3))
    frozen = build('swin').requires_grad_(False)
    with pytest.raises(ValueError, match='frozen'):
        wrapper(frozen)
    with pytest.raises(ValueError, match='needs the lr'):
        build_optim_wrapper(build('swin'), dict(
            optimizer=dict(type='Adadelta'),
            constructor='mmrpa.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.9)))
