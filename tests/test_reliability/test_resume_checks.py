"""What mmengine would pass over in silence when it reads a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import small_training
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import (
    ConstantLR,
    OptimWrapper,
    OptimWrapperDict,
)
from mmengine.registry import PARAM_SCHEDULERS
from parallel_start import read_all_files
from processes import run_in_processes
from toy_training import Killed, Record, Toy, sgd, toy

from mmrpa.weights import CheckpointError

COSINE = [dict(type='LinearLR', start_factor=0.1, end=5, by_epoch=False),
          dict(type='CosineAnnealingLR', begin=1, T_max=5,
               convert_to_iter_based=True)]
SHORT = dict(by_epoch=True, max_epochs=2)


def killed(folder: Path, **settings) -> None:
    """A training that was killed in its second epoch."""
    with pytest.raises(Killed):
        toy(folder, Record(5), **settings).train()


def two_optimisers(model, *names, lr=0.01):
    """OptimWrapperDict, as of a GAN."""
    return OptimWrapperDict(**{
        name: OptimWrapper(torch.optim.Adam(
            getattr(model, name).parameters(), lr=lr))
        for name in ('linear', *names)})


def texts(runner, caplog) -> list[str]:
    """What ExactResumeHook warns of in a training."""
    caplog.clear()
    runner.logger.addHandler(caplog.handler)
    runner.train()
    return [record.getMessage() for record in caplog.records
            if 'ExactResumeHook' in record.getMessage()]


# Files that have not all.


@pytest.mark.parametrize('checkpoint, lacks', [
    (dict(save_optimizer=False), 'no optimizer.'),
    (dict(save_param_scheduler=False), 'no param_schedulers.')])
def test_a_file_without_a_state_is_not_resumed(checkpoint, lacks, tmp_path):
    killed(tmp_path, schedules=COSINE,
           checkpoint=dict(checkpoint, interval=1))
    record = Record()
    runner = toy(tmp_path, record, schedules=COSINE, resume=True)
    with pytest.raises(CheckpointError) as error:
        runner.train()
    assert f'newest checkpoint in {tmp_path} is not' in str(error.value)
    assert lacks in str(error.value) and 'load_from=FILE' in str(error.value)
    assert not record.losses
    started = Record()
    toy(tmp_path / 'new', started, schedules=COSINE, loop=SHORT,
        load_from=tmp_path / 'epoch_1.pth').train()
    assert list(started.losses) == list(range(1, 9))


def test_the_best_is_named_and_not_resumed(tmp_path):
    toy(tmp_path, Record(), (0.1, 0.9, 0.2), loop=SHORT, schedules=COSINE,
        checkpoint=dict(interval=1, save_best='val/acc', rule='greater')
        ).train()
    best = tmp_path / 'best_val_acc_epoch_2.pth'
    with pytest.raises(CheckpointError) as error:
        toy(tmp_path, Record(), schedules=COSINE, resume=True,
            load_from=best).train()
    assert str(best) in str(error.value)
    assert 'no optimizer, no param_schedulers.' in str(error.value)


def test_weights_alone_are_not_resumed(tmp_path):
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=Toy().state_dict()), weights)
    with pytest.raises(CheckpointError, match='no meta, no message_hub, no '):
        toy(tmp_path, Record(), resume=True, load_from=weights).train()


def test_one_of_two_optimisers_is_missing(tmp_path):
    runner = toy(tmp_path, Record(), resume=True, loop=SHORT)
    runner.optim_wrapper = two_optimisers(runner.model, 'norm')
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    saved = dict.fromkeys(('meta', 'message_hub'), {})
    with pytest.raises(CheckpointError, match="no optimizer 'norm'"):
        runner.call_hook('after_load_checkpoint', checkpoint=dict(
            saved, optimizer=dict(linear={})))


def test_a_test_may_read_any_of_them(tmp_path):
    """Its resume finds the newest file, and goes on from nothing."""
    killed(tmp_path, checkpoint=dict(interval=1, save_optimizer=False))
    runner = toy(tmp_path, Record(), resume=True)
    runner.call_hook('after_load_checkpoint', checkpoint={})


# Averaged weights.


def test_averaged_weights_without_the_hook(tmp_path):
    killed(tmp_path, hooks=(EMAHook(), ))
    record = Record()
    with pytest.raises(CheckpointError, match='written with EMAHook.*load_f'):
        toy(tmp_path, record, resume=True).train()
    assert not record.losses
    toy(tmp_path / 'new', record, loop=SHORT,
        load_from=tmp_path / 'epoch_1.pth').train()
    assert len(record.losses) == 8


def test_the_hook_without_averaged_weights_is_told_by_mmengine(tmp_path,
                                                               caplog):
    killed(tmp_path)
    runner = toy(tmp_path, Record(), hooks=(EMAHook(), ), resume=True)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert 'no `ema_state_dict` in checkpoint' in caplog.text


# Settings that a resume does not follow.


ADAM = dict(optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05,
                           betas=(0.9, 0.98)))


@pytest.mark.parametrize('settings', [
    dict(),
    dict(schedules=COSINE),
    dict(schedules=[dict(type='MultiStepLR', milestones=[1, 3], gamma=0.3)],
         optimizer=sgd(momentum=0.9, nesterov=True)),
    dict(schedules=[
        dict(type='CosineRestartLR', periods=[7, 17],
             restart_weights=[1, 0.5], eta_min=0., by_epoch=False),
        dict(type='CosineAnnealingMomentum', T_max=24, by_epoch=False)],
        optimizer=ADAM),
    dict(schedules=[
        dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False),
        dict(type='LinearParamScheduler', param_name='weight_decay')],
        optimizer=ADAM),
    dict(schedules=[dict(type='ReduceOnPlateauLR', monitor='val/acc',
                         rule='greater', patience=1, min_value=1e-3)]),
    dict(schedules=COSINE, auto_scale_lr=dict(enable=True,
                                              base_batch_size=16)),
    dict(schedules=COSINE, optimizer=dict(
        ADAM, type='mmrpa.CPUAmpOptimWrapper', dtype='float16')),
    dict(schedules=COSINE, optimizer=dict(ADAM, paramwise_cfg=dict(
        norm_decay_mult=0, custom_keys=dict(linear=dict(lr_mult=0.1))))),
], ids=['none', 'cosine', 'steps', 'restarts', 'poly', 'plateau', 'scaled',
        'amp', 'groups'])
def test_the_same_config_is_no_change(settings, tmp_path, caplog):
    killed(tmp_path, **settings)
    runner = toy(tmp_path, Record(9), resume=True, **settings)
    with pytest.raises(Killed):
        texts(runner, caplog)
    assert 'ExactResumeHook' not in caplog.text


def test_layer_decay_is_no_change(tmp_path, caplog):
    """Its groups have names and scales, too."""

    def layers(resume):
        runner = small_training.build(
            tmp_path, 'iter', small_training.Recorder(7), resume=resume)
        runner.optim_wrapper = dict(
            ADAM, constructor='mmrpa.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.7))
        runner.logger.addHandler(caplog.handler)
        return runner

    with pytest.raises(small_training.Killed):
        layers(False).train()
    caplog.clear()
    runner = layers(True)
    with pytest.raises(small_training.Killed):
        runner.train()
    assert len(runner.optim_wrapper.optimizer.param_groups) > 4
    assert 'ExactResumeHook' not in caplog.text


def test_changes_of_the_optimiser_are_told(tmp_path, caplog):
    killed(tmp_path, optimizer=ADAM, schedules=COSINE)
    record = Record()
    warned = texts(toy(
        tmp_path, record, resume=True, schedules=COSINE,
        optimizer=dict(optimizer=dict(type='AdamW', lr=1., weight_decay=0.1,
                                      betas=(0.8, 0.98)))), caplog)
    assert len(warned) == 1
    for change in ('lr=0.01 in the checkpoint, 1.0 in the config',
                   'weight_decay=0.05 in the checkpoint, 0.1 in the config',
                   'betas=[0.9, 0.98] in the checkpoint, [0.8, 0.98] in the'):
        assert change in warned[0]
    assert 'eps=' not in warned[0] and "keeps the checkpoint's" in warned[0]
    assert max(record.lr.values()) <= 0.01


def test_changes_of_some_groups_are_told(tmp_path, caplog):
    optimizer = dict(ADAM, paramwise_cfg=dict(norm_decay_mult=0.5))
    killed(tmp_path, optimizer=optimizer)
    warned = texts(toy(
        tmp_path, Record(), resume=True, loop=SHORT, optimizer=dict(
            optimizer, paramwise_cfg=dict(norm_decay_mult=0.1))), caplog)
    assert len(warned) == 1
    assert ('weight_decay=0.025 in the checkpoint, 0.005 in the config (in 2 '
            'of 4 groups') in warned[0].replace('0.005000000000000001',
                                                '0.005')


def test_a_longer_schedule_is_told(tmp_path, caplog):
    """max_epochs is that of the config, and the schedule that of the file."""

    def settings(epochs):
        return dict(loop=dict(by_epoch=True, max_epochs=epochs), schedules=[
            dict(type='CosineAnnealingLR', T_max=epochs, end=epochs)])

    killed(tmp_path, **settings(3))
    record = Record()
    warned = texts(toy(tmp_path, record, resume=True, **settings(5)), caplog)
    assert len(warned) == 1
    for text in ('schedule 0 (CosineAnnealingLR)',
                 'end=3 in the checkpoint, 5 in the config',
                 'T_max=3 in the checkpoint, 5 in the config',
                 'it ends at epoch 3, and the training at 5: in between'):
        assert text in warned[0]
    assert record.lr[20] == record.lr[12]


@pytest.mark.parametrize('schedules, text', [
    (COSINE[:1], '2 schedules in the checkpoint, 1 in the config'),
    ([COSINE[0], dict(type='MultiStepLR', milestones=[4], by_epoch=False)],
     'schedule 1 (MultiStepLR): in the checkpoint is one of another kind, '
     'with T_max, eta_min, eta_min_ratio'),
    ([dict(COSINE[0], start_factor=0.2), COSINE[1]],
     'schedule 0 (LinearLR): start_factor=0.1 in the checkpoint, 0.2 in')])
def test_other_schedules_are_told(schedules, text, tmp_path, caplog):
    killed(tmp_path, schedules=COSINE)
    warned = texts(toy(tmp_path, Record(), resume=True, schedules=schedules,
                       loop=SHORT), caplog)
    assert len([w for w in warned if text in w]) == 1


@PARAM_SCHEDULERS.register_module()
class OwnLR(ConstantLR):
    """A user's, with a setting that is an array and one that is not saved."""

    def __init__(self, optimizer, table, unit='ms', **settings):
        self.table, self.unit = np.array(table), unit
        super().__init__(optimizer, **settings)

    def state_dict(self):
        state = super().state_dict()
        return {key: state[key] for key in state if key != 'unit'}


