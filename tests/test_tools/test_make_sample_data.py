"""Sample data: real formats, seeds and splits, whole or not there."""
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import load_tool
from mmdet.datasets import CocoDataset
from mmpretrain.datasets import CustomDataset
from mmseg.datasets import BaseSegDataset
from pycocotools.coco import COCO

tool = load_tool('make_sample_data')

NAMES = ['cross', 'disc', 'square', 'star', 'triangle']
SIZE = 128
TRAIN = tool.Settings(seed=3, num_train=48, num_val=12, num_cls_train=15,
                      num_cls_val=10)
TINY = tool.Settings(seed=5, image_size=48, num_train=4, num_val=2,
                     num_cls_train=5, num_cls_val=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'new' / 'set'
    assert tool.make_sample_data(out, TRAIN)
    return out


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob('*')) if p.is_file()
    }


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def _ade_maps(root: Path, folder: str) -> list[np.ndarray]:
    paths = sorted((root / 'ade/annotations' / folder).iterdir())
    return [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in paths]


def _load_coco(root: Path, split: str) -> COCO:
    return COCO(str(root / f'coco/annotations/instances_{split}2017.json'))


@pytest.mark.parametrize('split, count', [('train', 48), ('val', 12)])
def test_coco_files(root, split, count):
    coco = _load_coco(root, split)
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == NAMES
    ids = coco.getCatIds()
    assert min(ids) == 1 and max(ids) > len(ids)
    assert len(coco.imgs) == count
    on_disk = {p.name for p in (root / f'coco/{split}2017').iterdir()}
    assert on_disk == {i['file_name'] for i in coco.imgs.values()}
    for image in coco.imgs.values():
        pixels = cv2.imread(
            str(root / f'coco/{split}2017' / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
        assert 1 <= len(coco.getAnnIds(image['id'])) <= 4
    for annotation in coco.anns.values():
        assert annotation['iscrowd'] == 0
        assert annotation['category_id'] in ids


def test_coco_image_ids_are_unique_over_splits(root):
    train, val = (_load_coco(root, s) for s in ('train', 'val'))
    assert not set(train.imgs) & set(val.imgs)


def test_coco_box_and_area_are_those_of_the_polygons(root):
    coco = _load_coco(root, 'train')
    ratios, distances = [], []
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        corners = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        x, y, w, h = annotation['bbox']
        distances.append(np.subtract((x, y, x + w, y + h), corners))
        assert 0 <= x and x + w <= SIZE and 0 <= y and y + h <= SIZE
        assert annotation['area'] >= 40
        ratios.append(annotation['area'] / mask.sum())
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)
    # More than a pixel only at a tip thinner than a pixel.
    distances = np.abs(distances).max(axis=1)
    assert (distances <= 1).mean() > 0.97 and distances.max() <= 4


def test_ade_maps_are_single_channel_labels(root):
    for folder, count in dict(training=48, validation=12).items():
        maps = _ade_maps(root, folder)
        assert len(maps) == count
        for labels in maps:
            assert labels.shape == (SIZE, SIZE)
            assert labels.dtype == np.uint8
        shares = np.bincount(np.ravel(maps), minlength=7) / np.size(maps)
        assert len(shares) == 7
        assert 0.4 < shares[1] < 0.95
        assert (shares[2:] > 0.005).all()
        assert 0.001 < shares[0] < 0.03


def test_ade_and_imagenet_names(root):
    for folder in ('training', 'validation'):
        images = (root / 'ade/images' / folder).glob('*.jpg')
        maps = (root / 'ade/annotations' / folder).glob('*.png')
        assert {p.stem for p in images} == {p.stem for p in maps}
    for split, count in dict(train=3, val=2).items():
        folders = sorted((root / 'imagenet' / split).iterdir())
        assert [p.name for p in folders] == NAMES
        for folder in folders:
            images = [cv2.imread(str(p)) for p in folder.iterdir()]
            assert [i.shape for i in images] == [(SIZE, SIZE, 3)] * count


def test_the_hosts_datasets_read_it(root):
    coco = CocoDataset(
        data_root=str(root / 'coco'),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        metainfo=dict(classes=NAMES),
        pipeline=[])
    truth = _load_coco(root, 'train')
    assert len(coco) == 48
    for i in range(len(coco)):
        info = coco.get_data_info(i)
        wanted = truth.imgToAnns[info['img_id']]
        assert [NAMES[x['bbox_label']] for x in info['instances']
                ] == [truth.cats[a['category_id']]['name'] for a in wanted]

    ade = BaseSegDataset(
        data_root=str(root / 'ade'),
        data_prefix=dict(img_path='images/validation',
                         seg_map_path='annotations/validation'),
        metainfo=dict(classes=['background', *NAMES]),
        reduce_zero_label=True,
        pipeline=[dict(type='mmseg.LoadAnnotations')])
    assert len(ade) == 12
    for i, labels in enumerate(_ade_maps(root, 'validation')):
        # The host's convention: 0 becomes 255, which is ignored.
        np.testing.assert_array_equal(ade[i]['gt_seg_map'],
                                      np.where(labels == 0, 255, labels - 1))

    imagenet = CustomDataset(data_root=str(root / 'imagenet'),
                             data_prefix='train', pipeline=[])
    assert list(imagenet.CLASSES) == NAMES
    assert np.bincount(imagenet.get_gt_labels()).tolist() == [3] * 5


def test_ade_maps_agree_with_coco_polygons(root):
    coco = _load_coco(root, 'train')
    maps = _ade_maps(root, 'training')
    ade_jpegs = sorted((root / 'ade/images/training').iterdir())
    square = np.ones((3, 3), np.uint8)
    ious = []
    for image, labels, jpeg in zip(
            coco.loadImgs(sorted(coco.imgs)), maps, ade_jpegs, strict=True):
        twin = root / 'coco/train2017' / image['file_name']
        assert twin.read_bytes() == jpeg.read_bytes()
        for label, name in enumerate(NAMES, 2):
            wanted = coco.getAnnIds(image['id'], coco.getCatIds([name]))
            masks = [coco.annToMask(a) for a in coco.loadAnns(wanted)]
            union = np.any([np.zeros((SIZE, SIZE)), *masks], axis=0)
            ade = labels == label
            assert bool(wanted) == ade.any()
            # They may differ at outlines, and nowhere else.
            outlines = np.any(
                [cv2.dilate(m, square) - cv2.erode(m, square)
                 for m in (ade.astype(np.uint8), *masks)], axis=0)
            assert not ((ade != union) & ~outlines).any()
            if wanted:
                ious.append(_iou(ade, union))
    assert len(ious) > 60
    assert np.mean(ious) >= 0.97


def test_classes_are_balanced(root):
    coco = _load_coco(root, 'train')
    counts = [len(coco.getAnnIds(catIds=[c])) for c in coco.getCatIds()]
    assert sum(counts) > 90
    assert min(counts) > 0.1 * sum(counts)
    assert max(counts) < 0.32 * sum(counts)


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path):
    for name, seed in dict(a=5, b=5, c=6).items():
        settings = tool.Settings(**{**TINY.record()['arguments'],
                                    'seed': seed})
        tool.make_sample_data(tmp_path / name, settings)
    a, b, c = (_contents(tmp_path / name) for name in 'abc')
    assert len(a) == 6 + 2 + 2 * 6 + 8 + 1
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[k] != c[k] for k in a if k.endswith(('.jpg', '.png')))


