"""What is judged is what the hosts read, and as they read it."""

import json

import mmcv
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmpretrain.datasets import CustomDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

from mmrpa.data_checks import check_data
from mmrpa.data_checks.context import Options
from mmrpa.data_checks.images import read_image, read_labels
from mmrpa.data_checks.loaders import Decoder

CLASSES = ('a', 'b')


# ---- forms of COCO files: as mmdet loads them and pycocotools evaluates ----


def coco_file(path) -> dict:
    """Three images of 48 x 48, with a box each; the files are written."""
    for number in (1, 2, 10):
        Image.new('RGB', (48, 48)).save(path / f'{number}.jpg')
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=48, height=48)
                for i in (1, 2, 10)],
        annotations=[dict(id=n, image_id=i, category_id=n % 2, iscrowd=0,
                          bbox=[4, 4, 20, 20], area=400)
                     for n, i in enumerate((1, 2, 10), 1)],
        categories=[dict(id=0, name='a'), dict(id=1, name='b')])


def coco_config(path, content: dict, split: str, **arguments) -> Config:
    file = path / 'file.json'
    file.write_text(json.dumps(content))
    dataset = dict(
        type='CocoDataset', ann_file=str(file), metainfo=dict(classes=CLASSES),
        data_prefix=dict(img=str(path)),
        pipeline=[dict(type='LoadImageFromFile'),
                  dict(type='LoadAnnotations', with_bbox=True)], **arguments)
    return Config(dict(
        default_scope='mmdet',
        val_evaluator=dict(type='CocoMetric', ann_file=str(file)),
        **{f'{split}_dataloader': dict(dataset=dataset)}))


def build(cls, cfg, split: str = 'train'):
    arguments = dict(cfg[f'{split}_dataloader'].dataset, pipeline=[])
    arguments.pop('type')
    return cls(**arguments)


def evaluate(cfg) -> float:
    """The AP of boxes that are all right."""
    dataset = build(CocoDataset, cfg, 'val')
    metric = CocoMetric(cfg.val_evaluator.ann_file, metric='bbox')
    metric.dataset_meta = dataset.metainfo
    for info in (dataset.get_data_info(i) for i in range(len(dataset))):
        boxes = [instance['bbox'] for instance in info['instances']]
        numbers = [instance['bbox_label'] for instance in info['instances']]
        metric.process({}, [dict(
            img_id=info['img_id'], ori_shape=(48, 48), pred_instances=dict(
                bboxes=torch.tensor(boxes).reshape(-1, 4).float(),
                scores=torch.ones(len(boxes)),
                labels=torch.tensor(numbers)))])
    return metric.evaluate(size=len(dataset))['coco/bbox_mAP']


def change(key: str, function):
    """A function that changes a value wherever it is."""

    def apply(content):
        for entries, own in (('images', 'image_id'),
                             ('categories', 'category_id'),
                             ('annotations', 'id')):
            for entry in content[entries]:
                if own == key:
                    entry['id'] = function(entry['id'])
                if entries == 'annotations' and key in entry and key != 'id':
                    entry[key] = function(entry[key])

    return apply


def no_flags(content):
    for entry in content['annotations']:
        del entry['iscrowd']


def ignored_without_box(content):
    content['annotations'].append(
        dict(id=9, image_id=1, category_id=1, ignore=1, iscrowd=0))


FORMS = dict(
    image_ids_as_text=change('image_id', lambda i: f'img{i}'),
    image_ids_as_floats=change('image_id', float),
    category_ids_as_text=change('category_id', str),
    annotation_ids_as_text=change('id', lambda i: f'ann{i}'),
    annotation_ids_as_floats=change('id', float),
    flags_of_null=change('iscrowd', lambda i: None),
    flags_as_booleans=change('iscrowd', bool),
    no_flags=no_flags,
    ignored_without_box=ignored_without_box)


@pytest.mark.parametrize('form', FORMS)
def test_forms_of_coco_files(form, tmp_path):
    content = coco_file(tmp_path)
    FORMS[form](content)
    # To train on, all of them will do.
    cfg = coco_config(tmp_path, content, 'train')
    dataset = build(CocoDataset, cfg)
    assert [len(dataset.get_data_info(i)['instances'])
            for i in range(len(dataset))] == [1, 1, 1]
    assert check_data(cfg, ('train', )).findings.problems == []
    # A metric may stop at them.
    cfg = coco_config(tmp_path, content, 'val', test_mode=True)
    try:
        works = evaluate(cfg) == 1
    except (KeyError, TypeError, ValueError):
        works = False
    found = check_data(cfg, ('val', )).findings.problems
    assert [group.code for group in found] == (
        [] if works else ['annotation-entry'])
    assert works == (form not in ('annotation_ids_as_text', 'flags_of_null',
                                  'no_flags', 'ignored_without_box'))
    # One that only writes results, or reads another file, does not.
    cfg.val_evaluator.format_only = True
    assert check_data(cfg, ('val', )).findings.problems == []


