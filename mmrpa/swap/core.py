"""Put an RP backbone where another one stands in a config."""

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config

from .archs import Arch, parse_arch
from .classifiers import fit_classifier, refuse_classifier
from .detectors import fit_detector, refuse_detector
from .images import use_imagenet_rgb
from .leftovers import describe_old, drop_leftovers
from .optimiser import RECIPES, use_adamw
from .probe import parameter_names, probe_backbone
from .report import Report, SwapError, SwapRefused, type_name
from .segmentors import fit_segmentor, refuse_segmentor

HOSTS = tuple(RECIPES)
_TRACKERS = ('DeepSORT', 'SORT', 'StrongSORT')  # they have no loss


def swap_backbone(cfg: Config | Mapping[str, Any], arch: str,
                  report: Callable[[str], None] | None = print) -> Config:
    """Replace the backbone of a host's config by an RPAttention backbone.

    Neck and heads get the maps of the strides that they read, and their
    widths; images get ImageNet's normalisation in RGB where a caffe-style one
    stands; the optimiser becomes AdamW, with the schedule kept; checkpoints
    and settings of the old backbone go. docs/swap.md says what and why.

    Args:
        cfg (Config | Mapping): A config of mmdet, mmsegmentation or
            mmpretrain, as ``Config.fromfile`` gives it. It is not changed.
        arch (str): One of :data:`mmrpa.swap.NAMES`, such as
            ``'rp_swin_tiny'``.
        report (callable, optional): Takes each line on what was changed and
            what was left. None says nothing.

    Returns:
        Config: Complete, without bases.

    Raises:
        SwapError: The arch is unknown, the config has no backbone or no host,
            or its backbone cannot be run.
        SwapRefused: The swap makes no sense for this config (a SwapError,
            which is a ValueError).

    Examples:
        >>> import mmrpa  # doctest: +SKIP
        >>> cfg = Config.fromfile('mask-rcnn_r50_fpn_1x_coco.py')
        >>> cfg = mmrpa.swap_backbone(cfg, 'rp_swin_tiny')
    """
    swapped, told = swap(cfg, arch)
    for line in told.lines() if report is not None else ():
        report(line)
    return swapped


def swap(cfg: Config | Mapping[str, Any],
         arch: str) -> tuple[Config, Report]:
    """As :func:`swap_backbone`, with the lines as a :class:`Report`."""
    new = parse_arch(arch)
    values, filename = _plain_values(cfg)
    model, key = _find_model(values)
    host = _host(values)
    old_cfg = model['backbone']
    told = Report()
    kind = type_name(old_cfg)
    if str(old_cfg['type']).startswith('mmrpa.'):
        told.leave(f'{key}.backbone', f'it was {old_cfg["type"]} already; its '
                   'own options are not kept')
    fit_host = host
    # mmpretrain's transfer benchmarks are mmdet's detectors.
    prefix = str(model.get('type', '')).rpartition('.')[0].split('.')[0]
    if prefix in HOSTS:
        fit_host = prefix
    if fit_host == 'mmpretrain':
        refuse_classifier(model, old_cfg, key)
        options = fit_classifier(model, old_cfg, new, key, told)
        names = _names(old_cfg, host, key)
    else:
        refuse, fit = ((refuse_detector, fit_detector)
                       if fit_host == 'mmdet' else
                       (refuse_segmentor, fit_segmentor))
        refuse(model, old_cfg, key)
        probe = probe_backbone(old_cfg, host, f'{key}.backbone')
        if not probe.maps or None in probe.strides:
            raise SwapRefused('no maps', f'{key}.backbone gives vectors, or '
                              'nothing')
        options = fit(model, probe, new, key, told)
        names = probe.parameters
    model['backbone'] = _new_backbone(old_cfg, options, new, fit_host, values,
                                      key, told)
    told.changed.insert(0, (
        f'{key}.backbone', f'{new.title} for {kind}',
        f'replaced whole; gone: {describe_old(old_cfg)}'))
    use_imagenet_rgb(values, told)
    use_adamw(values, host, filename, names, told)
    drop_leftovers(values, old_cfg, told)
    told.leave(f'{key}.backbone', 'without init_cfg it starts from random '
               'weights, which short schedules are too short for')
    return Config(values, filename=filename), told


