"""Hooks of mmengine; a config names them as ``mmrpa.<class>``."""

from .exact_resume import ExactResumeHook
from .routing_stats import RoutingStatsHook
from .safe_checkpoint import SafeCheckpointHook

__all__ = ['ExactResumeHook', 'RoutingStatsHook', 'SafeCheckpointHook']
