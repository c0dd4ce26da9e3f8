"""tools/test.py stops before it tests a model of which parts are random."""

import re
import sys
from contextlib import nullcontext

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import TestLoop as Loop
from torch.nn.parallel import DataParallel

from mmrpa import launch, safe_loading
from mmrpa.testing import checked_tests
from mmrpa.weights import CheckpointError, read_checkpoint

HEAD = dict(mmpretrain='head.fc.weight', mmdet='bbox_head.retina_cls.weight',
            mmseg='decode_head.conv_seg.weight')
TTA = dict(mmpretrain='AverageClsScoreTTA', mmdet='DetTTAModel',
           mmseg='SegTTAModel')


@pytest.fixture
def states(routing_models) -> dict:
    """Names and tensors of a whole model, by host."""
    return {host: read_checkpoint(files[1]).state_dict
            for host, files in routing_models.items()}


@pytest.fixture
def tested(monkeypatch) -> list:
    """Models that got as far as their first image."""
    models = []
    monkeypatch.setattr(Loop, 'run', lambda loop: models.append(
        loop.runner.model))
    return models


@pytest.fixture
def make_runner(routing_models, tmp_path):
    """A function (host, content of a file, changes) -> runner to test it."""

    def make(host: str, content: dict, wrap=lambda model: model, **changes):
        torch.save(content, tmp_path / 'a.pth')
        cfg = Config.fromfile(routing_models[host][0])
        cfg.merge_from_dict(changes)
        cfg.load_from = str(tmp_path / 'a.pth')
        cfg.work_dir = str(tmp_path)
        cfg.experiment_name = str(tmp_path)
        cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
        cfg.model = wrap(cfg.model)
        return RUNNERS.build(cfg)

    return make


def refusal(runner) -> str:
    """Test; return why that stopped."""
    with checked_tests(), pytest.raises(CheckpointError) as caught:
        runner.test()
    return str(caught.value)


@pytest.mark.parametrize('host, runner_type', [
    *((host, 'Runner') for host in HEAD), ('mmpretrain', 'FlexibleRunner')])
def test_a_backbone_without_heads(host, runner_type, states, make_runner,
                                  tested):
    part = {key: value for key, value in states[host].items()
            if key.startswith('backbone.')}
    lost = [key for key in states[host] if key not in part
            and 'num_batches_tracked' not in key]
    message = refusal(make_runner(host, dict(state_dict=part),
                                  runner_type=runner_type))
    assert f'{len(lost)} are missing' in message
    assert f'of its {len(states[host])} tensors' in message
    named = re.search(r'missing \((.*?)(; \.\.\.)?\)\.', message)
    assert named[1].split('; ') == lost[:3]
    assert bool(named[2]) == (len(lost) > 3)
    assert 'a.pth does not fill' in message
    assert '--no-preflight' in message
    assert not tested


@pytest.mark.parametrize('host', HEAD)
def test_a_head_of_other_classes(host, states, make_runner, tested):
    state = states[host]
    state[HEAD[host]] = torch.cat([state[HEAD[host]]] * 2)
    message = refusal(make_runner(host, dict(state_dict=state)))
    assert f'tensors 1 do not fit (size mismatch for {HEAD[host]}' in message
    assert 'missing' not in message
    assert not tested


def test_both_at_once(states, make_runner, tested):
    state = states['mmpretrain']
    del state['head.fc.weight']
    state['head.fc.bias'] = torch.zeros(5)
    message = refusal(make_runner('mmpretrain', dict(state_dict=state)))
    assert '1 are missing (head.fc.weight) and 1 do not fit (size' in message


def test_nothing_of_the_model(make_runner, tested):
    """Our backbones say it themselves, and first."""
    runner = make_runner('mmpretrain', dict(model=dict(a=torch.zeros(1))))
    with checked_tests(), pytest.raises(ValueError, match='RPPVT') as caught:
        runner.test()
    assert not isinstance(caught.value, CheckpointError)
    assert not tested


