"""Which shapes a scene holds, where they are, and what of them is seen."""
import math
from dataclasses import dataclass

import cv2
import numpy as np

from .paint import PEBBLE, Sprite, paint

# In alphabetical order: mmpretrain sorts class folders by name, so index i
# means the same class in all three datasets.
CLASSES = ('cross', 'disc', 'square', 'star', 'triangle')

# Label maps are drawn at this multiple of the image size; the share of an
# object in a pixel then is its opacity, and the majority is its label.
SUPERSAMPLE = 4
# An instance of which less is to be seen is not annotated. People could not
# name it either, and a detector that is asked to find it learns from noise.
MIN_VISIBLE_FRACTION = 0.25
MIN_VISIBLE_PIXELS = 40
# A part of an instance that an occluder cut off is left unlabelled below
# this area in pixels: as a polygon it would be two or three points.
MIN_PART_PIXELS = 6
# Extent (longer side of the unoccluded box) over image side. Below
# MIN_EXTENT_PIXELS every shape would fall under MIN_VISIBLE_PIXELS.
SCALE_RANGE = (0.12, 0.55)
MIN_EXTENT_PIXELS = 11
# An object reaches over the border by this part of its extent at most.
MAX_OVERHANG = 0.12
# Polygons may leave the traced outline by this many pixels.
POLYGON_TOLERANCE = 0.25
PLACEMENT_TRIALS = 30
# Pebbles are things of no class, and so neither background nor annotated.
MAX_PEBBLES = 3
PEBBLE_SCALE_RANGE = (0.04, 0.085)
# Label of pebbles and of objects or parts that are not annotated.
UNLABELLED = 255


