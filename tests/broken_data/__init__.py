"""Ways to break the sample data, by kind of data."""

from . import coco, configs, files, folders, label_maps
from .registry import CASES

__all__ = ['CASES', 'coco', 'configs', 'files', 'folders', 'label_maps']
