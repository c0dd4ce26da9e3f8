"""tools/train.py checks data before the host reads them."""

import json
import subprocess
from pathlib import Path

import pytest
from helpers import TOOLS
from kill_training import environment
from mmengine.config import Config
from parallel_checks import check_and_fail, check_in_turn
from processes import run_in_processes
from small_training import Model

from mmrpa import launch
from mmrpa.data_checks import DataError
from mmrpa.hooks import data_check
from mmrpa.preflight import check_config

# What the hosts' scripts do with their arguments.
SCRIPT = """
import argparse
from mmengine.config import Config, DictAction
parser = argparse.ArgumentParser()
parser.add_argument('config')
parser.add_argument('--cfg-options', nargs='+', action=DictAction)
args = parser.parse_args()
cfg = Config.fromfile(args.config)
cfg.merge_from_dict(args.cfg_options or {})
hook = cfg.default_hooks.get('data_check')
print('the host runs with', hook and (hook.get('enabled', True),
                                      hook.get('allow_subset', False)))
"""


def lose_annotations(data):
    del data.coco['annotations']


def lose_image(data):
    data.coco['annotations'][3]['image_id'] = 987


def lose_image_id(data):
    del data.coco['annotations'][3]['image_id']


def lose_width(data):
    del data.coco['images'][2]['width']