@dataclass(frozen=True)
class Annotation:
    """What is known about one object of a scene.

    Attributes:
        class_index (int): Index into ``CLASSES``.
        mask (ndarray): Visible pixels, bool, (H, W).
        polygons (list[ndarray]): Outlines of the visible parts, (n, 2) x and
            y in pixels, where the first pixel's corners are 0 and 1.
        extent (float): Longer side of the unoccluded box in pixels.
        visible_fraction (float): Visible area over the whole area, the part
            outside the image included.
    """
    class_index: int
    mask: np.ndarray
    polygons: list[np.ndarray]
    extent: float
    visible_fraction: float

    @property
    def area(self) -> int:
        """Number of visible pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """Tight x, y, width and height of the visible pixels."""
        rows = np.flatnonzero(self.mask.any(axis=1))
        columns = np.flatnonzero(self.mask.any(axis=0))
        return (int(columns[0]), int(rows[0]),
                int(columns[-1] - columns[0]) + 1,
                int(rows[-1] - rows[0]) + 1)


@dataclass(frozen=True)
class Scene:
    """An image and its annotations.

    Attributes:
        image (ndarray): BGR, uint8, (H, W, 3).
        annotations (list[Annotation]): From back to front.
        unlabelled (ndarray): Pixels of pebbles and of objects or parts that
            are not annotated, bool, (H, W).
    """
    image: np.ndarray
    annotations: list[Annotation]
    unlabelled: np.ndarray


def _star() -> np.ndarray:
    angles = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.5)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)


def _cross() -> np.ndarray:
    a = 0.36
    return np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                     (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])


def _regular(corners: int) -> np.ndarray:
    angles = (np.arange(corners) + 0.5) * 2 * math.pi / corners
    return np.stack([np.sin(angles), -np.cos(angles)], 1)


_OUTLINES = {
    'cross': _cross(),
    'disc': _regular(64),
    'square': _regular(4),
    'star': _star(),
    'triangle': _regular(3),
}


def _rounded(points: np.ndarray) -> np.ndarray:
    """Cut the corners of a closed outline three times."""
    for cut in (0.1, 0.25, 0.25):
        ahead = np.roll(points, -1, axis=0)
        points = np.stack([(1 - cut) * points + cut * ahead,
                           cut * points + (1 - cut) * ahead], 1).reshape(-1, 2)
    return points


def _outline(name: str, extent: float, angle: float,
             aspect: float) -> np.ndarray:
    """The outline of a class around (0, 0), in pixels, (n, 2)."""
    points = _OUTLINES[name]
    if name != 'disc':
        points = _rounded(points)
    points = points * (math.sqrt(aspect), 1 / math.sqrt(aspect))
    return _turned(points, extent, angle)


def _turned(points: np.ndarray, extent: float, angle: float) -> np.ndarray:
    """Rotate, centre at (0, 0) and scale to a longer side of ``extent``."""
    turn = np.array([(math.cos(angle), math.sin(angle)),
                     (-math.sin(angle), math.cos(angle))])
    points = points @ turn
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (extent / (high - low).max())


def _fill(canvas: np.ndarray, outline: np.ndarray, value: int) -> None:
    """Fill an outline, in pixels of the image, on a supersampled canvas."""
    bits = 4
    # OpenCV's whole numbers are the centres of pixels, ours the corners.
    points = (outline * SUPERSAMPLE - 0.5) * (1 << bits)
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], value,
                 lineType=cv2.LINE_8, shift=bits)


def _coverage(fine: np.ndarray, size: int) -> np.ndarray:
    """Part of each pixel that a supersampled map covers, uint8 0..255."""
    return cv2.resize(fine.astype(np.uint8) * 255, (size, size),
                      interpolation=cv2.INTER_AREA)


def _outer_and_holes(mask: np.ndarray) -> tuple[list[np.ndarray], int]:
    outlines, tree = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return [], 0
    # OpenCV 4 and 5 differ in tree's leading dimensions.
    parents = np.reshape(tree, (-1, 4))[:, 3]
    outer = [
        o.reshape(-1, 2) for o, p in zip(outlines, parents, strict=True)
        if p < 0
    ]
    return outer, int((parents >= 0).sum())


def _has_hole(mask: np.ndarray) -> bool:
    return _outer_and_holes(mask)[1] > 0


def _polygons(fine: np.ndarray) -> list[np.ndarray]:
    """Outlines of a supersampled mask in pixels of the image."""
    left, top, width, height = cv2.boundingRect(fine.astype(np.uint8))
    part = fine[top:top + height, left:left + width].astype(np.uint8)
    # A contour runs through the centres of border pixels and so loses half
    # of each: three times finer, what is lost does not matter.
    zoom = 3
    part = cv2.resize(part, None, fx=zoom, fy=zoom,
                      interpolation=cv2.INTER_NEAREST)
    scale = SUPERSAMPLE * zoom
    corner = np.array((left, top)) / SUPERSAMPLE
    polygons = []
    for outline in _outer_and_holes(part)[0]:
        points = cv2.approxPolyDP(outline.reshape(-1, 1, 2),
                                  POLYGON_TOLERANCE * scale, True)
        if len(points) >= 3:
            # OpenCV's whole numbers are the centres of pixels.
            polygons.append((points.reshape(-1, 2) + 0.5) / scale + corner)
    return polygons


def _full_area(outline: np.ndarray, extent: float) -> float:
    """Area in pixels of a filled outline that no border cuts."""
    side = math.ceil(extent * SUPERSAMPLE) + 4
    canvas = np.zeros((side, side), np.uint8)
    _fill(canvas, outline + side / 2 / SUPERSAMPLE, 1)
    return int(canvas.sum()) / SUPERSAMPLE**2


@dataclass(frozen=True)
class _Placed:
    sprite: Sprite
    full_area: float


class _Layout:
    """Objects placed so far, and the supersampled map of who is in front.

    ``ids`` is uint8, (4 size, 4 size): 0 is background, k is the k-th object,
    UNLABELLED a pebble.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids = np.zeros((size * SUPERSAMPLE,) * 2, np.uint8)
        self.pebbles: list[Sprite] = []
        self.placed: list[_Placed] = []

    def add_pebble(self, rng: np.random.Generator) -> None:
        """Put a pebble on the ground, wholly inside the image."""
        extent = self.size * rng.uniform(*PEBBLE_SCALE_RANGE)
        angle = rng.uniform(0, 2 * math.pi)
        uneven = _regular(7) * rng.uniform(0.6, 1, (7, 1))
        outline = _turned(_rounded(uneven), extent, angle)
        centre = rng.uniform(extent, self.size - extent, 2)
        _fill(self.ids, outline + centre, UNLABELLED)
        self.pebbles.append(
            self._sprite(PEBBLE, outline, centre, angle, extent))

    def _sprite(self, name: str, outline: np.ndarray, centre: np.ndarray,
                angle: float, extent: float) -> Sprite:
        own = np.zeros_like(self.ids)
        _fill(own, outline + centre, 1)
        opacity = _coverage(own, self.size).astype(np.float32) / 255
        return Sprite(name, opacity, centre, angle, extent)

    def try_add(self, rng: np.random.Generator, class_index: int,
                extent: float, hide: bool) -> bool:
        """Place one object at random; False if it cannot stand there.

        Args:
            rng (Generator): Source of angle, aspect and position.
            class_index (int): Class of the object.
            extent (float): Longer side of its box in pixels.
            hide (bool): Whether it may hide an earlier object so far that
                this one is not annotated any more.
        """
        angle = rng.uniform(0, 2 * math.pi)
        outline = _outline(CLASSES[class_index], extent, angle,
                           rng.uniform(0.85, 1.18))
        centre = self._position(rng, outline, extent)
        number = len(self.placed) + 1
        ids = self.ids.copy()
        _fill(ids, outline + centre, number)

        areas = [p.full_area for p in self.placed]
        areas.append(_full_area(outline, extent))
        for k, area in enumerate(areas, 1):
            mask = ids == k
            # Neither COCO polygons nor a reader can tell a hole from a
            # second object on top, so there are none.
            if _has_hole(mask):
                return False
            seen = np.count_nonzero(mask) / SUPERSAMPLE**2 / area
            if seen < MIN_VISIBLE_FRACTION and not hide:
                return False
        sprite = self._sprite(CLASSES[class_index], outline, centre, angle,
                              extent)
        self.placed.append(_Placed(sprite, areas[-1]))
        self.ids = ids
        return True

    def _position(self, rng: np.random.Generator, outline: np.ndarray,
                  extent: float) -> np.ndarray:
        half = outline.max(0)
        low = half - MAX_OVERHANG * extent
        high = self.size - low
        if self.placed and rng.random() < 0.5:
            # Uniform positions rarely overlap; half of the objects are put
            # next to another one, so that occlusion is common.
            other = self.placed[rng.integers(len(self.placed))]
            reach = rng.uniform(0.5, 0.85) * (extent + other.sprite.extent) / 2
            angle = rng.uniform(0, 2 * math.pi)
            step = np.array([math.cos(angle), math.sin(angle)]) * reach
            return np.clip(other.sprite.centre + step, low, high)
        return rng.uniform(low, high)

    def without_crumbs(self) -> np.ndarray:
        """``ids`` with everything that is not annotated as UNLABELLED."""
        ids = self.ids.copy()
        fine = SUPERSAMPLE**2
        for k, placed in enumerate(self.placed, 1):
            mask = self.ids == k
            kept = np.count_nonzero(mask)
            if len(_outer_and_holes(mask)[0]) > 1:
                # Only then: labelling parts takes ten times as long as
                # tracing them.
                count, parts, stats, _ = cv2.connectedComponentsWithStats(
                    mask.astype(np.uint8), connectivity=8)
                for part in range(1, count):
                    area = int(stats[part, cv2.CC_STAT_AREA])
                    if area < MIN_PART_PIXELS * fine:
                        ids[parts == part] = UNLABELLED
                        kept -= area
            if (kept < MIN_VISIBLE_FRACTION * placed.full_area * fine
                    or kept < MIN_VISIBLE_PIXELS * fine):
                ids[mask] = UNLABELLED
        return ids

    def annotate(self) -> tuple[list[Annotation], np.ndarray]:
        """Annotations from back to front, and the unlabelled pixels."""
        ids = self.without_crumbs()
        values = [0, *range(1, len(self.placed) + 1), UNLABELLED]
        shares = np.stack([_coverage(ids == v, self.size) for v in values])
        labels = np.array(values, np.uint8)[shares.argmax(0)]
        annotations = []
        for k, placed in enumerate(self.placed, 1):
            mask = labels == k
            if np.count_nonzero(mask) < MIN_VISIBLE_PIXELS:
                labels[mask] = UNLABELLED
                continue
            fine = ids == k
            annotations.append(Annotation(
                class_index=CLASSES.index(placed.sprite.name),
                mask=mask,
                polygons=_polygons(fine),
                extent=placed.sprite.extent,
                visible_fraction=float(
                    np.count_nonzero(fine) / SUPERSAMPLE**2
                    / placed.full_area)))
        return annotations, labels == UNLABELLED