@pytest.mark.parametrize('table, told', [([1., 2.], 0), ([1., 3.], 1)])
def test_schedules_of_the_user(table, told, tmp_path, caplog):
    killed(tmp_path, loop=SHORT,
           schedules=[dict(type='OwnLR', table=[1., 2.])])
    record = Record()
    warned = texts(toy(
        tmp_path, record, loop=SHORT, resume=True,
        schedules=[dict(type='OwnLR', table=table)]), caplog)
    assert list(record.losses) == [5, 6, 7, 8]
    assert len(warned) == told
    assert all('table=[1.0, 2.0] in the checkpoint, [1.0, 3.0]' in text
               for text in warned)


def test_milestones_are_told(tmp_path, caplog):
    killed(tmp_path, schedules=[dict(type='MultiStepLR', milestones=[2, 3])])
    warned = texts(toy(
        tmp_path, Record(), resume=True, loop=SHORT, schedules=[
            dict(type='MultiStepLR', milestones=[4, 3], end=6)]), caplog)
    assert len(warned) == 1 and 'end' not in warned[0].split(':', 2)[2]
    assert 'milestones=[2, 3] in the checkpoint, [3, 4] in' in warned[0]


def test_another_batch_size_changes_what_is_scaled_by_it(tmp_path, caplog):
    """The learning rate, and steps that were epochs; none is adapted."""
    settings = dict(schedules=COSINE, auto_scale_lr=dict(
        enable=True, base_batch_size=3))
    killed(tmp_path, **settings)
    warned = texts(toy(tmp_path, Record(), resume=True, batch_size=6,
                       loop=SHORT, **settings), caplog)
    assert 'lr=0.1 in the checkpoint, 0.2 in the config' in warned[0]
    assert 'T_max=20 in the checkpoint, 10 in the config' in warned[1]
    assert 'begin=4 in the checkpoint, 2 in the config' in warned[1]


