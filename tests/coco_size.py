"""Write a data set of the size of COCO 2017, to measure checks of data.

    python tests/coco_size.py FOLDER

writes FOLDER/data/coco, where the configs look for it: as many images and
annotations as COCO has, in files of about its size. The boxes and polygons
are random. All images are links to one of 640 x 480, which takes no room, but
stays in the cache of the disk: reading true ones takes longer.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmdet.datasets import CocoDataset
from PIL import Image

WIDTH, HEIGHT = 640, 480
COUNTS = dict(train=(118287, 860001), val=(5000, 36781))
POINTS = 24  # of a polygon: the file gets the size of COCO's
LINKS = 30000  # to one file; file systems allow 32 000 or more


def make_annotations(num_images: int, number: int) -> Iterator[dict]:
    """Objects in random places, one in a hundred a crowd."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) / 2 + 0.5
    for i in range(number):
        size = rng.uniform(8, 200, 2)
        corner = rng.uniform(0, (WIDTH, HEIGHT) - size)
        polygon = (corner + circle * size).round(2).ravel().tolist()
        crowd = i % 100 == 99
        runs = [1000, 2000, WIDTH * HEIGHT - 3000]
        yield dict(
            segmentation=dict(counts=runs, size=[HEIGHT, WIDTH])
            if crowd else [polygon],
            area=round(float(size.prod()), 4), iscrowd=int(crowd),
            image_id=int(rng.integers(num_images)) + 1,
            bbox=[*corner.round(2).tolist(), *size.round(2).tolist()],
            category_id=int(rng.integers(80)) + 1, id=i + 1)


def write_list(file, name: str, items: Iterator[dict]) -> None:
    file.write(f'"{name}": [')
    for number, item in enumerate(items):
        file.write(', ' * (number > 0) + json.dumps(item))
    file.write('], ')


def write_images(folder: Path, number: int) -> Iterator[dict]:
    """Link the images of a split; yields their entries."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    picture = Image.fromarray(noise).resize((WIDTH, HEIGHT))
    folder.mkdir()
    for i in range(1, number + 1):
        name = f'{i:012d}.jpg'
        if i % LINKS == 1:
            source = folder / name
            picture.save(source, quality=95)
        else:
            os.link(source, folder / name)
        yield dict(
            license=3, file_name=name, height=HEIGHT, width=WIDTH, id=i,
            coco_url=f'http://images.cocodataset.org/train2017/{name}',
            date_captured='2013-11-14 17:02:52',
            flickr_url='http://farm9.staticflickr.com/8186/81194_c0ffee_z.jpg')


def main(folder: str) -> None:
    """Write both splits; the folder must have no data/coco yet."""
    root = Path(folder, 'data/coco')
    (root / 'annotations').mkdir(parents=True)
    names = CocoDataset.METAINFO['classes']
    for split, (images, annotations) in COUNTS.items():
        path = root / f'annotations/instances_{split}2017.json'
        with open(path, 'w', encoding='utf-8') as file:
            file.write('{')
            write_list(file, 'images',
                       write_images(root / f'{split}2017', images))
            write_list(file, 'annotations',
                       make_annotations(images, annotations))
            categories = [dict(supercategory='thing', id=i, name=name)
                          for i, name in enumerate(names, 1)]
            file.write(f'"categories": {json.dumps(categories)}}}')
        print(f'{path}: {path.stat().st_size / 2**20:.0f} MB')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python tests/coco_size.py FOLDER')
    main(sys.argv[1])
