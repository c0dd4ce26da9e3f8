"""Real runs of two steps, alone and in two processes; the shell scripts."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import TOOLS

from mmrpa.weights import read_checkpoint

SHELL = ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
# A module that a config imports; it notes who writes the metrics of a test.
WRITERS = """\
import os
from mmengine.hooks import logger_hook
dump = logger_hook.dump
def noted(content, path):
    open(path + '.rank' + os.environ['RANK'], 'w').close()
    dump(content, path)
logger_hook.dump = noted
"""
RECORDER = f"""\
#!{sys.executable}
import json, os, sys
with open(os.environ['RECORD'], 'w') as file:
    json.dump(sys.argv[1:], file)
sys.exit(int(os.environ.get('CODE', 0)))
"""


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(work_dir / 'iter_2.pth')).state_dict


def scalars(work_dir: Path) -> list[dict]:
    """The lines that the run logged as values."""
    path, = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def alone(configs, data, tmp_path_factory) -> Path:
    """Work folder of one process with a batch of 2."""
    folder = tmp_path_factory.mktemp('alone')
    content = configs['mmpretrain'](data, batch_size=2)
    (folder / 'one.py').write_text(
        ''.join(f'{k} = {v!r}\n' for k, v in content.items()))
    done = subprocess.run(
        [sys.executable, TOOLS / 'train.py', folder / 'one.py', '--work-dir',
         folder / 'run'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, check=False,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout
    return folder / 'run'


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize('nodes', [
    pytest.param(1, id='one-node'),
    pytest.param(2, id='two-nodes', marks=pytest.mark.long)])
def test_two_processes_train_as_one(nodes, alone, configs, data, write_config,
                                    run_tool, tmp_path):
    """On one machine, or by two launchers that find each other."""
    two = write_config(configs['mmpretrain'](data, batch_size=1), 'two.py')
    env = {} if nodes == 1 else dict(NNODES='2', PORT=str(free_port()))

    def launch(rank: int) -> subprocess.CompletedProcess:
        return run_tool('dist_train.sh', two, 2 // nodes, '--work-dir',
                        tmp_path / 'two', env=dict(env, NODE_RANK=str(rank)))

    with ThreadPoolExecutor() as pool:
        finished = list(pool.map(launch, range(nodes)))
    for done in finished:
        assert done.returncode == 0, done.stdout
    assert "over 'gloo'" in finished[0].stdout
    assert 'Distributed training: True' in finished[0].stdout
    assert 'GPU number: 2' in finished[0].stdout
    single, double = weights(alone), weights(tmp_path / 'two')
    assert single.keys() == double.keys()
    # Images alternate between the classes, so that each process sees one
    # class only: without a mean over both the heads would differ by 1e-2.
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=0, atol=1e-6)
    # Validation put the results of both processes together.
    key = 'accuracy/top1'
    assert scalars(tmp_path / 'two')[-1][key] == scalars(alone)[-1][key]


def test_two_processes_train_and_test_a_detector(configs, data, write_config,
                                                 run_tool, tmp_path):
    (tmp_path / 'note_writers.py').write_text(WRITERS)
    content = dict(configs['mmdet'](data),
                   custom_imports=dict(imports=['note_writers']))
    config = write_config(content)
    work_dir = tmp_path / 'work dir'
    done = run_tool('dist_train.sh', config, 2, '--work-dir', work_dir)
    assert done.returncode == 0, done.stdout
    trained = scalars(work_dir)
    # Four images over two processes of batch 1: two steps are one epoch.
    assert [line['step'] for line in trained if 'loss' in line] == [1, 2]
    done = run_tool('dist_test.sh', config, work_dir / 'iter_2.pth', 2,
                    '--work-dir', tmp_path / 'test')
    assert done.returncode == 0, done.stdout
    result, = (tmp_path / 'test').glob('*/*.json')
    # Two that write it at once can leave a text that is no JSON.
    writer, = (tmp_path / 'test').glob('*/*.json.rank*')
    assert writer.suffix == '.rank0'
    key = 'coco/bbox_mAP'
    assert json.loads(result.read_text())[key] == trained[-1][key]


def test_one_process_trains_and_tests_a_segmentor(configs, data, write_config,
                                                  run_tool, tmp_path):
    # SyncBN: with one process mmengine turns it into BN.
    config = write_config(configs['mmseg'](data, norm='SyncBN'))
    work_dir = tmp_path / 'work'
    done = run_tool('train.py', config, '--work-dir', work_dir,
                    '--auto-scale-lr', '--cfg-options',
                    'optim_wrapper.optimizer.lr=0.04')
    assert done.returncode == 0, done.stdout
    trained = scalars(work_dir)
    # Batch 2 where the config names 8: a quarter of 0.04.
    assert [line['lr'] for line in trained if 'lr' in line] == [0.01, 0.01]
    done = run_tool('test.py', config, work_dir / 'iter_2.pth', '--work-dir',
                    tmp_path / 'test')
    assert done.returncode == 0, done.stdout
    result, = (tmp_path / 'test').glob('*/*.json')
    assert json.loads(result.read_text())['mIoU'] == trained[-1]['mIoU']


def test_failure_is_told_once_and_passed_on(configs, data, write_config,
                                            run_tool):
    content = configs['mmpretrain'](data)
    content['train_dataloader']['dataset']['data_root'] = 'no/such'
    done = run_tool('dist_train.sh', write_config(content), 2)
    assert done.returncode != 0
    line = "train_dataloader.dataset.data_root='no/such' does not exist"
    assert done.stdout.count(line) == 1


@pytest.fixture
def record(tmp_path):
    """Environment with a fake python and srun, and the arguments they got."""
    folder = tmp_path / 'fake bin'
    folder.mkdir()
    for name in ('python', 'srun'):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    path = tmp_path / 'record.json'
    env = dict(
        PATH=f'{folder}{os.pathsep}{os.environ["PATH"]}',
        PYTHON='python',
        RECORD=str(path))
    return env, lambda: json.loads(path.read_text())


STANDALONE = ['--standalone', '--local-addr', '127.0.0.1']


@pytest.mark.parametrize('settings, rendezvous', [
    (dict(), STANDALONE),
    (dict(NNODES='1', NODE_RANK='0'), STANDALONE),
    (dict(PORT='1234'), [
        '--nnodes', '1', '--node-rank', '0', '--master-addr', '127.0.0.1',
        '--master-port', '1234'
    ]),
    (dict(NNODES='3', NODE_RANK='2', MASTER_ADDR='10.0.0.1'), [
        '--nnodes', '3', '--node-rank', '2', '--master-addr', '10.0.0.1',
        '--master-port', '29500'
    ]),
    (dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='h', PORT='5'), [
        '--nnodes', '2', '--node-rank', '1', '--master-addr', 'h',
        '--master-port', '5'
    ]),
    (dict(NNODES='9', NODE_RANK='08'), [
        '--nnodes', '9', '--node-rank', '8', '--master-addr', '127.0.0.1',
        '--master-port', '29500'
    ]),
], ids=['default', 'one-node', 'port', 'nodes', 'all', 'leading-zero'])
@pytest.mark.parametrize('kind', ['train', 'test'])
def test_dist_command(kind, settings, rendezvous, record, run_tool):
    env, recorded = record
    paths = ['a b.py'] if kind == 'train' else ['a b.py', 'c d.pth']
    done = run_tool(f'dist_{kind}.sh', *paths, 4, '--work-dir', 'e  f',
                    '--cfg-options', 'x=[1, 2]', env={**env, **settings})
    assert done.returncode == 0, done.stdout
    assert recorded() == [
        '-m', 'torch.distributed.run', *rendezvous, '--nproc-per-node', '4',
        str(TOOLS / f'{kind}.py'), *paths, '--launcher', 'pytorch',
        '--work-dir', 'e  f', '--cfg-options', 'x=[1, 2]'
    ]


@pytest.mark.parametrize('settings, resources', [
    (dict(), ('8', '8', '5', [])),
    (dict(GPUS='2'), ('2', '2', '5', [])),
    (dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3',
          SRUN_ARGS='--time=1:00  --exclusive'),
     ('16', '4', '3', ['--time=1:00', '--exclusive'])),
], ids=['default', 'few', 'all'])
@pytest.mark.parametrize('kind', ['train', 'test'])
def test_slurm_command(kind, settings, resources, record, run_tool):
    env, recorded = record
    paths = ['a b.py'] if kind == 'train' else ['a b.py', 'c d.pth']
    gpus, per_node, cpus, more = resources
    done = run_tool(f'slurm_{kind}.sh', 'part', 'my job', *paths,
                    '--work-dir', 'e f', env={**env, **settings})
    assert done.returncode == 0, done.stdout
    assert recorded() == [
        '--partition=part', '--job-name=my job', f'--gres=gpu:{per_node}',
        f'--ntasks={gpus}', f'--ntasks-per-node={per_node}',
        f'--cpus-per-task={cpus}', '--kill-on-bad-exit=1', *more, 'python',
        '-u', str(TOOLS / f'{kind}.py'), *paths, '--launcher', 'slurm',
        '--work-dir', 'e f'
    ]


@pytest.mark.parametrize('tool', SHELL)
def test_exit_code_is_passed_on(tool, record, run_tool):
    env, _ = record
    paths = ['c.py', 'c.pth'] if 'test' in tool else ['c.py']
    job = ['part', 'job'] if 'slurm' in tool else []
    gpus = [] if 'slurm' in tool else ['2']
    done = run_tool(tool, *job, *paths, *gpus, env={**env, 'CODE': '7'})
    assert done.returncode == 7, done.stdout


@pytest.mark.parametrize('tool', SHELL)
def test_shell_help(tool, run_tool):
    done = run_tool(tool, '--help')
    assert done.returncode == 0
    assert done.stdout.startswith(f'usage: {tool} ')


@pytest.mark.parametrize('tool, args, settings', [
    ('dist_train.sh', ['c.py'], {}),
    ('dist_test.sh', ['c.py', '2'], {}),
    ('slurm_train.sh', ['part', 'job'], {}),
    ('slurm_test.sh', ['part', 'job', 'c.py'], {}),
    ('dist_train.sh', ['c.py', '0'], {}),
    ('dist_train.sh', ['c.py', 'c.pth'], {}),
    ('dist_train.sh', ['c.py', '2'], dict(NNODES='two')),
    ('dist_train.sh', ['c.py', '2'], dict(NNODES='2', NODE_RANK='2')),
    ('dist_train.sh', ['c.py', '2'], dict(NNODES='8', NODE_RANK='08')),
    ('slurm_train.sh', ['part', 'job', 'c.py'], dict(GPUS='x')),
], ids=str)
def test_shell_wrong_usage(tool, args, settings, record, run_tool):
    env, _ = record
    done = run_tool(tool, *args, env={**env, **settings})
    assert done.returncode == 2
    assert tool in done.stdout
    assert not Path(env['RECORD']).exists()
