"""What mmengine would pass over in silence when it reads a checkpoint."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from parallel_start import read_all_files
from processes import run_in_processes
from toy_training import Killed, Record, Toy, toy

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


# Processes that have read different files.


def test_processes_with_different_weights_stop(tmp_path):
    answers = run_in_processes(read_all_files, str(tmp_path))
    assert answers[0] == answers[1]
    assert answers[0].pop('same') == ''
    for case, text in answers[0].items():
        assert 'do not start from the same weights' in text, case
        assert 'same file for all' in text
    steps = answers[0]['steps']
    assert 'rank 0: epoch 0, step 0' in steps
    assert 'rank 1: epoch 0, step 1' in steps
