"""Fit the neck and the heads of an mmdet detector to a new backbone."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .archs import Arch
from .fields import DICT, INT, INT_OR_INTS, INTS, MAYBE_DICT, PARTS, take
from .probe import Probe
from .report import Report, SwapRefused, short, type_name

# Detectors that were designed as one with their backbone, by its type.
_OWN_BACKBONES = dict(
    SSDVGG="SSD's extra levels and L2 norm go on from VGG's own layers",
    CSPDarknet='YOLO scales backbone, neck and recipe as one',
    YOLOv8CSPDarknet='YOLO scales backbone, neck and recipe as one',
    Darknet='YOLOv3 is Darknet: neck and head repeat its layers',
    HourglassNet='CornerNet reads the two stages of an hourglass, stride 4',
    TridentResNet="TridentNet's branches of dilation are in its backbone",
    DetectoRS_ResNet='DetectoRS feeds its neck back into its backbone',
    DetectoRS_ResNeXt='DetectoRS feeds its neck back into its backbone')
_LANGUAGE = ('language_model', 'text_encoder', 'text_backbone')
# Necks that need all four maps, whatever start_level says.
_INPUTS_BY_NUMBER = ('NASFCOS_FPN', )
# The neck that makes a pyramid of one stride is mmseg's.
PYRAMID_NECK = 'Feature2Pyramid'


def refuse_detector(model: dict[str, Any], backbone: dict[str, Any],
                    key: str) -> None:
    """Raise SwapRefused where the backbone is part of the method."""
    kind = type_name(backbone)
    if kind in _OWN_BACKBONES:
        raise SwapRefused('a detector built around its own backbone',
                          f'{key}.backbone is {kind}: {_OWN_BACKBONES[kind]}')
    if any(name in model for name in _LANGUAGE):
        raise SwapRefused(
            'a multimodal model',
            f'{key} aligns its backbone with a language model by a training '
            'that a swap would undo')
    if _first_neck(model).get('rfp_backbone'):
        raise SwapRefused('a detector built around its own backbone',
                          f'{key}.neck holds a second copy of the backbone')
    roi_head = take(model, 'roi_head', MAYBE_DICT, key, None)
    shared = (roi_head or {}).get('shared_head')
    if isinstance(shared, dict):
        raise SwapRefused(
            "a stage of the backbone in the RoI head ('C4')",
            f'{key}.roi_head.shared_head ({type_name(shared)}) is the last '
            'stage of the old backbone; take the FPN config of the detector')


def fit_detector(model: dict[str, Any], old: Probe, arch: Arch, key: str,
                 report: Report) -> dict[str, Any]:
    """Choose the maps by stride and set the widths of neck or heads.

    Args:
        model (dict): The detector's config, changed in place.
        old (Probe): What the old backbone gives.
        arch (Arch): The new one.
        key (str): Dotted key of the detector.
        report (Report): Takes the lines.

    Returns:
        dict: Options of the new backbone.

    Raises:
        SwapRefused: The maps that are read cannot be had.
    """
    take(model, 'neck', PARTS, key, None)
    first = _first_neck(model)
    if 'in_channels' not in first:
        return _fit_heads(model, old, arch, key, report)
    listed = first is not model['neck']
    neck_key = f'{key}.neck.0' if listed else f'{key}.neck'
    levels, flipped = _levels(first, old, neck_key)
    strides = [old.maps[i].stride for i in levels]
    if arch.plain:
        indices, channels = _plain(model, arch, strides, key, report)
    else:
        indices = arch.stages(strides)
        channels = [arch.channels[i] for i in indices]
    report.change(
        f'{key}.backbone.out_indices', f'{indices}, strides {strides}',
        f'{neck_key} ({type_name(first)}) reads these strides')
    _set_neck(first, channels[::-1] if flipped else channels, neck_key,
              report)
    if type_name(first) == 'SSDNeck':
        _fit_ssd(model, first, channels, key, report)
    return dict(out_indices=indices)


def _first_neck(model: dict[str, Any]) -> dict[str, Any]:
    """The neck that reads the backbone; an empty dict if there is none."""
    neck = model.get('neck')
    first = neck[0] if isinstance(neck, (list, tuple)) and neck else neck
    return first if isinstance(first, dict) else {}


def _levels(neck: dict[str, Any], old: Probe,
            key: str) -> tuple[list[int], bool]:
    """The old maps that a neck reads, shallow first.

    Returns:
        tuple[list[int], bool]: Their indices, and whether the neck names
        their channels deep first, as YOLOv3's does.
    """
    channels = take(neck, 'in_channels', INT_OR_INTS, key)
    total = len(old.maps)
    if isinstance(channels, int):
        return [total - 1], False  # such necks read the last map
    count = len(channels)
    flipped = False
    for start in range(total - count + 1):
        found = old.channels[start:start + count]
        flipped = list(found) == list(channels)[::-1] and count > 1 and (
            list(found) != list(channels))
        if list(found) == list(channels) or flipped:
            break
    else:
        raise SwapRefused(
            'the config does not fit its own backbone',
            f'{key}.in_channels={channels}, but the old backbone gives '
            f'{list(old.channels)}')
    first, last = _read_range(neck, count, key)
    return list(range(start + first, start + last)), flipped


def _read_range(neck: dict[str, Any], count: int,
                key: str) -> tuple[int, int]:
    """The part of its inputs that an FPN-like neck reads."""
    first = take(neck, 'start_level', INT, key, 0)
    end = take(neck, 'end_level', INT, key, -1)
    if type_name(neck) in _INPUTS_BY_NUMBER:
        return 0, count
    last = count if end == -1 else end + 1
    if not 0 <= first < last <= count:
        raise SwapRefused(
            'the config does not fit its own backbone',
            f'{key} has start_level={first} and end_level={end}, which leaves '
            f'none of its {count} inputs, or is outside of them')
    return first, last


def _set_neck(neck: dict[str, Any], channels: Sequence[int], key: str,
              report: Report) -> None:
    old = neck['in_channels']
    neck['in_channels'] = (channels[0] if isinstance(old, int)
                           else type(old)(channels))
    report.change(f'{key}.in_channels', f'{neck["in_channels"]} for {old}',
                  'the channels of the new maps')
    first = take(neck, 'start_level', INT, key, 0)
    if first and type_name(neck) in _INPUTS_BY_NUMBER:
        report.leave(f'{key}.start_level', f'{first}, kept: {type_name(neck)} '
                     'knows its inputs by their numbers. The norms of the '
                     'maps before get no gradient, so distributed training '
                     'needs find_unused_parameters=True')
    elif first:
        neck['start_level'] = 0
        report.change(f'{key}.start_level', f'0 for {first}',
                      'the backbone no longer makes maps that nobody reads: '
                      'their norms would get no gradient, which stops '
                      'distributed training')
    end = take(neck, 'end_level', INT, key, -1)
    if end >= 0:
        neck['end_level'] = -1
        report.change(f'{key}.end_level', f'-1 for {end}',
                      'the same maps, counted from the new first one')


def _plain(model: dict[str, Any], arch: Arch, strides: Sequence[int],
           key: str, report: Report) -> tuple[tuple[int, ...], list[int]]:
    """Maps of one stride, with a neck before the neck where more are read."""
    indices = arch.blocks(len(strides))
    channels = [arch.channels[0]] * len(strides)
    rescales = pyramid_rescales(arch, strides)
    if rescales is None:
        return indices, channels
    if find_spec('mmseg') is None:
        raise SwapRefused(
            'a pyramid from a plain backbone needs mmseg',
            f'{key}.neck reads strides {list(strides)}, {arch.title} has '
            f'{arch.strides[0]}; install mmsegmentation, whose '
            f'{PYRAMID_NECK} makes them, or take rp_swin_*, rp_pvt_* or '
            'rp_cswin_*')
    pyramid = dict(type=f'mmseg.{PYRAMID_NECK}', embed_dim=arch.channels[0],
                   rescales=rescales,
                   norm_cfg=dict(type='SyncBN', requires_grad=True))
    neck = model['neck']
    model['neck'] = [pyramid, *(neck if isinstance(neck, (list, tuple))
                                else [neck])]
    report.change(f'{key}.neck', f"mmseg's {PYRAMID_NECK} before it",
                  f'the neck reads strides {list(strides)}, {arch.title} has '
                  f'{arch.strides[0]}')
    return indices, channels


def pyramid_rescales(arch: Arch,
                     strides: Sequence[int]) -> list[float] | None:
    """What mmseg's Feature2Pyramid needs to make strides of a plain backbone.

    Returns:
        list[float] | None: ``rescales``; None if no neck is needed.

    Raises:
        SwapRefused: Strides that it cannot make.
    """
    own = arch.strides[0]
    if set(strides) == {own}:
        return None
    rescales = [own / stride for stride in strides]
    if rescales not in ([4, 2, 1, 0.5][:len(rescales)],
                        [2, 1, 0.5, 0.25][:len(rescales)]):
        raise SwapRefused(
            'odd stride',
            f'maps of strides {list(strides)} are read, {arch.title} has '
            f'{own}, and {PYRAMID_NECK} makes 4, 8, 16, 32 or 8, 16, 32, 64 '
            'from the first on')
    return [int(r) if r >= 1 else r for r in rescales]


def _fit_ssd(model: dict[str, Any], neck: dict[str, Any],
             channels: Sequence[int], key: str, report: Report) -> None:
    """SSD's neck hands the backbone's maps on, so heads see their widths."""
    head = take(model, 'bbox_head', DICT, key)
    for part, field, node in (('neck', 'out_channels', neck),
                              ('bbox_head', 'in_channels', head)):
        name = f'{part}.{field}'
        old = take(node, field, INTS, f'{key}.{part}')
        node[field] = type(old)([*channels, *old[len(channels):]])
        report.change(f'{key}.{name}', f'{node[field]} for {old}',
                      "SSD's neck hands on the backbone's maps")


def _fit_heads(model: dict[str, Any], old: Probe, arch: Arch, key: str,
               report: Report) -> dict[str, Any]:
    """Heads that read the backbone itself: MaskFormer, DC5, ReID."""
    pooled = type_name(model.get('neck'))
    if pooled == 'GlobalAveragePooling':
        levels = [len(old.maps) - 1]
        # What the pooling averages may have any stride.
        indices = (len(arch.strides) - 1, )
    else:
        levels = _levels_of_heads(model, old, key)
        strides = [old.maps[i].stride for i in levels]
        if arch.plain and len(levels) == 1 and strides[0] == arch.strides[0]:
            indices = arch.blocks(1)
        elif arch.plain:
            raise SwapRefused(
                'heads that read a pyramid, without a neck',
                f'{key} reads strides {strides}, {arch.title} has '
                f'{arch.strides[0]}; take rp_swin_*, rp_pvt_* or rp_cswin_*')
        else:
            indices = arch.stages(strides)
    report.change(
        f'{key}.backbone.out_indices',
        f'{indices}, strides {[arch.strides[i] for i in indices]}',
        "the maps of the old backbone's strides that are read")
    new = dict(zip([old.channels[i] for i in levels],
                   [arch.channels[i] for i in indices], strict=True))
    for name in [n for n in model if n == 'head' or n.endswith('_head')]:
        _set_widths(model[name], new, f'{key}.{name}', report)
    return dict(out_indices=indices)


def _levels_of_heads(model: dict[str, Any], old: Probe,
                     key: str) -> list[int]:
    """Heads without a neck read a list of all maps, or the last one."""
    for name, head in model.items():
        channels = head.get('in_channels') if isinstance(head, dict) else None
        if isinstance(channels, (list, tuple)):
            if list(channels) != list(old.channels):
                raise SwapRefused(
                    'the config does not fit its own backbone',
                    f'{key}.{name}.in_channels={channels}, but the old '
                    f'backbone gives {list(old.channels)}')
            return list(range(len(old.maps)))
    return [len(old.maps) - 1]


def _set_widths(node: Any, new: dict[int, int], key: str,
                report: Report) -> None:
    """Replace the old maps' widths wherever a head states them."""
    if isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            _set_widths(child, new, f'{key}.{i}', report)
    if not isinstance(node, dict):
        return
    extracts = 'featmap_strides' in node
    for name in ('in_channels', *(('out_channels', ) if extracts else ())):
        old = node.get(name)
        if isinstance(old, (list, tuple)) and all(
                isinstance(c, int) and c in new for c in old):
            node[name] = type(old)([new[c] for c in old])
        elif isinstance(old, int) and old in new:
            node[name] = new[old]
        else:
            continue
        report.change(f'{key}.{name}', f'{node[name]} for {short(old)}',
                      'the channels of the new maps')
    for name, child in node.items():
        if isinstance(child, (dict, list, tuple)):
            _set_widths(child, new, f'{key}.{name}', report)
