"""Which checkpoints in a working directory are of an earlier training.

A training that starts anew in a folder with checkpoints in it notes these. If
it is killed before its first own one, ``--resume`` would else go on with the
earlier training, under the new settings.
"""

import contextlib
import hashlib
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .whole_files import whole_file

NOTES = 'earlier_checkpoints'  # beside last_checkpoint
# What a changed byte in a file's table makes Python's zipfile raise: it may
# stand for another version, or a name may be no text any more.
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError,
           ValueError, OverflowError, struct.error)


def note_earlier(work_dir: Path, paths: Iterable[Path]) -> None:
    """Note files as those of an earlier training, and no others.

    Args:
        work_dir (Path): The working directory; it exists.
        paths (Iterable[Path]): Files, there or in another folder. Without any
            there will be no notes.

    Raises:
        OSError: A file cannot be read, or the notes not be written.
    """
    lines = [f'{_fingerprint(path)} {path.name}\n' for path in paths]
    if lines:
        with whole_file(work_dir / NOTES) as file:
            file.write_text(''.join(sorted(lines)))
    else:
        with contextlib.suppress(FileNotFoundError):
            (work_dir / NOTES).unlink()


def find_earlier(work_dir: Path, paths: Iterable[Path]) -> set[Path]:
    """Which files are noted; not those that have been written anew since."""
    try:
        noted = set((work_dir / NOTES).read_text().splitlines())
    except FileNotFoundError:
        return set()
    return {path for path in paths
            if path.is_file() and f'{_fingerprint(path)} {path.name}' in noted}


def _fingerprint(path: Path) -> str:
    """What tells two checkpoints of one name apart, and not two copies.

    torch writes zip files, which have a checksum of each tensor in a table.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size)
                     for part in archive.infolist()]
    except _BROKEN:  # or of an old torch
        parts = [path.stat().st_size]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
