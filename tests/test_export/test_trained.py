"""Exports of the quickstart's models after a short training.

Every step as users take it: sample data, ``tools/train.py``,
``tools/export_onnx.py``. What the files compute is compared with the host's
own model in float64, which the exporter has no part in.
``python -m pytest -m long tests/test_export/test_trained.py``
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from export_models import needs_export
from guides import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmrpa.export import CHECK_SIZES
from mmrpa.weights import read_checkpoint

pytestmark = [pytest.mark.long, needs_export]
SEGMENTOR = 'mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128.py'
DETECTOR = 'mmdet/quickstart/mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py'
FROM_SCRATCH = 'model.backbone.init_cfg=None'
TOLERANCE = 1e-4


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A working directory with 120 scenes of the quickstart's size."""
    path = tmp_path_factory.mktemp('trained')
    _run('make_sample_data.py', 'data/sample', '--num-train', 120,
         '--num-val', 12, '--num-cls-train', 5, '--num-cls-val', 5, cwd=path)
    return path


def _run(tool: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / tool, *map(str, arguments)],
        cwd=cwd, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _train(folder: Path, config: str, *options: str) -> Path:
    run = folder / Path(config).stem
    _run('train.py', ROOT / 'configs' / config, '--work-dir', run,
         '--cfg-options', FROM_SCRATCH, *options, cwd=folder)
    checkpoint, = run.glob('*.pth')
    return checkpoint


def _export(folder: Path, config: str, checkpoint: Path, name: str,
            *options: str) -> onnxruntime.InferenceSession:
    text = _run('export_onnx.py', ROOT / 'configs' / config, checkpoint,
                '-o', name, *options, '--cfg-options', FROM_SCRATCH,
                cwd=folder)
    print(text)
    shown = re.findall(r'(\d+)x(\d+)x(\d+)  largest', text)
    assert [tuple(map(int, size)) for size in shown] == list(CHECK_SIZES)
    session = onnxruntime.InferenceSession(str(folder / name))
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    return session


def _reference(config: str, checkpoint: Path) -> nn.Module:
    """The host's model with the trained weights, in float64."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    state = read_checkpoint(str(checkpoint)).state_dict
    untrained = model.backbone.stages[0].blocks[0].attn.proj.weight
    assert not torch.equal(
        untrained, state['backbone.stages.0.blocks.0.attn.proj.weight'])
    model.load_state_dict(state)
    return model.double().eval()


def _images(folder: Path) -> list[Tensor]:
    """Held-out scenes side by side, cut to the five sizes, normalised."""
    import cv2
    paths = sorted((folder / 'data/sample/ade/images/validation').iterdir())
    scenes = [cv2.imread(str(path))[..., ::-1] for path in paths]
    images = []
    for i, (batch, height, width) in enumerate(CHECK_SIZES):
        made = []
        for j in range(batch):
            four = [scenes[(4 * i + 2 * j + k) % len(scenes)]
                    for k in range(4)]
            rows = [np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)]
            made.append(np.concatenate(rows, 0)[:height, :width])
        images.append(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    return [(image - mean) / std for image in images]


def _relative(got: np.ndarray, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((torch.from_numpy(got) - want).abs().max() /
            want.abs().max()).item()


@torch.no_grad()
def test_segmentor(folder):
    """Logits to 1e-4, and each label that float64 is sure of."""
    checkpoint = _train(
        folder, SEGMENTOR, 'train_cfg.max_iters=120',
        'train_cfg.val_interval=120', 'default_hooks.checkpoint.interval=120')
    logits, labels = (
        _export(folder, SEGMENTOR, checkpoint, f'{name}.onnx', '--output',
                name) for name in ('logits', 'labels'))
    model = _reference(SEGMENTOR, checkpoint)
    sure = pixels = 0
    errors, seen = [], set()
    for image in _images(folder):
        size = tuple(image.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
        want = model.encode_decode(image.double(), [meta] * len(image))
        feed = dict(image=image.numpy())
        got, = logits.run(['logits'], feed)
        errors.append(_relative(got, want))
        first, second = want.topk(2, dim=1).values.unbind(1)
        certain = first - second > 2 * TOLERANCE * want.abs().max()
        best = want.argmax(1)
        chosen, = labels.run(['labels'], feed)
        for found in (got.argmax(1), chosen):
            assert torch.from_numpy(found)[certain].equal(best[certain])
        sure += int(certain.sum())
        pixels += certain.numel()
        seen |= set(best.unique().tolist())
    print('largest differences', errors, f'sure of {sure} of {pixels} pixels, '
          f'classes {sorted(seen)}')
    assert max(errors) <= TOLERANCE
    # Neither a model that knows one class only, nor a vacuous comparison.
    assert len(seen) >= 3
    assert sure > 0.99 * pixels


@torch.no_grad()
def test_neck_of_detector(folder):
    """FPN's levels of a Mask R-CNN, to 1e-4."""
    checkpoint = _train(
        folder, DETECTOR, 'train_cfg.max_epochs=1',
        'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1')
    session = _export(folder, DETECTOR, checkpoint, 'neck.onnx')
    model = _reference(DETECTOR, checkpoint)
    errors = []
    for image in _images(folder):
        want = model.extract_feat(image.double())
        got = session.run(None, dict(image=image.numpy()))
        errors += [_relative(*pair) for pair in zip(got, want, strict=True)]
    print('largest differences', errors)
    assert len(errors) == 4 * len(CHECK_SIZES)
    assert max(errors) <= TOLERANCE
