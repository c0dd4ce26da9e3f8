"""Refuses a torch that is too old.

All packages that use torch import this before they do. :mod:`mmrpa` itself
does not: :mod:`mmrpa.doctor`, which explains an environment, has to run with
any torch and with none, and mmengine swallows what :mod:`mmrpa.registry`
raises.
"""

import re
from typing import Tuple

import torch

from . import OLDEST_TORCH


def release(version: str) -> Tuple[int, ...]:
    """Major and minor number of a version; of one without, those wanted.

    Args:
        version (str): As ``torch.__version__``; builds from source may have
            the name of a commit in its place.
    """
    found = re.match(r'(\d+)\.(\d+)', version)
    return tuple(map(int, found.groups())) if found else OLDEST_TORCH


def check_release(version: str) -> None:
    """Raise ImportError if mmrpa cannot work with this torch.

    Args:
        version (str): ``torch.__version__``.

    Raises:
        ImportError: It is older than ``mmrpa.OLDEST_TORCH``.
    """
    if release(version) < OLDEST_TORCH:
        oldest = '.'.join(map(str, OLDEST_TORCH))
        raise ImportError(
            f'mmrpa needs torch {oldest} or later, this is {version}: '
            f"pip install --upgrade 'torch>={oldest}', then a torchvision and "
            'an mmcv built for it; `python -m mmrpa.doctor` prints the '
            'commands')


check_release(torch.__version__)
