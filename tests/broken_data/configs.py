"""Configs that do not fit their data."""

from .registry import case


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


@case('mmdet', 'dataset-arguments', "min_size of filter_cfg is '32'")
def least_size_as_text(data):
    data.train.filter_cfg = dict(min_size='32')


@case('mmdet', 'dataset-arguments', 'filter_cfg is True, no dict')
def filter_that_is_no_dict(data):
    data.train.filter_cfg = True


@case('mmseg', 'dataset-arguments', 'indices has 12, there are 12 images')
def index_beyond_the_images(data):
    data.train.indices = [0, 11, 12]


@case('mmdet', 'auto-scale-lr', 'base_batch_size=0')
def batch_of_nothing(data):
    data.cfg.auto_scale_lr.base_batch_size = 0
