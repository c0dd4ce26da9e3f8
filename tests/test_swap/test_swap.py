"""What a swap changes in the hosts' own configs, value by value."""

import copy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

import mmrpa
from mmrpa.swap import NAMES, SwapError, SwapRefused, swap, write_config
from mmrpa.swap.probe import build

IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def host_config(path: str) -> Config:
    """A config that an installed host ships, 'mmdet:folder/name.py'."""
    host, name = path.split(':')
    root = Path(find_spec(host).submodule_search_locations[0])
    return Config.fromfile(root / '.mim/configs' / name)


def changes(path: str, arch: str) -> tuple[Config, dict, dict]:
    """The new config, and its lines by key."""
    cfg, report = swap(host_config(path), arch)
    return (cfg, {key: f'{what} ({why})' for key, what, why in report.changed},
            dict(report.left))


def test_importing_the_package_imports_nothing_heavy():
    code = ('import sys, mmrpa; assert "swap_backbone" in mmrpa.__all__; '
            'print([m for m in ("torch", "mmengine", "numpy") '
            'if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True, check=True)
    assert done.stdout == '[]\n'
    with pytest.raises(AttributeError, match="no attribute 'swap_bone'"):
        _ = mmrpa.swap_bone


def test_retinanet_caffe():
    cfg, changed, left = changes(
        'mmdet:retinanet/retinanet_r50-caffe_fpn_1x_coco.py', 'rp_swin_tiny')
    assert cfg.model.backbone == dict(
        type='mmrpa.RPSwin', arch='tiny', drop_path_rate=0.2,
        out_indices=(1, 2, 3))
    neck = cfg.model.neck
    # the neck left out the stride-4 map; its other settings stay
    assert (neck.in_channels, neck.start_level) == ([192, 384, 768], 0)
    assert (neck.add_extra_convs, neck.num_outs) == ('on_input', 5)
    pre = cfg.model.data_preprocessor
    assert (pre.mean, pre.std, pre.bgr_to_rgb) == (*IMAGENET, True)
    assert pre.pad_size_divisor == 32
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.param_scheduler[1].milestones == [8, 11]
    gone = changed['model.backbone']
    for text in ('frozen_stages=1', 'norm_eval=True', "style='caffe'",
                 'detectron2/resnet50_caffe'):
        assert text in gone
    assert 'random weights' in left['model.backbone']


def test_the_input_is_not_changed():
    cfg = host_config('mmdet:retinanet/retinanet_r50-caffe_fpn_1x_coco.py')
    before = copy.deepcopy(cfg.to_dict())
    lines = []
    new = mmrpa.swap_backbone(cfg, 'rp-pvt-small', report=lines.append)
    assert cfg.to_dict() == before
    assert new.model.backbone.type == 'mmrpa.RPPVT'
    assert all(line.startswith(('changed  ', 'left     ')) for line in lines)
    assert not any('\n' in line for line in lines)
    # a dict is as good as a Config
    again = mmrpa.swap_backbone(before, 'rp_pvt_small', report=None)
    assert again.model == new.model


def test_detr_keeps_its_optimiser_but_trains_the_backbone():
    cfg, changed, left = changes('mmdet:detr/detr_r50_8xb2-150e_coco.py',
                                 'rp_pvt_tiny')
    assert cfg.model.backbone.out_indices == (3, )
    assert cfg.model.neck.in_channels == [512]
    wrapper = cfg.optim_wrapper
    assert wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert wrapper.clip_grad == dict(max_norm=0.1, norm_type=2)
    # lr_mult=0.1 was for a pretrained backbone
    assert 'optim_wrapper.paramwise_cfg.custom_keys.backbone' in changed
    assert wrapper.paramwise_cfg == dict(
        norm_decay_mult=0., bias_decay_mult=0.,
        custom_keys={name: dict(decay_mult=0.) for name in (
            'anchors', 'cls_token', 'pos_embed',
            'relative_position_bias_table')})


def test_dilated_heads_get_stages_resized_and_concatenated():
    cfg, changed, left = changes(
        'mmseg:deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-'
        '512x1024.py', 'rp_swin_tiny')
    head, aux = cfg.model.decode_head, cfg.model.auxiliary_head
    assert cfg.model.backbone.out_indices == (0, 1, 2, 3)
    # from stride 8 down to the depth that was read
    assert (head.in_channels, head.in_index) == ((192, 384, 768), (1, 2, 3))
    assert head.input_transform == aux.input_transform == 'resize_concat'
    assert (aux.in_channels, aux.in_index) == ((192, 384), (1, 2))
    assert (head.c1_in_channels, head.c1_channels) == (96, 48)
    # 4 GPUs x 2 images, where 6e-5 is for 16
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(3e-5)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8)
    # the old one, 1e-4 for lr 0.01, would be over three times the new lr
    assert cfg.param_scheduler[0].eta_min == pytest.approx(1e-4 * 3e-5 / 0.01)
    assert cfg.param_scheduler[0].end == 40000
    assert 'pretrained' not in cfg.model
    assert 'warm-up' in left['param_scheduler']


