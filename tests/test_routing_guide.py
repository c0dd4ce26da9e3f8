"""docs/routing.md: its commands run, and draw what it shows."""

import re
from pathlib import Path

import pytest
import torch
from guides import ROOT, run_guide
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

PAGE = 'docs/routing.md'
CONFIGS = dict(
    classifier='configs/mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py',
    segmentor='configs/mmseg/quickstart/'
    'rp-pvt-nano_upernet_1xb8-300_sample-128x128.py')


def _random_weights(config: str, path: Path, attention: str) -> None:
    cfg = Config.fromfile(ROOT / config)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.backbone.update(attention=attention, init_cfg=None)
    if 'data_preprocessor' in cfg:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=MODELS.build(model).state_dict()), path)


@pytest.fixture
def workdir(tmp_path):
    """What the guide has trained when it draws, with random weights."""
    for name, file, attention in (
        ('classifier', 'quickstart/classifier/epoch_5.pth', 'rp'),
        ('segmentor', 'quickstart/segmentor/iter_300.pth', 'rp'),
        ('classifier', 'twin/epoch_5.pth', 'sr')):
        _random_weights(CONFIGS[name], tmp_path / 'work_dirs' / file,
                        attention)
    folder = tmp_path / 'data/sample'
    for i, name in enumerate(('ade/images/validation/ADE_val_00000002.jpg',
                              'ade/images/validation/ADE_val_00000004.jpg',
                              'coco/val2017/000000000004.jpg')):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((128, 128), 40 + 20 * i).save(folder / name)
    return tmp_path


def test_guide(workdir):
    # Training and the page have tests of their own.
    outputs = run_guide(PAGE, workdir, skip=[
        'tools/train.py', 'routing_explorer.py', 'benchmark_routing_stats.py'])
    drawn = ['segments', 'ADE_val_00000004_heat', 'ADE_val_00000004_blocks',
             '000000000004_heat', '000000000004_blocks']
    for name in drawn:
        path = f'work_dirs/routing/{name}.png'
        assert any(path in text for text in outputs.values())
        assert (workdir / path).is_file()


def test_numbers_of_the_hook_are_those_that_it_logs():
    """The table of the guide has the hook's columns and scalars."""
    from mmrpa.hooks.routing_stats import _HEADER, RoutingStats
    text = (ROOT / PAGE).read_text()
    assert _HEADER in text
    rows = re.findall(r'^\| [a-z ]+ \| `(\w+)` \|', text, re.M)
    assert tuple(rows) == RoutingStats._fields
