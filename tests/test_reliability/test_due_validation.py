"""Validations, early stopping and plateaus of interrupted trainings."""

import pytest
import torch
from mmengine.hooks import EarlyStoppingHook, EMAHook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from toy_training import Killed, Record, toy

BEST = dict(interval=1, by_epoch=True, save_best='val/acc', rule='greater')
BY_STEPS = dict(by_epoch=False, max_iters=12, val_interval=4)


def interrupt(folder, scores=(0.5, ) * 9, *, kill_after=None, kill_in=None,
              hooks=tuple, **settings):
    """An uninterrupted training, a killed one, and what goes on from it."""
    whole, killed = Record(), Record(kill_after, kill_in)
    toy(folder / 'whole', whole, scores, hooks=hooks(), **settings).train()
    with pytest.raises(Killed):
        toy(folder / 'killed', killed, scores, hooks=hooks(),
            **settings).train()
    resumed = Record()
    toy(folder / 'killed', resumed, scores, hooks=hooks(), resume=True,
        **settings).train()
    return whole, killed, resumed


def assert_goes_on(whole, killed, resumed):
    """The same steps, validations and learning rates, each once."""
    assert killed.validated + resumed.validated == whole.validated
    assert list({**killed.losses, **resumed.losses}) == list(whole.losses)
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(whole.losses[step], abs=1e-6), step
        assert resumed.lr[step] == whole.lr[step], step
    predicted = whole.predicted[-len(resumed.predicted):]
    assert resumed.predicted == pytest.approx(predicted, abs=1e-6)


def ends(folder, name):
    return [torch.load(folder / run / name, weights_only=False)
            for run in ('whole', 'killed')]


@pytest.mark.parametrize('step', [8, 24])
def test_killed_in_a_validation(step, tmp_path):
    """One in the middle, and that of the last epoch."""
    scores = (0.1, 0.2, 0.3, 0.4, 0.5, 0.9)
    records = interrupt(tmp_path, scores, kill_in=step, checkpoint=BEST)
    assert_goes_on(*records)
    assert records[2].validated[0] == step
    assert len(records[2].losses) == 24 - step
    end = ends(tmp_path, 'epoch_6.pth')
    for name, value in end[0]['state_dict'].items():
        torch.testing.assert_close(end[1]['state_dict'][name], value)
    best = ends(tmp_path, 'best_val_acc_epoch_6.pth')
    assert [b['message_hub']['runtime_info']['best_score'] for b in best
            ] == [0.9, 0.9]


def test_killed_in_a_validation_by_steps(tmp_path):
    records = interrupt(tmp_path, kill_in=8, loop=BY_STEPS)
    assert records[0].validated == [4, 8, 12]
    assert_goes_on(*records)
    assert records[2].validated == [8, 12]
    assert min(records[2].losses) == 9


def test_averaged_weights_are_validated(tmp_path):
    """By EMAHook, which gives the trained ones back."""
    records = interrupt(tmp_path, kill_in=8,
                        hooks=lambda: (EMAHook(momentum=0.3), ))
    assert_goes_on(*records)
    raw = Record()
    toy(tmp_path / 'raw', raw).train()
    assert raw.losses == records[0].losses
    assert raw.predicted[-4:] != pytest.approx(records[2].predicted[-4:],
                                               abs=1e-4)


@pytest.mark.parametrize('loop, checkpoint, kill, wanted', [
    # Not one that does not count yet, nor one between.
    (dict(by_epoch=True, max_epochs=4, val_begin=3), None,
     dict(kill_after=9), [12, 16]),
    (dict(by_epoch=True, max_epochs=4, val_interval=2), None,
     dict(kill_after=5), [8, 16]),
    (dict(by_epoch=True, max_epochs=4, val_interval=2), None,
     dict(kill_after=9), [8, 16]),
    (dict(by_epoch=True, max_epochs=3, val_interval=2), None,
     dict(kill_in=12), [12]),
    (dict(by_epoch=True, max_epochs=5, val_interval=3,
          dynamic_intervals=[(4, 1)]), None, dict(kill_after=17), [16, 20]),
    # A checkpoint in the middle of an epoch, and one on its last step.
    (dict(by_epoch=True, max_epochs=3), dict(interval=3, by_epoch=False),
     dict(kill_after=7), [8, 12]),
    (dict(by_epoch=True, max_epochs=3), dict(interval=4, by_epoch=False),
     dict(kill_after=9), [8, 12]),
    (dict(by_epoch=False, max_iters=10, val_interval=4), None,
     dict(kill_after=7), [8, 10]),
    (dict(by_epoch=False, max_iters=10, val_interval=4), None,
     dict(kill_in=10), [10]),
    (dict(by_epoch=False, max_iters=10, val_interval=4, val_begin=5), None,
     dict(kill_after=5), [8, 10]),
])
def test_which_are_made_up_for(loop, checkpoint, kill, wanted, tmp_path):
    """A checkpoint tells of a validation only by what was trained after it.

    So one that had ended before the kill is run again if no later checkpoint
    was written; the one of step 8 in the third case, for one.
    """
    settings = dict(loop=loop, checkpoint=checkpoint)
    with pytest.raises(Killed):
        toy(tmp_path, Record(**kill), **settings).train()
    resumed = Record()
    toy(tmp_path, resumed, resume=True, **settings).train()
    assert resumed.validated == wanted


