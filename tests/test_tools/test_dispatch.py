"""tools/train.py and tools/test.py: which script runs, with what."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from importlib.machinery import ModuleSpec

import pytest
from helpers import TOOLS, load_tool

from mmrpa import launch

RECORDER = """\
import json, os, sys
from pathlib import Path
record = dict(argv=sys.argv, name=__name__)
Path(os.environ['RECORD']).write_text(json.dumps(record))
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A function (tool, *args) -> arguments that a fake host script got."""
    folder = tmp_path / 'fake' / '.mim' / 'tools'
    folder.mkdir(parents=True)
    for name in ('train', 'test'):
        (folder / f'{name}.py').write_text(RECORDER)
    record = tmp_path / 'record.json'
    monkeypatch.setenv('RECORD', str(record))
    monkeypatch.setattr(launch, '_tools_folder', lambda host: folder)
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    for name in ('RANK', 'LOCAL_RANK', 'SLURM_LOCALID'):
        monkeypatch.delenv(name, raising=False)

    def run(tool: str, *args: object) -> list[str]:
        module = load_tool(tool)
        module.run(tool, module.__doc__, [str(arg) for arg in args])
        content = json.loads(record.read_text())
        assert content['name'] == '__main__'
        script, *passed = content['argv']
        assert script == str(folder / f'{tool}.py')
        return passed

    return run


def fails(call, capsys, *args: object, code: int = 1) -> str:
    """Run a tool that must stop with ``code``; return what it says."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert caught.value.code == code
    return capsys.readouterr().err


def bare(scope: str, **more) -> dict:
    """A config without anything to check."""
    return dict(default_scope=scope, model=dict(type='M'), **more)


@pytest.mark.parametrize('scope', launch.HOSTS)
def test_arguments_arrive_unchanged(scope, call, write_config):
    config = write_config(bare(scope))
    flags = [
        '--work-dir', 'a b', '--resume', '--amp', '--cfg-options', 'x.y=1',
        'z="[(1, 2)]"', '--no-pin-memory', '--no-p'
    ]
    assert call('train', config, *flags) == [str(config), *flags]


def test_own_flags_do_not_arrive(call, write_config):
    config = write_config(
        bare('mmdet', train_dataloader=dict(dataset=dict(data_root='none'))))
    assert call('train', config, '--no-preflight', '--amp',
                '--allow-subset') == [str(config), '--amp']


def test_test_gets_the_checkpoint(call, write_config, tmp_path):
    config = write_config(bare('mmseg'))
    checkpoint = tmp_path / 'a b.pth'
    checkpoint.touch()
    args = [str(config), str(checkpoint), '--tta', '--out', 'x.pkl']
    assert call('test', *args) == args


@pytest.mark.parametrize('url', [
    'https://host/a.pth', 'http://host/a.pth', 's3://bucket/a.pth',
    'cluster:s3://bucket/a.pth', 'open-mmlab://name'
])
def test_checkpoint_may_be_a_url(url, call, write_config):
    config = write_config(bare('mmpretrain'))
    assert call('test', config, url) == [str(config), url]


@pytest.mark.parametrize('path', ['no/such.pth', 'htps://host/a.pth'])
def test_missing_checkpoint(path, call, capsys, write_config, tmp_path):
    message = fails(call, capsys, 'test', write_config(bare('mmseg')), path)
    assert f'checkpoint {path!r} does not exist' in message
    assert not (tmp_path / 'record.json').exists()


@pytest.mark.parametrize('several', [False, True])
def test_missing_weights_to_start_from(several, call, capsys, write_config,
                                       tmp_path):
    init_cfg = dict(type='Pretrained', checkpoint='no/such.pth')
    model = dict(backbone=dict(
        init_cfg=[dict(type='Kaiming'), init_cfg] if several else init_cfg))
    config = write_config(dict(bare('mmseg'), model=model))
    message = fails(call, capsys, 'train', config)
    assert "checkpoint 'no/such.pth' does not exist" in message
    assert not (tmp_path / 'record.json').exists()
    init_cfg['checkpoint'] = 'https://host/a.pth'
    config = write_config(dict(bare('mmseg'), model=model))
    assert call('train', config) == [str(config)]


@pytest.mark.parametrize('flags', [
    ['--resume', 'no/such.pth'], ['--resume=no/such.pth'],
    ['--cfg-options', 'load_from=no/such.pth'],
    ['--cfg-options', 'load_from=a.pth', '--resume', 'no/such.pth']])
def test_missing_file_to_go_on_from(flags, call, capsys, write_config,
                                    tmp_path):
    """Named before the data are loaded, which takes COCO a minute."""
    config = write_config(bare('mmdet'))
    message = fails(call, capsys, 'train', config, *flags)
    assert "checkpoint 'no/such.pth' does not exist" in message
    assert not (tmp_path / 'record.json').exists()


@pytest.mark.parametrize('flags', [
    ['--resume', 'https://host/a.pth'], ['--resume', '{folder}'],
    # Where work_dir has a checkpoint, that is the one to go on from.
    ['--cfg-options', 'load_from=no/such.pth', '--resume']])
