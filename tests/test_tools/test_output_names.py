"""A test stops before images of one name overwrite each other's files."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.visualization import Visualizer
from mmpretrain.engine import VisualizationHook
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from torch.utils.data import DataLoader

from mmrpa.output_names import check_outputs
from mmrpa.preflight import ConfigError
from mmrpa.testing import checked_tests

SEVERAL = ['dot/0.png', 'bar/0.png', 'bar/1.png']
UNIQUE = ['dot/0.png', 'bar/1.png', 'bar/2.png']
HOOKS = dict(
    mmdet=lambda out: dict(type='DetVisualizationHook', draw=True,
                           test_out_dir=out),
    mmseg=lambda out: dict(type='SegVisualizationHook', draw=True),
    mmpretrain=lambda out: dict(type='VisualizationHook', enable=True,
                                interval=1, out_dir=out))
VISUALIZERS = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer',
                   mmpretrain='UniversalVisualizer')


@pytest.fixture(autouse=True)
def visualizer() -> None:
    """One for hooks without a runner."""
    Visualizer.get_instance('for hooks')


@pytest.fixture
def images(data, tmp_path):
    """A function (names) -> folder with these images, labels and boxes."""

    def make(names: list[str]):
        root = tmp_path / 'images'
        for i, name in enumerate(names):
            for kind, source in (('images', 'images'), ('labels', 'labels')):
                path = root / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(data / f'seg/{source}/val/{i}.png', path)
        content = json.loads((data / 'det/val.json').read_text())
        content['images'] = [dict(image, file_name=name) for image, name
                             in zip(content['images'], names, strict=False)]
        content['annotations'] = [
            box for box in content['annotations']
            if box['image_id'] < len(names)]
        (root / 'boxes.json').write_text(json.dumps(content))
        return root

    return make


@pytest.fixture
def make_runner(routing_models, images, tmp_path):
    """A function (host, names, flag) -> runner of a test, its output."""

    def make(host: str, names: list[str], flag: str, batch_size: int = 1,
             **hook: object):
        root, out = images(names), tmp_path / 'out'
        cfg = Config.fromfile(routing_models[host][0])
        cfg.load_from = str(routing_models[host][1])
        cfg.work_dir = str(tmp_path / 'run')
        cfg.experiment_name = f'{tmp_path} {len(list(tmp_path.iterdir()))}'
        cfg.test_dataloader = cfg.val_dataloader  # with labels
        cfg.test_dataloader.batch_size = batch_size
        dataset = cfg.test_dataloader.dataset
        if host == 'mmdet':
            dataset.update(data_root=str(root), ann_file='boxes.json',
                           data_prefix=dict(img='images'))
            cfg.test_evaluator.ann_file = str(root / 'boxes.json')
        elif host == 'mmseg':
            dataset.update(data_root=str(root), data_prefix=dict(
                img_path='images', seg_map_path='labels'))
        else:
            dataset.update(data_root=str(root), data_prefix='images')
        if flag == '--out':
            cfg.test_evaluator.output_dir = str(out)
        else:
            cfg.default_hooks.visualization = dict(HOOKS[host](str(out)),
                                                   **hook)
            cfg.visualizer = dict(
                type=VISUALIZERS[host], name=cfg.experiment_name,
                save_dir=str(out),
                vis_backends=[dict(type='LocalVisBackend')])
        return RUNNERS.build(cfg), out

    return make


@pytest.mark.parametrize('host, flag, names, batch, hook, stops', [
    ('mmseg', '--out', SEVERAL, 2, {}, True),
    ('mmseg', '--out', UNIQUE, 2, {}, False),
    ('mmdet', '--show-dir', SEVERAL, 1, {}, True),
    ('mmdet', '--show-dir', UNIQUE, 1, {}, False),
    ('mmpretrain', '--show-dir', SEVERAL, 2, {}, True),
    ('mmpretrain', '--show-dir', UNIQUE, 2, {}, False),
    # The images are bar/0, bar/1, dot/0; the first and the last are drawn.
    ('mmpretrain', '--show-dir', SEVERAL, 3, dict(interval=2), True),
    # The first two.
    ('mmpretrain', '--show-dir', SEVERAL, 3, dict(interval=3), False),
])
def test_it_stops_if_a_file_would_be_lost(host, flag, names, batch, hook,
                                          stops, make_runner):
    runner, out = make_runner(host, names, flag, batch, **hook)
    wanted = -(-3 // hook.get('interval', 1))
    if stops:
        with checked_tests(), pytest.raises(ConfigError) as caught:
            runner.test()
        assert str(caught.value).startswith(f'{flag} names files')
        assert f'so 1 of {wanted} would' in str(caught.value)
        assert 'dot/0.png' in str(caught.value)
        assert 'bar/0.png' in str(caught.value)
        assert not list(out.rglob('*.png'))
        runner, _ = make_runner(host, names, flag, batch, **hook)
        runner.test()
    else:
        with checked_tests():
            runner.test()
    assert len(list(out.rglob('*.png'))) == wanted - stops


def test_images_that_get_numbers(make_runner):
    """mmseg's fork does so; with 1.2.2 the same images overwrite."""
    runner, out = make_runner('mmseg', SEVERAL, '--show-dir')
    with checked_tests():
        runner.test()
    files = list(out.rglob('*.png'))
    numbered = hasattr(SegVisualizationHook(), '_test_index')
    assert len(files) == (3 if numbered else 2)


