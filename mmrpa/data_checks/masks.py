"""Checks of label maps for semantic segmentation, and of their images."""

import os
import os.path as osp
from collections import Counter
from typing import NamedTuple

from .context import Context, Histogram
from .findings import EXAMPLES
from .ignored import Consumer
from .images import ImageFacts, read_labels
from .loaders import map_decoder, step_name

# The value that mmseg ignores by default, and what else its loader makes of
# that by a cast to a byte: all ones, of more bits.
_IGNORED = 255
_ALL_ONES = frozenset((_IGNORED, 2**16 - 1, -1))
_MOST_VALUES = 1000  # wrong ones that are remembered, as floats can be many
_SURE = 32  # maps that say enough about a whole set


class _Pair(NamedTuple):
    """Paths of an image and of its label map ('' for a set without)."""

    image: str
    labels: str


class _PairFacts(NamedTuple):
    image: ImageFacts | None
    labels: ImageFacts | None


def check_label_maps(context: Context) -> Histogram | None:
    """Check an mmseg BaseSegDataset; returns pixels by class."""
    try:
        pairs = _list_pairs(context)
    except (OSError, UnicodeDecodeError) as error:
        context.add('no-images', f'the images cannot be listed: {error}')
        return None
    if not pairs:
        dataset = context.dataset
        context.add('no-images', f'{dataset.data_prefix.get("img_path")}: no '
                    f'file ends in {dataset.img_suffix!r}')
        return None
    return _LabelCheck(context, context.subset(pairs)).check()


def _list_pairs(context: Context) -> list[_Pair]:
    """The pairs as BaseSegDataset lists them."""
    dataset = context.dataset
    images = dataset.data_prefix.get('img_path') or ''
    # An unlabelled test set has a pipeline that loads images only.
    maps = dataset.data_prefix.get('seg_map_path') if map_decoder(
        context.steps) else None
    if maps is None and any('Annotation' in step_name(step)
                            for step in context.steps):
        context.note('unchecked', 'the pipeline has no LoadAnnotations with '
                     'OpenCV or Pillow, so its label maps were not read')
    if dataset.ann_file and not osp.isdir(dataset.ann_file):
        with open(dataset.ann_file, encoding='utf-8') as file:
            stems = [line.strip() for line in file]
    else:
        stems = sorted(_find(context, images, dataset.img_suffix),
                       key=lambda stem: stem + dataset.img_suffix)
        if maps is not None and not context.options.quick:
            _note_lonely(context, maps, stems)
    return [
        _Pair(
            osp.join(images, stem + dataset.img_suffix),
            osp.join(maps, stem + dataset.seg_map_suffix)
            if maps is not None else '') for stem in stems
    ]


def _note_lonely(context: Context, maps: str, stems: list[str]) -> None:
    """Note label maps that no image belongs to."""
    suffix = context.dataset.seg_map_suffix
    lonely = sorted(set(_find(context, maps, suffix)) - set(stems))
    if lonely and stems:
        context.note(
            'map-without-image', f'{len(lonely)} label maps have no image '
            f'and are left out, such as {osp.join(maps, lonely[0] + suffix)!r}'
        )


def _find(context: Context, folder: str, suffix: str) -> list[str]:
    """Files below a folder, without the suffix, relative to it."""
    found = []
    for root, _, names in os.walk(folder, onerror=context.report_folder,
                                  followlinks=True):
        for name in names:
            if name.endswith(suffix) and not name.startswith('.'):
                path = osp.relpath(osp.join(root, name), folder)
                found.append(path[:len(path) - len(suffix)])
    return found