def test_what_may_be_gone_on_from(flags, call, write_config, tmp_path):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    config = write_config(bare('mmdet', work_dir=str(tmp_path)))
    (tmp_path / 'iter_2.pth').touch()
    assert call('train', config, *flags)[:2] == [str(config), flags[0]]


def test_missing_config(call, capsys):
    message = fails(call, capsys, 'train', 'no/such.py')
    assert "config 'no/such.py' does not exist" in message


@pytest.mark.parametrize('scope', ['mmyolo', None])
def test_wrong_scope(scope, call, capsys, write_config):
    message = fails(call, capsys, 'train', write_config(bare(scope)))
    assert f'default_scope={scope!r}' in message
    for host in launch.HOSTS:
        assert repr(host) in message


@pytest.mark.parametrize('missing', ['mmseg', 'mmengine'])
def test_missing_package(missing, call, capsys, write_config, monkeypatch):
    real = launch.find_spec
    monkeypatch.setattr(launch, 'find_spec', lambda name: None
                        if name == missing else real(name))
    message = fails(call, capsys, 'train', write_config(bare('mmseg')))
    assert f'{missing} is not installed' in message
    assert '`make setup` installs it' in message


def test_host_without_scripts(capsys, write_config, monkeypatch, tmp_path):
    spec = ModuleSpec('mmdet', None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    real = launch.find_spec
    monkeypatch.setattr(launch, 'find_spec', lambda name: spec
                        if name == 'mmdet' else real(name))
    with pytest.raises(SystemExit) as caught:
        launch.run('train', 'doc', [str(write_config(bare('mmdet')))])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert '.mim/tools/train.py' in message
    assert '`make setup` installs it' in message


@pytest.mark.parametrize('args', [
    ['train', '--work-dir', 'w', 'c.py'],
    ['train'],
    ['test', 'c.py'],
    ['test', 'c.py', '--work-dir', 'w'],
], ids=' '.join)
def test_wrong_usage(args, call, capsys):
    fails(call, capsys, *args, code=2)


@pytest.mark.parametrize('scope', launch.HOSTS)
@pytest.mark.parametrize('flag', ['--auto-scale-lr', '--auto'])
def test_auto_scale_lr(scope, flag, call, write_config):
    config = write_config(
        bare(scope, auto_scale_lr=dict(enable=False, base_batch_size=16)))
    given = [str(config), '--cfg-options', 'a=1', flag, '--amp']
    if scope == 'mmseg':
        expected = [
            str(config), '--cfg-options', 'a=1', '--amp', '--cfg-options',
            'auto_scale_lr.enable=True'
        ]
    else:
        expected = given
    assert call('train', *given) == expected


def test_auto_scale_lr_as_its_error_asks_for_it(call, write_config):
    """mmdet's script wants the key ``enable`` besides."""
    config = write_config(bare('mmdet', auto_scale_lr=dict(base_batch_size=8)))
    assert call('train', config, '--auto-scale-lr') == [
        str(config), '--auto-scale-lr', '--cfg-options',
        'auto_scale_lr.enable=True']


@pytest.mark.parametrize('scope', launch.HOSTS)
def test_auto_scale_lr_without_batch_size(scope, call, capsys, write_config):
    config = write_config(bare(scope))
    message = fails(call, capsys, 'train', config, '--auto-scale-lr')
    assert 'auto_scale_lr=dict(base_batch_size=...)' in message


def test_cfg_options_count_in_the_checks(call, capsys, write_config):
    config = write_config(
        bare('mmdet', train_dataloader=dict(dataset=dict(data_root='.'))))
    key = 'train_dataloader.dataset.data_root'
    message = fails(call, capsys, 'train', config, '--cfg-options',
                    f'{key}=no/such')
    assert f"{key}='no/such' does not exist" in message
    assert '--no-preflight' in message


def test_no_validate_leaves_val_out(call, write_config):
    config = write_config(
        bare('mmpretrain', val_dataloader=dict(dataset=dict(data_root='x'))))
    assert call('train', config, '--no-validate')[-1] == '--no-validate'


def test_other_processes_let_the_first_report(call, capsys, write_config,
                                              monkeypatch):
    waited = []
    monkeypatch.setattr(launch.time, 'sleep', waited.append)
    monkeypatch.setenv('LOCAL_RANK', '0')
    fails(call, capsys, 'train', write_config(bare('x')))
    assert waited == []
    monkeypatch.setenv('LOCAL_RANK', '1')
    fails(call, capsys, 'train', write_config(bare('x')))
    assert waited == [launch._REPORT_SECONDS]


@pytest.fixture
def cpu(monkeypatch):
    """Pretend: no GPU, rank 1 of 2; returns the time-outs of the groups."""
    timeouts = []
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    monkeypatch.setattr(
        launch, '_run_on_cpu', lambda script, timeout: timeouts.append(
            (timeout, sys.argv[1:])))
    return timeouts


@pytest.mark.parametrize('unused', [True, False])
def test_cpu_wrapper_is_as_the_runner_makes_it(unused, call, cpu,
                                               write_config, monkeypatch):
    config = write_config(
        bare('mmdet', find_unused_parameters=unused,
             env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=60))))
    given = [str(config), '--launcher', 'pytorch', '--cfg-options', 'a=1']
    monkeypatch.setenv('RANK', '1')
    load_tool('train').run('train', '', given)
    timeout, argv = cpu[0]
    assert timeout == timedelta(seconds=60)
    assert argv == [
        *given, '--cfg-options',
        'model_wrapper_cfg.type=MMDistributedDataParallel',
        'model_wrapper_cfg.device_ids=None',
        'model_wrapper_cfg.broadcast_buffers=False',
        f'model_wrapper_cfg.find_unused_parameters={unused}'
    ]


