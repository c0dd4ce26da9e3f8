"""Checkpoints that are written wholly or not at all."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub, print_log
from mmengine.runner import Runner

from ..earlier import note_earlier
from ..registry import HOOKS
from ..resume_search import checkpoints_of_steps
from ..safe_loading import (
    CheckpointSaveError,
    find_refusal,
    use_safe_reader,
)
from ..whole_files import beside

# A younger temporary file may be one that another process writes just now, one
# of another machine, too, whose locks do not show here.
_OLD_SECONDS = 600
# For what cannot be locked: folders, and files where locks do not work.
_UNLOCKED_SECONDS = 24 * 3600
# What file systems answer that have no fsync for folders, or forbid to open
# them.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES,
            errno.EPERM)


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


class _Aside:
    """A runner for mmengine's code, which then writes elsewhere.

    Args:
        runner (Runner): The runner to use for all else.
        save: In the place of its ``save_checkpoint``.
        work_dir (Path): Where to write ``last_checkpoint``.
    """

    def __init__(self, runner: Runner, save: Callable,
                 work_dir: Path) -> None:
        self._runner = runner
        self.save_checkpoint = save
        self.work_dir = str(work_dir)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


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
    - The best checkpoint of a training that this one was copied from, or goes
      on from by ``--resume FILE``, is not removed, nor are other files of a
      number that stands in that file.
    - ``save_best`` compares scores of one metric only.
    - A training that starts anew among checkpoints notes these, and no
      ``resume`` goes on with them by itself: see :mod:`mmrpa.earlier`.
    - If a checkpoint cannot be written, training stops with
      ``CheckpointSaveError``, which names the file, the reason and the last
      good checkpoint.
    - ``resume`` looks for the newest checkpoint that is whole
      (:mod:`mmrpa.resume_search`), and files are read without running code
      (:mod:`mmrpa.safe_loading`).

    That holds for checkpoints that are files in folders of this machine. As
    from ``CheckpointHook`` are: files on other storage; what
    ``published_keys`` writes after the training; and all that another runner
    than ``Runner`` writes (DeepSpeed's are folders, written by all
    processes). Only that old ones are removed after holds there, too. A
    warning tells of the first and the last.

    Examples:
        In a config: ``default_hooks = dict(checkpoint=dict(
        type='mmrpa.SafeCheckpointHook', interval=1, max_keep_ckpts=3))``.
    """

    def before_run(self, runner) -> None:
        """Read checkpoints in the safe way, whoever runs the training."""
        use_safe_reader()

    def before_train(self, runner) -> None:
        """Find the folder, and whose the checkpoints in it are.

        What a killed process has left in it is removed.
        """
        hub, most = runner.message_hub, self.max_keep_ckpts
        self._superfluous = []
        if most > 0 and 'keep_ckpt_ids' in hub.runtime_info:
            # mmengine would remove what is too much at once.
            steps = hub.get_info('keep_ckpt_ids')
            self._superfluous = steps[:-most]
            hub.update_info('keep_ckpt_ids', steps[-most:])
        super().before_train(runner)
        self._writing = self._refused = False
        backend = getattr(self.file_backend, 'client', self.file_backend)
        self._safe = (isinstance(backend, LocalBackend)
                      and isinstance(runner, Runner))
        source = runner._load_from if runner._resume else None
        # Our reader takes a path with ~.
        elsewhere = source is not None and not self._is_here(
            os.path.expanduser(source))
        if elsewhere and most > 0 and 'keep_ckpt_ids' in hub.runtime_info:
            self._superfluous = []
            self.keep_ckpt_ids.clear()
            hub.update_info('keep_ckpt_ids', [])
        self._find_best()
        if not self._safe:
            what = (f'{type(runner).__name__} writes them'
                    if isinstance(backend, LocalBackend)
                    else f'{self.out_dir} is no folder of this machine')
            print_log(f'SafeCheckpointHook: {what}, so one whose writing is '
                      'interrupted may be cut short, as from CheckpointHook',
                      logger='current', level=logging.WARNING)
        elif is_main_process():
            _clear(Path(self.out_dir), self.filename_tmpl)
            _clear(Path(runner.work_dir), 'last_checkpoint')
            if elsewhere or not runner._resume:
                _note_others(Path(runner.work_dir))
            elif source is not None:  # the user has said what they are
                note_earlier(Path(runner.work_dir), ())

    def _is_here(self, path: str) -> bool:
        """Whether a checkpoint is in the folder that is written to."""
        folders = [os.path.dirname(path), self.out_dir.rstrip('/')]
        if '://' not in path:
            folders = [os.path.realpath(folder) for folder in folders]
        return folders[0] == folders[1]

    def _find_best(self) -> None:
        """Take the best checkpoint for this training's own only if it is.

        The path is that of the training in which it was saved.
        """
        if self.save_best is None:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = self._own(self.best_ckpt_path)
        else:
            self.best_ckpt_path_dict = {
                key: self._own(path)
                for key, path in self.best_ckpt_path_dict.items()}

    def _own(self, path: str | None) -> str | None:
        if path is None or self._is_here(path):
            return path
        copy = self.file_backend.join_path(self.out_dir,
                                           os.path.basename(path))
        if self.file_backend.exists(copy):
            return copy
        print_log(f'SafeCheckpointHook: the best checkpoint up to here, '
                  f'{path}, is in another folder, and stays there when a '
                  'better one is saved', logger='current')
        return None

    def _forget_other_metric(self, hub: MessageHub, metrics: dict) -> None:
        """Drop the best score if it is of another metric.

        With one metric the message hub does not say which; the file does.
        """
        if len(self.key_indicators) > 1:
            return
        key = self.key_indicators[0]
        key = next(iter(metrics)) if key == 'auto' else key
        best = hub.runtime_info.get('best_ckpt')
        if best is None or _pattern(
                f'best_{key}_'.replace('/', '_'),
                self.filename_tmpl).fullmatch(os.path.basename(best)):
            return
        for name in ('best_score', 'best_ckpt'):
            hub.pop_info(name)
        self.best_ckpt_path = None
        print_log(f'SafeCheckpointHook: {best} was the best checkpoint by '
                  f'another metric than {key}; it stays, and the best is '
                  'looked for from here on', logger='current',
                  level=logging.WARNING)

    def _save_checkpoint_with_step(self, runner, step: int,
                                   meta: dict) -> None:
        with self._safely(runner) as aside:
            super()._save_checkpoint_with_step(aside, step, meta)
            for old in self._superfluous if is_main_process() else ():
                path = self.file_backend.join_path(
                    self.out_dir, self.filename_tmpl.format(old))
                self.file_backend.remove(path)
                self.file_backend.rmtree(path)  # if it is of DeepSpeed
            self._superfluous = []

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        if not self.save_best:  # not only in trainings
            return
        self._forget_other_metric(runner.message_hub, metrics)
        with self._safely(runner) as aside:
            super()._save_best_checkpoint(aside, metrics)

    @contextlib.contextmanager
    def _safely(self, runner) -> Iterator[Any]:
        """Let mmengine's code write files aside and remove them late."""
        if self._writing:  # the best checkpoint saves the last one again
            yield runner
            return
        backend, removals = self.file_backend, _LateRemovals(self.file_backend)
        written: list[str] = []
        pointer = Path(runner.work_dir, 'last_checkpoint')
        explained = partial(_explained, runner, written,
                            _last_good(Path(runner.work_dir)))

        def save_aside(out_dir: str, filename: str, *args: Any,
                       **kwargs: Any) -> None:
            path = Path(out_dir, filename)
            with explained(path), _temporary(path) as aside:
                runner.save_checkpoint(out_dir, aside.name, *args, **kwargs)
                if is_main_process():
                    self._tell_of_refusal(aside, path)
                    put_in_place(aside, path)
            written.append(backend.join_path(out_dir, filename))

        def save(out_dir: str, filename: str, *args: Any,
                 **kwargs: Any) -> None:
            runner.save_checkpoint(out_dir, filename, *args, **kwargs)
            written.append(backend.join_path(out_dir, filename))

        self._writing, self.file_backend = True, removals
        try:
            with explained(pointer):
                if self._safe:
                    with _pointer_aside(pointer) as folder:
                        yield _Aside(runner, save_aside, folder)
                else:
                    yield _Aside(runner, save, pointer.parent)
        finally:
            self._writing, self.file_backend = False, backend
        removals.apply(set(written))

    def _tell_of_refusal(self, aside: Path, path: Path) -> None:
        """Warn, once, of a checkpoint that no resume will take."""
        refusal = None if self._refused else find_refusal(aside, path)
        if refusal is not None:
            self._refused = True
            print_log(f'SafeCheckpointHook: no resume will take {refusal}. '
                      'Look for a hook or a metric that puts something into '
                      'the checkpoint or the message hub; plain values, '
                      'tensors and numpy arrays are read', logger='current',
                      level=logging.WARNING)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A file beside ``path``, empty, and gone afterwards unless renamed.

    It is locked, so that others can tell it from what a killed process has
    left. Only the first process has one, as only it writes.
    """
    aside = beside(path)
    if not is_main_process():
        yield aside
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):  # not all file systems have locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
    finally:
        os.close(handle)  # first, else NFS keeps what is removed
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def _pointer_aside(pointer: Path) -> Iterator[Path]:
    """A folder in which to write last_checkpoint.

    mmengine empties the file before it writes to it. Only the first process
    writes one.
    """
    folder = beside(pointer)
    if not is_main_process():
        yield folder
        return
    folder.mkdir()
    aside = folder / pointer.name
    try:
        yield folder
        if aside.is_file():  # the best checkpoint may be all that is saved
            put_in_place(aside, pointer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pattern(prefix: str, template: str) -> re.Pattern:
    """What fits a prefix and a ``filename_tmpl``, whatever the step."""
    name = '.*'.join(map(re.escape, re.split(r'\{[^}]*\}', template)))
    return re.compile(re.escape(prefix) + name)


def _note_others(work_dir: Path) -> None:
    """Note what an earlier training has left in the folder, and say so."""
    last, paths = checkpoints_of_steps(work_dir)
    if last is not None and os.path.isfile(last) and Path(last) not in paths:
        paths.append(Path(last))
    note_earlier(work_dir, [path for path in paths if path.is_file()])
    if paths:
        names = ', '.join(sorted(path.name for path in paths))
        print_log(f'SafeCheckpointHook: {paths[0].parent} has checkpoints of '
                  f'an earlier training, {names}. They are replaced when this '
                  'one comes to their steps, and none is taken by --resume '
                  'without a file', logger='current', level=logging.WARNING)


def _clear(folder: Path, template: str) -> None:
    """Remove temporary files and folders that a killed process has left.

    Args:
        folder (Path): Where checkpoints are written.
        template (str): ``filename_tmpl`` of the hook, or a file's name.
    """
    name = _pattern('', template).pattern
    ours = re.compile(rf'\.(best_.*_)?{name}\.[0-9a-f]{{8}}\.tmp')
    for path in folder.glob('.*.tmp'):
        # Gone in the meantime, or of a user who may not be interfered with.
        with contextlib.suppress(OSError):
            if ours.fullmatch(path.name) and _is_left(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _is_left(path: Path) -> bool:
    """Whether no process can still be writing a temporary file."""
    age = time.time() - path.stat().st_mtime
    if age <= _OLD_SECONDS:
        return False
    handle = None
    try:
        handle = os.open(path, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a folder, or no locks
        return age > _UNLOCKED_SECONDS
    finally:
        if handle is not None:
            os.close(handle)
    return True


@contextlib.contextmanager
def _explained(runner, written: list[str], last: str | None,
               path: Path) -> Iterator[None]:
    """Tell what to do about a file that cannot be written."""
    try:
        yield
    except CheckpointSaveError:
        raise
    except OSError as error:
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
        aside (Path): The whole file.
        path (Path): Its name, on the same disk; what has that name goes.

    Raises:
        OSError: The disk does not take it.
    """
    _sync(aside)
    os.replace(aside, path)
    try:
        _sync(path.parent)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


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
