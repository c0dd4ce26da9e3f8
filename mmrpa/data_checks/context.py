"""What the checks of all kinds of datasets share."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from .findings import Findings
from .ignored import Consumer
from .images import (
    ImageFacts,
    read_all,
    read_image,
    spread,
    stops_loader,
)
from .loaders import ignores_empty, image_decoder

_SECONDS = 5  # between two lines of progress


class Options(NamedTuple):
    """How much to read.

    Attributes:
        max_images (int | None): Files to open of each dataset, spread
            evenly; None for all.
        workers (int): Threads that read; 0 for none.
        quick (bool): Leave out what takes longer than seconds.
        progress (bool): Report to stderr.
    """

    max_images: int | None = None
    workers: int = 2
    quick: bool = False
    progress: bool = False


@dataclass
class Histogram:
    """Samples by class.

    Attributes:
        unit (str): What ``samples`` counts: 'boxes', 'pixels' or 'images'.
        samples (dict[str, int]): By name of the class.
        images (dict[str, int]): Images in which the class occurs.
        total (int): Images of the dataset.
    """

    unit: str
    samples: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    total: int = 0


class Usage(NamedTuple):
    """What a dataset is used for.

    Attributes:
        splits (tuple[str]): Those that use it: 'train' and so on.
        metrics (tuple[Mapping]): The evaluators of these splits.
        consumers (tuple[Consumer]): What is given the labels of the maps in
            these splits; empty if that is not known.
        ignorable (frozenset[int]): Labels that may be ignored in that case.
        paddings (tuple[tuple[str, int]]): Where a training pads label maps,
            and with which label.
    """

    splits: tuple[str, ...] = ()
    metrics: tuple[Mapping, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    ignorable: frozenset[int] = frozenset()
    paddings: tuple[tuple[str, int], ...] = ()


@dataclass
class Context:
    """A dataset under check.

    Attributes:
        where (str): Its dotted key in the config.
        dataset: The host's dataset, built without its data and pipeline.
        findings (Findings): Where to report.
        options (Options): How much to read.
        steps (list[Mapping]): The transforms of its pipeline, those within
            others included.
        usage (Usage): What the dataset is used for.
        unread (list[str]): Files that there was too little memory for.
        skipped (list[tuple[str, str]]): (kind, path and error) of images that
            the pipeline replaces by others, as it cannot read them.
    """

    where: str
    dataset: Any
    findings: Findings
    options: Options
    steps: list[Mapping] = field(default_factory=list)
    usage: Usage = Usage()
    unread: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, code: str, example: str, count: int = 1) -> None:
        """Report a problem, or several like the example."""
        self.findings.add(code, self.where, example, count)

    def note(self, code: str, text: str) -> None:
        """Report a note."""
        self.findings.note(code, self.where, text)

    def is_sampled(self, total: int) -> bool:
        """Whether some of ``total`` files are left out; says so if it is."""
        most = self.options.max_images
        if most is None or most >= total:
            return False
        self.note('sampled', f'{most} of {total} images were read')
        return True

    def image_reader(self) -> Callable[[str], ImageFacts] | None:
        """What reads images as the pipeline does.

        Returns:
            callable, optional: None if the pipeline has a loader of its own,
            which may read anything; that is noted.
        """
        decoder = image_decoder(self.steps)
        if decoder is None:
            self.note('unchecked', 'the pipeline has no LoadImageFromFile '
                      'with OpenCV or Pillow, so its images were not read')
            return None
        return partial(read_image, decoder=decoder)

    def read(self, items: list[Any], path_of: Callable[[Any], Any],
             function: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        """Read the files of the chosen items, with progress."""
        chosen = spread(items, self.options.max_images)
        told = time.monotonic()
        pairs = read_all(lambda item: function(path_of(item)), chosen,
                         self.options.workers)
        for number, pair in enumerate(pairs, 1):
            yield pair
            if (self.options.progress
                    and time.monotonic() - told >= _SECONDS):
                told = time.monotonic()
                print(f'check_data: {self.where}: {number}/{len(chosen)} '
                      'files', file=sys.stderr, flush=True)
        if self.unread:
            self.note('unchecked', f'{len(self.unread)} files were not read '
                      f'for lack of memory, such as {self.unread[0]!r}')
            self.unread.clear()
        if self.skipped and len(self.skipped) == len(chosen):
            for code, example in self.skipped:
                self.add(code, example)
        elif self.skipped:
            self.note('skipped-file', f'{len(self.skipped)} images cannot be '
                      f'read, such as {self.skipped[0][1]}; ignore_empty=True '
                      'takes others for them')
        self.skipped.clear()

    @property
    def is_subset(self) -> bool:
        """Whether the dataset's argument ``indices`` chooses some images."""
        return getattr(self.dataset, '_indices', None) is not None

    def subset(self, items: list[Any]) -> list[Any]:
        """What ``indices`` leaves of items in the order of the dataset."""
        if not self.is_subset or not items:
            return items
        indices = self.dataset._indices
        if isinstance(indices, int):
            indices = range(len(items))[
                slice(indices) if indices >= 0 else slice(indices, None)]
        known = range(-len(items), len(items))
        wrong = [i for i in indices if i not in known]
        if wrong:
            self.add('dataset-arguments', f'{self.where}: indices has '
                     f'{wrong[0]}, there are {len(items)} images', len(wrong))
        elif not indices:
            self.add('no-images', f'{self.where}: indices='
                     f'{self.dataset._indices} leaves no image')
        return [items[i] for i in indices if i in known]

    def report_folder(self, error: OSError) -> None:
        """Report a folder that cannot be listed; for os.walk's onerror."""
        self.add('unreadable-file', f'{error.filename}: {error.strerror}')

    def report_image(self, path: str, facts: ImageFacts,
                     name: str = '') -> bool:
        """Report an image that cannot be read; returns whether it can.

        mmcv's loader passes over what stops it with ignore_empty=True, and
        mmengine takes another image; not in a test, and in a validation the
        metric would be of other images.
        """
        if (facts.code not in ('', 'no-memory')
                and self.usage.splits == ('train', )
                and not getattr(self.dataset, 'test_mode', False)
                and ignores_empty(self.steps)):
            decoder = image_decoder(self.steps)
            if decoder is not None and stops_loader(path, decoder):
                code = ('missing-image' if facts.code == 'missing'
                        else facts.code)
                self.skipped.append((code, f'{name or path}: {facts.error}'))
                return False
        return self.report_file(name or path, facts)

    def report_file(self, path: str, facts: ImageFacts,
                    missing: str = 'missing-image') -> bool:
        """Report a file that cannot be read; returns whether it can."""
        if facts.code == 'no-memory':
            self.unread.append(path)
        elif facts.code:
            code = missing if facts.code == 'missing' else facts.code
            self.add(code, f'{path}: {facts.error}')
        return not facts.code

    def note_lacking(self, histogram: Histogram) -> None:
        """Note the classes that nothing was found of."""
        lacking = [name for name, number in histogram.samples.items()
                   if not number]
        if lacking and histogram.total:
            names = ', '.join(map(repr, lacking[:10]))
            more = len(lacking) - 10
            self.note(
                'class-without-samples',
                f'{len(lacking)} of {len(histogram.samples)} classes have no '
                f'{histogram.unit}: {names}'
                + (f' and {more} more' if more > 0 else ''))
