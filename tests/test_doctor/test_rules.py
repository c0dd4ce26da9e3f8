"""Rules that need a GPU, or another Python, on facts that were made up.

No such machine is at hand: these show that the rules read facts rightly, not
that the facts come out so.
"""

import copy
import re

import pytest
from doctor_environments import ROOT

from mmrpa.doctor.findings import PYTHONS, SETUPTOOLS, TESTED
from mmrpa.doctor.probes import without_paths
from mmrpa.doctor.report import diagnose, format_report
from mmrpa.doctor.rules import matching_torchvision
from mmrpa.doctor.rules_gpu import runs_on

ARCHS = ['sm_75', 'sm_80', 'sm_90', 'sm_120', 'compute_120']
FACTS = {
    'python': [3, 11, 7],
    'checkout': True,
    'platform': 'Linux',
    'distributions': {'setuptools': '81.0.0', 'torchvision': '0.26.0+cu130',
                      'opencv-python-headless': '4.12.0.88', 'ninja': '1',
                      'safetensors': '0.8.0'},
    'owners': {name: [f'onedl-{name}'] for name in (
        'mmengine', 'mmcv', 'mmdet', 'mmpretrain')} | {'mmseg': [], 'cv2': []},
    'requires_torch': '2.11.0',
    'has_ops': True,
    'sources': {},
    'has_pip': True,
    'interpreter': None,
    'requirements': [],
    'gpus': ['NVIDIA H100'],
    'probes': {name: {'found': {'version': '2.2.6'}} for name in (
        'numpy', 'torch and numpy', 'cv2', 'torchvision', 'mmengine', 'mmcv',
        'pycocotools', 'mmdet', 'mmseg', 'mmpretrain')} | {
            'torch': {'found': {
                'version': '2.11.0+cu130', 'cuda': '13.0', 'available': True,
                'archs': ARCHS}},
            'torch.cuda': {'found': {'capabilities': [[9, 0]]}},
            'mmcv.ops': {'found': {'cuda': '13.0'}}},
}


def _diagnose(**changes):
    facts = copy.deepcopy(FACTS)
    torch = facts['probes']['torch']['found']
    for key, value in changes.items():
        if key in torch:
            torch[key] = value
        elif key == 'capabilities':
            facts['probes']['torch.cuda']['found'][key] = value
        elif key == 'ops_cuda':
            facts['probes']['mmcv.ops']['found']['cuda'] = value
        else:
            facts[key] = value
    return diagnose(facts)


def _without(facts, *names):
    """Take packages out; all that import mmengine fail along with it."""
    for name in names:
        facts['owners'][name] = []
        facts['probes'][name] = {
            'error': f'ModuleNotFoundError: No module named {name!r}',
            'missing': name}
        if name in ('mmcv', 'mmengine'):
            facts['probes']['mmcv.ops'] = facts['probes'][name]
    for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain'):
        if 'mmengine' in names and name not in names:
            facts['probes'][name] = facts['probes']['mmengine']
    return facts


HOSTS = ('mmdet', 'mmseg', 'mmpretrain')


@pytest.mark.parametrize('names, codes', [
    (HOSTS, {'hosts-missing': 'note'}),
    (('mmengine', *HOSTS), {'mmengine-missing': 'problem',
                            'hosts-missing': 'note'}),
    # torch alone, for the attention: a supported use.
    (('mmengine', 'mmcv', *HOSTS), {'hosts-missing': 'note'}),
    (('mmengine', 'mmcv', 'numpy', 'cv2', 'torchvision', 'pycocotools',
      *HOSTS), {'hosts-missing': 'note'}),
    (('mmengine', 'mmcv', 'torch', 'numpy', *HOSTS), {
        'torch-missing': 'problem', 'hosts-missing': 'note'}),
    (('mmcv', *HOSTS), {'mmcv-missing': 'problem', 'hosts-missing': 'note'}),
    (('mmcv', ), {'mmcv-missing': 'problem'}),
    (('mmdet', 'mmseg'), {}),
])
def test_what_is_wrong_without(names, codes):
    facts = _without(copy.deepcopy(FACTS), *names)
    if 'cv2' in names:
        del facts['distributions']['opencv-python-headless']
    found = diagnose(facts)
    assert {finding.code: finding.level for finding in found} == codes
    if 'hosts-missing' in codes:
        assert f"mmpretrain=={TESTED['onedl-mmpretrain']}" in found[-1].command