@pytest.mark.parametrize('arguments', [
    dict(),
    dict(filter_cfg=dict(filter_empty_gt=True)),
    dict(filter_cfg=dict(min_size=40)),
    dict(filter_cfg=dict(filter_empty_gt=True, min_size=40)),
    dict(filter_cfg=dict(filter_empty_gt=True, min_size=40), test_mode=True),
    dict(filter_cfg=dict(filter_empty_gt=True),
         metainfo=dict(classes=('a', ))),
    dict(indices=2), dict(indices=-1), dict(indices=[3, 0]),
    dict(indices=2, filter_cfg=dict(filter_empty_gt=True)),
])
def test_only_images_that_mmdet_keeps_are_read(arguments, tmp_path):
    content = coco_file(tmp_path)
    # Without annotations, small, of a crowd, with an ignored box only.
    for number in (20, 30, 40, 50):
        content['images'].append(dict(
            id=number, file_name=f'{number}.jpg', width=48,
            height=30 if number == 30 else 48))
    for number, image_id, more in ((20, 30, dict()), (30, 40, dict(iscrowd=1)),
                                   (40, 50, dict(ignore=1))):
        content['annotations'].append(dict(
            content['annotations'][0], id=number, image_id=image_id, **more))
    cfg = coco_config(tmp_path, content, 'train')
    cfg.train_dataloader.dataset.update(arguments)
    dataset = build(CocoDataset, cfg)
    kept = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    for path in tmp_path.glob('*.jpg'):
        path.unlink()
    found, = check_data(cfg, ('train', ), allow_subset=True).findings.problems
    assert (found.code, found.count) == ('missing-image', len(kept))
    assert [example.split(' (image')[0] for example in found.examples] == (
        kept[:5])


def test_objects_by_runs_are_ignored_where_polygons_are_kept(tmp_path):
    content = coco_file(tmp_path)
    rle = dict(size=[48, 48], counts=[100, 48 * 48 - 100])
    masks = ([[4, 4, 24, 4, 24, 24]], rle, rle)
    for entry, mask in zip(content['annotations'], masks, strict=True):
        entry['segmentation'] = mask
    content['annotations'][2]['iscrowd'] = 1  # is ignored in any case
    for poly2mask in (True, False):
        cfg = coco_config(tmp_path, content, 'train')
        step = dict(type='mmdet.LoadAnnotations', with_mask=True,
                    with_bbox=True, poly2mask=poly2mask)
        cfg.train_dataloader.dataset.pipeline[1] = step
        arguments = dict(cfg.train_dataloader.dataset)
        arguments.pop('type')
        dataset = CocoDataset(**arguments)
        ignored = [dataset[i]['gt_ignore_flags'].tolist() for i in range(3)]
        assert ignored == [[False], [not poly2mask], [True]]
        problems = check_data(cfg, ('train', )).findings.problems
        assert [(group.code, group.examples) for group in problems] == (
            [] if poly2mask else
            [('mask-ignored', ["annotation 2 (image 2, '2.jpg')"])])


# ---- other hosts ----


@pytest.mark.parametrize('indices', [1, -2, [2, 0], 0])
@pytest.mark.parametrize('quick', [False, True])
def test_indices_of_the_other_hosts(indices, quick, tmp_path):
    names = ['a', 'a-b', 'z/a', 'b']
    for folder in ('x', 'y'):
        for name in names:
            path = tmp_path / folder / f'{name}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    sets = [
        ('mmseg', BaseSegDataset, dict(
            data_prefix=dict(img_path=str(tmp_path), seg_map_path=None))),
        ('mmpretrain', CustomDataset, dict(
            data_prefix=str(tmp_path), metainfo=dict(classes=('x', 'y')))),
    ]
    options = Options(max_images=4, quick=quick)
    for host, cls, arguments in sets:
        cfg = Config(dict(default_scope=host, train_dataloader=dict(
            dataset=dict(type=cls.__name__, indices=indices,
                         pipeline=[dict(type='LoadImageFromFile')],
                         **arguments))))
        found, = check_data(cfg, ('train', ), options).findings.problems
        if indices == 0:
            assert found.code == 'no-images'
            with pytest.raises(ValueError):
                build(cls, cfg)
            continue
        dataset = build(cls, cfg)
        assert found.code == 'empty-file'
        assert found.examples == [
            f'{dataset.get_data_info(i)["img_path"]}: 0 bytes'
            for i in range(len(dataset))]


