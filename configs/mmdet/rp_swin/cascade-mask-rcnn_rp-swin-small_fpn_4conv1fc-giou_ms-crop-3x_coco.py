_base_ = [
    './cascade-mask-rcnn_rp-swin-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
]

model = dict(backbone=dict(arch='small'))
