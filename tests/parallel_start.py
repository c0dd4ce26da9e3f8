"""Trainings of two processes that start from files of their own."""

from pathlib import Path

import torch
from toy_training import Record, Toy, toy

from mmrpa.weights import CheckpointError


def _train(rank: int, folder: str, case: str) -> str:
    """What stops it, if anything does."""
    Path(folder, str(rank)).mkdir()
    weights = Path(folder, str(rank), 'weights.pth')
    state = Toy().state_dict()
    if case == 'weights':
        state['linear.bias'] += 1e-3 * rank
    if case == 'statistics':
        state['norm.num_batches_tracked'] += rank
    torch.save(dict(state_dict=state, meta={}), weights)
    record = Record()
    runner = toy(
        Path(folder, 'work'), record, load_from=weights, validate=False,
        loop=dict(by_epoch=True, max_epochs=2), launcher='pytorch', cfg=dict(
            model_wrapper_cfg=dict(type='MMDistributedDataParallel',
                                   device_ids=None)))
    if case == 'steps':
        runner.train_loop._iter = rank
    if case == 'one resumes':  # it sees a checkpoint, the other does not
        runner._resume, runner._load_from = rank == 0, None
    try:
        runner.train()
    except CheckpointError as error:
        assert not record.losses
        return str(error)
    assert len(record.losses) == 4
    return ''


def read_all_files(rank: int, folder: str) -> dict[str, str]:
    """Errors of trainings in which the processes read files of their own."""
    answers = {}
    for case in ('same', 'weights', 'statistics', 'steps',
                 'one resumes'):
        torch.manual_seed(1)
        Path(folder, case).mkdir(exist_ok=True)
        answers[case] = _train(rank, str(Path(folder, case)), case)
    return answers
