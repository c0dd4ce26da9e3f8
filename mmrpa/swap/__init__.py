"""Swap the backbone of an mmdet, mmsegmentation or mmpretrain config."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .archs import NAMES
from .core import swap, swap_backbone
from .report import Report, SwapError, SwapRefused
from .writing import write_config

__all__ = [
    'NAMES', 'Report', 'SwapError', 'SwapRefused', 'swap', 'swap_backbone',
    'write_config'
]
