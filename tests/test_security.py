"""Pickles with code in them are refused, wherever a tool takes weights."""

import json
import os
import sys
import textwrap
from collections import Counter
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
from unsafe_reads import find_reads

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
    assert state['meta']['epoch'] == 1
    program = f'open({str(material / "ran")!r}, "w").close()'
    state['meta']['config'] = program
    torch.save(state, path)
    Path('work/epoch_1.pth').unlink()
    launch.run('train', '', [
        config, '--no-preflight', '--resume', path, '--cfg-options',
        'train_cfg.max_epochs=2'])
    assert not (material / 'ran').exists()
    # The second epoch alone was trained.
    assert not Path('work/epoch_1.pth').exists()
    resumed = read_training_checkpoint('work/epoch_2.pth')
    assert resumed['meta']['epoch'] == 2
    assert resumed['meta']['iter'] == 2 * state['meta']['iter']
    # mmengine would have run it so.
    Config.fromstring(program, '.py')
    (material / 'ran').unlink()


def test_the_file_is_as_bad_as_it_claims(material):
    """It would have been noticed above."""
    torch.load(material / 'evil.pth', weights_only=False)
    (material / 'ran').unlink()


# Where what is found does no harm, and how often it is there.
ALLOWED = {
    # Run by launch.run behind its protect_process.
    ('mmrpa/launch.py', 'unprotected run_path'): 1,
    # The runners' method, which launch.run wraps behind it.
    ('mmrpa/testing.py', 'unprotected load_checkpoint'): 1,
    # The reader itself, where mmengine gets it.
    ('mmrpa/safe_loading.py', 'unprotected load_from_local'): 1,
    # An export's own program, just written, to check it.
    ('mmrpa/export/formats.py', 'torch.export.load'): 1,
    # Its Runner has mmrpa.SafeCheckpointHook, which registers the reader
    # before anything is loaded; the tool protects its process besides.
    ('mmrpa/transfer/runs.py', 'unprotected Runner'): 1,
    # Backbones of mmrpa, which read by mmrpa.weights, without init_weights.
    ('mmrpa/transfer/runs.py', 'unprotected MODELS.build'): 2,
    ('mmrpa/flops.py', 'unprotected MODELS.build'): 1,
    ('tools/benchmark_backbones.py', 'unprotected MODELS.build'): 4,
}


