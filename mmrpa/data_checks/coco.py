"""Checks of annotation files in COCO's format, and of their images."""

import json
import math
import os.path as osp
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..preflight import inherits, type_name
from .context import Context, Histogram
from .rle import RLEError, check_rle

_LARGEST = 2**53  # greater integers are no pixels, and no doubles
_QUICK_SIZE = 50 * 2**20  # bytes; parsed in about a second
_TOLERANCE = 1.0  # pixels; COCO's own boxes reach out by rounding
# (id, image) of the annotations of COCO's own training set whose boxes have
# no height. mmdet drops them, so they are no reason to change its file.
_FLAT_IN_COCO = frozenset(((918, 200365), (2206849, 550395)))


def check_coco(context: Context) -> Histogram | None:
    """Check an mmdet CocoDataset; returns boxes by class, without crowds.

    The file is parsed whole, as mmdet does.
    """
    dataset = context.dataset
    path = dataset.ann_file
    if context.options.quick and osp.getsize(path) > _QUICK_SIZE:
        context.note(
            'sampled', f'{path!r} has {osp.getsize(path) / 2**20:.0f} MB: its '
            'annotations and images were left out')
        return None
    content = _load(context, path)
    if content is None:
        return None
    check = _CocoCheck(context)
    check.check_entries(content)
    # Reading the images takes long; the annotations take most of the memory.
    content.clear()
    check.check_files()
    return check.histogram


