"""What the doctor reports."""

from __future__ import annotations

from typing import NamedTuple

PROBLEM, NOTE = 'problem', 'note'
# The tested set; tests hold it to requirements.txt, which wheels lack.
TESTED = {
    'torch': '2.11.0', 'torchvision': '0.26.0', 'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2', 'onedl-mmpretrain': '1.3.6',
    'numpy': '2.2.6', 'opencv-python-headless': '4.12.0.88',
    'pycocotools': '2.0.11',
}
PYTHONS = ((3, 10), (3, 12))
SETUPTOOLS = (77, 82)  # from, below


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        code (str): Its name, for programs.
        text (str): What is wrong, and what it does to the user.
        command (str): What mends it; '' of a note that no command is for.
        level (str): ``'problem'``, or ``'note'``, which is nothing wrong.
    """

    code: str
    text: str
    command: str
    level: str = PROBLEM


def pin(name: str) -> str:
    """``name==version`` of the tested set."""
    return f'{name}=={TESTED[name]}'
