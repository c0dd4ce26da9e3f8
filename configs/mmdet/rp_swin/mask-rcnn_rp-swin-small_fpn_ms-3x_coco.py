_base_ = './mask-rcnn_rp-swin-tiny_fpn_ms-3x_coco.py'

model = dict(backbone=dict(arch='small'))
