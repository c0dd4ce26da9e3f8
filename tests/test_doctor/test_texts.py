"""What the doctor prints and is documented to print."""

import re

import pytest
from doctor_environments import ROOT

from mmrpa.doctor.findings import PYTHONS, SETUPTOOLS, TESTED
from mmrpa.doctor.probes import without_paths


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
