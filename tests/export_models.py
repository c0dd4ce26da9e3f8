"""Small configs and weights that exports are tested with."""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrpa.export import ExportModel
from mmrpa.torch_release import release

# What an older one is told: test_older_torch_is_named.
needs_export = pytest.mark.skipif(
    release(torch.__version__) < (2, 7), reason='exports need torch 2.7')

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4),
            mlp_ratios=2)
# A backbone of each family, small, with RPAttention and with its own.
BACKBONES = dict(
    RPDeiT=dict(arch=dict(embed_dims=32, depths=2, num_heads=2, mlp_ratios=2),
                attention=('rp', 'dense')),
    RPPVT=dict(arch=dict(ARCH), attention=('sr', 'rp')),
    # The second block's windows are shifted.
    RPSwin=dict(arch=dict(ARCH, depths=(2, 1)), attention=('window', 'rp'),
                window_size=3),
    RPCSWin=dict(arch=dict(ARCH), attention=('cross', 'rp'),
                 split_sizes=(3, 5)))
# The same as small as can be; all of the above is for tests that take minutes.
_ONE = dict(embed_dims=(32, ), depths=(1, ), num_heads=(2, ), mlp_ratios=2)
SMALL = dict(
    RPDeiT=dict(arch=dict(embed_dims=32, depths=1, num_heads=2, mlp_ratios=2),
                attention='rp', out_indices=(0, )),
    RPPVT=dict(arch=_ONE, attention='rp', out_indices=(0, )),
    RPSwin=dict(arch=dict(_ONE, depths=(2, )), attention='window',
                out_indices=(0, )),
    RPCSWin=dict(arch=_ONE, attention='rp', out_indices=(0, ),
                 split_sizes=(3, )))


def write_classifier(folder: Path, name: str = 'RPSwin',
                     **backbone: Any) -> Path:
    """A config of mmpretrain with a small backbone and two classes."""
    cfg = dict(BACKBONES[name], type=f'mmrpa.{name}', out_indices=(0, 1),
               num_representatives=8, norm_cfg=dict(type='BN'))
    cfg.update(backbone)
    model = dict(
        type='ImageClassifier', backbone=cfg,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=2, in_channels=32,
                  loss=dict(type='CrossEntropyLoss')),
        data_preprocessor=dict(
            mean=[120., 110, 100], std=[60., 50, 40], to_rgb=True,
            num_classes=2))
    path = folder / 'classifier.py'
    Config(dict(
        default_scope='mmpretrain', model=model,
        test_dataloader=dict(dataset=dict(
            type='CustomDataset', metainfo=dict(classes=('cat', 'dog')),
            pipeline=PIPELINE)))).dump(path)
    return path


def write_segmentor(folder: Path, out_channels: int = 2, **model: Any
                    ) -> Path:
    """A config of mmseg with one small block, and two classes."""
    head = dict(type='FCNHead', in_channels=32, channels=8, num_convs=1,
                in_index=0, num_classes=2, out_channels=out_channels,
                threshold=0.4 if out_channels == 1 else None,
                loss_decode=dict(type='CrossEntropyLoss',
                                 use_sigmoid=out_channels == 1))
    backbone = dict(SMALL['RPPVT'], type='mmrpa.RPPVT', norm_cfg=dict(
        type='BN'), num_representatives=8)
    cfg = dict(
        type='EncoderDecoder', backbone=backbone, decode_head=head,
        train_cfg=dict(), test_cfg=dict(mode='whole'), data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[120., 110, 100],
            std=[60., 50, 40], bgr_to_rgb=True, size=(64, 64)))
    cfg.update(model)
    path = folder / 'segmentor.py'
    Config(dict(
        default_scope='mmseg', model=cfg,
        test_dataloader=dict(dataset=dict(
            type='BaseSegDataset', metainfo=dict(classes=('no', 'yes')),
            pipeline=[PIPELINE[0], dict(type='PackSegInputs')])))).dump(path)
    return path


def write_weights(config: Path, seed: int = 1) -> Path:
    """A checkpoint of a config, with statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    state: Dict[str, torch.Tensor] = MODELS.build(cfg.model).state_dict()
    for key, value in state.items():
        if key.endswith('running_mean'):
            value.normal_()
        elif key.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif key.endswith('relative_position_bias_table'):
            value.normal_()
    strengthen(state)
    path = config.parent / 'weights.pth'
    torch.save(dict(state_dict=state), path)
    return path


def strengthen(state: Dict[str, torch.Tensor]) -> None:
    """Give blocks the say that training gives them.

    As initialised they add a few percent to their input, behind which an error
    in them would hide. Not by much: at five times as much, float32 itself is
    off by 1e-2 behind four stages.
    """
    for key, value in state.items():
        if '.blocks.' in key and value.dim() == 2:
            value.mul_(2)


def load(config: Path, **options: Any) -> ExportModel:
    """The model of a config and of weights beside it."""
    return ExportModel(str(config), str(config.parent / 'weights.pth'),
                       **options)
