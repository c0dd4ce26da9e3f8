"""Notes: what is odd and yet no problem, and odd data that are right."""

import shutil

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from mmrpa.data_checks import check_data
from mmrpa.data_checks.context import Options
from mmrpa.data_checks.findings import NOTES

CASES = []


def case(host: str, code: str, *texts: str):
    """Register a function that gives one note with these texts."""

    def register(function):
        CASES.append(pytest.param(host, code, texts, function,
                                  id=f'{code}-{function.__name__}'))
        return function

    return register


def first_annotation(data):
    return data.coco['annotations'][0]


def strip_first_image(data) -> list[dict]:
    """Take the annotations of the first image away."""
    number = data.coco['images'][0]['id']
    own = [a for a in data.coco['annotations'] if a['image_id'] == number]
    data.coco['annotations'] = [
        a for a in data.coco['annotations'] if a['image_id'] != number
    ]
    return own


@case('mmdet', 'no-annotations', '1 of 12 images', 'first is image 1;',
      'left out (filter_empty_gt=True)')
def image_without_objects(data):
    strip_first_image(data)


@case('mmdet', 'no-annotations', 'kept, as images without objects')
def image_without_objects_kept(data):
    strip_first_image(data)
    data.train.filter_cfg.filter_empty_gt = False


@case('mmdet', 'no-annotations', 'left out (filter_empty_gt=True)')
def lost_image_that_is_left_out(data):
    strip_first_image(data)
    data.files('train2017/*.jpg')[0].unlink()


@case('mmdet', 'filtered-image', '1 images', 'smaller than min_size=32',
      'first is image 1')
def small_image(data):
    data.train.filter_cfg = dict(min_size=32)
    data.coco['images'][0]['height'] = 31
    strip_first_image(data)
    data.coco['annotations'].append(
        dict(data.coco['annotations'][0], id=999, image_id=1,
             bbox=[1, 1, 9, 9]))


@case('mmdet', 'filtered-image', '1 images', 'of other classes only',
      'first is image 1')
def image_of_another_class(data):
    entry = dict(strip_first_image(data)[0], category_id=99)
    data.coco['annotations'].append(entry)
    data.coco['categories'].append(dict(id=99, name='cat'))


@case('mmdet', 'crowd-only', '1 images', 'first is image 1;',
      'in spite of filter_empty_gt=True')
def image_of_a_crowd(data):
    entry = strip_first_image(data)[0]
    entry.update(iscrowd=1, segmentation=dict(
        size=[48, 48], counts=[100, 48 * 48 - 100]))
    data.coco['annotations'].append(entry)


@case('mmdet', 'box-tiny', '1 boxes')
def box_of_half_a_pixel(data):
    first_annotation(data)['bbox'] = [4, 4, 0.5, 9]


@case('mmdet', 'box-tiny', '1 boxes')
def box_of_no_height_that_coco_has(data):
    entry = strip_first_image(data)[0]
    data.coco['images'][0]['id'] = 200365
    data.coco['annotations'].append(dict(
        entry, id=918, image_id=200365, bbox=[29.65, 38.33, 1.03, 0.0],
        area=0.0))


@case('mmdet', 'class-without-samples', "1 of 5 classes have no boxes: 'star'")
def no_star(data):
    data.coco['annotations'] = [
        a for a in data.coco['annotations'] if a['category_id'] != 8
    ]


@case('mmdet', 'duplicate-file', "such as '000000000001.jpg'")
def image_listed_twice(data):
    data.coco['images'].append(dict(data.coco['images'][0], id=999))
    data.coco['annotations'].append(
        dict(first_annotation(data), id=999, image_id=999))


@case('mmdet', 'unchecked', 'label maps that with_seg loads')
def label_maps_beside_the_boxes(data):
    data.train.data_prefix.seg = 'annotations'
    data.train.pipeline[1].with_seg = True


@case('mmdet', 'unchecked', "type 'CocoPanopticDataset'")
def panoptic_dataset(data):
    things = data.train.metainfo.classes
    data.train.type = 'CocoPanopticDataset'
    data.train.metainfo = dict(classes=(*things, 'grass'),
                               thing_classes=things, stuff_classes=('grass', ))
    data.coco['categories'].append(dict(id=99, name='grass'))
    data.coco['annotations'] = [dict(image_id=1, file_name='1.png',
                                     segments_info=[])]


@case('mmdet', 'unchecked', "type 'LVISV1Dataset'")
def dataset_of_another_type(data):
    data.train.type = 'LVISV1Dataset'


@case('mmseg', 'config', "(backend 'petrel')")
def images_on_a_server(data):
    data.train.backend_args = dict(backend='petrel')


@case('mmdet', 'batch', 'batch_size 4 x accumulative_counts 1 = 4',
      'the learning rate is for 16', 'would give lr 0.00025')
def batch_of_another_size(data):
    data.cfg.auto_scale_lr.base_batch_size = 16


@case('mmdet', 'batch', 'accumulative_counts 2 = 8',
      'would give lr 0.001, because mmengine does not count', 'for lr 0.002')
