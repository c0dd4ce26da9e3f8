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


@case('mmdet', 'auto-scale-lr', 'base_batch_size=0')
def batch_of_nothing(data):
    data.cfg.auto_scale_lr.base_batch_size = 0
