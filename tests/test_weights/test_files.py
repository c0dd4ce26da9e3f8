"""Files are read without running what is in them, or refused in one line."""

import argparse
import builtins
import datetime
import errno
import functools
import http.server
import importlib
import os
import pathlib
import pickle
import re
import resource
import threading
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR

from mmrpa.weights import CheckpointError, read_checkpoint, write_checkpoint
from mmrpa.weights.files import check_output

STATE = {'a.weight': torch.arange(6.).view(2, 3), 'a.bias': torch.ones(2)}


def save(path, content):
    torch.save(content, path)
    return path


def same(state):
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(state[name], value)


@pytest.mark.parametrize('wrap,key', [
    (lambda s: s, ''),
    (lambda s: dict(state_dict=s, epoch=3), 'state_dict'),
    (lambda s: dict(model=s, optimizer={}), 'model'),
    (lambda s: dict(model=dict(state_dict=s)), 'model.state_dict'),
    (lambda s: dict(model={'b': torch.zeros(1)}, model_ema=s), 'model_ema'),
    (lambda s: dict(state_dict={'b': torch.zeros(1)}, state_dict_ema=s),
     'state_dict_ema'),
])
@pytest.mark.parametrize('legacy', [True, False])
def test_weights_are_found(tmp_path, wrap, key, legacy):
    path = tmp_path / 'a.pth'
    # Files from before torch 1.6 are no zip archives; PVT's are such.
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    same(checkpoint.state_dict)
    assert checkpoint.key == key and checkpoint.meta == {}


def test_a_key_chooses(tmp_path):
    path = save(tmp_path / 'a.pth', dict(
        model=STATE, model_ema={'b': torch.zeros(1)}))
    same(read_checkpoint(path, 'model').state_dict)
    with pytest.raises(CheckpointError, match='it has model, model_ema'):
        read_checkpoint(path, 'ema')


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f'a{suffix}'
    whole = torch.zeros(1000, 3)
    state = dict(STATE, view=whole[:2], turned=torch.ones(2, 3).t(),
                 half=torch.ones(2, dtype=torch.float16))
    meta = dict(arch='rp_swin_tiny', new={'x.anchors': 'init'})
    write_checkpoint(path, state, meta)
    checkpoint = read_checkpoint(path)
    assert checkpoint.meta == meta
    assert checkpoint.state_dict.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(checkpoint.state_dict[name], value)
        assert checkpoint.state_dict[name].dtype == value.dtype
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size < 4000  # not all of ``whole``
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_failed_write_leaves_nothing(tmp_path, suffix):
    """A real one, that does not fit on the disk."""
    path = tmp_path / f'a{suffix}'
    path.write_bytes(b'old')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            write_checkpoint(path, {'a': torch.ones(9999)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == [path.name]


def test_no_weights_are_not_written(tmp_path):
    with pytest.raises(ValueError, match='state_dict is empty'):
        write_checkpoint(tmp_path / 'a.pth', {}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name,error', [
    ('a.bin', ValueError), ('.', ValueError),
    ('no/a.pth', FileNotFoundError)])
def test_bad_outputs(tmp_path, name, error):
    with pytest.raises(error, match='output'):
        check_output(tmp_path / name)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('safetensors'):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ModuleNotFoundError, match='pip install safetensors'):
        check_output(tmp_path / 'a.safetensors')
    write_checkpoint(tmp_path / 'a.pth', STATE, {})
    same(read_checkpoint(tmp_path / 'a.pth').state_dict)


def test_mmengine_checkpoints_are_read(tmp_path):
    """Their message hub holds numpy arrays and functions by name."""
    buffer = HistoryBuffer([1.5, 2.5], [1, 1])
    content = dict(
        meta=dict(epoch=3, cfg='model = dict()', seed=0,
                  time=datetime.datetime(2026, 1, 2,
                                         tzinfo=datetime.timezone.utc),
                  dataset_meta=ConfigDict(a=dict(b=1)), part=slice(1, 2)),
        state_dict=STATE,
        param_schedulers=[OneCycleLR(
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1),
            eta_max=0.1, total_steps=10).state_dict()],
        message_hub=dict(
            log_scalars={'train/loss': buffer},
            runtime_info={'lr': np.float64(0.1), 'iter': np.int64(3),
                          'best': np.zeros(3, np.float32)},
            resumed_keys={'train/loss': True}))
    path = save(tmp_path / 'epoch_3.pth', content)
    assert b'getattr' in path.read_bytes()  # a harder pickle than it seems
    same(read_checkpoint(path).state_dict)