def test_missing_mmengine_is_all_that_is_wrong():
    """What imports it is whole: nothing of it has to be installed again."""
    finding, = diagnose(_without(copy.deepcopy(FACTS), 'mmengine'))
    assert finding.code == 'mmengine-missing'
    assert finding.command == (
        f"pip install onedl-mmengine=={TESTED['onedl-mmengine']}")


@pytest.mark.parametrize('error, command', [
    ({'error': 'x', 'missing': None}, 'CFLAGS='),
    ({'error': 'x', 'missing': 'yapf'}, 'pip install yapf')])
def test_ops_that_were_compiled_are_not_thrown_away(error, command):
    facts = copy.deepcopy(FACTS)
    facts['probes']['mmcv'] = error  # while its ops work
    finding, = diagnose(facts)
    assert finding.code == 'broken-mmcv'
    assert ('MMCV_WITH_OPS=1 ' + command in finding.command
            or finding.command == command)


@pytest.mark.parametrize('missing, command', [
    ('mmpretrain',
     f"pip install onedl-mmpretrain=={TESTED['onedl-mmpretrain']}"),
    # Its folder has gone, its metadata has not.
    ('mmdet', 'pip uninstall -y mmdet && pip install --no-deps '
     f"onedl-mmdetection=={TESTED['onedl-mmdetection']}")])
def test_host_that_lacks_another(missing, command):
    facts = copy.deepcopy(FACTS)
    facts['owners']['mmdet'] = ['mmdet']
    facts['probes']['mmdet'] = {'error': 'x', 'missing': missing}
    finding, = diagnose(facts)
    assert (finding.code, finding.command) == ('broken-mmdet', command)


def test_broken_host_that_nothing_owns():
    """On PYTHONPATH, say: what would be installed could not be seen."""
    facts = copy.deepcopy(FACTS)
    facts['owners']['mmdet'] = []
    facts['probes']['mmdet'] = {'error': 'x', 'missing': None}
    finding, = diagnose(facts)
    assert finding.code == 'broken-mmdet'
    assert 'shows where it is' in finding.text
    assert "find_spec('mmdet').origin" in finding.command


def test_broken_mmengine_is_named_alone():
    facts = copy.deepcopy(FACTS)
    for name in ('mmengine', 'mmcv', 'mmcv.ops', 'mmdet', 'mmpretrain'):
        facts['probes'][name] = {'error': 'OSError: x', 'missing': None}
    finding, = diagnose(facts)
    assert finding.code == 'broken-mmengine'


@pytest.mark.parametrize('version', ['65.5.0', '82.0.0'])
def test_setuptools_matters_to_builds_and_to_the_original(version):
    facts = copy.deepcopy(FACTS)
    facts['distributions']['setuptools'] = version
    finding, = diagnose(facts)
    assert finding.level == 'note'
    code = finding.code
    found = {f.code: f for f in diagnose(_without(facts, 'mmcv'))}
    assert found[code].level == 'problem'
    facts = copy.deepcopy(FACTS)
    facts['distributions'].update(setuptools=version, mmengine='0.10.7')
    finding, = diagnose(facts)
    assert finding.level == 'problem' if version > '8' else 'note'


@pytest.mark.parametrize('owners, codes', [
    ([], []),  # conda's package, with the metadata of both builds
    (['opencv-python'], []),
    (['opencv-python', 'opencv-python-headless'], ['opencv-twice']),
    (['opencv-python', 'opencv-of-somebody'], ['opencv-twice'])])
def test_two_builds_of_opencv_are_two_owners_of_its_folder(owners, codes):
    facts = copy.deepcopy(FACTS)
    facts['distributions']['opencv-python'] = '4.12.0.88'
    facts['owners']['cv2'] = owners
    found = diagnose(facts)
    assert [finding.code for finding in found] == codes
    for finding in found:
        assert finding.command.startswith(
            f'pip uninstall -y {" ".join(sorted(owners))} && ')


