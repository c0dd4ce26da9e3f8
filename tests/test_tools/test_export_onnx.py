"""What tools/export_onnx.py refuses, and that it does so at once."""

import pytest
import torch
from export_models import write_classifier, write_segmentor, write_weights
from helpers import TOOLS, load_tool

QUICKSTART = TOOLS.parent / 'configs' / 'mmdet' / 'quickstart'
DETECTOR = str(next(QUICKSTART.glob('*.py')))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_weights(write_classifier(tmp_path))
    return load_tool('export_onnx')


@pytest.mark.parametrize('argv, message', [
    (['no.py', 'weights.pth'], 'no.py'),
    (['classifier.py', 'no.pth'], "checkpoint 'no.pth' does not exist"),
    (['classifier.py', 'weights.pth', '-o', 'x.pth'],
     "must be a file that ends in .onnx for format 'onnx'"),
    (['classifier.py', 'weights.pth', '-o', 'no/x.onnx'],
     'does not exist; make it first'),
    (['classifier.py', 'weights.pth', '--opset', '9'],
     'opset must be 18 to 23, got 9'),
    (['classifier.py', 'weights.pth', '--sizes', '1x2x64'],
     'cannot check at 1x2x64'),
    (['classifier.py', 'weights.pth', '--what', 'backbone', '--output',
      'labels'], "output='labels' needs part='whole', got 'backbone'"),
    (['classifier.py', 'weights.pth', '--cfg-options', 'model.backbone.x=1'],
     "no argument 'x'"),
    ([DETECTOR, 'random', '--what', 'whole'], "use part='neck'"),
    ([DETECTOR, 'weights.pth'], 'does not fit the model'),
])
def test_refuses(argv, message, tool, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert tool.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith('export_onnx: ') and error.count('\n') == 1
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_failed_check_is_said(tool, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise tool.CheckError('output 0 differs by 1.0e+00')
    monkeypatch.setattr(tool, 'export_model', fail)
    assert tool.main(['classifier.py', 'weights.pth']) == 1
    assert capsys.readouterr().err == (
        'export_onnx: output 0 differs by 1.0e+00; nothing was written\n')


def test_folder_that_cannot_be_written(tool, capsys):
    """Even by root."""
    assert tool.main(['classifier.py', 'weights.pth', '-o',
                      '/sys/x.onnx']) == 2
    error = capsys.readouterr().err
    assert error.startswith('export_onnx: [Errno ') and error.count('\n') == 1
    assert '/sys/' in error


def test_windows_are_said(tool, tmp_path, capsys, monkeypatch):
    config = str(write_segmentor(tmp_path))

    def stop(*args, **kwargs):
        raise tool.CheckError('stopped')
    monkeypatch.setattr(tool, 'export_model', stop)
    tool.main([config, 'random'])
    assert 'note' not in capsys.readouterr().out
    tool.main([config, 'random', '--cfg-options', 'model.test_cfg.mode=slide',
               'model.test_cfg.crop_size=(64,64)',
               'model.test_cfg.stride=(42,42)'])
    assert ('predicts in windows and averages them (crop_size=[64, 64], '
            'stride=[42, 42])') in capsys.readouterr().out


def test_missing_packages_are_named(tool, capsys, monkeypatch):
    import mmrpa.export.formats as formats
    monkeypatch.setattr(formats, '_ONNX_PACKAGES', ('onnx', 'onnx_of_nobody'))
    assert tool.main(['classifier.py', 'weights.pth']) == 1
    assert 'pip install onnx_of_nobody' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['onnx', 'torch-export'])
def test_older_torch_is_named(kind, tool, capsys, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.6.0+cpu')
    assert tool.main(['classifier.py', 'weights.pth', '--format', kind]) == 1
    assert ('needs torch 2.7 or later, this is 2.6.0+cpu: pip install '
            "--upgrade 'torch>=2.7'") in capsys.readouterr().err


@pytest.mark.parametrize('text', ['64x64', 'axbxc', '1x64x64x3'])
def test_sizes_are_written_as(text, tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(['classifier.py', 'weights.pth', '--sizes', text])
    assert 'write batch, height and width as 2x64x96' in (
        capsys.readouterr().err)
