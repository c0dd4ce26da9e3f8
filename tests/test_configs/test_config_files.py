"""Every config of the project: its name, its text, what it builds.

The files are found, not listed: a config that is added is tested.
"""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import (
    DATASETS,
    HOOKS,
    TRANSFORMS,
    VISUALIZERS,
    DefaultScope,
)
from mmengine.runner import Runner
from project_configs import CONFIGS, FAMILIES, ROOT, load, read, walk

DATASET_OF_TOKEN = dict(
    in1k='ImageNet', coco='CocoDataset', ade20k='ADE20KDataset')
METHOD_OF_TOKEN = {
    'mask-rcnn': ('MaskRCNN', 'roi_head', 'StandardRoIHead'),
    'cascade-mask-rcnn': ('CascadeRCNN', 'roi_head', 'CascadeRoIHead'),
    'retinanet': ('RetinaNet', 'bbox_head', 'RetinaHead'),
    'upernet': ('EncoderDecoder', 'decode_head', 'UPerHead')
}
# Keys with a meaning: the Runner's arguments, what the hosts' scripts read,
# and the helper variables of the hosts' own bases.
KNOWN_KEYS = set(inspect.signature(Runner.__init__).parameters) | {
    'tta_model', 'tta_pipeline', 'dataset_type', 'data_root', 'backend_args',
    'train_pipeline', 'test_pipeline', 'vis_backends', 'bgr_mean', 'bgr_std'
}


