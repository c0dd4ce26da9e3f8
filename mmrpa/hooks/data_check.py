"""The quick part of the checks of data, before the first step."""

import logging
from time import monotonic

from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log

from ..registry import HOOKS

_SPLITS = ('train', 'val')


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stop a training on broken data before its first step.

    The first process checks what takes seconds: classes and heads, the
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
        message = [self._check(runner) if get_rank() == 0 else '']
        broadcast_object_list(message)
        if message[0]:
            raise DataError(message[0])

    def _check(self, runner) -> str:
        """What stops the training, '' if nothing does."""
        from ..data_checks import check_data
        from ..data_checks.context import Options
        start = monotonic()
        report = check_data(
            runner.cfg, _SPLITS,
            Options(max_images=self.max_images, quick=True),
            get_world_size(), self.allow_subset)
        if report.num_problems:
            return '\n'.join([
                f'{report.num_problems} problem(s) in the data of this '
                'training:', *report.findings.lines(),
                'python tools/check_data.py CONFIG checks all of it; '
                'DataCheckHook leaves this out with enabled=False'
            ])
        for code, where, text in report.findings.notes:
            print_log(f'DataCheckHook: {code}: {text}'
                      + (f' ({where})' if where else ''), logger='current')
        print_log(f'DataCheckHook: no problems in what was read within '
                  f'{monotonic() - start:.1f} s', logger='current',
                  level=logging.INFO)
        return ''
