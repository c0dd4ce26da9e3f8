"""Checkpoints of training are read whole, and nothing else is run or read."""

import datetime
import hashlib
import os
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import (
    CheckpointLoader,
    _flexible_runner,
    checkpoint,
    load_checkpoint,
    runner,
)

from mmrpa import safe_loading
from mmrpa.resume_search import newest_good_checkpoint
from mmrpa.safe_loading import (
    find_refusal,
    forbid_unsafe,
    load_from_http,
    read_training_checkpoint,
    use_safe_reader,
)
from mmrpa.weights import CheckpointError, read_checkpoint


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch "{self.path}"', )


def content() -> dict:
    history = HistoryBuffer([3., 2.5], [1, 1])
    return dict(
        state_dict=dict(weight=torch.arange(600.).reshape(20, 30)),
        optimizer=dict(state={0: dict(step=torch.tensor(3.))}),
        message_hub=dict(
            log_scalars={'train/loss': history},
            runtime_info=dict(best_score=np.float64(0.25),
                              ids=np.arange(3, dtype=np.uint8))),
        meta=dict(
            epoch=1, time=datetime.datetime(2026, 1, 2, 3),
            config=ConfigDict(a=dict(b=1)), names=np.array(['x', 'yy'])))


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.save(content(), tmp_path / 'iter_3.pth')
    return tmp_path / 'iter_3.pth'


