"""Rules about packages other than torch, on facts that were made up."""

import copy

import pytest
from doctor_facts import FACTS, HOSTS, without

from mmrpa.doctor.findings import TESTED
from mmrpa.doctor.report import diagnose, format_report


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
    facts = without(copy.deepcopy(FACTS), *names)
    if 'cv2' in names:
        del facts['distributions']['opencv-python-headless']
    found = diagnose(facts)
    assert {finding.code: finding.level for finding in found} == codes
    if 'hosts-missing' in codes:
        assert f"mmpretrain=={TESTED['onedl-mmpretrain']}" in found[-1].command


def test_missing_mmengine_is_all_that_is_wrong():
    """What imports it is whole: nothing of it has to be installed again."""
    finding, = diagnose(without(copy.deepcopy(FACTS), 'mmengine'))
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
    found = {f.code: f for f in diagnose(without(facts, 'mmcv'))}
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


COMPILE = '--no-binary=onedl-mmcv onedl-mmcv==' + TESTED['onedl-mmcv']


@pytest.mark.parametrize('fault, code', [
    ('no ops', 'mmcv-no-ops'), ('ops for a CPU', 'mmcv-cpu-ops'),
    ('an old torch', 'torch-too-old')])
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
    facts = without(copy.deepcopy(FACTS),
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
