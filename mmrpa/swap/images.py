"""The normalisation of images that a swapped backbone's weights expect."""

from typing import Any

from .fields import walk
from .report import Report, short, type_name

MEAN = [123.675, 116.28, 103.53]  # red, green, blue, of ImageNet
STD = [58.395, 57.12, 57.375]
_ORDER = ('bgr_to_rgb', 'to_rgb')


def use_imagenet_rgb(cfg: dict[str, Any], report: Report) -> None:
    """Write ImageNet's RGB statistics where caffe-style ones stand.

    Caffe-style is blue, green, red in this order, or no division by the
    standard deviation. Other statistics (a data set's own, CLIP's, Inception's
    0.5) are left and named. So are images of other than three channels.

    Args:
        cfg (dict): The whole config, changed in place.
        report (Report): Takes the lines.
    """
    # The config itself may have variables of these names.
    found = [(key, node) for key, node in walk(cfg)
             if key and _is_normalisation(node)]
    if not found:
        report.leave('model.data_preprocessor', 'images are not normalised; '
                     'weights pretrained on ImageNet want '
                     f'mean={MEAN}, std={STD}, in RGB')
    for key, node in found:
        mean, std = list(node['mean']), list(node['std'])
        if len(mean) != 3 or len(std) != 3:
            report.leave(key, f'mean={short(mean)}: not three channels')
            continue
        order = next((name for name in _ORDER if name in node), None)
        if order is None:
            order = _order_key(node)
        in_rgb = bool(node.get(order, type_name(node).endswith('Normalize')))
        if _same(mean, MEAN) and _same(std, STD) and in_rgb:
            continue
        caffe = not in_rgb or all(value == 1 for value in std)
        if not caffe:
            report.leave(key, f'mean={short(mean)}, std={short(std)} are not '
                         "ImageNet's; weights pretrained on ImageNet want "
                         f'mean={MEAN}, std={STD}')
            continue
        node.update({'mean': list(MEAN), 'std': list(STD), order: True})
        if 'rgb_to_bgr' in node:
            node['rgb_to_bgr'] = False
        report.change(
            key, f"ImageNet's mean and std, in RGB, for mean={short(mean)}, "
            f'std={short(std)}, {order}={in_rgb}',
            'caffe-style images do not fit weights trained on RGB')
        _follow(cfg, mean, report)


def _follow(cfg: dict[str, Any], old_mean: list, report: Report) -> None:
    """Let transforms that fill with the mean (Expand) fill with the new."""
    for key, node in walk(cfg):
        if not key or 'std' in node or 'to_rgb' not in node or (
                not _are_numbers(node.get('mean'))):
            continue
        if _same(list(node['mean']), old_mean) and not node['to_rgb']:
            node.update(mean=list(MEAN), to_rgb=True)
            report.change(key, 'fills with the new mean',
                          'it filled with the old one')


def _is_normalisation(node: dict[str, Any]) -> bool:
    kind = type_name(node)
    if kind and not ('rocessor' in kind or kind.endswith('Normalize')):
        return False
    return _are_numbers(node.get('mean')) and _are_numbers(node.get('std'))


def _are_numbers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) for value in values)


def _order_key(node: dict[str, Any]) -> str:
    """The argument with which this class turns the channels around."""
    kind = type_name(node)
    if kind.startswith(('Det', 'Seg', 'Track', 'Img', 'BoxInst', 'LineDet')):
        return 'bgr_to_rgb'
    return 'to_rgb'


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) < 0.05 for x, y in zip(a, b, strict=True))
