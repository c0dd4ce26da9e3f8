"""What is looked at before a training starts or goes on from a file.

mmengine says nothing when a checkpoint lacks what a resume needs, when the
config says something else than the checkpoint, or when the processes of a
training have read different files.
"""

import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
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

# Arguments of optimisers that change how a step is computed, not what it is,
# and of schedules that say where they are.
_NO_SETTINGS = frozenset((
    'self', 'args', 'kwargs', 'params', 'optimizer', 'foreach', 'fused',
    'capturable', 'differentiable', 'last_step', 'verbose'))


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


def warn_of_changes(runner: Any, checkpoint: dict) -> None:
    """Say which settings of the config a resume does not follow.

    Args:
        runner (Runner): Its optimiser and schedules are those of the config.
        checkpoint (dict): Of which they will take the state.
    """
    for what, changes in (
            ('optimiser', _optimizer_changes(runner, checkpoint)),
            ('schedules', _schedule_changes(runner, checkpoint))):
        text = '; '.join(changes)
        if text:
            warn(f'the {what} of the checkpoint and of this config differ, '
                 f"and a resume keeps the checkpoint's: {text}. To train by "
                 'the config, start a new training from the weights '
                 '(load_from, without resume)')


def _optimizer_changes(runner: Any, checkpoint: dict) -> Iterator[str]:
    """Hyperparameters of which the config says something else."""
    wrapper, saved = runner.optim_wrapper, checkpoint['optimizer']
    if isinstance(wrapper, OptimWrapperDict):
        pairs = [(f'{name}: ', inner.optimizer, saved[name])
                 for name, inner in wrapper.items()]
    else:
        pairs = [('', wrapper.optimizer, saved)]
    for name, optimizer, state in pairs:
        new, old = optimizer.param_groups, state.get('param_groups', [])
        if len(new) != len(old):
            continue  # torch will refuse it
        for key in _arguments(optimizer):
            values = [(_start_value(a, key), _start_value(b, key))
                      for a, b in zip(old, new, strict=True)
                      if key in a and key in b]
            differ = [pair for pair in values if pair[0] != pair[1]]
            if differ:
                where = (f' (in {len(differ)} of {len(new)} groups of '
                         'parameters, this is the first)'
                         if len(new) > 1 else '')
                yield f'{name}{_compared(key, *differ[0])}{where}'


def _start_value(group: dict, key: str) -> Any:
    """A hyperparameter as it was before any schedule changed it."""
    if key == 'betas' and 'initial_momentum' in group:
        # A schedule of the momentum writes to the first beta.
        return _plain((group['initial_momentum'], *group[key][1:]))
    return _plain(group.get(f'initial_{key}', group[key]))


def _schedule_changes(runner: Any, checkpoint: dict) -> Iterator[str]:
    """Settings of schedules of which the config says something else."""
    new, old = runner.param_schedulers, checkpoint.get('param_schedulers')
    if not new or type(new) is not type(old):
        return  # mmengine will refuse the latter
    if isinstance(new, list):
        new, old = {'': new}, {'': old}
    for name, schedules in new.items():
        states = old[name]
        prefix = f'{name}: ' if name else ''
        if len(schedules) != len(states):
            yield (f'{prefix}{len(states)} schedules in the checkpoint, '
                   f'{len(schedules)} in the config (they are matched in '
                   'their order; more of the config start at its first step)')
        # Not strict: just as mmengine matches them.
        for number, (schedule, state) in enumerate(
                zip(schedules, states, strict=False)):
            text = _difference(runner, schedule, state)
            if text:
                yield (f'{prefix}schedule {number} '
                       f'({type(schedule).__name__}): {text}')


def _difference(runner: Any, schedule: Any, state: dict) -> str:
    """How a schedule of the config differs from the one in a checkpoint."""
    # A schedule of the user's own may save something else than it has.
    own = schedule.state_dict()
    public = [{key for key in names if not key.startswith('_')}
              for names in (state, own)]
    if public[0] != public[1]:
        return ('in the checkpoint is one of another kind, with '
                f'{", ".join(sorted(public[0] - public[1])) or "less"}')
    keys = [key for key in (*_arguments(schedule), 'min_values')
            if key in own and key in state
            and _plain(own[key]) != _plain(state[key])]
    text = ', '.join(_compared(key, _plain(state[key]), _plain(own[key]))
                     for key in keys)
    unit, last = (('epoch', runner.max_epochs) if schedule.by_epoch else
                  ('step', runner.max_iters))
    if 'end' in keys and state['end'] < last:
        text += (f'; it ends at {unit} {state["end"]}, and the training at '
                 f'{last}: in between it changes nothing')
    return text


def _compared(key: str, old: Any, new: Any) -> str:
    return f'{key}={old!r} in the checkpoint, {new!r} in the config'


def _arguments(built: Any) -> list[str]:
    """The names of an object's settings: arguments of its classes.

    What else it has changes as training goes on.
    """
    names = [name for cls in type(built).__mro__
             for name in inspect.signature(cls.__init__).parameters]
    return [name for name in dict.fromkeys(names) if name not in _NO_SETTINGS]


def _plain(value: Any) -> Any:
    """A value that can be compared, however it was kept."""
    if isinstance(value, Counter):  # milestones
        return sorted(value.elements())
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def check_start(runner: Any) -> None:
    """Refuse to train if some processes resume and others do not.

    ``tools/train.py --resume`` with ``load_from`` decides by what it finds in
    the working directory, so machines that do not share it decide for
    themselves. Those that resume would wait for the others, which do not
    answer, until the time-out.

    Args:
        runner (Runner): Nothing has been loaded yet.

    Raises:
        CheckpointError: In all processes.
    """
    answers = all_gather_object(resumes(runner))
    if len(set(answers)) > 1:
        text = '; '.join(f'rank {rank} {"resumes" if answer else "starts"}'
                         for rank, answer in enumerate(answers))
        raise CheckpointError(
            f'some processes resume a training and others do not ({text}). '
            f'Let the working directory, {runner.work_dir}, be on a disk that '
            'all machines share, or copy its checkpoints and last_checkpoint '
            'to each')


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
