"""Checkpoints are written whole, or not at all."""

import errno
import os
import resource
import subprocess
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from small_training import Killed, Recorder, build, weight_files

from mmrpa.hooks import safe_checkpoint
from mmrpa.resume_search import newest_good_checkpoint
from mmrpa.safe_loading import (
    CheckpointSaveError,
    read_training_checkpoint,
)
from mmrpa.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


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
    assert weight_files(work_dir) == ['iter_4.pth']
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
    assert weight_files(tmp_path) == ['iter_4.pth', 'iter_8.pth'][
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
    assert weight_files(tmp_path) == [
        f'iter_{n}.pth' for n in (12, 16, 20)]
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
                         [n for n in weight_files(tmp_path) if n[0] != '.']))
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
    assert weight_files(tmp_path) == ['iter_20.pth', 'best_acc_iter_12.pth']
    best = torch.load(tmp_path / 'best_acc_iter_12.pth', weights_only=False)
    assert best['message_hub']['runtime_info']['best_score'] == 0.5


def test_a_validation_without_a_training(tmp_path):
    """``runner.val()``: nothing is written, nothing is wrong."""
    runner = build(tmp_path, 'iter', Recorder())
    hook, = (hook for hook in runner.hooks
             if isinstance(hook, safe_checkpoint.SafeCheckpointHook))
    hook.after_val_epoch(runner, dict(acc=0.5))
    assert weight_files(tmp_path) == []


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
    assert weight_files(tmp_path) == ['iter_20.pth']
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
    assert weight_files(tmp_path) == ['iter_10.pth', 'iter_20.pth']
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
    assert weight_files(tmp_path) == ['model.pth']
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
