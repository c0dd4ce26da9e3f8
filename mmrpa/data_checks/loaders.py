"""Which step of a pipeline reads the files, and how it decodes them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# mmcv has others, tifffile and turbojpeg, whose files are not read here.
_BACKENDS = ('cv2', 'pillow')


class Decoder(NamedTuple):
    """Arguments of ``mmcv.imfrombytes``.

    Attributes:
        backend (str): 'cv2' or 'pillow'.
        flag (str): 'color', 'unchanged' and so on.
    """

    backend: str
    flag: str


IMAGES = Decoder('cv2', 'color')  # mmcv's LoadImageFromFile, without arguments
MAPS = Decoder('pillow', 'unchanged')  # mmseg's LoadAnnotations


def step_name(step: Mapping) -> str:
    """Name of a transform's type, without its scope or module."""
    kind = step.get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.rpartition('.')[-1]


def image_decoder(steps: Iterable[Mapping]) -> Decoder | None:
    """How mmcv's LoadImageFromFile decodes, None without such a step."""
    return _find(steps, 'LoadImageFromFile', IMAGES)


def ignores_empty(steps: Iterable[Mapping]) -> bool:
    """Whether mmcv's LoadImageFromFile passes over what stops it."""
    return any(step_name(step) == 'LoadImageFromFile'
               and step.get('ignore_empty') for step in steps)


def map_decoder(steps: Iterable[Mapping]) -> Decoder | None:
    """How mmseg's LoadAnnotations decodes, None without such a step."""
    return _find(steps, 'LoadAnnotations', MAPS)


def _find(steps: Iterable[Mapping], name: str,
          default: Decoder) -> Decoder | None:
    for step in steps:
        if step_name(step) == name:
            backend = step.get('imdecode_backend', default.backend) or 'cv2'
            if backend in _BACKENDS:
                return Decoder(backend,
                               str(step.get('color_type', default.flag)))
    return None
