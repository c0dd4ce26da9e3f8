"""Every config of the project: its name, its text, one step of its model.

The files are found, not listed: a config that is added is tested.
"""

import ast
import copy
import inspect
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    MODELS,
    TRANSFORMS,
    VISUALIZERS,
    DefaultScope,
)
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

ROOT = Path(__file__).resolve().parent.parent / 'configs'
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*.py')
    if '_base_' not in path.parts)
FAMILIES = {
    'rp-deit': RPDeiT,
    'rp-pvt': RPPVT,
    'rp-swin': RPSwin,
    'rp-cswin': RPCSWin
}
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
# Neither side a multiple of a patch, so every level has to pad.
HEIGHT, WIDTH = 61, 90


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the workers of pytest-xdist from fighting for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def read(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def load(name: str) -> Config:
    return copy.deepcopy(read(name))


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


def walk(node):
    """Yield every dict inside nested dicts, lists and tuples."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for child in node:
            yield from walk(child)


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


def shrink(cfg: Config) -> None:
    """Cut what costs time on a toy image and changes no code path.

    512 x 512 padding becomes the toy size, the thousands of proposals become
    8, and boxes of any score are kept, so that an untrained detector runs
    its mask head in prediction, too.
    """
    if 'size' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.size = (64, 96)
    for key in ('train_cfg', 'test_cfg'):
        for node in walk(cfg.model.get(key)):
            if 'max_per_img' in node:
                node['max_per_img'] = min(node['max_per_img'], 8)
            if 'score_thr' in node:
                node['score_thr'] = 0.


def make_shallow(cfg: Config) -> None:
    """One block a stage: a stage's blocks are alike, and a large one has 27.

    RPDeiT stays as it is, since configs name its blocks in ``out_indices``.
    """
    cls, = (cls for cls in FAMILIES.values()
            if cfg.model.backbone.type == f'mmrpa.{cls.__name__}')
    arch = cfg.model.backbone.arch
    if isinstance(arch, str) and cls is not RPDeiT:
        cfg.model.backbone.arch = dict(cls.arch_zoo[arch],
                                       depths=(1, 1, 1, 1))


def build(cfg: Config) -> torch.nn.Module:
    """Build the model as ``Runner`` does on one process without a GPU."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if 'data_preprocessor' in cfg:
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
    return model


def provide_checkpoint(cfg: Config, folder: Path) -> dict:
    """Write what ``init_cfg`` asks for: the weights of our classifier.

    Returns:
        dict: The weights that the backbone must have after ``init_weights``;
        none if the config starts from random ones.
    """
    backbone = cfg.model.backbone
    if 'init_cfg' not in backbone:
        return {}
    assert backbone.init_cfg.type == 'Pretrained'
    names = [name for name in CONFIGS if name.startswith('mmpretrain')]
    source = next(name for name in names
                  if read(name).model.backbone.arch == backbone.arch)
    classifier = load(source)
    make_shallow(classifier)
    weights = build(classifier).state_dict()
    backbone.init_cfg.checkpoint = str(folder / 'classifier.pth')
    torch.save(dict(state_dict=weights), backbone.init_cfg.checkpoint)
    prefix = backbone.init_cfg.prefix
    kept = {key.removeprefix(prefix): value for key, value in weights.items()
            if key.startswith(prefix)}
    assert kept
    return kept


def detection_sample(height: int, width: int, masks: bool):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    boxes = np.array([[4, 6, 30, 40], [20, 10, 60, 50]])
    gt = InstanceData(
        bboxes=torch.tensor(boxes).float(), labels=torch.tensor([0, 1]))
    if masks:
        bitmaps = np.zeros((2, height, width), np.uint8)
        for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes, strict=True):
            bitmap[y1:y2, x1:x2] = 1
        gt.masks = BitmapMasks(bitmaps, height, width)
    sample = DetDataSample(
        metainfo=dict(
            img_id=1,
            ori_shape=(height, width),
            img_shape=(height, width),
            scale_factor=(1., 1.)))
    sample.gt_instances = gt
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def segmentation_sample(height: int, width: int):
    from mmseg.structures import SegDataSample
    label = torch.randint(0, 2, (1, height, width))
    label[:, :5] = 255
    sample = SegDataSample(
        metainfo=dict(ori_shape=(height, width), img_shape=(height, width)))
    sample.gt_sem_seg = PixelData(data=label)
    return sample


def make_batch(cfg: Config) -> dict:
    """Two images with ground truth, as the host's data loader gives them."""
    images = [
        torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8),
        torch.randint(0, 256, (3, HEIGHT - 8, WIDTH - 5), dtype=torch.uint8)
    ]
    sizes = [image.shape[1:] for image in images]
    if cfg.default_scope == 'mmdet':
        masks = 'roi_head' in cfg.model
        samples = [detection_sample(*size, masks) for size in sizes]
    elif cfg.default_scope == 'mmseg':
        samples = [segmentation_sample(*size) for size in sizes]
    else:
        # classifiers get crops of one size, already stacked
        images = torch.stack([images[0], images[0].flip(2)])
        from mmpretrain.structures import DataSample
        samples = [DataSample().set_gt_label(label) for label in (0, 1)]
    return dict(inputs=images, data_samples=samples)


