"""A training that was interrupted goes on as if nothing had happened."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS
from small_training import Killed, Recorder, build
from torch.utils.data import DataLoader

from mmrpa.hooks.exact_resume import (
    STATE_KEY,
    EndlessBatches,
    ExactResumeHook,
    SeededBatch,
    SeededBatches,
    seed_all,
)


def long(value):
    """A parameter whose twin runs in each suite."""
    return pytest.param(value, marks=pytest.mark.long)


@pytest.fixture(scope='module')
def whole_runs(tmp_path_factory):
    """A function that returns the record of an uninterrupted run."""
    runs = {}

    def run(by, **settings):
        settings.pop('workers', None)  # who loads an image changes nothing
        key = (by, *sorted(settings.items()))
        if key not in runs:
            runs[key] = Recorder()
            build(tmp_path_factory.mktemp('whole'), by, runs[key],
                  **settings).train()
        return runs[key]

    return run


def interrupt(tmp_path, kill_after, by, **settings):
    """A killed run, and the run that goes on after it."""
    hooks = settings.pop('hooks', tuple)
    killed, resumed = Recorder(kill_after), Recorder()
    with pytest.raises(Killed):
        build(tmp_path / 'killed', by, killed, hooks=hooks(),
              **settings).train()
    runner = build(tmp_path / 'killed', by, resumed, resume=True,
                   hooks=hooks(), **settings)
    runner.train()
    return killed, resumed


def assert_goes_on(whole, killed, resumed, first):
    steps = list(whole.losses)
    assert steps == list(range(1, 21))
    assert list(resumed.losses) == steps[first - 1:]
    for other in (killed, resumed):
        for step, loss in other.losses.items():
            assert other.images[step] == whole.images[step], step
            assert loss == pytest.approx(whole.losses[step], abs=1e-6), step
            assert other.inner[step] == whole.inner[step]
            assert other.lr[step] == whole.lr[step]
    assert len(set(whole.losses.values())) == 20


@pytest.mark.parametrize('by, workers, kill_after', [
    ('epoch', 0, 8),
    ('epoch', 0, 15),  # a checkpoint at the end of an epoch, but within it
    ('epoch', 2, 13),
    ('iter', 0, 8)])
def test_losses_go_on(by, workers, kill_after, tmp_path, whole_runs):
    killed, resumed = interrupt(tmp_path, kill_after, by, workers=workers)
    assert len(killed.losses) == kill_after
    assert_goes_on(whole_runs(by), killed, resumed, kill_after // 3 * 3 + 1)


@pytest.mark.parametrize('kill_after', [8, long(15)])
def test_steps_over_a_finite_sampler(kill_after, tmp_path, whole_runs):
    """DefaultSampler ends after five batches, and is shuffled anew."""
    settings = dict(by='iter', sampler='DefaultSampler')
    whole = whole_runs(**settings)
    killed, resumed = interrupt(tmp_path, kill_after, **settings)
    assert_goes_on(whole, killed, resumed, kill_after // 3 * 3 + 1)
    passes = [sum((whole.images[s] for s in range(i, i + 5)), [])
              for i in (1, 6, 11, 16)]
    assert all(sorted(set(p)) == list(range(13)) for p in passes)
    assert passes[0] != passes[1]


@DATA_SAMPLERS.register_module()
class Unseeded:
    """As torch's RandomSampler: whatever the global generator gives."""

    def __init__(self, dataset, shuffle, seed):
        self.num_images = len(dataset)

    def __len__(self):
        return self.num_images

    def __iter__(self):
        yield from torch.randperm(self.num_images).tolist()


@pytest.mark.parametrize('by', [long('epoch'), 'iter'])
def test_samplers_without_a_seed(by, tmp_path, whole_runs):
    settings = dict(by=by, sampler='Unseeded')
    whole = whole_runs(**settings)
    killed, resumed = interrupt(tmp_path, 13, **settings)
    assert_goes_on(whole, killed, resumed, 13)
    passes = [sum((whole.images[s] for s in range(i, i + 5)), [])
              for i in (1, 6, 11, 16)]
    assert all(sorted(p) == list(range(13)) for p in passes)
    assert len(set(map(tuple, passes))) == 4


@DATA_SAMPLERS.register_module()
class Grouped:
    """As mmdet's GroupMultiSourceSampler: draws a group for each batch."""

    def __init__(self, dataset, shuffle, seed):
        pass

    def __len__(self):
        return 13

    def __iter__(self):
        groups = itertools.cycle(range(6)), itertools.cycle(range(6, 13))
        while True:
            yield from itertools.islice(groups[np.random.choice(2)], 3)


