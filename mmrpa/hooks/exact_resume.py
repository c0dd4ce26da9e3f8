"""Training that goes on after an interruption as if there had been none.

What makes two trainings differ is the state of the random number generators,
which depends on all that has been drawn before, in this process and in those
that load the data, where nobody can save it. So nothing is saved: before each
step, and before each batch is loaded, all generators are seeded by the
training's seed and the number of the step or batch. What is left is to start
with the right batch.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch.utils.data import DataLoader, IterableDataset

from ..registry import HOOKS
from ..safe_loading import use_safe_reader
from .due_validation import DueValidation
from .resume_checks import (
    check_processes,
    check_resumable,
    check_start,
    resumes,
    trains,
    warn,
    warn_of_changes,
)

STATE_KEY = 'mmrpa_resume'
_STEP, _DATA, _ORDER = 0, 1, 2  # streams of seeds


def seed_all(*key: int, devices: bool = True) -> None:
    """Seed the generators of Python, numpy and torch.

    Args:
        key (int): Non-negative numbers; other numbers give other streams.
        devices (bool): Those of GPUs, too, which takes most of the time.
    """
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:6])
    seed = int(words[6]) << 32 | int(words[7])
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class SeededBatch:
    """The indices of a batch, which seed the process that loads them.

    A data set is asked for one index after the other, in whatever process;
    before the first, the generators are seeded.

    Args:
        indices (sequence): What the batch sampler has chosen.
        key (tuple[int]): For :func:`seed_all`.
    """

    def __init__(self, indices: Sequence, key: tuple[int, ...]) -> None:
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator:
        seed_all(*self.key)
        return iter(self.indices)


class SeededBatches:
    """A batch sampler that can skip batches, and numbers and seeds them.

    Whatever else is asked of it, the batch sampler inside answers.

    Args:
        batch_sampler: The loader's own.
        set_epoch (callable): Takes the number of a new pass over the data.
    """

    def __init__(self, batch_sampler: Any,
                 set_epoch: Callable[[int], None]) -> None:
        self.batch_sampler = batch_sampler
        self.key: tuple[int, ...] = ()  # of the batches' seeds
        self.order_key: tuple[int, ...] = ()  # of their order's
        self.position = 0  # the number of the next pass's first batch
        self.skip = 0  # batches to leave out of the next pass
        self.epoch = 0  # the number of the next pass
        self.endless = False  # whether skipping goes on in the next epoch
        self._set_epoch = set_epoch

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # not there yet: while it is copied
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[SeededBatch]:
        batches = self._start()
        while self.skip:
            skipped = sum(1 for _ in itertools.islice(batches, self.skip))
            self.skip -= skipped
            if self.skip and not self.endless:
                self.skip = 0
            elif self.skip:
                if not skipped:
                    raise ValueError('the sampler of train_dataloader gives '
                                     'no batches at all')
                self.next_epoch()
                batches = self._start()
        for number, batch in enumerate(batches, self.position):
            yield SeededBatch(batch, (*self.key, number))

    def _start(self) -> Iterator:
        """Begin a pass.

        Samplers without a seed of their own draw from the global generators:
        torch's RandomSampler when its first index is asked for, mmdet's
        GroupMultiSourceSampler for each batch. When that is depends on how
        far worker processes read ahead.
        """
        seed_all(*self.order_key, self.epoch)
        batches = iter(self.batch_sampler)
        for number in itertools.count(1):
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
            seed_all(*self.order_key, self.epoch, number, devices=False)

    def next_epoch(self) -> None:
        """Begin another pass over the data within a training by steps."""
        self.epoch += 1
        self._set_epoch(self.epoch)


class EndlessBatches:
    """The iterator of mmengine's IterBasedTrainLoop, over seeded batches.

    Args:
        loader (DataLoader): Its batch sampler is the next argument.
        batches (SeededBatches): Where batches are skipped.
        skipped_by_next (int): So many calls give nothing: mmengine 0.10.7
            has no other way to skip.
    """

    def __init__(self, loader: DataLoader, batches: SeededBatches,
                 skipped_by_next: int = 0) -> None:
        self._loader = loader
        self._batches = batches
        self._iterator: Iterator | None = None
        self._given = 0  # batches of this pass
        self._left_out = batches.skip = skipped_by_next
        batches.endless = True

    def __iter__(self) -> 'EndlessBatches':
        return self

    def skip_iter(self, num_iters: int) -> None:
        """Leave out batches without loading them."""
        self._batches.skip = num_iters

    def __next__(self) -> Any:
        if self._left_out:
            self._left_out -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            return self._next()
        except StopIteration:
            self._batches.next_epoch()
            self._batches.position += self._given
            self._given = 0
            self._iterator = iter(self._loader)
            return self._next()

    def _next(self) -> Any:
        batch = next(self._iterator)
        self._given += 1
        return batch


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make a resumed training equal to one that was never interrupted.

    After ``--resume``, also from a checkpoint in the middle of an epoch, the
    losses are those of the uninterrupted run: the same images in the same
    order, augmented in the same way, the same dropout. On CPUs they are the
    same numbers; on GPUs as far as the kernels are deterministic.

    - Before each step all random number generators are seeded by the
      training's seed (``randomness``; it is in the checkpoint) and the number
      of the step; before each batch is loaded, by the seed, the process and
      the number of the batch. What a process has drawn before does not matter.
    - A resumed training starts with the batch that comes next. The batches
      before it are counted and not loaded. mmengine would begin the epoch
      anew, and train more steps in all.
    - The sampler's seed comes from the checkpoint, where mmengine leaves the
      one that the new process has drawn.
    - A validation that was due at the checkpoint's step is run first, and
      ``EarlyStoppingHook`` goes on counting.

    A resume stops with a :class:`~mmrpa.weights.CheckpointError` if the file
    has no state of the optimiser or the schedules, as ``best_*.pth``, or was
    written with ``EMAHook`` and the config has none. It warns of settings of
    the optimiser and the schedules that the config has changed, because those
    of the checkpoint are kept. A training stops with the same error if some
    of its processes resume and others do not, one with DDP if they have loaded
    different weights.

    For this the batch sampler of the training's data loader is wrapped, and
    the iterator of ``IterBasedTrainLoop`` replaced. Losses are not those of a
    run without the hook, as they are not with another seed.

    Out of its reach: generators of a data set's or a transform's own that
    numpy, Python and torch do not share, caches of earlier images
    (``CachedMosaic``), data sets without an order (``IterableDataset``),
    gradients accumulated when the checkpoint was written, and, on more than
    one process, statistics of BN, of which a checkpoint has those of the
    first. A resume with another number of processes or another batch size is
    told of by a warning.

    Examples:
        In a config: ``default_hooks = dict(
        resume=dict(type='mmrpa.ExactResumeHook'))``.
    """

    # Before all that draws random numbers in a step.
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._batches: SeededBatches | None = None
        self._resumed: dict | None = None
        self._fits = True  # the checkpoint's epochs are as long as ours
        self._finish: Callable[[], None] | None = None
        self._validation = DueValidation()

    def before_run(self, runner) -> None:
        """Take over the order of the batches, before any is loaded."""
        use_safe_reader()
        self._batches = self._resumed = self._finish = None
        self._fits = True
        if not trains(runner):
            return
        check_start(runner)
        if self._validation not in runner.hooks:
            runner.register_hook(self._validation)
        loader = runner.train_loop.dataloader
        if loader.batch_sampler is None or isinstance(
                loader.dataset, IterableDataset):
            warn('train_dataloader has no batch sampler, so the images of a '
                 'resumed training are not those that come next')
            return
        if isinstance(loader.batch_sampler, SeededBatches):
            self._batches = loader.batch_sampler
            return
        for sampler in _samplers(loader):
            if type(sampler) is InfiniteSampler:
                # mmengine 0.10.7 has begun to read it.
                sampler.indices = sampler._indices_of_rank()
        self._batches = SeededBatches(
            loader.batch_sampler, lambda epoch: _set_epoch(loader, epoch))
        # DataLoader refuses a new batch sampler because batch size, sampler
        # and iterator must fit it, which they do.
        vars(loader)['batch_sampler'] = self._batches
        vars(loader)['_iterator'] = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Write down what a checkpoint of mmengine lacks."""
        _warn_of_gradients(runner.optim_wrapper)
        if self._batches is not None:
            checkpoint[STATE_KEY] = dict(
                sampler_seeds=_sampler_seeds(runner.train_loop.dataloader),
                **_layout(runner.train_loop.dataloader))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Look at what it has, and keep it until the step is known."""
        if not resumes(runner):
            return
        if isinstance(runner, Runner):  # others write other files
            check_resumable(runner, checkpoint)
            warn_of_changes(runner, checkpoint)
        self._resumed = checkpoint.get(STATE_KEY, {})

    def before_train(self, runner) -> None:
        """Find the place in the data."""
        check_processes(runner)
        if self._batches is None:
            return
        loop = runner.train_loop
        # All processes must have their own images, but one seed in a step
        # unless the config wants otherwise, as with mmengine alone.
        self._batches.key = (runner.seed, _DATA, get_rank())
        # A sampler for several processes gives each its part of one order.
        self._batches.order_key = (runner.seed, _ORDER)
        if self._resumed is not None:
            self._restore(loop.dataloader)
        if hasattr(loop, 'dataloader_iterator'):
            iterator = loop.dataloader_iterator
            skips = hasattr(iterator, 'skip_iter') or getattr(
                loop, 'fast_forward_on_resume', False)
            loop.dataloader_iterator = EndlessBatches(
                loop.dataloader, self._batches, 0 if skips else loop.iter)
        elif loop.iter and self._fits:
            self._skip_in_epoch(loop)

    def before_train_epoch(self, runner) -> None:
        """Number the batches by the steps that they are for."""
        if self._batches is not None:
            self._batches.position = runner.iter
            if not self._batches.endless:
                self._batches.epoch = runner.epoch

    def after_train_epoch(self, runner) -> None:
        """Give back what an epoch that began in its middle has changed."""
        if self._finish is not None:
            self._finish()
            self._finish = None

    def before_train_iter(self, runner, batch_idx: int,
                          data_batch: Any = None) -> None:
        """Seed the step."""
        seed_all(runner.seed, _STEP, runner.iter)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Have the metrics noted before another hook acts upon them."""
        self._validation.take_metrics(runner, metrics)

    def _restore(self, loader: DataLoader) -> None:
        """Take the sampler's seed, and compare the rest."""
        saved = dict(self._resumed)
        if not saved:
            warn('the checkpoint was written without ExactResumeHook: what '
                 'follows is not what would have followed, only as random')
            return
        for sampler, seed in zip(
                _samplers(loader), saved.pop('sampler_seeds', ()),
                strict=False):
            if seed is not None:
                sampler.seed = seed
        now = _layout(loader)
        changed = [f'{name}={now[name]!r}, was {saved[name]!r}'
                   for name in now if saved.get(name, now[name]) != now[name]]
        self._fits = not changed
        if changed:
            warn('this training differs from the one that wrote the '
                 f'checkpoint ({"; ".join(changed)}), so it sees other '
                 'images from here on')

    def _skip_in_epoch(self, loop: Any) -> None:
        """Begin an epoch where the checkpoint has left it."""
        per_epoch = len(loop.dataloader)
        done = loop.iter - loop.epoch * per_epoch
        if not 0 <= done <= per_epoch:
            warn(f'the checkpoint has {loop.iter} steps in {loop.epoch} '
                 f'epochs, which does not fit epochs of {per_epoch} steps; '
                 f'epoch {loop.epoch + 1} starts from its beginning')
            return
        if not done:
            return
        print_log(f'epoch {loop.epoch + 1} goes on after {done} of its '
                  f'{per_epoch} batches', logger='current')
        self._batches.skip = done
        run_iter = loop.run_iter
        # Hooks must see the true number of the batch.
        loop.run_iter = lambda idx, data_batch: run_iter(
            idx + done, data_batch)
        self._finish = lambda: vars(loop).pop('run_iter')