class _LabelCheck:
    """The checks of one dataset's maps.

    Values are those in the files. Labels are what mmseg's loader makes of
    them: with reduce_zero_label, value 0 is label 255 and value v is v - 1.
    """

    def __init__(self, context: Context, pairs: list[_Pair]) -> None:
        dataset = context.dataset
        self.context = context
        self.pairs = pairs
        self.reduced = bool(dataset.reduce_zero_label)
        self.label_map = getattr(dataset, 'label_map', None) or {}
        classes = dataset.metainfo.get('classes') or ()
        self.num_classes = len(classes)
        # A selection of the type's own classes: the files have them all.
        self.names = list(
            type(dataset).METAINFO['classes'] if self.label_map else classes)
        self.pixels: Counter = Counter()
        self.images: Counter = Counter()
        self.ignore_index = getattr(dataset, 'ignore_index', _IGNORED)
        # The loss ignores what its head is told; mmseg has no use for the
        # dataset's.
        self.unheard = self.ignore_index != _IGNORED and any(
            consumer.ignored != self.ignore_index
            for consumer in context.usage.consumers)
        self.num_maps = 0
        self.strange: set[float] = set()  # values that are outside
        self.outside: list[tuple[str, list]] = []  # examples of maps
        self.num_outside = 0

    def check(self) -> Histogram:
        """Read all pairs and judge them together."""
        sampled = self.context.is_sampled(len(self.pairs))
        self._check_pipeline()
        if self.names:
            self._note_paddings()
        reader = self.context.image_reader()
        decoder = map_decoder(self.context.steps)

        def read(pair: _Pair) -> _PairFacts:
            return _PairFacts(
                reader(pair.image) if reader else None,
                read_labels(pair.labels, decoder) if pair.labels else None)

        for pair, facts in self.context.read(
                self.pairs, lambda pair: pair, read):
            readable = facts.image is not None and self.context.report_image(
                pair.image, facts.image)
            if facts.labels is not None and self.context.report_file(
                    pair.labels, facts.labels, 'missing-label-map'):
                self._check_map(pair.labels, facts.labels,
                                facts.image.size if readable else None)
        if self.names:
            self._judge_values(sampled)
        return self._histogram(sampled)

    def _check_pipeline(self) -> None:
        """Find a reduction that the transform does and the dataset not."""
        for step in self.context.steps:
            value = step.get('reduce_zero_label')
            if (step_name(step) == 'LoadAnnotations'
                    and value is not None and value != self.reduced):
                self.context.add(
                    'reduce-zero-label', 'reduce_zero_label is '
                    f'{self.reduced} of the dataset and {value} of '
                    'LoadAnnotations, which stops with an assertion')

    def _note_paddings(self) -> None:
        """Note what would stop the loss as soon as an image is padded."""
        for key, label in dict.fromkeys(self.context.usage.paddings):
            refusing = [
                str(consumer) for consumer in self.context.usage.consumers
                if consumer.key.startswith('model.')
                and consumer.ignored != label
            ]
            if refusing and not 0 <= label < self.num_classes:
                self.context.note(
                    'padding', f'{key}={label} is the label of what is padded:'
                    f' no class, and not ignored by {", ".join(refusing)}. '
                    'The loss stops at the first image that is padded')

    def _check_map(self, path: str, facts: ImageFacts,
                   size: tuple[int, int] | None) -> None:
        if size is not None and facts.size != size:
            self.context.add(
                'label-map-size', f'{path}: {facts.size[0]}x{facts.size[1]}, '
                f'its image {size[0]}x{size[1]} (width x height)')
        if facts.format == 'JPEG':
            self.context.add('label-map-lossy', path)
            return
        if not facts.counts:
            self.context.add('label-map-rgb', f'{path}: {facts.mode}')
            return
        self.num_maps += 1
        outside = []
        for value, number in facts.counts.items():
            if self._is_inside(value):
                self.pixels[value] += number
                self.images[value] += 1
            else:
                outside.append(value)
        if outside:
            self.num_outside += 1
            if len(self.outside) < EXAMPLES:
                self.outside.append((path, outside[:5]))
            if len(self.strange) < _MOST_VALUES:
                self.strange.update(outside)

    def _label(self, value: float) -> int | None:
        """What the loader makes of a value; None if it cuts it off."""
        if value in _ALL_ONES:
            value = _IGNORED
        # NaN and infinity are no integers.
        elif not (float(value).is_integer() and 0 <= value < _IGNORED):
            return None
        if self.reduced and value != _IGNORED:
            value = value - 1 if value else _IGNORED
        label = self.label_map.get(int(value), int(value))
        return _IGNORED if label == -1 else label  # -1: of older releases

    def _refusing(self, value: float) -> list[Consumer]:
        """To whom a value is neither a class nor to be ignored."""
        label = self._label(value)
        if label is not None and label < self.num_classes:
            return []
        return [consumer for consumer in self.context.usage.consumers
                if label is None or consumer.ignored != label]

    def _is_inside(self, value: float) -> bool:
        if self.context.usage.consumers and self.names:
            return not self._refusing(value)
        label = self._label(value)
        return label is not None and (
            not self.names or label < self.num_classes
            or label in (_IGNORED, self.ignore_index)
            or label in self.context.usage.ignorable)

    def _judge_values(self, sampled: bool) -> None:
        number = len(self.names)
        if (not self.reduced and self.strange == {number}
                and all(consumer.ignored != number
                        for consumer in self.context.usage.consumers)):
            zero = 'and' if 0 in self.pixels else 'without'
            self.context.add(
                'reduce-zero-label',
                f'reduce_zero_label=False, but the labels go to {number}, '
                f'{zero} 0, and {number} classes are 0 to {number - 1}. If 0 '
                'stands for no class, set reduce_zero_label=True; else '
                'correct the labels, such as in ' + self.outside[0][0])
            return
        unheard = (f'; ignore_index={self.ignore_index} of the dataset is '
                   'nothing to the loss, set it of all heads'
                   if self.unheard else '')
        for index, (path, values) in enumerate(self.outside):
            self.context.add(
                'label-range', f'{path}: {values}; {number} classes with '
                f'reduce_zero_label={self.reduced} have the labels '
                f'{1 if self.reduced else 0} to '
                f'{number if self.reduced else number - 1}'
                + self._explain(values) + unheard,
                # the first stands for those that are no examples
                1 if index else 1 + self.num_outside - len(self.outside))
        if self.strange:
            return
        if self.reduced and number > 1:
            self._judge_reduction(sampled)
        if not self.reduced and number == 2:
            self._judge_binary(sampled)

    def _explain(self, values: list[float]) -> str:
        """What becomes of values, and who does not ignore them."""
        made = [value for value in values
                if value != _IGNORED and self._label(value) == _IGNORED]
        text = f'; {made} become {_IGNORED} when loaded' if made else ''
        refusing = dict.fromkeys(
            str(consumer) for value in values
            for consumer in self._refusing(value))
        if refusing:
            text += '; not ignored by ' + ', '.join(refusing)
        return text

    def _judge_binary(self, sampled: bool) -> None:
        """Find masks as painting programs write them, of black and white."""
        values = set(self.pixels)
        if 0 not in values or not values - {0} or values - {0} - _ALL_ONES:
            return
        text = (f'{self.num_maps} label maps have the labels '
                f'{sorted(values)} only, so class {self.names[1]!r} gets no '
                'pixel')
        if sampled and self.num_maps < _SURE:
            self.context.note('sampled', text + ' (seen in a part only)')
        else:
            self.context.add('label-map-binary', text)

    def _judge_reduction(self, sampled: bool) -> None:
        """Find labels that start at 0 though the type drops the 0."""
        number = len(self.names)
        if number in self.pixels or any(v not in self.pixels
                                        for v in range(number)):
            return
        text = (f'reduce_zero_label=True drops label 0, and no label is '
                f'{number}: class {self.names[0]!r} gets the pixels of label '
                f'1, and the last, {self.names[-1]!r}, gets none. If the '
                f'labels are 0 to {number - 1}, set reduce_zero_label=False')
        if sampled:
            self.context.note('sampled', text + ' (seen in a part only)')
        else:
            self.context.add('reduce-zero-label', text)

    def _histogram(self, sampled: bool) -> Histogram:
        histogram = Histogram('pixels', total=len(self.pairs))
        for index, name in enumerate(self.names):
            value = index + 1 if self.reduced else index
            histogram.samples[name] = self.pixels[value]
            histogram.images[name] = self.images[value]
        if not sampled and self.pixels:
            self.context.note_lacking(histogram)
        return histogram
