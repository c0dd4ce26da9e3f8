"""docs/pretrained.md does what it says."""

import re

import timm
import torch
from guides import ROOT, run_guide
from helpers import mmdet_models
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmrpa.backbones import checkpoint

PAGE = ROOT / 'docs/pretrained.md'
CONFIG = ROOT / ('configs/mmdet/rp_swin/'
                 'mask-rcnn_rp-swin-tiny_fpn_1x_coco.py')


def test_guide(tmp_path, monkeypatch):
    mmdet_models()  # of the snippets
    for file, name in (('swin_tiny.pth', 'swin_tiny_patch4_window7_224'),
                       ('deit_tiny.pth', 'deit_tiny_patch16_224')):
        torch.save(timm.create_model(name).state_dict(), tmp_path / file)
    outputs = run_guide('docs/pretrained.md', tmp_path)
    text = PAGE.read_text()
    shown, = re.findall(r'```\n(RPSwin from .*?)```', text, re.S)
    assert next(iter(outputs.values())) == shown
    resized = next(v for k, v in outputs.items() if 'img_size=384' in k)
    assert '(1, 197, 192) -> (1, 577, 192)' in resized
    # The snippets, as overrides of a config.
    cfg = Config.fromfile(CONFIG)
    names: dict = {}
    for snippet in re.findall(r'```python\n(.*?)```', text, re.S):
        exec(snippet, {}, names)
    cfg.merge_from_dict(names)
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmdet')
    lines = []
    monkeypatch.setattr(checkpoint, 'print_log',
                        lambda line, logger: lines.append(line))
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    # 12 blocks of two new tensors, three output norms of two.
    assert '; 30 tensors are not in it and stay new' in lines[0]
    optim = build_optim_wrapper(backbone, cfg.optim_wrapper)
    rates = {g['lr'] for g in optim.optimizer.param_groups}
    assert min(rates) == 1e-4 * 0.9**13 and max(rates) == 1e-4
