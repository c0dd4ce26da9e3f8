_base_ = './mask-rcnn_rp-cswin-tiny_fpn_ms-3x_coco.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
