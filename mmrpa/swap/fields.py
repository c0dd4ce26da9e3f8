"""Read values that a swap depends on, or say what they have to be."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .report import SwapError, short

_REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        text (str): In words, after 'must be'.
        fits (callable): Whether a value is that.
    """

    text: str
    fits: Callable[[Any], bool]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(fits, value))


def _is_filled(value: object) -> bool:
    return _is_list(value, _is_int) and len(value) > 0


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


INT = Kind('an integer', _is_int)
INTS = Kind('a list of integers', _is_filled)
INT_OR_INTS = Kind('an integer or a list of integers',
                   lambda v: _is_int(v) or _is_filled(v))
MAYBE_INT_OR_INTS = Kind('an integer, a list of integers or None',
                         lambda v: v is None or INT_OR_INTS.fits(v))
SCALES = Kind('a list of positive numbers', lambda v: _is_list(
    v, lambda x: _is_number(x) and 0 < x < float('inf')) and len(v) > 0)
DICT = Kind('a dict', _is_dict)
MAYBE_DICT = Kind('a dict or None', lambda v: v is None or _is_dict(v))
PARTS = Kind('a dict, a list of dicts or None', lambda v: (
    v is None or _is_dict(v) or _is_list(v, _is_dict)))
NAMES = Kind('a string or a list of strings', lambda v: (
    isinstance(v, str) or _is_list(v, lambda x: isinstance(x, str))))
OPTIONS = Kind('a dict of dicts by name, or None', lambda v: (
    v is None or (_is_dict(v) and all(isinstance(k, str) and _is_dict(x)
                                      for k, x in v.items()))))


def take(node: Mapping[str, Any], name: str, kind: Kind, key: str,
         default: Any = _REQUIRED) -> Any:
    """A value of a config.

    Args:
        node (Mapping): The part of the config.
        name (str): Which of its values.
        kind (Kind): What it may be.
        key (str): Dotted key of the part; '' for the whole config.
        default (optional): What a missing value stands for. Without one, it
            has to be there.

    Returns:
        The value.

    Raises:
        SwapError: It is missing, or something else.
    """
    where = f'{key}.{name}' if key else name
    if name not in node:
        if default is _REQUIRED:
            raise SwapError(f'{where} is missing: it must be {kind.text}')
        return default
    value = node[name]
    if not kind.fits(value):
        raise SwapError(f'{where} must be {kind.text}, got {short(value)}')
    return value


def walk(node: Any, key: str = '') -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, dict) of all dicts in a config.

    Each comes before those in it, and may be changed then.

    Args:
        node (Any): The config, or a part of it.
        key (str): Where that part is.
    """
    if isinstance(node, Mapping):
        yield key, node
        for name, child in list(node.items()):
            yield from walk(child, f'{key}.{name}' if key else str(name))
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from walk(child, f'{key}.{i}')