@pytest.mark.parametrize('workers', [long(0), 2])
def test_samplers_that_draw_for_each_batch(workers, tmp_path, whole_runs):
    """Worker processes read ahead: after a start, several batches at once."""
    whole = whole_runs('iter', sampler='Grouped')
    killed, resumed = interrupt(tmp_path, 13, 'iter', sampler='Grouped',
                                workers=workers)
    assert_goes_on(whole, killed, resumed, 13)
    first = [images[0] < 6 for images in whole.images.values()]
    assert 0 < sum(first) < 20 and first[:10] != first[10:]


@pytest.mark.parametrize('by', [long('epoch'), 'iter'])
def test_without_a_seed_in_the_config(by, tmp_path):
    """The sampler's seed, too, is that of the first process."""
    recorder, resumed = Recorder(8), Recorder()
    with pytest.raises(Killed):
        build(tmp_path, by, recorder, seed=None).train()
    build(tmp_path, by, resumed, seed=None, resume=True).train()
    assert min(resumed.losses) == 7
    for step in (7, 8):
        assert resumed.images[step] == recorder.images[step]
        assert resumed.losses[step] == pytest.approx(recorder.losses[step],
                                                     abs=1e-6)


def test_averaged_weights_go_on(tmp_path):
    def hooks():
        return (EMAHook(momentum=0.1), )

    whole = Recorder()
    build(tmp_path / 'whole', 'iter', whole, hooks=hooks()).train()
    killed, resumed = interrupt(tmp_path, 8, 'iter', hooks=hooks)
    assert_goes_on(whole, killed, resumed, 7)
    ends = [torch.load(tmp_path / run / 'iter_20.pth', weights_only=False)
            for run in ('whole', 'killed')]
    for key in ('state_dict', 'ema_state_dict'):
        assert ends[0][key].keys() == ends[1][key].keys()
        for name, value in ends[0][key].items():
            torch.testing.assert_close(ends[1][key][name], value, rtol=0,
                                       atol=1e-6)
    history = [end['message_hub']['log_scalars']['train/loss'].data[0]
               for end in ends]
    np.testing.assert_allclose(history[1], history[0], atol=1e-6)
    assert len(history[0]) == 20


def test_checkpoints_by_epoch(tmp_path):
    """At the end of an epoch there is nothing to skip."""
    hook = dict(type='mmrpa.SafeCheckpointHook', interval=1)
    runs = []
    for kill_after, resume in ((None, False), (8, False), (None, True)):
        recorder = Recorder(kill_after)
        runner = build(tmp_path / str(kill_after or resume and 8), 'epoch',
                       recorder, resume=resume)
        runner._hooks = [h for h in runner._hooks
                         if type(h).__name__ != 'SafeCheckpointHook']
        runner.register_hook(dict(hook))
        if kill_after:
            with pytest.raises(Killed):
                runner.train()
        else:
            runner.train()
        runs.append(recorder)
    assert_goes_on(*runs, 6)


def test_mmengine_alone_does_not_go_on(tmp_path):
    """Else this hook would not be needed."""
    killed, resumed = interrupt(tmp_path, 8, 'epoch', hook=False)
    assert resumed.images[7] != killed.images[7]
    assert max(resumed.losses) > 20  # the epoch begins anew


def test_a_checkpoint_of_others_is_told(tmp_path, caplog):
    with pytest.raises(Killed):
        build(tmp_path, 'iter', Recorder(4), hook=False).train()
    resumed = Recorder()
    runner = build(tmp_path, 'iter', resumed, resume=True)
    with caplog.at_level('WARNING', logger=runner.logger.name):
        runner.logger.addHandler(caplog.handler)
        runner.train()
    assert 'written without ExactResumeHook' in caplog.text
    assert list(resumed.losses) == list(range(4, 21))


def test_another_batch_size_is_told(tmp_path, caplog):
    with pytest.raises(Killed):
        build(tmp_path, 'epoch', Recorder(8)).train()
    resumed = Recorder()
    runner = build(tmp_path, 'epoch', resumed, resume=True)
    runner._train_dataloader['batch_size'] = 4
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert 'batch_size=4, was 3' in caplog.text
    # Epoch 2 starts anew: 6 steps are behind, 3 epochs of 4 to come.
    assert list(resumed.losses) == list(range(7, 19))
    assert resumed.inner[7] == 0


