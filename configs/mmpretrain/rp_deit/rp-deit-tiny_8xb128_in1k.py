_base_ = [
    '../_base_/models/rp_classifier.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime.py'
]

model = dict(
    backbone=dict(
        type='mmrpa.RPDeiT',
        arch='tiny',
        img_size=224,
        out_indices=(-1, ),
        out_type='cls_token',
        drop_path_rate=0.1),
    # the CLS token is the feature already
    neck=None,
    head=dict(in_channels=192))
