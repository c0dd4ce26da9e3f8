"""Pickles with code in them are refused, wherever a tool takes weights."""

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import needs_export, write_classifier, write_weights
from helpers import TOOLS, load_tool, mmdet_models
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader, checkpoint
from PIL import Image

from mmrpa import launch
from mmrpa.safe_loading import read_training_checkpoint

ROOT = TOOLS.parent
DETECTOR = str(next((ROOT / 'configs/mmdet/quickstart').glob('*.py')))
SEGMENTOR = str(next((ROOT / 'configs/mmseg/quickstart').glob('*.py')))
PIPELINE = [dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')]
# Classes of hosts that read a file when they are built: mmdet's distillation
# by mmengine's load_checkpoint, others by torch.load itself.
READERS = """
import torch
from mmengine.runner import load_checkpoint
from mmpretrain.models import GlobalAveragePooling
from mmpretrain.registry import MODELS


@MODELS.register_module(force=True)
class LoadingNeck(GlobalAveragePooling):
    def __init__(self, file, by):
        super().__init__()
        if by == 'mmengine':
            load_checkpoint(self, file, map_location='cpu')
        else:
            torch.load(file, weights_only=False)
"""


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch "{self.path}"', )


@pytest.fixture(scope='module')
def material(tmp_path_factory) -> Path:
    """A config, good weights, images, and a file with code in it."""
    folder = tmp_path_factory.mktemp('security')
    (folder / 'readers.py').write_text(READERS)
    config = write_classifier(folder)
    write_weights(config)
    (folder / 'teacher').mkdir()
    write_weights(write_classifier(folder / 'teacher', attention='window'))
    rng = np.random.default_rng(0)
    for name in ('cat', 'dog'):
        (folder / 'images' / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(
            folder / 'images' / name / '0.png')
    cfg = Config.fromfile(config)
    loader = dict(
        batch_size=1, num_workers=0, persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='CustomDataset', data_root=str(folder / 'images'),
                     metainfo=dict(classes=('cat', 'dog')),
                     pipeline=PIPELINE))
    cfg.merge_from_dict(dict(
        train_dataloader=loader, test_dataloader=loader,
        test_cfg=dict(), test_evaluator=dict(type='Accuracy', topk=1),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        work_dir='work', custom_imports=dict(imports=['readers'])))
    cfg.dump(config)
    cfg.model.backbone = dict(type='ResNet', depth=18)
    cfg.model.head.in_channels = 512
    cfg.dump(folder / 'resnet.py')
    state = torch.load(folder / 'weights.pth', weights_only=True)
    # The weights alone would do: only the code is wrong with it.
    torch.save(dict(state, extra=Malicious(folder / 'ran')),
               folder / 'evil.pth')
    return folder


@pytest.fixture
def here(material, tmp_path, monkeypatch) -> Path:
    """The working folder of a tool; mmengine's loaders come back later."""
    monkeypatch.chdir(tmp_path)
    (material / 'ran').unlink(missing_ok=True)
    monkeypatch.syspath_prepend(str(material))
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    monkeypatch.setattr(checkpoint, 'load_from_http',
                        checkpoint.load_from_http)
    # mmengine's own, so that only the tool's own protection is at work.
    CheckpointLoader.register_scheme('', checkpoint.load_from_local,
                                     force=True)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    # Loggers of another test write where nobody reads any more.
    monkeypatch.setattr(MMLogger, '_instance_dict', {})
    return tmp_path


def run_tool(name: str, argv: list) -> int:
    """The exit code of a tool that is run in this process."""
    if name in ('train', 'test'):
        with pytest.raises(SystemExit) as end:
            launch.run(name, '', argv)
        return end.value.code
    return load_tool(name).main(argv)


def prepare_resume(work_dir: Path, evil: str) -> None:
    """A working folder whose newest checkpoint has code in it."""
    work_dir.mkdir()
    (work_dir / 'last_checkpoint').write_text(evil)


def prepare_alignment(work_dir: Path, evil: str, argv: list) -> None:
    """The same for an alignment of these settings, as it begins itself."""
    tool = load_tool('align_attention')
    kept = []

    def stop(folder, record):
        kept.append(record)
        raise ValueError

    tool.check_resume = stop
    assert tool.main(argv) == 2
    prepare_resume(work_dir, evil)
    before = dict(features={}, layers={})
    (work_dir / 'align_attention.json').write_text(
        json.dumps(dict(kept[0], before=before)))


PLACES = {
    'load_from': ('train', 'C --no-preflight --cfg-options load_from=E'),
    'resume FILE': ('train', 'C --no-preflight --resume E'),
    'resume': ('train', 'C --no-preflight --resume'),
    'init_cfg of the backbone': (
        'train', 'C --no-preflight --cfg-options '
        'model.backbone.init_cfg.type=Pretrained '
        'model.backbone.init_cfg.checkpoint=E'),
    'init_cfg of the head': (
        'train', 'C --no-preflight --cfg-options '
        'model.head.init_cfg.type=Pretrained '
        'model.head.init_cfg.checkpoint=E model.head.init_cfg.prefix=head'),
    'init_cfg of the model': (
        'train', 'C --no-preflight --cfg-options '
        'model.init_cfg.type=Pretrained model.init_cfg.checkpoint=E'),
    'a class that reads by mmengine': (
        'train', 'C --no-preflight --cfg-options model.neck.by=mmengine N'),
    'a class that reads by torch': (
        'train', 'C --no-preflight --cfg-options model.neck.by=torch N'),
    'test': ('test', 'C E --no-preflight'),
    'convert': ('convert_checkpoint', 'E out.pth --config C'),
    'align, teacher': ('align_attention', 'C E I --out out.pth'),
    'align, init': ('align_attention', 'C T I --out out.pth --init E'),
    'align, resume': (
        'align_attention', 'C T I --out out.pth --work-dir work --resume '
        '--batch-size 2 --num-workers 0 --size 64 64'),
    'visualize': ('visualize_routing', 'C E P'),
    'explorer': ('routing_explorer', 'C E'),
    'explorer, further model': ('routing_explorer', 'C W --model other C E'),
    'export': ('export_onnx', 'C E'),
    'flops, a class that reads': (
        'get_flops', 'C --cfg-options model.neck.by=mmengine N'),
    'swap --check, a class that reads': (
        'swap_backbone', 'R --arch rp_swin_tiny --check --cfg-options '
        'model.neck.by=mmengine N'),
    'benchmark of the hook': (
        'benchmark_routing_stats', 'C --steps 2 --interval 2 --cfg-options '
        'load_from=E'),
    'figures, detector': ('quickstart_figures', 'D E S E .'),
}


@pytest.mark.parametrize('place', [
    pytest.param(place, marks=needs_export) if place == 'export' else place
    for place in PLACES])
def test_code_in_a_checkpoint_is_refused(place, material, here, capsys):
    name, text = PLACES[place]
    if ' D ' in f' {text} ':
        mmdet_models()
    evil = str(material / 'evil.pth')
    neck = ['model.neck.type=LoadingNeck', f'model.neck.file={evil}']
    words = dict(
        C=[str(material / 'classifier.py')], E=[evil], N=neck,
        T=[str(material / 'teacher/weights.pth')],
        R=[str(material / 'resnet.py')],
        W=[str(material / 'weights.pth')], I=[str(material / 'images')],
        P=[str(material / 'images/cat/0.png')], D=[DETECTOR], S=[SEGMENTOR])
    argv = [part for word in text.split()
            for part in words.get(word, [word.replace('=E', f'={evil}')])]
    if place == 'resume':
        prepare_resume(here / 'work', evil)
    elif place == 'align, resume':
        prepare_alignment(here / 'work', evil, argv)
    capsys.readouterr()
    assert run_tool(name, argv) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(name)]
    assert len(said) == 1 and evil in said[0], lines
    assert 'holds more than weights' in said[0] and 'refused' in said[0]
    assert 'Traceback' not in '\n'.join(lines)
    assert not (material / 'ran').exists()
    assert not (here / 'out.pth').exists()


