"""Write sample data in the formats of COCO, ADE20K and ImageNet.

The images show coloured shapes that overlap; the same scenes are written as
COCO and as ADE20K, and images of one shape each as ImageNet:

    OUT/coco/{train,val}2017/*.jpg
    OUT/coco/annotations/instances_{train,val}2017.json
    OUT/ade/images/{training,validation}/*.jpg
    OUT/ade/annotations/{training,validation}/*.png
    OUT/imagenet/{train,val}/CLASS/*.jpg
    OUT/sample_data.json

Same arguments, same files. The last file records the arguments; where it
records the ones that are asked for, nothing is written.
"""
import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sample_data.scene import CLASSES, make_scene
from sample_data.writers import (
    AdeWriter,
    CocoWriter,
    ImageNetWriter,
    encode_jpeg,
)

MARKER = 'sample_data.json'
# Raise it when the same arguments give other images.
VERSION = 1
FOLDERS = ('coco', 'ade', 'imagenet')
MIN_IMAGE_SIZE = 32
# The object of a classification image is its subject: never a small one.
MAIN_OBJECT_SCALE_RANGE = (0.3, 0.75)
MAX_OBJECTS = 4
PROGRESS_EVERY = 200


@dataclass(frozen=True)
class Settings:
    """All that decides the content of the files.

    Attributes:
        seed (int): Seed of all chance, at least 0.
        image_size (int): Side of the images in pixels, at least 32.
        num_train (int): Scenes to train on, in COCO's and ADE20K's format.
        num_val (int): Held-out scenes.
        num_cls_train (int): Images of one object to train on.
        num_cls_val (int): Held-out images of one object.

    Raises:
        ValueError: If a value is out of range.
    """
    seed: int = 0
    image_size: int = 128
    num_train: int = 600
    num_val: int = 100
    num_cls_train: int = 800
    num_cls_val: int = 200

    def __post_init__(self) -> None:
        least = dict.fromkeys(asdict(self), 1)
        least.update(seed=0, image_size=MIN_IMAGE_SIZE)
        for name, value in asdict(self).items():
            if value < least[name]:
                raise ValueError(f'{name} is {value}; it must be at least '
                                 f'{least[name]}')

    def record(self) -> dict:
        """What the marker file holds."""
        return dict(tool='make_sample_data.py', version=VERSION,
                    arguments=asdict(self))

    def num_files(self) -> dict[str, int]:
        """Number of files that each glob pattern finds in a whole set."""
        return {
            'coco/train2017/*.jpg': self.num_train,
            'coco/val2017/*.jpg': self.num_val,
            'coco/annotations/*.json': 2,
            'ade/images/training/*.jpg': self.num_train,
            'ade/images/validation/*.jpg': self.num_val,
            'ade/annotations/training/*.png': self.num_train,
            'ade/annotations/validation/*.png': self.num_val,
            'imagenet/train/*/*.jpg': self.num_cls_train,
            'imagenet/val/*/*.jpg': self.num_cls_val,
        }


def _read_marker(out: Path) -> dict:
    """The record of the set in ``out``, a folder that is not empty."""
    marker = out / MARKER
    advice = 'name another folder or remove this one yourself'
    if not marker.is_file():
        raise FileExistsError(
            f'{out} is not empty and was not written by this tool (it has no '
            f'{MARKER}); {advice}')
    try:
        record = json.loads(marker.read_text())
    except ValueError as error:
        raise FileExistsError(
            f'{marker} is not readable as JSON ({error}); {advice}') from error
    if not isinstance(record, dict) or record.get(
            'tool') != Settings().record()['tool']:
        raise FileExistsError(f'{marker} was not written by this tool; '
                              f'{advice}')
    return record


def _is_done(out: Path, settings: Settings, overwrite: bool) -> bool:
    """Whether ``out`` holds the set that is asked for already.

    Raises:
        FileExistsError: If there is something in the way that must not, or
            not without ``overwrite``, be replaced.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f'{out} exists and is not a folder; name '
                              'another place')
    if os.path.ismount(out):
        # A folder is put into place by renaming, which a mount refuses.
        raise FileExistsError(f'{out} is a mount point; name a folder in it')
    names = sorted(p.name for p in out.iterdir())
    if not names:
        return False
    record = _read_marker(out)
    if overwrite:
        foreign = [n for n in names if n not in (*FOLDERS, MARKER)]
        if foreign:
            raise FileExistsError(
                f'{out} holds {foreign}, which this tool did not write; move '
                'that elsewhere, or name another folder')
        return False
    if record != settings.record():
        raise FileExistsError(
            f'{out} holds a set of version {record.get("version")} with '
            f'{record.get("arguments")}; asked for is version {VERSION} with '
            f'{asdict(settings)}. Use --overwrite to replace it, or name '
            'another folder')
    for pattern, expected in settings.num_files().items():
        found = sum(1 for _ in out.glob(pattern))
        if found != expected:
            raise FileExistsError(
                f'{out / pattern} finds {found} files and not {expected}: '
                'the set is damaged. Use --overwrite to write it again')
    return True


class _Progress:
    """A line every few hundred images."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def step(self) -> None:
        self._done += 1
        if self._done % PROGRESS_EVERY == 0 or self._done == self._total:
            print(f'sample data: {self._done}/{self._total} images',
                  flush=True)


