"""A small training with all kinds of randomness, to be interrupted."""

import random
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrpa.backbones import RPPVT

_NUMBERS = count()
NOISE = 0.5


class Images(BaseDataset):
    """Thirteen images that are augmented by three generators."""

    def load_data_list(self) -> list[dict]:
        images = np.random.RandomState(0).randn(13, 3, 32, 32)
        return [dict(img=image.astype(np.float32), number=number)
                for number, image in enumerate(images)]

    def prepare_data(self, idx: int) -> dict:
        image = self.get_data_info(idx)['img']
        if random.random() < 0.5:
            image = image[..., ::-1].copy()
        image = image + np.random.rand() * NOISE
        image = torch.from_numpy(image).float()
        return dict(inputs=image + torch.rand(()) * NOISE,
                    number=self.get_data_info(idx)['number'])


class Model(BaseModel):
    """A backbone with dropped paths, dropout and a loss that draws, too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RPPVT(
            arch=dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1),
                      num_heads=(1, 1, 2, 2), mlp_ratios=(1, 1, 1, 1)),
            num_representatives=4, img_size=32, drop_path_rate=0.3)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: list[Tensor], number: list[int],
                mode: str = 'tensor') -> dict[str, Tensor]:
        self.seen = number
        features = self.backbone(torch.stack(inputs))[-1].mean((2, 3))
        logits = self.head(self.dropout(features))
        labels = torch.tensor(number) % 3
        weight = np.random.rand() + random.random()
        return dict(
            loss=nn.functional.cross_entropy(logits, labels) * weight)


class Killed(Exception):
    """Stands in for SIGKILL."""


class Recorder(Hook):
    """Keep each step's loss and images; be killed after a step.

    Args:
        kill_after (int, optional): Number of steps.
    """

    priority = 'LOWEST'

    def __init__(self, kill_after: int | None = None) -> None:
        self.kill_after = kill_after
        self.losses: dict[int, float] = {}
        self.images: dict[int, list] = {}
        self.inner: dict[int, int] = {}
        self.lr: dict[int, float] = {}

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        step = runner.iter + 1
        assert step not in self.losses
        self.losses[step] = float(outputs['loss'].detach())
        self.images[step] = list(data_batch['number'])
        self.inner[step] = batch_idx
        self.lr[step] = runner.optim_wrapper.param_groups[0]['lr']
        if step == self.kill_after:
            raise Killed


def build(work_dir: Path, by: str, recorder: Recorder, *, workers: int = 0,
          resume: bool = False, every: int = 3, hook: bool = True,
          sampler: str | None = None, seed: int | None = 5,
          checkpoint: str = 'mmrpa.SafeCheckpointHook', max_keep: int = 3,
          save_best: str | None = None, logger: bool = True,
          load_from: str | None = None, accumulate: int = 1,
          hooks: tuple = ()) -> Runner:
    """A training in epochs of five steps, or in 20 steps.

    Args:
        by (str): ``'epoch'`` or ``'iter'``.
        every (int): Steps between checkpoints.
        hook (bool): With ExactResumeHook.
        checkpoint (str): The hook that writes them.
        logger (bool): With a log on the disk.
    """
    default = dict(epoch='DefaultSampler', iter='InfiniteSampler')
    loop = dict(
        epoch=dict(by_epoch=True, max_epochs=4),
        iter=dict(by_epoch=False, max_iters=20))
    torch.manual_seed(0)
    model = Model()
    # A new process has drawn other numbers.
    random.seed(next(_NUMBERS) + 1000)
    np.random.seed(next(_NUMBERS))
    torch.manual_seed(next(_NUMBERS))
    return Runner(
        model, work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=3, num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type=sampler or default[by], shuffle=True),
            dataset=Images()),
        train_cfg=loop[by],
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=8),
            dict(type='MultiStepLR', milestones=[1, 2, 3],
                 by_epoch=by == 'epoch')],
        optim_wrapper=dict(
            accumulative_counts=accumulate,
            optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1)),
        default_hooks=dict(
            checkpoint=dict(
                type=checkpoint, interval=every, by_epoch=False,
                max_keep_ckpts=max_keep, save_best=save_best,
                rule='greater' if save_best else None),
            **(dict(resume=dict(type='mmrpa.ExactResumeHook'))
               if hook else {}),
            **({} if logger else dict(logger=None))),
        custom_hooks=[recorder, *hooks], resume=resume, load_from=load_from,
        randomness=dict(seed=seed), log_level='WARNING',
        experiment_name=f'training_{next(_NUMBERS)}')


def weight_files(folder: Path) -> list[str]:
    """The files of weights, temporary ones too, in order of their numbers."""
    return sorted((path.name for path in folder.iterdir()
                   if '.pth' in path.name),
                  key=lambda name: (len(name), name))


def damage(path: Path, how: str) -> None:
    """Cut a file short, change it, or write zeros or nothing in its place."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({
        'cut': content[:middle],
        # So many, because up to 63 between two records mean nothing.
        'flipped': content[:middle] + bytes(
            byte ^ 8 for byte in content[middle:middle + 100])
        + content[middle + 100:],
        'zeros': bytes(len(content)),
        'empty': b''}[how])