@pytest.fixture
def mmengine_loaders(monkeypatch):
    """Put back mmengine's own loaders after the test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    monkeypatch.setattr(checkpoint, 'load_from_http',
                        checkpoint.load_from_http)
    for module in (checkpoint, runner, _flexible_runner):
        monkeypatch.setattr(module, 'find_latest_checkpoint',
                            module.find_latest_checkpoint)


def test_all_that_training_needs_comes_back(saved):
    read, wanted = read_training_checkpoint(saved), content()
    assert torch.equal(read['state_dict']['weight'],
                       wanted['state_dict']['weight'])
    assert read['optimizer'] == wanted['optimizer']
    history = read['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    history.update(1.5)
    assert history.data[0].tolist() == [3., 2.5, 1.5]
    assert history.mean() == pytest.approx(7 / 3)
    assert history.statistics('min') == 1.5
    info = read['message_hub']['runtime_info']
    assert isinstance(info['best_score'], np.float64)
    assert info['best_score'] == 0.25
    assert info['ids'].dtype == np.uint8 and info['ids'].tolist() == [0, 1, 2]
    assert read['meta']['time'] == wanted['meta']['time']
    assert isinstance(read['meta']['config'], ConfigDict)
    assert read['meta']['config'].a.b == 1
    assert read['meta']['names'].tolist() == ['x', 'yy']


@pytest.mark.parametrize('where', ['meta', 'optimizer', 'state_dict'])
def test_code_is_refused_by_a_sentence(where, tmp_path, saved):
    bad = content()
    bad[where]['extra'] = Malicious(tmp_path / 'ran')
    torch.save(bad, saved)
    with pytest.raises(CheckpointError) as caught:
        read_training_checkpoint(saved)
    text = str(caught.value)
    assert str(saved) in text and 'posix.system' in text
    assert 'ask its author' in text and '\n' not in text
    assert not (tmp_path / 'ran').exists()
    torch.load(saved, weights_only=False)
    assert (tmp_path / 'ran').exists()  # the file is as bad as it claims


@pytest.mark.parametrize('owner, name', [
    (HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'),
    (np.ndarray, 'tofile'), (OneCycleParamScheduler, '__init__'),
    (OneCycleParamScheduler, 'build_iter_from_epoch')])
def test_getattr_gives_known_functions_only(owner, name, saved):

    class Getter:

        def __reduce__(self):
            return getattr, (owner, name)

    torch.save(dict(a=Getter()), saved)
    with pytest.raises(CheckpointError, match='builtins.getattr'):
        read_training_checkpoint(saved)


@pytest.mark.parametrize('anneal', ['cos', 'linear'])
def test_one_cycle_goes_on(anneal, tmp_path):
    """Its state holds a function of its class."""

    def build():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
        return OneCycleLR(optimizer, eta_max=0.1, total_steps=10,
                          anneal_strategy=anneal)

    def run(schedule, steps):
        values = []
        for _ in range(steps):
            schedule.optimizer.step()
            schedule.step()
            values += schedule.get_last_value()
        return values

    whole, first, second = build(), build(), build()
    wanted = run(whole, 9)
    run(first, 4)
    path = tmp_path / 'iter_4.pth'
    torch.save(dict(schedule=first.state_dict()), path)
    assert find_refusal(path, path) is None
    second.load_state_dict(read_training_checkpoint(path)['schedule'])
    assert run(second, 5) == wanted[4:]


def test_one_cycle_is_not_built(saved):

    class Builder:

        def __reduce__(self):
            return OneCycleParamScheduler, ()

    torch.save(dict(a=Builder()), saved)
    built = read_training_checkpoint(saved)['a']
    assert not isinstance(built, OneCycleParamScheduler) and not vars(built)


@pytest.mark.parametrize('reader', [read_training_checkpoint,
                                    read_checkpoint])
def test_changed_bytes_never_come_through(saved, reader):
    """Any byte of the file: refused, or harmless."""
    good = saved.read_bytes()
    wanted = content()['state_dict']['weight']
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(good), 300, replace=False):
        bad = bytearray(good)
        bad[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(bad)
        try:
            read = reader(saved)
        except CheckpointError as error:
            assert str(saved) in str(error) and '\n' not in str(error)
            refused += 1
        else:
            states = (read['state_dict'] if isinstance(read, dict)
                      else read.state_dict)
            assert torch.equal(states['weight'], wanted), place
    assert refused > 150  # padding and dates are what else there is


def test_torch_itself_reads_noise(saved):
    """The reason for the above: torch.load does not compare checksums."""
    good = saved.read_bytes()
    place = good.index(np.float32(300).tobytes() + np.float32(301).tobytes())
    saved.write_bytes(good[:place] + b'\x01' + good[place + 1:])
    noise = torch.load(saved, weights_only=False)['state_dict']['weight']
    assert not torch.equal(noise, content()['state_dict']['weight'])
    with pytest.raises(CheckpointError, match='do not fit their checksum'):
        read_training_checkpoint(saved)


@pytest.mark.parametrize('part', [0, 1, 3, 100, 0.5, 0.99, -1])
def test_a_file_cut_short_is_refused(saved, part):
    good = saved.read_bytes()
    end = int(part * len(good)) if isinstance(part, float) else part
    saved.write_bytes(good[:end])
    with pytest.raises(CheckpointError, match='iter_3.pth') as caught:
        read_training_checkpoint(saved)
    assert '\n' not in str(caught.value)


def test_zeros_after_a_power_cut_are_refused(saved):
    """A file system may keep a file's length and lose its blocks."""
    good = saved.read_bytes()
    saved.write_bytes(good[:2048] + bytes(len(good) - 2048))
    with pytest.raises(CheckpointError, match='damaged'):
        read_training_checkpoint(saved)


def test_mmengine_reads_by_it(saved, tmp_path, mmengine_loaders):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(20, 30))
    use_safe_reader()
    use_safe_reader()
    load_checkpoint(model, str(saved), map_location='cpu')
    assert torch.equal(model.weight, content()['state_dict']['weight'])
    torch.save(dict(a=Malicious(tmp_path / 'ran')), saved)
    with pytest.raises(CheckpointError, match='refused'):
        load_checkpoint(model, str(saved))
    assert not (tmp_path / 'ran').exists()
    with pytest.raises(FileNotFoundError, match="'no/such.pth' does not"):
        load_checkpoint(model, 'no/such.pth')


def how_mmengine_reads() -> list:
    return [*CheckpointLoader._schemes.items(), checkpoint.load_from_http,
            *(module.find_latest_checkpoint for module in (
                checkpoint, runner, _flexible_runner))]


