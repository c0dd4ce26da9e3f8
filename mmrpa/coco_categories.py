"""Category names of a COCO annotation file, quickly."""

import functools
import json
import mmap
import os

_LARGE = 50 * 2**20  # bytes; parsing takes about a second for this many
_WINDOW = 2**24  # bytes; far more than any list of categories takes
_KEY = b'"categories"'
_END = 1000  # bytes of which one at least is no blank


def read_categories(path: str,
                    large: int = _LARGE) -> tuple[tuple[str, ...], str]:
    """Read the names of the categories in the order of the file.

    A file up to ``large`` bytes is parsed. A larger one
    (instances_train2017.json has 450 MB) is searched for its list of
    categories instead, from the end, where COCO's own files have it, and
    must end as an object does. A file that has not changed is not read again.

    Args:
        path (str): A COCO annotation file.
        large (int): Size in bytes above which the file is searched.

    Returns:
        tuple: The names, and a note if the file was searched, else ''.

    Raises:
        ValueError: If the file is no JSON, or is cut short, has no list of
            categories, or a category has no name.
    """
    status = os.stat(path)
    return _read(path, large, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(path: str, large: int, size: int,
          changed: int) -> tuple[tuple[str, ...], str]:
    """``changed`` is for the cache only: a file may be corrected."""
    if size > large:
        categories = _search(path)
        note = (f'{path!r} has {size / 2**20:.0f} MB: searched for its '
                'categories only, not parsed')
    else:
        with open(path, encoding='utf-8') as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise ValueError(f'{path!r} is not valid JSON: {error}. '
                                 'Write or download it again') from error
        categories = content.get('categories') if isinstance(
            content, dict) else None
        note = ''
    if not isinstance(categories, list):
        raise ValueError(f"{path!r} has no list 'categories', so it is no "
                         'COCO annotation file')
    if not _are_categories(categories):
        raise ValueError(f"{path!r}: each of 'categories' needs an id and a "
                         f'name, but the first ones are {categories[:3]!r}')
    return tuple(category['name'] for category in categories), note


def _are_categories(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and 'id' in item
        and isinstance(item.get('name'), str) for item in value)


def _search(path: str) -> list | None:
    """Find the last list of categories without parsing the file."""
    decoder = json.JSONDecoder()
    with open(path, 'rb') as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content[-_END:].rstrip()[-1:]
        if end != b'}':
            raise ValueError(f'{path!r} is not valid JSON: it ends in '
                             f'{end.decode(errors="replace")!r} and not in '
                             "'}', as if it was cut short. Write or download "
                             'it again')
        start = content.rfind(_KEY)
        while start >= 0:
            begin = start + len(_KEY)
            # The window may cut a character in two: only at its very end.
            text = content[begin:begin + _WINDOW].decode(
                'utf-8', errors='replace').lstrip()
            if text.startswith(':'):
                try:
                    value, _ = decoder.raw_decode(text[1:].lstrip())
                except json.JSONDecodeError:
                    value = None
                if value and _are_categories(value):
                    return value
            start = content.rfind(_KEY, 0, start)
    return None