@pytest.mark.parametrize('checkout', [True, False])
def test_another_python_where_there_is_no_makefile(checkout):
    finding, = _diagnose(python=[3, 13, 1], checkout=checkout)
    assert finding.command.startswith(
        'make setup ' if checkout else 'python3.11 -m venv ')


COMPILE = '--no-binary=onedl-mmcv onedl-mmcv==' + TESTED['onedl-mmcv']


@pytest.mark.parametrize('fault, code', [
    ('no ops', 'mmcv-no-ops'), ('ops for a CPU', 'mmcv-cpu-ops'),
    ('an old torch', 'torch-unsafe-load')])
def test_compiled_mmcv_takes_the_original_and_who_refuses_it_along(fault,
                                                                   code):
    """mmdet 3.3.0 and mmsegmentation 1.2.2 take no mmcv from 2.2 on."""
    facts = copy.deepcopy(FACTS)
    facts['owners'].update(mmcv=['mmcv'], mmdet=['mmdet'],
                           mmseg=['mmsegmentation'], mmpretrain=['mmpretrain'])
    if fault == 'no ops':
        facts['has_ops'] = False
        facts['probes']['mmcv.ops'] = {'error': 'x', 'missing': 'mmcv._ext'}
    elif fault == 'ops for a CPU':
        facts['probes']['mmcv.ops']['found']['cuda'] = 'not available'
    else:
        facts['probes']['torch']['found']['version'] = '2.5.1'
        facts['requires_torch'] = '2.5.1'
    finding, = diagnose(facts)
    assert finding.code == code
    assert 'pip uninstall -y mmcv mmcv-lite mmcv-full onedl-mmcv && ' in (
        finding.command)
    assert ('FORCE_CUDA=1 ' in finding.command) == (fault == 'ops for a CPU')
    assert finding.command.endswith(
        f'{COMPILE} && pip uninstall -y mmdet mmsegmentation && pip install '
        f"--no-deps onedl-mmdetection=={TESTED['onedl-mmdetection']} "
        f"onedl-mmsegmentation=={TESTED['onedl-mmsegmentation']}")
    facts['owners'].update(mmdet=['onedl-mmdetection'], mmseg=[])
    finding, = diagnose(facts)
    assert finding.command.endswith(COMPILE)


@pytest.mark.parametrize('hosts, level', [
    (('mmpretrain', ), 'note'), (('mmdet', ), 'problem'),
    (('mmpretrain', 'mmseg'), 'problem')])
def test_mmpretrain_alone_needs_no_ops(hosts, level):
    facts = _without(copy.deepcopy(FACTS),
                     *(name for name in HOSTS if name not in hosts))
    facts.update(has_ops=False)
    facts['owners']['mmcv'] = ['mmcv-lite']
    facts['probes']['mmcv.ops'] = {'error': 'x', 'missing': 'mmcv._ext'}
    facts['distributions']['setuptools'] = '65.5.0'
    found = {finding.code: finding.level for finding in diagnose(facts)}
    assert found == {'mmcv-no-ops': level, 'setuptools-too-old': level}


@pytest.mark.parametrize('owners, code', [
    (['opencv-python', 'opencv-contrib-python'], 'opencv-twice'),
    (['opencv-python'], 'opencv-broken'), ([], 'opencv-missing')])
@pytest.mark.parametrize('numpy, requirement', [
    ('1.26.4', "'opencv-python-headless<4.12'"),
    ('2.2.6', 'opencv-python-headless==4.12.0.88')])
def test_opencv_is_one_for_the_numpy_that_is_there(owners, code, numpy,
                                                   requirement):
    """OpenCV asks for numpy 2 from 4.12 on; an old torch wants numpy 1."""
    facts = copy.deepcopy(FACTS)
    del facts['distributions']['opencv-python-headless']
    facts['distributions'].update({'numpy': numpy}, **{
        name: '4.10' for name in owners})
    facts['owners']['cv2'] = owners
    facts['probes']['numpy']['found']['version'] = numpy
    facts['probes']['cv2'] = {'error': 'x', 'missing': None if owners else
                              'cv2'}
    finding, = diagnose(facts)
    assert finding.code == code
    assert finding.command.endswith(f'pip install --no-deps {requirement}')


