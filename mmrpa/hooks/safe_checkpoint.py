"""Checkpoints that are written wholly or not at all."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook

from ..registry import HOOKS
from ..safe_loading import CheckpointSaveError, use_safe_reader

_TEMPORARY = '.{}.tmp'


class _LateRemovals:
    """A file backend that removes nothing until it is told to.

    Args:
        backend: The file backend to use.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._files: list[str] = []
        self._folders: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._files.append(path)

    def rmtree(self, path: str) -> None:
        self._folders.append(path)

    def apply(self, kept: set[str]) -> None:
        """Remove what was asked for, but nothing in ``kept``."""
        for path in self._files:
            if path not in kept and self._backend.isfile(path):
                self._backend.remove(path)
        for path in self._folders:
            if path not in kept and self._backend.isdir(path):
                self._backend.rmtree(path)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, which loses no checkpoint.

    With the same arguments it writes the same files, but:

    - A file gets its name when all of it is on the disk. It is written beside
      its place, handed to the disk (fsync) and renamed, so a killed process,
      a full disk or a power cut leaves the former checkpoint as it was.
    - Checkpoints that ``max_keep_ckpts`` or a better ``save_best`` makes
      superfluous are removed after the new one is there; mmengine removes
      them before.
    - If a checkpoint cannot be written, training stops with
      ``CheckpointSaveError``, which names the file, the reason and the last
      good checkpoint.
    - ``resume`` looks for the newest checkpoint that is whole, and files are
      read without running code: see :mod:`mmrpa.safe_loading`.

    That holds for folders of this machine; other storage gets files as from
    ``CheckpointHook``, only that old ones are removed after, too.

    Examples:
        In a config: ``default_hooks = dict(checkpoint=dict(
        type='mmrpa.SafeCheckpointHook', interval=1, max_keep_ckpts=3))``.
    """

    def before_run(self, runner) -> None:
        """Read checkpoints in the safe way, whoever runs the training."""
        use_safe_reader()

    def before_train(self, runner) -> None:
        """Find the folder, and clear what a killed process has left in it."""
        super().before_train(runner)
        self._writing = False
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            for path in Path(self.out_dir).glob(_TEMPORARY.format('*.pth')):
                path.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner, step: int,
                                   meta: dict) -> None:
        with self._safely(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        with self._safely(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _safely(self, runner) -> Iterator[None]:
        """Let mmengine's code write files aside and remove them late."""
        if self._writing:  # the best checkpoint saves the last one again
            yield
            return
        backend, save = self.file_backend, runner.save_checkpoint
        removals = _LateRemovals(backend)
        written: list[str] = []
        explained = partial(_explained, runner, written,
                            _last_good(Path(runner.work_dir)))

        def save_aside(out_dir: str, filename: str, *args: Any,
                       **kwargs: Any) -> None:
            path = Path(out_dir, filename)
            aside = path.with_name(_TEMPORARY.format(filename))
            with explained(path, aside):
                save(out_dir, aside.name, *args, **kwargs)
                if is_main_process():
                    put_in_place(aside, path)
            written.append(os.path.join(out_dir, filename))

        self._writing, self.file_backend = True, removals
        if isinstance(backend, LocalBackend):
            runner.save_checkpoint = save_aside
        try:
            with explained(Path(runner.work_dir, 'last_checkpoint')):
                yield
        finally:
            self._writing, self.file_backend = False, backend
            runner.save_checkpoint = save
        removals.apply(set(written))


@contextlib.contextmanager
def _explained(runner, written: list[str], last: str | None, path: Path,
               aside: Path | None = None) -> Iterator[None]:
    """Tell what to do about a file that cannot be written."""
    try:
        yield
    except CheckpointSaveError:
        raise
    except OSError as error:
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.unlink()  # it takes up room
        good = written[-1] if written else last
        raise CheckpointSaveError(
            f'cannot write {path}: {error.strerror or error}. '
            + (f'The last good checkpoint is {good}'
               if good else 'There is no earlier checkpoint') +
            f'. Training stops at step {runner.iter + 1}: make room or mend '
            'the disk, then start it again with --resume') from error


def put_in_place(aside: Path, path: Path) -> None:
    """Give a file that was written aside its name, once it is on the disk.

    Args:
        aside (Path): The whole file (or folder).
        path (Path): Its name, in the same folder; what has that name goes.

    Raises:
        OSError: The disk does not take it.
    """
    if aside.is_file():
        _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_good(work_dir: Path) -> str | None:
    """The checkpoint that last_checkpoint names, if it exists."""
    try:
        named = (work_dir / 'last_checkpoint').read_text().strip()
    except OSError:
        return None
    return named if named and os.path.exists(named) else None
