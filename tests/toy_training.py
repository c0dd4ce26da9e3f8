"""A training of one linear layer with validations whose results are given."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmrpa.hooks  # noqa: F401 (the configs below name its hooks)

_NUMBERS = count()
EVERY_EPOCH = dict(by_epoch=True, max_epochs=6)


class Numbers(Dataset):
    """Twelve inputs, which are four batches of three."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(inputs=torch.full((4, ), float(index)))


class Toy(BaseModel):
    """A linear layer, dropout that draws in training, and BN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
        out = self.norm(self.linear(inputs / 12))
        if mode == 'loss':
            return dict(loss=(nn.functional.dropout(out) - 1).square().mean())
        torch.rand(7)  # a validation may draw
        return [out.mean()]


class Given(BaseMetric):
    """The given accuracy for each four steps, whatever was predicted."""

    default_prefix = 'val'

    def __init__(self, record: 'Record', scores: Sequence[float]) -> None:
        super().__init__()
        self.record, self.scores = record, scores

    def process(self, data_batch: Any, data_samples: Sequence) -> None:
        self.results += [float(value) for value in data_samples]

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(acc=self.scores[self.record.step // 4 - 1])


class Killed(Exception):
    """Stands in for SIGKILL."""


class Record(Hook):
    """What a training did; it may be killed.

    Args:
        kill_after (int, optional): The number of a step.
        kill_in (int, optional): The number of a step, before the validation
            after it.
    """

    priority = 'LOWEST'

    def __init__(self, kill_after: int | None = None,
                 kill_in: int | None = None) -> None:
        self.kill_after, self.kill_in = kill_after, kill_in
        self.losses: dict[int, float] = {}
        self.lr: dict[int, float] = {}
        self.validated: list[int] = []  # after which steps
        self.predicted: list[float] = []

    def before_train_iter(self, runner, batch_idx: int,
                          data_batch: Any = None) -> None:
        assert runner.model.training

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        step = runner.iter + 1
        self.losses[step] = float(outputs['loss'].detach())
        self.lr[step] = runner.optim_wrapper.param_groups[0]['lr']
        if step == self.kill_after:
            raise Killed

    def before_val(self, runner) -> None:
        self.step = runner.iter
        if self.step == self.kill_in:
            raise Killed

    def after_val_iter(self, runner, batch_idx: int, data_batch: Any = None,
                       outputs: Any = None) -> None:
        assert not runner.model.training
        self.predicted.append(float(outputs[0]))

    def after_val_epoch(self, runner, metrics: Any = None) -> None:
        self.validated.append(runner.iter)


def toy(work_dir: Path, record: Record, scores: Sequence[float] = (0.5, ) * 9,
        *, loop: dict = EVERY_EPOCH, resume: bool = False,
        load_from: Path | None = None, optimizer: dict | None = None,
        schedules: list | None = None, hooks: tuple = (),
        checkpoint: dict | None = None, batch_size: int = 3,
        validate: bool = True, launcher: str = 'none', **settings) -> Runner:
    """A training in epochs of four steps.

    Args:
        loop (dict): ``train_cfg``.
        optimizer (dict, optional): ``optim_wrapper``; by default SGD.
        checkpoint (dict, optional): Arguments of SafeCheckpointHook.
        settings: More arguments of the Runner.
    """
    torch.manual_seed(0)
    model = Toy()
    loader = dict(
        batch_size=batch_size, num_workers=0, dataset=Numbers(),
        collate_fn=dict(type='default_collate'))
    by_epoch = loop.get('by_epoch', True)
    if validate:
        settings.update(
            val_dataloader=dict(
                loader, sampler=dict(type='DefaultSampler', shuffle=False)),
            val_cfg=dict(), val_evaluator=[Given(record, scores)])
    return Runner(
        model, work_dir=str(work_dir), train_cfg=loop,
        train_dataloader=dict(
            loader, sampler=dict(type='DefaultSampler' if by_epoch
                                 else 'InfiniteSampler', shuffle=True)),
        optim_wrapper=optimizer or sgd(),
        param_scheduler=schedules,
        default_hooks=dict(
            logger=None,
            checkpoint=dict(
                type='mmrpa.SafeCheckpointHook',
                **(checkpoint or dict(interval=1, by_epoch=by_epoch))),
            resume=dict(type='mmrpa.ExactResumeHook')),
        custom_hooks=[record, *hooks], resume=resume,
        load_from=load_from and str(load_from), launcher=launcher,
        randomness=dict(seed=3), log_level='WARNING',
        experiment_name=f'toy_{next(_NUMBERS)}', **settings)


def sgd(**arguments) -> dict:
    """``optim_wrapper``."""
    return dict(optimizer=dict(dict(type='SGD', lr=0.1), **arguments))
