"""The optimiser settings that a transformer backbone needs."""

import os.path as osp
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .fields import MAYBE_DICT, OPTIONS, take
from .report import Report, short, type_name

# Tables of the RP backbones that are no norms and no biases, as in configs/.
FREE_OF_DECAY = ('anchors', 'cls_token', 'pos_embed',
                 'relative_position_bias_table')
# Options of the constructors that know the layers of the hosts' backbones.
_OF_LAYER_DECAY = ('layer_decay_rate', 'decay_rate', 'decay_type',
                   'num_layers', '_delete', '_delete_')
_LAYER_DECAY = ('LearningRateDecayOptimWrapperConstructor',
                'LearningRateDecayOptimizerConstructor',
                'LayerDecayOptimizerConstructor',
                'LayerDecayOptimWrapperConstructor')
_MULTIPLIERS = ('lr_mult', 'decay_mult')


@dataclass(frozen=True)
class Recipe:
    """AdamW's settings, and the batch that its learning rate is for."""

    lr: float
    batch: int
    weight_decay: float


# Those of configs/.
RECIPES = dict(
    mmdet=Recipe(1e-4, 16, 0.05),
    mmseg=Recipe(6e-5, 16, 0.01),
    mmpretrain=Recipe(1e-3, 1024, 0.05))


def use_adamw(cfg: dict[str, Any], host: str, filename: str | None,
              old_names: Sequence[str], report: Report) -> None:
    """Give the config AdamW, without decay where transformers want none.

    What is left: the wrapper (mixed precision, accumulation), gradient
    clipping, the schedule's shape and length, and an AdamW that stands there.

    Args:
        cfg (dict): The whole config, changed in place.
        host (str): A key of ``RECIPES``.
        filename (str, optional): Its file, whose name may tell the batch.
        old_names (sequence[str]): Parameters of the old backbone.
        report (Report): Takes the lines.
    """
    wrapper = cfg.get('optim_wrapper')
    if not isinstance(wrapper, dict) or not isinstance(
            wrapper.get('optimizer'), dict):
        report.leave('optim_wrapper', 'there is no optimiser to change: this '
                     'config does not train, or has one for each part')
        return
    optimizer = wrapper['optimizer']
    if type_name(optimizer) == 'AdamW':
        report.leave('optim_wrapper.optimizer',
                     f'AdamW, lr={optimizer.get("lr")!r}, '
                     f'weight_decay={optimizer.get("weight_decay")!r}: what '
                     'stands there is for a transformer already, or for the '
                     "detector's own")
    else:
        _replace(cfg, wrapper, host, filename, report)
    _free_of_decay(wrapper, old_names, report)
    clip = wrapper.get('clip_grad')
    if clip:
        report.leave('optim_wrapper.clip_grad', f'{short(clip)}, kept')
    if type_name(wrapper) not in ('', 'OptimWrapper'):
        report.leave('optim_wrapper.type', f'{type_name(wrapper)}, kept')


def _replace(cfg: dict[str, Any], wrapper: dict[str, Any], host: str,
             filename: str | None, report: Report) -> None:
    """Write AdamW in the place of another optimiser."""
    recipe = RECIPES[host]
    old = wrapper['optimizer']
    batch, source = find_batch(cfg, filename)
    if batch is None:
        batch = recipe.batch
        source = 'assumed, the config does not tell it'
    lr = float(f'{recipe.lr * batch / recipe.batch:.6g}')
    wrapper['optimizer'] = dict(
        type='AdamW', lr=lr, betas=(0.9, 0.999),
        weight_decay=recipe.weight_decay)
    report.change(
        'optim_wrapper.optimizer',
        f'AdamW, lr={lr}, weight_decay={recipe.weight_decay} for '
        f'{type_name(old)}, lr={old.get("lr")!r}',
        f'transformers train badly with {type_name(old)}; lr is {recipe.lr} '
        f'for {recipe.batch} images a batch, as in our configs for {host}, '
        f'times {batch}/{recipe.batch} ({source})')
    scale = cfg.get('auto_scale_lr')
    if not isinstance(scale, dict) or not scale.get('base_batch_size'):
        kept = scale if isinstance(scale, dict) else {}
        cfg['auto_scale_lr'] = {**dict(enable=False), **kept,
                                'base_batch_size': batch}
        report.change('auto_scale_lr', f'base_batch_size={batch}',
                      'the batch that lr is for, if you train with another')
    old_lr = old.get('lr')
    if isinstance(old_lr, (int, float)) and old_lr > 0:
        _scale_bounds(cfg, lr / old_lr, report)
    if not _has_warm_up(cfg):
        report.leave('param_scheduler', 'kept, and it has no warm-up; from '
                     'random weights AdamW is steadier with a LinearLR first')


