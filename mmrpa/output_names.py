"""Whether what a test writes of each image is still there at its end.

The hosts name it by the image's name without its folder, so ``a/0.png`` and
``b/0.png`` get one file; and mmseg writes labels as bytes.
"""

import os.path as osp
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmrpa.preflight import ConfigError

_LABEL_WRITERS = {'mmseg.IoUMetric', 'mmseg.CityscapesMetric',
                  'mmseg.DepthMetric'}
_LARGEST = 255  # of a byte


def check_outputs(runner: Any) -> None:
    """Check what the metrics and hooks of a runner will write in a test.

    Read are the names of all images that will be written of, and no image.

    Args:
        runner (Runner): Its test loop has been built.

    Raises:
        ConfigError: (a ValueError) Two images would get one file (of what the
            first process alone draws: in the first process), or a label is
            larger than the format takes.
    """
    from mmengine.dist import is_main_process
    loader = runner.test_dataloader
    metrics = [metric for metric in getattr(runner.test_evaluator, 'metrics',
                                            ())
               if _kinds(metric) & _LABEL_WRITERS
               and metric.output_dir is not None]
    choices = [choice for hook in runner.hooks
               if (choice := _find_choice(hook)) and is_main_process()]
    if not metrics and not choices:
        return
    if not hasattr(loader.dataset, 'get_data_info'):
        print(f'mmrpa: not checked: {type(loader.dataset).__name__} does not '
              'tell (by get_data_info) whether two of its images have one '
              'name; what is written of one would be lost', flush=True)
        return
    for metric in metrics:
        if 'mmseg.IoUMetric' in _kinds(metric):
            _check_labels(metric.dataset_meta, loader.dataset)
        _check_names('--out', loader.dataset, range(len(loader.dataset)),
                     lambda path: osp.splitext(osp.basename(path))[0])
    for choice in choices:
        drawn = (index for i, batch in enumerate(loader.batch_sampler)
                 for index in choice(i, batch))
        _check_names('--show-dir', loader.dataset, drawn, osp.basename)


def _kinds(thing: object) -> set[str]:
    """An object's classes, as ``<package>.<class>``."""
    return {f'{cls.__module__.split(".")[0]}.{cls.__name__}'
            for cls in type(thing).__mro__}


def _find_choice(hook: Any) -> Callable[[int, list], list] | None:
    """How a hook chooses the images that it names by their names alone.

    Returns:
        callable | None: (number of a batch, its images) -> those that the
        hook draws; None if it draws none, or gives each a name of its own.
    """
    kinds = _kinds(hook)
    if 'mmdet.DetVisualizationHook' in kinds:
        return (lambda i, batch: batch) if (
            hook.draw and hook.test_out_dir is not None) else None
    if 'mmpretrain.VisualizationHook' in kinds:
        return (lambda i, batch: batch[-i * len(batch) % hook.interval::
                                       hook.interval]) if (
            hook.enable and hook.out_dir is not None) else None
    # That of the fork numbers the images, mmseg 1.2.2 gives all of them 0.
    if 'mmseg.SegVisualizationHook' in kinds and not hasattr(
            hook, '_test_index'):
        return (lambda i, batch: [] if (i + 1) % hook.interval else batch) if (
            hook.draw and not hook.show) else None
    return None


def _check_names(flag: str, dataset: Any, indices: Iterable[int],
                 name: Callable[[str], str]) -> None:
    """Raise ConfigError if two images have one name.

    Args:
        flag (str): What asks for the files.
        dataset: The host's. Images without a path are passed over,
            for the hosts number them.
        indices (Iterable[int]): Which of its images.
        name (Callable): path -> name of the file.
    """
    taken, clashes = {}, {}
    for index in indices:
        path = dataset.get_data_info(index).get('img_path')
        if path is not None and taken.setdefault(name(path), path) != path:
            clashes[path] = taken[name(path)]
    if clashes:
        path, other = next(iter(clashes.items()))
        raise ConfigError(
            f'{flag} names files after images without their folders, so '
            f'{len(clashes)} of {len(taken) + len(clashes)} would be '
            f'overwritten: {path} has the name of {other}. Test one folder '
            'at a time (test_dataloader.dataset.data_prefix), or rename the '
            'images; --no-preflight takes the loss')


def _check_labels(meta: Mapping, dataset: Any) -> None:
    """Raise ConfigError if IoUMetric's files cannot hold all labels."""
    largest = len(meta['classes']) - 1
    shifted = dataset.get_data_info(0).get('reduce_zero_label', False)
    if largest + bool(shifted) > _LARGEST:
        why = ', and reduce_zero_label adds 1' if shifted else ''
        raise ConfigError(
            f'--out writes labels as bytes, up to {_LARGEST}, but those of '
            f'{largest + 1} classes go up to {largest}{why}: higher ones '
            'would be written as others. Leave out --out; '
            "test_evaluator=[..., dict(type='DumpResults', "
            "out_file_path='all.pkl')] writes predictions as they are. "
            '--no-preflight writes them all the same')