def fake_runner(paths: list[str | None], metrics=(), hooks=(),
                batch_size: int = 1, **more):
    """What the check reads of a runner."""

    class Images(list):

        def get_data_info(self, index: int) -> dict:
            return dict({} if self[index] is None else dict(
                img_path=self[index]), **more)

    loader = DataLoader(Images(paths), batch_size=batch_size)
    return SimpleNamespace(
        test_dataloader=loader, hooks=hooks,
        test_evaluator=SimpleNamespace(metrics=metrics))


def label_writer(folder, classes: int = 2) -> IoUMetric:
    metric = IoUMetric(output_dir=str(folder))
    metric.dataset_meta = dict(classes=list(range(classes)))
    return metric


@pytest.mark.parametrize('classes', [255, 256, 257])
@pytest.mark.parametrize('shifted', [False, True])
def test_it_stops_if_a_label_would_be_another(classes, shifted, tmp_path):
    metric = label_writer(tmp_path, classes)
    label = torch.full((1, 2, 2), classes - 1)
    metric.process({}, [dict(
        img_path='a.png', reduce_zero_label=shifted,
        pred_sem_seg=dict(data=label), gt_sem_seg=dict(data=label))])
    written = cv2.imread(str(tmp_path / 'a.png'), cv2.IMREAD_UNCHANGED)
    runner = fake_runner(['a.png'], [metric], reduce_zero_label=shifted)
    if np.array_equal(written, label[0] + shifted):
        check_outputs(runner)
    else:
        with pytest.raises(ConfigError, match=f'{classes} classes'):
            check_outputs(runner)


def test_labels_lose_the_format_of_the_image(tmp_path):
    runner = fake_runner(['a/0.jpg', 'a/0.png'], [label_writer(tmp_path)])
    with pytest.raises(ConfigError, match='a/0.png has the name of a/0.jpg'):
        check_outputs(runner)


def test_one_image_may_be_there_twice(tmp_path):
    """As some datasets have it, and samplers of several processes."""
    check_outputs(fake_runner(['a/0.png', 'a/0.png', None, None],
                              [label_writer(tmp_path)]))


@pytest.mark.parametrize('rank', [0, 1])
def test_labels_of_all_processes_images_of_the_first(rank, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr('mmengine.dist.utils.get_rank',
                        lambda group=None: rank)
    hook = VisualizationHook(enable=True, interval=1, out_dir='out')
    names = ['a/0.png', 'b/0.png']
    with pytest.raises(ConfigError, match='^--out'):
        check_outputs(fake_runner(names, [label_writer(tmp_path)], [hook]))
    with nullcontext() if rank else pytest.raises(ConfigError, match='^--sh'):
        check_outputs(fake_runner(names, (), [hook]))


@pytest.mark.parametrize('interval, stops', [(1, True), (2, True),
                                             (3, False)])
def test_images_of_mmseg_1_2(interval, stops):
    """That draws each ``interval``-th batch, and numbers none."""
    hook = SegVisualizationHook(draw=True, interval=interval)
    vars(hook).pop('_test_index', None)
    runner = fake_runner(['a/0', 'a/1', 'a/2', 'b/2', 'c/3', 'c/4'],
                         hooks=[hook], batch_size=2)
    with pytest.raises(ConfigError) if stops else nullcontext():
        check_outputs(runner)


def test_images_nobody_can_list_are_noted(tmp_path, capsys):
    runner = fake_runner([])
    runner.test_dataloader = DataLoader([1, 2])
    check_outputs(runner)
    assert not capsys.readouterr().out
    runner.test_evaluator.metrics = [label_writer(tmp_path)]
    check_outputs(runner)
    assert 'not checked: list does not tell' in capsys.readouterr().out
