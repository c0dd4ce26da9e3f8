_base_ = [
    '../_base_/models/rp_classifier.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        type='mmrpa.RPCSWin',
        arch='tiny',
        out_indices=(3, ),
        drop_path_rate=0.2),
    head=dict(in_channels=512))

# CSWin's own decay, 0.99984 a step
custom_hooks = [
    dict(type='EMAHook', momentum=1.6e-4, priority='ABOVE_NORMAL')
]