@pytest.mark.parametrize('host, whole', [
    *((host, False) for host in HEAD), ('mmseg', True)])
def test_under_wrappers(host, whole, states, make_runner, tested):
    """Of test-time augmentation, and of several GPUs around that."""
    state = states[host]
    if not whole:
        del state[HEAD[host]]
    init_default_scope(host)
    runner = make_runner(
        host, dict(state_dict=state),
        lambda model: dict(type=TTA[host], module=model))
    runner.model = DataParallel(runner.model)
    if whole:
        with checked_tests():
            runner.test()
        loaded = tested[0].module.module.state_dict()
        assert torch.equal(loaded[HEAD[host]], state[HEAD[host]])
    else:
        assert f'1 are missing ({HEAD[host]})' in refusal(runner)


@pytest.mark.parametrize('change', [
    lambda state: dict(state_dict=state),
    lambda state: state,
    lambda state: {f'module.{key}': value for key, value in state.items()},
    lambda state: dict(state_dict=dict(state, more=torch.zeros(1))),
    lambda state: dict(state_dict={
        key: value for key, value in state.items()
        if 'num_batches_tracked' not in key}),
], ids=['whole', 'bare', 'module', 'more', 'old-norms'])
def test_what_fills_the_model_is_tested(change, states, make_runner, tested):
    state = states['mmseg']
    assert any('num_batches_tracked' in key for key in state)
    with checked_tests():
        make_runner('mmseg', change(state)).test()
    loaded = tested[0].state_dict()
    for key, value in state.items():
        assert 'num_batches' in key or torch.equal(loaded[key], value), key


def test_keys_that_the_model_renames(states, make_runner, tested):
    """mmdet's heads read the names of mmdet 1, which are not the model's."""
    cfg = dict(
        type='FCOSHead', num_classes=2, in_channels=16, stacked_convs=1,
        norm_cfg=None,
        feat_channels=16)
    init_default_scope('mmdet')
    state = {key: value for key, value in states['mmdet'].items()
             if not key.startswith('bbox_head')}
    for key, value in MODELS.build(cfg).state_dict().items():
        state[f'bbox_head.{key.replace("conv_cls", "fcos_cls")}'] = value

    def runner():
        return make_runner('mmdet', dict(state_dict=state), lambda model: dict(
            model, bbox_head=cfg, test_cfg=model.test_cfg, train_cfg=None))

    with checked_tests():
        runner().test()
    assert torch.equal(tested[0].bbox_head.conv_cls.weight,
                       state.pop('bbox_head.fcos_cls.weight'))
    assert '1 are missing (bbox_head.conv_cls.weight)' in refusal(runner())


def test_after_the_check_all_is_as_before(states, make_runner, tested):
    runner = make_runner('mmpretrain', dict(state_dict=states['mmpretrain']))
    with checked_tests():
        runner.load_or_resume()
    lacks = make_runner('mmpretrain', dict(state_dict={
        key: value for key, value in states['mmpretrain'].items()
        if not key.startswith('head')}))
    runner.load_checkpoint(lacks._load_from)  # mmengine's own, non-strict
    lacks.test()
    assert len(tested) == 1


@pytest.mark.parametrize('flags', [[], ['--no-preflight']])
def test_the_tool_stops_or_is_told_not_to(flags, routing_models, states,
                                          tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(safe_loading, 'protect_process', lambda: None)
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    state = states['mmpretrain']
    del state['head.fc.bias']
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    args = [routing_models['mmpretrain'][0], tmp_path / 'a.pth',
            '--work-dir', tmp_path / 'test', *flags]
    with nullcontext() if flags else pytest.raises(SystemExit) as caught:
        launch.run('test', '', list(map(str, args)))
    metrics = list((tmp_path / 'test').glob('*/*.json'))
    if flags:
        assert len(metrics) == 1
    else:
        assert caught.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(
            f'test.py: error: {tmp_path / "a.pth"} does not fill the model')
        assert not metrics