@pytest.mark.parametrize('protected', [False, True])
def test_an_api_gives_the_loaders_back(protected, monkeypatch, tmp_path,
                                       mmengine_loaders):
    """And reads by ours itself, in a tool's process as in a user's."""
    from mmengine.config import Config
    from mmengine.registry import MODELS

    from mmrpa.flops import count_model

    def users_own(filename, map_location=None):
        raise AssertionError('the loader of the user is not asked')

    class Teaching(torch.nn.Module):

        def __init__(self, teacher):
            CheckpointLoader.load_checkpoint(teacher)

    monkeypatch.setitem(MODELS.module_dict, 'Teaching', Teaching)
    CheckpointLoader.register_scheme('', users_own, force=True)
    if protected:
        use_safe_reader()
    before = how_mmengine_reads()
    torch.save(dict(a=Malicious(tmp_path / 'ran')), tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match='holds more than weights'):
        count_model(Config(dict(
            default_scope='mmengine', model=dict(
                type='Teaching', teacher=str(tmp_path / 'bad.pth')))),
            (32, 32))
    assert not (tmp_path / 'ran').exists()
    assert how_mmengine_reads() == before


def test_who_asks_in_one_process_gets_mmengines_search(mmengine_loaders):
    """Ours waits for the other processes, who might not ask."""
    from mmengine.runner import find_latest_checkpoint
    use_safe_reader()
    assert checkpoint.find_latest_checkpoint is find_latest_checkpoint
    assert find_latest_checkpoint.__module__ == 'mmengine.runner.checkpoint'
    assert runner.find_latest_checkpoint is newest_good_checkpoint


def test_addresses_are_read_by_it(saved, tmp_path, monkeypatch,
                                  mmengine_loaders):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    fetched = []

    def fetch(url, target, progress):
        fetched.append(url)
        shutil.copy(saved, target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    use_safe_reader()
    for _ in range(2):
        read = CheckpointLoader.load_checkpoint('https://a.b/c/iter_3.pth?x=1')
        assert read['meta']['epoch'] == 1
    assert fetched == ['https://a.b/c/iter_3.pth?x=1']
    assert checkpoint.load_from_http is load_from_http
    torch.save(dict(a=Malicious(tmp_path / 'ran')), saved)
    with pytest.raises(CheckpointError, match='bad.pth holds more'):
        CheckpointLoader.load_checkpoint('http://a.b/bad.pth')
    assert not (tmp_path / 'ran').exists()


def test_an_address_that_does_not_answer(tmp_path):
    with socket.socket() as listener:  # bound, and nobody listens
        listener.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{listener.getsockname()[1]}/a.pth'
        with pytest.raises(CheckpointError, match='cannot be fetched') as said:
            load_from_http(url, model_dir=str(tmp_path))
    assert str(said.value).startswith(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name, warned', [
    ('model.pth', False), ('model-{}.pth', False),
    ('model-0123abcd.pth', True)])
def test_a_cached_file_is_told_of(name, warned, saved, tmp_path, monkeypatch,
                                  mmengine_loaders):
    """Another address may have had a file of that name."""
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    path = tmp_path / name.format(digest[:8])
    shutil.copy(saved, path)
    lines, warnings = [], []
    monkeypatch.setattr('mmengine.logging.print_log',
                        lambda text, logger: lines.append(text))
    monkeypatch.setattr(safe_loading, 'warn', warnings.append)
    url = f'https://a.b/c/{path.name}'
    assert load_from_http(url, model_dir=str(tmp_path))['meta']['epoch'] == 1
    assert lines == [f'using the cached {path} for {url}']
    assert len(warnings) == warned
    assert not warned or digest[:8] in warnings[0]


def test_what_else_reads_is_told_to_refuse(saved, tmp_path, monkeypatch,
                                           capsys):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    for _ in range(2):
        forbid_unsafe()
    assert capsys.readouterr().err.count(
        'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored') == 1
    torch.save(dict(a=Malicious(tmp_path / 'ran')), saved)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved, weights_only=False)
    assert not (tmp_path / 'ran').exists()


def test_old_files_without_checksums_are_read(saved):
    torch.save(dict(state_dict=dict(a=torch.ones(2))), saved,
               _use_new_zipfile_serialization=False)
    assert read_training_checkpoint(saved)['state_dict']['a'].sum() == 2


def test_safetensors_give_weights(tmp_path):
    library = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'a.safetensors'
    library.save_file(dict(a=torch.ones(3)), str(path))
    assert safe_loading.load_from_local(str(path))['a'].sum() == 3
