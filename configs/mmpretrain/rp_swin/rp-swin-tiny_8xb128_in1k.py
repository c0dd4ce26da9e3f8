_base_ = [
    '../_base_/models/rp_classifier.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        type='mmrpa.RPSwin',
        arch='tiny',
        out_indices=(3, ),
        drop_path_rate=0.2),
    head=dict(in_channels=768))
