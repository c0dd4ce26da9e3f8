"""Registers the functions that break a data set, each in its own way."""

from collections.abc import Callable

import pytest

CASES = []


def case(host: str, code: str, holds: str = '') -> Callable:
    """Register a function that breaks a data set.

    Args:
        host (str): Whose data set it takes.
        code (str): The one kind of problem that must be found.
        holds (str): What the first example must name.
    """

    def register(function: Callable) -> Callable:
        CASES.append(pytest.param(host, code, holds, function,
                                  id=f'{code}-{function.__name__}'))
        return function

    return register
