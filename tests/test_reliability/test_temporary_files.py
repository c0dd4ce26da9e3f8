"""Files that a checkpoint is written to before it gets its name."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrpa.hooks import safe_checkpoint
from mmrpa.resume_search import has_checkpoints, newest_good_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LEFT = '.{}.0123abcd.tmp'


def test_only_old_temporary_files_of_its_own_are_cleared(tmp_path):
    """A young one may be what a second process writes just now."""
    ours = [LEFT.format(name) for name in (
        'step_5', 'step_6.pth', 'best_acc_step_5', 'last_checkpoint')]
    others = [LEFT.format('other.pth'), 'step_5.tmp', '.step_5.tmp',
              '.step_5.012345.tmp', '.step_5.0123abcd.tmp2', 'step_5']
    for name in (*ours, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    young = LEFT.format('step_7')
    (tmp_path / young).touch()
    safe_checkpoint._clear(tmp_path, 'step_{}')
    assert {path.name for path in tmp_path.iterdir()} == {
        *others, young, LEFT.format('last_checkpoint')}
    safe_checkpoint._clear(tmp_path, 'last_checkpoint')
    safe_checkpoint._clear(tmp_path, 'other.pth')
    assert {path.name for path in tmp_path.iterdir()} == {*others[1:], young}


WRITER = """
import sys
from pathlib import Path
from mmrpa.hooks.safe_checkpoint import _temporary
with _temporary(Path(sys.argv[1], 'iter_4.pth')) as aside:
    Path(sys.argv[1], aside.name).open('wb').write(b'half')  # as mmengine does
    print(aside.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_living_process_writes_is_never_cleared(tmp_path):
    """However long it takes; when the process is killed, it goes."""
    writer = subprocess.Popen(
        [sys.executable, '-c', WRITER, str(tmp_path)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        left = tmp_path / writer.stdout.readline().strip()
        assert left.read_bytes() == b'half'
        os.utime(left, (1e9, 1e9))
        safe_checkpoint._clear(tmp_path, 'iter_{}.pth')
        assert left.exists()
    finally:
        writer.kill()
        writer.communicate()
    assert left.exists()  # a kill leaves it
    assert not has_checkpoints(tmp_path)
    assert newest_good_checkpoint(str(tmp_path)) is None
    safe_checkpoint._clear(tmp_path, 'iter_{}.pth')
    assert not left.exists()


@pytest.mark.parametrize('kind', ['file', 'folder'])
@pytest.mark.parametrize('hours, goes', [(23, False), (25, True)])
def test_where_nothing_is_locked_a_day_must_pass(kind, hours, goes, tmp_path,
                                                 monkeypatch):
    """Folders, and file systems without locks."""
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = tmp_path / LEFT.format('last_checkpoint')
    if kind == 'file':
        monkeypatch.setattr(safe_checkpoint.fcntl, 'flock', refuse)
        left.touch()
    else:
        left.mkdir()
        (left / 'last_checkpoint').touch()
    then = time.time() - hours * 3600
    os.utime(left, (then, then))
    safe_checkpoint._clear(tmp_path, 'last_checkpoint')
    assert left.exists() != goes
