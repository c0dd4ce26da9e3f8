"""Fit the heads of an mmseg segmentor to a new backbone."""

from collections.abc import Iterator, Sequence
from typing import Any

from .archs import Arch
from .detectors import PYRAMID_NECK, fit_detector, pyramid_rescales
from .fields import (
    INT,
    INT_OR_INTS,
    INTS,
    MAYBE_INT_OR_INTS,
    PARTS,
    SCALES,
    take,
)
from .probe import Probe
from .report import Report, SwapError, SwapRefused, short, type_name

# Networks whose branches, context paths and skips are in their backbone.
_OWN_BACKBONES = ('UNet', 'ICNet', 'BiSeNetV1', 'BiSeNetV2', 'CGNet', 'DDRNet',
                  'ERFNet', 'FastSCNN', 'PIDNet', 'STDCNet',
                  'STDCContextPathNet', 'VPD')
# Necks that do nothing but give a plain ViT's maps several strides.
_RESCALING_NECKS = ('Feature2Pyramid', 'MultiLevelNeck')
# Heads that want maps of falling resolution, and do not get them from a ViT
# or a dilated backbone.
_PYRAMID_HEADS = ('UPerHead', )


def refuse_segmentor(model: dict[str, Any], backbone: dict[str, Any],
                     key: str) -> None:
    """Raise SwapRefused where the backbone is part of the method."""
    kind = type_name(backbone)
    if kind in _OWN_BACKBONES:
        raise SwapRefused(
            'a segmentor built around its own backbone',
            f'{key}.backbone is {kind}, which holds what its heads are made '
            'for: branches, context paths or skips')
    if 'text_encoder' in model or 'Multimodal' in type_name(model):
        raise SwapRefused(
            'a multimodal model',
            f'{key} aligns its image encoder with a text encoder by a '
            'training that a swap would undo')


def fit_segmentor(model: dict[str, Any], old: Probe, arch: Arch, key: str,
                  report: Report) -> dict[str, Any]:
    """Choose the maps by stride and set the widths of neck or heads.

    Dilated backbones give deep maps of stride 8 or 16. A pyramid has those
    strides in shallow stages only, so a head that read such a map gets the
    stages from that stride down to the same depth, resized and concatenated
    (mmseg's ``resize_concat``); heads that read several dilated maps get the
    deep one from FastFCN's neck JPU, which was published for this.

    Args, Returns and Raises: see :func:`fit_detector`.
    """
    heads = list(_readers(model, key))
    for head_key, head in heads:
        take(head, 'in_channels', INT_OR_INTS, head_key)
        take(head, 'in_index', MAYBE_INT_OR_INTS, head_key, None)
    if not heads:
        raise SwapError(f'{key}.decode_head is missing: it must be a dict, or '
                        'a list of dicts')
    if any(m.with_token for m in old.maps) and any(
            'DPT' in type_name(head) for _, head in heads):
        raise SwapRefused('a head that reads CLS tokens',
                          f'{key}.decode_head is {type_name(heads[0][1])}; '
                          'RP backbones give maps only')
    neck = take(model, 'neck', PARTS, key, None)
    if isinstance(neck, dict) and type_name(neck) in _RESCALING_NECKS:
        return _fit_rescaled(model, neck, heads, old, arch, key, report)
    if isinstance(neck, dict):
        if type_name(neck) == 'JPU':
            for name, kind in (('in_channels', INTS), ('mid_channels', INT)):
                take(neck, name, kind, f'{key}.neck')
            take(neck, 'dilations', INTS, f'{key}.neck', None)
        options = fit_detector(model, old, arch, key, report)
        if type_name(neck) == 'JPU':
            _fit_behind_jpu(neck, heads, report)
        return options
    read = sorted({i for _, head in heads for i in _indices(head, old)})
    strides = [old.maps[i].stride for i in read]
    if arch.plain:
        return _fit_plain(model, heads, read, old, arch, key, report)
    if len(set(strides)) == len(strides) and not _is_dilated(old, read):
        indices = arch.stages(strides)
        where = dict(zip(read, range(len(read)), strict=True))
        widths = [arch.channels[i] for i in indices]
        _note_maps(indices, arch, key, report)
        for head_key, head in heads:
            _point(head, [where[i] for i in _indices(head, old)], widths,
                   head_key, report)
        return dict(out_indices=indices)
    if len(old.maps) == len(arch.strides) and any(
            type_name(head) in _PYRAMID_HEADS for _, head in heads):
        return _fit_pyramid(heads, old, arch, key, report)
    if len(set(old.strides)) == 1:
        return _fit_one_stride(heads, read, old, arch, key, report)
    if any(isinstance(head.get('in_index'), (list, tuple))
           for _, head in heads):
        return _fit_jpu(model, heads, old, arch, key, report)
    return _fit_concat(heads, old, arch, key, report)


