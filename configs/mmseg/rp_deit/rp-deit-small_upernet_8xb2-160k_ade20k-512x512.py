_base_ = [
    '../_base_/models/upernet.py', '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        type='mmrpa.RPDeiT',
        arch='small',
        img_size=512,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1),
    # four maps of stride 16 become strides 4, 8, 16 and 32
    neck=dict(
        type='Feature2Pyramid',
        embed_dim=384,
        rescales=[4, 2, 1, 0.5],
        norm_cfg=dict(type='SyncBN', requires_grad=True)),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384))