def test_training_settings_are_skipped(tmp_path):
    args = argparse.Namespace(lr=0.1, output=pathlib.PosixPath('/out'))
    path = save(tmp_path / 'a.pth', dict(model=STATE, args=args))
    same(read_checkpoint(path).state_dict)


class Payload:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def by_getattr(module, name):
    """The function ``module.name`` as a pickle reaches it by getattr."""
    return Payload(getattr, Payload(importlib.import_module, module), name)


class Nested:

    def __init__(self, first, *args):
        self.first, self.args = first, args

    def __reduce__(self):
        return Payload, (self.first, *self.args)


@pytest.mark.parametrize('payload', [
    lambda target: Payload(os.system, f'touch {target}'),
    lambda target: Payload(exec, f'open({target!r}, "w")'),
    lambda target: Payload(pathlib.Path.touch, pathlib.PosixPath(target)),
    lambda target: by_getattr('os', 'system'),
    lambda target: Nested(print, 1),
], ids=['system', 'exec', 'method', 'getattr', 'class'])
@pytest.mark.parametrize('legacy', [True, False])
def test_code_is_refused_and_not_run(tmp_path, payload, legacy):
    target = tmp_path / 'pwned'
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=STATE, x=payload(str(target))), path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as info:
        read_checkpoint(path)
    text = str(info.value)
    assert '\n' not in text and 'refused' in text, text
    assert 'safetensors' in text
    assert not target.exists()


def test_getattr_is_a_stand_in(tmp_path):
    """What a pickle gets by getattr is nothing, not what it asked for."""
    path = save(tmp_path / 'a.pth', dict(
        state_dict=STATE, x=Payload(getattr, torch.Tensor, 'numpy')))
    same(read_checkpoint(path).state_dict)
    content = torch.load(path, weights_only=False)
    assert content['x'] is torch.Tensor.numpy  # so it was a real attempt
    calling = tmp_path / 'b.pth'
    calling.write_bytes(
        b'\x80\x02c__builtin__\ngetattr\nctorch\nTensor\nX\x05\x00\x00\x00'
        b'numpy\x86R)R.')
    with pytest.raises(CheckpointError):
        read_checkpoint(calling)


def damage_zip(content):
    return b'XX' + content[2:]


def damage_middle(content):
    half = len(content) // 2
    return content[:half] + bytes(64) + content[half + 64:]


BAD = {
    'empty': (lambda c: b'', 'is empty'),
    'html': (lambda c: b'\n <!DOCTYPE html><html>log in</html>', 'web page'),
    'lfs': (lambda c: b'version https://git-lfs.github.com/spec/v1\n', 'LFS'),
    'gzip': (lambda c: b'\x1f\x8b\x08' + c, 'an archive'),
    'truncated': (lambda c: c[:len(c) // 2], 'damaged'),
    'tail': (lambda c: c[:-30], 'damaged'),
    'magic': (damage_zip, 'damaged'),
    'noise': (lambda c: bytes(range(256)) * 8, 'damaged'),
    'text': (lambda c: b'just some words, no weights at all', 'damaged'),
}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('legacy', [True, False])
def test_damaged_files(tmp_path, suffix, kind, legacy):
    path = tmp_path / f'a{suffix}'
    if suffix == '.pth':
        torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    else:
        write_checkpoint(path, STATE, {})
    damage, match = BAD[kind]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=match) as info:
        read_checkpoint(path)
    assert '\n' not in str(info.value)
    assert str(path) in str(info.value)


def test_files_that_hold_something_else(tmp_path):
    path = save(tmp_path / 'a.pth', torch.zeros(3))
    with pytest.raises(CheckpointError, match='one Tensor'):
        read_checkpoint(path)
    path = save(tmp_path / 'a.pth', dict(epoch=3))
    with pytest.raises(CheckpointError, match='its keys are epoch'):
        read_checkpoint(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'words')
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match='TorchScript program'):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(STATE))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r'no\.pth'):
        read_checkpoint(tmp_path / 'no.pth')
    with pytest.raises(CheckpointError, match='is a folder'):
        read_checkpoint(tmp_path)


def test_an_address_is_fetched(tmp_path):
    save(tmp_path / 'a.pth', STATE)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        same(read_checkpoint(f'{address}/a.pth').state_dict)
        with pytest.raises(OSError, match='404'):
            read_checkpoint(f'{address}/b.pth')
        server.shutdown()
    with pytest.raises(CheckpointError, match="'nowhere':// addresses"):
        read_checkpoint('nowhere://a.pth')