def _readers(model: dict[str, Any],
             key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, config) of each head that reads maps.

    Later heads of a cascade read maps, too; PointRend's and the updating
    heads of K-Net read their forerunner alone.
    """
    for name in ('decode_head', 'auxiliary_head'):
        heads = take(model, name, PARTS, key, None)
        listed = isinstance(heads, (list, tuple))
        for i, head in enumerate(heads if listed else [heads]):
            if head is None:
                continue
            head_key = f'{key}.{name}.{i}' if listed else f'{key}.{name}'
            if isinstance(head.get('kernel_generate_head'), dict):
                head = head['kernel_generate_head']
                head_key += '.kernel_generate_head'
            yield head_key, head


def _indices(head: dict[str, Any], old: Probe) -> list[int]:
    """The maps that a head reads, as numbers from 0.

    Raises:
        SwapRefused: A map that the backbone does not give.
    """
    indices = _given(head, len(old.maps), 'the old backbone')
    if head.get('c1_in_channels') and 0 not in indices:
        indices.append(0)
    return indices


def _is_dilated(old: Probe, read: Sequence[int]) -> bool:
    """Whether deep maps have the stride of shallower ones."""
    strides = old.strides[:max(read) + 1]
    return len(set(strides)) < len(strides)


def _note_maps(indices: Sequence[int], arch: Arch, key: str,
               report: Report) -> None:
    report.change(f'{key}.backbone.out_indices',
                  f'{tuple(indices)}, strides '
                  f'{[arch.strides[i] for i in indices]}',
                  'the strides that the heads read')


def _point(head: dict[str, Any], where: Sequence[int],
           widths: Sequence[int], key: str, report: Report,
           concat: bool = False) -> None:
    """Let a head read the maps ``where`` of the given widths."""
    has_c1 = bool(head.get('c1_in_channels'))
    old = head['in_channels']
    if has_c1:
        head['c1_in_channels'] = widths[0]
        if isinstance(old, int):
            where = [i for i in where if i] or where
        report.change(f'{key}.c1_in_channels', str(widths[0]),
                      'the channels of the shallowest map')
    if isinstance(old, int) and len(where) == 1 and not concat:
        head['in_channels'] = widths[where[0]]
        head['in_index'] = where[0]
    else:
        kind = tuple if isinstance(old, int) else type(old)
        head['in_channels'] = kind(widths[i] for i in where)
        head['in_index'] = kind(where)
    if head.get('num_convs') == 0:
        # Without convolutions the head's own width is that of its input.
        width = head['in_channels']
        head['channels'] = width if isinstance(width, int) else sum(width)
        report.change(f'{key}.channels', str(head['channels']),
                      'num_convs=0 hands the maps on as they are')
    what = f'{short(head["in_channels"])} for {short(old)}'
    if concat:
        head['input_transform'] = 'resize_concat'
        report.change(
            f'{key}.in_channels', f"{what}, input_transform='resize_concat'",
            'it read a dilated, deep map; it gets the stages from that stride '
            'to that depth, resized and concatenated')
    elif head['in_channels'] != old:
        report.change(f'{key}.in_channels', what,
                      f'the channels of map {short(head["in_index"])}')


def _fit_concat(heads: list[tuple[str, dict[str, Any]]], old: Probe,
                arch: Arch, key: str, report: Report) -> dict[str, Any]:
    """Dilated maps, one a head: resize and concatenate stages."""
    wanted = {}
    for head_key, head in heads:
        deep = max(_indices(head, old))
        first, = arch.stages([old.maps[deep].stride])
        # The old backbone's stages count as the pyramid's do.
        last = min(deep + len(arch.strides) - len(old.maps),
                   len(arch.strides) - 1)
        stages = list(range(first, max(first, last) + 1))
        wanted[head_key] = stages
    used = sorted({i for stages in wanted.values() for i in stages}
                  | ({0} if any(h.get('c1_in_channels') for _, h in heads)
                     else set()))
    widths = [arch.channels[i] for i in used]
    _note_maps(used, arch, key, report)
    for head_key, head in heads:
        where = [used.index(i) for i in wanted[head_key]]
        _point(head, where, widths, head_key, report, concat=len(where) > 1)
    return dict(out_indices=tuple(used))


def _fit_jpu(model: dict[str, Any], heads: list[tuple[str, dict[str, Any]]],
             old: Probe, arch: Arch, key: str,
             report: Report) -> dict[str, Any]:
    """Several dilated maps a head: the deep one comes from a JPU."""
    deep = len(old.maps) - 1
    first, = arch.stages([old.maps[deep].stride])
    if any(0 in _indices(head, old) for _, head in heads) and first > 0:
        raise SwapRefused(
            'a dilated backbone read at all depths',
            f'{key}.decode_head reads strides {list(old.strides)}; take the '
            'config of a backbone without dilation')
    stages = tuple(range(first, len(arch.strides)))
    wide = max(c for _, head in heads for c in (
        [head['in_channels']] if isinstance(head['in_channels'], int)
        else head['in_channels']))
    middle = max(wide // 4, 1)
    norm = next((head['norm_cfg'] for _, head in heads
                 if head.get('norm_cfg')), dict(type='BN'))
    model['neck'] = dict(
        type='JPU', in_channels=tuple(arch.channels[i] for i in stages),
        mid_channels=middle, start_level=0, end_level=-1,
        dilations=(1, 2, 4, 8), align_corners=False, norm_cfg=norm)
    _note_maps(stages, arch, key, report)
    report.change(f'{key}.neck', f'JPU with mid_channels={middle}',
                  "heads read deep maps of the old backbone's dilated stride "
                  f'{old.maps[deep].stride}; FastFCN makes such a map of a '
                  'backbone without dilation')
    widths = _jpu_widths(model['neck'])
    for head_key, head in heads:
        where = []
        for i in _indices(head, old):
            stage = i + len(arch.strides) - len(old.maps)
            where.append(len(stages) - 1 if i == deep
                         else max(stage - first, 0))
        _point(head, where, widths, head_key, report)
    return dict(out_indices=stages)


def _jpu_widths(neck: dict[str, Any]) -> list[int]:
    """JPU hands on all of its inputs but the last, then the joint map."""
    inputs = neck['in_channels'][neck.get('start_level', 0):]
    joint = len(neck.get('dilations', (1, 2, 4, 8))) * neck['mid_channels']
    return [*inputs[:-1], joint]


def _fit_behind_jpu(neck: dict[str, Any],
                    heads: list[tuple[str, dict[str, Any]]],
                    report: Report) -> None:
    """Heads that read what a JPU hands on, or its joint map."""
    widths = _jpu_widths(neck)
    for head_key, head in heads:
        _point(head, _given(head, len(widths)), widths, head_key, report)


def _fit_pyramid(heads: list[tuple[str, dict[str, Any]]], old: Probe,
                 arch: Arch, key: str, report: Report) -> dict[str, Any]:
    """Heads made for a pyramid, on a backbone that gave none: give it."""
    indices = tuple(range(len(arch.strides)))
    report.change(
        f'{key}.backbone.out_indices',
        f'{indices}, strides {list(arch.strides)}',
        'the decode head is made for a pyramid, which the old backbone, with '
        f'strides {list(old.strides)}, did not have')
    for head_key, head in heads:
        _point(head, _indices(head, old), arch.channels, head_key, report)
    return dict(out_indices=indices)


def _fit_one_stride(heads: list[tuple[str, dict[str, Any]]],
                    read: Sequence[int], old: Probe, arch: Arch, key: str,
                    report: Report) -> dict[str, Any]:
    """A plain ViT read without a neck, and a pyramid in its place."""
    if len(read) > 1:
        raise SwapRefused(
            'several maps of one stride',
            f'heads read {len(read)} maps of stride {old.maps[0].stride}; a '
            'pyramid has one of each; rp_deit_* has one map a block')
    first, = arch.stages([old.maps[read[0]].stride])
    stages = list(range(first, len(arch.strides)))
    _note_maps(stages, arch, key, report)
    for head_key, head in heads:
        _point(head, range(len(stages)), [arch.channels[i] for i in stages],
               head_key, report, concat=len(stages) > 1)
    return dict(out_indices=tuple(stages))


def _fit_rescaled(model: dict[str, Any], neck: dict[str, Any],
                  heads: list[tuple[str, dict[str, Any]]], old: Probe,
                  arch: Arch, key: str, report: Report) -> dict[str, Any]:
    """A plain ViT whose neck makes a pyramid of its maps."""
    rescaling = type_name(neck) == PYRAMID_NECK
    scales = take(neck, 'rescales' if rescaling else 'scales', SCALES,
                  f'{key}.neck',
                  [4, 2, 1, 0.5] if rescaling else [0.5, 1, 2, 4])
    if len(scales) != len(old.maps):
        raise SwapRefused(
            'the config does not fit its own backbone',
            f'{key}.neck makes {len(scales)} maps, and the old backbone gives '
            f'{len(old.maps)}')
    if arch.plain:
        indices = arch.blocks(len(old.maps))
        width = arch.channels[0]
        if rescaling:
            neck['embed_dim'] = width
            report.change(f'{key}.neck.embed_dim', str(width),
                          'the channels of the new maps')
            widths = [width] * len(scales)
            for head_key, head in heads:
                _point(head, _given(head, len(scales)), widths, head_key,
                       report)
        else:
            kind = type(take(neck, 'in_channels', INTS, f'{key}.neck'))
            neck['in_channels'] = kind([width] * len(indices))
            report.change(f'{key}.neck.in_channels', str(neck['in_channels']),
                          'the channels of the new maps')
        _note_maps(indices, arch, key, report)
        return dict(out_indices=indices)
    strides = [round(m.stride / scale) for m, scale in
               zip(old.maps, scales, strict=True)]
    indices = arch.stages(strides)
    del model['neck']
    report.change(f'{key}.neck', f'{type_name(neck)} removed',
                  f'it made strides {strides} of one, and the new backbone '
                  'has them')
    _note_maps(indices, arch, key, report)
    widths = [arch.channels[i] for i in indices]
    for head_key, head in heads:
        _point(head, _given(head, len(widths)), widths, head_key, report)
    return dict(out_indices=indices)


def _given(head: dict[str, Any], total: int,
           source: str = 'the neck') -> list[int]:
    """The maps that a head reads, of ``total`` that it is given.

    Raises:
        SwapRefused: One that is not among them.
    """
    index = head.get('in_index')
    if index is None:
        many = not isinstance(head['in_channels'], int)
        index = range(len(head['in_channels'])) if many else -1
    indices = [index] if isinstance(index, int) else list(index)
    if any(not -total <= i < total for i in indices):
        raise SwapRefused(
            'the config does not fit its own backbone',
            f'a {type_name(head)} reads the maps {indices}, and {source} '
            f'gives {total}')
    return [i % total for i in indices]


def _fit_plain(model: dict[str, Any], heads: list[tuple[str, dict[str, Any]]],
               read: Sequence[int], old: Probe, arch: Arch, key: str,
               report: Report) -> dict[str, Any]:
    """One stride in the place of a pyramid, of dilated or of plain maps."""
    width = arch.channels[0]
    indices = arch.blocks(len(read))
    where = dict(zip(read, range(len(read)), strict=True))
    wanted = [old.maps[i].stride for i in read]
    if set(wanted) != {arch.strides[0]}:
        # Maps that a dilated backbone has twice are made once, from the
        # deepest block that would give them.
        strides = sorted(set(wanted))
        rescales = pyramid_rescales(arch, strides)
        indices = arch.blocks(len(strides))
        where = {i: strides.index(old.maps[i].stride) for i in read}
        if rescales is not None:
            model['neck'] = dict(
                type=PYRAMID_NECK, embed_dim=width, rescales=rescales,
                norm_cfg=dict(type='SyncBN', requires_grad=True))
            report.change(f'{key}.neck', PYRAMID_NECK,
                          f'heads read strides {strides}, {arch.title} has '
                          f'{arch.strides[0]}')
    report.change(f'{key}.backbone.out_indices', f'{indices}',
                  'blocks, evenly spaced')
    widths = [width] * len(indices)
    for head_key, head in heads:
        _point(head, [where[i] for i in _indices(head, old)], widths,
               head_key, report)
    return dict(out_indices=indices)
