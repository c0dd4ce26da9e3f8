"""Two processes evaluate as one does, to the last digit."""

import copy
import json
from pathlib import Path

import parallel_evaluation
from processes import run_in_processes

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