def test_images_that_ignore_empty_passes_over(tmp_path):
    """Where mmengine takes another image, that is a note; else a problem."""
    good, bad = tmp_path / 'good.jpg', tmp_path / 'bad.jpg'
    Image.effect_noise((40, 40), 50).convert('RGB').save(good)
    whole = good.read_bytes()
    (tmp_path / 'list.txt').write_text('bad.jpg 0\ngood.jpg 0\n')
    contents = dict(empty=b'', text=b'<html>404 Not Found</html>',
                    cut=whole[:len(whole) // 2], gone=None)
    seen = set()
    for backend in ('cv2', 'pillow'):
        for name, content in contents.items():
            bad.unlink(missing_ok=True)
            if content is not None:
                bad.write_bytes(content)
            arguments = dict(
                data_root=str(tmp_path), ann_file='list.txt',
                metainfo=dict(classes=('x', )), pipeline=[
                    dict(type='LoadImageFromFile', ignore_empty=True,
                         imdecode_backend=backend)])
            try:
                taken = CustomDataset(**arguments)[0]
                passed = True
                assert taken['img_path'] == str(good)
            except AssertionError as error:  # of the loader
                assert 'failed to load image' in str(error)
                passed = False
            cfg = Config(dict(
                default_scope='mmpretrain', train_dataloader=dict(
                    dataset=dict(type='CustomDataset', **arguments))))
            findings = check_data(cfg, ('train', )).findings
            assert bool(findings.problems) != passed, (backend, name)
            assert ([note[0] for note in findings.notes] == ['skipped-file']
                    ) == passed
            seen.add(passed)
    assert seen == {True, False}


# ---- files of images ----


def formats() -> list[str]:
    Image.init()
    # The first ones are no formats to read; SPIDER's writer takes the suffix
    # of the file for its own from then on.
    return sorted(set(Image.SAVE) - {'PDF', 'PALM', 'WMF', 'EPS', 'SPIDER'})


def test_formats_of_images(tmp_path):
    """Each that Pillow writes is found to be readable if it is."""
    path = str(tmp_path / 'x.jpg')
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    seen = set()
    for kind in formats():
        for mode in ('RGB', 'L', 'P', '1', 'CMYK', 'RGBA', 'F', 'I'):
            try:
                Image.fromarray(pixels).convert(mode).save(path, format=kind)
            except (OSError, KeyError, ValueError):
                continue  # Pillow has no such kind
            for backend in ('cv2', 'pillow'):
                try:
                    loaded = mmcv.imread(path, backend=backend)
                except (OSError, ValueError):
                    loaded = None
                facts = read_image(path, Decoder(backend, 'color'))
                assert (facts.code == '') == (loaded is not None), (
                    kind, mode, backend)
                if loaded is not None:
                    assert facts.size == loaded.shape[1::-1]
                seen.add((backend, facts.code))
    assert ('cv2', '') in seen and ('cv2', 'not-an-image') in seen


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_images_turned_by_exif(kind, backend, tmp_path):
    """Some loaders follow it, some do not."""
    path = str(tmp_path / 'x')
    sizes = set()
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new('RGB', (30, 20)).save(path, format=kind, exif=exif)
        for flag in ('color', 'grayscale', 'unchanged',
                     'color_ignore_orientation'):
            size = read_image(path, Decoder(backend, flag)).size
            assert size == mmcv.imread(
                path, flag=flag, backend=backend).shape[1::-1]
            sizes.add(size)
    assert (30, 20) in sizes


def test_label_maps_of_a_bit_a_pixel(tmp_path):
    """White is 1 to Pillow and 255 to OpenCV."""
    path = str(tmp_path / 'x.png')
    Image.fromarray(np.arange(30).reshape(5, 6) > 9).save(path)
    for backend, white in (('cv2', 255), ('pillow', 1)):
        loaded = mmcv.imread(path, flag='unchanged', backend=backend)
        assert set(np.unique(loaded.astype(np.uint8))) == {0, white}
        assert read_labels(path, Decoder(backend, 'unchanged')).counts == {
            0: 10, white: 20}
