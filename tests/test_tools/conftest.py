"""Small data on disk and a small config of each host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import TOOLS
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

CLASSES = ('dot', 'bar')
SIZE = 64
BACKBONE = dict(
    type='mmrpa.RPPVT',
    arch=dict(
        embed_dims=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        mlp_ratios=(1, 1, 1, 1)),
    num_representatives=4,
    img_size=SIZE)


def _draw(rng: np.random.Generator, label: int) -> tuple[np.ndarray, list]:
    """An image of noise with a square of channel ``label``, and its box."""
    image = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
    x, y = (int(v) for v in rng.integers(4, 28, 2))
    image[y:y + 28, x:x + 28, label] = 250
    return image, [x, y, 28, 28]


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> Path:
    """Folders ``cls``, ``det`` and ``seg`` in the hosts' formats.

    Four images a split, two of each class, in a path with a blank in it.
    """
    root = tmp_path_factory.mktemp('data') / 'with blank'
    rng = np.random.default_rng(0)
    categories = [dict(id=i + 1, name=n) for i, n in enumerate(CLASSES)]
    for split in ('train', 'val'):
        images, annotations = [], []
        for i in range(4):
            label = i % 2
            image, box = _draw(rng, label)
            x, y, w, h = box
            seg = np.zeros((SIZE, SIZE), np.uint8)
            seg[y:y + h, x:x + w] = 1
            for path, pixels in (
                (f'cls/{split}/{CLASSES[label]}/{i}.png', image),
                (f'det/{split}/{i}.png', image),
                (f'seg/images/{split}/{i}.png', image),
                (f'seg/labels/{split}/{i}.png', seg),
            ):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(root / path), pixels)
            images.append(
                dict(id=i, file_name=f'{i}.png', width=SIZE, height=SIZE))
            annotations.append(
                dict(id=i, image_id=i, category_id=label + 1, bbox=box,
                     area=w * h, iscrowd=0))
        content = dict(
            images=images, annotations=annotations, categories=categories)
        (root / f'det/{split}.json').write_text(json.dumps(content))
    return root


def _schedule(scope: str) -> dict:
    return dict(
        default_scope=scope,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        auto_scale_lr=dict(enable=False, base_batch_size=8),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook', interval=2, by_epoch=False)),
        log_processor=dict(by_epoch=False),
        randomness=dict(seed=0))


def _splits(make) -> dict:
    """Give the three loaders, test the same as val."""
    train, val = make('train'), make('val')
    return dict(
        train_dataloader=train, val_dataloader=val, test_dataloader=val)


def cls_config(data: Path, batch_size: int = 2) -> dict:
    """A classifier for mmpretrain."""
    load = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    return dict(
        **_schedule('mmpretrain'),
        **_splits(lambda split: dict(
            batch_size=batch_size,
            num_workers=0,
            persistent_workers=False,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CustomDataset',
                data_root=str(data / 'cls'),
                data_prefix=split,
                metainfo=dict(classes=CLASSES),
                pipeline=load))),
        data_preprocessor=dict(mean=[50.] * 3, std=[50.] * 3, num_classes=2),
        val_evaluator=dict(type='Accuracy'),
        test_evaluator=dict(type='Accuracy'),
        model=dict(
            type='ImageClassifier',
            backbone=dict(BACKBONE, out_indices=(3, )),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=16)))


def det_config(data: Path) -> dict:
    """A RetinaNet for mmdet."""
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                       'scale_factor'))
    ]
    evaluator = dict(
        type='CocoMetric',
        ann_file=str(data / 'det/val.json'),
        metric='bbox')
    return dict(
        **_schedule('mmdet'),
        **_splits(lambda split: dict(
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                data_root=str(data / 'det'),
                ann_file=f'{split}.json',
                data_prefix=dict(img=split),
                metainfo=dict(classes=CLASSES),
                test_mode=split == 'val',
                pipeline=load))),
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        model=dict(
            type='RetinaNet',
            data_preprocessor=dict(
                type='DetDataPreprocessor',
                mean=[50.] * 3,
                std=[50.] * 3,
                pad_size_divisor=32),
            backbone=BACKBONE,
            neck=dict(
                type='FPN',
                in_channels=[8, 8, 16, 16],
                out_channels=16,
                num_outs=5),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=16,
                stacked_convs=1,
                feat_channels=16,
                anchor_generator=dict(
                    type='AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=[4, 8, 16, 32, 64]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder')),
            train_cfg=dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=0.5,
                    neg_iou_thr=0.4,
                    min_pos_iou=0),
                allowed_border=-1,
                pos_weight=-1,
                debug=False),
            test_cfg=dict(
                nms_pre=20,
                min_bbox_size=0,
                score_thr=0.0,
                nms=dict(type='nms', iou_threshold=0.5),
                max_per_img=5)))


def seg_config(data: Path, norm: str = 'BN') -> dict:
    """A segmentor with an FCN head for mmseg."""
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs')
    ]
    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return dict(
        **_schedule('mmseg'),
        **_splits(lambda split: dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='BaseSegDataset',
                data_root=str(data / 'seg'),
                data_prefix=dict(
                    img_path=f'images/{split}',
                    seg_map_path=f'labels/{split}'),
                img_suffix='.png',
                metainfo=dict(
                    classes=('ground', 'square'),
                    palette=[[0, 0, 0], [255, 0, 0]]),
                pipeline=load))),
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=[50.] * 3,
                std=[50.] * 3,
                size=(SIZE, SIZE)),
            backbone=BACKBONE,
            decode_head=dict(
                type='FCNHead',
                in_channels=16,
                in_index=3,
                channels=8,
                num_convs=1,
                concat_input=False,
                num_classes=2,
                norm_cfg=dict(type=norm)),
            train_cfg=dict(),
            test_cfg=dict(mode='whole')))


@pytest.fixture(scope='session')
def configs() -> dict:
    """Functions (data folder, ...) -> config dict, by host."""
    return dict(mmpretrain=cls_config, mmdet=det_config, mmseg=seg_config)


@pytest.fixture
def write_config(tmp_path):
    """A function (dict, file name) -> path of that config."""

    def write(content: dict, name: str = 'my config.py') -> Path:
        path = tmp_path / name
        path.write_text(''.join(f'{k} = {v!r}\n' for k, v in content.items()))
        return path

    return write


@pytest.fixture
def run_tool(tmp_path):
    """A function that runs a tool on CPUs from an empty working directory.

    ``run_tool('train.py', ...)`` or ``run_tool('dist_train.sh', ...)``
    returns the CompletedProcess, with both outputs as text in ``stdout``.
    Configs can import the modules in ``tmp_path``.
    """
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()

    def run(tool: str, *args: object,
            env: dict | None = None) -> subprocess.CompletedProcess:
        start = [sys.executable] if tool.endswith('.py') else ['bash']
        paths = [str(TOOLS.parent), str(tmp_path),
                 os.environ.get('PYTHONPATH', '')]
        settings = dict(
            PYTHONPATH=os.pathsep.join(p for p in paths if p),
            PYTHON=sys.executable,
            CUDA_VISIBLE_DEVICES='',
            OMP_NUM_THREADS='1')
        unset = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'GPUS',
                 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS', 'RANK',
                 'LOCAL_RANK', 'WORLD_SIZE')
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        return subprocess.run(
            [*start, str(TOOLS / tool), *map(str, args)],
            cwd=elsewhere,
            env={**inherited, **settings, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False)

    return run


@pytest.fixture(scope='session')
def photo(tmp_path_factory) -> Path:
    """A dark picture, 150 x 97, with one bright block around (90.5, 40.5)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 60, (97, 150, 3), dtype=np.uint8)
    pixels[38:44, 88:94] = 255
    path = tmp_path_factory.mktemp('images') / 'photo.png'
    assert cv2.imwrite(str(path), pixels)
    return path


