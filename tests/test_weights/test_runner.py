"""Checkpoints as mmengine's Runner writes them, and an import without it."""

import subprocess
import sys

import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader, TensorDataset
from zoo import build

from mmrpa.weights import read_checkpoint


class Model(BaseModel):
    """A backbone and a loss."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = build('swin', **options)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.backbone(inputs)[-1].square().mean())


def test_a_checkpoint_of_a_run_is_read_and_loaded(tmp_path):
    """With its message hub, optimiser and averaged weights."""
    ema = EMAHook(momentum=0.5)
    runner = Runner(
        Model(), work_dir=str(tmp_path),
        train_dataloader=DataLoader(
            TensorDataset(torch.randn(4, 3, 32, 32)), batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.5),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
        custom_hooks=[ema], experiment_name='weights_of_a_run')
    runner.train()
    path = str(tmp_path / 'epoch_1.pth')
    content = torch.load(path, weights_only=False)
    assert {'message_hub', 'optimizer', 'ema_state_dict'} <= set(content)
    averaged = ema.ema_model.module.state_dict()
    checkpoint = read_checkpoint(path)
    assert checkpoint.key == 'state_dict'
    assert checkpoint.state_dict.keys() == averaged.keys()
    for name, value in averaged.items():
        assert torch.equal(checkpoint.state_dict[name], value), name
    init_cfg = dict(type='Pretrained', checkpoint=path)
    model = build('swin', init_cfg=init_cfg)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[f'backbone.{name}']), name


def test_torch_alone_is_enough():
    code = ('import sys; sys.modules.update(mmengine=None, mmcv=None, '
            'safetensors=None); import mmrpa.weights; '
            'print(mmrpa.weights.convert.__name__)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True)
    assert done.stdout == 'convert\n', done.stderr
