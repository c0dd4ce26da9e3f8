"""Checkpoints are whole or not there, and a resume takes one that is."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from small_training import Killed, Recorder, build

from mmrpa import safe_loading
from mmrpa.hooks import safe_checkpoint
from mmrpa.safe_loading import (
    CheckpointSaveError,
    has_checkpoints,
    newest_good_checkpoint,
    read_training_checkpoint,
)
from mmrpa.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_compilers(monkeypatch):
    """A Runner asks compilers for their versions, which takes a second."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Recorder]:
    """A training with checkpoints at steps 14, 16, 18 and 20; not to touch."""
    folder, recorder = tmp_path_factory.mktemp('trained'), Recorder()
    build(folder, 'iter', recorder, every=2, max_keep=4).train()
    assert names(folder) == [f'iter_{n}.pth' for n in (14, 16, 18, 20)]
    return folder, recorder


@pytest.fixture
def work_dir(trained, tmp_path) -> Path:
    """A copy of the training as it was after step 18."""
    target = tmp_path / 'work'
    shutil.copytree(trained[0], target)
    (target / 'iter_20.pth').unlink()
    (target / 'last_checkpoint').write_text(str(target / 'iter_18.pth'))
    return target


def names(folder: Path) -> list[str]:
    """The files of weights, temporary ones too, in order of their numbers."""
    return sorted((path.name for path in folder.iterdir()
                   if '.pth' in path.name),
                  key=lambda name: (len(name), name))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({
        'cut': content[:middle],
        # So many, because up to 63 between two records mean nothing.
        'flipped': content[:middle] + bytes(
            byte ^ 8 for byte in content[middle:middle + 100])
        + content[middle + 100:],
        'zeros': bytes(len(content)),
        'empty': b''}[how])


@pytest.mark.parametrize('how', ['cut', 'flipped', 'zeros', 'empty'])
def test_damage_is_found(how, work_dir):
    damage(work_dir / 'iter_18.pth', how)
    assert newest_good_checkpoint(str(work_dir)).endswith('iter_16.pth')


@pytest.mark.parametrize('how', ['cut', 'flipped'])
def test_a_damaged_checkpoint_is_passed_over(how, work_dir, trained, capfd):
    damage(work_dir / 'iter_18.pth', how)
    recorder = Recorder()
    build(work_dir, 'iter', recorder, every=2, resume=True).train()
    assert list(recorder.losses) == [17, 18, 19, 20]
    for step, loss in recorder.losses.items():
        assert loss == pytest.approx(trained[1].losses[step], abs=1e-6)
    printed = ''.join(capfd.readouterr())
    assert f'{work_dir}/iter_18.pth is ' in printed
    assert 'iter_16.pth is the newest checkpoint before it' in printed
    read_training_checkpoint(work_dir / 'iter_18.pth')  # written anew


def test_without_a_whole_checkpoint_nothing_is_trained(work_dir):
    for name in names(work_dir):
        damage(work_dir / name, 'flipped')
    recorder = Recorder()
    with pytest.raises(CheckpointError, match='no checkpoint in .* is whole'
                       ) as caught:
        build(work_dir, 'iter', recorder, resume=True).train()
    assert all(f'iter_{n}.pth is damaged' in str(caught.value)
               for n in (14, 16, 18))
    assert not recorder.losses


@pytest.mark.parametrize('resume', [True, False])
def test_a_named_file_is_taken_or_refused(resume, work_dir):
    """Nothing else is taken in its place; load_from is as strict."""
    recorder = Recorder()
    damage(work_dir / 'iter_18.pth', 'flipped')
    with pytest.raises(CheckpointError, match='iter_18.pth is damaged'):
        build(work_dir, 'iter', recorder, resume=resume,
              load_from=str(work_dir / 'iter_18.pth')).train()
    assert not recorder.losses


