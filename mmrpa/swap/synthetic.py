"""Batches of random images with labels, as each host's data loader gives."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData

from .fields import walk
from .report import type_name

_BATCH = 2
_MULTI_VIEW = dict(BYOL=2, SimCLR=2, SimSiam=2, MoCo=2, MoCoV3=2,
                   BarlowTwins=2, DenseCL=2)
_VIDEO_MODELS = ('QDTrack', 'MaskTrackRCNN', 'Mask2FormerVideo')


def make_batch(cfg: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Two random images with random ground truth.

    Args:
        cfg (Mapping): The whole config.
        side (int): Height and width of the images, in pixels.

    Returns:
        dict: ``inputs`` and ``data_samples``, for the data preprocessor.
    """
    model, channels = cfg['model'], _num_channels(cfg)
    if cfg['default_scope'] == 'mmseg':
        return _segmentation(model, channels, side)
    if cfg['default_scope'] == 'mmpretrain':
        return _classification(model, channels, side)
    loaders = [node for _, node in walk(cfg.get('train_dataloader'))
               if 'LoadAnnotations' in type_name(node)]
    # Some assigners do without masks only where there are none.
    masks = not loaders or any(node.get('with_mask') for node in loaders)
    return _detection(model, channels, side, masks)


def _num_channels(cfg: Mapping[str, Any]) -> int:
    for _, node in walk(cfg['model']):
        if 'backbone' in node and isinstance(node['backbone'], Mapping):
            return node['backbone'].get('in_channels', 3)
    return 3


def _num_classes(model: Mapping[str, Any]) -> int:
    """The smallest number of classes that a part of the model has."""
    counts = [node[name] for _, node in walk(model)
              for name in ('num_classes', 'num_things_classes')
              if isinstance(node.get(name), int) and node[name] > 0]
    return min(counts, default=1)


def _images(channels: int, side: int, count: int = _BATCH) -> list:
    return [torch.randint(0, 256, (channels, side, side), dtype=torch.uint8)
            for _ in range(count)]


def _detection(model: Mapping[str, Any], channels: int, side: int,
               masks: bool) -> dict[str, Any]:
    kind = type_name(model)
    if kind == 'BaseReID':
        return _reid(channels)
    if kind in _VIDEO_MODELS:
        return _video(model, side)
    batch = dict(
        inputs=_images(channels, side),
        data_samples=[_objects(model, side, masks) for _ in range(_BATCH)])
    if kind != 'SoftTeacher':
        return batch
    branches = ('sup', 'unsup_teacher', 'unsup_student')
    return dict(
        inputs={name: _images(channels, side) for name in branches},
        data_samples={
            name: [_objects(model, side, masks) for _ in range(_BATCH)]
            for name in branches
        })


def _objects(model: Mapping[str, Any], side: int, with_masks: bool) -> Any:
    """An mmdet sample with boxes, masks, a label map and proposals."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    sample = DetDataSample(metainfo=dict(
        img_id=1, img_shape=(side, side), ori_shape=(side, side),
        batch_input_shape=(side, side), scale_factor=(1., 1.), flip=False,
        flip_direction=None, homography_matrix=np.eye(3, dtype=np.float32)))
    corners = torch.tensor([[0.1, 0.15, 0.5, 0.7], [0.4, 0.3, 0.9, 0.8],
                            [0.2, 0.5, 0.35, 0.62]]) * side
    masks = np.zeros((len(corners), side, side), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.int().tolist(),
                                      strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.randint(0, _num_classes(model), (len(corners), ))
    sample.gt_instances = InstanceData(bboxes=corners, labels=labels)
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, side, side)
        sample.ignored_instances.masks = BitmapMasks(masks[:0], side, side)
    # HTC's loader gives the label map at an eighth of the image.
    cell = 8 if any('semantic_head' in n and 'fusion_level' in str(
        n['semantic_head']) for _, n in walk(model)) else 1
    sample.gt_sem_seg = PixelData(sem_seg=torch.randint(
        0, 10, (1, side // cell, side // cell)))
    sample.proposals = InstanceData(
        bboxes=torch.cat([corners, corners * 0.9]), scores=torch.rand(6))
    return sample


def _reid(channels: int) -> dict[str, Any]:
    """Two images of each of two persons, in the one size of such models."""
    from mmdet.structures import ReIDDataSample
    samples = [ReIDDataSample().set_gt_label(i // 2) for i in range(4)]
    images = torch.randint(0, 256, (4, channels, 256, 128),
                           dtype=torch.uint8)
    return dict(inputs=images, data_samples=samples)


def _video(model: Mapping[str, Any], side: int) -> dict[str, Any]:
    from mmdet.testing import demo_track_inputs
    return demo_track_inputs(
        batch_size=1, num_frames=2, image_shapes=(3, side, side),
        num_items=[3], num_classes=_num_classes(model), with_mask=True,
        key_frames_inds=[0])


def _segmentation(model: Mapping[str, Any], channels: int,
                  side: int) -> dict[str, Any]:
    from mmseg.structures import SegDataSample
    samples = []
    for _ in range(_BATCH):
        label = torch.randint(0, max(_num_classes(model), 2),
                              (1, side, side))
        label[:, :4] = 255
        sample = SegDataSample(metainfo=dict(
            img_shape=(side, side), ori_shape=(side, side)))
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    return dict(inputs=_images(channels, side), data_samples=samples)


def _classification(model: Mapping[str, Any], channels: int,
                    side: int) -> dict[str, Any]:
    from mmpretrain.structures import DataSample
    kind = type_name(model)
    images = torch.stack(_images(channels, side))
    if kind == 'SwAV':
        crops = model['head']['loss'].get('num_crops', [2, 6])
        sizes = [side] * crops[0] + [max(side // 2, 32)] * sum(crops[1:])
        images = [torch.stack(_images(channels, size)) for size in sizes]
    elif kind in _MULTI_VIEW:
        images = [images, images.flip(3)]
    classes = _num_classes(model)
    several = type_name(model.get('head')).startswith(('MultiLabel', 'CSRA'))
    samples = []
    for i in range(_BATCH):
        sample = DataSample()
        if several:
            sample.set_gt_score(torch.rand(classes).round())
        else:
            sample.set_gt_label(i % classes)
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)
