"""Colour, texture and light of a scene.

Colours are float32 RGB in 0..1 until the last step. Patterns are functions
of position whose edges are one pixel wide, so they need no supersampling.
"""
import colorsys
import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

# Hue in degrees and texture of each class. By shape alone a small network
# needs far more than the minutes that this data is meant for.
LOOKS = {
    'cross': (285, 'dots'),
    'disc': (5, 'stripes'),
    'square': (215, 'checks'),
    'star': (45, 'marble'),
    'triangle': (145, 'rings'),
}
HUE_JITTER = 13
# A thing of no class: small, without texture, its colour like a background's.
PEBBLE = 'pebble'
BACKGROUNDS = ('plain', 'stripes', 'checks', 'dots', 'marble', 'grain')


@dataclass(frozen=True)
class Sprite:
    """An object to paint.

    Attributes:
        name (str): A key of ``LOOKS`` or ``PEBBLE``.
        opacity (ndarray): Part of each pixel inside, 0..1, float32, (H, W).
        centre (ndarray): x and y in pixels.
        angle (float): Rotation in radians; the texture turns with the shape.
        extent (float): Longer side of the box in pixels.
    """
    name: str
    opacity: np.ndarray
    centre: np.ndarray
    angle: float
    extent: float


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB of a hue in degrees; saturation and value in 0..1."""
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value),
                    np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int],
                  cell: float) -> np.ndarray:
    """Smooth noise of zero mean and unit variance in (H, W) = shape.

    Args:
        rng (Generator): Source of the noise.
        shape (tuple[int, int]): Height and width in pixels.
        cell (float): Size in pixels of the largest blobs.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(3):
        cells = [min(round(n / cell * 2**octave) + 3, n) for n in shape]
        grid = rng.standard_normal(cells, np.float32)
        total += cv2.resize(grid, shape[::-1],
                            interpolation=cv2.INTER_CUBIC) / 2**octave
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def _wave(phase: np.ndarray, period: float) -> np.ndarray:
    """Square wave in -0.5..0.5 whose edges are about one pixel wide."""
    slope = 2 * math.pi / period
    return np.clip(np.sin(phase * slope) / slope, -0.5, 0.5)