# None of them takes the photo as it is.
_PREPARATION = dict(
    mmdet=[
        dict(type='Resize', scale=(200, 120), keep_ratio=True),
        dict(type='PackDetInputs',
             meta_keys=('ori_shape', 'img_shape', 'scale_factor'))
    ],
    mmseg=[
        dict(type='Resize', scale=(64, 41), keep_ratio=False),
        dict(type='PackSegInputs')
    ],
    mmpretrain=[
        dict(type='ResizeEdge', scale=72, edge='short', backend='pillow',
             interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=64),
        dict(type='PackInputs')
    ])


@pytest.fixture(scope='session')
def routing_models(data, configs, tmp_path_factory) -> dict:
    """Of each host: a config, its random weights, and those of its twin."""
    folder = tmp_path_factory.mktemp('routing')
    made = {}
    for host, steps in _PREPARATION.items():
        cfg = Config(configs[host](data))
        load = [dict(type='LoadImageFromFile')]
        cfg.test_dataloader.dataset.pipeline = load + steps
        path = folder / f'{host}.py'
        cfg.dump(path)
        model = cfg.model
        if host == 'mmpretrain':
            model.data_preprocessor = cfg.data_preprocessor
        init_default_scope(host)
        files = []
        for attention in ('rp', 'sr'):
            model.backbone.attention = attention
            torch.manual_seed(0)
            state = MODELS.build(model).state_dict()
            for name, tensor in state.items():
                if name.endswith('qkv.weight'):
                    # New queries are so small that all read the same.
                    tensor[:len(tensor) // 3] *= 400
            files.append(folder / f'{host}_{attention}.pth')
            torch.save(dict(state_dict=state, meta=dict(epoch=1)), files[-1])
        made[host] = (path, *files)
    return made
