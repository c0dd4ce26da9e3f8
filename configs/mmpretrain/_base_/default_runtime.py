# mmpretrain's own, with checkpoints that are whole and a resume that is exact; see
# docs/resuming.md.
_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(
    checkpoint=dict(type='mmrpa.SafeCheckpointHook'),
    resume=dict(type='mmrpa.ExactResumeHook'))
