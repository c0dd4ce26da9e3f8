"""All checks of all datasets of a config."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from ..preflight import (
    backend_of,
    find_class,
    find_problems,
    inherits,
    iter_datasets,
)
from .batch import check_batch
from .coco import check_coco
from .context import Context, Histogram, Options, Usage
from .findings import PROBLEMS, Findings
from .folders import check_folders
from .ignored import find_consumers, find_metrics, find_paddings
from .masks import check_label_maps

# What a dataset raises of arguments that it refuses, or that have a type or
# lack a key that it did not expect. Another error is a mistake of its code.
_REFUSALS = (TypeError, ValueError, AssertionError, LookupError,
             AttributeError, OSError)
# Module and class, what a type made from it must leave as it is, the check.
_CHECKS: tuple[tuple[str, str, tuple[str, ...],
                     Callable[[Context], Histogram | None]], ...] = (
    ('mmdet.datasets.coco', 'CocoDataset',
     ('load_data_list', 'parse_data_info'), check_coco),
    ('mmseg.datasets.basesegdataset', 'BaseSegDataset',
     ('load_data_list', ), check_label_maps),
    ('mmpretrain.datasets.custom', 'CustomDataset',
     ('load_data_list', ), check_folders),
)


@dataclass
class Report:
    """What was found in the data of a config.

    Attributes:
        findings (Findings): Problems and notes.
        histograms (dict[str, Histogram]): By dotted key of the dataset.
        seconds (float): How long the files were read.
    """

    findings: Findings = field(default_factory=Findings)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    seconds: float = 0.

    @property
    def num_problems(self) -> int:
        """All problems, not only those that are kept as examples."""
        return sum(group.count for group in self.findings.problems)

    def record(self) -> dict:
        """The report in types that JSON has."""
        return dict(
            problems=[
                dict(asdict(group), meaning=PROBLEMS[group.code].meaning,
                     fix=PROBLEMS[group.code].fix)
                for group in self.findings.problems
            ],
            notes=[
                dict(code=code, where=where, text=text)
                for code, where, text in self.findings.notes
            ],
            histograms={
                key: asdict(histogram)
                for key, histogram in self.histograms.items()
            })


def check_data(cfg: Mapping, splits: Sequence[str] = ('train', 'val'),
               options: Options | None = None, world_size: int | None = 1,
               allow_subset: bool = False) -> Report:
    """Check the datasets of a config, their files included.

    Args:
        cfg (Mapping): The config, normally a ``mmengine.Config``.
        splits (Sequence[str]): Which of 'train', 'val', 'test'.
        options (Options, optional): How much to read; default: all.
        world_size (int, optional): Processes of the training, for its batch;
            None leaves that out.
        allow_subset (bool): Accept COCO files with categories that the
            dataset's classes lack.

    Returns:
        Report: Broken data is reported, never raised.

    Raises:
        ConfigError: If ``splits`` is wrong.
    """
    start = monotonic()
    report = Report()
    findings = report.findings
    options = options or Options()
    problems, notes = find_problems(cfg, splits, allow_subset)
    for problem in problems:
        findings.add(problem.code, problem.where, problem.text)
    for note in notes:
        findings.note('config', '', note)
    # A file that cannot be found or parsed is told once.
    hopeless = [
        problem.where for problem in problems if problem.code in
        ('missing-path', 'annotation-file', 'class-names')
    ]
    scope = cfg.get('default_scope')
    ignorable = frozenset(
        consumer.ignored for consumer in find_consumers(cfg, 'train')
        if consumer.ignored is not None)
    for where, dataset, used_in in _unique_datasets(cfg, splits):
        if any(key == where or key.startswith(f'{where}.')
               for key in hopeless):
            continue
        usage = Usage(
            tuple(used_in),
            tuple(metric for split in used_in
                  for _, metric in find_metrics(cfg, split)),
            tuple(consumer for split in used_in
                  for consumer in find_consumers(cfg, split)),
            ignorable,
            tuple(find_paddings(cfg, _steps(dataset.get('pipeline'))))
            if 'train' in used_in else ())
        histogram = _check_dataset(where, dataset, scope, findings, options,
                                   usage)
        if histogram is not None:
            report.histograms[where] = histogram
    report.seconds = monotonic() - start
    if 'train' in splits and world_size is not None:
        check_batch(cfg, world_size, findings)
    return report


def _unique_datasets(cfg: Mapping, splits: Sequence[str]
                     ) -> list[tuple[str, Mapping, list[str]]]:
    """(dotted key, settings, splits that use it) of each dataset, once."""
    found: dict[str, tuple[str, Mapping, list[str]]] = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if not isinstance(loader, Mapping):
            continue
        for where, dataset in iter_datasets(loader.get('dataset'),
                                            f'{split}_dataloader.dataset'):
            content = {key: value for key, value in dataset.items()
                       if key != 'pipeline'}
            name = json.dumps(content, default=repr, sort_keys=True)
            used_in = found.setdefault(name, (where, dataset, []))[2]
            if split not in used_in:
                used_in.append(split)
    return list(found.values())


def _check_dataset(where: str, cfg: Mapping, scope: str | None,
                   findings: Findings, options: Options,
                   usage: Usage) -> Histogram | None:
    cls = find_class(cfg.get('type'), scope)
    check = next((check for module, name, methods, check in _CHECKS
                  if all(inherits(cls, module, name, method)
                         for method in methods)), None)
    backends = [backend_of(cfg, path) for path in _paths(cfg)]
    if check is None or any(backends):
        reason = (f'type {cfg.get("type")!r}' if check is None else
                  f'backend {next(filter(None, backends))!r}')
        findings.note('unchecked', where,
                      f'the files of a dataset of {reason} were not checked')
        return None
    # mmengine adds _scope_ to what a base in another package defines.
    arguments = {key: value for key, value in cfg.items() if key not in (
        'type', '_scope_', 'pipeline', 'lazy_init')}
    try:
        dataset = cls(**arguments, pipeline=[], lazy_init=True)
    except _REFUSALS as error:
        if ('lazy_init' not in cfg and isinstance(error, TypeError)
                and "'lazy_init'" in str(error)):
            # Our argument, not the config's. Without it all would be loaded.
            findings.note('unchecked', where, 'the files of a dataset of type '
                          f'{cfg.get("type")!r} were not checked: it takes no '
                          'lazy_init')
            return None
        findings.add('dataset-arguments', where,
                     f'{where}: {type(error).__name__}: {error}')
        return None
    steps = list(_steps(cfg.get('pipeline')))
    return check(Context(where, dataset, findings, options, steps, usage))


def _paths(cfg: Mapping) -> Iterator[str]:
    prefix = cfg.get('data_prefix')
    values = prefix.values() if isinstance(prefix, Mapping) else [prefix]
    for value in (cfg.get('data_root'), cfg.get('ann_file'), *values):
        yield value if isinstance(value, str) else ''


def _steps(node: Any) -> Iterator[Mapping]:
    """All steps of a pipeline, those within others included."""
    if isinstance(node, Mapping):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _steps(child)