def accumulated_batch(data):
    data.cfg.optim_wrapper.accumulative_counts = 2


@case('mmseg', 'map-without-image', '1 label maps', 'ADE_train_00000001.png')
def image_taken_away(data):
    data.files('images/training/*.jpg')[0].unlink()


@case('mmpretrain', 'skipped-file', 'Thumbs.db')
def leftover_of_windows(data):
    (data.root / 'train/disc/Thumbs.db').write_bytes(b'x')


@case('mmpretrain', 'skipped-file', '2 images cannot be read', 'disc/',
      'ignore_empty=True takes others')
def images_that_others_replace(data):
    first, second, *_ = data.files('train/disc/*.jpg')
    first.write_bytes(b'')
    second.unlink()
    second.symlink_to('nowhere.jpg')
    data.train.pipeline[0].ignore_empty = True


@case('mmseg', 'padding', 'model.data_preprocessor.seg_pad_val=255 is the',
      'not ignored by model.decode_head (ignore_index=9). The loss stops')
def label_of_padding(data):
    rewrite_maps(data, lambda x: np.maximum(x, 1))  # 0 is ignored as 255
    data.cfg.model.decode_head.ignore_index = 9
    data.cfg.model.data_preprocessor = dict(
        data.cfg.model.data_preprocessor, seg_pad_val=255)


@pytest.mark.parametrize('host, code, texts, change', CASES)
def test_note(host, code, texts, change, make):
    data = make(host)
    change(data)
    data.save()
    report = check_data(data.cfg, allow_subset=True)
    assert report.findings.problems == []
    found = {note[0]: note for note in report.findings.notes}
    # The files of a server are not checked, either.
    assert set(found) - {code} <= {'unchecked'} if code == 'config' else (
        set(found) == {code})
    for text in texts:
        assert text in found[code][2]


def test_some_of_the_images(make):
    report = check_data(make('mmseg').cfg, options=Options(max_images=5))
    assert report.findings.problems == []
    assert [note[::2] for note in report.findings.notes] == [
        ('sampled', '5 of 12 images were read')] * 2


@pytest.mark.parametrize('black_and_white, number', [(True, 1), (False, 0)])
def test_black_and_white_in_part(black_and_white, number, make):
    """Five maps say little: a note. A third label says more: nothing."""
    data = make('mmseg')
    rewrite_maps(data, lambda x: np.where(x > 1, 255, 0 if black_and_white
                                          else x).astype(np.uint8))
    data.train.update(reduce_zero_label=False,
                      metainfo=dict(classes=('ground', 'shape'),
                                    palette=[[0, 0, 0], [9, 9, 9]]))
    data.cfg.model.decode_head.num_classes = 2
    report = check_data(data.cfg, ('train', ), Options(max_images=5))
    assert report.findings.problems == []
    assert sum('[0, 255] only' in text
               for _, _, text in report.findings.notes) == number


def test_every_wrong_map_is_counted(make):
    data = make('mmseg')
    rewrite_maps(data, lambda x: x + np.uint8(77))
    (data.root / 'list.txt').write_text('ADE_train_00000001\n' * 1100)
    data.train.ann_file = 'list.txt'
    group, = check_data(data.cfg, ('train', )).findings.problems
    assert (group.code, group.count) == ('label-range', 1100)
    assert len(group.examples) == 5


def test_every_note_is_tested():
    assert {param.values[1] for param in CASES} == set(NOTES) - {'sampled'}


# ---- odd, but right: no word about it ----


def box_over_the_edge_by_rounding(data):
    first_annotation(data)['bbox'] = [-0.5, 0, 48.9, 48]


def uncompressed_crowd_beside_objects(data):
    data.coco['annotations'].append(
        dict(first_annotation(data), id=999, iscrowd=1, segmentation=dict(
            size=[48, 48], counts=[100, 48 * 48 - 100])))


def polygons_and_crowds_where_polygons_are_kept(data):
    uncompressed_crowd_beside_objects(data)
    data.train.pipeline[1].poly2mask = False


def dataset_of_a_base_in_mmdet(data):
    data.train['_scope_'] = 'mmdet'


def load_no_masks(data):
    data.train.pipeline[1].with_mask = False


def odd_masks_that_nobody_loads(data):
    load_no_masks(data)
    masks = [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], 'x', [],
             dict(size=[40, 40], counts='~')]
    for entry, mask in zip(data.coco['annotations'], masks, strict=False):
        entry['segmentation'] = mask


def odd_annotations_to_be_ignored(data):
    data.coco['annotations'].append(
        dict(first_annotation(data), id=999, ignore=1, bbox=[20, 20, 90, 90],
             area=0, segmentation=[[1, 2, 3, 4]]))


def odd_annotations_of_a_class_left_out(data):
    entry = first_annotation(data)
    name = next(c['name'] for c in data.coco['categories']
                if c['id'] == entry['category_id'])
    data.train.metainfo.classes = tuple(
        c for c in data.train.metainfo.classes if c != name)
    for head in data.cfg.model.roi_head.values():
        if 'num_classes' in head:
            head.num_classes = 4
    entry.update(bbox=[20, 20, 90, 90], segmentation=[])
    data.train.filter_cfg.filter_empty_gt = False
    data.train_only()
    data.cfg.pop('val_evaluator')


