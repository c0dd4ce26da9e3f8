_base_ = [
    '../_base_/models/retinanet_rp-pvt-tiny_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]