def own_bases(path: Path) -> list[Path]:
    """The files of this project that a config names in ``_base_``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            bases = ast.literal_eval(node.value)
            bases = [bases] if isinstance(bases, str) else bases
            return [(path.parent / base).resolve() for base in bases
                    if '::' not in base]
    return []


def depth(path: Path) -> int:
    return max((1 + depth(base) for base in own_bases(path)), default=0)


def helper_variables(path: Path) -> set[str]:
    """Names that a config or a base of it reads: variables, not settings."""
    names = {node.id for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names.union(*map(helper_variables, own_bases(path)))


def datasets(cfg: Config) -> list[dict]:
    splits = ('train', 'val', 'test')
    return [cfg[f'{split}_dataloader'].dataset for split in splits]


def test_configs_are_found():
    hosts = {name.split('/')[0] for name in CONFIGS}
    assert hosts == {'mmpretrain', 'mmdet', 'mmseg'}
    full = [name for name in CONFIGS if 'quickstart' not in name]
    counts = {h: sum(n.startswith(h) for n in full) for h in hosts}
    assert counts == dict(mmpretrain=13, mmdet=19, mmseg=12)
    for host, path in (name.split('/', 1) for name in full):
        assert f'({path})' in (ROOT / host / 'README.md').read_text()


@pytest.mark.parametrize('name', CONFIGS)
def test_text(name):
    path = ROOT / name
    bases = own_bases(path)
    assert all(base.is_file() for base in bases)
    assert depth(path) <= 2
    if any('_base_' not in base.parts for base in bases):
        assert len(path.read_text().splitlines()) <= 15
    cfg = read(name)
    assert set(cfg.keys()) <= KNOWN_KEYS | helper_variables(path)
    assert cfg.default_scope == name.split('/')[0]
    # The lr of a config belongs to a batch; scaling it is the user's choice.
    assert cfg.auto_scale_lr.enable is False
    assert cfg.auto_scale_lr.base_batch_size > 0


@pytest.mark.parametrize('name', CONFIGS)
def test_name_says_what_the_config_does(name):
    cfg = read(name)
    stem = Path(name).stem
    backbone = cfg.model.backbone

    family, arch = re.search(r'(rp-[a-z]+)-([a-z]+)', stem).groups()
    cls = FAMILIES[family]
    assert backbone.type == f'mmrpa.{cls.__name__}'
    if isinstance(backbone.arch, str):
        assert backbone.arch == arch
    else:
        assert arch not in cls.arch_zoo

    tokens = re.split(r'[_-]', stem)
    for token, dataset in DATASET_OF_TOKEN.items():
        if token in tokens:
            assert {d.type for d in datasets(cfg)} == {dataset}
    for token, (model, part, head) in METHOD_OF_TOKEN.items():
        if token in stem.split('_'):
            assert cfg.model.type == model
            assert cfg.model[part].type == head
    if epochs := re.search(r'[_-](\d+)x_', stem):
        assert cfg.train_cfg.max_epochs == 12 * int(epochs[1])
    if iters := re.search(r'-(\d+)k_', stem):
        assert cfg.train_cfg.max_iters == 1000 * int(iters[1])
    if batch := re.search(r'_(\d+)xb(\d+)', stem):
        gpus, images = int(batch[1]), int(batch[2])
        assert cfg.train_dataloader.batch_size == images
        assert cfg.auto_scale_lr.base_batch_size == gpus * images
    if crop := re.search(r'-(\d+)x(\d+)$', stem):
        size = (int(crop[1]), int(crop[2]))
        assert tuple(cfg.model.data_preprocessor.size) == size
        for transform in walk(cfg.train_dataloader.dataset.pipeline):
            if transform.get('type') == 'RandomCrop':
                assert tuple(transform.crop_size) == size


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule_covers_the_training(name):
    cfg = read(name)
    length = cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))
    main = cfg.param_scheduler[-1]
    assert main.by_epoch == ('max_epochs' in cfg.train_cfg)
    assert main.get('end', length) == length
    assert all(m < length for m in main.get('milestones', ()))
    for scheduler in cfg.param_scheduler:
        assert scheduler.get('begin', 0) < scheduler.get('end', length)


@pytest.mark.parametrize('name', CONFIGS)
def test_data_and_hooks_build(name, tmp_path):
    cfg = load(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for dataset in datasets(cfg):
            # lazy: the arguments are checked, the files need not exist
            DATASETS.build({**dataset, 'lazy_init': True})
        if 'tta_pipeline' in cfg:
            Compose([TRANSFORMS.build(t) for t in cfg.tta_pipeline])
        # the visualization hook asks for the visualizer of the Runner
        VISUALIZERS.build({
            **cfg.visualizer, 'name': name, 'save_dir': str(tmp_path)
        })
        hooks = [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]
        for hook in hooks:
            hook.pop('priority', None)  # an argument of Runner.register_hook
            HOOKS.build(hook)
    if 'ADE20KDataset' in {d.type for d in datasets(cfg)}:
        assert {'tta_model', 'tta_pipeline'} <= set(cfg.keys())


def test_cswin_alone_keeps_a_moving_average():
    hooks = {
        name: load(name).custom_hooks
        for name in CONFIGS
        if name.startswith('mmpretrain') and 'custom_hooks' in read(name)
    }
    assert set(hooks) == {
        f'mmpretrain/rp_cswin/rp-cswin-{arch}_8xb128_in1k.py'
        for arch in ('tiny', 'small', 'base')
    }
    for name, (cfg, ) in hooks.items():
        model = torch.nn.Linear(1, 1, bias=False)
        assert cfg.pop('priority') == 'ABOVE_NORMAL'
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            hook = HOOKS.build(cfg)
            hook.before_run(SimpleNamespace(model=model))
        with torch.no_grad():
            for weight in (0., 1.):
                model.weight.fill_(weight)
                hook.ema_model.update_parameters(model)
        decay = 0.99992 if '-base_' in name else 0.99984
        average = hook.ema_model.module.weight.item()
        assert average == pytest.approx(1 - decay, rel=1e-4)


def test_tta_gives_six_scales_and_flips(tmp_path):
    pipelines = {str(read(n).tta_pipeline): n for n in CONFIGS
                 if n.startswith('mmseg') and 'tta_pipeline' in read(n)}
    assert pipelines
    import mmcv
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48] = 255
    mmcv.imwrite(image, str(tmp_path / 'a.jpg'))
    mmcv.imwrite(np.ones((64, 96), np.uint8), str(tmp_path / 'a.png'))
    for name in pipelines.values():
        cfg = load(name)
        with DefaultScope.overwrite_default_scope('mmseg'):
            out = Compose(cfg.tta_pipeline)(
                dict(
                    img_path=str(tmp_path / 'a.jpg'),
                    seg_map_path=str(tmp_path / 'a.png'),
                    label_map=None,
                    reduce_zero_label=True,
                    seg_fields=[]))
        plain = next(d for d in walk(cfg.test_pipeline)
                     if d.get('type') == 'Resize').scale
        short = [min(i.shape[1:]) for i in out['inputs']]
        wanted = [int(min(plain) * r) for r in (.5, .75, 1, 1.25, 1.5, 1.75)]
        assert short == [s for s in wanted for _ in range(2)]
        for straight, flipped in zip(
                out['inputs'][::2], out['inputs'][1::2], strict=True):
            assert torch.equal(straight.flip(2), flipped)
            assert not torch.equal(straight, flipped)
        for sample in out['data_samples']:
            # label 1 of the file is class 0, at the file's own size
            gt = sample.gt_sem_seg.data
            assert tuple(gt.shape) == (1, 64, 96) and bool((gt == 0).all())
