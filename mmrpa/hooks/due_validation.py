"""Validations of a training that was interrupted before or in them."""

from typing import Any

from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from .resume_checks import resumes, warn

STATE_KEY = 'mmrpa_validation'


class DueValidation(Hook):
    """Let a resumed training validate where the interrupted one would have.

    Checkpoints are written before the validation at the same step. If it was
    not finished, or if its result is not in the file, it is run before
    training goes on, so that the best checkpoint, schedules that wait for a
    plateau and early stopping see it. The counts of ``EarlyStoppingHook``,
    which mmengine does not save, go into the checkpoint.

    :class:`ExactResumeHook` registers it, and hands it metrics before any
    other hook sees them.
    """

    # The hooks that take the metrics must have begun.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._saved: dict | None = None
        self._validated = False
        self._counts: list[dict] | None = None  # as they were before it
        self._scores: dict[str, float] = {}

    def take_metrics(self, runner, metrics: dict | None) -> None:
        """Note what a validation gave, before other hooks act upon it.

        Args:
            runner (Runner): The runner.
            metrics (dict, optional): Of all, the monitored ones are kept.
        """
        hooks = _early_stopping(runner)
        self._validated = True
        self._counts = [_counts(hook) for hook in hooks]
        self._scores = {
            hook.monitor: float(metrics[hook.monitor]) for hook in hooks
            if hook.monitor in (metrics or ())}

    def after_val(self, runner) -> None:
        """All hooks have seen the metrics."""
        self._counts, self._scores = None, {}

    def before_train_iter(self, runner, batch_idx: int,
                          data_batch: Any = None) -> None:
        """From here on the last validation is that of an earlier step."""
        self._validated = False
        self.after_val(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Write down whether this step has been validated, and the counts.

        A new best one makes CheckpointHook write the checkpoint again,
        between the hooks that have seen the metrics and those that have not.
        """
        meta, loop = checkpoint['meta'], runner.train_loop
        counts = self._counts
        if counts is None:
            counts = [_counts(hook) for hook in _early_stopping(runner)]
        checkpoint[STATE_KEY] = dict(
            validated=self._validated, early_stopping=counts,
            scores=dict(self._scores),
            between_epochs=(
                isinstance(loop, EpochBasedTrainLoop)
                and _is_between(meta['epoch'], meta['iter'], loop)))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep it until the training is ready to validate."""
        if resumes(runner):
            self._saved = checkpoint.get(STATE_KEY, {})

    def before_train(self, runner) -> None:
        """Make up for what the interrupted training has not done."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        hooks = _early_stopping(runner)
        _restore(hooks, saved)
        if saved.get('validated', False):
            for hook in hooks:
                if hook.monitor in saved['scores']:
                    hook.after_val_epoch(runner, saved['scores'])
        elif _is_due(runner, saved):
            print_log('the checkpoint was written before the validation at '
                      'its step, which is run now', logger='current')
            training = runner.model.training
            runner.val_loop.run()
            runner.model.train(training)


def _early_stopping(runner: Any) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks
            if isinstance(hook, EarlyStoppingHook)]


def _counts(hook: EarlyStoppingHook) -> dict:
    return dict(monitor=hook.monitor, wait_count=hook.wait_count,
                best_score=float(hook.best_score))


def _restore(hooks: list[EarlyStoppingHook], saved: dict) -> None:
    counts = saved.get('early_stopping', [])
    if not hooks:
        return
    if [hook.monitor for hook in hooks] != [c['monitor'] for c in counts]:
        warn('the checkpoint has no counts for the EarlyStoppingHook of this '
             'config, or for others: it starts to count anew')
        return
    for hook, count in zip(hooks, counts, strict=True):
        hook.wait_count = count['wait_count']
        hook.best_score = count['best_score']


def _is_between(epoch: int, step: int, loop: Any) -> bool:
    """Whether a step is the last of an epoch."""
    return step == epoch * len(loop.dataloader)


def _is_due(runner: Any, saved: dict) -> bool:
    """Whether the loop validates after the step it is at now."""
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    if type(loop).run is EpochBasedTrainLoop.run:
        step, last = loop.epoch, loop.max_epochs
        reached = saved.get('between_epochs',
                            _is_between(loop.epoch, loop.iter, loop))
    elif type(loop).run is IterBasedTrainLoop.run:
        step, last, reached = loop.iter, loop.max_iters, True
    else:
        warn(f'when a {type(loop).__name__} validates is not known here: one '
             'that was due at the checkpoint is not made up for')
        return False
    loop._decide_current_val_interval()
    return (reached and step >= max(1, loop.val_begin)
            and (step % loop.val_interval == 0 or step == last))
