"""Optimiser settings for RPAttention backbones."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .amp import CPUAmpOptimWrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['CPUAmpOptimWrapper', 'LayerDecayOptimWrapperConstructor']
