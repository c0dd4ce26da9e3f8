"""Broken data sets: each is found, named, and nothing else is reported."""

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from png_header import header_only
from pycocotools import mask as pycoco

from mmrpa.data_checks import check_data
from mmrpa.data_checks.findings import NOTES, PROBLEMS

CASES = []


def case(host: str, code: str, holds: str = '') -> Callable:
    """Register a function that breaks a data set.

    Args:
        host (str): Whose data set it takes.
        code (str): The one kind of problem that must be found.
        holds (str): What the first example must name.
    """

    def register(function: Callable) -> Callable:
        CASES.append(pytest.param(host, code, holds, function,
                                  id=f'{code}-{function.__name__}'))
        return function

    return register


def first_image(data):
    return data.files('train2017/*.jpg')[0]


# ---- files of images ----


@case('mmdet', 'missing-image', '000000000001.jpg (image 1)')
def image_deleted(data):
    first_image(data).unlink()


@case('mmdet', 'empty-file', '000000000001.jpg')
def image_of_no_bytes(data):
    first_image(data).write_bytes(b'')


@case('mmdet', 'truncated-file', '000000000001.jpg')
def image_cut_short(data):
    content = first_image(data).read_bytes()
    first_image(data).write_bytes(content[:len(content) * 2 // 3])


@case('mmdet', 'not-an-image', '000000000001.jpg')
def text_with_the_name_of_an_image(data):
    first_image(data).write_text('<html>404 Not Found</html>')


@case('mmdet', 'not-an-image', '000000000001.jpg')
def folder_with_the_name_of_an_image(data):
    path = first_image(data)
    path.unlink()
    path.mkdir()


@case('mmdet', 'image-size', '48x48, annotated as 48x60')
def image_cut_after_annotation(data):
    data.coco['images'][0]['height'] = 60


@case('mmdet', 'image-size', '40x48, annotated as 48x40')
def image_turned_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: OpenCV and mmcv follow it
    Image.new('RGB', (48, 40)).save(first_image(data), exif=exif)
    data.coco['images'][0]['height'] = 40
    number = data.coco['images'][0]['id']
    data.coco['annotations'] = [
        a for a in data.coco['annotations'] if a['image_id'] != number
    ]


@case('mmdet', 'too-large', '000000000001.jpg')
def image_of_more_pixels_than_opencv_takes(data):
    header_only(first_image(data), 2**15 + 1, 2**15)


# ---- annotation files ----


@case('mmdet', 'annotation-file', 'not valid JSON')
def json_cut_short(data):
    data.coco = None
    data.json.write_text(data.json.read_text()[:-100])


@case('mmdet', 'annotation-file', 'not valid JSON')
def json_in_latin_1(data):
    data.coco = None
    data.json.write_bytes(b'{"images": "\xe9"}')


@case('mmdet', 'annotation-file', 'maximum recursion depth')
def json_nested_too_deep(data):
    data.coco = None
    data.json.write_text('[' * 100_000)


@case('mmdet', 'annotation-file', "no list 'categories'")
def json_is_a_list(data):
    data.coco = data.coco['annotations']


@case('mmdet', 'annotation-file', "no list 'images'")
def images_by_name(data):
    data.coco['images'] = {e['file_name']: e for e in data.coco['images']}


@case('mmdet', 'annotation-file', "2017.json: has no list 'images'")
def no_images_key(data):
    del data.coco['images']


@case('mmdet', 'no-images', "'images' is empty")
def no_images(data):
    data.coco.update(images=[], annotations=[])


@case('mmdet', 'image-entry', "width is '48'")
def width_as_text(data):
    data.coco['images'][0]['width'] = '48'


@case('mmdet', 'image-entry', "id is '1'")
def image_id_as_text(data):
    data.coco['images'][0]['id'] = '1'


@case('mmdet', 'image-entry', 'file_name is None')
def no_file_name(data):
    del data.coco['images'][0]['file_name']


@case('mmdet', 'unreadable-file', r'\ud800.jpg')
def half_a_character_in_a_name(data):
    data.coco['images'][0]['file_name'] = '\ud800.jpg'


@case('mmdet', 'annotation-entry', "bbox is ['1', '2', '3', '4']")
def box_as_text(data):
    data.coco['annotations'][0]['bbox'] = list('1234')


@case('mmdet', 'annotation-entry', 'bbox is [1, 2, 3]')
def box_of_three(data):
    data.coco['annotations'][0]['bbox'] = [1, 2, 3]


@case('mmdet', 'annotation-entry', 'area is None')
def no_area(data):
    del data.coco['annotations'][0]['area']


@case('mmdet', 'annotation-entry', '17 is no object')
def annotation_is_a_number(data):
    data.coco['annotations'].append(17)


@case('mmdet', 'annotation-entry', "['a', 'b', 'c', 'd', 'e', 'f']")
def polygon_as_text(data):
    data.coco['annotations'][0]['segmentation'] = [list('abcdef')]


@case('mmdet', 'duplicate-image-id', 'image 1: ')
def image_id_twice(data):
    number = data.coco['images'][1]['id']
    data.coco['images'][1]['id'] = 1
    for entry in data.coco['annotations']:
        if entry['image_id'] == number:
            entry['image_id'] = 1


@case('mmdet', 'duplicate-annotation-id', 'annotation 1 (image ')
def annotation_id_twice(data):
    data.coco['annotations'][1]['id'] = 1


@case('mmdet', 'duplicate-category', "id 3, name 'cross2'")
def category_id_twice(data):
    data.coco['categories'].append(dict(id=3, name='cross2'))
    data.train.metainfo.classes += ('cross2', )
    data.cfg.model.roi_head.bbox_head.num_classes = 6
    data.cfg.model.roi_head.mask_head.num_classes = 6
    data.train_only()


@case('mmdet', 'unknown-image', 'annotation 1 (image 999)')
def annotation_of_no_image(data):
    data.coco['annotations'][0]['image_id'] = 999


@case('mmdet', 'unknown-category', 'category 99')
def annotation_of_no_category(data):
    data.coco['annotations'][0]['category_id'] = 99


@case('mmdet', 'box-empty', 'bbox [1, 2, 0, 5]')
def box_without_width(data):
    data.coco['annotations'][0]['bbox'] = [1, 2, 0, 5]


@case('mmdet', 'box-empty', 'bbox [9, 9, -4, -4]')
def box_with_swapped_corners(data):
    data.coco['annotations'][0]['bbox'] = [9, 9, -4, -4]


@case('mmdet', 'box-outside', 'bbox [20, 20, 40, 40] in an image of 48x48')
def box_of_two_corners(data):
    data.coco['annotations'][0]['bbox'] = [20, 20, 40, 40]


@case('mmdet', 'box-outside', 'bbox [-9, 1, 20, 20]')
def box_left_of_the_image(data):
    data.coco['annotations'][0]['bbox'] = [-9, 1, 20, 20]


@case('mmdet', 'not-finite', 'nan')
def box_of_nan(data):
    data.coco['annotations'][0]['bbox'][2] = float('nan')


@case('mmdet', 'not-finite', 'inf')
def polygon_to_infinity(data):
    data.coco['annotations'][0]['segmentation'][0][0] = float('inf')


@case('mmdet', 'area-empty', 'area 0')
def no_extent(data):
    data.coco['annotations'][0]['area'] = 0


@case('mmdet', 'polygon-short', '2 points')
def polygon_of_two_points(data):
    data.coco['annotations'][0]['segmentation'] = [[1, 2, 3, 4]]


@case('mmdet', 'polygon-odd', '7 coordinates')
def polygon_with_an_odd_number(data):
    data.coco['annotations'][0]['segmentation'] = [[1, 2, 3, 4, 5, 6, 7]]


@case('mmdet', 'mask-missing', 'segmentation is []')
def no_mask(data):
    data.coco['annotations'][0]['segmentation'] = []


def crowd(size: int = 48) -> dict:
    rle = pycoco.encode(np.asfortranarray(np.eye(size, dtype=np.uint8)))
    return dict(size=rle['size'], counts=rle['counts'].decode())


@case('mmdet', 'rle-malformed', 'size is [40, 40], the image has [48, 48]')
def crowd_of_another_size(data):
    data.coco['annotations'][0].update(segmentation=crowd(40), iscrowd=1)


@case('mmdet', 'rle-malformed', 'the runs cover')
def crowd_cut_short(data):
    rle = crowd()
    rle['counts'] = rle['counts'][:9]
    data.coco['annotations'][0].update(segmentation=rle, iscrowd=1)


@case('mmdet', 'rle-malformed', 'a run is negative')
def crowd_with_a_negative_run(data):
    rle = dict(size=[48, 48], counts=[-5, 48 * 48 + 5])
    data.coco['annotations'][0].update(segmentation=rle, iscrowd=1)


@case('mmdet', 'rle-malformed', 'counts is neither')
def crowd_without_runs(data):
    data.coco['annotations'][0].update(
        segmentation=dict(size=[48, 48]), iscrowd=1)


# ---- classes, heads, paths ----


@case('mmdet', 'categories', "'crosss'")
def category_with_a_typo(data):
    data.coco['categories'][0]['name'] = 'crosss'


@case('mmdet', 'categories', 'in another order')
def categories_in_another_order(data):
    data.coco['categories'].reverse()


@case('mmdet', 'num-classes', 'mask_head.num_classes=80')
def head_of_coco(data):
    data.cfg.model.roi_head.mask_head.num_classes = 80


@case('mmdet', 'class-names', "'shape' is a string")
def class_without_a_comma(data):
    data.train.metainfo.classes = 'shape'


@case('mmdet', 'missing-path', 'train2018')
def folder_with_a_typo(data):
    data.train.data_prefix.img = 'train2018'


@case('mmdet', 'dataset-arguments', "unexpected keyword argument 'speed'")
def argument_with_a_typo(data):
    data.train.speed = 3


@case('mmdet', 'auto-scale-lr', 'base_batch_size=0')
def batch_of_nothing(data):
    data.cfg.auto_scale_lr.base_batch_size = 0


# ---- label maps ----


def labels(data) -> np.ndarray:
    return np.asarray(Image.open(first_map(data)))


def first_map(data):
    return data.files('annotations/training/*.png')[0]


def rewrite(data, function: Callable) -> None:
    for path in data.files('annotations/*/*.png'):
        Image.fromarray(function(np.asarray(Image.open(path)))).save(path)


@case('mmseg', 'missing-label-map', 'ADE_train_00000001.png')
def label_map_deleted(data):
    first_map(data).unlink()


@case('mmseg', 'truncated-file', 'ADE_train_00000001.png')
def label_map_cut_short(data):
    content = first_map(data).read_bytes()
    first_map(data).write_bytes(content[:len(content) // 2])


@case('mmseg', 'label-map-rgb', 'ADE_train_00000001.png: RGB')
def label_map_in_colours(data):
    Image.open(first_map(data)).convert('RGB').save(first_map(data))


@case('mmseg', 'label-map-lossy', 'ADE_train_00000001.png')
def label_map_as_jpeg(data):
    Image.open(first_map(data)).save(first_map(data), format='JPEG')


@case('mmseg', 'label-map-size', '40x48, its image 48x48')
def label_map_of_another_size(data):
    Image.fromarray(labels(data)[:, :40]).save(first_map(data))


@case('mmseg', 'label-range', '[77]; 6 classes')
def label_beyond_the_classes(data):
    changed = labels(data).copy()
    changed[3, 5] = 77
    Image.fromarray(changed).save(first_map(data))


@case('mmseg', 'label-range', '[300]')
def label_beyond_a_byte(data):
    changed = labels(data).astype(np.uint16)
    changed[3, 5] = 300  # 44 as a byte, as mmseg casts it
    Image.fromarray(changed).save(first_map(data))


@case('mmseg', 'label-range', '[nan]')
def label_map_of_floats_with_nan(data):
    changed = labels(data).astype(np.float32)
    changed[3, 5] = np.nan
    Image.fromarray(changed).save(first_map(data), format='TIFF')


@case('mmseg', 'label-range', 'ignore_index=20 of the dataset is nothing')
def label_that_only_the_dataset_ignores(data):
    changed = labels(data).copy()
    changed[3, 5] = 21  # 20 after the reduction
    Image.fromarray(changed).save(first_map(data))
    data.train.ignore_index = 20


@case('mmseg', 'label-map-binary', '12 label maps have the labels [0, 255]')
def masks_of_black_and_white(data):
    rewrite(data, lambda x: np.where(x > 1, 255, 0).astype(np.uint8))
    data.train.update(reduce_zero_label=False,
                      metainfo=dict(classes=('ground', 'shape'),
                                    palette=[[0, 0, 0], [9, 9, 9]]))
    data.cfg.model.decode_head.num_classes = 2
    data.train_only()


@case('mmseg', 'reduce-zero-label', 'the labels go to 6, and 0')
def zero_is_no_class_but_kept(data):
    data.train.reduce_zero_label = False
    data.train_only()


@case('mmseg', 'reduce-zero-label', 'the labels go to 6, without 0')
def labels_from_one_but_not_reduced(data):
    rewrite(data, lambda x: np.where(x == 0, 255, x).astype(np.uint8))
    data.train.reduce_zero_label = False
    data.train_only()


@case('mmseg', 'reduce-zero-label', "class 'background' gets the pixels of")
def labels_from_zero_but_reduced(data):
    rewrite(data, lambda x: x - np.uint8(1))  # 0 becomes 255
    data.train_only()


@case('mmseg', 'reduce-zero-label', 'True of the dataset and False of')
def reduction_in_the_pipeline_only(data):
    data.train.pipeline[1].reduce_zero_label = False


@case('mmseg', 'missing-image', 'ADE_train_00000001x.jpg')
def listed_and_not_there(data):
    (data.root / 'list.txt').write_text('ADE_train_00000002\n'
                                        'ADE_train_00000001x\n')
    data.train.ann_file = 'list.txt'
    map_of_it = data.root / 'annotations/training/ADE_train_00000001x.png'
    shutil.copy(first_map(data), map_of_it)


@case('mmseg', 'no-images', "no file ends in '.jpeg'")
def another_suffix(data):
    data.train.img_suffix = '.jpeg'


@case('mmseg', 'num-classes', 'decode_head.num_classes=150')
def head_of_ade(data):
    data.cfg.model.decode_head.num_classes = 150


# ---- folders of classes ----


def first_of_class(data):
    return data.files('train/cross/*.jpg')[0]


@case('mmpretrain', 'truncated-file', 'train_00000001.jpg')
def photo_cut_short(data):
    first_of_class(data).write_bytes(first_of_class(data).read_bytes()[:-80])


@case('mmpretrain', 'not-an-image', 'train_00000001.jpg')
def photo_that_is_an_archive(data):
    first_of_class(data).write_bytes(b'PK\x03\x04' * 50)


@case('mmpretrain', 'empty-class-folder', 'train/cross')
def class_without_images(data):
    for path in data.files('train/cross/*.jpg'):
        path.unlink()


@case('mmpretrain', 'hidden-folder', '.ipynb_checkpoints')
def leftovers_of_a_notebook(data):
    (data.root / 'train/.ipynb_checkpoints').mkdir()


@case('mmpretrain', 'class-folders', 'has 6 folders')
def one_folder_too_many(data):
    shutil.copytree(data.root / 'train/star', data.root / 'train/stern')


@case('mmpretrain', 'class-order', "class 0 is 'triangle'")
def classes_in_another_order(data):
    data.train.metainfo.classes = data.train.metainfo.classes[::-1]


@case('mmpretrain', 'class-order', "sorted folder 3 is 'stern'")
def folder_under_another_name(data):
    (data.root / 'train/star').rename(data.root / 'train/stern')


def use_list(data, *lines: str) -> None:
    (data.root / 'list.txt').write_text('\n'.join(lines) + '\n')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'list-line', "list.txt:2: 'cross/train_00000006.jpg'")
def line_without_a_label(data):
    use_list(data, 'cross/train_00000001.jpg 0', 'cross/train_00000006.jpg')


@case('mmpretrain', 'list-label', 'list.txt:2: label 5')
def labels_counted_from_one(data):
    use_list(data, 'cross/train_00000001.jpg 1',
             'triangle/train_00000005.jpg 5')


@case('mmpretrain', 'missing-image', 'cross/train_9.jpg')
def line_of_no_file(data):
    use_list(data, 'cross/train_00000001.jpg 0', 'cross/train_9.jpg 0')


@case('mmpretrain', 'no-images', 'list.txt: lists no image')
def list_of_nothing(data):
    (data.root / 'list.txt').write_text('')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'no-images', 'the images cannot be listed')
def list_in_latin_1(data):
    (data.root / 'list.txt').write_bytes(b'\xe9.jpg 0\n')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'num-classes', 'head.num_classes=1000')
def head_of_imagenet(data):
    data.cfg.model.head.num_classes = 1000


# ---- the tests ----


def codes(report) -> list[str]:
    return [group.code for group in report.findings.problems]


@pytest.mark.parametrize('host, code, holds, break_it', CASES)
def test_broken(host, code, holds, break_it, make):
    data = make(host)
    break_it(data)
    data.save()
    report = check_data(data.cfg)
    assert set(codes(report)) == {code}
    assert holds in report.findings.problems[0].examples[0]
    assert report.num_problems == sum(g.count
                                      for g in report.findings.problems)
    # It can be printed and written, whatever it holds.
    '\n'.join(report.findings.lines()).encode()
    json.dumps(report.record())


def test_every_kind_is_tested():
    assert len(CASES) >= 60
    assert {param.values[1] for param in CASES} == set(PROBLEMS)
    assert not set(PROBLEMS) & set(NOTES)


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
def test_clean(host, make):
    report = check_data(make(host).cfg, ('train', 'val', 'test'))
    assert report.findings.problems == []
    assert report.findings.notes == []
    assert sorted(report.histograms) == [
        'train_dataloader.dataset', 'val_dataloader.dataset']