def _plain_values(
        cfg: Config | Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A config's values as dicts that may be changed, and its file."""
    if isinstance(cfg, Config):
        return cfg.to_dict(), cfg.filename
    if not isinstance(cfg, Mapping):
        raise SwapError(f'cfg must be a Config or a dict, got '
                        f'{type(cfg).__name__}; Config.fromfile reads a file')
    try:
        return Config(copy.deepcopy(dict(cfg))).to_dict(), None
    except KeyError as error:
        # mmengine keeps a few names for itself.
        raise SwapError(f'cfg: {error.args[0]}; rename it') from error


def _host(values: Mapping[str, Any]) -> str:
    scope = values.get('default_scope')
    if scope is None:
        raise SwapRefused(
            'no default_scope', 'the config does not say which host it is '
            f'for; add default_scope = {" or ".join(map(repr, HOSTS))}')
    if scope not in HOSTS:
        raise SwapError(f'default_scope={scope!r} names no host: it must be '
                        f'one of {", ".join(map(repr, HOSTS))}')
    if find_spec(scope) is None:
        raise SwapError(f'the config has default_scope={scope!r}, but {scope} '
                        'is not installed')
    return scope


def _find_model(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The model with the backbone, and its dotted key.

    Semi-supervised methods and trackers hold a detector; that is the one.

    Raises:
        SwapRefused: There is none.
    """
    model = values.get('model')
    if not isinstance(model, dict):
        raise SwapRefused('no model', 'the config has no model: it is a part '
                          'of one, or data and schedule alone')
    if type_name(model) in _TRACKERS:
        raise SwapRefused(
            'nothing to train',
            f'{type_name(model)} tracks with a detector that another config '
            'trains; swap that one')
    for node, key in ((model, 'model'),
                      (model.get('detector'), 'model.detector')):
        backbone = node.get('backbone') if isinstance(node, dict) else None
        if isinstance(backbone, dict) and backbone.get('type'):
            return node, key
    raise SwapRefused(
        'no backbone',
        f'{type_name(model) or "the model"} has neither model.backbone nor '
        'model.detector.backbone with a type')


def _names(backbone: Mapping[str, Any], host: str,
           key: str) -> tuple[str, ...]:
    """Parameters of the old backbone; none if it cannot be built here."""
    try:
        return parameter_names(backbone, host, f'{key}.backbone')
    except SwapError:
        return ()  # a classifier's swap does not depend on it


def _new_backbone(old: Mapping[str, Any], options: Mapping[str, Any],
                  arch: Arch, host: str, values: Mapping[str, Any], key: str,
                  told: Report) -> dict[str, Any]:
    """The new backbone's config."""
    extra = dict(options)
    channels = old.get('in_channels', 3)
    if isinstance(channels, int) and channels != 3:
        extra['in_channels'] = channels
        told.leave(f'{key}.backbone.in_channels', f'{channels}, kept')
    if old.get('with_cp'):
        extra['with_cp'] = True
        told.leave(f'{key}.backbone.with_cp', 'True, kept')
    side = _image_side(values, host)
    if side and arch.family in ('pvt', 'deit'):
        extra['img_size'] = side
    if host == 'mmpretrain' and side and side < 64:
        told.leave('train_dataloader', f'images of {side} x {side}: the last '
                   f'map, of stride {arch.strides[-1]}, has '
                   f'{max(1, -(-side // arch.strides[-1]))} cells a side; '
                   'larger images would use the backbone better')
    return arch.config(host, **extra)


def _image_side(values: Mapping[str, Any], host: str) -> int | None:
    """The longer side of the crops that training sees, if there is one."""
    if host == 'mmdet':
        return None  # detectors see images of many sizes
    pipeline = values.get('train_dataloader') or {}
    while isinstance(pipeline, Mapping) and 'dataset' in pipeline:
        pipeline = pipeline['dataset']
    pipeline = pipeline.get('pipeline') if isinstance(
        pipeline, Mapping) else None
    side = None
    for transform in pipeline if isinstance(pipeline, (list, tuple)) else ():
        if type_name(transform) in ('RandomResizedCrop', 'RandomCrop',
                                    'CenterCrop', 'Resize'):
            size = transform.get('crop_size', transform.get('scale'))
            size = (size, ) if isinstance(size, int) else size
            if isinstance(size, (list, tuple)) and size and all(
                    isinstance(v, int) for v in size):
                side = max(size)
    return side
