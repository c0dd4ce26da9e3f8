"""Files that are written wholly or not at all."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Iterator, Union


def beside(path: Path, suffix: str = '.tmp') -> Path:
    """A hidden name in the folder of ``path`` that nobody else writes to.

    Args:
        path (Path): The file that is meant.
        suffix (str): How the name ends.
    """
    return path.with_name(f'.{path.name}.{secrets.token_hex(4)}{suffix}')


@contextlib.contextmanager
def whole_file(path: Union[str, Path],
               suffix: str = '.tmp') -> Iterator[Path]:
    """A file to write to, which gets the name ``path`` at the end.

    After an error nothing is left of it, and a file of that name is as it
    was. Processes that write the same file at once do not disturb each other.

    Args:
        path (str | Path): The file, in an existing folder.
        suffix (str): How the name ends until then.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    temporary = beside(path, suffix)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = os.fstat(handle).st_mode  # as the umask wants it
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, mode)  # some writers replace the file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
