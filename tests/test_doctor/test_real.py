"""Findings in copies of the tested environment that pip has spoiled.

The packages are the real ones, from the package index, in the versions that
users have. ``python -m pytest -m long tests/test_doctor``
"""

import pytest
from doctor_environments import Environment

pytestmark = pytest.mark.long

# What is left out of the tested set (distributions), what is a copy because
# something is installed over it (import names), what is installed, and the
# findings, each with words that have to be in it.
SPOILED = {
    'both builds of OpenCV': (
        ['opencv-python-headless'], [],
        ['opencv-python==4.12.0.88', 'opencv-python-headless==4.12.0.88'],
        {'opencv-twice': 'opencv-python and opencv-python-headless'}),
    'no OpenCV': (['opencv-python-headless'], [], [],
                  {'opencv-missing': 'no OpenCV'}),
    'mmcv-lite in the place of mmcv': (
        ['onedl-mmcv'], [], ['mmcv-lite==2.2.0'],
        {'mmcv-no-ops': 'mmcv-lite never has any'}),
    'mmcv-lite over mmcv': (
        [], ['mmcv'], ['mmcv-lite==2.2.0'],
        {'overwritten-mmcv': 'mmcv-lite and onedl-mmcv'}),
    'no ninja where mmcv has to be compiled': (
        ['onedl-mmcv', 'ninja'], [], ['mmcv-lite==2.2.0'],
        {'ninja': 'ninja is not installed'}),
    'the original mmengine over the fork': (
        [], ['mmengine'], ['mmengine==0.10.7'],
        {'overwritten-mmengine': 'mmengine and onedl-mmengine',
         'weights-only': 'Weights only load failed'}),
    'the original mmengine': (
        ['onedl-mmengine'], [], ['mmengine==0.10.7'],
        {'weights-only': 'Weights only load failed'}),
    'the original mmsegmentation over the fork': (
        # Its wheel has brought its tests along, as a package.
        [], ['mmseg', 'tests'], ['mmsegmentation==1.2.2'],
        {'overwritten-mmseg': 'mmsegmentation and onedl-mmsegmentation'}),
    'torchvision for another torch': (
        ['torchvision'], [], ['torchvision==0.25.0'],
        {'torchvision-mismatch': 'was built for torch 2.10.0, but torch is '
         '2.11.0'}),
    'no torchvision': (['torchvision'], [], [],
                       {'torchvision-missing': 'not installed'}),
    'numpy that the hosts refuse': (
        ['numpy'], [], ['numpy==2.4.0'],
        {'requirement-numpy': 'refuses numpy 2.4.0'}),
    'numpy of the first generation': (
        ['numpy'], [], ['numpy==1.26.4'],
        {'requirement-numpy': 'refuses numpy 1.26.4'}),
    'a module compiled for numpy 1': (
        ['pycocotools'], [], ['pycocotools==2.0.7'],
        {'numpy-too-new': 'pycocotools'}),
    'setuptools without pkg_resources': (
        ['setuptools'], [], ['setuptools==82.0.0'],
        {'setuptools-too-new': '82.0.0 has no pkg_resources'}),
    'setuptools of Python itself': (
        ['setuptools'], [], ['setuptools==65.5.0'],
        {'setuptools-too-old': '65.5.0'}),
    'no pycocotools': (['pycocotools'], [], [],
                       {'pycocotools': "No module named 'pycocotools'"}),
    'no torch': (['torch'], [], [], {'torch-missing': 'not installed'}),
}


def test_linked_copy_has_no_problems(tmp_path):
    found = Environment(tmp_path / 'env').link_tested().findings()
    assert list(found) == ['mmseg-base']


@pytest.mark.parametrize('name', SPOILED)
def test_finding(name, tmp_path):
    without, copied, requirements, expected = SPOILED[name]
    environment = Environment(tmp_path / 'env').link_tested(without, copied)
    if requirements:
        environment.install(*requirements)
    found = environment.findings()
    for code, text in expected.items():
        assert text in found[code]['text']
        assert 'pip ' in found[code]['command']