def _load(context: Context, path: str) -> dict | None:
    """Parse a file that has at least the three lists.

    COCO's own files for a test without labels have no annotations.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        context.add('annotation-file', f'{path}: not valid JSON: {error}')
        return None
    if not isinstance(content, dict):
        context.add('annotation-file', f'{path}: holds a '
                    f'{type(content).__name__} and no object')
        return None
    if getattr(context.dataset, 'test_mode', False):
        content.setdefault('annotations', [])
    lacking = [key for key in ('images', 'annotations', 'categories')
               if not isinstance(content.get(key), list)]
    for key in lacking:
        context.add('annotation-file', f'{path}: has no list {key!r}')
    return None if lacking else content


def _is_id(value: object, kind: type = int) -> bool:
    """Whether a value is text, or the number of something."""
    if kind is int and type(value) is float:
        return value.is_integer()
    return type(value) is kind


def _kind_of_ids(entries: list) -> type:
    """str if all ids are text, as mmdet takes them, too; else int."""
    return str if entries and all(
        isinstance(entry, dict) and type(entry.get('id')) is str
        for entry in entries) else int


def _is_evaluated(context: Context) -> bool:
    """Whether pycocotools reads the file for a metric."""
    return any(
        type_name(metric) == 'CocoMetric' and not metric.get('format_only')
        and isinstance(metric.get('ann_file'), str)
        and osp.exists(metric['ann_file'])
        and osp.samefile(metric['ann_file'], context.dataset.ann_file)
        for metric in context.usage.metrics)


def _is_number(value: object) -> bool:
    """An integer or a float, NaN and infinity included."""
    return type(value) is float or (type(value) is int
                                    and abs(value) <= _LARGEST)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + '...'


class _CocoCheck:
    """The checks of one parsed file."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.evaluated = _is_evaluated(context)
        self.image_ids = self.category_ids = int  # or str
        self.images: dict[int | str, dict] = {}
        # Ids of entries that are wrong themselves: what refers to them is
        # not told once more.
        self.excused: set = set()
        self.categories: dict[int | str, str] = {}
        self.chosen: set = set()  # categories of the dataset's classes
        self.annotation_ids: set = set()
        self.boxes: Counter = Counter()  # by category, without crowds
        self.occurs: Counter = Counter()  # images by category
        self.seen: dict[int | str, set] = {}  # categories by image
        self.crowds: set = set()  # images with a crowd
        self.filled: set = set()  # images that filter_empty_gt keeps
        self.kept: list[dict] = []  # images that mmdet does not leave out
        self.drops_empty = False
        self.tiny = 0
        self.loads_masks = any(step.get('with_mask')
                               for step in context.steps)
        self.ignores_rle = 'train' in context.usage.splits and any(
            step.get('with_mask') and not step.get('poly2mask', True)
            for step in context.steps)
        self.histogram = Histogram('boxes')

    def check_entries(self, content: dict) -> None:
        """Check all that is in the file."""
        self.image_ids = _kind_of_ids(content['images'])
        self.category_ids = _kind_of_ids(content['categories'])
        self._check_categories(content['categories'])
        for number, entry in enumerate(content['images']):
            self._check_image(number, entry)
        if not content['images']:
            self.context.add('no-images', f'{self.context.dataset.ann_file}: '
                             "the list 'images' is empty")
        for number, entry in enumerate(content['annotations']):
            self._check_annotation(number, entry)
        self._filter_images()
        self._note_images()
        self._fill_histogram(bool(content['annotations']))

    def check_files(self) -> None:
        """Check the images themselves."""
        prefixes = self.context.dataset.data_prefix
        prefix = prefixes.get('img') or ''
        if prefixes.get('seg') and any(step.get('with_seg')
                                       for step in self.context.steps):
            self.context.note('unchecked', 'the label maps that with_seg '
                              'loads were not read')
        entries = self.context.subset(self.kept)
        reader = self.context.image_reader()
        if reader is None:
            return
        self.context.is_sampled(len(entries))

        def path_of(entry: dict) -> str:
            return osp.join(prefix, entry['file_name'])

        for entry, facts in self.context.read(entries, path_of, reader):
            if not self.context.report_image(
                    path_of(entry), facts,
                    f'{path_of(entry)} (image {entry["id"]})'):
                continue
            size = (entry['width'], entry['height'])
            if size != facts.size:
                self.context.add(
                    'image-size', f'{path_of(entry)} (image {entry["id"]}): '
                    f'{facts.size[0]}x{facts.size[1]}, annotated as '
                    f'{size[0]}x{size[1]} (width x height)')

    def _check_categories(self, entries: list) -> None:
        names: set[str] = set()
        for number, entry in enumerate(entries):
            if not (isinstance(entry, dict)
                    and _is_id(entry.get('id'), self.category_ids)
                    and isinstance(entry.get('name'), str)):
                self.context.add(
                    'annotation-file', f'categories[{number}] is '
                    f'{_short(entry)}; it needs an integer id and a name')
                if isinstance(entry, dict):
                    self._excuse(entry.get('id'))
                continue
            if entry['id'] in self.categories or entry['name'] in names:
                self.context.add(
                    'duplicate-category', f'categories[{number}]: id '
                    f'{entry["id"]}, name {entry["name"]!r}')
            names.add(entry['name'])
            self.categories.setdefault(entry['id'], entry['name'])
        classes = self.context.dataset.metainfo['classes']
        self.chosen = {number for number, name in self.categories.items()
                       if name in classes}

    def _excuse(self, value: Any) -> None:
        """Do not report what refers to the entry with this wrong id."""
        if isinstance(value, (str, int, float)):
            self.excused.add(value)
        if isinstance(value, str) and value.isdecimal() and len(value) < 20:
            self.excused.add(int(value))

    def _check_image(self, number: int, entry: object) -> None:
        wrong = list(_image_errors(entry, self.image_ids))
        if wrong:
            self.context.add('image-entry',
                             f'images[{number}]: ' + '; '.join(wrong))
            if isinstance(entry, dict):
                self._excuse(entry.get('id'))
            return
        if entry['id'] in self.images:
            first = self.images[entry['id']]['file_name']
            self.context.add(
                'duplicate-image-id', f'image {entry["id"]}: {first!r} and '
                f'{entry["file_name"]!r}')
            return
        self.images[entry['id']] = {
            key: entry[key]
            for key in ('id', 'file_name', 'width', 'height')
        }

    def _check_annotation(self, number: int, entry: object) -> None:
        wrong = list(_annotation_errors(entry, self.image_ids,
                                        self.category_ids, self.evaluated))
        if wrong:
            self.context.add('annotation-entry',
                             f'annotations[{number}]: ' + '; '.join(wrong))
            if isinstance(entry, dict) and _is_id(entry.get('image_id'),
                                                  self.image_ids):
                # it has one, even if it is wrong
                self.seen.setdefault(entry['image_id'], set())
                self.filled.add(entry['image_id'])
            return
        image_id, category = entry['image_id'], entry['category_id']
        image = self.images.get(image_id)
        name = f'annotation {entry["id"]} (image {image_id}' + (
            f', {image["file_name"]!r})' if image else ')')
        if entry['id'] in self.annotation_ids:
            self.context.add('duplicate-annotation-id', name)
        self.annotation_ids.add(entry['id'])
        if image is None and image_id not in self.excused:
            self.context.add('unknown-image', name)
        if category not in self.categories and category not in self.excused:
            self.context.add('unknown-category',
                             f'{name}: category {category}')
        if category in self.chosen or category not in self.categories:
            self.filled.add(image_id)  # the second is told above
        known = self.seen.setdefault(image_id, set())
        if entry.get('ignore'):
            return  # mmdet reads no more of it
        if entry.get('iscrowd'):
            self.crowds.add(image_id)
        else:
            self.boxes[category] += 1
            if category not in known:
                known.add(category)
                self.occurs[category] += 1
        if category not in self.chosen:
            return
        if self._check_box(entry, image, name) and self.loads_masks:
            self._check_mask(entry, image, name)

    def _check_box(self, entry: dict, image: dict | None,
                   name: str) -> bool:
        """Returns whether mmdet goes on to the mask."""
        box, area = entry['bbox'], entry['area']
        if not all(map(math.isfinite, (*box, area))):
            self.context.add('not-finite',
                             f'{name}: bbox {box}, area {area}')
            return False
        x, y, width, height = box
        if width <= 0 or height <= 0:
            if (entry['id'], entry['image_id']) in _FLAT_IN_COCO:
                self.tiny += 1
                return False
            self.context.add('box-empty', f'{name}: bbox {box}')
            return False
        tiny = width < 1 or height < 1
        self.tiny += tiny
        if area <= 0:
            self.context.add('area-empty', f'{name}: area {area}')
        if image is not None and not (
                x >= -_TOLERANCE and y >= -_TOLERANCE
                and x + width <= image['width'] + _TOLERANCE
                and y + height <= image['height'] + _TOLERANCE):
            self.context.add(
                'box-outside', f'{name}: bbox {box} in an image of '
                f'{image["width"]}x{image["height"]}')
        return area > 0 and not tiny

    def _check_mask(self, entry: dict, image: dict | None,
                    name: str) -> None:
        mask = entry.get('segmentation')
        if not mask:
            self.context.add('mask-missing',
                             f'{name}: segmentation is {mask!r}')
        elif isinstance(mask, list):
            for polygon in mask:
                self._check_polygon(polygon, name)
        elif isinstance(mask, dict) and image is not None:
            try:
                check_rle(mask, image['width'], image['height'])
            except RLEError as error:
                self.context.add('rle-malformed', f'{name}: {error}')
            if self.ignores_rle and not entry.get('iscrowd'):
                self.context.add('mask-ignored', name)
        elif not isinstance(mask, dict):
            self.context.add('annotation-entry',
                             f'{name}: segmentation is {_short(mask)}')

    def _check_polygon(self, polygon: Any, name: str) -> None:
        try:
            if not isinstance(polygon, list):
                raise TypeError('a list is needed')
            # NaN and infinity stay in a sum.
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            self.context.add('annotation-entry', f'{name}: segmentation has '
                             f'{_short(polygon)}, no list of numbers')
            return
        if len(polygon) % 2:
            self.context.add('polygon-odd',
                             f'{name}: {len(polygon)} coordinates')
        elif len(polygon) < 6:
            self.context.add('polygon-short',
                             f'{name}: {len(polygon) // 2} points')
        if not finite:
            self.context.add('not-finite',
                             f'{name}: segmentation {_short(polygon)}')

    def _filter_images(self) -> None:
        """Leave out what mmdet does; no file of these is opened."""
        dataset, context = self.context.dataset, self.context
        filter_cfg = getattr(dataset, 'filter_cfg', None) or {}
        if getattr(dataset, 'test_mode', False) or not inherits(
                type(dataset), 'mmdet.datasets.coco', 'CocoDataset',
                'filter_data'):  # another rule is not known here
            filter_cfg = {}
        elif not isinstance(filter_cfg, Mapping):
            context.add('dataset-arguments', f'{context.where}: filter_cfg is '
                        f'{_short(filter_cfg)}, no dict')
            filter_cfg = {}
        self.drops_empty = bool(filter_cfg.get('filter_empty_gt', False))
        least = filter_cfg.get('min_size', 0)
        if not _is_number(least):
            context.add('dataset-arguments', f'{context.where}: min_size of '
                        f'filter_cfg is {_short(least)}, no number')
            least = 0
        small = [entry for entry in self.images.values()
                 if min(entry['width'], entry['height']) < least]
        lacking = [number for number in self.images
                   if number not in self.filled] if self.drops_empty else []
        dropped = {entry['id'] for entry in small}.union(lacking)
        self.kept = [entry for entry in self.images.values()
                     if entry['id'] not in dropped]
        if self.images and not self.kept:
            context.add('no-images', f'{dataset.ann_file}: filter_cfg='
                        f'{dict(filter_cfg)} leaves none of '
                        f'{len(self.images)} images')
            return
        if small:
            context.note(
                'filtered-image', f'{len(small)} images are left out as they '
                f'are smaller than min_size={least}, the first is image '
                f'{small[0]["id"]}')
        other = [number for number in lacking if number in self.seen]
        if other:
            context.note(
                'filtered-image', f'{len(other)} images are left out as they '
                'have annotations of other classes only '
                f'(filter_empty_gt=True), the first is image {other[0]}')

    def _note_images(self) -> None:
        """Note images with nothing to learn from, and how mmdet takes them."""
        context = self.context
        bare = [i for i in self.images if i not in self.seen]
        # A wrong annotation leaves an empty set, too, but it is told already.
        crowded = [i for i in self.crowds if not self.seen[i]]
        if bare:
            context.note(
                'no-annotations',
                f'{len(bare)} of {len(self.images)} images have no '
                f'annotations, the first is image {bare[0]}; they are '
                + ('left out (filter_empty_gt=True)' if self.drops_empty else
                   'kept, as images without objects'))
        if crowded:
            context.note(
                'crowd-only',
                f'{len(crowded)} images have crowd annotations only, the '
                f'first is image {min(crowded)}; they are kept, with nothing '
                'to find' + (', in spite of filter_empty_gt=True'
                             if self.drops_empty else ''))
        if self.tiny:
            context.note('box-tiny', f'{self.tiny} boxes are narrower or '
                         'lower than a pixel; mmdet drops them')
        files = Counter(e['file_name'] for e in self.images.values())
        twice = [name for name, number in files.items() if number > 1]
        if twice:
            context.note('duplicate-file', f'{len(twice)} images are listed '
                         f'more than once, such as {twice[0]!r}')

    def _fill_histogram(self, has_annotations: bool) -> None:
        self.histogram.total = len(self.images)
        for number, name in self.categories.items():
            self.histogram.samples[name] = self.boxes[number]
            self.histogram.images[name] = self.occurs[number]
        if has_annotations:  # else it is told already
            self.context.note_lacking(self.histogram)


