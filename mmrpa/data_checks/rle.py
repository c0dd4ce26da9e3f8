"""Whether a COCO run-length encoding can be decoded.

pycocotools decodes in C and trusts its input, so a malformed encoding is not
given to it: the runs are read here, after the format of its ``maskApi.c``.
"""

from collections.abc import Sequence

_MOST_BITS = 60  # of a run; without an end, each more costs more time


class RLEError(ValueError):
    """An encoding that does not describe a mask."""


def read_runs(counts: str | bytes) -> list[int]:
    """The runs of a compressed encoding.

    Each run is a number in groups of 5 bits, lowest first, in the characters
    '0' to 'o': bit 6 says that another group follows, and bit 5 of the last
    one is the sign. From the fourth on, runs are differences to the one two
    before.

    Args:
        counts (str | bytes): The ``counts`` of the encoding.

    Raises:
        RLEError: If it has other characters or ends within a number.
    """
    codes = map(ord, counts) if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        code -= 48
        if not 0 <= code < 64:
            raise RLEError(f'character {chr(code + 48)!r} is not allowed')
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            if shift > _MOST_BITS:
                raise RLEError('a run has too many digits')
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise RLEError('it ends within a number')
    return runs


def check_rle(rle: dict, width: float, height: float) -> None:
    """Check a mask of an image.

    Args:
        rle (dict): ``size`` (height, width) and ``counts``, the runs as
            integers or compressed.
        width (float): Of the image in pixels.
        height (float): Of the image in pixels.

    Raises:
        RLEError: If it cannot be decoded to a mask of that size.
    """
    size, counts = rle.get('size'), rle.get('counts')
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise RLEError(f'size is {size!r}, the image has {[height, width]} '
                       '(height, width)')
    if isinstance(counts, str):
        runs: Sequence = read_runs(counts)
    elif isinstance(counts, list) and all(type(n) is int for n in counts):
        runs = counts
    else:
        raise RLEError('counts is neither text nor a list of integers')
    if any(run < 0 for run in runs):
        raise RLEError('a run is negative')
    if sum(runs) != height * width:
        raise RLEError(f'the runs cover {sum(runs)} pixels of '
                       f'{height * width}')
