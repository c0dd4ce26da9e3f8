"""Several processes that train.py or test.py finds itself in."""

import logging
import sys
from types import SimpleNamespace

import pytest
from helpers import load_tool
from mmengine.hooks import LoggerHook

from mmrpa import launch

VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_PROCID',
             'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_RANK',
             'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')


@pytest.fixture
def call(tmp_path, monkeypatch, write_config):
    """A function (tool, environment, *flags): run a tool up to its host."""
    script = tmp_path / 'script.py'
    script.write_text("print('the host runs')")
    checkpoint = tmp_path / 'a.pth'
    checkpoint.touch()
    config = write_config(dict(default_scope='mmseg', model=dict(type='M')))
    monkeypatch.setattr(launch, 'find_script', lambda *args: script)
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    monkeypatch.setattr(launch.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(sys, 'argv', ['pytest'])

    monkeypatch.setattr(LoggerHook, 'after_run', LoggerHook.after_run)
    monkeypatch.setattr(LoggerHook, 'after_test_epoch',
                        LoggerHook.after_test_epoch)

    def run(tool: str, environment: dict, *flags: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        paths = [config] if tool == 'train' else [config, checkpoint]
        load_tool(tool).run(tool, '', [*map(str, paths), *flags])

    return run


TORCHRUN = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1')
SRUN = dict(SLURM_PROCID='0', SLURM_STEP_NUM_TASKS='8', SLURM_LOCALID='0')
MPIRUN = dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='4')


@pytest.mark.parametrize('tool', ['train', 'test'])
@pytest.mark.parametrize('environment, told', [
    (TORCHRUN, ['WORLD_SIZE=2', '--launcher pytorch, or', 'tools/dist_{}.sh']),
    (SRUN, ['SLURM_STEP_NUM_TASKS=8', '--launcher slurm, or',
            'tools/slurm_{}.sh']),
    (MPIRUN, ['OMPI_COMM_WORLD_SIZE=4', '--launcher mpi.']),
], ids=['torchrun', 'srun', 'mpirun'])
def test_processes_without_launcher(tool, environment, told, call, capsys):
    with pytest.raises(SystemExit) as caught:
        call(tool, environment)
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert 'the host runs' not in printed.out
    for text in told:
        assert text.format(tool) in printed.err


@pytest.mark.parametrize('environment, flags', [
    ({}, []),
    (TORCHRUN, ['--launcher', 'pytorch']),
    (SRUN, ['--launcher=slurm']),
    (MPIRUN, ['--launcher', 'mpi']),
    # One process, however it was started.
    (dict(RANK='0', WORLD_SIZE='1'), []),
    (dict(SLURM_PROCID='0', SLURM_STEP_NUM_TASKS='1'), []),
    (dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1'), []),
    # A job of eight tasks, of which a batch script is none.
    (dict(SLURM_PROCID='0', SLURM_NTASKS='8'), []),
    # Left in the environment without a rank.
    (dict(WORLD_SIZE='8'), []),
    (TORCHRUN, ['--help']),
], ids=str)
def test_processes_that_may_run(environment, flags, call, capsys):
    call('train', environment, *flags)
    assert 'the host runs' in capsys.readouterr().out


@pytest.mark.parametrize('environment, launcher, told', [
    (dict(TORCHRUN, RANK='0', LOCAL_RANK='0'), 'pytorch', '2'),
    (SRUN, 'slurm', '8'), (MPIRUN, 'mpi', '4'),
    # The first process of the second machine.
    (dict(RANK='4', WORLD_SIZE='8', LOCAL_RANK='0'), 'pytorch', None),
    (dict(RANK='0', WORLD_SIZE='1'), 'pytorch', None), ({}, 'none', None)])
@pytest.mark.parametrize('flags', [['--show'], ['--show-dir', 'a b'],
                                   ['--show-dir=a'], []], ids=str)
def test_how_many_images_are_drawn(flags, environment, launcher, told, call,
                                   capsys):
    call('test', environment, '--launcher', launcher, *flags)
    lines = [line for line in capsys.readouterr().out.splitlines()
             if 'draws' in line]
    if told is None or not flags:
        assert not lines
    else:
        line, = lines
        flag = flags[0].partition('=')[0]
        assert line.startswith(f'mmrpa: {flag}: the first of {told} processes')
        assert f'one in {told};' in line


@pytest.mark.parametrize('keep_local', [False, True])
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_the_first_process_alone_moves_the_logs(tool, keep_local, call,
                                                tmp_path, monkeypatch):
    log = tmp_path / 'run/time/a.log'
    log.parent.mkdir(parents=True)
    log.write_text('step 1')
    moved = tmp_path / 'out/run/a.log'
    closed = []
    runner = SimpleNamespace(
        _log_dir=str(log.parent), work_dir=str(tmp_path / 'run'),
        timestamp='time', logger=logging.getLogger('test'),
        visualizer=SimpleNamespace(close=lambda: closed.append(1)))
    call(tool, {})
    for rank in (1, 0):
        monkeypatch.setattr('mmengine.dist.utils.get_rank',
                            lambda group=None, rank=rank: rank)
        hook = LoggerHook(out_dir=str(tmp_path / 'out'),
                          keep_local=keep_local)
        hook.before_run(runner)
        hook.after_run(runner)
        assert moved.exists() == (rank == 0)
        assert log.exists() == (rank == 1 or keep_local)
    assert moved.read_text() == 'step 1'
    assert len(closed) == 2