def cut_short(data):
    text = data.json.read_text()
    data.json.write_text(text[:len(text) // 2])
    data.coco = None  # leave the file as it is


def write(data, tmp_path) -> str:
    data.save()
    path = tmp_path / 'config.py'
    # The quickstart's classifier, whose weights it starts from, is not there.
    data.cfg.merge_from_dict({'model.backbone.init_cfg': None})
    data.cfg.dump(path)
    return str(path)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """A function (config, flags) -> exit code, stdout, stderr."""
    script = tmp_path / 'host.py'
    script.write_text(SCRIPT)
    monkeypatch.setattr(launch, 'find_script', lambda *args: script)
    monkeypatch.setattr('mmrpa.safe_loading.protect_process', lambda: None)
    monkeypatch.setattr(data_check, '_early', {})

    def run(config: str, *flags: str) -> tuple:
        code = 0
        try:
            launch.run('train', '', [config, *flags])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize('spoil, told', [
    (lose_annotations, "instances_train2017.json: has no list 'annotations'"),
    (lose_image, 'unknown-image: 1 x'),
    (lose_image_id, 'annotations[3]: image_id is None'),
    (lose_width, 'images[2]: width is None'),
    (cut_short, "instances_train2017.json' is not valid JSON")])
def test_it_stops_before_the_host_runs(spoil, told, make, train, tmp_path):
    data = make('mmdet')
    spoil(data)
    code, out, err = train(write(data, tmp_path))
    assert code == 1
    assert 'the host runs' not in out
    assert err.startswith('train.py: error: ')
    assert told in err
    assert 'train_dataloader.dataset' in err
    assert str(data.json) in err
    assert '--no-preflight' in err


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
def test_clean_data_reach_the_host(host, make, train, tmp_path):
    code, out, err = train(write(make(host), tmp_path))
    assert (code, err) == (0, '')
    assert out.endswith('the host runs with (True, False)\n')


def test_images_are_looked_at_too(make, train, tmp_path):
    data = make('mmpretrain')
    data.files('train/*/*.jpg')[1].write_bytes(b'')
    code, _, err = train(write(data, tmp_path))
    assert code == 1
    assert 'empty-file: 1 x' in err


def test_flags_reach_the_hook(make, train, tmp_path):
    data = make('mmdet')
    data.coco['categories'].append(dict(id=77, name='ring'))
    config = write(data, tmp_path)
    code, _, err = train(config)
    assert code == 1 and "'ring'" in err
    code, out, _ = train(config, '--allow-subset')
    assert code == 0 and 'the host runs with (True, True)' in out
    code, out, _ = train(config, '--no-preflight')
    assert code == 0 and 'the host runs with (False, False)' in out
    code, out, _ = train(config, '--no-preflight', '--allow-subset')
    assert code == 0 and 'the host runs with (False, True)' in out


@pytest.mark.parametrize('hook, printed', [
    (None, 'None'), (dict(type='mmrpa.DataCheckHook', enabled=False),
                     '(False, True)')])
def test_a_config_without_the_hook_is_left_alone(hook, printed, make, train,
                                                 tmp_path):
    data = make('mmdet')
    lose_image(data)
    data.cfg.default_hooks.pop('data_check')
    data.cfg.default_hooks.update(data_check=hook)
    code, out, err = train(write(data, tmp_path), '--allow-subset')
    assert (code, err) == (0, '')
    assert f'the host runs with {printed}\n' in out


@pytest.mark.parametrize('arguments, told', [
    (dict(max_images=0), 'max_images of DataCheckHook must be'),
    (dict(max_image=3), "unexpected keyword argument 'max_image'")])
def test_wrong_arguments(arguments, told, make, train, tmp_path):
    data = make('mmdet')
    data.cfg.default_hooks.data_check.update(arguments)
    code, _, err = train(write(data, tmp_path))
    assert code == 1
    assert 'error: default_hooks.data_check: ' in err and told in err


def test_the_hook_does_not_read_again(make, tmp_path, monkeypatch):
    """It reports what was found, once; the next training reads anew."""
    from mmengine.registry import MODELS
    from mmengine.runner import Runner
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)

    @MODELS.register_module(name='OneNumber', force=True)
    class Tiny(Model):

        def forward(self, inputs, data_samples=None, mode='tensor'):
            return dict(loss=self.head.weight.sum())

    data = make('mmdet')
    data.cfg.default_hooks.data_check.max_images = 3
    cfg = Config.fromfile(write(data, tmp_path))
    data_check.check_early(cfg, ('train', ), False)
    data.files('train2017/*.jpg')[0].write_bytes(b'')
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.merge_from_dict(dict(
        work_dir=str(tmp_path / 'work'), val_dataloader=None, val_cfg=None,
        val_evaluator=None, train_cfg=None, param_scheduler=None,
        test_dataloader=None, test_cfg=None, test_evaluator=None))
    cfg.model = dict(type='OneNumber')
    cfg.train_cfg = dict(by_epoch=False, max_iters=0)
    Runner.from_cfg(cfg).train()
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'sampled: 3 of 12 images were read' in log
    cfg.experiment_name = 'again'
    with pytest.raises(DataError, match='empty-file: 1 x'):
        Runner.from_cfg(cfg).train()


def test_the_hook_in_two_processes(make, tmp_path):
    """One reads, the other waits for what it says."""
    data = make('mmdet')
    configs = [write(data, tmp_path), str(tmp_path / 'broken.py')]
    broken = str(tmp_path / 'broken.json')
    lose_image(data)
    Path(broken).write_text(json.dumps(data.coco))
    data.train.ann_file = broken
    data.cfg.dump(configs[1])
    first, second = run_in_processes(
        check_in_turn, configs, str(tmp_path / 'read'))
    assert first == second
    (no_error, was_read), (error, was_read_too) = first
    assert was_read and was_read_too
    assert no_error == ''
    assert 'unknown-image: 1 x' in error and 'broken.json' in error


def test_a_check_that_fails_ends_all_processes():
    first, second = run_in_processes(check_and_fail)
    assert first == 'RecursionError: a mistake of the check'
    assert second.startswith('RuntimeError: the first process failed to check')


@pytest.mark.long
def test_two_processes_end_with_one_message(make, tmp_path):
    """In a minute, before a dataset is built."""
    data = make('mmdet')
    lose_image(data)
    config = write(data, tmp_path)
    assert check_config(Config.fromfile(config)) == []  # it sees nothing
    done = subprocess.run(
        ['bash', str(TOOLS / 'dist_train.sh'), config, '2'], cwd=tmp_path,
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stdout.count('train.py: error: 1 problem(s) in the data') == 1
    assert 'annotation 4 (image 987)' in done.stdout
    assert 'mmengine/runner' not in done.stdout, done.stdout
