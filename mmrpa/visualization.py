"""Pictures of the routing: the representatives as soft segments."""

from contextlib import contextmanager
from typing import Dict, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .layers import RPAttention


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

    def hook(name):

        def record(module, args, kwargs):
            with torch.no_grad():
                maps[name] = module.routing_map(*args, **kwargs).cpu()

        return record

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, RPAttention)
    ]
    try:
        yield maps
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


def representative_colors(num: int) -> np.ndarray:
    """``num`` colours that are easy to tell apart, the same at every call.

    Returns:
        ndarray: (num, 3) RGB, float in [0, 1]. The first is a light grey, for
        what is most of an image; the hues of the others go around by the
        golden angle, so the first k of them are well spread for every k.
    """
    from matplotlib.colors import hsv_to_rgb
    i = np.arange(num)
    colors = hsv_to_rgb(
        np.stack([(0.02 + i * 0.61803398875) % 1, 0.8 - 0.35 * (i % 3 == 2),
                  0.95 - 0.35 * (i % 4 == 3)], axis=-1))  # yapf: disable
    colors[0] = 0.88
    return colors


def paint_routing(routing: Tensor, size: tuple) -> np.ndarray:
    """Paint one head's routing as soft segments.

    Args:
        routing (Tensor): P of one image and one head, (M, h, w).
        size (tuple[int, int]): Height and width of the picture in pixels.

    Returns:
        ndarray: (H, W, 3) RGB, float in [0, 1]. A pixel is the mean of the
        representatives' colours, weighted by its shares of the routing.
        Colours go by mass, so that the representatives that hold most of the
        image differ most.
    """
    # Routing over tokens does not sum to 1 over the representatives.
    routing = routing / routing.sum(0, keepdim=True)
    big = nn.functional.interpolate(
        routing[None].float(), size=size, mode='bilinear',
        align_corners=False)[0]
    order = routing.sum((1, 2)).argsort(descending=True).argsort()
    colors = representative_colors(len(routing))[order.numpy()]
    return np.einsum('mhw,mc->hwc', big.numpy(), colors).clip(0, 1)
