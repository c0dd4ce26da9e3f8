"""mmrpa, installed as a wheel, is found by every host from anywhere."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    ('mmdet', 'RPPVT'),
    ('mmseg', 'RPCSWin'),
    ('mmseg', 'RPDeiT'),
    ('mmpretrain', 'RPSwin'),
])  # yapf: disable
def test_every_host_builds_it_from_a_wheel(wheel, tmp_path, host, name):
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
    assert [r.split('>')[0].strip() for r in requires] == ['torch']
    folders = {p.name for p in wheel.iterdir()}
    assert {f for f in folders if 'dist-info' not in f} == {'mmrpa'}


def test_importing_mmrpa_registers_and_prints_nothing():
    result = subprocess.run(
        [sys.executable, '-c', 'import mmrpa, sys; print("torch" in '
         'sys.modules, "mmengine" in sys.modules)'],
        capture_output=True, text=True, check=True)  # yapf: disable
    assert result.stdout.split() == ['False', 'False']
    assert result.stderr == ''