def test_heads_of_several_dilated_maps_get_a_joint_one():
    cfg, *_ = changes('mmseg:ann/ann_r50-d8_4xb4-80k_ade20k-512x512.py',
                      'rp_swin_tiny')
    model = cfg.model
    assert model.backbone.out_indices == (1, 2, 3)
    assert (model.neck.type, model.neck.in_channels) == ('JPU',
                                                         (192, 384, 768))
    # the JPU's map is as wide as the map that the head was made for
    assert 4 * model.neck.mid_channels == 2048
    assert (model.decode_head.in_channels, model.decode_head.in_index) == (
        [384, 2048], [1, 2])
    assert model.auxiliary_head.in_channels == 384


@pytest.mark.parametrize('path, arch, indices, neck, in_channels', [
    ('resnet/resnet50_8xb32_in1k.py', 'rp_swin_tiny', (3, ),
     'GlobalAveragePooling', 768),
    ('resnet/resnet50_8xb32_in1k.py', 'rp_deit_tiny', (11, ), None, 192),
    ('vision_transformer/vit-base-p16_32xb128-mae_in1k.py', 'rp_cswin_tiny',
     (3, ), 'GlobalAveragePooling', 512),
])
def test_classifiers(path, arch, indices, neck, in_channels):
    cfg, *_ = changes(f'mmpretrain:{path}', arch)
    model = cfg.model
    assert model.backbone.out_indices == indices
    assert (model.neck and model.neck.type) == neck
    assert model.head.in_channels == in_channels
    assert model.head.num_classes == 1000
    # vectors without a neck, maps with one
    assert model.backbone.get('out_type') == (None if neck else 'cls_token')


def test_vit_of_four_equal_strides():
    path = 'mmseg:vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py'
    cfg, *_ = changes(path, 'rp_swin_base')
    assert cfg.model.backbone.out_indices == (0, 1, 2, 3)
    assert cfg.model.decode_head.in_channels == [128, 256, 512, 1024]
    cfg, *_ = changes(path, 'rp_deit_small')
    assert cfg.model.backbone.out_indices == (2, 5, 8, 11)
    assert cfg.model.backbone.img_size == 512
    assert cfg.model.decode_head.in_channels == [384] * 4
    assert cfg.model.auxiliary_head.in_channels == 384


