"""RPAttention as functions of tensors; needs torch alone."""

from .. import torch_release  # noqa: F401 (first: it may refuse)
from .functional import (
    IMPLS,
    choose_impl,
    computes_layer,
    rp_attention,
    rp_attention_layer,
    rp_attention_qkv,
)
from .naive import distribute, gather, interact, route

__all__ = [
    'IMPLS', 'choose_impl', 'computes_layer', 'distribute', 'gather',
    'interact', 'route', 'rp_attention', 'rp_attention_layer',
    'rp_attention_qkv'
]
