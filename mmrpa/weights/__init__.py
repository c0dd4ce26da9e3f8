"""Public weights for RPAttention backbones; needs torch alone.

:func:`read_checkpoint` reads a file without unpickling anything but tensors,
:func:`convert` turns the names of DeiT, PVT, Swin and CSWin into those of an
RP backbone and reports what became of every tensor, and
:func:`write_checkpoint` writes what ``init_cfg`` can load.
``tools/convert_checkpoint.py`` does all three; docs/pretrained.md explains.
"""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .archs import arch_names, build_arch
from .convert import DWC_STARTS, ConversionError, convert
from .files import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    write_checkpoint,
)
from .report import Report

__all__ = [
    'DWC_STARTS', 'Checkpoint', 'CheckpointError', 'ConversionError',
    'Report', 'arch_names', 'build_arch', 'convert', 'read_checkpoint',
    'write_checkpoint'
]
