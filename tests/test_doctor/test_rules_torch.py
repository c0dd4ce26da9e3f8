"""Rules about Python, torch and GPUs, on facts that were made up.

Only these have findings that need a GPU: see docs/environment.md.
"""

import copy

import pytest
from doctor_facts import FACTS, diagnose_changed

from mmrpa.doctor.report import diagnose
from mmrpa.doctor.rules import matching_torchvision
from mmrpa.doctor.rules_gpu import runs_on


@pytest.mark.parametrize('checkout', [True, False])
def test_another_python_where_there_is_no_makefile(checkout):
    finding, = diagnose_changed(python=[3, 13, 1], checkout=checkout)
    assert finding.command.startswith(
        'make setup ' if checkout else 'python3.11 -m venv ')


def test_torch_that_lacks_a_package_is_left_as_it_is():
    facts = copy.deepcopy(FACTS)
    facts['probes']['torch'] = {
        'error': "ModuleNotFoundError: No module named 'typing_extensions'",
        'missing': 'typing_extensions'}
    finding, = diagnose(facts)
    assert finding.code == 'torch-broken'
    assert finding.command == 'pip install typing_extensions'


def _codes(**changes):
    return [finding.code for finding in diagnose_changed(**changes)]


@pytest.mark.parametrize('changes, codes', [
    ({}, []),
    (dict(cuda=None, available=False, archs=[], capabilities=[],
          ops_cuda='not available'), ['torch-cpu-only']),
    (dict(cuda=None, available=False, archs=[], capabilities=[], gpus=[],
          ops_cuda='not available'), []),
    (dict(available=False, capabilities=[]), ['cuda-unusable']),
    (dict(capabilities=[[6, 1]]), ['cuda-arch']),
    (dict(capabilities=[[9, 0], [3, 7]]), ['cuda-arch']),
    (dict(ops_cuda='not available'), ['mmcv-cpu-ops']),
    (dict(version='2.9.1+cu128', requires_torch='2.9.1'),
     ['torch-unsafe-load']),
    (dict(version='2.6.0', requires_torch='2.6.0'), ['torch-unsafe-load']),
    (dict(version='2.5.1', requires_torch='2.5.1'), ['torch-too-old']),
    (dict(version='1.13.1', requires_torch='1.13.1'), ['torch-too-old']),
    (dict(version='3fa9151'), []),  # a build from source
    (dict(version='2.10.0+cu128', requires_torch='2.10.0'), []),
    # A build for AMD's GPUs, which "cuda" is the word for, too.
    (dict(cuda=None, archs=[], capabilities=[[9, 0]], gpus=[],
          ops_cuda='rocm not available'), []),
    (dict(has_pip=False), []),
    (dict(python=[3, 13, 0]), ['python']),
    (dict(python=[3, 9, 1]), ['python']),
    (dict(requirements=['opencv-python-headless 4.12.0.88 has requirement '
                        'numpy<2.3.0,>=2; python_version >= "3.9", but you '
                        'have numpy 2.4.0.']), ['requirement-numpy']),
    (dict(requirements=['rich 1 has requirement pygments<3, but you have '
                        'pygments 4.']), []),
])
def test_rules(changes, codes):
    assert _codes(**changes) == codes


@pytest.mark.parametrize('archs, capability, runs', [
    (['sm_80'], [8, 0], True), (['sm_80'], [8, 6], True),
    (['sm_86'], [8, 0], False), (['sm_80'], [9, 0], False),
    (['compute_80'], [9, 0], True), (['compute_90'], [8, 0], False),
    (['sm_90a'], [9, 0], True), (['sm_100a'], [10, 3], False),
    (['sm_100f'], [10, 3], True), (['sm_120'], [12, 0], True), ([], [8, 0],
                                                                False),
])
def test_binaries_run_on(archs, capability, runs):
    assert runs_on(archs, capability) is runs


@pytest.mark.parametrize('capability, torch, command, words', [
    # Pascal and Volta: all newer builds have left them.
    ([6, 1], '2.11.0', 'nvidia-smi', 'torchvision for an older CUDA than'),
    ([7, 0], '2.10.0', 'nvidia-smi', 'torchvision for an older CUDA than'),
    ([8, 0], '2.11.0', 'nvidia-smi', 'torchvision for another CUDA than'),
    ([8, 0], '2.10.0', 'pip install --force-reinstall --no-deps torch==',
     'sm_80, only for sm_75 sm_90'),
])
def test_command_for_a_gpu_is_not_to_install_what_is_there(
        capability, torch, command, words):
    finding, = diagnose_changed(
        capabilities=[capability], archs=['sm_75', 'sm_90'],
        distributions={**FACTS['distributions'], 'torch': torch})
    assert finding.code == 'cuda-arch'
    assert finding.command.startswith(command)
    assert words in finding.text


def test_busy_gpu_is_not_the_fault_of_torch():
    facts = copy.deepcopy(FACTS)
    facts['probes']['torch.cuda'] = {
        'error': 'AcceleratorError: all CUDA-capable devices are busy or '
        'unavailable', 'missing': None}
    finding, = diagnose(facts)
    assert finding.code == 'cuda-unusable'
    assert "this machine's GPU: AcceleratorError: all CUDA" in finding.text
    assert finding.command.startswith('nvidia-smi')
    facts['probes']['torch']['found']['available'] = False
    finding, = diagnose(facts)  # once, by what hides it
    assert 'cannot use it: the driver is older' in finding.text


@pytest.mark.parametrize('build', ['+cu118', '+cpu', ''])
def test_build_of_torch_is_said_where_the_default_index_lacks_it(build):
    found = diagnose_changed(
        version='2.9.1' + (build or '+cu130'),
        distributions={**FACTS['distributions'], 'torch': '2.9.1' + build})
    assert [f.code for f in found] == ['torchvision-mismatch',
                                       'torch-unsafe-load']
    for finding in found:
        assert ('add the --index-url that' in finding.text) == bool(build)
        assert f'This torch is the build {build[1:]},' in (
            finding.text) or not build


@pytest.mark.parametrize('torch, torchvision', [
    ('2.11.0', '==0.26.*'), ('2.5.1+cu124', '==0.20.*'),
    ('2.0.1', '==0.15.*'), ('2.14.1', '==0.29.*'),
    # No longer made for one torch: 0.29.2 came after 2.15.
    ('2.15.0', '>=0.29')])
def test_torchvision_of_a_torch(torch, torchvision):
    assert matching_torchvision(torch) == f'torchvision{torchvision}'


def test_version_of_a_build_from_source_is_read():
    assert matching_torchvision('git1a2b3c').startswith('torchvision==')
    assert _codes(version='git1a2b3c') == []


@pytest.mark.parametrize('ops, codes', [
    ({'error': 'undefined symbol: x', 'missing': None},
     ['torch-unsafe-load', 'mmcv-other-torch']),
    ({'found': {'cuda': 'not available'}},
     ['torch-unsafe-load', 'mmcv-cpu-ops'])])
def test_mmcv_is_not_compiled_for_a_torch_that_has_to_go(ops, codes):
    """Both commands compile it; the first mends both findings."""
    facts = copy.deepcopy(FACTS)
    facts['probes']['torch']['found']['version'] = '2.9.1'
    facts.update(requires_torch='2.9.1')
    facts['probes']['mmcv.ops'] = ops
    found = diagnose(facts)
    assert [finding.code for finding in found] == codes
    for finding in found:
        assert finding.command.count('--no-binary=onedl-mmcv ') == 1
