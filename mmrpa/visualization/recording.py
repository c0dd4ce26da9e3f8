"""Recording what attention layers are given while a model runs."""

from contextlib import contextmanager
from typing import Callable, Dict, Iterator, NamedTuple, Tuple, Type

import torch
from torch import Tensor, nn

from ..layers import RPAttention
from .responses import ATTENTIONS


class LayerInput(NamedTuple):
    """What an attention layer was called with.

    Attributes:
        x (Tensor): Tokens (B, N, C), a CLS token first where there is one.
        hw_shape (tuple[int, int]): (H, W) of their map.
    """

    x: Tensor
    hw_shape: Tuple[int, int]


@contextmanager
def record_inputs(model: nn.Module) -> Iterator[Dict[str, LayerInput]]:
    """Record the input of every attention layer of mmrpa, RP or twin.

    With it, routing and responses can be asked for later, for any query,
    without running ``model`` again. It holds N x C numbers a layer.

    Examples:
        >>> with record_inputs(model) as inputs, torch.no_grad():
        ...     model(images)
        >>> layer = model.get_submodule('stages.0.blocks.0.attn')
        >>> layer.routing_map(*inputs['stages.0.blocks.0.attn'])

    Yields:
        dict[str, LayerInput]: By layer name; the last call of a layer wins.
    """
    inputs: Dict[str, LayerInput] = {}

    def keep(name, module, x, hw_shape=None):
        if x.dim() == 4:
            x, hw_shape = x.flatten(2).transpose(1, 2), x.shape[-2:]
        inputs[name] = LayerInput(x.detach(), tuple(hw_shape))

    with _hooked(model, ATTENTIONS, keep):
        yield inputs


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Dict[str, Tensor]]:
    """Record the routing of every RPAttention layer while ``model`` runs.

    Examples:
        >>> with record_routing(model) as maps, torch.no_grad():
        ...     model(images)
        >>> maps['stages.0.blocks.0.attn'].shape  # (B, heads, M, H, W)

    Yields:
        dict[str, Tensor]: By layer name, the routing P as float32 maps (B, h,
        M, H, W) on the CPU; the last call of a layer wins.
    """
    maps: Dict[str, Tensor] = {}

    def keep(name, module, *args, **kwargs):
        with torch.no_grad():
            maps[name] = module.routing_map(*args, **kwargs).cpu()

    with _hooked(model, (RPAttention, ), keep):
        yield maps


@contextmanager
def _hooked(model: nn.Module, types: Tuple[Type[nn.Module], ...],
            call: Callable) -> Iterator[None]:
    """Have ``call(name, module, *args, **kwargs)`` precede each forward."""

    def hook(name):
        return lambda module, args, kwargs: call(name, module, *args, **kwargs)

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules() if isinstance(module, types)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def effective_representatives(routing: Tensor) -> float:
    """How many representatives hold the tokens of an image.

    Args:
        routing (Tensor): P as maps, (B, h, M, H, W).

    Returns:
        float: exp of the entropy of the representatives' mean shares, averaged
        over images and heads: M if all hold the same, 1 if one holds all.
    """
    share = routing.double().mean((-2, -1))  # (B, h, M)
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().mean().item()
