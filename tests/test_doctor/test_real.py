"""Findings in copies of the tested environment that were spoiled for real.

The packages are the real ones, from the package index, in the versions that
users have, or files of theirs are cut short. Then the command that the doctor
prints first is run as it stands, until no problem is left.
``python -m pytest -m long tests/test_doctor``
"""

from pathlib import Path

import pytest
from doctor_environments import BUILD

pytestmark = pytest.mark.long

# What is left out of the tested set (distributions), what pip is to change
# besides doctor_environments.OWNED, what is installed, and the findings, each
# with words that have to be in it.
SPOILED = {
    'both builds of OpenCV': (
        [], [], ['opencv-python==4.12.0.88'],
        {'opencv-twice': 'opencv-python and opencv-python-headless'}),
    'no OpenCV': (['opencv-python-headless'], [], [],
                  {'opencv-missing': 'no OpenCV'}),
    'the original mmengine over the fork': (
        [], [], ['mmengine==0.10.7'],
        {'overwritten-mmengine': 'mmengine and onedl-mmengine',
         'weights-only': 'Weights only load failed'}),
    'the original mmengine': (
        ['onedl-mmengine'], [], ['mmengine==0.10.7'],
        {'weights-only': 'Weights only load failed'}),
    'no mmengine': (['onedl-mmengine'], [], [],
                    {'mmengine-missing': 'not installed'}),
    'the original mmsegmentation over the fork': (
        [], ['onedl-mmsegmentation'], ['mmsegmentation==1.2.2'],
        {'overwritten-mmseg': 'mmsegmentation and onedl-mmsegmentation'}),
    'the original mmdet, too old for the mmcv': (
        ['onedl-mmdetection'], [], ['mmdet==3.3.0'],
        {'broken-mmdet': 'MMCV==2.3.6 is used but incompatible'}),
    'a host without one of its packages': (
        ['terminaltables'], [], [],
        {'broken-mmdet': "No module named 'terminaltables'"}),
    'torchvision for another torch': (
        [], [], ['torchvision==0.25.0'],
        {'torchvision-mismatch': 'was built for torch 2.10.0, but torch is '
         '2.11.0'}),
    'no torchvision': (['torchvision'], [], [],
                       {'torchvision-missing': 'not installed'}),
    'torchvision without pillow': (
        ['pillow'], [], [],
        {'torchvision-broken': "No module named 'PIL'"}),
    'numpy that the hosts refuse': (
        [], [], ['numpy==2.4.0'],
        {'requirement-numpy': 'refuses numpy 2.4.0'}),
    'numpy of the first generation': (
        [], [], ['numpy==1.26.4'],
        {'requirement-numpy': 'refuses numpy 1.26.4'}),
    'a module compiled for numpy 1': (
        [], [], ['pycocotools==2.0.7'], {'numpy-too-new': 'pycocotools'}),
    'setuptools without pkg_resources': (
        [], [], ['setuptools==82.0.0'],
        {'requirement-setuptools': 'torch refuses setuptools 82.0.0',
         'setuptools-too-new': '82.0.0 has no pkg_resources'}),
    'setuptools of Python itself': (
        [], [], ['setuptools==65.5.0'], {'setuptools-too-old': '65.5.0'}),
    'no pycocotools': (['pycocotools'], [], [],
                       {'pycocotools': "No module named 'pycocotools'"}),
    'no torch': (['torch'], [], [], {'torch-missing': 'not installed'}),
}
# Findings of SPOILED that are no problem there, and why; all others have to be
# the first problem that is found.
NOTES = {
    'weights-only': "only the hosts' own scripts need it",
    'setuptools-too-new': 'nothing imports pkg_resources, and mmcv is built',
    'setuptools-too-old': 'mmcv is built',
}
# Libraries of which half is left, and the finding. They do not raise: they end
# the process.
CUT = {
    'numpy': ('numpy/_core/_multiarray_umath*.so', 'numpy-broken'),
    'torchvision': ('torchvision/_C.so', 'torchvision-broken'),
}
# mmcv's ops: the command compiles them, for half an hour. It is run once, in
# test_real_torch.py.
OPS = {
    'mmcv-lite in the place of mmcv': (
        ['onedl-mmcv'], ['mmcv-lite==2.2.0'],
        {'mmcv-no-ops': 'mmcv-lite never has any'}),
    'mmcv-lite over mmcv': (
        [], ['mmcv-lite==2.2.0'],
        {'overwritten-mmcv': 'mmcv-lite and onedl-mmcv'}),
    'ops for another torch': (
        ['torch', 'torchvision'], ['torch==2.13.0', 'torchvision==0.28.0'],
        {'mmcv-other-torch': 'compiled for another torch'}),
}


def problems(found):
    return [code for code, finding in found.items()
            if finding['level'] == 'problem']


def test_linked_copy_has_no_problems(environment):
    found = environment.link_tested().findings()
    assert list(found) == ['mmseg-base']
    folder = environment.run(found['mmseg-base']['command']).strip()
    assert Path(folder, 'upernet').is_dir()


@pytest.mark.parametrize('name', SPOILED)
def test_command_mends_finding(name, environment):
    without, owned, requirements, expected = SPOILED[name]
    environment.link_tested(without, owned)
    if requirements:
        environment.install(*requirements)
    found = environment.findings()
    for code, text in expected.items():
        assert text in found[code]['text']
    first = next(iter(expected))
    assert problems(found)[:1] == ([] if first in NOTES else [first])
    environment.follow(found, first)
    left = environment.findings()
    assert not problems(left) and not expected.keys() & left.keys(), left


@pytest.mark.parametrize('name', CUT)
def test_command_mends_files_cut_short(name, environment):
    pattern, code = CUT[name]
    environment.link_tested().cut(pattern)
    found = environment.findings()
    assert next(iter(found)) == code
    assert 'the process crashed (SIG' in found[code]['text']
    environment.follow(found, code)


@pytest.mark.parametrize('name', OPS)
def test_ops(name, environment):
    without, requirements, expected = OPS[name]
    environment.link_tested(without)
    if requirements:
        environment.install(*requirements)
    found = environment.findings()
    for code, text in expected.items():
        assert text in found[code]['text']
        assert found[code]['command'] == BUILD


@pytest.mark.parametrize('keep, text', [
    (None, 'the process crashed (SIG'), (500, 'cannot read file data'),
    (10, 'file too short')])
def test_ops_cut_short(keep, text, environment):
    environment.link_tested().cut('mmcv/_ext*.so', keep)
    found = environment.findings()
    assert list(found) == ['mmcv-broken', 'mmseg-base']
    assert text in found['mmcv-broken']['text']
    assert found['mmcv-broken']['command'] == BUILD


def test_safetensors(environment):
    environment.link_tested(['safetensors'])
    environment.follow(environment.findings(), 'safetensors-missing')


def test_pip_of_another_environment(environment):
    """Not activated: a plain ``pip`` would mend another environment."""
    environment.link_tested(['pycocotools'])
    found = environment.findings(activated=False)
    assert found['pycocotools']['command'].startswith(
        f'{environment.python} -m pip install ')
    environment.follow(found, 'pycocotools', activated=False)
