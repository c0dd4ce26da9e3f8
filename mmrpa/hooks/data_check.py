"""The quick part of the checks of data, before the first step."""

import logging
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log

from ..preflight import ConfigError, iter_datasets
from ..registry import HOOKS

if TYPE_CHECKING:
    from ..data_checks import Report

_SPLITS = ('train', 'val')
# What check_early has found, by the config's file, until the hook takes it.
_early: dict[str, 'Report'] = {}


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stop a training on broken data before its first step.

    The first process checks what takes seconds (tools/train.py has done so
    before, and the hook reports what that found): classes and heads, the
    annotations of COCO files of up to 50 MB, and a few images of each
    dataset, spread evenly. What is left out is logged; ``python
    tools/check_data.py CONFIG`` checks it all.

    Args:
        max_images (int): Images (and label maps) of each dataset to read.
        allow_subset (bool): Accept COCO files with categories that the
            dataset's classes lack.
        enabled (bool): Whether to check at all.

    Examples:
        In a config: ``default_hooks = dict(
        data_check=dict(type='mmrpa.DataCheckHook'))``.

    Raises:
        ValueError: An argument is wrong.
        DataError: (a ValueError) When training starts, in all processes: the
            data has problems. The message lists them with their fixes.
        RuntimeError: When training starts, in all processes but the first:
            the check itself failed there.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_images: int = 64, allow_subset: bool = False,
                 enabled: bool = True) -> None:
        if type(max_images) is not int or max_images < 1:
            raise ValueError('max_images of DataCheckHook must be an integer '
                             f'of at least 1, got {max_images!r}')
        for name, value in (('allow_subset', allow_subset),
                            ('enabled', enabled)):
            if not isinstance(value, bool):
                raise ValueError(f'{name} of DataCheckHook must be True or '
                                 f'False, got {value!r}')
        self.max_images = max_images
        self.allow_subset = allow_subset
        self.enabled = enabled

    def before_train(self, runner) -> None:
        """Check, in all processes alike."""
        if not self.enabled:
            return
        from ..data_checks import DataError
        # A process that stopped alone would leave the others waiting.
        message: list[str | None] = [None]
        try:
            if get_rank() == 0:
                message = [self._check(runner)]
        finally:
            broadcast_object_list(message)
        if message[0] is None:
            raise RuntimeError('the first process failed to check the data, '
                               'see its error; DataCheckHook leaves the '
                               'check out with enabled=False')
        if message[0]:
            raise DataError(message[0])

    def read(self, cfg: Mapping, splits: Sequence[str]) -> 'Report':
        """Check files, classes and heads."""
        from ..data_checks import check_data
        from ..data_checks.context import Options
        return check_data(
            cfg, splits, Options(max_images=self.max_images, quick=True),
            world_size=None, allow_subset=self.allow_subset)

    def _check(self, runner) -> str:
        """What stops the training, '' if nothing does."""
        from ..data_checks.batch import check_batch
        report = _early.pop(runner.cfg.filename, None)
        if report is None:
            report = self.read(runner.cfg, _SPLITS)
        check_batch(runner.cfg, get_world_size(), report.findings)
        if report.num_problems:
            return _message(report, runner.cfg)
        for code, where, text in report.findings.notes:
            print_log(f'DataCheckHook: {code}: {text}'
                      + (f' ({where})' if where else ''), logger='current')
        print_log('DataCheckHook: no problems in what was read within '
                  f'{report.seconds:.1f} s', logger='current',
                  level=logging.INFO)
        return ''


def find_data_checks(cfg: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Yield (dotted key, settings) of each DataCheckHook of a config."""
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping) and hook.get('type') in (
                'mmrpa.DataCheckHook', DataCheckHook):
            yield f'default_hooks.{name}', hook


def check_early(cfg: Mapping, splits: Sequence[str],
                allow_subset: bool) -> None:
    """Check what the hook of a config checks, before there is a Runner.

    A host that builds a dataset of a broken file stops there, with a
    traceback of its own. The hook does not read the files once more.

    Args:
        cfg (Mapping): A config of a file.
        splits (sequence[str]): Which of 'train' and 'val' the run uses.
        allow_subset (bool): As for the hook.

    Raises:
        ConfigError: (a ValueError) The hook does not take its arguments.
        DataError: (a ConfigError) The data has problems.
    """
    from ..data_checks import DataError
    for key, settings in find_data_checks(cfg):
        arguments = {k: v for k, v in settings.items()
                     if k not in ('type', 'priority', '_scope_')}
        try:
            hook = DataCheckHook(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{key}: {error}') from error
        hook.allow_subset |= allow_subset
        if hook.enabled:
            report = hook.read(cfg, splits)
            if report.num_problems:
                raise DataError(_message(report, cfg))
            _early[cfg.filename] = report


def _message(report: 'Report', cfg: Mapping) -> str:
    wrong = {group.where for group in report.findings.problems}
    files = [
        f'the file of {key} is '
        + osp.join(dataset.get('data_root') or '', dataset['ann_file'])
        for split in _SPLITS
        for key, dataset in iter_datasets(
            (cfg.get(f'{split}_dataloader') or {}).get('dataset'),
            f'{split}_dataloader.dataset')
        if key in wrong and isinstance(dataset.get('ann_file'), str)
        and dataset['ann_file']
    ]
    return '\n'.join([
        f'{report.num_problems} problem(s) in the data of this training:',
        *report.findings.lines(), *files,
        'python tools/check_data.py CONFIG checks all of it; DataCheckHook '
        'leaves this out with enabled=False'
    ])
