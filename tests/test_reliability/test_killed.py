"""Trainings of all three hosts, killed with SIGKILL, go on exactly."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from guides import run_guide
from helpers import TOOLS
from kill_training import (
    kill_at,
    read_losses,
    start,
    stop_launcher,
    wait_for,
)
from mmengine.config import Config

CONFIGS = TOOLS.parent / 'configs'
# Small steps; every loss as it is, not the mean of ten.
COMMON = ('log_processor.window_size=1', 'default_hooks.logger.interval=1',
          'default_hooks.checkpoint.by_epoch=False',
          'default_hooks.checkpoint.interval=3',
          'default_hooks.checkpoint.max_keep_ckpts=2')
PYRAMID = 'model.backbone.init_cfg=None'
HOSTS = dict(
    mmseg=('mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128.py',
           PYRAMID, 'train_dataloader.batch_size=2',
           'model.data_preprocessor.size=(64,64)', 'train_cfg.max_iters=60',
           'train_cfg.val_interval=60'),
    mmpretrain=('mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py',
                'train_dataloader.batch_size=4', 'train_cfg.max_epochs=6'),
    mmdet=('mmdet/quickstart/mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py',
           PYRAMID, 'train_dataloader.batch_size=2', 'train_cfg.max_epochs=6',
           'train_cfg.val_interval=6'))
STEPS = 60
# Of the steps at which test_ten_kills kills.
KILL_SEED = int(os.environ.get('KILL_SEED', '20260'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A working directory with sample data, small ones."""
    path = tmp_path_factory.mktemp('killed')
    subprocess.run(
        [sys.executable, str(TOOLS / 'make_sample_data.py'), 'data/sample',
         '--image-size', '64', '--num-train', '20', '--num-val', '2',
         '--num-cls-train', '40', '--num-cls-val', '5'],
        cwd=path, check=True, capture_output=True)
    return path


def command(host: str, work_dir: Path, *flags: object,
            options: tuple = ()) -> list:
    config, *settings = HOSTS[host]
    return ['train.py', CONFIGS / config, '--work-dir', work_dir, *flags,
            '--cfg-options', *COMMON, *settings, *options]


def finish(arguments: list, log: Path, **settings: str) -> None:
    process = start(arguments, log, **settings)
    try:
        assert process.wait(500) == 0, log.read_text()
    finally:
        stop_launcher(process)


def assert_equal(runs: list[dict], whole: dict) -> float:
    """All losses of all runs are the uninterrupted run's."""
    worst = max(abs(loss - whole[step])
                for run in runs for step, loss in run.items())
    assert worst <= 1e-5
    return worst


def checkpoint_step(work_dir: Path) -> int:
    name = Path((work_dir / 'last_checkpoint').read_text()).stem
    return int(name.removeprefix('iter_'))


def test_one_kill(folder):
    """Steps that both runs have made are the same: a short one of the next."""
    work_dir, log = folder / 'one', folder / 'one.log'
    options = ('train_cfg.max_iters=9', 'train_cfg.val_interval=10')
    kill_at(command('mmseg', work_dir, options=options), work_dir, log, 8)
    saved = checkpoint_step(work_dir)
    assert saved in (3, 6)
    left = work_dir / '.iter_6.pth.0123abcd.tmp'
    left.write_bytes(b'what a kill may leave')
    os.utime(left, (1e9, 1e9))  # a young one may be of another process
    # Ends where the killed run has been.
    finish(command('mmseg', work_dir, '--resume',
                   options=(*options, 'val_dataloader=None', 'val_cfg=None',
                            'val_evaluator=None')), log)
    killed, resumed = read_losses(work_dir)
    assert list(resumed) == list(range(saved + 1, 10))
    shared = killed.keys() & resumed.keys()
    assert len(shared) >= 2
    assert_equal([{step: resumed[step] for step in shared}], killed)
    assert not list(work_dir.glob('.*.tmp'))


