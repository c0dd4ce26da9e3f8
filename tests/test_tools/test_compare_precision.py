"""tools/compare_precision.py, all but the trainings."""

import json

import pytest
from helpers import load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool('compare_precision')


def result(ap, losses=(2., 1.)):
    return dict(metrics={'box mAP': ap, 'box AP50': 0.8, 'mask mAP': 0.5},
                losses=list(losses), train_s=3.)


def test_what_is_wrong_is_said(tool):
    good = dict(float32=result(0.5), bfloat16=result(0.46),
                float16=result(0.54))
    assert tool.judge(good, 0.1) == []
    wrong = tool.judge(dict(good, bfloat16=result(0.44), float16=result(
        0.5, (2., float('nan'), float('inf')))), 0.1)
    assert wrong == [
        'bfloat16: box mAP is 0.440, in float32 0.500',
        'float16: 2 of 3 logged losses are not finite']
    assert tool.judge(dict(good, float16=result(float('nan'))), 0.1)
    assert '| float16 | 0.540 | 0.800 | 0.500 | 1.000 | 3 s |' in (
        tool.format_table(good).splitlines())


def test_nothing_to_compare_with_is_wrong(tool):
    for alone in ({}, dict(bfloat16=result(0.)), dict(float16=result(0.5))):
        assert tool.judge(alone, 0.1) == [
            'float32: no result to compare with; train it by --precisions '
            'float32']
    same = dict(float32=result(0.), bfloat16=result(0.))
    assert tool.judge(same, 0.1) == [
        'float32: box mAP is 0.000, nothing to compare with']
    nan = dict(float32=result(float('nan')))
    assert tool.judge(nan, 0.1) == [
        'float32: box mAP is nan, nothing to compare with']


def test_status_without_float32(tool, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'bfloat16'
    folder.mkdir()
    (folder / 'result.json').write_text(json.dumps(result(0.5)))
    checkpoint = tmp_path / 'classifier.pth'
    checkpoint.touch()
    monkeypatch.setattr(tool, 'make_sample_data', lambda folder: None)
    monkeypatch.chdir(tmp_path)
    argv = ['--work-dir', str(tmp_path), '--classifier', str(checkpoint),
            '--precisions', 'bfloat16']
    assert tool.main(argv) == 1
    assert 'float32: no result' in capsys.readouterr().err
    for precision in ('float32', 'float16'):
        (tmp_path / precision).mkdir()
        (tmp_path / precision / 'result.json').write_text(
            json.dumps(result(0.5)))
    assert tool.main(argv) == 0


def test_losses_are_those_of_the_log(tool, tmp_path):
    folder = tmp_path / '2026/vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(
        json.dumps(r) for r in (dict(loss=2.5, lr=1), dict(mAP=0.1))) +
        '\n{"loss": NaN}')
    first, second = tool.read_losses(tmp_path)
    assert first == 2.5
    assert second != second
    with pytest.raises(tool.Failed, match='left no loss'):
        tool.read_losses(tmp_path / 'other')


@pytest.mark.parametrize(('argv', 'message'), [
    (['--classifier', '/no/such.pth'], '/no/such.pth does not exist'),
    (['--tolerance', 'nan'], '--tolerance nan must be at least 0'),
    (['--precisions', 'float8'], "invalid choice: 'float8'"),
])
def test_bad_arguments(tool, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.parse_args(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
