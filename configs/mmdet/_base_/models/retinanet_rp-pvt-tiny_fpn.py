_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmrpa.RPPVT',
        arch='tiny',
        # The host's neck starts at stride 8. A stride-4 map that nobody reads
        # would leave its norm without gradient, which stops DDP.
        out_indices=(1, 2, 3),
        drop_path_rate=0.1),
    neck=dict(in_channels=[128, 320, 512], start_level=0))
