"""Processes that torchrun has started, or started again."""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from helpers import TOOLS

from mmrpa.elastic import end_with_launcher, restart_flags, settle_resume


@pytest.fixture
def restarted(tmp_path, monkeypatch):
    """A first restart of a launch in second 1000; its working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MMRPA_LAUNCHED', '1000')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    folder = tmp_path / 'work_dirs' / 'my_config'
    folder.mkdir(parents=True)
    return folder


def write(folder, second):
    (folder / 'last_checkpoint').write_text('iter_2.pth')
    os.utime(folder / 'last_checkpoint', (second, second))


def test_it_goes_on_from_a_checkpoint_of_this_launch(restarted):
    write(restarted, 1001)
    flags, note = restart_flags('a/my_config.py', {}, None)
    assert flags == ['--resume', '--cfg-options', 'load_from=None']
    assert 'restart 1: the training goes on' in note
    assert str(restarted.relative_to(restarted.parents[1])) in note


@pytest.mark.parametrize('second', [None, 999])
def test_an_older_checkpoint_is_of_another_training(second, restarted):
    if second:
        write(restarted, second)
    flags, note = restart_flags('a/my_config.py', {}, None)
    assert flags == [] and 'starts as it did then' in note


@pytest.mark.parametrize('ahead', [3600, -3600])
@pytest.mark.parametrize('age', [5, 60])
def test_the_file_server_has_another_clock(age, ahead, restarted,
                                           monkeypatch):
    """A launch 30 seconds ago, where files are dated by another clock."""
    server = time.time()
    write(restarted, server - age)
    monkeypatch.setattr('mmrpa.elastic.time.time', lambda: server - ahead)
    monkeypatch.setenv('MMRPA_LAUNCHED', str(int(server - ahead - 30)))
    assert bool(restart_flags('my_config.py', {}, None)[0]) == (age < 30)
    assert [path.name for path in restarted.iterdir()] == ['last_checkpoint']


@pytest.mark.skipif(sys.platform != 'linux', reason='a call of Linux')
def test_a_launcher_that_ends_first_is_noticed(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    parents = iter([100, 1])
    monkeypatch.setattr(os, 'getppid', lambda: next(parents))
    monkeypatch.setattr('ctypes.CDLL', lambda name: SimpleNamespace(
        prctl=lambda *args: 0))
    with pytest.raises(SystemExit) as caught:
        end_with_launcher()
    assert caught.value.code == 143


@pytest.mark.parametrize('flags', [
    ['--resume'], ['--res'], ['--r'], ['--resume=auto'], ['--res=auto'],
    ['--res', 'auto']])
def test_the_flag_is_found_in_all_its_forms(flags, tmp_path):
    argv = ['c.py', *flags, '--work-dir', str(tmp_path)]
    assert settle_resume(argv, 'c.py', dict(load_from='a.pth'),
                         str(tmp_path))[0] == ['c.py', '--work-dir',
                                               str(tmp_path)]


def test_the_folder_is_the_hosts(restarted, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    write(other, 1001)
    assert restart_flags('my_config.py', {}, str(other))[0]
    assert restart_flags('my_config.py', dict(work_dir=str(other)), None)[0]
    assert not restart_flags('my_config.py', {}, None)[0]


@pytest.mark.parametrize('name, value', [
    ('TORCHELASTIC_RESTART_COUNT', '0'), ('TORCHELASTIC_RESTART_COUNT', None),
    ('MMRPA_LAUNCHED', None)])
def test_a_first_start_is_left_alone(name, value, restarted, monkeypatch):
    write(restarted, 1001)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert restart_flags('my_config.py', {}, None) == ([], None)


@pytest.mark.parametrize('settings, told', [
    (dict(MAX_RESTARTS='-1'), 'MAX_RESTARTS=-1 must be'),
    (dict(MAX_RESTARTS='1', NNODES='2'), 'MAX_RESTARTS is for one machine')])
def test_wrong_settings_are_refused(settings, told):
    done = subprocess.run(
        ['bash', str(TOOLS / 'dist_train.sh'), 'config.py', '2'],
        env={**os.environ, **settings}, capture_output=True, text=True,
        check=False)
    assert done.returncode == 2
    assert told in done.stderr


def test_the_launcher_is_told(tmp_path):
    fake = tmp_path / 'python'
    fake.write_text(f'#!{sys.executable}\nimport json, os, sys\n'
                    'print(json.dumps([sys.argv[1:], '
                    'os.environ["MMRPA_LAUNCHED"], '
                    'os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]]))\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ['bash', str(TOOLS / 'dist_train.sh'), 'config.py', '2'],
        env={**os.environ, 'MAX_RESTARTS': '3', 'PYTHON': str(fake)},
        capture_output=True, text=True, check=True)
    arguments, launched, apart = json.loads(done.stdout)
    place = arguments.index('--max-restarts')
    assert arguments[place + 1] == '3'
    assert place < arguments.index(str(TOOLS / 'train.py'))
    assert int(launched) > 1e9
    assert apart == '1'  # a store of its own for each start


@pytest.mark.skipif(sys.platform != 'linux', reason='a call of Linux')
@pytest.mark.parametrize('started_by_torchrun', [True, False])
def test_a_process_ends_with_its_launcher(started_by_torchrun):
    """The launcher gets SIGKILL; a pipe that is closed tells of the end."""
    child = textwrap.dedent("""
        import os, sys, time
        from mmrpa.elastic import end_with_launcher
        end_with_launcher()
        os.write(int(sys.argv[1]), str(os.getpid()).encode())
        time.sleep(60)
    """)
    launcher = textwrap.dedent("""
        import subprocess, sys
        subprocess.run([sys.executable, '-c', *sys.argv[1:]], pass_fds=[
            int(sys.argv[2])], start_new_session=True)
    """)
    name = 'TORCHELASTIC_RESTART_COUNT'
    env = {k: v for k, v in os.environ.items() if k != name}
    env['PYTHONPATH'] = str(TOOLS.parent)
    if started_by_torchrun:
        env[name] = '0'
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, '-c', launcher, child, str(writer)], env=env,
        pass_fds=[writer])
    os.close(writer)
    worker = int(os.read(reader, 20))  # it runs
    process.kill()
    process.wait()
    # One that does not end would be waited for without an end.
    closed, _, _ = select.select([reader], [], [],
                                 30 if started_by_torchrun else 1)
    os.close(reader)
    if not started_by_torchrun:
        os.kill(worker, signal.SIGKILL)  # fails if it has ended
    assert bool(closed) == started_by_torchrun
