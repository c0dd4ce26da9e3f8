"""The configs and programs of docs/own_data.md, on the sample data."""

import re
import subprocess
import sys

import pytest
import torch
from guides import ROOT, run_guide
from helpers import TOOLS, mmdet_models
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmrpa.preflight import check_config

PAGE = 'docs/own_data.md'
# Toy sizes; the data are loaded by the process itself.
SMALL = [f'{split}_dataloader.{key}' for split in ('train', 'val', 'test')
         for key in ('num_workers=0', 'persistent_workers=False')]
SCALE = ['train_dataloader.dataset.pipeline.2.scale=(96,96)',
         'val_dataloader.dataset.pipeline.1.scale=(96,96)',
         'test_dataloader.dataset.pipeline.1.scale=(96,96)']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The files of the page, and data beside them."""
    out = tmp_path_factory.mktemp('own')
    subprocess.run([
        sys.executable, TOOLS / 'make_sample_data.py', out / 'data/sample',
        '--num-train', '6', '--num-val', '2', '--num-cls-train', '10',
        '--num-cls-val', '10'
    ], check=True, capture_output=True)  # yapf: disable
    (out / 'configs').symlink_to(ROOT / 'configs')
    for block in re.findall(r'```python\n(.*?)```',
                            (ROOT / PAGE).read_text(), re.DOTALL):
        (out / block.partition('\n')[0].removeprefix('# ')).write_text(block)
    assert sorted(path.name for path in out.glob('*.py')) == [
        'my_detector.py', 'my_segmentor.py', 'predict.py']
    return out


@pytest.mark.parametrize('name, classes', [('detector', 5), ('segmentor', 6)])
def test_configs(name, classes, folder, monkeypatch):
    monkeypatch.chdir(folder)
    mmdet_models()
    cfg = Config.fromfile(f'my_{name}.py')
    check_config(cfg, ('train', 'val', 'test'))  # the heads, too
    init_default_scope(cfg.default_scope)
    for split, images in (('train', 6), ('val', 2), ('test', 2)):
        data = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        assert len(data) == images
        assert len(data.metainfo['classes']) == classes


@pytest.mark.long
def test_detector(folder):
    outputs = run_guide(PAGE, folder, replace={
        '--auto-scale-lr': ' '.join([
            '--auto-scale-lr --cfg-options train_cfg.max_epochs=1',
            *SMALL, *map("'{}'".format, SCALE)]),
        'epoch_12.pth': ' '.join([
            'epoch_1.pth --cfg-options', *SMALL,
            *map("'{}'".format, SCALE)]),
    }, timeout=900)
    check, train, test = outputs.values()
    assert 'no problem(s), 8 images in 2 dataset(s)' in check
    assert 'coco/bbox_mAP:' in train and 'coco/segm_mAP:' in test
    program = (folder / 'predict.py').read_text()
    image = next((folder / 'data/sample/coco/val2017').iterdir())
    done = subprocess.run(
        [sys.executable, '-c', program.replace('epoch_12', 'epoch_1').replace(
            'image.jpg', str(image))],
        cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines()
             if line.endswith(']')}
    assert names and names <= set(('cross', 'disc', 'square', 'star',
                                   'triangle'))


@pytest.mark.long
def test_segmentor_starts_from_one_of_other_classes(folder):
    cfg = Config.fromfile(
        ROOT / 'configs/mmseg/rp_swin/'
        'rp-swin-tiny_upernet_8xb2-160k_ade20k-512x512.py')
    init_default_scope('mmseg')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()),
               folder / 'ade20k.pth')
    done = subprocess.run(
        [sys.executable, TOOLS / 'train.py', 'my_segmentor.py',
         '--cfg-options', 'load_from=ade20k.pth', 'train_cfg.max_iters=1',
         'train_cfg.val_interval=1', *SMALL],
        cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert 'mIoU:' in said
    mismatched = re.findall(r'size mismatch for (\S+):', said)
    assert sorted(set(mismatched)) == [
        'auxiliary_head.conv_seg.bias', 'auxiliary_head.conv_seg.weight',
        'decode_head.conv_seg.bias', 'decode_head.conv_seg.weight']
