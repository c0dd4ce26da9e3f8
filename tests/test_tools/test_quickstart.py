"""The quickstart's own logic; `make quickstart` itself takes minutes."""

import json

import pytest
from helpers import TOOLS, load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool('quickstart')


LINES = {
    'mmdet': ('11/23 12:00:00 - mmengine - INFO - Epoch(train)   [2][ 70/150] '
              ' base_lr: 1.0e-03 lr: 1.0e-03  eta: 0:01:02  time: 0.4  '
              'data_time: 0.01  grad_norm: 3.0  loss: 1.2345  loss_cls: 0.3',
              ', epoch 2, step 70/150, eta 0:01:02, loss 1.2345'),
    'mmpretrain': ('Epoch(train)  [10][25/25]  lr: 1.0e-03  eta: 0:00:00  '
                   'time: 0.4  loss: 0.5',
                   ', epoch 10, step 25/25, eta 0:00:00, loss 0.5'),
    'mmseg': ('Iter(train) [ 70/400]  base_lr: 1.0e-03 lr: 1.0e-03  '
              'eta: 0:01:02  time: 0.4  loss: 0.75  decode.loss_ce: 0.7',
              ', step 70/400, eta 0:01:02, loss 0.75'),
    'none': ('Loads checkpoint by local backend', ''),
}


@pytest.mark.parametrize('line,expected', LINES.values(), ids=LINES)
def test_progress_is_read_from_the_hosts_logs(tool, line, expected):
    earlier = line.replace(' 70/', ' 10/').replace('25/25', '5/25')
    assert tool.read_progress(f'{earlier}\n{line}\nmore\n') == expected


def test_metrics_come_from_the_newest_test_as_fractions(tool, tmp_path):
    part = tool.PARTS[0]
    for i, value in enumerate((10., 97.5)):
        folder = tmp_path / f'2026_{i}'
        folder.mkdir()
        path = folder / f'2026_{i}.json'
        path.write_text(json.dumps({'accuracy/top1': value, 'time': 1}))
    (folder / 'other.json').write_text(json.dumps({'time': 1}))
    assert tool.read_metrics(part, tmp_path) == {'top-1': 0.975}
    with pytest.raises(tool.Failed, match='mIoU'):
        tool.read_metrics(tool.PARTS[2], tmp_path)


def test_table_has_a_row_a_metric(tool):
    results = {
        part.name: dict(
            metrics={title: 0.5 + 0.1 * i
                     for i, title in enumerate(part.metrics)},
            train_s=12.3,
            test_s=4.5)
        for part in tool.PARTS
    }
    lines = tool.format_table(results).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ['classifier', 'mmpretrain', 'top-1', '0.500', '12', 's', '4', 's'],
        ['detector', 'mmdet', 'box', 'mAP', '0.500', '12', 's', '4', 's'],
        ['box', 'AP50', '0.600'],
        ['mask', 'mAP', '0.700'],
        ['segmentor', 'mmseg', 'mIoU', '0.500', '12', 's', '4', 's'],
    ]  # yapf: disable


def test_a_failed_step_says_where_to_look(tool, tmp_path):
    log = tmp_path / 'sub' / 'step.log'
    script = tmp_path / 'step.py'
    script.write_text('import sys; print("the reason"); sys.exit(3)')
    with pytest.raises(tool.Failed) as info:
        tool.run_step('a step', [str(script)], log)
    text = str(info.value)
    assert 'the reason' in text and 'a step failed with exit code 3' in text
    assert str(log) in text


def test_a_step_that_works_reports_progress(tool, tmp_path, capsys):
    script = tmp_path / 'step.py'
    script.write_text(f'print({LINES["mmseg"][0]!r})')
    tool.run_step('a step', [str(script)], tmp_path / 'step.log')
    assert 'a step:    0 s, step 70/400' in capsys.readouterr().out


def test_the_parts_fit_the_sample_data(tool, tmp_path, monkeypatch):
    from mmengine.config import Config

    from mmrpa.preflight import check_config
    data = load_tool('make_sample_data')
    data.make_sample_data(
        tmp_path / 'data/sample',
        data.Settings(num_train=2, num_val=2, num_cls_train=5, num_cls_val=5))
    monkeypatch.chdir(tmp_path)  # the configs name data/sample
    for part in tool.PARTS:
        cfg = Config.fromfile(TOOLS.parent / part.config)
        assert cfg.default_scope == part.host
        assert check_config(cfg, ('train', 'val', 'test')) == []