def test_number_of_images_does_not_change_the_images(tmp_path):
    more = tool.Settings(**{**TINY.record()['arguments'], 'num_train': 6,
                            'num_cls_train': 7})
    tool.make_sample_data(tmp_path / 'few', TINY)
    tool.make_sample_data(tmp_path / 'more', more)
    few, more = _contents(tmp_path / 'few'), _contents(tmp_path / 'more')
    images = [k for k in few if k.endswith(('.jpg', '.png'))]
    assert all(few[k] == more[k] for k in images)


def test_no_scene_in_two_splits_or_twice(root):
    hashes = [
        hashlib.sha256(p.read_bytes()).hexdigest()
        for pattern in ('coco/*/*.jpg', 'imagenet/*/*/*.jpg')
        for p in root.glob(pattern)
    ]
    assert len(hashes) == 48 + 12 + 15 + 10
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize('size', [32, 200])
def test_other_sizes(tmp_path, size):
    settings = tool.Settings(image_size=size, num_train=4, num_val=1,
                             num_cls_train=1, num_cls_val=1)
    tool.make_sample_data(tmp_path / 'set', settings)
    coco = _load_coco(tmp_path / 'set', 'train')
    for image in coco.imgs.values():
        assert image['height'] == image['width'] == size
        assert coco.getAnnIds(image['id'])
    assert _ade_maps(tmp_path / 'set', 'training')[0].shape == (size, size)


def _arguments(out: Path, **changes: int) -> list[str]:
    values = {**TINY.record()['arguments'], **changes}
    options = [f'--{k.replace("_", "-")}={v}' for k, v in values.items()]
    return [str(out), *options]


