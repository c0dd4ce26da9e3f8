"""Checks of the data that a config names: see docs/check_data.md."""

from .findings import DataError, Findings
from .run import Report, check_data

__all__ = ['DataError', 'Findings', 'Report', 'check_data']
