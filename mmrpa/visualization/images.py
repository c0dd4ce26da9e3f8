"""Checks of image files before a decoder that trusts them sees them."""

import os
import warnings
from pathlib import Path
from typing import Optional, Union

from PIL import Image, UnidentifiedImageError

# Decoders that are asked. PIL's for EPS would start Ghostscript, and rare ones
# are where most of its security fixes are; OpenCV reads none of the others.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
# What a damaged file makes PIL's decoders raise.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError)


def check_image(path: Union[str, Path],
                max_bytes: Optional[int] = None,
                max_pixels: Optional[int] = None) -> None:
    """Check from its header that a file is an image of a bearable size.

    Args:
        path (str | Path): The file.
        max_bytes (int, optional): Its greatest size.
        max_pixels (int, optional): Its greatest width times height, which
            bounds what decoding it can take.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image, cut off, or too large.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'image {str(path)!r} does not exist (working '
                                f'directory {os.getcwd()})')
    name, size = Path(path).name, os.path.getsize(path)
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f'{name} has {size / 2**20:.1f} MiB; at most '
                         f'{max_bytes / 2**20:.1f} MiB are taken')
    try:
        with warnings.catch_warnings():
            # PIL warns of large headers; max_pixels decides here.
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise _TooLarge(
                        f'{name} has {width}x{height} pixels; at most '
                        f'{max_pixels / 1e6:g} million are taken')
                image.load()
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError as error:  # PIL's own limit
        raise ValueError(f'{name} is too large: {error}') from None
    except UnidentifiedImageError:
        raise ValueError(f'{name} is not an image, or of none of the formats '
                         f'{", ".join(_FORMATS)}') from None
    except _BROKEN as error:
        raise ValueError(f'{name} is a damaged image: '
                         f'{str(error) or type(error).__name__}') from None


class _TooLarge(ValueError):
    pass
