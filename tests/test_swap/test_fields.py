"""A swap names the value that is of the wrong kind, and what it has to be."""

import copy

import pytest

from mmrpa.swap import SwapError, swap

RESNET = dict(type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3))
FCN = dict(type='FCNHead', in_channels=512, in_index=3)
MODELS = dict(
    mmdet=dict(type='RetinaNet', backbone=RESNET, neck=dict(
        type='FPN', in_channels=[64, 128, 256, 512], start_level=1)),
    mmseg=dict(type='EncoderDecoder', backbone=RESNET, decode_head=FCN),
    mmpretrain=dict(
        type='ImageClassifier', backbone=dict(RESNET, out_indices=(3, )),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', in_channels=512)))
GONE = object()


def config(host: str, key: str, value: object) -> dict:
    """A config that can be swapped, with one value set or removed."""
    cfg = copy.deepcopy(dict(
        default_scope=host, model=MODELS[host], optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.1), paramwise_cfg=dict())))
    node = cfg
    *path, last = key.split('.')
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    if value is GONE:
        del node[last]
    return cfg


@pytest.mark.parametrize('host, key, value, message', [
    ('mmdet', 'model.neck.start_level', None,
     'model.neck.start_level must be an integer, got None'),
    ('mmdet', 'model.neck.end_level', '3', 'end_level must be an integer'),
    ('mmdet', 'model.neck.start_level', 4,
     'model.neck has start_level=4 and end_level=-1, which leaves none'),
    ('mmdet', 'model.neck.in_channels', None,
     'model.neck.in_channels must be an integer or a list of integers'),
    ('mmdet', 'model.neck', 3,
     'model.neck must be a dict, a list of dicts or None, got 3'),
    ('mmdet', 'model.roi_head', ['x'], 'model.roi_head must be a dict'),
    ('mmdet', 'model.neck', dict(type='SSDNeck', in_channels=[512]),
     'model.bbox_head is missing: it must be a dict'),
    ('mmseg', 'model.backbone', dict(
        type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=64,
        out_type='cls_token'), 'no maps: model.backbone gives vectors'),
    ('mmseg', 'model.decode_head', GONE, 'decode_head is missing'),
    ('mmseg', 'model.decode_head', 'x', 'decode_head must be a dict, a list'),
    ('mmseg', 'model.decode_head.in_channels', GONE,
     'model.decode_head.in_channels is missing: it must be an integer'),
    ('mmseg', 'model.decode_head.in_index', 'x', 'in_index must be'),
    ('mmseg', 'model.decode_head.in_index', [], r'in_index must.*got \[\]'),
    ('mmseg', 'model.decode_head.in_index', 4, r'reads the maps \[4\].*4'),
    ('mmseg', 'model.neck', dict(type='Feature2Pyramid', rescales=[]),
     'model.neck.rescales must be a list of positive numbers'),
    ('mmseg', 'model.neck', dict(type='Feature2Pyramid', rescales=[1]),
     'model.neck makes 1 maps, and the old backbone gives 4'),
    ('mmseg', 'model.neck', dict(type='JPU', in_channels=[64]),
     'model.neck.mid_channels is missing: it must be an integer'),
    ('mmpretrain', 'model.head', True, 'model.head must be a dict, got True'),
    ('mmpretrain', 'model.neck', [1], 'model.neck must be a dict'),
    ('mmseg', 'auto_scale_lr', 16, 'auto_scale_lr must be a dict or None'),
    ('mmseg', 'optim_wrapper.paramwise_cfg', [1], 'paramwise_cfg must be'),
    ('mmseg', 'optim_wrapper.paramwise_cfg.custom_keys', dict(norm=0.),
     'paramwise_cfg.custom_keys must be a dict of dicts by name'),
    ('mmseg', 'custom_imports.imports', [3],
     'custom_imports.imports must be a string or a list of strings'),
    ('mmseg', 'text', 'x', 'cfg: text is reserved.*rename it'),
])
def test_what_is_wrong_is_named(host, key, value, message):
    with pytest.raises(SwapError, match=message):
        swap(config(host, key, value), 'rp_swin_tiny')


@pytest.mark.parametrize('host, key, value', [
    ('mmdet', 'model.backbone.pretrained', ['x']),
    ('mmdet', 'model.bbox_head', dict(in_channels=[[64], 8])),
    ('mmseg', 'train_dataloader.dataset.pipeline', 3),
    ('mmseg', 'train_dataloader.dataset.pipeline', [
        dict(type='Resize', scale=0.5)]),
    ('mmdet', 'train_dataloader', dict(mean=3, to_rgb=False)),
])
def test_what_a_swap_does_not_need_is_not_its_business(host, key, value):
    new, _ = swap(config(host, key, value), 'rp_swin_tiny')
    assert new.model.backbone.type == 'mmrpa.RPSwin'


def test_a_mask_head_behind_a_neck_reads_all_of_its_maps():
    cfg = config('mmseg', 'model.neck', dict(type='Feature2Pyramid',
                                             rescales=[4, 2, 1, 0.5]))
    cfg['model']['backbone'] = dict(
        type='VisionTransformer', img_size=(64, 64), embed_dims=8,
        num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3))
    cfg['model']['decode_head'] = dict(type='Mask2FormerHead',
                                       in_channels=[8, 8, 8, 8])
    new, _ = swap(cfg, 'rp_swin_tiny')
    assert new.model.decode_head.in_channels == [96, 192, 384, 768]
