"""Checks of a config that cost seconds, done before a run that costs days.

The hosts find these mistakes late (after the model is built, or at the first
validation) or never: mmdet drops the classes that the annotation file and the
config do not share without a word.
"""

import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mmrpa.coco_categories import read_categories

_SPLITS = ('train', 'val', 'test')
# Heads whose num_classes counts the classes of the dataset. Left out because
# theirs counts something else: rpn_head (objectness), semantic_head (stuff).
_HEADS = ('bbox_head', 'mask_head', 'mask_iou_head', 'point_head',
          'decode_head', 'auxiliary_head', 'head')
# Heads at such a place whose classes are others: STDC's boundaries, words of a
# text.
_OTHER_CLASSES = ('STDCHead', 'ATSSVLFusionHead', 'GroundingDINOHead')
# Datasets with more classes than trackers learn: of MOT's 13 one or a few.
_MORE_CLASSES = ('MOTChallengeDataset', )
# Datasets of mmpretrain that fetch themselves what is not there.
_DOWNLOADERS = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


def type_name(cfg: object) -> str:
    """The class that a config dict names, without scope or module.

    Configs in pure Python have the class itself as their ``type``.
    """
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.rsplit('.', 1)[-1]


class ConfigError(ValueError):
    """A config that cannot give the run its user wants."""


class MissingPathError(ConfigError, FileNotFoundError):
    """A :class:`ConfigError` with at least one path that does not exist."""


class Problem(NamedTuple):
    """A mistake.

    Attributes:
        code (str): Name of its kind, as in docs/check_data.md.
        where (str): Dotted key in the config of the dataset or evaluator.
        text (str): What is wrong, and how to mend it.
    """

    code: str
    where: str
    text: str


@dataclass
class _Findings:
    """What the checks collect.

    By key, so that a mistake that shows in each split is told once.
    """

    problems: dict[object, Problem] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def problem(self, code: str, where: str, text: str,
                key: object = None) -> None:
        self.problems.setdefault(key or text, Problem(code, where, text))

    def note(self, text: str) -> None:
        self.notes.setdefault(text, text)


def check_config(cfg: Mapping,
                 splits: Sequence[str] = ('train', 'val'),
                 allow_subset: bool = False) -> list[str]:
    """Check datasets, their classes and the heads of a config.

    Checked are: paths of the datasets (through wrappers) and of the
    evaluators; the categories of COCO files against the dataset's classes;
    ``num_classes`` of the heads against the dataset's classes. Of a dataset
    type that is not known here only the paths are checked.

    Args:
        cfg (Mapping): The config, normally a ``mmengine.Config``.
        splits (Sequence[str]): Which of 'train', 'val', 'test' the run uses.
        allow_subset (bool): Accept COCO files with categories that the
            dataset's classes lack, i.e. train on some of them on purpose.

    Returns:
        list[str]: Notes on what could not be checked, one line each.

    Raises:
        MissingPathError: (a FileNotFoundError) If a path does not exist. The
            message also lists all other problems.
        ConfigError: (a ValueError) If there are other problems only, or if
            ``splits`` is wrong.
    """
    problems, notes = find_problems(cfg, splits, allow_subset)
    if problems:
        name = osp.basename(getattr(cfg, 'filename', None) or 'config')
        missing = any(p.code == 'missing-path' for p in problems)
        kind = MissingPathError if missing else ConfigError
        raise kind('\n'.join([
            f'{name}: {len(problems)} problem(s) found before start '
            f'(working directory {osp.abspath(osp.curdir)})',
            *(f'- {problem.text}' for problem in problems)
        ]))
    return notes


def find_problems(cfg: Mapping, splits: Sequence[str],
                  allow_subset: bool) -> tuple[list[Problem], list[str]]:
    """What :func:`check_config` checks, as lists of problems and of notes.

    Args:
        cfg (Mapping): As for :func:`check_config`, like all arguments.
        splits (Sequence[str]): Which splits.
        allow_subset (bool): Accept categories that the classes lack.

    Raises:
        ConfigError: If ``splits`` is wrong.
    """
    unknown = [split for split in splits if split not in _SPLITS]
    if unknown:
        raise ConfigError(f'splits={tuple(splits)!r}: unknown {unknown}; use '
                          f'some of {_SPLITS}')
    found = _Findings()
    scope = cfg.get('default_scope')
    heads = list(_iter_heads(cfg.get('model'), 'model'))
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        ann_files = []
        root = f'{split}_dataloader.dataset'
        for key, dataset in iter_datasets(loader.get('dataset'), root):
            checked = _Dataset(key, dataset, scope)
            checked.check(found, heads, allow_subset)
            if checked.ann_file is not None:
                ann_files.append(checked.ann_file)
        _check_evaluators(cfg, split, ann_files, found)
    return list(found.problems.values()), list(found.notes)


