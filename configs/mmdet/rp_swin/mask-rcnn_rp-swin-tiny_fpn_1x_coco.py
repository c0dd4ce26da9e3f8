_base_ = [
    '../_base_/models/mask-rcnn_rp-swin-tiny_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]
