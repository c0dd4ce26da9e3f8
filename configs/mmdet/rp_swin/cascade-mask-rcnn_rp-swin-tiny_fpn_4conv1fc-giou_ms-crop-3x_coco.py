_base_ = [
    '../_base_/models/cascade-mask-rcnn_rp-swin-tiny_fpn_4conv1fc-giou.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/schedule_3x.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]
