"""mmrpa, installed as a wheel, is found by every host from anywhere."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import mmdet_models

import mmrpa
from mmrpa import torch_release

ROOT = Path(__file__).parents[1]

# Run in a fresh interpreter: default scope set as the Runner sets it, no
# custom_imports, nothing of mmrpa imported by hand.
CODE = """
import sys
import torch
from mmengine.registry import init_default_scope
import {host}.registry
init_default_scope('{host}')
backbone = {host}.registry.MODELS.build(dict(
    type='mmrpa.{type}', arch='tiny', out_indices=(-1, )))
maps = backbone(torch.zeros(1, 3, 64, 64))
assert len(maps) == 1 and maps[0].shape[1] == backbone.out_channels[0]
import mmrpa
print('from', mmrpa.__file__)
try:
    {host}.registry.MODELS.build(dict(type='mmrpa.{type}', archh='tiny'))
except TypeError as error:
    print('error', error)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A folder into which the wheel, and nothing else, is unpacked."""
    out = tmp_path_factory.mktemp('wheel')
    # A copy, since pip builds in the source tree, which other tests read.
    source = out / 'source'
    shutil.copytree(ROOT / 'mmrpa', source / 'mmrpa')
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    subprocess.run([
        sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index',
        '--no-build-isolation', '--quiet', '--wheel-dir', out, source
    ], check=True)  # yapf: disable
    built, = out.glob('mmrpa-*.whl')
    site = out / 'site'
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    return site


@pytest.mark.parametrize('host,name', [
    ('mmdet', 'RPSwin'),
    pytest.param('mmdet', 'RPPVT', marks=pytest.mark.long),
    pytest.param('mmseg', 'RPCSWin', marks=pytest.mark.long),
    ('mmseg', 'RPDeiT'),
    ('mmpretrain', 'RPSwin'),
])  # yapf: disable
def test_every_host_builds_it_from_a_wheel(wheel, tmp_path, host, name):
    if host == 'mmdet':
        mmdet_models()
    result = subprocess.run(
        [sys.executable, '-c', CODE.format(host=host, type=name)],
        cwd=tmp_path,  # an empty working directory
        env={'PYTHONPATH': str(wheel), 'PATH': '/usr/bin:/bin'},
        capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
    assert f'from {wheel}' in result.stdout  # not the editable install
    assert "did you mean 'arch'" in result.stdout
    assert 'Allowed: arch, in_channels' in result.stdout


def test_the_wheel_requires_torch_only(wheel):
    metadata, = wheel.glob('mmrpa-*.dist-info/METADATA')
    requires = [
        line.removeprefix('Requires-Dist: ')
        for line in metadata.read_text().splitlines()
        if line.startswith('Requires-Dist') and 'extra ==' not in line
    ]
    oldest = '.'.join(map(str, mmrpa.OLDEST_TORCH))
    assert requires == [f'torch>={oldest}']
    folders = {p.name for p in wheel.iterdir()}
    assert {f for f in folders if 'dist-info' not in f} == {'mmrpa'}


def test_importing_mmrpa_registers_and_prints_nothing():
    result = subprocess.run(
        [sys.executable, '-c', 'import mmrpa, sys; print("torch" in '
         'sys.modules, "mmengine" in sys.modules)'],
        capture_output=True, text=True, check=True)  # yapf: disable
    assert result.stdout.split() == ['False', 'False']
    assert result.stderr == ''


# An older torch, as far as one can be made of this one: without what later
# releases brought.
OLD_TORCH = """
import importlib, sys
from pathlib import Path
import torch
del torch.library.custom_op, torch.serialization.safe_globals
torch.__version__ = {version!r}
for path in sorted(Path({root!r}, 'mmrpa').rglob('*.py')):
    if path.name == '__main__.py':
        continue
    parts = path.relative_to({root!r}).with_suffix('').parts
    name = '.'.join(part for part in parts if part != '__init__')
    for loaded in [key for key in sys.modules if key.startswith('mmrpa')]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
        print(name, 'imported', sep='\t')
    except ImportError as error:
        print(name, error, sep='\t')
"""
# What needs no torch of its own, and explains or checks.
WITHOUT_TORCH = {
    'cfg_options', 'coco_categories', 'cpu_amp', 'data_checks', 'doctor',
    'earlier', 'elastic', 'interfaces', 'launch', 'output_names', 'preflight',
    'processes', 'registry', 'whole_files'}


def test_all_that_uses_an_older_torch_says_so():
    result = subprocess.run(
        [sys.executable, '-c',
         OLD_TORCH.format(root=str(ROOT), version='2.5.1+cu124')],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = dict(line.split('\t') for line in result.stdout.splitlines())
    assert len(said) == sum(
        path.name != '__main__.py' for path in (ROOT / 'mmrpa').rglob('*.py'))
    assert said.pop('mmrpa') == 'imported'
    refused = said.pop('mmrpa.torch_release')
    assert refused.startswith(
        'mmrpa needs torch 2.6 or later, this is 2.5.1+cu124: pip install '
        "--upgrade 'torch>=2.6'")
    for name, what in said.items():
        expected = ('imported' if name.split('.')[1] in WITHOUT_TORCH
                    else refused)
        assert what == expected, name


def test_hosts_pass_the_refusal_of_an_older_torch_on():
    """mmengine swallows some errors of what it looks for."""
    result = subprocess.run(
        [sys.executable, '-c', "import torch\ntorch.__version__ = '2.5.1'\n"
         'from mmengine.registry import MODELS\n'
         "MODELS.build(dict(type='mmrpa.RPSwin', arch='tiny'))"],
        cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith(
        'ImportError: mmrpa needs torch 2.6 or later, this is 2.5.1')


@pytest.mark.parametrize('version, release', [
    ('2.6.0', (2, 6)), ('2.11.0+cu130', (2, 11)), ('2.7.0a0+git1341794',
                                                   (2, 7)),
    ('2.10.1', (2, 10)), ('3.0', (3, 0)), ('3fa9151', (2, 6)),
])
def test_releases_that_are_new_enough(version, release):
    assert torch_release.release(version) == release
    torch_release.check_release(version)


@pytest.mark.parametrize('version', ['2.5.1', '2.5.1+cpu', '1.13.1', '2.0'])
def test_releases_that_are_too_old(version):
    with pytest.raises(ImportError, match=rf'this is {re.escape(version)}:'):
        torch_release.check_release(version)
