_base_ = [
    '../_base_/models/mask-rcnn_rp-cswin-tiny_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/schedule_3x.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]
