"""Findings in environments of crafted files, and a healthy one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_environments import ROOT, Environment

from mmrpa.doctor.findings import PYTHONS, TESTED

# Just what the probes of mmrpa/doctor/probes.py ask of each package.
TORCH = """
__version__ = '2.11.0'
class version:
    cuda = None
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
class tensor(list):
    tolist = lambda self: list(self)
class from_numpy(list):
    sum = lambda self: sum(list(self))
"""
KEPT = 'import torch\ndef nms(*a, **k): return {}\n'
LOAD = 'def load(f):\n    return torch.load(f, weights_only=True)\n'
MMCV = {
    'mmcv/__init__.py': "__version__ = '2.3.6'\n",
    'mmcv/ops/__init__.py': KEPT.format('0, torch.tensor([0])') +
    "def get_compiling_cuda_version(): return 'not available'\n",
    'mmcv/_ext.so': ''
}
HEALTHY = {
    'torch': ('2.11.0', {'torch/__init__.py': TORCH}),
    'torchvision': ('0.26.0', {
        'torchvision/__init__.py': "from . import ops\n__version__ = '0'\n",
        'torchvision/ops.py': KEPT.format('torch.tensor([0])')}),
    'numpy': ('2.2.6', {'numpy/__init__.py':
                        "__version__ = '2.2.6'\nones = lambda n: [1] * n\n"}),
    'opencv-python-headless': ('4.12.0.88', {
        'cv2/__init__.py': "__version__ = '4.12.0'\n"}),
    'pycocotools': ('2.0.11', {'pycocotools/__init__.py': '',
                               'pycocotools/mask.py': ''}),
    'setuptools': ('81.0.0', {}),
    'pip': ('26.0', {'pip/__init__.py': '', 'pip/__main__.py': ''}),
    'safetensors': ('0.8.0', {}),
    'ninja': ('1.13.2', {}),
    'onedl-mmcv': ('2.3.6', MMCV),
    'onedl-mmengine': ('0.10.12', {
        'mmengine/__init__.py': "__version__ = '0.10.12'\n",
        'mmengine/runner/__init__.py': '',
        'mmengine/runner/checkpoint.py': LOAD,
        'mmengine/config/utils.py': "MAP = {'mmseg': 'mmsegmentation'}\n"}),
    **{name: (version, {f'{package}/__init__.py': "__version__ = '1'\n",
                        **{f'{package}/{part}/__init__.py': '' for part in
                           ('models', 'datasets', 'evaluation')}})
       for name, version, package in (
           ('onedl-mmdetection', '3.5.1', 'mmdet'),
           ('onedl-mmsegmentation', '1.4.2', 'mmseg'),
           ('onedl-mmpretrain', '1.3.6', 'mmpretrain'))},
}


@pytest.fixture
def make(tmp_path):
    """A healthy crafted environment, but for what is changed."""

    def make(without=(), extra=(), **changed):
        environment = Environment(tmp_path / 'env')
        for name, (version, files) in HEALTHY.items():
            if name not in without:
                environment.add(name, version, files)
        for args in extra:
            environment.add(*args)
        for path, text in changed.get('files', {}).items():
            (environment.site / path).parent.mkdir(parents=True, exist_ok=True)
            (environment.site / path).write_text(text)
        return environment

    return make


def test_tested_environment_has_no_problems():
    """The one that runs this test, with all real imports."""
    # Activated: commands would name its Python otherwise.
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run([sys.executable, '-m', 'mmrpa.doctor'], cwd=ROOT,
                          env={**os.environ, 'PATH': path},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith('\nno problems\n')
    assert f"torch {TESTED['torch']}" in done.stdout
    # What forks break without being broken is said, but is no problem.
    assert "note 1 of 1, mmseg-base: _base_ = 'mmseg::...'" in done.stdout
    assert str(ROOT) not in done.stdout


def test_crafted_environment_is_healthy(make):
    assert list(make().findings()) == ['mmseg-base']


def _raising(text):
    return f'raise ImportError({text!r})\n'


# (what to leave out, what to add, which files to write, finding, its text,
# its command)
BROKEN = {
    'no torch': (['torch'], [], {}, 'torch-missing', 'not installed',
                 'pip install torch=='),
    'torch raises': ([], [], {'torch/__init__.py': _raising(
        'libcudart.so.13: cannot open shared object file')}, 'torch-broken',
        'libcudart.so.13', '--force-reinstall --no-deps torch=='),
    'no torchvision': (['torchvision'], [], {}, 'torchvision-missing',
                       'not installed', "'torchvision==0.26.*'"),
    'torchvision for another torch': (
        ['torchvision'],
        [('torchvision', '0.25.0', {'torchvision/__init__.py':
          "raise RuntimeError('operator torchvision::nms does not exist')"},
          ['torch==2.10.0'])], {}, 'torchvision-mismatch',
        'built for torch 2.10.0, but torch is 2.11.0 (RuntimeError: operator '
        'torchvision::nms does not exist)', "'torchvision==0.26.*'"),
    'mmcv-lite alone': (
        ['onedl-mmcv'], [('mmcv-lite', '2.2.0', {
            'mmcv/__init__.py': "__version__ = '2.2.0'",
            'mmcv/ops/__init__.py': 'import mmcv._ext'})], {}, 'mmcv-no-ops',
        'mmcv-lite never has any', 'MMCV_WITH_OPS=1'),
    'mmcv without ops': (
        ['onedl-mmcv'], [('mmcv', '2.1.0', {
            'mmcv/__init__.py': "__version__ = '2.1.0'",
            'mmcv/ops/__init__.py': 'import mmcv._ext'})], {}, 'mmcv-no-ops',
        'from source', 'MMCV_WITH_OPS=1'),
    'no mmengine': (['onedl-mmengine'], [], {}, 'mmengine-missing',
                    'not installed', 'pip install onedl-mmengine=='),
    'no mmcv': (['onedl-mmcv'], [], {}, 'mmcv-missing', 'not installed',
                'MMCV_WITH_OPS=1'),
    'mmcv twice': ([], [('mmcv-lite', '2.2.0', {'mmcv/version.py': ''})], {},
                   'overwritten-mmcv', 'mmcv-lite and onedl-mmcv',
                   'pip uninstall -y mmcv mmcv-lite'),
    'mmengine twice': (
        [], [('mmengine', '0.10.7', {'mmengine/x.py': ''})], {},
        'overwritten-mmengine', 'mmengine and onedl-mmengine are installed '
        'over each other',
        'pip uninstall -y mmengine onedl-mmengine && pip install --no-deps '
        'onedl-mmengine=='),
    'opencv twice': ([], [('opencv-python', '4.12.0.88', {'cv2/x.py': ''})],
                     {}, 'opencv-twice', 'opencv-python and '
                     'opencv-python-headless are installed over each other',
                     'pip uninstall -y opencv-python opencv-python-headless'),
    'no opencv': (['opencv-python-headless'], [], {}, 'opencv-missing',
                  'no OpenCV', 'pip install --no-deps opencv-python-headless'),
    'opencv needs libGL': ([], [], {'cv2/__init__.py': _raising(
        'libGL.so.1: cannot open shared object file')}, 'opencv-broken',
        'libGL.so.1', 'pip uninstall -y opencv-python-headless'),
    'numpy 2 under old modules': (
        [], [], {'pycocotools/mask.py': 'raise ValueError("numpy.dtype size '
                 'changed, may indicate binary incompatibility")'},
        'numpy-too-new', 'pycocotools were compiled against numpy 1.x',
        'pip install --no-deps pycocotools==2'),
    'numpy 2 under an old OpenCV': (
        [], [], {'cv2/__init__.py': _raising(
            'numpy.core.multiarray failed to import')},
        'numpy-too-new', 'cv2 were compiled against numpy 1.x',
        'pip uninstall -y opencv-python-headless && pip install --no-deps '
        'opencv-python-headless=='),
    'numpy 2 under an old torch': (
        [], [], {'torch/__init__.py': TORCH.replace(
            'sum = lambda self: sum(list(self))',
            "def sum(self): raise RuntimeError('Numpy is not available')")},
        'numpy-too-new', 'torch and numpy were compiled against numpy 1.x',
        "pip install 'numpy<2' 'opencv-python-headless<4.12'"),
    'numpy 1 under new modules': (
        [], [], {'numpy/__init__.py': "__version__ = '1.26.4'\nones=list",
                 'cv2/__init__.py': _raising(
                     'numpy.core.multiarray failed to import')},
        'numpy-too-old', 'cv2 were compiled against a later one',
        'pip install numpy==2'),
    'numpy raises': ([], [], {'numpy/__init__.py': _raising('no _core')},
                     'numpy-broken', 'no _core',
                     'pip install --force-reinstall numpy=='),
    'no setuptools for the original': (
        ['setuptools', 'onedl-mmengine'],
        [('mmengine', '0.10.7', HEALTHY['onedl-mmengine'][1])], {},
        'setuptools-missing', 'original mmengine', 'pip install'),
    'no pycocotools': (['pycocotools'], [], {}, 'pycocotools',
                       "No module named 'pycocotools'",
                       'pip install --force-reinstall --no-deps pycocotools'),
    'a host raises': ([], [], {'mmdet/models/__init__.py': _raising(
        'MMCV==9 is used but incompatible')}, 'broken-mmdet',
        'MMCV==9 is used but incompatible',
        'pip install --force-reinstall --no-deps onedl-mmdetection=='),
    'an original raises': (
        ['onedl-mmdetection'], [('mmdet', '3.3.0', {
            'mmdet/__init__.py': _raising('MMCV==9 is used but incompatible')}
                                 )], {}, 'broken-mmdet', 'MMCV==9',
        'pip uninstall -y mmdet && pip install --no-deps onedl-mmdetection=='),
    'a host lacks a package': (
        [], [], {'mmseg/models/__init__.py': 'import skimage.io'},
        'broken-mmseg', "No module named 'skimage'",
        'pip install scikit-image'),
    'ops raise': ([], [], {'mmcv/ops/__init__.py': _raising(
        'libgomp.so.1: cannot open shared object file')}, 'mmcv-broken',
        'libgomp.so.1', '--no-binary=onedl-mmcv onedl-mmcv=='),
    'ops take a CPU for a GPU': ([], [], {
        'mmcv/ops/__init__.py': "def nms(*a, **k):\n    raise RuntimeError('"
        "nms_impl: implementation for device cuda:0 not found.')"},
        'mmcv-other-torch', 'device cuda:0 not found', 'MMCV_WITH_OPS=1'),
    'a host cannot evaluate': ([], [], {
        'mmdet/evaluation/__init__.py': 'import terminaltables'},
        'broken-mmdet', "No module named 'terminaltables'",
        'pip install terminaltables'),
    'ops compute nonsense': ([], [], {
        'mmcv/ops/__init__.py': KEPT.format('0, torch.tensor([1])')},
        'mmcv-broken', 'AssertionError: [1]', 'MMCV_WITH_OPS=1'),
    'torchvision without ops': ([], [], {'torchvision/ops.py': 'def nms(*a):'
        "\n    raise RuntimeError('operator torchvision::nms does not exist')"
        }, 'torchvision-broken', 'operator torchvision::nms does not exist',
        "pip install --no-deps --force-reinstall 'torchvision==0.26.*'"),
    'torchvision without pillow': ([], [], {'torchvision/ops.py':
        'import PIL'}, 'torchvision-broken', "No module named 'PIL'",
        'pip install pillow'),
    'torch that mmrpa refuses': ([], [], {'torch/__init__.py': TORCH.replace(
        '2.11.0', '2.5.1+cpu')}, 'torch-too-old', 'torch is 2.5.1+cpu, mmrpa '
        'needs 2.6 or later', 'pip install --force-reinstall --no-deps '
        'torch=='),
    'torch that corrupts memory': ([], [], {'torch/__init__.py': TORCH.replace(
        '2.11.0', '2.9.1')}, 'torch-unsafe-load', 'is set (CVE-2026-24747)',
        '--no-binary=onedl-mmcv onedl-mmcv=='),
}


@pytest.mark.parametrize('name', BROKEN)
def test_finding(name, make):
    without, extra, files, code, text, command = BROKEN[name]
    finding = make(without, extra, files=files).findings()[code]
    assert finding['level'] == 'problem'
    assert text in finding['text']
    assert command in finding['command']


# What is nothing wrong by itself: as above.
NOTES = {
    'no safetensors': (['safetensors'], [], {}, 'safetensors-missing',
                       'cannot be read', 'pip install safetensors'),
    'no host': (['onedl-mmdetection', 'onedl-mmsegmentation',
                 'onedl-mmpretrain'], [], {}, 'hosts-missing',
                'neither mmdet, mmseg nor mmpretrain',
                'pip install onedl-mmengine=='),
    'new setuptools': (['setuptools'], [('setuptools', '82.0.1')], {},
                       'setuptools-too-new', 'setuptools 82.0.1 has no '
                       'pkg_resources', "pip install 'setuptools>=77,<82'"),
    'old setuptools': (['setuptools'], [('setuptools', '65.5.0')], {},
                       'setuptools-too-old', '65.5.0 cannot build',
                       "pip install 'setuptools>=77,<82'"),
    'unsafe loading': (
        [], [], {'mmengine/runner/checkpoint.py': 'torch.load(file)'},
        'weights-only', 'load nothing ("Weights only load failed"). tools/',
        'pip uninstall -y onedl-mmengine && pip install'),
}


@pytest.mark.parametrize('name', NOTES)
def test_note(name, make):
    without, extra, files, code, text, command = NOTES[name]
    found = make(without, extra, files=files).findings()
    assert {finding['level'] for finding in found.values()} == {'note'}
    assert text in found[code]['text']
    assert command in found[code]['command']


def test_without_pip_the_first_command_brings_it(make):
    found = make(['pip', 'pycocotools']).findings()
    assert list(found) == ['pip-missing', 'pycocotools', 'mmseg-base']
    assert found['pip-missing']['command'] == 'python -m ensurepip'


@pytest.mark.parametrize('cause, code', [('cv2', 'opencv-broken'),
                                         ('numpy', 'numpy-broken')])
def test_cause_comes_before_half_an_hour_of_compiling(cause, code, make):
    """mmcv and torch import these, and fail along with them."""
    follows = f'import {cause}\n'
    found = make(files={
        f'{cause}/__init__.py': 'import os; os._exit(3)',
        'torch/__init__.py': follows * (cause == 'numpy') + TORCH,
        'mmcv/ops/__init__.py': follows}).findings()
    assert next(iter(found)) == code
    assert 'mmcv-broken' not in found


@pytest.mark.parametrize('name', ['no pycocotools', 'no torch',
                                  'mmcv without ops'])
def test_commands_for_an_environment_that_is_not_activated(name, make):
    """A plain ``pip`` would be that of another one."""
    without, extra, files, code, _, _ = BROKEN[name]
    environment = make(without, extra, files=files)
    plain = environment.findings()[code]['command']
    full = environment.findings(activated=False)[code]['command']
    python = f'{environment.python} -m pip '
    assert full.replace(python, 'pip ') == plain
    assert full.count(python) == plain.count('pip install') + plain.count(
        'pip uninstall')


@pytest.mark.parametrize('minor', [6, 7, 8, 9, 13, 14])
def test_python_that_is_not_supported(minor, tmp_path):
    """For real, by those that are installed beside this one, as pyenv does."""
    beside = Path(sys.base_prefix).parent.glob(f'3.{minor}*/bin/python')
    python = next(beside, None)
    if python is None:
        pytest.skip(f'no Python 3.{minor} beside this one')
    done = subprocess.run(
        [python, '-B', '-m', 'mmrpa.doctor'], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 1
    low, high = ('.'.join(map(str, version)) for version in PYTHONS)
    assert f', python: Python 3.{minor} is not supported, {low} to {high} is' \
        in ' '.join(done.stdout.split())
    assert '    make setup PYTHON=python3.11\n' in done.stdout
    assert 'Traceback' not in done.stdout


@pytest.mark.parametrize('crash, said', [
    ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)',
     'the process crashed (SIGSEGV)'),
    ('import os; os._exit(3)', 'the process ended with status 3'),
])
def test_import_that_ends_its_process_is_a_finding(crash, said, make):
    found = make(files={'mmseg/models/__init__.py': crash}).findings()
    assert said in found['broken-mmseg']['text']
    assert set(found) == {'broken-mmseg', 'mmseg-base'}


@pytest.mark.skipif(shutil.which('cc') is None, reason='needs a C compiler')
def test_ops_for_another_torch(make, tmp_path):
    """The dynamic loader's own words on a symbol that torch lacks."""
    environment = make(files={'mmcv/ops/__init__.py': 'import mmcv._ext'})
    source = tmp_path / 'ext.c'
    source.write_text('void _ZN3c105Error(void);\n'
                      'void *PyInit__ext(void) { _ZN3c105Error(); return 0; }')
    subprocess.run(['cc', '-shared', '-fPIC', '-o',
                    environment.site / 'mmcv/_ext.so', source], check=True)
    finding = environment.findings()['mmcv-other-torch']
    assert 'undefined symbol: _ZN3c105Error' in finding['text']
    assert '--no-cache-dir' in finding['command']