@pytest.mark.parametrize('path, reason', [
    ('mmdet:ssd/ssd300_coco.py', 'built around its own backbone.*VGG'),
    ('mmdet:yolox/yolox_s_8xb8-300e_coco.py', 'CSPDarknet'),
    ('mmdet:faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py',
     'shared_head'),
    ('mmdet:glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py',
     'multimodal'),
    ('mmseg:unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py', 'UNet'),
    ('mmseg:mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-'
     '512x1024.py', 'odd stride: maps of stride 2 '),
    ('mmpretrain:mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py',
     'pretext'),
])
def test_refusals(path, reason):
    with pytest.raises(SwapRefused, match=reason):
        swap(host_config(path), 'rp_swin_tiny')


@pytest.mark.parametrize('values, arch, message', [
    (dict(default_scope='mmdet'), 'rp_swim_tiny',
     "no arch 'rp_swim_tiny'. Did you mean rp_swin_tiny"),
    (dict(default_scope='mmdet'), None, 'no arch None'),
    (dict(model=dict(backbone=dict(type='ResNet'))), 'rp_swin_tiny',
     'no default_scope: the config does not say'),
    (dict(default_scope='mmfoo', model=dict(backbone=dict(type='ResNet'))),
     'rp_swin_tiny', "default_scope='mmfoo' names no host"),
    (dict(default_scope='mmdet', model=dict(type='RPN')), 'rp_swin_tiny',
     'RPN has neither model.backbone'),
    (dict(default_scope='mmdet', model=dict(
        type='RPN', neck=dict(type='FPN', in_channels=[4]),
        backbone=dict(type='ResNett', depth=50))), 'rp_swin_tiny',
     'ResNett cannot be run.*ResNett'),
    (dict(default_scope='mmdet', model=dict(
        type='RPN', neck=dict(type='FPN', in_channels=[1, 2]),
        backbone=dict(type='ResNet', depth=50, num_stages=2, strides=(1, 2),
                      dilations=(1, 1), out_indices=(0, 1)))),
     'rp_swin_tiny', r'in_channels=\[1, 2\].*\[256, 512\]'),
    (3, 'rp_swin_tiny', 'must be a Config or a dict|got int'),
])
def test_bad_input(values, arch, message):
    with pytest.raises(SwapError, match=message):
        swap(values, arch)


def test_names_are_those_of_the_backbones():
    assert len(NAMES) == 13
    assert NAMES[0] == 'rp_deit_tiny' and 'rp_pvt_large' in NAMES


def test_configs_that_import_their_types(tmp_path):
    (tmp_path / 'new_style.py').write_text(
        'from mmdet.models.backbones import ResNet\n'
        'from mmdet.models.detectors import RPN\n'
        'from mmdet.models.necks import FPN\n'
        'from torch.optim import SGD\n'
        "default_scope = 'mmdet'\n"
        'model = dict(type=RPN, backbone=dict(type=ResNet, depth=18), '
        'neck=dict(type=FPN, in_channels=[64, 128, 256, 512], '
        'out_channels=8, num_outs=4))\n'
        'optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.02))\n')
    cfg, report = swap(Config.fromfile(tmp_path / 'new_style.py'),
                       'rp_cswin_tiny')
    assert cfg.model.neck.in_channels == [64, 128, 256, 512]
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    write_config(cfg, tmp_path / 'out.py')
    again = Config.fromfile(tmp_path / 'out.py')
    assert again.model.backbone.type == 'mmrpa.RPCSWin'
    assert again.model.type.endswith('.RPN')
    neck = build(again.model.neck, 'mmdet')
    assert type(neck).__name__ == 'FPN' and neck.in_channels[0] == 64


def test_ssdlite_and_yolov3_of_mobilenet():
    cfg, *_ = changes(
        'mmdet:ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
        'rp_pvt_tiny')
    # strides 16 and 32, handed on to the head
    assert cfg.model.backbone.out_indices == (2, 3)
    assert cfg.model.neck.out_channels == (320, 512, 512, 256, 256, 128)
    assert cfg.model.bbox_head.in_channels == (320, 512, 512, 256, 256, 128)
    cfg, *_ = changes('mmdet:yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
                      'rp_pvt_tiny')
    # YOLOv3's neck names the deepest first
    assert cfg.model.neck.in_channels == [512, 320, 128]