def test_text_in_a_checkpoint_is_not_run(material, here):
    """mmengine runs meta['config'] as Python, whatever read the file."""
    config = str(material / 'classifier.py')
    launch.run('train', '', [config, '--no-preflight'])
    path = str(here / 'text.pth')
    state = read_training_checkpoint('work/epoch_1.pth')
    assert 'config' not in state['meta']  # mmengine's own do not need it
    state['meta']['config'] = f'open({str(material / "ran")!r}, "w").close()'
    torch.save(state, path)
    launch.run('train', '', [config, '--no-preflight', '--resume', path])
    assert not (material / 'ran').exists()


def test_the_file_is_as_bad_as_it_claims(material):
    """It would have been noticed above."""
    torch.load(material / 'evil.pth', weights_only=False)
    (material / 'ran').unlink()


# What unpickles or runs a file, by the last part of its name.
FORBIDDEN = {
    'unsafe_load', 'full_load', 'load_url', 'load_state_dict_from_url',
    'eval', 'exec', 'Unpickler', 'system', 'popen', 'get_state_dict'}
# Modules whose load or loads runs what is in a file.
MODULES = ('pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle', 'shelve',
           'marshal', 'jit', 'hub', 'yaml')
# What a host's loader, or a class of a host that is built, may read.
HOSTS = {
    'load_checkpoint', '_load_checkpoint', 'load_from_local', 'init_detector',
    'init_model', 'init_segmentor', 'get_model', 'from_cfg', 'Runner',
    'init_weights', 'resume', 'DetInferencer', 'MMSegInferencer',
    'ImageClassificationInferencer'}