def maps_with_a_palette(data):
    for path in data.files('annotations/*/*.png'):
        image = Image.open(path).convert('P')
        indices = Image.open(path)
        image.putdata(list(indices.getdata()))
        image.putpalette([200, 10, 10, 10, 200, 10] * 3)
        image.save(path)
        assert np.array_equal(Image.open(path), indices)


def rewrite_maps(data, function) -> None:
    for path in data.files('annotations/*/*.png'):
        Image.fromarray(function(np.asarray(Image.open(path)))).save(path)


def with_corner(pixels: np.ndarray, value: int, kind: type) -> np.ndarray:
    pixels = pixels.astype(kind)
    pixels[0, 0] = value
    return pixels


def ignored_label_of_head_and_metric(data):
    # Not with reduce_zero_label: that makes 255 of 0.
    rewrite_maps(data, lambda x: np.where(x == 0, 20, x - 1).astype(np.uint8))
    for split in ('train', 'val', 'test'):
        dataset = data.cfg[f'{split}_dataloader'].dataset
        dataset.reduce_zero_label = False
    data.cfg.model.decode_head.ignore_index = 20
    data.cfg.model.data_preprocessor = dict(
        data.cfg.model.data_preprocessor, seg_pad_val=20)
    data.cfg.val_evaluator.ignore_index = 20


def ignored_label_of_two_bytes(data):
    rewrite_maps(data, lambda x: with_corner(x, 65535, np.uint16))
    # What mmseg's loader makes of it is what it ignores.
    path = data.files('annotations/training/*.png')[0]
    loaded = dict(seg_map_path=str(path), reduce_zero_label=False,
                  seg_fields=[])
    LoadAnnotations().transform(loaded)
    pixels = np.asarray(Image.open(path))
    assert (pixels == 65535).any()
    assert np.array_equal(loaded['gt_seg_map'] == 255, pixels == 65535)


def unlabelled_set(data):
    shutil.rmtree(data.root / 'annotations/validation')
    for split in ('val', 'test'):
        dataset = data.cfg[f'{split}_dataloader'].dataset
        dataset.pipeline = [dataset.pipeline[0], dataset.pipeline[2]]
        dataset.data_prefix = dict(img_path='images/validation')


def names_that_are_not_the_folders(data):
    data.train.metainfo.classes = ('Kreuz', 'Kreis', 'Quadrat', 'Stern',
                                   'Dreieck')


def suffix_in_capitals(data):
    path = data.files('train/disc/*.jpg')[0]
    path.rename(path.with_suffix('.JPG'))


@pytest.mark.parametrize('host, change', [
    ('mmdet', box_over_the_edge_by_rounding),
    ('mmdet', uncompressed_crowd_beside_objects),
    ('mmdet', polygons_and_crowds_where_polygons_are_kept),
    ('mmdet', dataset_of_a_base_in_mmdet),
    ('mmdet', odd_masks_that_nobody_loads),
    ('mmdet', odd_annotations_to_be_ignored),
    ('mmdet', odd_annotations_of_a_class_left_out),
    ('mmseg', maps_with_a_palette),
    ('mmseg', ignored_label_of_head_and_metric),
    ('mmseg', ignored_label_of_two_bytes),
    ('mmseg', unlabelled_set),
    ('mmpretrain', names_that_are_not_the_folders),
    ('mmpretrain', suffix_in_capitals),
])
def test_odd_but_right(host, change, make):
    data = make(host)
    change(data)
    data.save()
    report = check_data(data.cfg, allow_subset=True)
    assert list(report.findings.lines()) == []


def test_classes_of_ade20k_chosen(make):
    """Labels are those of the type's 150 classes, whatever is chosen."""
    data = make('mmseg')
    data.train_only()
    data.train.update(type='ADE20KDataset', metainfo=dict(
        classes=('wall', 'sky')))
    data.cfg.model.decode_head.num_classes = 2
    assert check_data(data.cfg).findings.problems == []
    data.train.metainfo.classes = ('wall', 'heaven')
    group, = check_data(data.cfg).findings.problems
    assert group.code == 'dataset-arguments'


def test_a_test_without_labels(make):
    """As COCO's image_info_test-dev2017.json; mmdet loads it."""
    data = make('mmdet')
    del data.coco['annotations']
    data.save()
    test = data.cfg.test_dataloader.dataset
    test.update(ann_file=data.train.ann_file,
                data_prefix=data.train.data_prefix)
    data.cfg.pop('test_evaluator')
    arguments = dict(test, pipeline=[])
    assert arguments.pop('type') == 'CocoDataset'
    assert len(CocoDataset(**arguments)) == 12
    report = check_data(data.cfg, ('test', ))
    assert report.findings.problems == []
    (code, _, text), = report.findings.notes
    assert code == 'no-annotations' and text.startswith('12 of 12 images')
    assert {group.code for group in check_data(
        data.cfg, ('train', )).findings.problems} == {'annotation-file'}
