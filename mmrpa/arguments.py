"""Checks of arguments whose errors name the argument; torch's do not."""

import math
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import torch_release  # noqa: F401 (it may refuse)


def check_int(name: str, value: Any, low: Optional[int] = None) -> None:
    """Raise unless ``value`` is an integer (not a bool) of at least ``low``.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below ``low``.
    """
    # In an export sizes are SymInts, which must not be made integers.
    if isinstance(value, bool) or not (isinstance(value, (int, torch.SymInt))
                                       or hasattr(value, '__index__')):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if isinstance(value, Tensor):
        raise TypeError(f'{name} must be an integer, got a tensor')
    if low is not None and value < low:
        raise ValueError(f'{name} must be at least {low}, got {value!r}')


def check_number(name: str, value: Any, low: float = -math.inf,
                 high: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number in [low, high].

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range, infinite or NaN.
    """
    if isinstance(value, (bool, str, Tensor)) or not hasattr(
            value, '__float__'):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f'{name} must be a finite number in [{low}, {high}], '
                         f'got {value!r}')


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')


def check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    # By type first: tensors and arrays compare element by element.
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f'{name} must be one of {tuple(allowed)}, got {value!r}')


def check_pair(name: str, value: Any, low: int = 1) -> Tuple[int, int]:
    """Raise unless ``value`` is (H, W), and return it as a tuple.

    Raises:
        TypeError: It is not two integers.
        ValueError: One of them is below ``low``.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or (
            len(value) != 2):
        raise TypeError(f'{name} must be two integers (H, W), got {value!r}')
    for side in value:
        check_int(name, side, low)
    return tuple(value)


def check_tensor(name: str, value: Any, dims: Optional[int] = None,
                 what: str = '') -> None:
    """Raise unless ``value`` is a floating-point tensor of ``dims`` axes.

    Raises:
        TypeError: It is not a tensor, or not floating point.
        ValueError: It has another number of axes; ``what`` is the right shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')
    if not value.is_floating_point():
        raise TypeError(f'{name} must be floating point, got {value.dtype}; '
                        'convert it first')
    if dims is not None and value.dim() != dims:
        raise ValueError(f'{name} must be {what}, got {tuple(value.shape)}')


def check_dtype(x: Tensor, weight: Tensor, name: str = 'x') -> None:
    """Raise ValueError if x is of another dtype than the parameters.

    Unless autocast is on, which converts both.
    """
    device = 'cpu' if x.device.type == 'meta' else x.device.type
    if (isinstance(weight, Tensor) and weight.is_floating_point()
            and x.dtype != weight.dtype
            and not torch.is_autocast_enabled(device)):
        raise ValueError(f'{name} is {x.dtype} but the parameters are '
                         f'{weight.dtype}; convert one of them, or use '
                         'torch.autocast')