def _pattern(rng: np.random.Generator, kind: str, shape: tuple[int, int],
             centre: np.ndarray, angle: float, period: float) -> np.ndarray:
    """A texture in 0..1, float32, (H, W) = shape.

    Args:
        rng (Generator): Source of phases and noise.
        kind (str): One of ``BACKGROUNDS`` or 'rings'.
        shape (tuple[int, int]): Height and width in pixels.
        centre (ndarray): x and y of the pattern's origin in pixels.
        angle (float): Direction of the pattern in radians.
        period (float): Length of one repetition in pixels.
    """
    x = (np.arange(shape[1]) + 0.5 - centre[0]).astype(np.float32)[None]
    y = (np.arange(shape[0]) + 0.5 - centre[1]).astype(np.float32)[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    if kind == 'plain':
        # Nothing but a slow change from one colour to the other.
        reach = np.abs(u).max()
        return 0.5 + 0.5 * u / reach
    if kind == 'stripes':
        return 0.5 + _wave(u + rng.uniform(0, period), period)
    if kind == 'checks':
        return 0.5 + 2 * _wave(u, period) * _wave(v, period)
    if kind == 'dots':
        # Every other row is shifted by half a period.
        row = np.floor(v / period)
        across = (u / period + 0.5 * (row % 2)) % 1 - 0.5
        along = (v / period) % 1 - 0.5
        distance = period * np.hypot(across, along)
        return np.clip(0.3 * period - distance + 0.5, 0, 1)
    if kind == 'rings':
        return 0.5 + _wave(np.hypot(u, v) + rng.uniform(0, period), period)
    noise = _smooth_noise(rng, shape, 2.5 * period)
    if kind == 'marble':
        return 0.5 + _wave(u + 0.45 * period * noise, 1.6 * period)
    if kind == 'grain':
        return np.clip(0.5 + 0.3 * noise, 0, 1)
    raise ValueError(f'no texture {kind!r}; there are {BACKGROUNDS} and '
                     "'rings'")


def _mix(pattern: np.ndarray, first: np.ndarray,
         second: np.ndarray) -> np.ndarray:
    return first + pattern[..., None] * (second - first)


def _neutral_colours(
        rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two similar colours of any hue and little saturation."""
    hue = rng.uniform(0, 360)
    saturation = rng.uniform(0.02, 0.24)
    value = rng.uniform(0.3, 0.92)
    # Towards the middle, so that neither colour leaves the range.
    step = rng.uniform(0.06, 0.2) * (-1 if value > 0.6 else 1)
    first = _colour(hue, saturation, value)
    second = _colour(hue + rng.uniform(-40, 40),
                     saturation * rng.uniform(0.6, 1.2), value + step)
    return first, second


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    first, second = _neutral_colours(rng)
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    pattern = _pattern(rng, kind, (size, size), rng.uniform(0, size, 2),
                       rng.uniform(0, math.pi),
                       size * rng.uniform(0.06, 0.2))
    # Cloudy shade over every texture: no two patches are equal.
    shade = 1 + 0.05 * _smooth_noise(rng, (size, size), size / 3)
    return _mix(pattern, first, second) * shade[..., None]


def _texture(rng: np.random.Generator, sprite: Sprite) -> np.ndarray:
    if sprite.name == PEBBLE:
        pattern = _pattern(rng, 'plain', sprite.opacity.shape, sprite.centre,
                           sprite.angle, sprite.extent)
        return _mix(pattern, *_neutral_colours(rng))
    hue, kind = LOOKS[sprite.name]
    hue = hue + rng.uniform(-HUE_JITTER, HUE_JITTER)
    saturation = rng.uniform(0.6, 0.9)
    value = rng.uniform(0.72, 0.95)
    first = _colour(hue, saturation, value)
    if rng.random() < 0.5:
        second = _colour(hue, saturation, value * rng.uniform(0.45, 0.65))
    else:
        second = _colour(hue, saturation * rng.uniform(0.25, 0.45),
                         min(1.0, value * 1.15))
    period = max(sprite.extent * rng.uniform(0.17, 0.28), 4.0)
    pattern = _pattern(rng, kind, sprite.opacity.shape, sprite.centre,
                       sprite.angle, period)
    return _mix(pattern, first, second)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), max(sigma, 0.5),
                            borderType=cv2.BORDER_REPLICATE)


def _shadow(sprite: Sprite, light: np.ndarray) -> np.ndarray:
    """Opacity of the soft shadow that falls away from the light."""
    reach = 0.5 + 0.045 * sprite.extent
    shift = np.array([(1, 0, -light[0] * reach), (0, 1, -light[1] * reach)],
                     np.float32)
    moved = cv2.warpAffine(sprite.opacity, shift, sprite.opacity.shape[::-1],
                           borderMode=cv2.BORDER_REPLICATE)
    return 0.45 * _blurred(moved, 0.045 * sprite.extent)


def _relief(sprite: Sprite, light: np.ndarray) -> np.ndarray:
    """Brightness of a rounded edge under the light, around 1."""
    sigma = max(0.035 * sprite.extent, 0.7)
    height = _blurred(sprite.opacity, sigma)
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
    # An edge of the blurred height is 1 / (sigma sqrt(2 pi)) steep.
    towards = -(slope_x * light[0] + slope_y * light[1]) * sigma * 2.5
    return 1 + 0.4 * towards - 0.12 * (1 - height)


def _cropped(sprite: Sprite) -> tuple[Sprite, tuple[slice, slice]]:
    """The sprite in the window that it and its shadow can change."""
    # Reach of the shadow and three sigma of its blur, see _shadow.
    reach = sprite.extent / 2 + 0.18 * sprite.extent + 3
    low = np.maximum(np.floor(sprite.centre - reach).astype(int), 0)
    high = np.ceil(sprite.centre + reach).astype(int)
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    return replace(sprite, opacity=sprite.opacity[window],
                   centre=sprite.centre - low), window


def paint(rng: np.random.Generator, size: int,
          sprites: list[Sprite]) -> np.ndarray:
    """Paint sprites, the first at the back, on a random background.

    Args:
        rng (Generator): The only source of chance.
        size (int): Side of the image in pixels.
        sprites (list[Sprite]): Objects from back to front.

    Returns:
        ndarray: BGR, uint8, (size, size, 3).
    """
    canvas = _background(rng, size)
    direction = rng.uniform(0, 2 * math.pi)
    light = np.array([math.cos(direction), math.sin(direction)], np.float32)
    for sprite in sprites:
        local, window = _cropped(sprite)
        part = canvas[window]
        part *= (1 - _shadow(local, light))[..., None]
        colour = _texture(rng, local)
        colour *= _relief(local, light)[..., None]
        part += local.opacity[..., None] * (colour - part)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = (ramp[None] * light[0] + ramp[:, None] * light[1]) / math.sqrt(2)
    vignette = (ramp[None]**2 + ramp[:, None]**2) / 2
    gain = 1 + rng.uniform(0.06, 0.28) * slope - 0.1 * vignette
    canvas *= gain[..., None]
    canvas += 0.012 * rng.standard_normal(canvas.shape, np.float32)
    image = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., ::-1])