@pytest.mark.parametrize('every, warned', [(3, True), (4, False)])
def test_accumulated_gradients_are_told(every, warned, tmp_path, caplog):
    runner = build(tmp_path, 'iter', Recorder(5), every=every, accumulate=2)
    runner.logger.addHandler(caplog.handler)
    with pytest.raises(Killed):
        runner.train()
    assert (tmp_path / f'iter_{every}.pth').exists()
    assert ('the gradients of 1 of 2 batches' in caplog.text) == warned


def test_accumulated_gradients_of_two_optimisers_are_told(tmp_path, caplog):
    runner = build(tmp_path, 'iter', Recorder())
    runner.logger.addHandler(caplog.handler)
    wrappers = [OptimWrapper(torch.optim.SGD(runner.model.parameters(), lr=1),
                             accumulative_counts=count) for count in (1, 4)]
    for wrapper in wrappers:
        wrapper._inner_count = 3
    runner.optim_wrapper = OptimWrapperDict(a=wrappers[0], b=wrappers[1])
    ExactResumeHook().before_save_checkpoint(runner, {})
    assert 'the gradients of 3 of 4 batches' in caplog.text
    assert caplog.text.count('the gradients of') == 1


def test_the_old_way_to_skip(tmp_path, monkeypatch, whole_runs):
    """mmengine 0.10.7 skips by next(), and starts its iterator at once."""
    from mmengine.runner.loops import (
        IterBasedTrainLoop,
        _InfiniteDataloaderIterator,
    )

    class Eager(_InfiniteDataloaderIterator):

        def __init__(self, dataloader):
            super().__init__(dataloader)
            self._iterator = iter(dataloader)
            next(self._iterator)  # as worker processes would

        skip_iter = property()

    def run(self):
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        while self._iter < self._max_iters:
            self.run_iter(next(self.dataloader_iterator))
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')

    whole = whole_runs('iter')
    monkeypatch.setattr('mmengine.runner.loops._InfiniteDataloaderIterator',
                        Eager)
    monkeypatch.setattr(IterBasedTrainLoop, 'run', run)
    killed, resumed = interrupt(tmp_path, 8, 'iter')
    assert_goes_on(whole, killed, resumed, 7)


def test_passes_beside_the_training_change_nothing():
    """PreciseBNHook reads the loader in between."""
    batches = SeededBatches([[0], [1]], lambda epoch: None)
    batches.key, batches.position = (5, ), 10
    loader = DataLoader([7, 8], batch_sampler=batches,
                        collate_fn=lambda values: (*values, random.random()))
    iterator = EndlessBatches(loader, batches)
    seen = []
    for _ in range(5):
        seen.append(next(iterator))
        list(loader)
    for number, (value, drawn) in enumerate(seen, 10):
        seed_all(5, number)
        assert (value, drawn) == (7 + number % 2, random.random())


def test_a_run_that_does_not_train_builds_no_training(tmp_path):
    runner = build(tmp_path, 'iter', Recorder())
    runner.call_hook('before_run')  # as Runner.test does
    assert isinstance(runner._train_loop, dict)
    assert isinstance(runner._train_dataloader, dict)


def draw() -> tuple[float, ...]:
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_seeds_are_streams():
    seed_all(1, 0, 7)
    first = draw()
    assert draw() != first
    seed_all(1, 0, 7)
    assert draw() == first
    for key in ((1, 0, 8), (1, 1, 7), (2, 0, 7), (1, 0, 7, 1)):
        seed_all(*key)
        assert not set(draw()) & set(first)


def test_a_batch_seeds_only_where_it_is_loaded():
    batch = SeededBatch([3, 4], (1, 2))
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    copy = pickle.loads(pickle.dumps(batch))  # on its way to a worker
    assert torch.rand(()) == wanted
    assert len(copy) == 2 and list(copy) == [3, 4]
    first = draw()
    list(batch)
    assert draw() == first


def test_a_batch_sampler_without_batches_is_an_error():
    batches = SeededBatches([], lambda epoch: None)
    batches.skip, batches.endless = 2, True
    with pytest.raises(ValueError, match='no batches'):
        next(iter(batches))


def test_what_is_written_down(tmp_path):
    with pytest.raises(Killed):
        build(tmp_path, 'iter', Recorder(4)).train()
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=False)
    assert saved[STATE_KEY] == dict(
        sampler_seeds=[None, 5], processes=1, batch_size=3, images=13)
