_base_ = './rp-pvt-tiny_fpn_4xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(arch='large', drop_path_rate=0.3))