def make_scene(rng: np.random.Generator, size: int, class_indices: list[int],
               scale_range: tuple[float, float] = SCALE_RANGE) -> Scene:
    """Draw one scene.

    Args:
        rng (Generator): The only source of chance.
        size (int): Side of the image in pixels, at least 32.
        class_indices (list[int]): Classes of the objects, back to front. An
            object for which no place is found is left out; the first never.
        scale_range (tuple[float, float]): Least and largest extent over
            ``size``; extents are log-uniform between them.

    Returns:
        Scene: Image and annotations, at least one.
    """
    layout = _Layout(size)
    for _ in range(rng.integers(MAX_PEBBLES + 1)):
        layout.add_pebble(rng)
    low = max(scale_range[0] * size, MIN_EXTENT_PIXELS)
    high = max(scale_range[1] * size, low)
    for class_index in class_indices:
        extent = math.exp(rng.uniform(math.log(low), math.log(high)))
        # Some objects may vanish behind others, as in photographs, but with
        # many of them the unlabelled part would not be little.
        hide = rng.random() < 0.1
        for _ in range(PLACEMENT_TRIALS):
            if layout.try_add(rng, class_index, extent, hide):
                break
    annotations, unlabelled = layout.annotate()
    sprites = layout.pebbles + [p.sprite for p in layout.placed]
    image = paint(rng, size, sprites)
    return Scene(image, annotations, unlabelled)