def test_no_unsafe_load_comes_in_unnoticed():
    files = [*(ROOT / 'mmrpa').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    assert len(files) > 80
    found, lines = Counter(), []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        for line, what in find_reads(path.read_text(),
                                     name.startswith('tools/')):
            found[name, what] += 1
            lines.append(f'{name}:{line} {what}')
    assert found == ALLOWED, '\n'.join(lines)


UNSAFE = [
    'torch.load(p)', 'torch.load(p, weights_only=False)',
    'torch.load(p, weights_only=flag)', 'torch.load(p, None, None, True)',
    'torch.load(p, **options)', 'from torch import load',
    'import torch as t\nt.load(p)', 'read = torch.load\nread(p)',
    't = torch\nt.load(p)', 'getattr(torch, "load")(p)',
    'functools.partial(torch.load, weights_only=True)(p)',
    'map(torch.load, paths)', 'torch.serialization.load(p)',
    'import torch.serialization as s\ns.load(p)', 'torch.jit.load(p)',
    'from torch.jit import load\nload(p)', 'torch.hub.load(a, b)',
    'from torch.hub import load_state_dict_from_url',
    'torch.package.PackageImporter(p)', 'torch.export.load(p)',
    'import pickle\npickle.load(f)', 'from pickle import loads',
    'from pickle import *', 'import pickle as p\np.load(f)',
    'pickle.Unpickler(f).load()', 'class U(pickle.Unpickler):\n    pass',
    'import _pickle\n_pickle.load(f)', 'pickle._load(f)',
    '__import__("pickle").load(f)', 'import_module("pickle").loads(b)',
    'np.load(p, allow_pickle=True)', 'np.load(p, None, True)',
    'import numpy as n\nn.load(p, None, True)', 'pd.read_pickle(p)',
    'yaml.load(t, yaml.Loader)', 'yaml.unsafe_load(t)', 'joblib.load(p)',
    'from joblib import load', 'shelve.open(p)', 'mmengine.load(p)',
    'import mmengine as m\nm.load(p)', 'from mmengine import load',
    'from mmengine.fileio import load',
    'from mmengine.fileio.io import load', 'import mmengine.fileio as f\n'
    'f.load(p)', 'eval(text)', 'run = exec\nrun(text)', 'os.system(x)',
    'from os import system', 'subprocess.run(x, shell=True)',
    'subprocess.run(x, shell=1)', 'Config.fromstring(t, ".py")',
    'dill.load(f)', 'cloudpickle.loads(b)', 'marshal.loads(b)', 'mmcv.load(p)',
    'load_url(u)', 'yaml.full_load(t)', 'weights.get_state_dict()',
    'os.popen(x)']
# Only where nothing protects the process.
HOSTS = [
    'load_checkpoint(model, p)', 'read = load_checkpoint\nread(model, p)',
    'from mmengine.runner import load_checkpoint as read\nread(model, p)',
    'init_detector(c, p)', 'partial(init_model, device="cpu")',
    'CheckpointLoader.load_checkpoint(p)', 'MODELS.build(cfg.model)',
    'from mmengine.registry import MODELS as M\nM.build(cfg)',
    'build = MODELS.build\nbuild(cfg)', 'Runner(model)',
    'from mmengine.runner import Runner as R\nR(model)',
    'Runner.from_cfg(cfg)', 'model.init_weights()', 'runner.resume(p)',
    'runpy.run_path(p)', 'DetInferencer(c, p)', 'init_segmentor(c, p)',
    'get_model(name)', 'models.build(cfg)', 'MMSegInferencer(name)',
    'ImageClassificationInferencer(name)', 'RUNNERS.build(cfg)',
    'FlexibleRunner(model)', 'DETECTORS.build(cfg)', 'load_from_local(p)',
    'runner._load_checkpoint(p)']
# A protection that is somewhere else, or that may not be reached.
UNPROTECTED = [
    'protect_process\nload_checkpoint(m, p)',
    'def main():\n    load_checkpoint(m, p)\n    protect_process()',
    'def main():\n    if x:\n        protect_process()\n'
    '    load_checkpoint(m, p)',
    'def f():\n    protect_process()\ndef g():\n    load_checkpoint(m, p)',
    'load_checkpoint(m, p)\ndef main():\n    protect_process()',
    'def f():\n    with safe_reader():\n        pass\n    init_model(c, p)']
SAFE = [
    'torch.load(p, "cpu", weights_only=True)', 'np.load(p)', 'json.load(f)',
    'import torch as t\nt.load(p, weights_only=True)', 'image.load()',
    'model.eval()', 'args.resume', 'isinstance(runner, Runner)',
    'def f():\n    use_safe_reader()\n    load_checkpoint(m, p)',
    'def f():\n    with safe_reader():\n        MODELS.build(cfg)']
PROTECTED_TOOL = ('def main():\n    protect_process()\n'
                  'def f():\n    load_checkpoint(m, p)')


def behind_protection(source: str) -> str:
    return 'def f():\n    protect_process()\n' + textwrap.indent(
        source, '    ')


@pytest.mark.parametrize('source', UNSAFE)
def test_unsafe_loads_are_noticed(source):
    assert find_reads(source)
    assert find_reads(behind_protection(source))


@pytest.mark.parametrize('source', HOSTS)
def test_unprotected_loads_are_noticed(source):
    assert find_reads(source)
    assert not find_reads(behind_protection(source))


@pytest.mark.parametrize('is_tool', [False, True])
@pytest.mark.parametrize('source', UNPROTECTED)
def test_unsafe_loads_beside_a_protection_are_noticed(source, is_tool):
    assert find_reads(source, is_tool)


def test_safe_loads_are_left_alone():
    for source in SAFE:
        assert not find_reads(source), source
    assert not find_reads(PROTECTED_TOOL, is_tool=True)
    assert find_reads(PROTECTED_TOOL)