def test_nothing_to_validate(tmp_path):
    """Neither a training without validation, nor one that begins."""
    with pytest.raises(Killed):
        toy(tmp_path, Record(9), validate=False).train()
    resumed = Record()
    toy(tmp_path, resumed, resume=True, validate=False).train()
    assert resumed.validated == [] and min(resumed.losses) == 9
    started = Record()
    toy(tmp_path / 'new', started, load_from=tmp_path / 'epoch_2.pth').train()
    assert started.validated[0] == 4


def test_a_new_best_is_not_validated_twice(tmp_path):
    """CheckpointHook writes the checkpoint again after it."""
    scores = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    records = interrupt(tmp_path, scores, kill_after=9, checkpoint=BEST)
    assert_goes_on(*records)
    assert records[2].validated == [12, 16, 20, 24]


def early(patience=3):
    return (EarlyStoppingHook('val/acc', rule='greater', patience=patience), )


def counts(runner):
    hook = next(h for h in runner.hooks if isinstance(h, EarlyStoppingHook))
    return hook.wait_count, hook.best_score


@pytest.mark.parametrize('checkpoint', [None, BEST])
@pytest.mark.parametrize('kill', [
    dict(kill_after=6), dict(kill_after=14), dict(kill_in=12),
    dict(kill_in=16)])
def test_early_stopping_goes_on(checkpoint, kill, tmp_path):
    """Three without an improvement by 0.1, of which one is the best yet."""
    whole, _, resumed = interrupt(
        tmp_path, (0.9, 0.1, 0.95, 0.1, 0.9, 0.9), hooks=early,
        checkpoint=checkpoint, **kill)
    assert whole.validated == [4, 8, 12, 16]
    assert resumed.validated[-1] == 16
    assert max(resumed.losses, default=16) == 16


def test_counts_of_a_checkpoint_that_is_written_twice(tmp_path):
    """After 12 steps, when not all hooks have seen the metrics of its best."""
    scores = (0.9, 0.1, 0.95, 0.1, 0.9, 0.9)
    with pytest.raises(Killed):
        toy(tmp_path, Record(13), scores, hooks=early(), checkpoint=BEST
            ).train()
    record = Record(13)
    runner = toy(tmp_path, record, scores, hooks=early(), checkpoint=BEST,
                 resume=True)
    with pytest.raises(Killed):
        runner.train()
    assert record.validated == [] and counts(runner) == (2, 0.9)


def test_a_training_that_was_stopped_early_stays_so(tmp_path):
    scores = (0.9, 0.1, 0.1, 0.1, 0.9, 0.9)
    toy(tmp_path, Record(), scores, hooks=early()).train()
    resumed = Record()
    model = toy(tmp_path, resumed, scores, hooks=early(), resume=True).train()
    assert resumed.validated == [16] and not resumed.losses
    assert model.training  # as before the validation


def test_early_stopping_without_counts_is_told(tmp_path, caplog):
    with pytest.raises(Killed):
        toy(tmp_path, Record(9)).train()
    record = Record(17)
    runner = toy(tmp_path, record, hooks=early(2), resume=True)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert 'no counts for the EarlyStoppingHook' in caplog.text
    assert record.validated == [8, 12, 16]


@pytest.mark.parametrize('checkpoint', [None, BEST])
@pytest.mark.parametrize('kill', [
    dict(kill_after=5), dict(kill_after=13), dict(kill_in=8),
    dict(kill_in=16)])
def test_plateaus_go_on(checkpoint, kill, tmp_path):
    """The learning rate falls after two without an improvement."""
    records = interrupt(
        tmp_path, (0.5, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1), checkpoint=checkpoint,
        loop=dict(by_epoch=True, max_epochs=7), schedules=[dict(
            type='ReduceOnPlateauLR', monitor='val/acc', rule='greater',
            patience=1)], **kill)
    rates = [records[0].lr[step] for step in range(4, 29, 4)]
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001])
    for step, rate in records[2].lr.items():
        assert rate == records[0].lr[step], step


@LOOPS.register_module()
class UnknownLoop(EpochBasedTrainLoop):
    """It validates when it likes."""

    def run(self):
        return super().run()


def test_other_loops_are_told(tmp_path, caplog):
    loop = dict(type='UnknownLoop', max_epochs=6)
    with pytest.raises(Killed):
        toy(tmp_path, Record(9), loop=loop).train()
    record = Record()
    runner = toy(tmp_path, record, loop=loop, resume=True)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert 'when a UnknownLoop validates is not known' in caplog.text
    assert record.validated == [12, 16, 20, 24]


def test_another_length_of_epochs(tmp_path):
    """The checkpoint knows that it was written between two."""
    with pytest.raises(Killed):
        toy(tmp_path, Record(9)).train()
    record = Record(9)
    with pytest.raises(Killed):
        toy(tmp_path, record, batch_size=4, resume=True).train()
    assert record.validated == [8]


def test_a_test_validates_nothing(tmp_path):
    toy(tmp_path, Record()).train()
    record = Record()
    runner = toy(tmp_path, record, resume=True)
    runner._test_loop = runner._val_loop
    runner._test_dataloader = runner._val_dataloader
    runner._test_evaluator = runner._val_evaluator
    record.step = 24
    assert runner.test() == {'val/acc': 0.5}
    assert runner.iter == 24
    assert record.validated == [] and not record.losses