def test_the_search(work_dir, tmp_path, caplog):
    """What counts is last_checkpoint; others count where it fails."""

    def found() -> str:
        return Path(newest_good_checkpoint(str(work_dir))).name

    pointer = work_dir / 'last_checkpoint'
    assert found() == 'iter_18.pth'
    # Of an earlier, longer training in the same folder.
    shutil.copy(work_dir / 'iter_14.pth', work_dir / 'iter_900.pth')
    assert found() == 'iter_18.pth'
    damage(work_dir / 'iter_18.pth', 'cut')
    assert found() == 'iter_16.pth'
    (work_dir / 'iter_900.pth').unlink()
    # The folder has another name than when it was written.
    pointer.write_text('/elsewhere/iter_16.pth')
    assert found() == 'iter_16.pth'
    # A full disk or a kill has emptied it.
    shutil.copy(work_dir / 'iter_14.pth', work_dir / 'iter_17.pth')
    for text in ('', '\x00\x00', 'iter_99.pth', 'x' * 5000):
        pointer.write_text(text)
        assert found() == 'iter_17.pth'
    pointer.unlink()
    assert found() == 'iter_17.pth'
    (work_dir / 'best_acc_iter_18.pth').write_bytes(b'no')
    assert found() == 'iter_17.pth'
    assert newest_good_checkpoint(str(tmp_path / 'new')) is None


@pytest.mark.parametrize('gone', [18, 16])
def test_links_to_a_disk_that_is_gone(gone, work_dir):
    link = work_dir / f'iter_{gone}.pth'
    link.unlink()
    link.symlink_to('/no/such/disk/iter.pth')
    assert newest_good_checkpoint(str(work_dir)) == str(
        work_dir / f'iter_{34 - gone}.pth')
    damage(work_dir / f'iter_{34 - gone}.pth', 'cut')
    assert newest_good_checkpoint(str(work_dir)).endswith('iter_14.pth')


