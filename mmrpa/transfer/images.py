"""Folders of unlabelled images, as data to calibrate and align on."""

import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

EXTENSIONS = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# Smallest part of an image that an augmented view shows.
MIN_AREA = 0.35


class ImageFolderError(ValueError):
    """A folder without images, or with an image that cannot be read."""


def list_images(folder: Union[str, Path],
                num_images: Optional[int] = None,
                seed: int = 0) -> List[Path]:
    """The images in a folder and below it, sorted.

    Args:
        folder (str | Path): The folder. Files are images by their extension;
            hidden files and folders are left out.
        num_images (int, optional): Take that many of them by chance.
        seed (int): Of the choice.

    Returns:
        list[Path]: The images.

    Raises:
        ImageFolderError: It is no folder, has no images or fewer than
            ``num_images``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageFolderError(f'{str(folder)!r} is not a folder (working '
                               f'directory {os.getcwd()})')
    found = []
    for root, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith('.')]
        found += [
            Path(root, name) for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.')
        ]
    if not found:
        raise ImageFolderError(f'no images in {str(folder)!r} or below it: '
                               f'no file ends in {", ".join(EXTENSIONS)}')
    found.sort()
    if num_images is None:
        return found
    if not 1 <= num_images <= len(found):
        raise ImageFolderError(f'{num_images} images are asked for, but '
                               f'{str(folder)!r} has {len(found)}')
    chosen = torch.randperm(
        len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in sorted(chosen[:num_images].tolist())]


class UnlabelledImages(Dataset):
    """A folder of images, resized or cut to one size.

    A view depends on ``seed``, ``epoch`` and the image alone, not on how many
    processes read the images or where a run was interrupted.

    Args:
        folder (str | Path): See :func:`list_images`.
        size (tuple[int, int]): Height and width of the views in pixels.
        num_images (int, optional): See :func:`list_images`.
        augment (bool): Random parts of the images, from a third of the area
            up, flipped or not. Without it: the largest part in the middle
            that has the shape of ``size``.
        seed (int): Of the choice of images and of their views.

    Attributes:
        epoch (int): Assign to it to get other views.

    Raises:
        ImageFolderError: See :func:`list_images`.
    """

    def __init__(self,
                 folder: Union[str, Path],
                 size: Tuple[int, int],
                 num_images: Optional[int] = None,
                 augment: bool = False,
                 seed: int = 0) -> None:
        self.paths = list_images(folder, num_images, seed)
        self.size = tuple(size)
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._augmentation = v2.Compose([
            v2.RandomResizedCrop(self.size, (MIN_AREA, 1.), antialias=True),
            v2.RandomHorizontalFlip()
        ])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Dict[str, Tensor]:
        """``inputs``: a view (3, H, W), RGB, uint8.

        Raises:
            ImageFolderError: The file cannot be read as an image.
        """
        image = v2.functional.pil_to_tensor(_read(self.paths[index]))
        if not self.augment:
            return dict(inputs=self._middle(image))
        # Views come from torch's global generator; it gets its state back,
        # and the seed stays away from the GPUs' generators.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                _mix(self.seed, self.epoch, index))
            return dict(inputs=self._augmentation(image))

    def _middle(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        scale = min(height / self.size[0], width / self.size[1])
        part = (max(1, round(self.size[0] * scale)),
                max(1, round(self.size[1] * scale)))
        image = v2.functional.center_crop(image, part)
        return v2.functional.resize(image, self.size, antialias=True)


def _mix(*numbers: int) -> int:
    """One seed from several; neighbours give seeds with nothing in common."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError,
            Image.DecompressionBombError) as error:
        raise ImageFolderError(
            f'cannot read {str(path)!r} as an image: {error}; remove it from '
            'the folder or write it again') from error


def load_images(folder: Union[str, Path],
                size: Tuple[int, int] = (224, 224),
                num_images: Optional[int] = 64,
                *,
                mean: Sequence[float] = IMAGENET_MEAN,
                std: Sequence[float] = IMAGENET_STD,
                to_rgb: bool = True,
                seed: int = 0) -> Tensor:
    """Images of a folder as a batch for a backbone.

    Args:
        folder (str | Path): See :func:`list_images`.
        size (tuple[int, int]): Height and width in pixels.
        num_images (int, optional): Take that many by chance; all if there
            are no more, or if it is None.
        mean (sequence[float]): Of each channel, on the scale of 0 to 255.
        std (sequence[float]): Of each channel, on the scale of 0 to 255.
        to_rgb (bool): Channels in the order RGB, else BGR. ``mean`` and
            ``std`` are in the same order.
        seed (int): Of the choice.

    Returns:
        Tensor: (B, 3, H, W), float32.

    Raises:
        ImageFolderError: There are no images, or one cannot be read.
    """
    available = len(list_images(folder))
    number = None if num_images is None else min(num_images, available)
    images = UnlabelledImages(folder, size, number, seed=seed)
    batch = torch.stack([item['inputs'] for item in map(
        images.__getitem__, range(len(images)))]).float()
    if not to_rgb:
        batch = batch.flip(1)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    return (batch - mean) / std


def read_normalisation(cfg: Mapping[str, Any]) -> Dict[str, Any]:
    """How a config of mmdet, mmseg or mmpretrain normalises its images.

    Args:
        cfg (Mapping): The config.

    Returns:
        dict: ``mean``, ``std`` and ``to_rgb``, as :func:`load_images` takes
        them.

    Raises:
        ValueError: The config has no mean or std.
    """
    # mmengine's Runner takes the one at the top for models that have none.
    found = dict((cfg.get('model') or {}).get('data_preprocessor')
                 or cfg.get('data_preprocessor') or {})
    if found.get('mean') is None or found.get('std') is None:
        raise ValueError('the config has no mean and std in '
                         'data_preprocessor or model.data_preprocessor')
    to_rgb = found.get('to_rgb', found.get('bgr_to_rgb', False))
    return dict(mean=list(found['mean']), std=list(found['std']),
                to_rgb=bool(to_rgb))
