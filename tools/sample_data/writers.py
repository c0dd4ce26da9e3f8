"""The three dataset formats; each writer owns one folder."""
import json
from pathlib import Path

import cv2
import numpy as np

from .scene import CLASSES, Scene

# With gaps, as in COCO itself (1..90 for 80 classes): code that takes a
# category id for a class index fails here and not on the real data.
CATEGORY_IDS = (1, 3, 4, 8, 11)
# In the label maps 0 is unlabelled, 1 the first of these.
ADE_CLASSES = ('background', *CLASSES)
JPEG_QUALITY = 92


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG file of a BGR uint8 image (H, W, 3)."""
    return _encode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _encode(suffix: str, image: np.ndarray, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, options)
    if not done:
        raise RuntimeError(f'OpenCV cannot encode {image.shape} as {suffix}')
    return data.tobytes()


class CocoWriter:
    """Writes ``{split}2017/*.jpg`` and ``instances_{split}2017.json``.

    Args:
        root (Path): Folder of the dataset.
        split (str): 'train' or 'val'.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._images_dir = root / f'{split}2017'
        self._json = root / 'annotations' / f'instances_{split}2017.json'
        self._images_dir.mkdir(parents=True)
        self._json.parent.mkdir(exist_ok=True)
        # Odd ids for one split and even ids for the other: unique over both
        # for any number of images, as COCO's are.
        self._offset = 1 if split == 'train' else 2
        self._images: list[dict] = []
        self._annotations: list[dict] = []

    def add(self, index: int, jpeg: bytes, scene: Scene) -> None:
        """Write the image and keep its annotations for :meth:`close`."""
        image_id = 2 * index + self._offset
        name = f'{image_id:012d}.jpg'
        (self._images_dir / name).write_bytes(jpeg)
        height, width = scene.image.shape[:2]
        self._images.append(
            dict(id=image_id, file_name=name, width=width, height=height))
        for annotation in scene.annotations:
            polygons = [
                np.round(p, 3).ravel().tolist() for p in annotation.polygons
            ]
            self._annotations.append(
                dict(
                    id=len(self._annotations) + 1,
                    image_id=image_id,
                    category_id=CATEGORY_IDS[annotation.class_index],
                    segmentation=polygons,
                    bbox=list(annotation.bbox),
                    area=annotation.area,
                    iscrowd=0))

    def close(self) -> None:
        """Write the annotation file."""
        categories = [
            dict(id=i, name=name, supercategory='shape')
            for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)
        ]
        self._json.write_text(
            json.dumps(
                dict(
                    info=dict(description='shapes drawn by '
                              'make_sample_data.py'),
                    licenses=[],
                    images=self._images,
                    annotations=self._annotations,
                    categories=categories)) + '\n')


class AdeWriter:
    """Writes ``images/{split}/*.jpg`` and ``annotations/{split}/*.png``.

    Args:
        root (Path): Folder of the dataset.
        split (str): 'train' or 'val'.
    """

    def __init__(self, root: Path, split: str) -> None:
        folder = dict(train='training', val='validation')[split]
        self._split = split
        self._images_dir = root / 'images' / folder
        self._maps_dir = root / 'annotations' / folder
        self._images_dir.mkdir(parents=True)
        self._maps_dir.mkdir(parents=True)

    def add(self, index: int, jpeg: bytes, scene: Scene) -> None:
        """Write the image and its label map."""
        name = f'ADE_{self._split}_{index + 1:08d}'
        (self._images_dir / f'{name}.jpg').write_bytes(jpeg)
        labels = np.full(scene.image.shape[:2],
                         ADE_CLASSES.index('background') + 1, np.uint8)
        labels[scene.unlabelled] = 0
        for annotation in scene.annotations:
            label = ADE_CLASSES.index(CLASSES[annotation.class_index]) + 1
            labels[annotation.mask] = label
        (self._maps_dir / f'{name}.png').write_bytes(
            _encode('.png', labels, []))


class ImageNetWriter:
    """Writes ``{split}/{class}/*.jpg``.

    Args:
        root (Path): Folder of the dataset.
        split (str): 'train' or 'val'.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._split = split
        self._root = root / split
        for name in CLASSES:
            (self._root / name).mkdir(parents=True)

    def add(self, index: int, jpeg: bytes, class_index: int) -> None:
        """Write one image into the folder of its class."""
        name = f'{self._split}_{index + 1:08d}.jpg'
        (self._root / CLASSES[class_index] / name).write_bytes(jpeg)
