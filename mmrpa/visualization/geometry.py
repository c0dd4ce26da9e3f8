"""Where the pixels of an image end up in what a network is given.

No transform is looked up by name: an image whose colours are its coordinates
goes through the config's own test pipeline, and a line is fitted to what
comes out. Resizing, cropping, padding and flipping are all found that way.
"""

from typing import Callable, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from ..preflight import ConfigError

# Levels of a ramp by which a pixel may be off its line, on average over its
# column and alone: dither, rounding, and bicubic ringing at the borders.
_MAX_LEVELS_OFF = (2, 6)
_TOP = 254  # of a ramp: dither may add one level
_INSIDE = 255


class Geometry(NamedTuple):
    """Axis-wise linear map from network input to image.

    Both sides are in pixels with the outer edge of the first pixel at 0:
    ``image = scale * network + offset``.

    Attributes:
        scale (tuple[float, float]): Of x and y.
        offset (tuple[float, float]): Of x and y.
        content (tuple[int, int]): Width and height of the part of the network
            input that shows the image; what is right of and below it is
            padding.
        image_size (tuple[int, int]): Width and height of the image.
    """

    scale: Tuple[float, float]
    offset: Tuple[float, float]
    content: Tuple[int, int]
    image_size: Tuple[int, int]

    def to_network(self, x: np.ndarray, axis: int) -> np.ndarray:
        """Edge coordinates in the image to those in the network input."""
        return (x - self.offset[axis]) / self.scale[axis]

    def seen_box(self) -> Tuple[float, float, float, float]:
        """The part of the image that is shown: left, top, right, bottom."""
        corners = []
        for axis in (0, 1):
            ends = (self.offset[axis],
                    self.offset[axis] + self.scale[axis] * self.content[axis])
            corners.append((max(min(ends), 0),
                            min(max(ends), self.image_size[axis])))
        (left, right), (top, bottom) = corners
        return left, top, right, bottom

    def token_at(self, point: Tuple[float, float], stride: int, width: int
                 ) -> int:
        """The token, y * width + x, that holds a pixel of the image.

        Args:
            point (tuple[float, float]): x and y of a pixel; (0, 0) is the
                first.
            stride (int): Network input pixels a token.
            width (int): Tokens a row.

        Raises:
            ValueError: The point is outside of the image, or of the part of
                it that the network is shown.
        """
        if not all(0 <= value < size for value, size in
                   zip(point, self.image_size, strict=True)):
            raise ValueError(
                f'point {_text(point)} is outside of the image, which has '
                f'{self.image_size[0]}x{self.image_size[1]} pixels (width x '
                'height)')
        cell = []
        for axis, value in enumerate(point):
            where = self.to_network(value + 0.5, axis)
            if not 0 <= where < self.content[axis]:
                box = ', '.join(f'{edge:.0f}' for edge in self.seen_box())
                raise ValueError(
                    f'point {_text(point)} is in a part of the image that the '
                    "config's test pipeline crops away; the network sees the "
                    f'box {box} (left, top, right, bottom)')
            cell.append(int(where // stride))
        return cell[1] * width + cell[0]

    def sample(self, maps: Tensor, stride: int, size: Tuple[int, int],
               mode: str = 'linear') -> Tensor:
        """Maps of tokens as the image's pixels see them.

        Args:
            maps (Tensor): (K, h, w) on the grid of tokens.
            stride (int): Network input pixels a token.
            size (tuple[int, int]): Height and width of the picture, which
                shows the whole image.
            mode (str): ``'linear'``; ``'smooth'``, a cubic B-spline, which
                unlike bicubic interpolation has no dark rings; or
                ``'nearest'`` for tokens with sharp edges.

        Returns:
            Tensor: (K, H, W) in float32. Outside of what the network sees the
            nearest token goes on.
        """
        x, y = (
            _weights(self._pixel_centers(axis, pixels) / stride, tokens, mode)
            for axis, (pixels, tokens) in enumerate(
                zip(size[::-1], maps.shape[:0:-1], strict=True)))
        return y @ maps.float() @ x.T

    def seen(self, size: Tuple[int, int]) -> np.ndarray:
        """Which pixels of a picture the network is shown, (H, W) bool."""
        inside = []
        for axis, pixels in enumerate(size[::-1]):
            where = self._pixel_centers(axis, pixels)
            # Half a pixel of the fit's error must not fade a border.
            slack = 0.5 / abs(self.scale[axis]) + 0.5
            inside.append((where >= -slack)
                          & (where <= self.content[axis] + slack))
        return inside[1][:, None] & inside[0][None]

    def _pixel_centers(self, axis: int, pixels: int) -> np.ndarray:
        """Where a picture's pixels lie in the network input, in edges."""
        size = self.image_size[axis]
        return self.to_network((np.arange(pixels) + 0.5) * size / pixels, axis)


def trace(transform: Callable[[np.ndarray], np.ndarray],
          image_size: Tuple[int, int]) -> Geometry:
    """Find what a pipeline does with the place of pixels.

    Args:
        transform (callable): Takes an image (H, W, 3), uint8, and returns
            what the network would be given, (H', W', 3).
        image_size (tuple[int, int]): Width and height of the image.

    Returns:
        Geometry: To better than a pixel; exact if the whole image is shown.

    Raises:
        ConfigError: The pipeline does more than resizing, cropping, padding
            and flipping.
    """
    out = transform(_coordinate_image(*image_size)).astype(np.float64)
    inside = out[..., 2] >= _INSIDE - 0.5
    rows, cols = (inside.any(axis) for axis in (1, 0))
    if not inside.any() or not inside[np.ix_(rows, cols)].all():
        raise ConfigError(_UNTRACED)
    scales, offsets, contents = [], [], []
    for axis, (kept, size) in enumerate(
            zip((cols, rows), image_size, strict=True)):
        place = np.flatnonzero(kept)
        if place[0] != 0:  # padded on the left: no host does this at test time
            raise ConfigError(_UNTRACED)
        values = out[np.ix_(rows, cols)][..., axis].mean(axis=axis)
        spread = np.ptp(out[np.ix_(rows, cols)][..., axis], axis=axis).max()
        scale, start, off = _fit(place, values, size)
        if off > _MAX_LEVELS_OFF[0] or spread > _MAX_LEVELS_OFF[1]:
            raise ConfigError(_UNTRACED)
        scale, offset = _snap(scale, start, len(place), size)
        scales.append(scale)
        offsets.append(offset)
        contents.append(len(place))
    return Geometry(tuple(scales), tuple(offsets), tuple(contents),
                    tuple(image_size))


def _coordinate_image(width: int, height: int) -> np.ndarray:
    """An image whose red is x and whose green is y, over the whole range.

    A large image has several pixels a level. Rounding up or down at random
    makes the mean of a column right to a fraction of a level.
    """
    random = np.random.default_rng(0)
    image = np.full((height, width, 3), _INSIDE, np.float64)
    image[..., 0] = np.linspace(0, _TOP, width)[None]
    image[..., 1] = np.linspace(0, _TOP, height)[:, None]
    image[..., :2] += random.random((height, width, 2))
    return np.floor(image).astype(np.uint8)


_UNTRACED = (
    'the test pipeline does more to the place of pixels than to resize, crop, '
    'pad at the right and bottom, and flip: pictures over the image cannot be '
    'aligned. Leave such transforms out of test_dataloader.dataset.pipeline')


def _fit(place: np.ndarray, levels: np.ndarray, size: int
         ) -> Tuple[float, float, float]:
    """Image pixels a network pixel, the first pixel's, and levels off."""
    if size == 1 or len(place) == 1:
        return size / len(place), (size / len(place) - 1) / 2, 0.
    # Where it saturates at the borders a resized ramp is no line.
    inner = (levels > 1) & (levels < _TOP - 1)
    use = inner if inner.sum() >= 2 else np.ones_like(inner)
    unit = (size - 1) / _TOP
    scale, start = np.polyfit(place[use], levels[use] * unit, 1)
    off = np.abs(scale * place[use] + start - levels[use] * unit).max() / unit
    return scale, start, off


def _snap(scale: float, start: float, pixels: int, size: int
          ) -> Tuple[float, float]:
    """Scale and offset of edges, exact where the whole axis is shown."""
    offset = start + 0.5 - scale / 2
    whole = abs(scale) * pixels
    first = offset if scale > 0 else offset - whole
    tolerance = max(0.02 * size, 1) / 2
    if abs(whole - size) < tolerance and abs(first) < tolerance:
        scale = np.sign(scale) * size / pixels
        offset = 0. if scale > 0 else float(size)
    return float(scale), float(offset)


def _weights(where: np.ndarray, tokens: int, mode: str) -> Tensor:
    """Each pixel's weights of the tokens of its axis, (pixels, tokens)."""
    if mode == 'nearest':
        nearest = where.astype(int).clip(0, tokens - 1)
        return torch.eye(tokens)[torch.from_numpy(nearest)]
    kernels = dict(
        linear=lambda t: (1 - np.abs(t)).clip(0),
        smooth=lambda t: ((2 - np.abs(t)).clip(0)**3 -
                          4 * (1 - np.abs(t)).clip(0)**3) / 6)
    where = where.clip(0, tokens) - 0.5  # the centre of token 3 is at 3
    around = np.arange(-2, tokens + 2)
    weights = kernels[mode](around[None] - where[:, None]).astype(np.float32)
    # The border goes on: what lies outside counts as the last token.
    table = np.zeros((len(where), tokens), np.float32)
    for column, token in enumerate(around.clip(0, tokens - 1)):
        table[:, token] += weights[:, column]
    return torch.from_numpy(table)


def _text(point: Tuple[float, float]) -> str:
    return ','.join(f'{value:g}' for value in point)