def test_cpu_keeps_a_wrapper_of_the_config(call, cpu, write_config,
                                           monkeypatch):
    config = write_config(
        bare('mmdet', model_wrapper_cfg=dict(static_graph=True)))
    monkeypatch.setenv('RANK', '1')
    load_tool('train').run('train', '', [str(config), '--launcher', 'pytorch'])
    assert cpu[0][1][3:] == [
        '--cfg-options', 'model_wrapper_cfg.device_ids=None'
    ]


@pytest.mark.parametrize('more, message', [
    (dict(model=dict(heads=[dict(norm_cfg=dict(type='SyncBN'))])),
     '--cfg-options model.heads.0.norm_cfg.type=BN'),
    (dict(sync_bn='torch'), '--cfg-options sync_bn=None'),
], ids=['norm_cfg', 'sync_bn'])
def test_sync_bn_needs_a_gpu(more, message, call, cpu, capsys, write_config,
                             monkeypatch):
    config = write_config({**bare('mmseg'), **more})
    monkeypatch.setenv('RANK', '0')
    assert message in fails(call, capsys, 'train', config, '--launcher',
                            'pytorch')
    # One process needs no synchronisation: mmengine makes it plain BN.
    assert call('train', config) == [str(config)]


@pytest.mark.parametrize('launcher, message', [
    ('slurm', '--launcher slurm needs GPUs'),
    ('pytorch', 'use tools/dist_train.sh'),
])
def test_launcher_that_cannot_work(launcher, message, call, cpu, capsys,
                                   write_config):
    config = write_config(bare('mmdet'))
    assert message in fails(call, capsys, 'train', config, '--launcher',
                            launcher)


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_help_lists_hosts(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        load_tool(tool).run(tool, load_tool(tool).__doc__, ['--help'])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert '--no-preflight' in text
    for host in launch.HOSTS:
        assert os.path.join(host, '.mim', 'tools') in text


def test_help_of_a_config_names_and_asks_the_host(call, capsys,
                                                  write_config):
    config = write_config(bare('mmseg', train_dataloader=dict(dataset=dict(
        data_root='no/such'))))
    assert call('train', config, '--help') == [str(config), '--help']
    text = capsys.readouterr().out
    assert '--no-preflight' in text
    assert f'{config} is run by ' in text


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_mmrpa_not_installed(tool, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    # -S: without site-packages, as with an interpreter that lacks mmrpa.
    done = subprocess.run(
        [sys.executable, '-S', str(TOOLS / f'{tool}.py'), 'c.py'],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install -e .' in done.stderr
    assert 'Traceback' not in done.stderr


WRAPPER = 'optim_wrapper.type=mmrpa.CPUAmpOptimWrapper'


@pytest.mark.parametrize(('flags', 'wrapper'), [
    (['--amp'], dict(type='OptimWrapper')),
    (['--am'], dict(dtype='float16')),
    ([], dict(type='AmpOptimWrapper')),
    (['--amp', '--cfg-options', 'optim_wrapper.dtype=float16'], dict()),
])
def test_amp_without_gpu_takes_our_wrapper(flags, wrapper, call, write_config,
                                           monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    config = write_config(bare('mmdet', optim_wrapper=wrapper))
    kept = [flag for flag in flags if not flag.startswith('--am')]
    assert call('train', config, *flags) == [
        str(config), *kept, '--cfg-options', WRAPPER]


def test_amp_on_a_gpu_is_the_hosts(call, write_config):
    config = write_config(bare('mmdet', optim_wrapper=dict(dtype='float64')))
    assert call('train', config, '--amp') == [str(config), '--amp']


@pytest.mark.parametrize(('wrapper', 'message'), [
    (dict(type='ApexOptimWrapper'), "OptimWrapper, got 'ApexOptimWrapper'"),
    (dict(dtype='float32'), 'optim_wrapper.dtype must be one of'),
])
def test_amp_without_gpu_refuses(wrapper, message, call, capsys, write_config,
                                 monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    config = write_config(bare('mmdet', optim_wrapper=wrapper))
    assert message in fails(call, capsys, 'train', config, '--amp')
