"""The configs of the project, found, not listed."""

import copy
from functools import cache
from pathlib import Path

from mmengine.config import Config

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

ROOT = Path(__file__).resolve().parent.parent / 'configs'
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*.py')
    if '_base_' not in path.parts)
FAMILIES = {
    'rp-deit': RPDeiT,
    'rp-pvt': RPPVT,
    'rp-swin': RPSwin,
    'rp-cswin': RPCSWin
}


@cache
def read(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def load(name: str) -> Config:
    return copy.deepcopy(read(name))


def walk(node):
    """Yield every dict inside nested dicts, lists and tuples."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for child in node:
            yield from walk(child)