def _warn_of_gradients(optim_wrapper: Any) -> None:
    """Tell of gradients that wait for others and are in no checkpoint."""
    wrappers = (optim_wrapper.values() if isinstance(
        optim_wrapper, OptimWrapperDict) else [optim_wrapper])
    for wrapper in wrappers:
        done = getattr(wrapper, '_inner_count', 0)
        counts = getattr(wrapper, '_accumulative_counts', 1)
        if done % counts and done != getattr(wrapper, '_max_counts', -1):
            warn(f'the gradients of {done % counts} of {counts} batches are '
                 'not in this checkpoint; let its interval be a multiple of '
                 f'accumulative_counts={counts}')


def _samplers(loader: DataLoader) -> list[Any]:
    """The batch sampler and the sampler inside."""
    batch_sampler = loader.batch_sampler
    if isinstance(batch_sampler, SeededBatches):
        batch_sampler = batch_sampler.batch_sampler
    return [batch_sampler, getattr(batch_sampler, 'sampler', None)]


def _sampler_seeds(loader: DataLoader) -> list[int | None]:
    seeds = (getattr(sampler, 'seed', None) for sampler in _samplers(loader))
    return [int(seed) if isinstance(seed, (int, np.integer)) else None
            for seed in seeds]


def _layout(loader: DataLoader) -> dict[str, int]:
    """What must be the same for a training to go on exactly."""
    return dict(
        processes=get_world_size(), batch_size=_batch_size(loader),
        images=len(loader.dataset))


def _batch_size(loader: DataLoader) -> int:
    return int(getattr(loader.batch_sampler, 'batch_size', 0) or 0)


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    """What mmengine does when a training by steps has seen all images."""
    for sampler in (loader.sampler, _samplers(loader)[1]):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            return