@pytest.mark.parametrize('where', ['check_archive', '_candidates'])
def test_a_disk_that_does_not_answer_stops_all_processes(where, work_dir,
                                                         monkeypatch):
    """An older checkpoint is not taken for it: it may answer again."""
    sent = []
    monkeypatch.setattr('mmengine.dist.broadcast_object_list', sent.append)

    def fail(path, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(safe_loading, where, fail)
    with pytest.raises(CheckpointError, match='Input/output error') as caught:
        newest_good_checkpoint(str(work_dir))
    assert '--resume FILE' in str(caught.value)
    assert len(sent) == 1  # the others wait for it


@pytest.mark.parametrize('noted', [True, False])
@pytest.mark.parametrize('pointer', ['iter_600.pth', ''])
def test_an_earlier_training_is_not_gone_on_from(noted, pointer, tmp_path,
                                                 monkeypatch):
    """Its files lie between those of the newer one."""
    warnings = []
    monkeypatch.setattr(safe_loading, '_warn', warnings.append)
    files = [(250, 1), (500, 2), (750, 3), (300, 11), (600, 12)]
    for step, minute in files:
        path = tmp_path / f'iter_{step}.pth'
        torch.save(dict(meta=dict(time=f'20260102_03{minute:02d}00')
                        if noted else {}), path)
        # What notes no time is judged by its file; a copy has any order.
        second = 10 ** 9 + 60 * minute
        os.utime(path, (second, second))
        if noted and pointer:
            os.utime(path, (10 ** 9 - step, 10 ** 9 - step))
    (tmp_path / 'last_checkpoint').write_text(pointer)
    damage(tmp_path / 'iter_600.pth', 'cut')
    os.utime(tmp_path / 'iter_600.pth')
    assert newest_good_checkpoint(str(tmp_path)) == str(
        tmp_path / 'iter_300.pth')
    told, = (text for text in warnings if text.startswith('passed over'))
    assert 'iter_500.pth' in told and 'iter_300' not in told
    if pointer:
        damage(tmp_path / 'iter_300.pth', 'cut')
        assert newest_good_checkpoint(str(tmp_path)).endswith('iter_250.pth')


def test_a_copied_folder_goes_on_from_its_own_files(work_dir, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(work_dir, copy)
    assert (copy / 'last_checkpoint').read_text().startswith(str(work_dir))
    assert newest_good_checkpoint(str(copy)) == str(copy / 'iter_18.pth')
    # Where out_dir is not work_dir, only the other one has it.
    (copy / 'iter_18.pth').unlink()
    assert newest_good_checkpoint(str(copy)) == str(work_dir / 'iter_18.pth')


@pytest.mark.parametrize('pointer', ['', 'step_9.pth', None])
def test_names_that_tell_nothing_stop_the_training(pointer, tmp_path):
    """Else it would begin anew and write over them."""
    for step in (5, 10):
        torch.save({}, tmp_path / f'step_{step}.pth')
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    with pytest.raises(CheckpointError) as caught:
        newest_good_checkpoint(str(tmp_path))
    assert f'{tmp_path}/step_10.pth, {tmp_path}/step_5.pth' in str(
        caught.value)
    assert '--resume FILE' in str(caught.value)
    assert has_checkpoints(tmp_path)  # load_from is not taken, either
    (tmp_path / 'last_checkpoint').write_text('step_5.pth')
    assert newest_good_checkpoint(str(tmp_path)).endswith('step_5.pth')


@pytest.fixture
def full_after(request, tmp_path):
    """A work_dir, and a function after which no more fits on its disk."""
    if request.param == 'limit':
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield tmp_path, lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (50_000, hard)), lambda: (
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    disk = tmp_path / 'disk'
    disk.mkdir()
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(disk)],
        capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f'no right to mount a small disk: {done.stderr.strip()}')
    filler = disk / 'filler'

    def fill() -> None:
        handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError) as caught:
            while True:
                os.write(handle, bytes(4096))
        os.close(handle)
        assert caught.value.errno == errno.ENOSPC

    yield disk / 'work', fill, filler.unlink
    # Lazily: the run's log is still open there.
    subprocess.run(['umount', '-l', str(disk)], check=True)


@pytest.mark.parametrize('full_after', ['limit', 'tmpfs'], indirect=True)
def test_a_full_disk(full_after, trained):
    work_dir, fill, free = full_after

    class Filler(Recorder):

        def after_train_iter(self, runner, *args, **kwargs):
            super().after_train_iter(runner, *args, **kwargs)
            if runner.iter + 1 == 5:
                fill()

    recorder = Filler()
    with pytest.raises(CheckpointSaveError) as caught:
        build(work_dir, 'iter', recorder, every=4, logger=False).train()
    reason = ('File too large' if work_dir.name != 'work' else
              'No space left on device')
    text = str(caught.value)
    assert f'cannot write {work_dir}/iter_8.pth: {reason}' in text
    assert f'The last good checkpoint is {work_dir}/iter_4.pth' in text
    assert 'step 8' in text and '\n' not in text
    assert max(recorder.losses) == 7  # the hook comes before the record
    assert names(work_dir) == ['iter_4.pth']
    assert read_training_checkpoint(work_dir / 'iter_4.pth')['meta']['iter'
                                                                     ] == 4
    free()
    resumed = Recorder()
    build(work_dir, 'iter', resumed, every=4, resume=True).train()
    assert list(resumed.losses) == list(range(5, 21))
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(trained[1].losses[step], abs=1e-6)


