"""Training over two machines: two network namespaces with a cable."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import TOOLS

from mmrpa.interfaces import choose_gloo_interface, interface_to
from mmrpa.preflight import ConfigError
from mmrpa.weights import read_checkpoint

NAMES = ('mmrpa-a', 'mmrpa-b')
ADDRESSES = ('10.77.0.1', '10.77.0.2')


def ip(*args: str) -> None:
    subprocess.run(['ip', *args], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two namespaces that reach each other and nothing else."""
    if os.geteuid() != 0 or shutil.which('ip') is None:
        pytest.skip('network namespaces need root and iproute2')
    try:
        for name in NAMES:
            ip('netns', 'add', name)
        ip('link', 'add', 'cable', 'netns', NAMES[0], 'type', 'veth', 'peer',
           'name', 'cable', 'netns', NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip('-n', name, 'address', 'add', f'{address}/24', 'dev', 'cable')
            for device in ('lo', 'cable'):
                ip('-n', name, 'link', 'set', device, 'up')
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(['ip', 'netns', 'delete', name], check=False,
                           capture_output=True)


def test_interface_to():
    assert interface_to('127.0.0.1') == interface_to('localhost') == 'lo'
    assert interface_to('no.such.host.invalid') is None


@pytest.mark.parametrize('settings, chosen', [
    (dict(WORLD_SIZE='4', LOCAL_WORLD_SIZE='2'), 'lo'),
    (dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2'), None),
    (dict(WORLD_SIZE='4', LOCAL_WORLD_SIZE='2', GLOO_SOCKET_IFNAME='eth7'),
     None),
], ids=['machines', 'one-machine', 'named'])
def test_choose_gloo_interface(settings, chosen):
    environment = dict(settings, MASTER_ADDR='127.0.0.1')
    before = dict(environment)
    assert choose_gloo_interface(environment) == chosen
    if chosen is not None:
        before['GLOO_SOCKET_IFNAME'] = chosen
    assert environment == before


def test_a_name_that_is_loopback_here_is_refused(monkeypatch):
    monkeypatch.setattr('socket.gethostbyname', lambda host: '127.0.1.1')
    monkeypatch.setattr('mmrpa.interfaces.interface_to', lambda host: 'lo')
    environment = dict(WORLD_SIZE='4', LOCAL_WORLD_SIZE='2',
                       MASTER_ADDR='node0')
    with pytest.raises(ConfigError, match='node0 is 127.0.1.1 on this'):
        choose_gloo_interface(environment)
    assert 'GLOO_SOCKET_IFNAME' not in environment


@pytest.mark.long
@pytest.mark.parametrize('named', [True, False], ids=['named', 'found'])
def test_two_machines_train_as_one(named, machines, configs, data,
                                   write_config, run_tool, tmp_path):
    one = write_config(configs['mmpretrain'](data, batch_size=4), 'one.py')
    two = write_config(configs['mmpretrain'](data, batch_size=1), 'two.py')
    done = run_tool('train.py', one, '--work-dir', tmp_path / 'one')
    assert done.returncode == 0, done.stdout
    # In /etc/hosts of many machines their own name is 127.0.0.1, where gloo
    # would listen: nobody else could reach it there.
    env = dict(os.environ, NNODES='2', MASTER_ADDR=ADDRESSES[0],
               PYTHON=sys.executable, PYTHONPATH=str(TOOLS.parent),
               CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    if named:
        env['GLOO_SOCKET_IFNAME'] = 'cable'
    work_dir = tmp_path / 'two'

    def launch(rank: int) -> tuple[int, str]:
        # Each machine has a disk of its own.
        command = ['ip', 'netns', 'exec', machines[rank], 'bash',
                   TOOLS / 'dist_train.sh', two, '2', '--work-dir',
                   work_dir / str(rank)]
        with subprocess.Popen(command, env=dict(env, NODE_RANK=str(rank)),
                              stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT) as process:
            try:
                output, _ = process.communicate(timeout=240)
            finally:
                process.terminate()  # torchrun then ends its processes, too
        return process.returncode, output

    with ThreadPoolExecutor() as pool:
        finished = list(pool.map(launch, range(2)))
    for code, output in finished:
        assert code == 0, output
        assert ("interface 'cable'" in output) == (not named)
    assert 'GPU number: 4' in finished[0][1]
    single, double = (
        read_checkpoint(str(path / 'iter_2.pth')).state_dict
        for path in (tmp_path / 'one', work_dir / '0'))
    assert single.keys() == double.keys()
    for name, value in single.items():
        assert (double[name] - value).abs().max() < 1e-6, name