@pytest.mark.long
@pytest.mark.parametrize('host', HOSTS)
def test_ten_kills(host, folder, capsys):
    whole_dir, work_dir = folder / f'{host}_whole', folder / host
    log = folder / f'{host}.log'
    finish(command(host, whole_dir), log)
    whole, = read_losses(whole_dir)
    assert list(whole) == list(range(1, STEPS + 1))
    chance = random.Random(KILL_SEED)
    begun, kills = 0, []
    for number in range(10):
        step = min(begun + chance.randint(3, 9), STEPS - 1)
        kill_at(command(host, work_dir, *['--resume'] * (number > 0)),
                work_dir, log, step)
        begun = checkpoint_step(work_dir)
        kills.append((step, begun))
    finish(command(host, work_dir, '--resume'), log)
    runs = read_losses(work_dir)
    assert len(runs) == 11
    for run, (_, saved) in zip(runs[1:], kills, strict=True):
        assert min(run) == saved + 1
    assert set().union(*runs) == set(whole)
    worst = assert_equal(runs, whole)
    ends = [torch.load(path / f'iter_{STEPS}.pth', weights_only=False)
            for path in (whole_dir, work_dir)]
    for name, value in ends[0]['state_dict'].items():
        torch.testing.assert_close(ends[1]['state_dict'][name], value,
                                   rtol=0, atol=1e-5)
    with capsys.disabled():
        print(f'\n{host}, KILL_SEED={KILL_SEED}: killed at (and went on '
              f'from) {kills}; largest difference of '
              f'{sum(map(len, runs))} losses: {worst}')


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank."""
    for path in Path('/proc').glob('[0-9]*'):
        try:
            variables = (path / 'environ').read_bytes().split(b'\0')
            parent = (path / 'stat').read_text().rsplit(')', 1)[1].split()[1]
        except OSError:
            continue
        if int(parent) == launcher.pid and (
                f'LOCAL_RANK={rank}'.encode() in variables):
            return int(path.name)
    raise AssertionError(f'no process of rank {rank}')


def marked(mark: str) -> list[int]:
    """Processes that run with a text among their variables."""
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        try:
            if mark.encode() in (path / 'environ').read_bytes():
                found.append(int(path.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def wait_until_gone(mark: str, end: float, log: Path) -> None:
    while marked(mark):
        assert time.monotonic() < end, (
            f'{marked(mark)} are left\n{log.read_text()}')
        time.sleep(0.1)


def kill_marked(mark: str) -> None:
    for left in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def two_processes(work_dir: Path) -> list:
    tool, config, *rest = command('mmseg', work_dir,
                                  options=('train_cfg.max_iters=12', ))
    return [f'dist_{tool.removesuffix(".py")}.sh', config, 2, *rest]


def kill_one(process: subprocess.Popen, work_dir: Path, log: Path) -> None:
    """SIGKILL rank 1 once step 5 is behind, and with it a checkpoint."""
    wait_for(process, lambda: any(
        5 in run for run in read_losses(work_dir)), log)
    os.kill(worker(process, 1), signal.SIGKILL)


@pytest.mark.long
def test_one_of_two_is_killed(folder):
    work_dir, log = folder / 'two', folder / 'two.log'
    mark = f'MMRPA_TEST_MARK={work_dir}'
    process = start(two_processes(work_dir), log,
                    MMRPA_TEST_MARK=str(work_dir))
    try:
        wait_for(process, lambda: any(
            4 in run for run in read_losses(work_dir)), log)
        assert len(marked(mark)) >= 5  # torchrun, 2 ranks, a loader of each
        kill_one(process, work_dir, log)
        begin = time.monotonic()
        assert process.wait(60) != 0
        took = time.monotonic() - begin
        wait_until_gone(mark, begin + 60, log)
    finally:
        stop_launcher(process)
        kill_marked(mark)
    text = log.read_text()
    print(f'the other one ended within {took:.1f} s')
    assert 'Signal 9 (SIGKILL) received by PID' in text
    assert 'rank      : 1 (local_rank: 1)' in text
    for name in ('iter_3.pth', ):
        torch.load(work_dir / name, weights_only=False)


@pytest.mark.long
def test_the_launcher_is_killed(folder):
    """SIGKILL leaves torchrun no time to end what it has started."""
    work_dir, log = folder / 'orphans', folder / 'orphans.log'
    mark = f'MMRPA_TEST_MARK={work_dir}'
    process = start(two_processes(work_dir), log,
                    MMRPA_TEST_MARK=str(work_dir))
    wait_for(process, lambda: any(
        5 in run for run in read_losses(work_dir)), log)
    assert len(marked(mark)) >= 5  # torchrun, 2 ranks, a loader of each
    begin = time.monotonic()
    process.kill()
    process.wait()
    try:
        wait_until_gone(mark, begin + 60, log)
    finally:
        kill_marked(mark)
    print(f'all had ended after {time.monotonic() - begin:.1f} s')
    assert max(read_losses(work_dir)[0]) < 12  # not by having finished
    torch.load(work_dir / 'iter_3.pth', weights_only=False)


@pytest.mark.long
def test_two_are_started_again(folder):
    """MAX_RESTARTS: the losses are those of two that nobody killed.

    One restart is enough: torch 2.11 gives it the store of the former start
    unless told otherwise, and gloo then reads addresses of the dead.
    """
    whole_dir, work_dir = folder / 'elastic_whole', folder / 'elastic'
    log = folder / 'elastic.log'
    finish(two_processes(whole_dir), log)
    process = start(two_processes(work_dir), log, MAX_RESTARTS='1')
    try:
        kill_one(process, work_dir, log)
        assert process.wait(240) == 0, log.read_text()
    finally:
        stop_launcher(process)
    text = log.read_text()
    assert text.count('restart 1: the training goes on from the last '
                      f'checkpoint in {work_dir}') == 1
    whole, = read_losses(whole_dir)
    killed, resumed = read_losses(work_dir)
    assert max(killed) < 12 and min(resumed) in (4, 7) and max(resumed) == 12
    assert_equal([killed, resumed], whole)


@pytest.mark.long
def test_the_commands_of_the_guide(folder):
    """With a small config."""
    cfg = Config.fromfile(CONFIGS / HOSTS['mmseg'][0])
    cfg.merge_from_dict({
        'model.backbone.init_cfg': None, 'train_dataloader.batch_size': 2,
        'model.data_preprocessor.size': (64, 64), 'train_cfg.max_iters': 4,
        'train_cfg.val_interval': 4, 'default_hooks.checkpoint.interval': 2})
    cfg.dump(folder / 'small.py')
    outputs = run_guide(
        'docs/resuming.md', folder, skip=['pytest'],
        env=dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'),
        replace={'CONFIG 8': 'small.py 2', 'CONFIG': 'small.py'})
    train, again = outputs.values()
    assert 'the training starts from its beginning' in train
    assert 'Saving checkpoint at 4 iterations' in train
    assert 'Traceback' not in again, again
    assert 'Distributed training: True' in again
    assert again.count('Saving checkpoint at 4 iterations') == 1
