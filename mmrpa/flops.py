"""Counting multiply-adds without running anything.

The counters that MM hosts ship miss scaled_dot_product_attention; torch's own
misses it on the CPU. On the meta device, where no number is computed, torch's
counter sees every product, so all counts here are made there.
"""

from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .layers import (
    CrossShapedWindowAttention,
    DenseAttention,
    RPAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from .safe_loading import safe_reader

ATTENTIONS = (CrossShapedWindowAttention, DenseAttention, RPAttention,
              SpatialReductionAttention, WindowAttention)
PROJECTIONS = ('qkv', 'q', 'kv', 'proj')
# Height and width that each host's publications count at; mmseg's crops.
INPUT_SIZES = dict(mmpretrain=(224, 224), mmdet=(800, 1280), mmseg=(512, 512))
# Boxes for the RoI heads, mmdet's usual test settings, so that detectors with
# other settings stay comparable.
NUM_PROPOSALS = 1000
NUM_MASKS = 100


class Count(NamedTuple):
    """Parameters and multiply-adds (MACs; a MAC is two FLOPs)."""

    params: int
    macs: int


class BackboneCount(NamedTuple):
    """A backbone's :class:`Count`, and what its attention layers take of it.

    ``attention`` has the projections in it, ``mixing`` is the same without.
    """

    params: int
    macs: int
    attention: int
    mixing: int


def count_backbone(cfg: Mapping[str, Any], hw_shape: Tuple[int, int],
                   attention: Optional[str] = None) -> BackboneCount:
    """Count an RPAttention backbone for one image.

    Args:
        cfg (Mapping): The backbone's config, ``type='mmrpa.RP...'``.
        hw_shape (tuple[int, int]): Height and width of the image in pixels.
        attention (str, optional): Count the twin in which every stage has
            this attention instead.

    Returns:
        BackboneCount: Products of matrices and convolutions; norms, softmaxes
        and other element-wise work are not counted.
    """
    cfg = dict(cfg, init_cfg=None)
    if attention is not None:
        cfg['attention'] = attention
    with torch.device('meta'):
        backbone = MODELS.build(cfg).eval()
        images = torch.empty(1, backbone.in_channels, *hw_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(images)
    counts = counter.get_flop_counts()
    root = type(backbone).__name__

    def macs(name: str) -> int:
        return sum(counts.get(f'{root}.{name}', {}).values()) // 2

    attn = mixing = 0
    for name, module in backbone.named_modules():
        if isinstance(module, ATTENTIONS):
            attn += macs(name)
            mixing += macs(name) - sum(
                macs(f'{name}.{part}') for part in PROJECTIONS)
    return BackboneCount(
        _num_params(backbone),
        counter.get_total_flops() // 2, attn, mixing)


def count_twins(cfg: Mapping[str, Any],
                hw_shape: Tuple[int, int]) -> Dict[str, BackboneCount]:
    """Count the backbone as configured, and its dense and local twins.

    Returns:
        dict[str, BackboneCount]: By attention; the first key is
        ``'as configured'``.
    """
    own = MODELS.get(cfg['type']).own_attention
    counts = {'as configured': count_backbone(cfg, hw_shape)}
    for attention in dict.fromkeys((own, 'dense')):
        counts[attention] = count_backbone(cfg, hw_shape, attention)
    return counts


def count_model(cfg: Config, hw_shape: Tuple[int, int]) -> Count:
    """Count a whole classifier, segmentor or detector for one test image.

    Two-stage detectors are counted with ``NUM_PROPOSALS`` boxes and
    ``NUM_MASKS`` masks; pooling the regions takes no products.

    Args:
        cfg (Config): A config of mmpretrain, mmseg or mmdet.
        hw_shape (tuple[int, int]): Height and width of the image in pixels.

    Returns:
        Count: All parameters, those of training-only heads included, and the
        multiply-adds of inference.
    """
    init_default_scope(cfg.default_scope)
    # Some models load their teacher when built.
    with safe_reader(), torch.device('meta'):
        model = MODELS.build(cfg.model).eval()
        images = torch.empty(1, model.backbone.in_channels, *hw_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if hasattr(model, 'roi_head'):
            _run_two_stage(model, images)
        else:
            model(images, mode='tensor')
    return Count(_num_params(model), counter.get_total_flops() // 2)


def _run_two_stage(model: nn.Module, images: torch.Tensor) -> None:
    """A two-stage detector's products. Its own forward needs real boxes."""
    maps = model.extract_feat(images)
    model.rpn_head(maps)
    for kind, num_boxes in (('bbox', NUM_PROPOSALS), ('mask', NUM_MASKS)):
        heads = getattr(model.roi_head, f'{kind}_head', None)
        pools = getattr(model.roi_head, f'{kind}_roi_extractor', None)
        if heads is None:
            continue
        if not isinstance(heads, nn.ModuleList):  # a cascade has one a stage
            heads, pools = [heads], [pools]
        for head, pool in zip(heads, pools, strict=True):
            size = pool.roi_layers[0].output_size
            head(images.new_empty(num_boxes, pool.out_channels, *size))


def _num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
