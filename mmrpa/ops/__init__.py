"""RPAttention as functions of tensors; needs torch alone."""

from .naive import distribute, gather, interact, route, rp_attention

__all__ = ['distribute', 'gather', 'interact', 'route', 'rp_attention']