def test_a_plain_backbone_under_a_pyramid():
    cfg, *_ = changes('mmdet:mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
                      'rp_deit_tiny')
    pyramid, fpn = cfg.model.neck
    assert (pyramid.type, pyramid.embed_dim, pyramid.rescales) == (
        'mmseg.Feature2Pyramid', 192, [4, 2, 1, 0.5])
    assert fpn.in_channels == [192] * 4
    assert cfg.model.backbone.out_indices == (2, 5, 8, 11)
    cfg, *_ = changes('mmseg:pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-'
                      '512x1024.py', 'rp_deit_tiny')
    # both heads read stride 8
    assert (cfg.model.neck.type, cfg.model.neck.rescales) == (
        'Feature2Pyramid', [2])
    assert cfg.model.decode_head.in_channels == 192
    assert (cfg.model.decode_head.in_index,
            cfg.model.auxiliary_head.in_index) == (0, 0)
    with pytest.raises(SwapRefused, match='odd stride'):
        changes('mmdet:detr/detr_r50_8xb2-150e_coco.py', 'rp_deit_tiny')


def test_the_detector_inside_a_wrapper_is_swapped():
    cfg, *_ = changes(
        'mmdet:soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
        'semi-0.01-coco.py', 'rp_swin_tiny')
    assert cfg.model.detector.backbone.type == 'mmrpa.RPSwin'
    assert cfg.model.detector.neck.in_channels == [96, 192, 384, 768]
    pre = cfg.model.data_preprocessor.data_preprocessor
    assert (pre.mean, pre.std, pre.bgr_to_rgb) == (*IMAGENET, True)
    cfg, _, left = changes('mmdet:ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
                           'rp_swin_tiny')
    assert cfg.model.teacher_ckpt.startswith('http')
    assert {'model.teacher_config', 'model.teacher_ckpt'} <= set(left)


def test_heads_behind_a_jpu_that_read_what_it_hands_on():
    cfg, *_ = changes(
        'mmseg:fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024'
        '.py', 'rp_pvt_tiny')
    model = cfg.model
    assert model.backbone.out_indices == (1, 2, 3)
    assert model.neck.in_channels == (128, 320, 512)
    # The joint map has four dilations of mid_channels, as before.
    assert (model.decode_head.in_index, model.decode_head.in_channels) == (
        2, 4 * model.neck.mid_channels)
    assert (model.auxiliary_head.in_index,
            model.auxiliary_head.in_channels) == (1, 320)
    # EncHead reads all three.
    cfg, *_ = changes(
        'mmseg:fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024'
        '.py', 'rp_pvt_tiny')
    assert cfg.model.decode_head.in_channels == [128, 320, 2048]


def test_a_head_without_convolutions_is_as_wide_as_its_input():
    cfg, *_ = changes(
        'mmseg:segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py',
        'rp_pvt_tiny')
    head = cfg.model.decode_head
    assert head.num_convs == 0
    assert head.channels == head.in_channels == 320


def test_pooling_of_tokens_becomes_pooling_of_maps():
    cfg, changed, _ = changes(
        'mmpretrain:mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py',
        'rp_pvt_tiny')
    assert cfg.model.neck == dict(type='GlobalAveragePooling')
    assert 'tokens' in changed['model.neck.dim']


def test_a_neck_that_knows_its_inputs_by_number_gets_them_all():
    cfg, changed, left = changes(
        'mmdet:nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco'
        '.py', 'rp_pvt_tiny')
    assert cfg.model.backbone.out_indices == (0, 1, 2, 3)
    assert cfg.model.neck.in_channels == [64, 128, 320, 512]
    assert cfg.model.neck.start_level == 1
    assert 'find_unused_parameters' in left['model.neck.start_level']
    assert 'model.neck.start_level' not in changed
