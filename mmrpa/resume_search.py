"""Which checkpoint a training goes on from: one that is whole, of its own."""

import os
import re
import time
from pathlib import Path

import torch

from .earlier import find_earlier
from .safe_loading import allow_data_types, warn
from .weights.files import (
    SAFETENSORS,
    CheckpointError,
    check_archive,
    explained,
    file_kind,
)

_STEP_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')


def newest_good_checkpoint(path: str) -> str | None:
    """Find what a training goes on from: the newest checkpoint that is whole.

    That is the one which ``last_checkpoint`` names; of two files of that name
    the one in the working directory. If it is damaged, the newest before it
    is taken that is not, and a warning names both. All processes get the
    answer of the first, so all must ask.

    Args:
        path (str): The working directory of the training.

    Returns:
        str | None: A file, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: All that there are are damaged, or their names do not
            tell which is the newest, or the disk does not answer.
    """
    from mmengine.dist import broadcast_object_list, is_main_process
    answer: list[str | None] = [None, None]
    if is_main_process():
        try:
            answer[0] = _newest_good(Path(path))
        # Nobody must be left waiting.
        except CheckpointError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = (
                f'{error.filename or path} cannot be read: {error.strerror}. '
                'Mend that, or name another checkpoint (--resume FILE)')
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def has_checkpoints(path: str | Path) -> bool:
    """Whether a working directory has anything to go on from, whole or not."""
    return bool(_candidates(Path(path)) or any(Path(path).glob('*.pth')))


def _newest_good(work_dir: Path) -> str | None:
    left, problems = _candidates(work_dir), []
    while left:
        candidate = left.pop(0)
        problem = _find_damage(candidate)
        if problem is None:
            if problems:
                warn(f'{candidate} is the newest checkpoint before it that '
                      'is whole: the training goes on from there')
            return candidate
        warn(problem)
        if not problems:
            left = _same_training(left)
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f'no checkpoint in {work_dir} is whole: {"; ".join(problems)}. '
            'Name another one (--resume FILE), or start anew in another '
            '--work-dir')
    last, others = checkpoints_of_steps(work_dir)
    if last is not None or others:  # then they are noted, see _candidates
        newest = last or max(others, key=lambda path: path.stat().st_mtime_ns)
        raise CheckpointError(
            f'the checkpoints in {work_dir} are of an earlier training: the '
            'one that was started last there had no --resume, and was ended '
            'before it wrote any. Start it anew without --resume, or go on '
            f'with the earlier one (--resume {newest})')
    unknown = sorted(map(str, work_dir.glob('*.pth')))
    if unknown:
        raise CheckpointError(
            f'last_checkpoint in {work_dir} names no file that exists, and '
            'other names than epoch_N.pth and iter_N.pth do not tell which is '
            f'the newest of {", ".join(unknown)}. Name one (--resume FILE), '
            'or start anew in another --work-dir')
    warn(f'there is no checkpoint in {work_dir}: the training starts from '
          'its beginning')
    return None


def checkpoints_of_steps(work_dir: Path) -> tuple[str | None, list[Path]]:
    """All checkpoints in the folder that a training writes to.

    Args:
        work_dir (Path): The working directory.

    Returns:
        tuple: The one that ``last_checkpoint`` names, if it exists, or an
        address of another storage; and, in no order, those whose names tell
        the step, the former among them if its name does.
    """
    try:
        named = (work_dir / 'last_checkpoint').read_text(
            encoding='utf-8', errors='replace').strip()
    except OSError:
        named = ''
    if '://' in named:
        return named, []
    # The folder may have been moved or copied since.
    last = next((path for path in (work_dir / Path(named).name, Path(named))
                 if named and os.path.exists(path)), None)
    folder = work_dir if last is None else last.parent
    return None if last is None else str(last), [
        path for path in folder.glob('*.pth')
        if _STEP_NAME.fullmatch(path.name) and os.path.exists(path)]


def _candidates(work_dir: Path) -> list[str]:
    """Checkpoints to go on from, the best first."""
    last, others = checkpoints_of_steps(work_dir)
    if last is not None and '://' in last:
        return [last]
    earlier = find_earlier(work_dir, others + ([Path(last)] if last else []))
    others = [path for path in others if path not in earlier]
    if last is None or Path(last) in earlier:
        # Its name was lost, or it was removed.
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [str(path) for path in others]
    found = _STEP_NAME.fullmatch(Path(last).name)
    # A higher number is of another, earlier training in this folder.
    before = [path for path in others
              if found and path.name.startswith(found[1])
              and _step(path) < _step(Path(last))]
    return [last, *map(str, sorted(before, key=_step, reverse=True))]


def _step(path: Path) -> int:
    return int(_STEP_NAME.fullmatch(path.name)[2])


def _same_training(paths: list[str]) -> list[str]:
    """Leave out what an earlier training has left in the folder.

    Those are files that were written before one of fewer steps.
    """
    kept, newest = set(), {}
    for path in sorted(map(Path, paths), key=_step):
        unit, written = _STEP_NAME.fullmatch(path.name)[1], _written(path)
        if written >= newest.get(unit, written):
            newest[unit] = written
            kept.add(str(path))
    others = [path for path in paths if path not in kept]
    if others:
        warn('passed over, because they are older than files of fewer steps, '
              f'so of an earlier training: {", ".join(others)}')
    return [path for path in paths if path in kept]


def _written(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970.

    By what mmengine has noted in it, which a copy keeps, else by the file.
    """
    try:
        # Nothing but the pickle is read.
        with explained(str(path)), allow_data_types():
            noted = torch.load(path, 'cpu', mmap=True, weights_only=True)
        return time.mktime(time.strptime(noted['meta']['time'],
                                         '%Y%m%d_%H%M%S'))
    except (CheckpointError, LookupError, TypeError, ValueError):
        return path.stat().st_mtime


def _find_damage(path: str) -> str | None:
    """Why a checkpoint of a training cannot be used, None if it can."""
    if '://' in path or os.path.isdir(path):  # a store's, DeepSpeed's
        return None
    try:
        if file_kind(path, path) == SAFETENSORS:
            return f'{path} has weights only'
        check_archive(path)
        with open(path, 'rb') as file:
            if file.read(2) != b'PK':
                return f'{path} is damaged: it does not begin as a checkpoint'
    except CheckpointError as error:
        return str(error)
    return None
