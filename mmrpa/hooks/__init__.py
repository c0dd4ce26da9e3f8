"""Hooks of mmengine; a config names them as ``mmrpa.<class>``."""

from .data_check import DataCheckHook
from .exact_resume import ExactResumeHook
from .routing_stats import RoutingStatsHook
from .safe_checkpoint import SafeCheckpointHook

__all__ = [
    'DataCheckHook', 'ExactResumeHook', 'RoutingStatsHook',
    'SafeCheckpointHook'
]
