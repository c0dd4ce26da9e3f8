"""Loading weights into a backbone, or saying clearly why they do not fit.

mmengine loads non-strictly: a checkpoint of another arch leaves a network
half random with one warning in a long log. Here it is an error. mmengine also
unpickles whatever is in the file where it can not be loaded safely; files that
``init_cfg`` names are read by :mod:`mmrpa.weights`, which never does.
"""

import re
from typing import Any, Collection, Dict, List, Mapping

from mmengine.logging import print_log
from torch import Tensor, nn

from ..weights.files import read_checkpoint
from ..weights.sources import find_style

# Tables that are resized to the backbone's own size when they are loaded.
RESIZED = ('pos_embed', 'relative_position_bias_table')
# Classification checkpoints hold the norm of the last stage only.
OUTPUT_NORM = re.compile(r'norm\d+\.')
PREFIXES = ('', 'backbone.', 'module.backbone.', 'model.backbone.', 'module.',
            'model.')


def check_state_dict(backbone: nn.Module,
                     state_dict: Mapping[str, Tensor],
                     prefix: str = '',
                     new: Collection[str] = ()) -> Dict[str, int]:
    """Check that weights were made for this backbone.

    Output norms may be missing, and weights of stages that ``out_indices``
    leaves unbuilt may be there; all else must be there in its shape.

    Args:
        backbone (RPBackbone): What the weights are for.
        state_dict (Mapping): The weights.
        prefix (str): What stands before the backbone's own names in it.
        new (Collection[str]): The backbone's own names of parameters that may
            be missing, too.

    Returns:
        dict[str, int]: Tensors ``loaded``, numbers ``carried`` and ``total``,
        tables to be ``resized``, tensors that stay ``new``, and ``unused``
        ones of the weights (output norms, stages that are not built).

    Raises:
        ValueError: They were not; with the keys, how many, and what to do.
    """
    own = backbone.state_dict()
    built = len(backbone.stages)
    given = {
        key[len(prefix):]: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    required = [
        key for key in own if not OUTPUT_NORM.match(key) and key not in new
    ]
    missing = [key for key in required if key not in given]
    unexpected = [
        key for key in given
        if key not in own and key.startswith(('stem.', 'stages.'))
        and not _in_unbuilt_stage(key, built)
    ]
    reshaped = [
        f'{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}'
        for key in own if key in given and not _fits(key, given[key], own[key])
    ]
    loaded = [key for key in own if key in given]
    if reshaped or unexpected or missing:
        raise ValueError(
            _explain(backbone, prefix, len(loaded), missing, unexpected,
                     reshaped) + _hint(state_dict))
    return dict(
        new=len(own) - len(loaded),
        unused=sum(
            key.startswith('stages.') or bool(OUTPUT_NORM.match(key))
            for key in given if key not in own),
        loaded=len(loaded),
        resized=sum(given[key].shape != own[key].shape for key in loaded),
        carried=sum(own[key].numel() for key in loaded),
        total=sum(tensor.numel() for tensor in own.values()))


def load_pretrained(backbone: nn.Module, init_cfg: Mapping[str, Any]) -> None:
    """Load what ``init_cfg=dict(type='Pretrained', ...)`` names.

    One line in the log says how much was loaded.

    Args:
        backbone (RPBackbone): What to load into.
        init_cfg (Mapping): ``checkpoint``, a path or an address that mmengine
            can read, and optionally ``prefix``, found by itself if left out.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: init_cfg has other keys, the checkpoint does not fit, or
            it holds more than weights and is refused.
    """
    options = dict(init_cfg)
    if options.pop('type', None) != 'Pretrained':
        raise ValueError("init_cfg of an RPAttention backbone must be "
                         "dict(type='Pretrained', checkpoint=...) or None: "
                         'weights are initialised when it is built; got '
                         f'{dict(init_cfg)}')
    path = options.pop('checkpoint', None)
    prefix = options.pop('prefix', None)
    if not path or options:
        raise ValueError(
            "init_cfg of type 'Pretrained' takes checkpoint and prefix, got "
            f'{dict(init_cfg)}')
    checkpoint = read_checkpoint(path)
    state_dict = checkpoint.state_dict
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    # A converted file says itself which parameters it has not.
    new = [
        name for name, start in checkpoint.meta.get('new', {}).items()
        if start == 'init'
    ]
    try:
        if prefix is None:
            prefix = _find_prefix(state_dict)
        counts = check_state_dict(backbone, state_dict, prefix, new)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    weights = {
        key[len(prefix):]: value
        for key, value in state_dict.items() if key.startswith(prefix)
    }
    own = backbone.state_dict()
    weights.update((name, own[name]) for name in new
                   if name in own and name not in weights)
    backbone.load_state_dict(weights, strict=False)
    print_log(_summary(backbone, path, counts), logger='current')


def _summary(backbone: nn.Module, path: str, counts: Dict[str, int]) -> str:
    text = (f'{type(backbone).__name__}: loaded {counts["loaded"]} tensors, '
            f'{counts["carried"] / counts["total"]:.1%} of the parameters, '
            f'from {path}; {counts["resized"]} position tables were resized')
    if counts['new']:
        text += f'; {counts["new"]} tensors are not in it and stay new'
    if counts['unused']:
        text += f'; {counts["unused"]} tensors in it were not expected'
    return text


def _find_prefix(state_dict: Mapping[str, Any]) -> str:
    for prefix in PREFIXES:
        if any(key.startswith(prefix + 'stages.') for key in state_dict):
            return prefix
    found = find_style(state_dict)
    return found[1] if found and found[0].family == 'mmrpa' else ''


def _hint(state_dict: Mapping[str, Any]) -> str:
    """What to do with weights of others, which people download."""
    try:
        found = find_style(state_dict)
    except ValueError:  # several networks: whatever they are, they are others
        return ''
    if found is None or found[0].family == 'mmrpa':
        return ''
    return (f'\nThese are weights of {found[0].family} by the names of '
            f'{found[0].title}: tools/convert_checkpoint.py makes them fit.')


def _in_unbuilt_stage(key: str, built: int) -> bool:
    name = key.split('.')
    return name[0] == 'stages' and name[1].isdigit() and int(name[1]) >= built


def _fits(key: str, given: Tensor, own: Tensor) -> bool:
    if key.endswith(RESIZED):
        return given.dim() == own.dim() and given.shape[-1] == own.shape[-1]
    return given.shape == own.shape


def _explain(backbone: nn.Module, prefix: str, num_loaded: int,
             missing: List[str], unexpected: List[str],
             reshaped: List[str]) -> str:
    lines = [
        f'the checkpoint does not fit this {type(backbone).__name__} '
        f'({num_loaded} of its tensors found under {prefix + "*"!r}):'
    ]
    for what, keys in (('missing', missing), ('unexpected', unexpected),
                       ('of another shape', reshaped)):
        if keys:
            more = ', ...' if len(keys) > 3 else ''
            lines.append(f'  {len(keys)} {what}: {", ".join(keys[:3])}{more}')
    if num_loaded == 0:
        lines.append('Is it a checkpoint of this backbone at all? If its '
                     'names have another prefix, give it as '
                     "init_cfg=dict(type='Pretrained', ..., prefix=...).")
    else:
        lines.append('Build the backbone with the arch, attention, '
                     'num_representatives and rp_cfg that the checkpoint was '
                     'trained with, or load another one.')
    return '\n'.join(lines)
