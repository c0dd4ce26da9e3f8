"""Pictures as arrays: segments, heat maps and blocks over an image.

Maps come at the size of the picture (see ``View.to_picture``). A picture is a
float RGB array (H, W, 3) in [0, 1]; pixels outside of ``seen``, which the
network was not shown, are faded.
"""

from typing import Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from .colors import representative_colors

# The paper draws responses in blue, on a picture turned pale.
BLOCK_COLOR = (0.11, 0.05, 0.80)
BORDER_COLOR = (1., 1., 1.)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def paint_routing(routing: Tensor,
                  size: Tuple[int, int],
                  colors: Optional[np.ndarray] = None) -> np.ndarray:
    """Paint one head's routing as soft segments.

    Args:
        routing (Tensor): P of one image and one head, (M, h, w).
        size (tuple[int, int]): Height and width of the picture in pixels.
        colors (ndarray, optional): Each representative's colour, (M, 3) RGB
            in [0, 1]. By default colours go by mass, so that the
            representatives that hold most of the image differ most;
            ``representative_colors(M)`` gives each the same colour in all
            images.

    Returns:
        ndarray: (H, W, 3) RGB, float in [0, 1]. A pixel is the mean of the
        representatives' colours, weighted by its shares of the routing.
    """
    # Routing over tokens does not sum to 1 over the representatives.
    routing = routing / routing.sum(0, keepdim=True)
    big = nn.functional.interpolate(
        routing[None].float(), size=size, mode='bilinear',
        align_corners=False)[0]
    if colors is None:
        order = routing.sum((1, 2)).argsort(descending=True).argsort()
        colors = representative_colors(len(routing))[order.numpy()]
    return mix_colors(big, colors)


def mix_colors(shares: Tensor, colors: np.ndarray) -> np.ndarray:
    """Colours (M, 3) weighted by maps (M, H, W), as (H, W, 3)."""
    table = torch.as_tensor(colors, dtype=torch.float32)
    return torch.einsum('mhw,mc->hwc', shares.float(),
                        table).clamp_(0, 1).numpy()


def overlay_segments(picture: np.ndarray, shares: Tensor, colors: np.ndarray,
                     seen: np.ndarray) -> np.ndarray:
    """The representatives as soft, coloured segments over a picture.

    Args:
        picture (ndarray): (H, W, 3), float in [0, 1].
        shares (Tensor): The representatives' shares, (M, H, W), adding up to 1
            over M.
        colors (ndarray): Their colours, (M, 3).
        seen (ndarray): (H, W), bool.

    Returns:
        ndarray: (H, W, 3). Hue is the representatives', light and shade are
        the picture's; a thin light line parts the segments.
    """
    paint = mix_colors(shares, colors)
    shade = (picture @ np.array(_LUMA))[..., None]
    out = paint * (0.5 + 0.5 * shade)
    out = 0.78 * out + 0.22 * picture
    edge = _borders(shares.argmax(0).numpy())
    out[edge] = 0.35 * out[edge] + 0.65 * np.array(BORDER_COLOR)
    return fade(out, picture, seen)


def overlay_single(picture: np.ndarray, share: Tensor, color: np.ndarray,
                   seen: np.ndarray) -> np.ndarray:
    """One representative's share (H, W) in its colour, the rest pale grey."""
    grey = (picture @ np.array(_LUMA))[..., None]
    pale = np.repeat(0.45 + 0.5 * grey, 3, axis=-1)
    # Light shades of a pale colour would not be seen on a pale picture.
    paint = np.asarray(color) * (0.35 + 0.65 * grey)
    weight = share.clamp(0, 1).numpy()[..., None]
    return fade(weight * paint + (1 - weight) * pale, picture, seen)


def overlay_heat(picture: np.ndarray, heat: Tensor, seen: np.ndarray
                 ) -> np.ndarray:
    """A response (H, W) as a heat map; see :func:`relative` for its scale."""
    from matplotlib import colormaps
    paint = colormaps['turbo'](relative(heat, seen))[..., :3]
    # Cold parts show the picture, hot ones cover it.
    out = 0.68 * paint + 0.32 * picture
    return fade(out, picture, seen)


def overlay_blocks(picture: np.ndarray, response: Tensor, seen: np.ndarray
                   ) -> np.ndarray:
    """A response (H, W) as blue tokens; see :func:`relative` for the scale."""
    weight = 0.9 * relative(response, seen)[..., None]
    pale = 0.6 * picture + 0.4
    out = weight * np.array(BLOCK_COLOR) + (1 - weight) * pale
    return fade(out, picture, seen)


def fade(out: np.ndarray, picture: np.ndarray, seen: np.ndarray
         ) -> np.ndarray:
    """``out`` where the network looked, elsewhere the picture turned grey."""
    grey = (picture @ np.array(_LUMA))[..., None]
    return np.where(seen[..., None], out, 0.75 + 0.25 * grey).clip(0, 1)


def relative(values: Tensor, seen: np.ndarray) -> np.ndarray:
    """Values over a scale of their own, in [0, 1].

    Args:
        values (Tensor): A response (H, W).
        seen (ndarray): (H, W), bool.

    Returns:
        ndarray: 0 is nothing; 1 is the 99th percentile, or three times the
        mean where that is more, so that an even response, which singles
        nothing out, is not painted as if all of it stood out.
    """
    values = values.numpy().clip(min=0)
    if not seen.any():
        return np.zeros_like(values)
    top = max(np.quantile(values[seen], 0.99), 3 * values[seen].mean())
    return (values / top).clip(max=1) if top > 0 else np.zeros_like(values)


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels, two wide, between which the label changes."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        low = np.diff(labels, axis=axis) != 0
        here = np.moveaxis(edge, axis, 0)
        here[:-1] |= np.moveaxis(low, axis, 0)
        here[1:] |= np.moveaxis(low, axis, 0)
    return edge
