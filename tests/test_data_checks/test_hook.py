"""DataCheckHook: broken data stops a training before its first step."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from small_training import Model

from mmrpa.data_checks import DataError
from mmrpa.hooks import DataCheckHook

ROOT = Path(__file__).resolve().parents[2]


def train(data, tmp_path, name: str, **arguments) -> list[int]:
    """Train two steps with the hook; returns the steps that were taken."""
    data.save()
    steps = []

    # By name: the original mmengine cannot write a class into a log.
    @MODELS.register_module(name='CountsSteps', force=True)
    class Tiny(Model):
        """Loads nothing of a host, and counts its steps."""

        def forward(self, inputs, data_samples=None, mode='tensor'):
            steps.append(len(inputs))
            return dict(loss=self.head.weight.sum())

    cfg = Config(
        dict(
            default_scope=data.host,
            model=dict(type='CountsSteps'),
            train_dataloader=data.cfg.train_dataloader,
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            auto_scale_lr=dict(enable=False, base_batch_size=64),
            default_hooks=dict(
                data_check=dict(type='mmrpa.DataCheckHook', **arguments)),
            work_dir=str(tmp_path / 'work'), experiment_name=name))
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    Runner.from_cfg(cfg).train()
    return steps


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
def test_clean_data_pass(host, make, tmp_path):
    assert len(train(make(host), tmp_path, f'clean_{host}')) == 2
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'DataCheckHook: no problems in what was read' in log
    assert 'lr 0.1; --auto-scale-lr would give lr ' in log


def test_broken_data_stop(make, tmp_path):
    data = make('mmdet')
    data.coco['annotations'][0]['bbox'] = [20, 20, 40, 40]
    data.files('train2017/*.jpg')[2].write_bytes(b'')
    steps = []
    with pytest.raises(DataError) as caught:
        steps = train(data, tmp_path, 'broken')
    assert steps == []
    text = str(caught.value)
    assert text.startswith('2 problem(s) in the data')
    assert 'box-outside: 1 x' in text and 'empty-file: 1 x' in text
    assert 'tools/check_data.py' in text


def test_disabled(make, tmp_path):
    data = make('mmdet')
    data.coco['annotations'][0]['bbox'] = [20, 20, 40, 40]
    assert len(train(data, tmp_path, 'disabled', enabled=False)) == 2


def test_a_few_images_are_read(make, tmp_path, monkeypatch):
    from mmrpa.data_checks import images
    opened = []
    original = images.Image.open
    monkeypatch.setattr(
        images.Image, 'open',
        lambda file: (opened.append(file.name), original(file))[1])
    train(make('mmdet'), tmp_path, 'few', max_images=3)
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'sampled: 3 of 12 images were read' in log
    assert 'DataCheckHook: no problems' in log
    assert len([name for name in opened if 'train2017' in name]) == 3


def test_folders_are_listed_in_part(make, tmp_path):
    """And how many images there are is not known, so it is not told."""
    train(make('mmpretrain'), tmp_path, 'listed', max_images=7)
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'sampled: of each folder, the first 1 images were listed' in log
    assert 'images were read' not in log


def test_large_annotation_file_is_left_out(make, tmp_path, monkeypatch):
    from mmrpa.data_checks import coco
    monkeypatch.setattr(coco, '_QUICK_SIZE', 100)
    train(make('mmdet'), tmp_path, 'large')
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'its annotations and images were left out' in log


@pytest.mark.parametrize('arguments, message', [
    (dict(max_images=0), 'max_images of DataCheckHook must be .* got 0'),
    (dict(max_images=2.), 'max_images'),
    (dict(enabled=1), 'enabled of DataCheckHook must be True or False'),
    (dict(allow_subset='no'), 'allow_subset'),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataCheckHook(**arguments)


def test_on_in_our_configs():
    paths = [
        ROOT / f'configs/{name}.py' for name in (
            'mmdet/rp_swin/mask-rcnn_rp-swin-tiny_fpn_1x_coco',
            'mmseg/rp_swin/rp-swin-tiny_upernet_8xb2-160k_ade20k-512x512',
            'mmseg/rp_pvt/rp-pvt-tiny_fpn_4xb4-80k_ade20k-512x512',
            'mmpretrain/rp_deit/rp-deit-base_8xb128_in1k')
    ]
    quickstarts = list((ROOT / 'configs').glob('*/quickstart/*.py'))
    assert len(quickstarts) == 3
    for path in paths + quickstarts:
        hooks = Config.fromfile(path).default_hooks
        assert hooks.data_check.type == 'mmrpa.DataCheckHook', path
        assert isinstance(HOOKS.build(hooks.data_check), DataCheckHook)


