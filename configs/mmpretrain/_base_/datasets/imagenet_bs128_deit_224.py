# The host's file has DeiT's pipeline: bicubic random crops, RandAugment
# m9-mstd0.5-inc1, random erasing 0.25. Only the batch differs.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
