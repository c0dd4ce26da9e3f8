_base_ = './mask-rcnn_rp-pvt-tiny_fpn_1x_coco.py'

model = dict(backbone=dict(arch='small'))
