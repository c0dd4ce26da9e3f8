"""Read image files whole, in parallel, in bounded memory.

Pillow reads them, at a fraction of the resolution where it can. What it does
not know or refuses is given to OpenCV if the training's loader uses that.
"""

import errno
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from .loaders import IMAGES, MAPS, Decoder

Item = TypeVar('Item')
Result = TypeVar('Result')
# What Pillow's decoders raise on files that are cut or were overwritten.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error,
            zlib.error, KeyError, IndexError, TypeError, OverflowError,
            NotImplementedError)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


class ImageFacts(NamedTuple):
    """What is known of an image file.

    Attributes:
        code (str): '' if all of it can be read, 'missing' if it is not there,
            'no-memory' if there was too little memory to tell, else the kind
            of its problem.
        error (str): What the reader says.
        size (tuple[int, int]): Width and height in pixels, after the
            orientation that EXIF asks for: what OpenCV gives.
        mode (str): Pillow's mode: 'L', 'P', 'RGB' and so on.
        format (str): 'JPEG', 'PNG' and so on.
        counts (dict[int, int]): Pixels by value, if asked for.
    """

    code: str
    error: str = ''
    size: tuple[int, int] = (0, 0)
    mode: str = ''
    format: str = ''
    counts: dict[int, int] = {}


# What OpenCV reads like Pillow; others of Pillow's formats it may not know.
_ALIKE = ('JPEG', 'MPO', 'PNG')


def read_image(path: str, decoder: Decoder = IMAGES) -> ImageFacts:
    """Decode a file to its end; no pixels are kept."""
    return _read(path, decoder, labels=False)


def read_labels(path: str, decoder: Decoder = MAPS) -> ImageFacts:
    """Like :func:`read_image`, and count the values of a label map."""
    return _read(path, decoder, labels=True)


def _read(path: str, decoder: Decoder, labels: bool) -> ImageFacts:
    try:
        facts = _read_with_pillow(path, decoder, labels)
        if facts.code or decoder.backend != 'cv2' or (
                facts.format in _ALIKE and not labels):
            return facts
        return _check_with_opencv(path, decoder, labels, facts)
    except UnidentifiedImageError:
        facts = ImageFacts('not-an-image', 'no known image format')
    except Image.DecompressionBombError as error:
        facts = ImageFacts('too-large', f'Pillow: {error}')
    except MemoryError:
        return ImageFacts('no-memory')
    return (_read_with_opencv(path, decoder.flag, labels, facts)
            if decoder.backend == 'cv2' else facts)


def _check_with_opencv(path: str, decoder: Decoder, labels: bool,
                       known: ImageFacts) -> ImageFacts:
    """What OpenCV makes of a file that is whole, as Pillow has found.

    Maps with a palette, or with a bit a pixel, are other numbers to it.
    """
    facts = _read_with_opencv(path, decoder.flag, labels, ImageFacts(
        'not-an-image', f'OpenCV does not read this {known.format} file'))
    if facts.code:
        return facts
    mode = known.mode
    if labels and not facts.counts:
        mode += ', read by OpenCV as colours'
    return facts._replace(mode=mode, format=known.format)


def _read_with_pillow(path: str, decoder: Decoder,
                      labels: bool) -> ImageFacts:
    """Raises what Pillow says of files that it does not know or refuses."""
    try:
        with open(path, 'rb') as file:
            if not file.read(1):
                return ImageFacts('empty-file', '0 bytes')
            file.seek(0)
            with Image.open(file) as image:
                size = image.size
                if labels:
                    image.load()
                    return ImageFacts('', '', size, image.mode,
                                      image.format or '',
                                      _count(np.asarray(image))
                                      if len(image.getbands()) == 1 else {})
                # mmcv turns no image with 'unchanged', '..._orientation'.
                turned = (decoder.flag in ('color', 'grayscale')
                          and _is_turned(image))
                # An eighth of the resolution takes a fraction of the time;
                # all of the file is read nevertheless. JPEG only.
                image.draft(None, (max(1, size[0] // 8),
                                   max(1, size[1] // 8)))
                image.load()
                if image.format == 'TIFF':  # load() has turned it
                    size, turned = image.size, False
                return ImageFacts('', '', size[::-1] if turned else size,
                                  image.mode, image.format or '')
    except FileNotFoundError:
        return ImageFacts('missing', 'no such file')
    except (IsADirectoryError, NotADirectoryError) as error:
        return ImageFacts('not-an-image', error.strerror or '')
    except UnicodeEncodeError as error:
        return ImageFacts('unreadable-file', f'no name of a file: {error}')
    except UnidentifiedImageError:
        raise  # it is an OSError, too
    except _DAMAGED as error:
        refused = getattr(error, 'errno', None) in _REFUSED
        return ImageFacts(
            'unreadable-file' if refused else 'truncated-file',
            str(error) or type(error).__name__)


def _read_with_opencv(path: str, flag: str, labels: bool,
                      refused: ImageFacts) -> ImageFacts:
    """Decode as mmcv does; ``refused`` is the answer if that gives nothing."""
    import cv2
    import mmcv
    try:
        pixels = mmcv.imread(path, flag=flag, backend='cv2')
    except cv2.error as error:
        if error.code == cv2.Error.STS_NO_MEM:
            return ImageFacts('no-memory')
        return ImageFacts('too-large' if 'CV_IO_MAX_IMAGE' in error.err else
                          refused.code, f'OpenCV: {error.err}')
    except MemoryError:
        return ImageFacts('no-memory')
    if pixels is None:  # of few pixels or many: OpenCV takes more of them
        return refused if refused.code != 'too-large' else ImageFacts(
            'truncated-file', 'OpenCV gives nothing')
    height, width = pixels.shape[:2]
    pixels = pixels.squeeze()
    return ImageFacts('', '', (width, height), str(pixels.dtype), '',
                      _count(pixels) if labels and pixels.ndim == 2 else {})


def stops_loader(path: str, decoder: Decoder) -> bool:
    """Whether an error stops mmcv's decoding, rather than that gives None."""
    import mmcv
    try:
        mmcv.imread(path, flag=decoder.flag, backend=decoder.backend)
    # mmcv's LoadImageFromFile(ignore_empty=True) passes over any error, so any
    # is the answer here; the caller reports the file either way.
    except Exception:
        return True
    return False


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except _DAMAGED:  # EXIF is broken: OpenCV ignores it, too
        return False


def _count(pixels: np.ndarray) -> dict[int, int]:
    """Pixels by value."""
    if pixels.dtype in (np.uint8, np.bool_):
        counts = np.bincount(pixels.ravel(), minlength=256)
        values = np.flatnonzero(counts)
        return dict(zip(values.tolist(), counts[values].tolist(),
                        strict=True))
    values, numbers = np.unique(pixels, return_counts=True)
    # A map of floats can have as many values as pixels.
    return dict(zip(values[:1000].tolist(), numbers[:1000].tolist(),
                    strict=True))


def read_all(function: Callable[[Item], Result], items: Iterable[Item],
             workers: int) -> Iterator[tuple[Item, Result]]:
    """Apply a function in threads; the decoders release Python's lock.

    Args:
        function (callable): Takes one item.
        items (iterable): Taken one by one: at most 8 a worker are under way.
        workers (int): Threads; 0 does all in this one.

    Yields:
        tuple: (item, result), in the order of the items.
    """
    if workers == 0:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= 8 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def spread(items: list[Item], number: int | None) -> list[Item]:
    """At most ``number`` of the items, evenly spread."""
    if number is None or number >= len(items):
        return items
    return [items[i * len(items) // number] for i in range(number)]
