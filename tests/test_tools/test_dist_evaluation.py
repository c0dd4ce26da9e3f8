"""Two processes evaluate as one does, to the last digit."""

import copy
import json
from pathlib import Path

import parallel_evaluation
import pytest
from helpers import TOOLS, load_tool
from processes import run_in_processes

make_sample_data = load_tool('make_sample_data')
IMAGES = 3  # odd: the sampler gives one of them twice


def make_contents(configs: dict, data: Path, folder: Path) -> list[dict]:
    """A detector and a segmentor that see the first images of ``val``."""
    made = []
    for host in ('mmdet', 'mmseg'):
        content = copy.deepcopy(configs[host](data))
        for name in ('train_dataloader', 'train_cfg', 'optim_wrapper',
                     'val_dataloader', 'val_cfg', 'val_evaluator'):
            del content[name]
        content['test_dataloader'].update(batch_size=1)
        content['test_dataloader']['dataset']['indices'] = IMAGES
        made.append(content)
    detector, _ = made
    # Boxes of the objects' size everywhere, so that some are right by chance.
    head = detector['model']['bbox_head']
    head['anchor_generator']['octave_base_scale'] = 7
    head['bbox_coder']['target_stds'] = [0.01] * 4
    detector['model']['test_cfg'].update(
        nms_pre=1000, max_per_img=200, nms=dict(type='nms', iou_threshold=0.9))
    detector['test_evaluator']['outfile_prefix'] = str(folder / 'found')
    return made


def test_two_processes_evaluate_as_one(configs, data, tmp_path):
    results, files = [], []
    for name in ('one', 'two'):
        contents = make_contents(configs, data, tmp_path / name)
        args = contents, str(tmp_path / name)
        if name == 'one':
            results.append(parallel_evaluation.evaluate(0, *args))
        else:
            results += run_in_processes(parallel_evaluation.evaluate, *args)
        files.append((tmp_path / name / 'found.bbox.json').read_text())
    detector, segmentor = results[0]
    # By chance some boxes and pixels are right, and far from all.
    assert 0.002 < detector['coco/bbox_mAP'] < 0.5
    assert 10 < segmentor['mIoU'] < 90
    for metrics in results[1:]:  # both processes know them
        for one, two in zip(results[0], metrics, strict=True):
            for times in (one, two):
                times.pop('time', None), times.pop('data_time', None)
            assert two == one
    # What was evaluated, before the metrics round it.
    assert files[0] == files[1]
    assert {box['image_id'] for box in json.loads(files[0])} == {0, 1, 2}


INTERVAL = 'default_hooks.checkpoint.interval='
QUICKSTARTS = {
    'mmdet': ('mmdet/quickstart/mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py',
              ['train_cfg.max_epochs=1', INTERVAL + '1']),
    'mmseg': ('mmseg/quickstart/rp-pvt-nano_upernet_1xb8-300_sample-128x128'
              '.py', ['train_cfg.max_iters=60', INTERVAL + '60']),
}


@pytest.mark.long
@pytest.mark.parametrize('host', QUICKSTARTS)
def test_quickstart_is_evaluated_as_by_one(host, run_tool, tmp_path):
    """Trained for a minute, by the scripts that users run."""
    name, training = QUICKSTARTS[host]
    config = TOOLS.parent / 'configs' / name
    settings = make_sample_data.Settings(
        num_train=400, num_val=25, num_cls_train=5, num_cls_val=5)
    # The configs look for the data in the working directory.
    make_sample_data.make_sample_data(
        tmp_path / 'elsewhere/data/sample', settings)
    done = run_tool('train.py', config, '--work-dir', tmp_path / 'run',
                    '--cfg-options', 'model.backbone.init_cfg=None', *training)
    assert done.returncode == 0, done.stdout
    checkpoint, = (tmp_path / 'run').glob('*.pth')
    metrics, files = [], []
    for gpus in ([], [2]):
        folder = tmp_path / f'test{len(gpus)}'
        tool = 'dist_test.sh' if gpus else 'test.py'
        save = [f'test_evaluator.outfile_prefix={folder}/out'
                ] if host == 'mmdet' else []
        done = run_tool(tool, config, checkpoint, *gpus, '--work-dir', folder,
                        '--cfg-options', 'model.backbone.init_cfg=None', *save)
        assert done.returncode == 0, done.stdout
        path, = folder.glob('*/*.json')
        metrics.append({
            key: value for key, value in json.loads(path.read_text()).items()
            if not key.endswith('time')
        })
        files.append([p.read_text() for p in sorted(folder.glob('out*'))])
    key = 'coco/segm_mAP_50' if host == 'mmdet' else 'mIoU'
    print(metrics[0])  # for those who ask for it, by -rP
    assert metrics[0][key] > 0.02
    assert metrics[1] == metrics[0]
    # Boxes and masks.
    assert len(files[0]) == (2 if host == 'mmdet' else 0)
    assert files[1] == files[0]