def _write_scenes(out: Path, split: str, stream: np.random.SeedSequence,
                  count: int, size: int, progress: _Progress) -> None:
    coco = CocoWriter(out / 'coco', split)
    ade = AdeWriter(out / 'ade', split)
    # One stream an image: the first images of a larger set are the same.
    for index, child in enumerate(stream.spawn(count)):
        rng = np.random.default_rng(child)
        classes = rng.integers(len(CLASSES),
                               size=rng.integers(1, MAX_OBJECTS + 1))
        scene = make_scene(rng, size, classes.tolist())
        jpeg = encode_jpeg(scene.image)
        coco.add(index, jpeg, scene)
        ade.add(index, jpeg, scene)
        progress.step()
    coco.close()


def _write_single_objects(out: Path, split: str,
                          stream: np.random.SeedSequence, count: int,
                          size: int, progress: _Progress) -> None:
    writer = ImageNetWriter(out / 'imagenet', split)
    for index, child in enumerate(stream.spawn(count)):
        rng = np.random.default_rng(child)
        class_index = index % len(CLASSES)
        scene = make_scene(rng, size, [class_index], MAIN_OBJECT_SCALE_RANGE)
        writer.add(index, encode_jpeg(scene.image), class_index)
        progress.step()


def _write(out: Path, settings: Settings) -> None:
    # A stream each, so that no split knows of another's size.
    streams = np.random.SeedSequence(settings.seed).spawn(4)
    size = settings.image_size
    progress = _Progress(settings.num_train + settings.num_val
                         + settings.num_cls_train + settings.num_cls_val)
    _write_scenes(out, 'train', streams[0], settings.num_train, size, progress)
    _write_scenes(out, 'val', streams[1], settings.num_val, size, progress)
    _write_single_objects(out, 'train', streams[2], settings.num_cls_train,
                          size, progress)
    _write_single_objects(out, 'val', streams[3], settings.num_cls_val, size,
                          progress)
    marker = json.dumps(settings.record(), indent=2) + '\n'
    (out / MARKER).write_text(marker)


def _make_writable(folder: Path) -> None:
    """Make a folder, or see that it can be written to."""
    advice = 'name a place that you can write to'
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'cannot make the folder {folder}: {error.strerror}; '
                      f'{advice}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'no permission to write in {folder}; {advice}')


def _put_into_place(new: Path, out: Path, old: Path) -> None:
    """Rename ``new`` to ``out``, and what was there to ``old``."""
    if not out.exists():
        new.rename(out)
        return
    out.rename(old)
    try:
        new.rename(out)
    finally:
        # Else the caller would remove it together with its temporary folder.
        if not out.exists():
            old.rename(out)


def make_sample_data(out: str | os.PathLike,
                     settings: Settings = Settings(),
                     overwrite: bool = False) -> bool:
    """Write the three datasets.

    The files are written to a folder beside ``out`` that is renamed at the
    end: a set that is there is whole.

    Args:
        out (str | PathLike): Folder to make; its parents are made, too.
        settings (Settings): What to write.
        overwrite (bool): Replace an earlier set of this tool, even one with
            the same settings.

    Returns:
        bool: False if ``out`` held this very set and nothing was written.

    Raises:
        FileExistsError: If ``out`` is not empty, unless it holds this very
            set, or an earlier set and ``overwrite`` is true.
        OSError: If ``out`` cannot be written.
    """
    out = Path(out).resolve()
    if _is_done(out, settings, overwrite):
        return False
    _make_writable(out.parent)
    # Removed after an error or Ctrl-C, too.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.',
                                     suffix='.partial',
                                     dir=out.parent) as folder:
        # In a subfolder, because the temporary one is private to the user.
        new = Path(folder, 'new')
        new.mkdir()
        _write(new, settings)
        _put_into_place(new, out, Path(folder, 'old'))
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', metavar='OUT', help='folder to make')
    defaults = Settings()
    for name, text in dict(
            seed='seed of all chance',
            image_size='side of the images in pixels',
            num_train='COCO and ADE20K scenes to train on',
            num_val='COCO and ADE20K scenes held out',
            num_cls_train='ImageNet images to train on',
            num_cls_val='ImageNet images held out').items():
        parser.add_argument('--' + name.replace('_', '-'), type=int,
                            default=getattr(defaults, name), metavar='N',
                            help=f'{text} (default: %(default)s)')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a set that this tool has written, even the same one')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or leaves through ``SystemExit(2)``."""
    parser = _parser()
    values = vars(parser.parse_args(argv))
    out, overwrite = values.pop('out'), values.pop('overwrite')
    try:
        written = make_sample_data(out, Settings(**values), overwrite)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f'{out}: ' + ('written' if written else 'already there'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