def _image_errors(entry: object, kind: type) -> Iterator[str]:
    """What is wrong with the form of an entry of 'images'."""
    if not isinstance(entry, dict):
        yield f'{_short(entry)} is no object'
        return
    if not _is_id(entry.get('id'), kind):
        yield f'id is {_short(entry.get("id"))}'
    name = entry.get('file_name')
    if not isinstance(name, str) or not name or '\0' in name:
        yield f'file_name is {_short(name)}'
    for key in ('width', 'height'):
        value = entry.get(key)
        if not (_is_number(value) and math.isfinite(value) and value > 0):
            yield f'{key} is {_short(value)}'


def _annotation_errors(entry: object, images: type, categories: type,
                       evaluated: bool) -> Iterator[str]:
    """What is wrong with the form of an entry of 'annotations'."""
    if not isinstance(entry, dict):
        yield f'{_short(entry)} is no object'
        return
    # pycocotools makes numbers of the annotations' ids, mmdet does not.
    if not (_is_id(entry.get('id'))
            or (type(entry.get('id')) is str and not evaluated)):
        yield f'id is {_short(entry.get("id"))}'
    for key, kind in (('image_id', images), ('category_id', categories)):
        if not _is_id(entry.get(key), kind):
            yield f'{key} is {_short(entry.get(key))}'
    if entry.get('ignore') and not evaluated:
        return  # mmdet reads no more of it
    box = entry.get('bbox')
    if not (isinstance(box, list) and len(box) == 4
            and all(map(_is_number, box))):
        yield f'bbox is {_short(box)}'
    if not _is_number(entry.get('area')):
        yield f'area is {_short(entry.get("area"))}'
    crowd = entry.get('iscrowd')
    if crowd is None and evaluated:
        yield f'iscrowd is {_short(crowd)}, and CocoMetric needs it'
    elif crowd not in (None, 0, 1):
        yield f'iscrowd is {_short(crowd)}'