def test_broken_numpy_is_replaced_by_the_same():
    """Another generation would break what was compiled for this one."""
    facts = copy.deepcopy(FACTS)
    facts['distributions']['numpy'] = '1.26.4'
    facts['probes']['numpy'] = {'error': 'x', 'missing': None}
    finding, = diagnose(facts)
    assert finding.command == 'pip install --force-reinstall numpy==1.26.4'


def test_torch_that_lacks_a_package_is_left_as_it_is():
    facts = copy.deepcopy(FACTS)
    facts['probes']['torch'] = {
        'error': "ModuleNotFoundError: No module named 'typing_extensions'",
        'missing': 'typing_extensions'}
    finding, = diagnose(facts)
    assert finding.code == 'torch-broken'
    assert finding.command == 'pip install typing_extensions'


@pytest.mark.parametrize('name', ['mmengine', 'mmengine-lite'])
def test_both_originals_of_mmengine_need_pkg_resources(name):
    facts = copy.deepcopy(FACTS)
    facts['distributions'][name] = '0.10.7'
    del facts['distributions']['setuptools']
    finding, = diagnose(facts)
    assert finding.code == 'setuptools-missing'


def test_pkg_resources_come_with_setuptools():
    facts = copy.deepcopy(FACTS)
    del facts['distributions']['setuptools']
    facts['probes']['mmdet'] = {'error': 'x', 'missing': 'pkg_resources'}
    finding, = diagnose(facts)
    assert finding.command == "pip install 'setuptools<82'"


