"""tools/swap_backbone.py: what it writes trains, bad input writes nothing."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import load_tool
from mmengine.config import Config

CAFFE = 'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py'
RESNET = dict(type='ResNet', depth=18, frozen_stages=1, norm_eval=True,
              style='pytorch', init_cfg=dict(
                  type='Pretrained', checkpoint='torchvision://resnet18'))


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The tool's main, in an empty working folder."""
    tool = load_tool('swap_backbone')
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return tool.main


def files() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def test_writes_a_complete_config_and_says_what_changed(main, capsys):
    assert main([CAFFE, '--arch', 'rp-swin-tiny']) == 0
    name = 'retinanet_r50-caffe_fpn_1x_coco_rp_swin_tiny.py'
    assert files() == [name]
    text = Path(name).read_text()
    assert '_base_ =' not in text and 'ResNet' not in text
    cfg = Config.fromfile(name)
    assert cfg.model.backbone.type == 'mmrpa.RPSwin'
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f'wrote    {name}'
    assert {line.split()[0] for line in lines} == {'changed', 'left', 'wrote'}
    assert any('model.neck.in_channels: [192, 384, 768] for [256, 512, 1024, '
               '2048] (' in line for line in lines)


def test_options_come_first_and_the_check_runs(main, capsys):
    assert main([CAFFE, '--arch', 'rp_pvt_tiny', '-o', 'a.py', '--check',
                 '--cfg-options', 'model.bbox_head.num_classes=7']) == 0
    assert Config.fromfile('a.py').model.bbox_head.num_classes == 7
    line, = (text for text in capsys.readouterr().out.splitlines()
             if text.startswith('checked'))
    assert 'loss ' in line and 'no gradient' not in line


def test_another_file_is_not_replaced_unasked(main, capsys):
    Path('a.py').write_text('precious = 1')
    assert main([CAFFE, '--arch', 'rp_pvt_tiny', '-o', 'a.py']) == 2
    assert 'a.py is there already' in capsys.readouterr().err
    assert Path('a.py').read_text() == 'precious = 1'
    assert main([CAFFE, '--arch', 'rp_pvt_tiny', '-o', 'a.py',
                 '--overwrite']) == 0
    assert Config.fromfile('a.py').model.type == 'RetinaNet'
    before = Path('a.py').read_text()
    assert main(['a.py', '--arch', 'rp_pvt_tiny', '-o', 'a.py',
                 '--overwrite']) == 2
    assert 'is the config that is read' in capsys.readouterr().err
    assert Path('a.py').read_text() == before


@pytest.mark.parametrize('text, args, code, message', [
    ('model = dict(', [], 2, 'does not parse: line 1'),
    ('model = nix', [], 2, 'does not parse'),
    ("_base_ = 'nowhere.py'", [], 2, 'does not parse'),
    ("default_scope = 'mmdet'\nmodel = dict(type='RPN')", [], 1,
     'no backbone: RPN'),
    ("default_scope = 'mmdet'", [], 1, 'no model'),
    ("model = dict(backbone=dict(type='ResNet'))", [], 1,
     'no default_scope'),
    ("default_scope = 'x'\nmodel = dict(backbone=dict(type='ResNet'))", [], 2,
     "default_scope='x' names no host"),
    (None, [], 2, 'does not exist'),
    ('x = 1', ['-o', 'nowhere/a.py'], 2, "no folder 'nowhere'"),
    ('x = 1', ['-o', 'a.json'], 2, 'must end in .py'),
    ('x = 1', ['--arch', 'rp_swin_tinny'], 2,
     "no arch 'rp_swin_tinny'. Did you mean rp_swin_tiny"),
    ("default_scope = 'mmdet'\nmodel = dict(type='SSD', backbone=dict("
     "type='SSDVGG'))", [], 1, 'built around its own backbone'),
])
def test_bad_input_is_one_line_and_writes_nothing(main, capsys, text, args,
                                                  code, message):
    if text is not None:
        Path('in.py').write_text(text)
    before = files()
    assert main(['in.py', '--arch', 'rp_swin_tiny', *args]) == code
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert message in err and err.startswith('swap_backbone: ')
    assert files() == before


def test_host_and_name(main, capsys):
    assert main(['mmfoo::a.py', '--arch', 'rp_swin_tiny']) == 2
    assert "'mmfoo' is no host" in capsys.readouterr().err
    assert main(['mmdet::a.py', '--arch', 'rp_swin_tiny']) == 2
    assert "a.py' does not exist" in capsys.readouterr().err
    assert files() == []


def _with_resnet(host: str, content: dict) -> dict:
    """A toy config with ResNet-18 where it had a toy RP backbone."""
    model = content['model']
    model['backbone'] = RESNET
    if host == 'mmdet':
        model['neck']['in_channels'] = [64, 128, 256, 512]
    elif host == 'mmseg':
        # dilated, stride 8, as mmseg's ResNets are
        model['backbone'] = dict(RESNET, strides=(1, 2, 1, 1),
                                 dilations=(1, 1, 2, 4))
        model['decode_head']['in_channels'] = 512
    else:
        model['backbone'] = dict(RESNET, num_stages=4, out_indices=(3, ))
        model['head']['in_channels'] = 512
    return content


@pytest.mark.parametrize('host, own', [
    ('mmdet', False), ('mmseg', True),
    pytest.param('mmpretrain', False, marks=pytest.mark.long)])
def test_swapped_configs_train(host, own, data, configs, write_config, main,
                               run_tool, tmp_path):
    """By tools/train.py, or by the host's own script."""
    path = write_config(_with_resnet(host, configs[host](data)))
    out = tmp_path / 'swapped.py'
    assert main([str(path), '--arch', 'rp_pvt_tiny', '-o', str(out)]) == 0
    work_dir = tmp_path / 'run'
    if own:
        folder = Path(find_spec(host).submodule_search_locations[0])
        done = subprocess.run(
            [sys.executable, folder / '.mim/tools/train.py', out,
             '--work-dir', work_dir], capture_output=True, text=True,
            env=dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'))
        text = done.stdout + done.stderr
    else:
        done = run_tool('train.py', out, '--work-dir', work_dir)
        text = done.stdout
    assert done.returncode == 0, text
    assert (work_dir / 'iter_2.pth').is_file()
