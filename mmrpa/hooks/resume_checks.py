"""What is looked at before a training starts or goes on from a file.

mmengine says nothing when a checkpoint lacks what a resume needs, or when the
processes of a training have read different files.
"""

import hashlib
import logging
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.model import MMSeparateDistributedDataParallel
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..weights.files import CheckpointError


def trains(runner: Any) -> bool:
    """Whether this run trains; the loop of one that tests is a config."""
    return isinstance(getattr(runner, '_train_loop', None), BaseLoop)


def resumes(runner: Any) -> bool:
    """Whether what is loaded now is for a training to go on from."""
    return bool(getattr(runner, '_resume', False)) and trains(runner)


def warn(text: str) -> None:
    """Log a warning of ExactResumeHook."""
    print_log(f'ExactResumeHook: {text}', logger='current',
              level=logging.WARNING)


def check_resumable(runner: Any, checkpoint: dict) -> None:
    """Refuse to go on from a file that has only a part of a training.

    Args:
        runner (Runner): It trains; its optimiser and schedules are built.
        checkpoint (dict): What the file holds.

    Raises:
        CheckpointError: It lacks the state of the optimiser or the schedules,
            or has averaged weights where the config has no EMAHook.
    """
    file = runner._load_from
    name = file or f'the newest checkpoint in {runner.work_dir}'
    start = ('start a new training from its weights: '
             f'load_from={file or "FILE"}, without resume')
    needed = ['meta', 'message_hub', 'optimizer']
    if runner.param_schedulers:
        needed.append('param_schedulers')
    missing = [key for key in needed if key not in checkpoint]
    if not missing and isinstance(runner.optim_wrapper, OptimWrapperDict):
        missing = [f'optimizer {key!r}' for key in runner.optim_wrapper.keys()
                   if key not in checkpoint['optimizer']]
    if missing:
        raise CheckpointError(
            f'{name} is not enough to resume from: it has no '
            f'{", no ".join(missing)}. best_*.pth never has the state of a '
            'training, nor have files that are written with '
            'save_optimizer=False or save_param_scheduler=False. Resume from '
            f'an epoch_N.pth or iter_N.pth that has it, or {start}')
    if 'ema_state_dict' in checkpoint and not any(
            isinstance(hook, EMAHook) for hook in runner.hooks):
        raise CheckpointError(
            f'{name} was written with EMAHook, which this config does not '
            'have: the weights would be the averaged ones, and the '
            "optimiser's state that of others. Put EMAHook into "
            f'custom_hooks, or {start}')


def check_processes(runner: Any) -> None:
    """Refuse to train if the processes differ in their weights.

    DDP hands the first one's weights to all when it is built, which is before
    a file is loaded, and gradients alone from then on. Processes that read
    different files of one name would train different models.

    Args:
        runner (Runner): All that is to be loaded is. What is not wrapped in
            DDP is left alone: with FSDP, processes have different parts.

    Raises:
        CheckpointError: In all processes.
    """
    if get_world_size() == 1 or not isinstance(
            runner.model, (DistributedDataParallel,
                           MMSeparateDistributedDataParallel)):
        return
    mine = (_digest(runner.model.module), runner.epoch, runner.iter)
    states = all_gather_object(mine)
    if len(set(states)) > 1:
        text = '; '.join(
            f'rank {rank}: epoch {epoch}, step {step}, weights {digest[:8]}'
            for rank, (digest, epoch, step) in enumerate(states))
        raise CheckpointError(
            f'the processes do not start from the same weights ({text}). Let '
            'load_from, or the file to resume from, be the same file for all '
            'of them: on a disk that all machines share, or copied to each')


def _digest(model: nn.Module) -> str:
    """A checksum of a model's parameters and buffers, names and all."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {value.shape}'.encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
