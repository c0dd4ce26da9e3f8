"""Fit the neck and the head of an mmpretrain model to a new backbone."""

from collections.abc import Iterator
from typing import Any

from .archs import Arch
from .fields import DICT, PARTS, take
from .report import Report, SwapRefused, short, type_name

# Contrastive and other methods that read a backbone's features.
_FEATURE_MODELS = ('ImageClassifier', 'BYOL', 'SimCLR', 'SimSiam', 'MoCo',
                   'MoCoV3', 'BarlowTwins', 'SwAV', 'DenseCL')
_SPECIAL_BACKBONES = dict(
    LoRAModel='LoRA trains small additions to the frozen weights of its own '
    'backbone',
    ViTSAM="it is an image encoder's definition for SAM's weights")
_POOLING = ('GlobalAveragePooling', 'GeneralizedMeanPooling')
# Heads that need outputs of the backbone they were written for.
_PLAIN_HEADS = dict(ClsHead='LinearClsHead', DeiTClsHead='LinearClsHead',
                    ConformerHead='LinearClsHead',
                    EfficientFormerClsHead='LinearClsHead',
                    LeViTClsHead='LinearClsHead',
                    MultiLabelClsHead='MultiLabelLinearClsHead')
# What LinearClsHead takes of their arguments.
_HEAD_ARGUMENTS = ('num_classes', 'loss', 'topk', 'cal_acc', 'thr',
                   'init_cfg')


def refuse_classifier(model: dict[str, Any], backbone: dict[str, Any],
                      key: str) -> None:
    """Raise SwapRefused where the backbone is part of the method."""
    kind = type_name(model)
    if kind not in _FEATURE_MODELS:
        raise SwapRefused(
            'a pretext task inside the backbone',
            f'{key}.type is {kind}, whose {type_name(backbone)} takes part '
            'in it (masks, targets or its own decoder)')
    special = _SPECIAL_BACKBONES.get(type_name(backbone))
    if special:
        raise SwapRefused('a backbone that is the purpose of its config',
                          f'{key}.backbone: {special}')
    if not model.get('head'):
        raise SwapRefused(
            'nothing to train',
            f'{key}.head is None: the config gives features of its own '
            "backbone's weights")


def fit_classifier(model: dict[str, Any], backbone: dict[str, Any],
                   arch: Arch, key: str, report: Report) -> dict[str, Any]:
    """Give the head one vector of the right width an image.

    Args:
        model (dict): The model's config, changed in place.
        backbone (dict): The old backbone's config.
        arch (Arch): The new one.
        key (str): Dotted key of the model.
        report (Report): Takes the lines.

    Returns:
        dict: Options of the new backbone.
    """
    necks = _as_list(take(model, 'neck', PARTS, key, None))
    take(model, 'head', DICT, key)
    fuse = any(type_name(neck) == 'HRFuseScales' for neck in necks)
    contrastive = type_name(model) != 'ImageClassifier'
    reads_map = contrastive or type_name(model['head']) == 'CSRAClsHead'
    if fuse and not arch.plain:
        indices = tuple(range(len(arch.channels)))
    else:
        indices = (len(arch.channels) - 1, )
    options: dict[str, Any] = dict(out_indices=indices)
    if arch.plain and not reads_map:
        options['out_type'] = 'cls_token'
    report.change(f'{key}.backbone.out_indices', str(indices),
                  'all stages for the neck that fuses them' if len(indices) > 1
                  else 'a classifier reads the last map')
    if not contrastive:
        _replace_head(model, backbone, key, report)
    necks = _fit_necks(necks, arch, options, reads_map, key, report)
    if contrastive and type_name(necks[0] if necks else None) == \
            'NonLinearNeck' and necks[0].get('with_avg_pool') is False:
        necks[0]['with_avg_pool'] = True
        report.change(f'{key}.neck.with_avg_pool', 'True',
                      'the old backbone gave vectors, the new one maps')
    _store(model, necks, key, report)
    # The first part that has parameters sets the width for those behind it.
    for part_key, part in _consumers(model, key):
        width = _width_field(part)
        if width is None:
            continue
        old = part.get(width)
        new = arch.channels[-1]
        if type_name(part) == 'HRFuseScales':
            part[width] = tuple(arch.channels)
        else:
            part[width] = new
        if part[width] != old:
            report.change(f'{part_key}.{width}',
                          f'{part[width]} for {short(old)}',
                          'the channels of the new maps')
        if width != 'input_features':
            break
    return options


def _fit_necks(necks: list[dict[str, Any]], arch: Arch,
               options: dict[str, Any], reads_map: bool, key: str,
               report: Report) -> list[dict[str, Any]]:
    """Pool where maps come, do not where vectors come."""
    if reads_map:
        return [n for n in necks if type_name(n) not in _POOLING] \
            if arch.plain and 'out_type' in options else necks
    if arch.plain:
        kept = [n for n in necks if type_name(n) not in (*_POOLING,
                                                         'HRFuseScales')]
        if len(kept) < len(necks):
            report.change(f'{key}.neck', 'pooling removed',
                          'the CLS token is the feature already')
        return kept
    pools = [neck for neck in necks if type_name(neck) in _POOLING]
    for neck in pools:
        if neck.get('dim', 2) != 2:
            del neck['dim']
            report.change(f'{key}.neck.dim', 'removed',
                          'the old backbone gave tokens, the new one maps')
    if pools:
        return necks
    report.change(f'{key}.neck', 'GlobalAveragePooling added',
                  'the old backbone gave vectors, the new one maps')
    return [dict(type='GlobalAveragePooling'), *necks]


def _replace_head(model: dict[str, Any], backbone: dict[str, Any], key: str,
                  report: Report) -> None:
    """A linear head for one that only its own backbone can feed."""
    head = model['head']
    kind = type_name(head)
    if kind not in _PLAIN_HEADS:
        return
    new = {name: head[name] for name in _HEAD_ARGUMENTS if name in head}
    new['type'] = _PLAIN_HEADS[kind]
    # VGG and others classify in the backbone, 1000 classes by default.
    new.setdefault('num_classes', backbone.get('num_classes', 1000))
    new['in_channels'] = head.get('in_channels')
    model['head'] = new
    report.change(f'{key}.head', f'{new["type"]} for {kind}',
                  f'{kind} needs outputs that {type_name(backbone)} alone '
                  'gives')


def _width_field(part: dict[str, Any]) -> str | None:
    """The argument that holds the width of a part's input."""
    if type_name(part) in _POOLING:
        return None
    return next((name for name in ('in_channels', 'input_features',
                                   'in_features') if name in part), None)


def _consumers(model: dict[str, Any],
               key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, config) of what features pass, in order."""
    neck = model.get('neck')
    listed = isinstance(neck, (list, tuple))
    for i, part in enumerate(_as_list(neck)):
        yield f'{key}.neck.{i}' if listed else f'{key}.neck', part
    yield f'{key}.head', model['head']


def _as_list(neck: Any) -> list[dict[str, Any]]:
    if neck is None:
        return []
    return list(neck) if isinstance(neck, (list, tuple)) else [neck]


def _store(model: dict[str, Any], necks: list[dict[str, Any]], key: str,
           report: Report) -> None:
    if not necks:
        model['neck'] = None
    elif len(necks) == 1 and not isinstance(model.get('neck'), (list, tuple)):
        model['neck'] = necks[0]
    else:
        model['neck'] = necks