def _codes(**changes):
    return [finding.code for finding in _diagnose(**changes)]


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
    finding, = _diagnose(
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
    found = _diagnose(
        version='2.9.1' + (build or '+cu130'),
        distributions={**FACTS['distributions'], 'torch': '2.9.1' + build})
    assert [f.code for f in found] == ['torchvision-mismatch',
                                       'torch-unsafe-load']
    for finding in found:
        assert ('add the --index-url that' in finding.text) == bool(build)
        assert f'This torch is the build {build[1:]},' in (
            finding.text) or not build


def _refusing(*lines):
    facts = copy.deepcopy(FACTS)
    facts['requirements'] = list(lines)
    return diagnose(facts)


def test_requirement_gives_the_range_to_install():
    finding, = _refusing(
        'opencv-python 4 has requirement numpy<2.3.0,>=2; python_version >= '
        '"3.9", but you have numpy 2.4.')
    assert finding.command == "pip install 'numpy<2.3.0,>=2'"
    assert finding.text == ('opencv-python refuses numpy 2.4: it needs '
                            'numpy<2.3.0,>=2')


def test_all_that_refuse_a_version_are_pleased_at_once():
    finding, = _refusing(
        'mmcv 4 has requirement numpy<2.3.0,>=2, but you have numpy 2.4.0.',
        'onedl_mmcv 1 has requirement numpy<2.2, but you have numpy 2.4.0.',
        'mmdet 1 has requirement numpy>=2, but you have numpy 2.4.0.')
    assert finding.command == "pip install 'numpy<2.3.0,>=2,<2.2'"
    assert 'onedl_mmcv refuses numpy 2.4.0: it needs numpy<2.2; m' in (
        finding.text)


def test_what_mmrpa_works_without_may_refuse_anything():
    """Its wish would break what works: OpenCV refuses this numpy."""
    found = _refusing(
        'torchaudio 2.10.0 has requirement torch==2.10.0, but you have torch '
        '2.11.0.',
        'xformers 0.0.29 has requirement torch==2.6.0, but you have torch '
        '2.11.0.',
        'tensorflow 2.15.0 has requirement numpy<2.0.0,>=1.23.5, but you have '
        'numpy 2.2.6.')
    assert [f.code for f in found] == ['refused-torch', 'refused-numpy']
    assert {(f.level, f.command) for f in found} == {('note', '')}
    facts = copy.deepcopy(FACTS)
    assert '\n\nno problems' in format_report(facts, found)
    assert 'xformers refuses torch 2.11.0: it needs torch==2.6.0' in (
        found[0].text)


def test_two_versions_are_not_asked_for_at_once():
    finding, = _refusing(
        'onedl-mmdetection 3 has requirement torch==2.10.0, but you have '
        'torch 2.12.0.',
        'mmdet 3 has requirement torch==2.6.0, but you have torch 2.12.0.')
    assert finding.command == (
        f"pip install --no-deps torch=={TESTED['torch']} "
        f"onedl-mmdetection=={TESTED['onedl-mmdetection']}")


@pytest.mark.parametrize('torch, torchvision', [
    ('2.11.0', '0.26'), ('2.5.1+cu124', '0.20'), ('2.0.1', '0.15')])
def test_torchvision_of_a_torch(torch, torchvision):
    assert matching_torchvision(torch) == f'torchvision=={torchvision}.*'


@pytest.mark.parametrize('text, shown', [
    ('/home/a b/.venv/lib/python3.11/site-packages/mmcv/_ext.so: undefined',
     'site-packages/mmcv/_ext.so: undefined'),
    ('~/.venv/lib/python3.11/site-packages/mmcv/_ext.so: undefined',
     'site-packages/mmcv/_ext.so: undefined'),
    (r'C:\Users\a b\env\Lib\site-packages\mmcv\_ext.pyd: undefined',
     r'site-packages\mmcv\_ext.pyd: undefined'),
    (r'DLL load failed: C:\Users\alice\y.dll', 'DLL load failed: y.dll'),
    ('file:///srv/a/site-packages/x.so', 'site-packages/x.so'),
    ('(/opt/x/y.so: bad)', '(y.so: bad)'),
    ('(~/opt/x/y.so: bad)', '(y.so: bad)'),
    ("/a/b.so needs '/srv/a/lib/site-packages/c.so'",
     "b.so needs 'site-packages/c.so'"),
    ('https://example.org/a/b', 'https://example.org/a/b'),
    ('and/or 1/2', 'and/or 1/2')])
def test_folders_are_taken_out(text, shown):
    assert without_paths(text) == shown
    # As the probes say it.
    assert without_paths('ImportError: ' + text) == 'ImportError: ' + shown


@pytest.mark.parametrize('text', ['word ', '/a ', '/a/', 'x/', ' /site-'])
def test_long_errors_are_cut_before_they_are_read(text):
    """Patterns look at pairs of places: of millions, for days."""
    assert len(without_paths(text * 10 ** 6)) <= 4000


def test_tested_set_is_that_of_the_project():
    text = (ROOT / 'requirements.txt').read_text()
    for name, version in TESTED.items():
        assert f'\n{name}=={version}\n' in text
    low, high = SETUPTOOLS
    setup = (ROOT / 'tools/setup_env.py').read_text()
    assert f"'setuptools>={low},<{high}'" in setup
    parts = (ROOT / 'tools/setup_parts.py').read_text()
    numbers = re.search(r'OLDEST, TESTED, NEWEST = (.*)', parts)[1]
    assert numbers.startswith(f'{PYTHONS[0]}, ')
    assert numbers.endswith(f' {PYTHONS[1]}')


def test_version_of_a_build_from_source_is_read():
    assert matching_torchvision('git1a2b3c').startswith('torchvision==')
    assert _codes(version='git1a2b3c') == []


def test_page_names_all_findings():
    """docs/environment.md, against the codes that the rules can give."""
    page = (ROOT / 'docs/environment.md').read_text()
    rows = re.findall(r'^\| (`.*?) \|', page, re.M)
    named = {name for row in rows for name in re.findall(r'`([\w-]+)`', row)}
    source = ''.join(path.read_text() for path in (
        ROOT / 'mmrpa/doctor').glob('rules*.py'))
    # A code is the first argument of a Finding.
    codes = set(re.findall(r"Finding\(\s*f?'([\w{}-]+)'", source))
    assert len(codes) > 25
    assert named == {re.sub(r'\{\w+\}', 'X', code) for code in codes}
