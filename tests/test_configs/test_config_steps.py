"""Every config of the project: one step and one prediction of its model."""

import copy
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from project_configs import CONFIGS, FAMILIES, load, read, walk

from mmrpa.backbones import RPDeiT

# Neither side a multiple of a patch, so every level has to pad.
HEIGHT, WIDTH = 61, 90


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the workers of pytest-xdist from fighting for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