BUILDERS = ('MODELS', 'models', 'RUNNERS', 'DETECTORS')
PROTECTIONS = {'protect_process', 'safe_reader', 'use_safe_reader'}
ALLOWED = {
    # A child process with the code that the doctor itself sends.
    ('mmrpa/doctor/probes.py', 'exec'),
    # Its Runner has mmrpa.SafeCheckpointHook, which registers the reader
    # before anything is loaded; the tool protects its process besides.
    ('mmrpa/transfer/runs.py', 'Runner'),
    # Backbones of mmrpa, which read by mmrpa.weights, without init_weights.
    ('mmrpa/transfer/runs.py', 'MODELS.build'),
    ('mmrpa/weights/archs.py', 'MODELS.build'),
    ('tools/convert_checkpoint.py', 'MODELS.build'),
    ('tools/benchmark_backbones.py', 'MODELS.build'),
}


def find_loads(source: str, name: str) -> list[str]:
    """What in a module could run code out of a file."""
    tree, found, calls = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module == 'torch' and 'load' in names:
                found.append(f'{name}:{node.lineno} imports torch.load')
            if node.module in MODULES and names & {'load', 'loads'}:
                found.append(f'{name}:{node.lineno} imports {node.module}')
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        *owner, last = call.split('.')
        calls.add(last)
        options = {key.arg: ast.unparse(key.value) for key in node.keywords}
        place = f'{name}:{node.lineno} {call}'
        if call == 'torch.load' and options.get('weights_only') != 'True':
            found.append(place)
        elif last in ('load', 'loads') and owner and owner[-1] in MODULES:
            found.append(place)
        elif options.get('allow_pickle', 'False') != 'False' or (
                options.get('shell', 'False') != 'False'):
            found.append(place)
        elif last in FORBIDDEN and (not owner or owner[-1] in ('os', 'pickle',
                                                               'builtins')):
            if (name, last) not in ALLOWED:
                found.append(place)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or calls & PROTECTIONS:
            continue
        call = ast.unparse(node.func)
        *owner, last = call.split('.')
        built = last == 'build' and owner and owner[-1] in BUILDERS
        short = f'{owner[-1]}.build' if built else last
        if (built or last in HOSTS) and (name, short) not in ALLOWED:
            found.append(f'{name}:{node.lineno} {call}, and no call of '
                         'protect_process in this file')
    return found


def test_no_unsafe_load_comes_in_unnoticed():
    files = [*(ROOT / 'mmrpa').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    assert len(files) > 80
    found = [line for path in files for line in find_loads(
        path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('source', [
    'torch.load(p)', 'torch.load(p, weights_only=False)',
    'torch.load(p, weights_only=flag)', 'from torch import load',
    'import pickle\npickle.load(f)', 'from pickle import loads',
    'pickle.Unpickler(f).load()', 'np.load(p, allow_pickle=True)',
    'yaml.load(t, yaml.Loader)', 'torch.jit.load(p)', 'torch.hub.load(a, b)',
    'joblib.load(p)', 'eval(text)', 'subprocess.run(x, shell=True)',
    'load_checkpoint(model, p)', 'init_detector(c, p)',
    'CheckpointLoader.load_checkpoint(p)', 'MODELS.build(cfg.model)',
    'Runner.from_cfg(cfg)', 'model.init_weights()'])
def test_unsafe_loads_are_noticed(source):
    assert find_loads(source, 'mmrpa/new.py')
