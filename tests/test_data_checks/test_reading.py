"""What reads the files: sizes, damage, run lengths; and nothing crashes."""

import json
import random

import mmcv
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from mmrpa.data_checks import check_data, coco
from mmrpa.data_checks.context import Context
from mmrpa.data_checks.findings import PROBLEMS, Findings
from mmrpa.data_checks.images import read_all, read_image, read_labels, spread
from mmrpa.data_checks.rle import RLEError, check_rle, read_runs


@pytest.mark.parametrize('orientation', range(1, 9))
def test_size_is_that_of_mmcv(orientation, tmp_path):
    path = str(tmp_path / 'a.jpg')
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (300, 200)).save(path, exif=exif)
    facts = read_image(path)
    height, width = mmcv.imread(path).shape[:2]
    assert (facts.code, facts.size) == ('', (width, height))


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_each_cut_is_found(suffix, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / f'a{suffix}'
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert read_image(str(path)).code == ''
    for part in np.linspace(1, len(whole) * 0.98, 40).astype(int):
        path.write_bytes(whole[:part])
        code = read_image(str(path)).code
        assert code in ('truncated-file', 'not-an-image'), part
    if suffix == '.jpg':  # what a training makes of it
        path.write_bytes(whole[:len(whole) // 2])
        assert mmcv.imread(str(path)) is None


def test_values_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 7, (30, 20), dtype=np.uint8)
    path = str(tmp_path / 'a.png')
    Image.fromarray(pixels).save(path)
    values, counts = np.unique(pixels, return_counts=True)
    assert read_labels(path).counts == dict(
        zip(values.tolist(), counts.tolist(), strict=True))
    assert read_labels(path).size == (20, 30)


@pytest.mark.parametrize('seed', range(20))
def test_runs_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2).tolist()
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    if seed % 2:  # long runs
        mask = np.sort(mask, 0)
    rle = pycoco.encode(np.asfortranarray(mask))
    runs = read_runs(rle['counts'])
    values = np.arange(len(runs)) % 2
    decoded = np.repeat(values, runs).reshape((height, width), order='F')
    assert np.array_equal(decoded, mask)
    text = dict(size=[height, width], counts=rle['counts'].decode())
    check_rle(text, width, height)
    check_rle(dict(text, counts=runs), width, height)
    with pytest.raises(RLEError, match='the runs cover'):
        check_rle(dict(size=[height + 1, width], counts=runs), width,
                  height + 1)


@pytest.mark.parametrize('counts, message', [
    ('~~', "character '~' is not allowed"),
    ('\ud800', r"character '\\ud800' is not allowed"),
    ('\xe9', "character '\xe9' is not allowed"),
    ('P', 'ends within a number'),
    ('', 'the runs cover 0'),
    # Were it read to its end, it would take longer than anybody waits.
    ('o' * 10_000_000, 'a run has too many digits'),
    (None, 'counts is neither'),
    ([1, '2'], 'counts is neither'),
    ([True, 8], 'counts is neither'),
])
def test_wrong_runs(counts, message):
    with pytest.raises(RLEError, match=message):
        check_rle(dict(size=[3, 3], counts=counts), 3, 3)


@pytest.mark.parametrize('workers', [0, 3])
def test_reading_is_in_order_and_bounded(workers):
    taken, given = 0, 0

    def items():
        nonlocal taken
        for i in range(200):
            taken += 1
            assert taken - given <= 8 * max(1, workers)
            yield i

    for item, square in read_all(lambda x: x * x, items(), workers):
        assert (item, square) == (given, given**2)
        given += 1
    assert given == 200


def test_spread():
    assert spread(list(range(10)), None) == list(range(10))
    assert spread(list(range(10)), 99) == list(range(10))
    assert spread(list(range(10)), 3) == [0, 3, 6]


def test_findings_keep_five_examples_and_all_counts():
    findings = Findings()
    for i in range(10_000):
        findings.add('box-empty', 'a', str(i))
    group, = findings.problems
    assert (group.count, group.examples) == (10_000, list('01234'))
    with pytest.raises(KeyError):
        findings.add('no-such-kind', 'a', '')


ODD = [None, True, -1, 0, 1.5, float('nan'), float('-inf'), 10**400, '', 'x',
       '1', '\0', '\ud800', [], [[]], [None], {}, dict(id=1), [[1, 2], 3],
       -2**63, [[10**400, 1.5, 2, 3, 4, 5]], dict(size=3, counts='a')]


def mutate(node, rng: random.Random):
    """Replace or take away one value somewhere inside; returns the result."""
    parent, key, child = None, None, node
    while isinstance(child, (dict, list)) and child and (
            parent is None or rng.random() < 0.85):
        parent = child
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(
            len(parent)))
        child = parent[key]
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return node


# What a value that is replaced or taken away in a COCO file can give.
OF_COCO_FILES = {
    'annotation-file', 'image-entry', 'annotation-entry', 'categories',
    'class-names', 'missing-image', 'unreadable-file', 'not-an-image',
    'no-images', 'duplicate-image-id', 'duplicate-annotation-id',
    'duplicate-category', 'unknown-image', 'unknown-category', 'image-size',
    'not-finite', 'box-empty', 'box-outside', 'area-empty', 'polygon-short',
    'polygon-odd', 'rle-malformed', 'mask-missing'
}


@pytest.mark.parametrize('block', range(4))
def test_no_json_crashes_it(block, make):
    data = make('mmdet')
    data.train_only()
    data.cfg.pop('val_evaluator'), data.cfg.pop('test_evaluator')
    whole = json.dumps(data.coco)
    found = set()
    for seed in range(60):
        rng = random.Random(1000 * block + seed)
        data.coco = json.loads(whole)
        for _ in range(rng.randint(1, 6)):
            mutate(data.coco, rng)
        # Categories are remembered by the file's name.
        name = f'annotations/{block}_{seed}.json'
        data.train.ann_file = name
        (data.root / name).write_text(json.dumps(data.coco))
        report = check_data(data.cfg)
        json.dumps(report.record(), allow_nan=False)
        '\n'.join(report.findings.lines()).encode()
        found |= {group.code for group in report.findings.problems}
    assert len(found) >= 4 and found <= OF_COCO_FILES


def test_annotations_are_let_go_before_images_are_read(make, monkeypatch):
    loaded, left = [], []
    load, read = coco._load, Context.read
    monkeypatch.setattr(coco, '_load', lambda *args: (
        loaded.append(load(*args)), loaded[-1])[1])
    monkeypatch.setattr(Context, 'read', lambda *args: (
        left.append(dict(loaded[-1])), read(*args))[1])
    report = check_data(make('mmdet').cfg, ('train', ))
    assert report.findings.problems == [] and left == [{}]
    assert report.histograms['train_dataloader.dataset'].total == 12


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.gif', 'a.bmp',
                                  'a.tif', 'a.webp'])
def test_no_image_crashes_it(name, tmp_path):
    rng = random.Random(0)
    path = tmp_path / name
    pixels = np.random.default_rng(0).integers(
        0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    damaged = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[:rng.randint(1, len(content))])
        for read in (read_image, read_labels):
            code = read(str(path)).code
            assert code == '' or code in PROBLEMS
            damaged += bool(code)
    assert damaged > 50
