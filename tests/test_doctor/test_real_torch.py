"""Findings about torch and GPUs, with real releases of torch.

Most install some gigabytes from the package index, once, in an environment
that has neither torch nor anything of CUDA's before. Then the command that the
doctor prints first is run as it stands, until no problem is left.
``python -m pytest -m long tests/test_doctor/test_real_torch.py``
"""

import pytest
from doctor_environments import BUILD, torch_and_its_own

from mmrpa.doctor.findings import pin

pytestmark = pytest.mark.long

# A build for CPUs: other platforms and indexes have it by default, but the
# package index of Linux never does.
CPU_BUILD = 'torch==2.13.0+cpu'
GPU = 'NVIDIA H100 80GB HBM3'


def test_old_torch(environment):
    """Among classifiers, which need no ops: nothing has to be compiled."""
    environment.link_tested([
        *torch_and_its_own(), 'onedl-mmcv', 'onedl-mmdetection',
        'onedl-mmsegmentation']).install('mmcv-lite==2.2.0')
    environment.install('torch==2.5.1', 'torchvision==0.20.1', deps=True)
    found = environment.findings()
    assert next(iter(found)) == 'torch-too-old'
    assert 'torch is 2.5.1' in found['torch-too-old']['text']
    assert environment.follow(found, 'torch-too-old') == ['torch-too-old']


def test_unsafe_torch(environment):
    """The one test that compiles mmcv, for 10 to 30 minutes.

    The same command mends all that is wrong with mmcv's ops: see OPS in
    test_real.py.
    """
    environment.link_tested(torch_and_its_own()).install(
        'torch==2.9.1', 'torchvision==0.24.1', deps=True)
    found = environment.findings()
    assert list(found) == ['torch-unsafe-load', 'mmcv-other-torch',
                           'mmseg-base']
    unsafe = found['torch-unsafe-load']
    assert unsafe['text'].startswith('torch 2.9.1')
    assert '(CVE-2026-24747)' in unsafe['text']
    assert found['mmcv-other-torch']['command'] == BUILD
    assert unsafe['command'].endswith(f' && {BUILD}')
    assert environment.follow(found, 'torch-unsafe-load') == [
        'torch-unsafe-load']


def test_torch_without_what_it_links_to(environment):
    """As ``pip install --no-deps`` leaves it."""
    environment.link_tested(torch_and_its_own()).install(
        pin('torch'), pin('torchvision'))
    found = environment.findings()
    assert next(iter(found)) == 'torch-broken'
    assert 'cannot open shared object file' in found['torch-broken']['text']
    assert environment.follow(found, 'torch-broken') == ['torch-broken']


def test_torch_cut_short(environment):
    """What a broken download leaves; torch's other packages are whole."""
    environment.link_tested(owned=['torch']).cut('torch/lib/libtorch_cpu.so')
    found = environment.findings()
    assert next(iter(found)) == 'torch-broken'
    assert 'the process crashed (SIG' in found['torch-broken']['text']
    assert environment.follow(found, 'torch-broken') == ['torch-broken']


def test_package_that_mmrpa_works_without_refuses_torch(environment):
    """No command is printed: what the user wants it for is not known."""
    environment.link_tested().install('torchaudio==2.9.1')
    found = environment.findings()
    assert list(found) == ['refused-torch', 'mmseg-base']
    refused = found['refused-torch']
    assert refused['text'].startswith(
        f"torchaudio refuses torch {pin('torch').partition('==')[2]}: it "
        'needs torch==2.9.1. mmrpa ')
    assert (refused['level'], refused['command']) == ('note', '')
    environment.run('pip uninstall -y torchaudio')
    assert list(environment.findings()) == ['mmseg-base']


def test_build_for_the_cpu_where_there_is_a_gpu(environment):
    """From another index, under a torchvision for another torch.

    The GPU is a stand-in for NVIDIA's program; both builds of torch are real.
    The one that the command brings is for GPUs, and says that there is none.
    """
    environment.link_tested(torch_and_its_own())
    environment.run(f'pip install --no-deps --quiet {CPU_BUILD} || true')
    if not any(environment.site.glob('torch-*+cpu.dist-info')):
        pytest.skip(f'pip finds no {CPU_BUILD}: the default index has none; '
                    'let PIP_FIND_LINKS name a folder that does')
    environment.install('torchvision==0.27.0')
    environment.add_program('nvidia-smi', f"echo '{GPU}'")
    found = environment.findings()
    assert list(found)[:2] == ['torchvision-mismatch', 'torch-cpu-only']
    assert ('. This torch is the build cpu, which the default index does not '
            'have: add the --index-url') in (
                found['torchvision-mismatch']['text'])
    assert found['torch-cpu-only']['text'] == (
        f'this machine has a GPU ({GPU}), but torch 2.13.0+cpu is a build for '
        'the CPU')
    environment.run(found['torch-cpu-only']['command'])
    assert list(environment.findings()) == ['cuda-unusable', 'mmseg-base']


def test_gpu_that_torch_cannot_use(environment):
    """Only what ends the finding is made up: that the GPU goes."""
    environment.link_tested()
    smi = environment.add_program('nvidia-smi', f"echo '{GPU}'")
    found = environment.findings()
    assert list(found) == ['cuda-unusable', 'mmseg-base']
    assert f'has a GPU ({GPU}), but torch ' in found['cuda-unusable']['text']
    assert GPU in environment.run(found['cuda-unusable']['command'])
    smi.unlink()
    assert list(environment.findings()) == ['mmseg-base']
