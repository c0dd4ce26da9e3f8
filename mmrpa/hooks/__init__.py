"""Hooks of mmengine; a config names them as ``mmrpa.<class>``."""

from .routing_stats import RoutingStatsHook

__all__ = ['RoutingStatsHook']
