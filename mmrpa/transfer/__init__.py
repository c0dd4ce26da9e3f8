"""From a network with another attention to one with RPAttention.

:func:`start_student` needs images and no training; :class:`AttentionTransfer`
is what ``tools/align_attention.py`` trains; docs/attention_transfer.md is the
guide and has the measurements.
"""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .calibrate import LayerReport, calibrate
from .reduction import fit_reduced_kv
from .start import start_student
from .twin import Carried, attention_pairs, carry_twin

__all__ = [
    'Carried', 'LayerReport', 'attention_pairs', 'calibrate', 'carry_twin',
    'fit_reduced_kv', 'start_student'
]
