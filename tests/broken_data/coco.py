"""Broken annotation files in COCO's format."""

import json

import numpy as np
from pycocotools import mask as pycoco

from .registry import case


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


@case('mmdet', 'no-images', "filter_cfg={'min_size': 64} leaves none of 12")
def images_that_are_all_too_small(data):
    data.train.filter_cfg = dict(min_size=64)


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


def change_validation(data, function) -> None:
    path = data.root / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    for entry in content['annotations']:
        function(entry)
    path.write_text(json.dumps(content))


@case('mmdet', 'annotation-entry', 'iscrowd is None, and CocoMetric needs it')
def validation_without_a_flag_for_crowds(data):
    change_validation(data, lambda entry: entry.pop('iscrowd'))


@case('mmdet', 'annotation-entry', "id is 'a1'")
def annotation_ids_as_text_in_a_validation(data):
    change_validation(data, lambda e: e.update(id=f'a{e["id"]}'))


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


@case('mmdet', 'mask-ignored', 'annotation 1 (image ')
def object_by_runs_where_polygons_are_kept(data):
    data.coco['annotations'][0]['segmentation'] = crowd()
    data.train.pipeline[1].poly2mask = False
