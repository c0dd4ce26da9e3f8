"""RPAttention as functions of tensors; needs torch alone."""

from .naive import distribute, gather, interact, rp_attention

__all__ = ['distribute', 'gather', 'interact', 'rp_attention']
