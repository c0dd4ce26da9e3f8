"""The parts of a swap on small dicts: images, optimiser, leftovers, files."""

import pytest
from mmengine.config import Config

from mmrpa.swap import SwapError, write_config
from mmrpa.swap.images import MEAN, STD, use_imagenet_rgb
from mmrpa.swap.leftovers import drop_leftovers
from mmrpa.swap.optimiser import find_batch, use_adamw
from mmrpa.swap.report import Report

BGR = [103.53, 116.28, 123.675]
# What each host's preprocessing says, and whether it is to be changed.
IMAGES = [
    (dict(type='DetDataPreprocessor', mean=BGR, std=[1.] * 3,
          bgr_to_rgb=False), True),
    (dict(type='DetDataPreprocessor', mean=MEAN, std=[1, 1, 1],
          bgr_to_rgb=True), True),
    (dict(type='SegDataPreProcessor', mean=BGR, std=STD[::-1]), True),
    (dict(mean=BGR, std=STD[::-1], to_rgb=False), True),
    (dict(type='Normalize', mean=BGR, std=[1., 1., 1.], to_rgb=False), True),
    (dict(type='DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=True),
     False),
    (dict(type='mmcv.Normalize', mean=MEAN, std=STD), False),
    (dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True), False),
    (dict(mean=[33.46], std=[78.87]), False),
]


@pytest.mark.parametrize('node, changed', IMAGES)
def test_caffe_style_images_alone_are_changed(node, changed):
    order = 'bgr_to_rgb' if 'DataPre' in node.get('type', '') else 'to_rgb'
    cfg = dict(train_dataloader=[dict(part=dict(node))])
    report = Report()
    use_imagenet_rgb(cfg, report)
    found = cfg['train_dataloader'][0]['part']
    if changed:
        assert (found['mean'], found['std'], found[order]) == (MEAN, STD, True)
        (key, *_), = report.changed
        assert key == 'train_dataloader.0.part'
    else:
        assert found == node and not report.changed
    # what is unusual and stays is named
    usual = changed or node['mean'] is MEAN
    assert bool(report.left) == (not usual)


def test_images_that_nobody_normalises_are_named():
    report = Report()
    use_imagenet_rgb(dict(model=dict(data_preprocessor=dict(
        type='DetDataPreprocessor', pad_size_divisor=32))), report)
    assert not report.changed
    assert 'not normalised' in dict(report.left)['model.data_preprocessor']


def test_what_fills_with_the_mean_follows():
    cfg = dict(
        data_preprocessor=dict(type='DetDataPreprocessor', mean=BGR,
                               std=[1.] * 3, bgr_to_rgb=False),
        pipeline=[dict(type='Expand', mean=BGR, to_rgb=False, prob=0.5)])
    use_imagenet_rgb(cfg, Report())
    assert cfg['pipeline'][0] == dict(type='Expand', mean=MEAN, to_rgb=True,
                                      prob=0.5)


def test_variables_of_the_config_are_no_normalisation():
    names = dict(mean=BGR, std=STD[::-1], to_rgb=False)
    cfg = dict(names, data_preprocessor=dict(names))
    use_imagenet_rgb(cfg, Report())
    assert cfg['data_preprocessor'] == dict(mean=MEAN, std=STD, to_rgb=True)
    assert {name: cfg[name] for name in names} == names


@pytest.mark.parametrize('cfg, name, batch', [
    (dict(auto_scale_lr=dict(base_batch_size=64)), 'a_8xb2_b.py', 64),
    (dict(), 'configs/fcn_r50-d8_4xb2-40k_cityscapes.py', 8),
    (dict(), 'resnet50_8xb32_in1k.py', 256),
    (dict(), 'my_config.py', None),
    (dict(auto_scale_lr=dict(enable=True)), None, None),
])
def test_batch(cfg, name, batch):
    assert find_batch(cfg, name)[0] == batch


def optimiser(wrapper: dict, host: str = 'mmdet', **cfg) -> tuple:
    values = dict(cfg, optim_wrapper=wrapper)
    report = Report()
    use_adamw(values, host, None, ['patch_embed.norm.weight', 'layers.0.ls'],
              report)
    return values, {key: what for key, what, _ in report.changed}