def _fails(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        tool.main(argv)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_command_line_writes_and_then_leaves_alone(tmp_path, capsys):
    out = tmp_path / 'set'
    out.mkdir()
    assert tool.main(_arguments(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['sample data: 14/14 images', f'{out}: written']
    assert json.loads((out / 'sample_data.json').read_text()) == dict(
        tool='make_sample_data.py', version=1,
        arguments=dict(seed=5, image_size=48, num_train=4, num_val=2,
                       num_cls_train=5, num_cls_val=3))
    times = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert tool.main(_arguments(out)) == 0
    assert capsys.readouterr().out == f'{out}: already there\n'
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert [p.name for p in tmp_path.iterdir()] == ['set']


@pytest.mark.parametrize('name, value, least', [
    ('seed', -1, 0), ('image_size', 31, 32), ('num_train', 0, 1),
    ('num_val', 0, 1), ('num_cls_train', -3, 1), ('num_cls_val', 0, 1)
])
def test_values_out_of_range(tmp_path, capsys, name, value, least):
    message = _fails(capsys, _arguments(tmp_path / 'x', **{name: value}))
    assert f'{name} is {value}; it must be at least {least}' in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('overwrite', [[], ['--overwrite']],
                         ids=['plain', 'overwrite'])
@pytest.mark.parametrize('marker', [None, '{', '[]', '{"tool": "other"}'])
def test_a_folder_of_others_is_never_touched(tmp_path, capsys, marker,
                                             overwrite):
    (tmp_path / 'notes.txt').write_text('mine')
    if marker is not None:
        (tmp_path / 'sample_data.json').write_text(marker)
    before = _contents(tmp_path)
    message = _fails(capsys, _arguments(tmp_path) + overwrite)
    assert str(tmp_path) in message and 'name another folder' in message
    assert _contents(tmp_path) == before


def test_files_in_the_way(tmp_path, capsys):
    file = tmp_path / 'file'
    file.write_text('mine')
    assert 'not a folder' in _fails(capsys, _arguments(file))
    message = _fails(capsys, _arguments(file / 'deeper' / 'set'))
    assert f'cannot make the folder {file / "deeper"}: ' in message
    assert 'mount point' in _fails(capsys, _arguments(Path('/')))
    assert _contents(tmp_path) == {'file': b'mine'}


def test_no_permission(tmp_path, capsys, monkeypatch):
    # Tests may run as root, to whom everything is permitted.
    monkeypatch.setattr(tool.os, 'access', lambda path, mode: False)
    message = _fails(capsys, _arguments(tmp_path / 'set'))
    assert f'no permission to write in {tmp_path}' in message
    assert list(tmp_path.iterdir()) == []


def test_another_set_needs_overwrite(tmp_path, capsys):
    out = tmp_path / 'set'
    tool.main(_arguments(out))
    before = _contents(out)
    message = _fails(capsys, _arguments(out, seed=6))
    assert "'seed': 5" in message and "'seed': 6" in message
    assert '--overwrite' in message
    assert _contents(out) == before
    assert tool.main([*_arguments(out, seed=6, num_val=1),
                      '--overwrite']) == 0
    after = _contents(out)
    assert len(after) == len(before) - 3
    assert json.loads(after['sample_data.json'])['arguments']['seed'] == 6
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_overwrite_keeps_files_of_others(tmp_path, capsys):
    out = tmp_path / 'set'
    tool.main(_arguments(out))
    (out / 'my_model.pth').write_text('mine')
    before = _contents(out)
    message = _fails(capsys, [*_arguments(out), '--overwrite'])
    assert 'my_model.pth' in message
    assert _contents(out) == before


def test_a_damaged_set_is_not_taken_for_whole(tmp_path, capsys):
    out = tmp_path / 'set'
    tool.main(_arguments(out))
    whole = _contents(out)
    (out / 'ade/annotations/validation/ADE_val_00000001.png').unlink()
    message = _fails(capsys, _arguments(out))
    assert 'finds 1 files and not 2' in message and '--overwrite' in message
    assert tool.main([*_arguments(out), '--overwrite']) == 0
    assert _contents(out) == whole


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
@pytest.mark.parametrize('earlier', [False, True], ids=['new', 'replace'])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error,
                                           earlier):
    out = tmp_path / 'set'
    if earlier:
        tool.make_sample_data(out, TINY)
    before = _contents(tmp_path)

    def fail(*_: object) -> None:
        # Late: COCO and ADE20K are written by then.
        assert any(tmp_path.glob('.set.*/new/ade/images/validation/*'))
        raise error('stop')

    monkeypatch.setattr(tool.ImageNetWriter, 'add', fail)
    with pytest.raises(error, match='stop'):
        tool.make_sample_data(out, TINY, overwrite=True)
    assert _contents(tmp_path) == before
    assert out.exists() == earlier
    assert len(list(tmp_path.iterdir())) == earlier


def test_the_earlier_set_returns_if_the_new_one_cannot_take_its_place(
        tmp_path, monkeypatch):
    out = tmp_path / 'set'
    tool.make_sample_data(out, TINY)
    before = _contents(tmp_path)
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.name == 'new':
            raise PermissionError('stop')
        return rename(path, target)

    monkeypatch.setattr(Path, 'rename', fail_for_new)
    with pytest.raises(PermissionError, match='stop'):
        tool.make_sample_data(out, TINY, overwrite=True)
    assert _contents(tmp_path) == before
