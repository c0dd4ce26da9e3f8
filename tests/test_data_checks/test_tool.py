"""tools/check_data.py from its command line."""

import json
import re

import pytest
from helpers import load_tool
from mmengine.config import Config
from PIL import Image


@pytest.fixture(scope='module')
def tool():
    return load_tool('check_data')


def write(data, tmp_path) -> str:
    data.save()
    path = tmp_path / 'config.py'
    data.cfg.dump(path)
    return str(path)


def test_clean_prints_one_line(tool, make, tmp_path, capsys):
    config = write(make('mmdet'), tmp_path)
    target = tmp_path / 'report.json'
    assert tool.main([config, '--json', str(target)]) == 0
    out = capsys.readouterr()
    assert out.out == 'check_data: no problem(s), 24 images in 2 dataset(s)\n'
    report = json.loads(target.read_text())
    assert report['problems'] == report['notes'] == []
    assert report['config'] == config
    coco = json.loads(
        (tmp_path / 'coco/annotations/instances_train2017.json').read_text())
    histogram = report['histograms']['train_dataloader.dataset']
    for category in coco['categories']:
        own = [a['image_id'] for a in coco['annotations']
               if a['category_id'] == category['id']]
        assert histogram['samples'][category['name']] == len(own)
        assert histogram['images'][category['name']] == len(set(own))


def test_problems_are_counted_and_five_shown(tool, make, tmp_path, capsys):
    data = make('mmpretrain')
    for path in data.files('*/*/*.jpg')[:7]:
        path.write_bytes(b'')
    config = write(data, tmp_path)
    target = tmp_path / 'report.json'
    assert tool.main([config, '--json', str(target), '--workers', '0']) == 1
    out = capsys.readouterr().out
    assert re.search(r'empty-file: 7 x a file of 0 bytes '
                     r'\(train_dataloader.dataset\)', out)
    assert out.count(': 0 bytes\n') == 5
    assert '    and 2 more\n  fix: copy or download it again\n' in out
    problem, = json.loads(target.read_text())['problems']
    assert (problem['code'], problem['count']) == ('empty-file', 7)
    assert len(problem['examples']) == 5
    assert list(tmp_path.glob('.*')) == []


def test_splits_and_histogram(tool, make, tmp_path, capsys):
    data = make('mmseg')
    data.files('annotations/training/*.png')[0].unlink()
    config = write(data, tmp_path)
    assert tool.main([config, '--splits', 'val', '--histogram']) == 0
    out = capsys.readouterr().out
    assert 'train_dataloader' not in out
    assert 'val_dataloader.dataset: 12 images' in out
    number = int(re.search(r'background +(\d+) pixels in 12 images', out)[1])
    assert number == sum(
        Image.open(path).histogram()[1]
        for path in data.files('annotations/validation/*.png'))
    assert tool.main([config, '--splits', 'train']) == 1


@pytest.mark.parametrize('arguments, message', [
    (['no.py'], "config 'no.py' does not exist"),
    (['{config}', '--splits', 'vla'], "invalid choice: 'vla'"),
    (['{config}', '--max-images', '0'], '0 is too small: at least 1'),
    (['{config}', '--workers', 'x'], "invalid integer value: 'x'"),
    (['{config}', '--json', 'no/such/a.json'], 'there is no folder'),
    (['{broken}'], 'invalid syntax'),
])
def test_wrong_usage(arguments, message, tool, tmp_path, capsys):
    config, broken = tmp_path / 'config.py', tmp_path / 'broken.py'
    Config(dict(model=None)).dump(config)
    broken.write_text('model = dict(\n  1 2)')
    arguments = [a.format(config=config, broken=broken) for a in arguments]
    try:
        code = tool.main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    out = capsys.readouterr()
    assert code == 2
    assert message in out.err
    assert 'Traceback' not in out.err
