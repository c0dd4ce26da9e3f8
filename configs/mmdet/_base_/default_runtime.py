# mmdet's own, with checkpoints that are whole, a resume that is exact and
# data that are looked at first; see docs/resuming.md and docs/check_data.md.
_base_ = 'mmdet::_base_/default_runtime.py'

default_hooks = dict(
    checkpoint=dict(type='mmrpa.SafeCheckpointHook'),
    resume=dict(type='mmrpa.ExactResumeHook'),
    data_check=dict(type='mmrpa.DataCheckHook'))