def test_empty_environment_is_explained(tmp_path):
    environment = Environment(tmp_path / 'env')
    found = environment.findings()
    assert list(found) == ['pip-missing', 'torch-missing', 'hosts-missing',
                           'safetensors-missing']
    done = environment.examine()
    assert done.returncode == 1
    assert '    pip install torch==' in done.stdout
    assert 'neither mmdet' in ' '.join(done.stdout.split())


_FINDER = """
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name in ('mmdet', 'mmengine'):
            return importlib.util.spec_from_file_location(
                name, f'{sys.prefix}/source/{name}/__init__.py')
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize('how', ['path', 'finder', 'develop'])
def test_packages_installed_in_place(how, make):
    """``pip install -e``, the two ways, and ``setup.py develop`` before."""
    info = {
        'mmdet-3.3.0.dist-info/direct_url.json': json.dumps(
            {'url': 'file:///source', 'dir_info': {'editable': True}}),
        'mmdet-3.3.0.dist-info/RECORD': '__editable__.mmdet-3.3.0.pth,,\n'
        'mmdet-3.3.0.dist-info/METADATA,,\n'}
    egg = 'Metadata-Version: 2.1\nName: mmdet\nVersion: 3.3.0\n'
    environment = make(['onedl-mmdetection'], *[
        [('mmdet', '3.3.0')]] * (how != 'develop'), files={
            '../../../source/mmdet/__init__.py': _raising('MMCV==9 is used'),
            'in_place.pth': 'import in_place\n' if how == 'finder' else
            'import sys; sys.path.append(f"{sys.prefix}/source")\n',
            'in_place.py': _FINDER,
            **({'../../../source/mmdet.egg-info/PKG-INFO': egg,
                '../../../source/mmdet.egg-info/top_level.txt': 'mmdet\n'}
               if how == 'develop' else info)})
    finding = environment.findings()['broken-mmdet']
    assert 'MMCV==9 is used' in finding['text']
    assert finding['command'].startswith('pip uninstall -y mmdet && ')
    assert 'mmdet 3.3.0' in environment.examine().stdout


def test_text_of_mmengine_is_read_where_a_finder_has_it(make):
    environment = make(['onedl-mmengine'], files={
        'in_place.pth': 'import in_place\n', 'in_place.py': _FINDER,
        **{f'../../../source/{path}': text for path, text in
           HEALTHY['onedl-mmengine'][1].items()},
        '../../../source/mmengine/runner/checkpoint.py': 'torch.load(file)'})
    assert set(environment.findings()) == {'weights-only', 'mmseg-base'}


def test_half_removed_distribution_does_not_stop_it(make):
    environment = make()
    (environment.site / 'broken-1.0.dist-info').mkdir()
    (environment.site / 'torch-2.11.0.dist-info' / 'RECORD').unlink()
    assert list(environment.findings()) == ['mmseg-base']


def test_no_folders_are_shown(make):
    environment = make(files={'mmdet/models/__init__.py': _raising(
        '/srv/private/lib/libx.so: cannot open')})
    done = environment.examine()
    assert 'libx.so: cannot open' in ' '.join(done.stdout.split())
    assert 'private' not in done.stdout
    assert str(environment.site) not in done.stdout + environment.examine(
        '--json').stdout


def test_json_has_the_facts(make):
    report = json.loads(make().examine('--json').stdout)
    assert report['facts']['distributions']['torch'] == '2.11.0'
    assert report['facts']['owners']['mmcv'] == ['onedl-mmcv']
    assert report['facts']['has_ops'] is True