def test_changes_of_two_optimisers_are_told(tmp_path, caplog):
    """As GANs have them."""
    schedules = [dict(type='MultiStepLR', milestones=[2])]
    saved = two_optimisers(Toy(), 'norm')
    runner = toy(tmp_path, Record(), resume=True, schedules=schedules)
    runner.optim_wrapper = two_optimisers(runner.model, 'norm', lr=0.2)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.param_schedulers = runner.build_param_scheduler(schedules)
    runner.logger.addHandler(caplog.handler)
    states = {name: [s.state_dict() for s in of]
              for name, of in runner.param_schedulers.items()}
    states['norm'][0] = dict(states['norm'][0], gamma=0.3)
    runner.call_hook('after_load_checkpoint', checkpoint=dict(
        meta={}, message_hub={}, optimizer=saved.state_dict(),
        param_schedulers=states))
    for text in ('linear: lr=0.01 in the checkpoint, 0.2 in the config',
                 'norm: lr=0.01 in the checkpoint, 0.2 in the config',
                 'norm: schedule 0 (MultiStepLR): gamma=0.3 in the ch'):
        assert caplog.text.count(text) == 1
    assert 'linear: schedule' not in caplog.text


# Processes that have read different files.


def test_processes_with_different_weights_stop(tmp_path):
    answers = run_in_processes(read_all_files, str(tmp_path))
    assert answers[0] == answers[1]
    assert answers[0].pop('same') == ''
    resumes = answers[0].pop('one resumes')
    assert 'do not (rank 0 resumes; rank 1 starts)' in resumes
    assert 'on a disk that all machines share' in resumes
    for case, text in answers[0].items():
        assert 'do not start from the same weights' in text, case
        assert 'same file for all' in text
    steps = answers[0]['steps']
    assert 'rank 0: epoch 0, step 0' in steps
    assert 'rank 1: epoch 0, step 1' in steps
