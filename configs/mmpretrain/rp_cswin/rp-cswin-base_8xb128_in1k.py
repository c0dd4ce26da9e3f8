_base_ = './rp-cswin-tiny_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    head=dict(in_channels=768))

# 0.99992 a step
custom_hooks = [
    dict(type='EMAHook', momentum=8e-5, priority='ABOVE_NORMAL')
]
