"""What README and docs say is there, complete, and runs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = [ROOT / 'README.md', *ROOT.glob('docs/*.md'),
         *ROOT.glob('configs/*/README.md')]


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_nothing_is_left_to_fill(page):
    text = page.read_text()
    for link in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text):
        if not link.startswith('http'):
            assert (page.parent / link).exists(), link
    assert not re.findall(r'\b[A-Z]+_(?:TABLE|TEXT)\b', text)
    for path in re.findall(r'(?:configs|tools|docs|tests)/[\w/.-]+\.\w+',
                           text):
        assert (ROOT / path).exists(), path


def test_backbone_table_is_that_of_the_imagenet_configs():
    rows = re.findall(r'\| `mmrpa\.(\w+)` \| `(\w+)` \| ([\d.]+) \| ([\d.]+)',
                      README)
    table = (ROOT / 'configs/mmpretrain/README.md').read_text()
    assert len(rows) == 13
    for name, arch, params, macs in rows:
        family = name.replace('RP', 'rp-', 1).lower()
        row, = re.findall(rf'\[{family}-{arch}_8xb128_in1k\]\(.*', table)
        assert row.split('|')[1:3] == [f' {params} ', f' {macs} ']


# The snippets of "Swap the backbone", over the hosts' own configs.
SWAPS = {
    'mmdet': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmseg': 'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
}


@pytest.mark.parametrize('host', SWAPS)
def test_the_swap_that_the_readme_shows_builds_and_runs(host, tmp_path):
    text = ''.join(page.read_text() for page in PAGES)
    snippets = re.findall(r'```python\n(.*?)```', text, re.S)
    snippet, = (s for s in snippets if s.startswith(f'# {host}'))
    root = Path(find_spec(host).submodule_search_locations[0])
    base = root / '.mim/configs' / SWAPS[host]
    path = tmp_path / 'swapped.py'
    path.write_text(f'_base_ = {str(base)!r}\n{snippet}')
    cfg = Config.fromfile(path)
    init_default_scope(host)
    model = MODELS.build(cfg.model).eval()
    assert type(model.backbone).__name__ == 'RPSwin'
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 64, 96))
    assert maps[0].shape[-2:] == (16, 24)
    if host == 'mmseg':
        with torch.no_grad():
            model.decode_head(maps)
            model.auxiliary_head(maps)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert 'momentum' not in cfg.optim_wrapper.optimizer


def test_the_attention_alone_as_the_readme_shows_it():
    snippets = re.findall(r'```python\n(.*?)```', README, re.S)
    snippet, = (s for s in snippets if 'RPAttention(' in s)
    names = dict(x=torch.randn(1, 96, 4, 6))
    exec(snippet, names)
    assert names['y'].shape == names['x'].shape