def find_batch(cfg: dict[str, Any],
               filename: str | None) -> tuple[int | None, str]:
    """The images a batch that a config's learning rate is for.

    Returns:
        tuple[int | None, str]: The number, None if unknown, and its source.
    """
    scale = take(cfg, 'auto_scale_lr', MAYBE_DICT, '', None) or {}
    batch = scale.get('base_batch_size')
    if isinstance(batch, int) and batch > 0:
        return batch, 'auto_scale_lr.base_batch_size'
    named = re.search(r'(?:^|[_-])(\d+)xb(\d+)', osp.basename(filename or ''))
    if named:
        return int(named[1]) * int(named[2]), f'{named[0].strip("_-")} in ' \
            "the file's name"
    return None, ''


def _schedulers(cfg: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    found = cfg.get('param_scheduler')
    listed = isinstance(found, (list, tuple))
    for i, scheduler in enumerate(found if listed else [found]):
        if isinstance(scheduler, dict):
            yield f'param_scheduler.{i}' if listed else 'param_scheduler', \
                scheduler


def _has_warm_up(cfg: dict[str, Any]) -> bool:
    return any('LinearLR' in type_name(s) or 'armup' in type_name(s)
               for _, s in _schedulers(cfg))


def _scale_bounds(cfg: dict[str, Any], ratio: float, report: Report) -> None:
    """Scale the learning rates that a schedule states as such.

    mmseg's polynomial decay ends at 1e-4, which for SGD is little and for
    AdamW more than it starts with.
    """
    for key, scheduler in _schedulers(cfg):
        if not type_name(scheduler).endswith('LR'):
            continue
        for name in ('eta_min', 'eta_max'):
            bound = scheduler.get(name)
            if isinstance(bound, (int, float)) and bound > 0:
                scheduler[name] = float(f'{bound * ratio:.6g}')
                report.change(
                    f'{key}.{name}', f'{scheduler[name]} for {bound}',
                    f'as many times less as lr, which is now {ratio:.6g} of '
                    'what it was')


def _free_of_decay(wrapper: dict[str, Any], old_names: Sequence[str],
                   report: Report) -> None:
    """No weight decay on norms, biases and tables; drop the old keys."""
    key = 'optim_wrapper'
    old = dict(take(wrapper, 'paramwise_cfg', MAYBE_DICT, key, None) or {})
    constructor = wrapper.get('constructor')
    if type_name(dict(type=constructor)) in _LAYER_DECAY:
        del wrapper['constructor']
        report.change('optim_wrapper.constructor', f'{constructor} removed',
                      'it decays lr by layer and knows the layers of the '
                      "hosts' own backbones only")
    elif constructor is not None:
        report.leave('optim_wrapper.constructor', f'{constructor}, kept')
    custom = {}
    options_by_name = take(old, 'custom_keys', OPTIONS,
                           f'{key}.paramwise_cfg', None)
    old.pop('custom_keys', None)
    for name, options in (options_by_name or {}).items():
        if name.lstrip('.') in FREE_OF_DECAY:
            continue  # ours, which come below
        reason = _is_for_old_backbone(name, old_names)
        kept = {k: v for k, v in options.items() if k in _MULTIPLIERS}
        if reason:
            report.change(
                f'optim_wrapper.paramwise_cfg.custom_keys.{name}',
                f'{short(options)} removed', reason)
        elif kept:
            custom[name] = kept
            report.leave(f'optim_wrapper.paramwise_cfg.custom_keys.{name}',
                         f'{short(kept)}, kept')
    custom.update({name: dict(decay_mult=0.) for name in FREE_OF_DECAY})
    kept = {k: v for k, v in old.items() if k not in _OF_LAYER_DECAY}
    wrapper['paramwise_cfg'] = {
        **kept, 'norm_decay_mult': 0., 'bias_decay_mult': 0.,
        'custom_keys': custom
    }
    report.change('optim_wrapper.paramwise_cfg',
                  'no weight decay on norms, biases, '
                  + ', '.join(FREE_OF_DECAY),
                  'decay pulls to zero what is no weight of a product')


def _is_for_old_backbone(name: str, old_names: Sequence[str]) -> str:
    """Why a custom key goes, '' if it stays."""
    if name.startswith('backbone'):
        return 'it was set for the old, pretrained backbone'
    bare = name.lstrip('.')
    if bare in FREE_OF_DECAY or bare in ('norm', 'bias', 'ln', 'bn'):
        return ''
    if any(name in f'backbone.{old}' for old in old_names):
        return 'it names parameters of the old backbone'
    return ''
