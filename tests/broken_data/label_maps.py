"""Broken label maps, and what a config makes of them."""

import shutil
from collections.abc import Callable

import numpy as np
from PIL import Image

from .registry import case


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


@case('mmseg', 'label-map-rgb', '.png: P, read by OpenCV as colours')
def palette_that_opencv_applies(data):
    image = Image.open(first_map(data))
    image.putpalette([200, 10, 10, 10, 200, 10] * 3)
    image.save(first_map(data))
    data.train.pipeline[1].imdecode_backend = 'cv2'


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


@case('mmseg', 'label-range', '[0] become 255 when loaded; not ignored by '
      'model.auxiliary_head.1 (ignore_index=20)')
def label_that_one_head_of_three_does_not_ignore(data):
    head = dict(type='FCNHead', num_classes=6)
    data.cfg.model.auxiliary_head = [head, dict(head, ignore_index=20)]


@case('mmseg', 'label-range', 'not ignored by val_evaluator (ignore_index=20)')
def label_that_the_metric_does_not_ignore(data):
    data.cfg.val_evaluator.ignore_index = 20


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
