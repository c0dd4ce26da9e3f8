"""The RPAttention backbones, registered in :mod:`mmrpa.registry`."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .base import RPBackbone
from .rp_cswin import RPCSWin
from .rp_deit import RPDeiT
from .rp_pvt import RPPVT
from .rp_swin import RPSwin

__all__ = ['RPBackbone', 'RPCSWin', 'RPDeiT', 'RPPVT', 'RPSwin']
