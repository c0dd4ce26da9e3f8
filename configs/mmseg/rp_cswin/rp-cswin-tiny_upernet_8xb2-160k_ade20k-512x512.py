_base_ = [
    '../_base_/models/upernet.py', '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        type='mmrpa.RPCSWin', arch='tiny', drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
