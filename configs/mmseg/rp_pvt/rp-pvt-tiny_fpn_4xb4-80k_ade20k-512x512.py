_base_ = [
    '../_base_/models/fpn.py', '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_80k.py',
    '../_base_/optimizers/adamw.py', '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(type='mmrpa.RPPVT', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]))

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
train_dataloader = dict(batch_size=4)
