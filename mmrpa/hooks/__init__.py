"""Hooks of mmengine; a config names them as ``mmrpa.<class>``."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .data_check import DataCheckHook
from .exact_resume import ExactResumeHook
from .routing_stats import RoutingStatsHook
from .safe_checkpoint import SafeCheckpointHook

__all__ = [
    'DataCheckHook', 'ExactResumeHook', 'RoutingStatsHook',
    'SafeCheckpointHook'
]