def test_sgd_becomes_adamw_and_the_rest_stays():
    values, changed = optimiser(
        dict(type='AmpOptimWrapper', loss_scale='dynamic',
             accumulative_counts=4, clip_grad=dict(max_norm=35),
             optimizer=dict(type='SGD', lr=0.02, momentum=0.9, nesterov=True),
             paramwise_cfg=dict(bypass_duplicate=True, custom_keys={
                 'backbone': dict(lr_mult=0.1), 'query': dict(lr_mult=2.),
                 'patch_embed': dict(decay_mult=0.),
                 'bn': dict(decay_mult=0., lars_exclude=True)})),
        auto_scale_lr=dict(enable=True, base_batch_size=32),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.001, end=500),
            dict(type='CosineAnnealingLR', eta_min=0.002),
            dict(type='CosineAnnealingMomentum', eta_min=0.8)])
    wrapper = values['optim_wrapper']
    # 1e-4 is for 16 images
    assert wrapper['optimizer'] == dict(
        type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert (wrapper['type'], wrapper['loss_scale'],
            wrapper['accumulative_counts'], wrapper['clip_grad']) == (
                'AmpOptimWrapper', 'dynamic', 4, dict(max_norm=35))
    zero = dict(decay_mult=0.)
    assert wrapper['paramwise_cfg'] == dict(
        bypass_duplicate=True, norm_decay_mult=0., bias_decay_mult=0.,
        custom_keys=dict(
            query=dict(lr_mult=2.), bn=zero, anchors=zero, cls_token=zero,
            pos_embed=zero, relative_position_bias_table=zero))
    assert values['auto_scale_lr'] == dict(enable=True, base_batch_size=32)
    schedule = values['param_scheduler']
    assert schedule[0] == dict(type='LinearLR', start_factor=0.001, end=500)
    assert schedule[1]['eta_min'] == pytest.approx(0.002 * 2e-4 / 0.02)
    assert schedule[2]['eta_min'] == 0.8


def test_layer_decay_of_the_hosts_goes_and_adamw_stays():
    adamw = dict(type='AdamW', lr=3e-4, betas=(0.9, 0.98), weight_decay=0.07)
    values, changed = optimiser(
        dict(optimizer=dict(adamw),
             constructor='LearningRateDecayOptimizerConstructor',
             paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise',
                                num_layers=6, flat_decay_mult=0.)),
        param_scheduler=[dict(type='PolyLR', eta_min=1e-6)])
    wrapper = values['optim_wrapper']
    assert wrapper['optimizer'] == adamw and 'constructor' not in wrapper
    assert set(wrapper['paramwise_cfg']) == {
        'flat_decay_mult', 'norm_decay_mult', 'bias_decay_mult', 'custom_keys'}
    assert values['param_scheduler'][0]['eta_min'] == 1e-6
    assert 'optim_wrapper.constructor' in changed


def test_a_config_that_does_not_train_is_left():
    report = Report()
    cfg = dict(model=dict())
    use_adamw(cfg, 'mmseg', None, (), report)
    assert cfg == dict(model=dict()) and not report.changed
    assert report.left[0][0] == 'optim_wrapper'


def test_leftovers():
    old = dict(type='mmpretrain.ConvNeXt', init_cfg=dict(
        type='Pretrained', checkpoint='http://a/convnext.pth'))
    cfg = dict(
        load_from='http://a/whole.pth', resume=True, work_dir='w',
        checkpoint_file='http://a/convnext.pth', data_root='data',
        custom_imports=dict(imports=['mmpretrain.models', 'my.transforms']),
        custom_hooks=[dict(type='EMAHook'),
                      dict(type='FreezeHook', layers=['backbone.stem'])],
        model=dict(
            type='Tracker', pretrained='torchvision://resnet50',
            backbone=dict(type='mmrpa.RPSwin', init_cfg=None),
            head=dict(type='Head', init_cfg=[
                dict(type='Normal', layer='Linear')]),
            neck=dict(init_cfg=dict(type='Pretrained', checkpoint='n.pth')),
            reid=dict(backbone=dict(type='ResNet', init_cfg=dict(
                type='Pretrained', checkpoint='reid.pth')))))
    report = Report()
    drop_leftovers(cfg, old, report)
    assert cfg == dict(
        load_from=None, resume=False, work_dir='w', data_root='data',
        custom_imports=dict(imports=['my.transforms']),
        custom_hooks=[dict(type='EMAHook')],
        model=dict(
            type='Tracker', neck=dict(),
            backbone=dict(type='mmrpa.RPSwin', init_cfg=None),
            head=dict(type='Head', init_cfg=[
                dict(type='Normal', layer='Linear')]),
            reid=dict(backbone=dict(type='ResNet', init_cfg=dict(
                type='Pretrained', checkpoint='reid.pth')))))
    assert {key for key, *_ in report.changed} == {
        'load_from', 'resume', 'checkpoint_file', 'custom_imports',
        'custom_hooks.1', 'model.pretrained', 'model.neck.init_cfg'}
    assert ('model.reid.backbone' in dict(report.left)
            and 'custom_imports' in dict(report.left))


def test_written_config_is_read_back(tmp_path):
    values = dict(a=dict(b=(1, 2.5), c=[None, 'x "y" \'z\'']), d=1e-5)
    write_config(Config(values), tmp_path / 'a.py')
    assert Config.fromfile(tmp_path / 'a.py').to_dict() == values
    assert [path.name for path in tmp_path.iterdir()] == ['a.py']


@pytest.mark.parametrize('value', [len, object()])
def test_what_no_file_can_hold_is_named(tmp_path, value):
    with pytest.raises(SwapError, match='a.1.f is a '):
        write_config(Config(dict(a=[0, dict(f=value)])), tmp_path / 'a.py')
    assert list(tmp_path.iterdir()) == []