def test_mmengine_alone_loses_it(tmp_path):
    """Else this hook would not be needed: kept is one, which is removed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filler(Recorder):

        def after_train_iter(self, runner, *args, **kwargs):
            super().after_train_iter(runner, *args, **kwargs)
            if runner.iter + 1 == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(OSError, match='File too large'):
            build(tmp_path, 'iter', Filler(), every=4, max_keep=1,
                  checkpoint='CheckpointHook').train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / 'iter_4.pth').exists()
    with pytest.raises(CheckpointError):
        read_training_checkpoint(tmp_path / 'iter_8.pth')


@pytest.mark.parametrize('moment', ['before', 'after'])
def test_killed_while_saving(moment, tmp_path, trained, monkeypatch):
    """Before and after the file gets its name."""
    put_in_place = safe_checkpoint.put_in_place

    def killed(aside, path):
        if path.name == 'iter_8.pth':
            if moment == 'after':
                put_in_place(aside, path)
            raise Killed
        put_in_place(aside, path)

    monkeypatch.setattr(safe_checkpoint, 'put_in_place', killed)
    with pytest.raises(Killed):
        build(tmp_path, 'iter', Recorder(), every=4, max_keep=1).train()
    assert names(tmp_path) == ['iter_4.pth', 'iter_8.pth'][
        :dict(before=1, after=2)[moment]]
    assert not list(tmp_path.glob('.*'))
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_4.pth')
    monkeypatch.setattr(safe_checkpoint, 'put_in_place', put_in_place)
    resumed = Recorder()
    build(tmp_path, 'iter', resumed, every=4, max_keep=1,
          resume=True).train()
    assert min(resumed.losses) == 5
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(trained[1].losses[step], abs=1e-6)


@pytest.mark.parametrize('name', ['iter_8.pth', 'last_checkpoint'])
def test_two_trainings_in_one_folder(name, tmp_path, trained, monkeypatch):
    """One writes all its files while the other is about to name one."""
    put_in_place, second = safe_checkpoint.put_in_place, Recorder()

    def overtaken(aside, path):
        if path.name == name and not second.losses:
            build(tmp_path, 'iter', second, every=4).train()
        put_in_place(aside, path)

    monkeypatch.setattr(safe_checkpoint, 'put_in_place', overtaken)
    first = Recorder()
    build(tmp_path, 'iter', first, every=4).train()
    assert list(first.losses) == list(second.losses) == list(range(1, 21))
    for step, loss in first.losses.items():
        assert loss == pytest.approx(trained[1].losses[step], abs=1e-6)
    assert names(tmp_path) == ['iter_12.pth', 'iter_16.pth', 'iter_20.pth']
    assert not list(tmp_path.glob('.*'))
    assert newest_good_checkpoint(str(tmp_path)).endswith('iter_20.pth')


def test_temporary_files_are_as_readable_as_others(tmp_path):
    mask = os.umask(0o027)
    try:
        with safe_checkpoint._temporary(tmp_path / 'a.pth') as aside:
            assert aside.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)
    assert not list(tmp_path.iterdir())


def test_old_ones_go_after_the_new_one_is_there(tmp_path, monkeypatch):
    put_in_place, seen = safe_checkpoint.put_in_place, []

    def watch(aside, path):
        if path.name != 'last_checkpoint':
            seen.append((path.name,
                         [n for n in names(tmp_path) if n[0] != '.']))
        put_in_place(aside, path)

    monkeypatch.setattr(safe_checkpoint, 'put_in_place', watch)
    scores = {4: 0.2, 8: 0.1, 12: 0.5}

    class Scores(Recorder):
        priority = 'LOWEST'

        def after_train_iter(self, runner, *args, **kwargs):
            step = runner.iter + 1
            if step in scores:
                runner._train_loop._iter += 1  # as where validation is
                hook, = (hook for hook in runner.hooks if isinstance(
                    hook, safe_checkpoint.SafeCheckpointHook))
                hook.after_val_epoch(runner, dict(acc=scores[step]))
                runner._train_loop._iter -= 1

    build(tmp_path, 'iter', Scores(), every=4, max_keep=1,
          save_best='acc').train()
    assert seen == [
        ('iter_4.pth', []),
        ('best_acc_iter_4.pth', ['iter_4.pth']),
        ('iter_4.pth', ['iter_4.pth', 'best_acc_iter_4.pth']),
        ('iter_8.pth', ['iter_4.pth', 'best_acc_iter_4.pth']),
        ('iter_12.pth', ['iter_8.pth', 'best_acc_iter_4.pth']),
        ('best_acc_iter_12.pth', ['iter_12.pth', 'best_acc_iter_4.pth']),
        ('iter_12.pth', ['iter_12.pth', 'best_acc_iter_4.pth',
                         'best_acc_iter_12.pth']),
        ('iter_16.pth', ['iter_12.pth', 'best_acc_iter_12.pth']),
        ('iter_20.pth', ['iter_16.pth', 'best_acc_iter_12.pth'])]
    assert names(tmp_path) == ['iter_20.pth', 'best_acc_iter_12.pth']
    best = torch.load(tmp_path / 'best_acc_iter_12.pth', weights_only=False)
    assert best['message_hub']['runtime_info']['best_score'] == 0.5


@pytest.mark.parametrize('backend', [None, 'disk'])
def test_a_killed_process_leaves_the_pointer(backend, tmp_path, monkeypatch):
    """mmengine empties last_checkpoint before it writes to it."""
    pointer, seen = tmp_path / 'last_checkpoint', []
    put_in_place = safe_checkpoint.put_in_place

    def watch(aside, path):
        seen.append((path.name, pointer.exists() and pointer.read_text()))
        put_in_place(aside, path)

    monkeypatch.setattr(safe_checkpoint, 'put_in_place', watch)
    runner = build(tmp_path, 'iter', Recorder(), every=10)
    hook, = (hook for hook in runner.hooks if isinstance(
        hook, safe_checkpoint.SafeCheckpointHook))
    if backend:
        hook.file_client_args = dict(backend=backend)
    runner.train()
    first = str(tmp_path / 'iter_10.pth')
    assert seen == [('iter_10.pth', False), ('last_checkpoint', False),
                    ('iter_20.pth', first), ('last_checkpoint', first)]
    assert pointer.read_text() == str(tmp_path / 'iter_20.pth')
    assert not list(tmp_path.glob('.*'))


def test_one_process_writes_the_pointer(tmp_path, monkeypatch):
    """The others must not rename what the first one writes just now."""
    pointer = tmp_path / 'last_checkpoint'
    with safe_checkpoint._pointer_aside(pointer) as folder:
        (folder / pointer.name).write_text('iter_1.pth')
        monkeypatch.setattr(safe_checkpoint, 'is_main_process', lambda: False)
        with safe_checkpoint._pointer_aside(pointer) as others:
            assert not others.exists()
        assert (folder / pointer.name).is_file() and not pointer.exists()
        monkeypatch.undo()
    assert pointer.read_text() == 'iter_1.pth'
    assert list(tmp_path.iterdir()) == [pointer]


@pytest.mark.parametrize('kind', ['runner', 'storage'])
def test_what_it_does_not_guard_is_left_to_mmengine(kind, tmp_path,
                                                    monkeypatch):
    """And said: folders of DeepSpeed, files in a store."""
    lines = []
    monkeypatch.setattr(safe_checkpoint, 'print_log',
                        lambda text, **kwargs: lines.append(text))
    monkeypatch.setattr(
        safe_checkpoint, 'Runner' if kind == 'runner' else 'LocalBackend',
        type('Other', (), {}))
    monkeypatch.setattr(safe_checkpoint, 'put_in_place', None)
    build(tmp_path, 'iter', Recorder(), every=20).train()
    assert names(tmp_path) == ['iter_20.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(
        tmp_path / 'iter_20.pth')
    assert len(lines) == 1 and 'may be cut short' in lines[0]
    assert lines[0].startswith('SafeCheckpointHook: ' + dict(
        runner='Runner writes', storage=f'{tmp_path} is no folder')[kind])


@pytest.mark.parametrize('value, told', [
    (deque([1]), True), (dict(a=np.float64(1), b=[None, 'c']), False)])
def test_what_a_resume_will_refuse_is_told_while_training(
        value, told, tmp_path, monkeypatch):
    """Not after the days that are to be gone on from."""
    lines = []
    monkeypatch.setattr(safe_checkpoint, 'print_log',
                        lambda text, **kwargs: lines.append(text))

    class Keeper(Recorder):

        def before_train(self, runner):
            runner.message_hub.update_info('kept', value)

    build(tmp_path, 'iter', Keeper(), every=10).train()
    assert names(tmp_path) == ['iter_10.pth', 'iter_20.pth']
    refused = False
    try:
        read_training_checkpoint(tmp_path / 'iter_10.pth')
    except CheckpointError:
        refused = True
    assert refused == told
    assert len(lines) == told  # once
    if told:
        assert f'{tmp_path}/iter_10.pth' in lines[0]
        assert 'collections.deque' in lines[0]


@pytest.mark.parametrize('kind', [None, 'runner', 'storage'])
def test_names_without_a_number(kind, tmp_path, monkeypatch):
    """The old file that goes has the name of the new one, which must stay."""
    if kind:
        monkeypatch.setattr(
            safe_checkpoint, 'Runner' if kind == 'runner' else 'LocalBackend',
            type('Other', (), {}))
    runner = build(tmp_path, 'iter', Recorder(), every=5, max_keep=1)
    hook, = (hook for hook in runner.hooks if isinstance(
        hook, safe_checkpoint.SafeCheckpointHook))
    hook.filename_tmpl = 'model.pth'
    runner.train()
    assert names(tmp_path) == ['model.pth']
    content = read_training_checkpoint(tmp_path / 'model.pth')
    assert content['meta']['iter'] == 20


@pytest.mark.parametrize('number, fatal', [
    (errno.EINVAL, False), (errno.EACCES, False), (errno.ENOTSUP, False),
    (errno.EIO, True)])
def test_folders_without_fsync(number, fatal, tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def refuse(handle):
        name = os.readlink(f'/proc/self/fd/{handle}')
        synced.append(Path(name).name)
        if os.path.isdir(name):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, 'fsync', refuse)
    aside, path = tmp_path / '.a.pth.tmp', tmp_path / 'a.pth'
    aside.write_text('new')
    path.write_text('old')
    if fatal:
        with pytest.raises(OSError):
            safe_checkpoint.put_in_place(aside, path)
    else:
        safe_checkpoint.put_in_place(aside, path)
    assert path.read_text() == 'new'
    assert synced == ['.a.pth.tmp', tmp_path.name]


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


def test_the_hooks_are_on_in_our_configs():
    """Each config has one of a few bases, and these have the hooks."""
    paths = [
        ROOT / f'configs/{name}.py' for name in (
            'mmdet/rp_swin/mask-rcnn_rp-swin-tiny_fpn_1x_coco',
            'mmseg/rp_swin/rp-swin-tiny_upernet_8xb2-160k_ade20k-512x512',
            'mmpretrain/rp_deit/rp-deit-base_8xb128_in1k')
    ]
    quickstarts = list((ROOT / 'configs').glob('*/quickstart/*.py'))
    assert len(quickstarts) == 3
    for path in paths + quickstarts:
        hooks = Config.fromfile(path).default_hooks
        assert hooks.checkpoint.type == 'mmrpa.SafeCheckpointHook', path
        assert hooks.resume.type == 'mmrpa.ExactResumeHook', path
    for path in (ROOT / 'configs').rglob('*.py'):
        text = path.read_text()
        assert "'CheckpointHook'" not in text, path
        if path.parent.name != '_base_':
            assert '::_base_/default_runtime.py' not in text, path
        if path.parent.name == 'schedules' and 'CheckpointHook' in text:
            assert 'mmrpa.ExactResumeHook' in text, path
