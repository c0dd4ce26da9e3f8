"""Checks of classification sets: folders of classes, or a list of files."""

import os
import os.path as osp
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from .context import Context, Histogram


class _Sample(NamedTuple):
    path: str
    label: int  # -1 without labels


def check_folders(context: Context) -> Histogram | None:
    """Check an mmpretrain CustomDataset; returns images by class."""
    dataset = context.dataset
    classes = dataset.CLASSES
    try:
        if dataset.ann_file:
            samples = list(_read_list(context, classes))
        elif dataset.with_label:
            folders = _check_class_folders(context, classes)
            classes = classes or folders
            samples = list(_walk_folders(context, folders))
        else:
            samples = [_Sample(path, -1)
                       for path in _walk(context, dataset.img_prefix)]
    except (OSError, UnicodeDecodeError) as error:
        context.add('no-images', f'the images cannot be listed: {error}')
        return None
    if not samples:
        context.add('no-images', f'{dataset.ann_file}: lists no image'
                    if dataset.ann_file else f'{dataset.img_prefix}: no file '
                    'ends in ' + ', '.join(sorted(dataset.extensions)))
        return None
    if context.is_subset:
        if not dataset.ann_file:  # else they are in the order of the list
            samples.sort(key=lambda sample: (sample.label, sample.path))
        samples = context.subset(samples)
    reader = context.image_reader()
    if reader is not None:
        context.is_sampled(len(samples))
        for sample, facts in context.read(
                samples, lambda sample: sample.path, reader):
            context.report_image(sample.path, facts)
    return _histogram(context, samples, classes)


def _check_class_folders(context: Context,
                         classes: Sequence[str] | None) -> list[str]:
    """Compare folders and classes; returns the folders, sorted."""
    root = context.dataset.img_prefix
    with os.scandir(root) as entries:
        listed = sorted(entry.name for entry in entries if entry.is_dir())
    folders = [name for name in listed if not name.startswith('.')]
    for name in listed:
        if name.startswith('.'):
            context.add('hidden-folder', osp.join(root, name))
    # Names that have nothing in common, as in ImageNet (n01440764 and
    # 'tench'), cannot be compared. Their number is preflight's business.
    if (classes is not None and len(classes) == len(folders)
            and set(classes) & set(folders) and list(classes) != folders):
        first = next(i for i, name in enumerate(folders)
                     if classes[i] != name)
        context.add('class-order', f'{root}: class {first} is '
                    f'{classes[first]!r}, sorted folder {first} is '
                    f'{folders[first]!r}')
    return folders


def _walk_folders(context: Context,
                  folders: Sequence[str]) -> Iterator[_Sample]:
    most = None
    if (context.options.quick and context.options.max_images is not None
            and not context.is_subset):
        most = max(1, context.options.max_images // max(1, len(folders)))
    cut = False
    for label, name in enumerate(folders):
        folder = osp.join(context.dataset.img_prefix, name)
        number = 0
        paths = (_walk(context, folder) if most is None else
                 islice(_scan(context, folder), most))
        for path in paths:
            number += 1
            yield _Sample(path, label)
        cut |= number == most
        if number == 0:
            context.add('empty-class-folder', folder)
    if cut:
        context.note('sampled', f'of each folder, the first {most} images '
                     'were listed')


def _scan(context: Context, folder: str) -> Iterator[str]:
    """Like :func:`_walk`, but as the disk has them: nothing is sorted.

    So no folder is listed further than the caller goes.
    """
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif (not entry.name.startswith('.') and entry.name.lower()
                          .endswith(context.dataset.extensions)):
                        yield entry.path
        except OSError as error:
            context.report_folder(error)


def _walk(context: Context, folder: str) -> Iterator[str]:
    """Files that the dataset reads; notes those that it does not."""
    skipped: list[str] = []
    for root, folders, names in os.walk(
            folder, onerror=context.report_folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.startswith('.'):
                continue
            if name.lower().endswith(context.dataset.extensions):
                yield osp.join(root, name)
            else:
                skipped.append(osp.join(root, name))
    if skipped:
        context.note(
            'skipped-file', f'{len(skipped)} files in {folder!r} have no '
            f"image's suffix and are left out, such as {skipped[0]!r}")


def _read_list(context: Context,
               classes: Sequence[str] | None) -> Iterator[_Sample]:
    """Samples of a list 'PATH LABEL', as mmpretrain splits its lines."""
    dataset = context.dataset
    with open(dataset.ann_file, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            where = f'{dataset.ann_file}:{number}'
            line = line.rstrip('\n')
            if not dataset.with_label:
                yield _Sample(osp.join(dataset.img_prefix, line), -1)
                continue
            parts = line.strip().rsplit(' ', 1)
            try:
                label = int(parts[1])
            except (IndexError, ValueError):
                context.add('list-line', f'{where}: {line[:60]!r}')
                continue
            if label < 0 or (classes is not None and label >= len(classes)):
                most = 'unknown' if classes is None else len(classes)
                context.add('list-label', f'{where}: label {label}; '
                            f'number of classes: {most}')
            yield _Sample(osp.join(dataset.img_prefix, parts[0]), label)


def _histogram(context: Context, samples: list[_Sample],
               classes: Sequence[str] | None) -> Histogram:
    counts = Counter(sample.label for sample in samples)
    histogram = Histogram('images', total=len(samples))
    if counts.keys() == {-1}:
        return histogram
    for index, name in enumerate(classes or ()):
        histogram.samples[name] = histogram.images[name] = counts[index]
    if not context.options.quick:
        context.note_lacking(histogram)
    return histogram