def iter_datasets(dataset: object,
                  key: str) -> Iterator[tuple[str, Mapping]]:
    """Yield (dotted key, config) of each dataset that is not a wrapper."""
    if not isinstance(dataset, Mapping):
        return
    if isinstance(dataset.get('dataset'), Mapping):
        yield from iter_datasets(dataset['dataset'], f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for i, child in enumerate(dataset['datasets']):
            yield from iter_datasets(child, f'{key}.datasets.{i}')
    else:
        yield key, dataset


def _iter_heads(node: object, key: str,
                in_head: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (dotted key, num_classes) of each head of a model config."""
    if isinstance(node, Mapping):
        if (in_head and isinstance(node.get('num_classes'), int)
                and type_name(node) not in _OTHER_CLASSES):
            yield f'{key}.num_classes', node['num_classes']
        for name, child in node.items():
            yield from _iter_heads(child, f'{key}.{name}', name in _HEADS)
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _iter_heads(child, f'{key}.{i}', in_head)


def backend_of(cfg: Mapping, path: str) -> str | None:
    """Name of the backend that reads ``path``, None if it is the disk."""
    backend = (cfg.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local':
        return backend
    return path.split('://')[0] if '://' in path else None


def _check_path(cfg: Mapping, key: str, value: str, path: str,
                found: _Findings) -> bool:
    """Report ``path`` if it does not exist.

    Args:
        cfg (Mapping): The dataset's or evaluator's config.
        key (str): Dotted key of the value in the config.
        value (str): The value as written in the config.
        path (str): Where the host will look.
        found (_Findings): Collects the problem or the note.

    Returns:
        bool: Whether the path is on this machine's disk.
    """
    backend = backend_of(cfg, path)
    if backend is not None:
        found.note(f'not checked: {key}={value!r} (backend {backend!r})')
        return False
    if osp.exists(path):
        return True
    where = '' if path == value else f' (looked for {path!r})'
    found.problem('missing-path', key,
                  f'{key}={value!r} does not exist{where}. Put or link the '
                  f'data there, or set it: --cfg-options {key}=PATH')
    return False


def _check_evaluators(cfg: Mapping, split: str, ann_files: list[str],
                      found: _Findings) -> None:
    """Check ``ann_file`` of a split's evaluators.

    An evaluator that reads another file than the dataset is noted: who
    changes only one of the two gets an error after the first epoch.
    """
    evaluators = cfg.get(f'{split}_evaluator')
    listed = isinstance(evaluators, (list, tuple))
    for i, evaluator in enumerate(evaluators if listed else [evaluators]):
        if not isinstance(evaluator, Mapping):
            continue
        ann_file = evaluator.get('ann_file')
        if not isinstance(ann_file, str):
            continue
        key = f'{split}_evaluator' + (f'.{i}' if listed else '') + '.ann_file'
        if not _check_path(evaluator, key, ann_file, ann_file, found):
            continue
        if ann_files and not any(
                osp.samefile(ann_file, other) for other in ann_files):
            found.note(f'{key}={ann_file!r} is another file than the one of '
                       f'the dataset, {ann_files[0]!r}')


class _Dataset:
    """The checks of one dataset config.

    Args:
        key (str): Dotted key of the dataset in the config.
        cfg (Mapping): The dataset's config.
        scope (str | None): The config's default scope.
    """

    def __init__(self, key: str, cfg: Mapping, scope: str | None) -> None:
        self.key = key
        self.cfg = cfg
        kind = cfg.get('type')
        self.name = kind if isinstance(kind, str) else getattr(
            kind, '__name__', str(kind))
        self.cls = find_class(kind, scope)
        self.ann_file: str | None = None  # set once it is known to exist
        self.img_dir: str | None = None

    def check(self, found: _Findings, heads: list[tuple[str, int]],
              allow_subset: bool) -> None:
        """Run all checks that fit the dataset's type."""
        self._check_paths(found)
        classes, names_file = self._classes(found)
        if inherits(self.cls, 'mmdet.datasets.coco', 'CocoDataset',
                     'load_data_list'):
            self._check_coco(classes, found, allow_subset)
        if inherits(self.cls, 'mmpretrain.datasets.custom', 'CustomDataset',
                     'load_data_list'):
            classes = self._check_folders(classes, found)
        # A panoptic dataset's stuff is a matter of other heads than these.
        classes = self._metainfo('thing_classes') or classes
        if classes is None or type_name(self.cfg) in _MORE_CLASSES:
            return
        for head, num_classes in heads:
            if num_classes != len(classes):
                found.problem(
                    'num-classes', self.key,
                    f'{head}={num_classes}, but {self.key} ({self.name}) has '
                    f'{len(classes)} classes{names_file}: '
                    f'{_some(classes)}. Set --cfg-options '
                    f'{head}={len(classes)}, or correct '
                    f'{self.key}.metainfo.classes', (head, len(classes)))

    def _check_paths(self, found: _Findings) -> None:
        cfg = self.cfg
        if self.name.split('.')[-1] in _DOWNLOADERS and cfg.get(
                'download', True):
            return
        root = cfg.get('data_root') or ''
        if not isinstance(root, str):
            return
        # Without its root nothing below it is there: one message is enough.
        root_is_bad = bool(root) and not _check_path(
            cfg, f'{self.key}.data_root', root, root, found)
        for name, value in self._values():
            path = self._join(root, value)
            if root_is_bad and path != value:
                continue
            key = f'{self.key}.{name}'
            if not _check_path(cfg, key, value, path, found):
                continue
            if name == 'ann_file':
                self.ann_file = path
            elif name in ('data_prefix', 'data_prefix.img_path'):
                self.img_dir = path
        if self.img_dir is None and root and not root_is_bad:
            if not any(name.startswith('data_prefix')
                       for name, _ in self._values()):
                self.img_dir = root

    def _values(self) -> Iterator[tuple[str, str]]:
        """Yield (key, value) of ann_file and of each prefix."""
        cfg = self.cfg
        prefix = cfg.get('data_prefix')
        ann_file = cfg.get('ann_file')
        if self._split() and not prefix:
            prefix = self._split()
        if self._split() and not ann_file:
            listing = osp.join('meta', f'{self._split()}.txt')
            if osp.exists(osp.join(cfg.get('data_root') or '', listing)):
                ann_file = listing
        for value in ann_file if isinstance(ann_file, list) else [ann_file]:
            if value and isinstance(value, str):
                yield 'ann_file', value
        if isinstance(prefix, str) and prefix:
            yield 'data_prefix', prefix
        elif isinstance(prefix, Mapping):
            for name, value in prefix.items():
                if value and isinstance(value, str):
                    yield f'data_prefix.{name}', value

    def _split(self) -> str:
        """The ``split`` of mmpretrain's ImageNet, which names a folder."""
        if inherits(self.cls, 'mmpretrain.datasets.imagenet', 'ImageNet',
                     '__init__'):
            return self.cfg.get('split') or ''
        return ''

    def _join(self, root: str, value: str) -> str:
        if self.cls is not None and self.cls.__module__.startswith(
                'mmpretrain.'):
            value = osp.expanduser(value)
        if not root or osp.isabs(value) or '://' in value:
            return value
        return osp.join(root, value)

    def _metainfo(self, name: str) -> Sequence[str] | None:
        """A value of the config's metainfo, else of the dataset's type."""
        value = (self.cfg.get('metainfo') or {}).get(name)
        if value is None:
            value = getattr(self.cls, 'METAINFO', {}).get(name)
        return value

    def _classes(self,
                 found: _Findings) -> tuple[Sequence[str] | None, str]:
        """Names of the classes, and ' (from FILE)' if they are in a file."""
        key = f'{self.key}.metainfo.classes'
        classes = self._metainfo('classes')
        if self.cfg.get('classes') is not None:
            key, classes = f'{self.key}.classes', self.cfg['classes']
        if not isinstance(classes, str):
            return classes, ''
        if osp.isfile(classes):
            try:
                text = Path(classes).read_text(encoding='utf-8')
            except (OSError, UnicodeDecodeError) as error:
                found.problem('class-names', self.key,
                              f'{key}={classes!r} cannot be read: {error}')
                return None, ''
            lines = text.splitlines()
            return [line.strip() for line in lines], f' (from {classes!r})'
        found.problem('class-names', self.key,
                      f'{key}={classes!r} is a string and no file of that '
                      f'name exists. For one class write ({classes!r}, )')
        return None, ''

    def _check_folders(self, classes: Sequence[str] | None,
                       found: _Findings) -> Sequence[str] | None:
        """Compare classes with the sub-folders that stand for classes."""
        labelled = self.cfg.get('with_label',
                                True) and self._split() != 'test'
        if self.img_dir is None or self.ann_file is not None or not labelled:
            return classes
        if not osp.isdir(self.img_dir):
            found.problem('missing-path', self.key,
                          f'{self.key}: {self.img_dir!r} is no folder, but '
                          'its folders are the classes')
            return classes
        if any(name == 'ann_file' for name, _ in self._values()):
            return classes
        folders = sorted(p.name for p in Path(self.img_dir).iterdir()
                         if p.is_dir() and not p.name.startswith('.'))
        if classes is not None and len(classes) != len(folders):
            found.problem(
                'class-folders', self.key,
                f'{self.key} ({self.name}) has {len(classes)} classes '
                f'({_some(classes)}), but {self.img_dir!r} has '
                f'{len(folders)} folders: {_some(folders)}. Set '
                f'{self.key}.metainfo.classes, or use '
                "type='CustomDataset', which takes the folders' names")
        return folders if classes is None else classes

    def _check_coco(self, classes: Sequence[str] | None, found: _Findings,
                    allow_subset: bool) -> None:
        """Compare classes with the categories of the annotation file."""
        if self.ann_file is None or classes is None:
            return
        try:
            names, note = read_categories(self.ann_file)
        except (OSError, RecursionError, ValueError) as error:
            found.problem('annotation-file', self.key,
                          f'{self.key}.ann_file: {error}')
            return
        if note:
            found.note(note)
        where = f'{self.key}: {self.ann_file!r}'
        fix = (f'Set {self.key}.metainfo=dict(classes=...) to the names in '
               'the file')
        lacking = [name for name in classes if name not in names]
        if lacking:
            found.problem(
                'categories', self.key,
                f'{where} lacks {len(lacking)} of the {len(classes)} classes '
                f'of the config: {_some(lacking)}; the file has '
                f'{_some(names)}. {fix}')
        dropped = [name for name in names if name not in classes]
        if dropped and not allow_subset:
            found.problem(
                'categories', self.key,
                f'{where} has {len(dropped)} categories that the config '
                f'lacks: {_some(dropped)}; their annotations would be '
                f'dropped. {fix}, or pass --allow-subset if that is wanted')
        if not lacking:
            shared = [name for name in names if name in classes]
            if shared != list(classes):
                found.problem(
                    'categories', self.key,
                    f'{where} lists the classes in another order than the '
                    f'config: file {_some(shared)}, config {_some(classes)}. '
                    'mmdet numbers labels in the order of the file, so the '
                    'names would be mixed up. Use the order of the file')


def _some(names: Sequence[str]) -> str:
    """The first ten of the names."""
    text = ', '.join(repr(name) for name in names[:10])
    return text + (f' and {len(names) - 10} more' if len(names) > 10 else '')


def find_class(kind: object, scope: str | None) -> type | None:
    """The class of a dataset type, None if no registry knows it."""
    if isinstance(kind, type):
        return kind
    if not isinstance(kind, str):
        return None
    if '.' in kind:
        scope, kind = kind.split('.', 1)
    if scope is None:
        return None
    try:
        registry = import_module(f'{scope}.registry')
    except ModuleNotFoundError as error:
        if error.name not in (scope, f'{scope}.registry'):
            raise
        return None
    return registry.DATASETS.get(kind)


def inherits(cls: type | None, module: str, name: str, method: str) -> bool:
    """Whether ``cls`` has ``method`` unchanged from class ``name``.

    Classes are compared by name so that no host is imported for a config
    which does not use it.
    """
    if cls is None:
        return False
    return any(base.__module__ == module and base.__name__ == name
               and getattr(cls, method) is getattr(base, method)
               for base in cls.__mro__)
