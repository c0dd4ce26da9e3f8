"""Colours that tell many representatives apart, always the same ones."""

from functools import lru_cache

import numpy as np

# The first colour, for what is most of an image where colours go by mass.
_FIRST = 0.88
_CANDIDATES = 13  # levels a channel
# Colours as light as paper or as dark as ink hide a picture under them.
_LIGHTNESS = (38., 90.)
_MIN_CHROMA = 28.


def representative_colors(num: int) -> np.ndarray:
    """``num`` colours that are easy to tell apart, the same at every call.

    Each colour is the one farthest in CIELAB from all before it, so the first
    k are well spread for every k.

    Args:
        num (int): How many, at least 1.

    Returns:
        ndarray: (num, 3) RGB, float in [0, 1]. The first is a light grey; the
        first k are the same for every ``num``.

    Raises:
        ValueError: num is less than 1.
    """
    if num < 1:
        raise ValueError(f'num must be at least 1, got {num}')
    # A power of two at least, so that few different tables are computed.
    return _palette(max(64, 1 << (num - 1).bit_length()))[:num].copy()


@lru_cache
def _palette(num: int) -> np.ndarray:
    levels = np.linspace(0, 1, _CANDIDATES)
    rgb = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = _to_lab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    keep = ((lab[:, 0] >= _LIGHTNESS[0]) & (lab[:, 0] <= _LIGHTNESS[1])
            & (chroma >= _MIN_CHROMA))
    rgb, lab = rgb[keep], lab[keep]
    chosen = [np.full(3, _FIRST)]
    # The picture's own greys are far from all chosen colours already.
    distance = np.linalg.norm(lab - _to_lab(chosen[0][None]), axis=1)
    # Strong colours first: they are the easiest to name.
    best = int(chroma[keep].argmax())
    while len(chosen) < num:
        chosen.append(rgb[best])
        distance = np.minimum(distance,
                              np.linalg.norm(lab - lab[best], axis=1))
        best = int(distance.argmax())
        if distance[best] == 0:  # all candidates taken: begin again
            distance[:] = np.inf
    return np.stack(chosen)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1], (N, 3), to CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92,
                      ((rgb + 0.055) / 1.055)**2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193],
                             [0.3576, 0.7152, 0.1192],
                             [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1., 1.089])
    f = np.where(xyz > (6 / 29)**3, np.cbrt(xyz),
                 xyz / (3 * (6 / 29)**2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]),
                     200 * (f[:, 1] - f[:, 2])], axis=1)