def check_colours(model: torch.nn.Module) -> None:
    """An image of ImageNet's mean colour arrives as (almost) zeros."""
    # image files reach a host as blue, green, red
    colour = torch.tensor([103.53, 116.28, 123.675]).round().byte()
    images = colour[:, None, None].expand(3, 64, 64)
    out = model.data_preprocessor(dict(inputs=images[None]), False)['inputs']
    # rounding to uint8 leaves at most half a grey level of 57
    assert torch.stack(list(out)).abs().max() < 0.5 / 57
    brighter = images + torch.tensor([0, 0, 58]).byte()[:, None, None]
    out = model.data_preprocessor(dict(inputs=brighter[None]), False)
    red, green, blue = torch.stack(list(out['inputs'])).mean((0, 2, 3))
    assert abs(red - 58 / 58.395) < 0.01
    assert max(abs(green), abs(blue)) < 0.01


@cache
def parameters_of_all_families() -> str:
    """Names of parameters of each family, with RP and with own attention."""
    names = []
    with torch.device('meta'):
        for cls in FAMILIES.values():
            for attention in ('rp', cls.own_attention):
                backbone = cls(arch='tiny', attention=attention)
                names += [n for n, _ in backbone.named_parameters()]
    return '\n'.join(names)


def check_weight_decay(cfg: Config, model: torch.nn.Module) -> None:
    """No decay on norms, biases and tables of the backbone; else the full."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups for p in group['params']
    }
    full = cfg.optim_wrapper.optimizer.weight_decay
    assert full > 0
    free = ('anchors', 'cls_token', 'pos_embed', 'relative_position_bias')
    seen = set()
    for name, param in model.backbone.named_parameters():
        if not param.requires_grad:
            continue
        is_free = param.ndim <= 1 or any(key in name for key in free)
        assert decay[id(param)] == (0 if is_free else full), name
        seen |= {key for key in free if key in name}
    assert 'anchors' in seen
    known = parameters_of_all_families()
    for key in cfg.optim_wrapper.paramwise_cfg.get('custom_keys', {}):
        assert key in known, f'custom key {key!r} matches no parameter'


def check_loss_step(model: torch.nn.Module, batch: dict) -> None:
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert math.isfinite(loss.item()) and loss.item() > 0
    loss.backward()
    for name, param in model.named_parameters():
        if param.grad is not None:
            assert torch.isfinite(param.grad).all(), name
        elif name.startswith('backbone.'):
            # DDP stops at a trainable parameter that takes no part
            assert not param.requires_grad, f'{name} got no gradient'


def check_boxes(sample, cfg: Config) -> None:
    from mmdet.structures import DetDataSample
    assert isinstance(sample, DetDataSample)
    pred = sample.pred_instances
    count = len(pred)
    assert 0 < count <= 8
    assert pred.bboxes.shape == (count, 4)
    assert torch.isfinite(pred.bboxes).all()
    limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert (pred.bboxes >= 0).all() and (pred.bboxes <= limit).all()
    assert ((pred.scores >= 0) & (pred.scores <= 1)).all()
    heads = [d for d in walk(cfg.model) if 'num_classes' in d]
    assert ((pred.labels >= 0) & (pred.labels < heads[0].num_classes)).all()
    if 'roi_head' in cfg.model:
        assert pred.masks.shape == (count, HEIGHT, WIDTH)
        assert pred.masks.dtype == torch.bool


def check_label_map(sample, cfg: Config) -> None:
    from mmseg.structures import SegDataSample
    assert isinstance(sample, SegDataSample)
    classes = cfg.model.decode_head.num_classes
    assert sample.seg_logits.data.shape == (classes, HEIGHT, WIDTH)
    assert torch.isfinite(sample.seg_logits.data).all()
    labels = sample.pred_sem_seg.data
    assert labels.shape == (1, HEIGHT, WIDTH)
    assert torch.equal(labels[0], sample.seg_logits.data.argmax(0))


def check_class_scores(sample, cfg: Config) -> None:
    from mmpretrain.structures import DataSample
    assert isinstance(sample, DataSample)
    assert sample.pred_score.shape == (cfg.model.head.num_classes, )
    assert abs(sample.pred_score.sum() - 1) < 1e-4
    assert sample.pred_label.item() == sample.pred_score.argmax().item()


def once_a_kind() -> list:
    """All configs; all but the smallest of a folder and method are long."""
    seen, marked = set(), []
    for name in reversed(CONFIGS):
        path = Path(name)
        method = re.sub(r'-(nano|tiny|small|medium|base|large)', '', path.stem)
        kind = path.parent, method
        marked.append(pytest.param(
            name, marks=pytest.mark.long if kind in seen else []))
        seen.add(kind)
    return marked


@pytest.mark.parametrize('name', once_a_kind())
def test_one_step_and_one_prediction(name, tmp_path):
    cfg = load(name)
    shrink(cfg)
    weights = provide_checkpoint(cfg, tmp_path)
    make_shallow(cfg)
    model = build(cfg)
    state = model.backbone.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_colours(model)
        check_weight_decay(cfg, model)
        batch = make_batch(cfg)
        check_loss_step(model, batch)
        model.eval()
        prediction, = model.test_step({k: v[:1] for k, v in batch.items()})
    check = dict(
        mmdet=check_boxes,
        mmseg=check_label_map,
        mmpretrain=check_class_scores)[cfg.default_scope]
    check(prediction, cfg)
