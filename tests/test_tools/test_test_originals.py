"""The environment of the original packages, and what runs in it."""

import json
import subprocess
import sys

import pytest
from helpers import TOOLS, load_tool

TESTS = TOOLS.parent / 'tests'


@pytest.fixture
def tool():
    return load_tool('test_originals')


@pytest.fixture
def environment(tool, monkeypatch, tmp_path):
    """Its module, over a folder with torch, a fork and mmrpa; no index."""
    module = sys.modules['originals.environment']
    site = tmp_path / 'tested'
    for name, package in (('torch', 'torch'), ('onedl-mmengine', 'mmengine'),
                          ('onedl-mmcv', 'mmcv'), ('mmrpa', 'mmrpa')):
        info = site / f'{name.replace("-", "_")}-1.0.dist-info'
        info.mkdir(parents=True)
        (site / package).mkdir()
        (site / package / '__init__.py').write_text(
            f'origin = "tested {name}"')
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
        (info / 'RECORD').write_text(
            f'{package}/__init__.py,,\n{info.name}/METADATA,,\n')
    (site / 'mmcv/_ext.so').write_text('compiled')
    (site / 'hook.pth').write_text('import sys; sys.path.insert(0, "/fork")')
    monkeypatch.setattr(module, '_here', lambda: site)
    installed = []

    def install(env):
        installed.append(env)
        for name in ('mmengine', 'mmcv'):
            package = module._site_packages(env) / name
            package.mkdir()
            (package / '__init__.py').write_text('origin = "original"')

    monkeypatch.setattr(module, '_install', install)
    module.installed = installed
    return module


def origins(module, env, *names):
    code = f'import {", ".join(names)}; print(*(m.origin for m in ' \
           f'({", ".join(names)},)), sep=";")'
    done = subprocess.run([module.interpreter(env), '-c', code], text=True,
                          capture_output=True)
    return done.stdout.strip().split(';') if not done.returncode else \
        done.stderr.strip().splitlines()[-1]


def test_it_has_torch_and_no_fork(environment, tmp_path):
    env = tmp_path / 'env'
    assert environment.prepare(env) is True
    assert origins(environment, env, 'torch', 'mmengine', 'mmcv') == [
        'tested torch', 'original', 'original']
    shared = {p.name for p in (env / 'shared').iterdir()}
    assert shared == {'torch', 'torch-1.0.dist-info', 'mmrpa'}
    assert (env / 'shared/mmrpa').resolve() == TOOLS.parent / 'mmrpa'
    operators, = env.glob('lib/*/site-packages/mmcv/_ext.so')
    assert operators.read_text() == 'compiled'


def test_it_is_made_once_and_again_when_the_tested_set_changes(
        environment, tmp_path):
    env = tmp_path / 'env'
    assert environment.prepare(env) is True
    assert environment.prepare(env) is False
    assert len(environment.installed) == 1
    metadata, = (tmp_path / 'tested').glob('torch-*/METADATA')
    metadata.write_text('Name: torch\nVersion: 2.0\n')
    assert environment.prepare(env) is True
    assert len(environment.installed) == 2


def test_an_interrupted_one_is_made_anew(environment, monkeypatch, tmp_path):
    env = tmp_path / 'env'

    def interrupt(env):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, '_install', interrupt)
        with pytest.raises(KeyboardInterrupt):
            environment.prepare(env)
    assert environment.prepare(env) is True
    assert origins(environment, env, 'mmengine') == ['original']


def test_a_folder_of_others_is_kept(environment, tmp_path):
    (tmp_path / 'mine').write_text('x')
    with pytest.raises(environment.OriginalsError, match='not made by this'):
        environment.prepare(tmp_path)
    assert (tmp_path / 'mine').read_text() == 'x'


def test_python_without_torch_is_named(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, '_here', lambda: tmp_path / 'nothing')
    with pytest.raises(environment.OriginalsError, match='has no torch'):
        environment.prepare(tmp_path / 'env')


def test_pip_that_fails_is_quoted(tool, monkeypatch, tmp_path):
    module = sys.modules['originals.environment']
    monkeypatch.setattr(module, 'PINS', ('no-such-package-of-mmrpa==0.0.1',))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    env = tmp_path / 'env'
    with pytest.raises(module.OriginalsError, match='no-such-package'):
        module.prepare(env)
    assert json.loads((env / 'stamp.json').read_text())['done'] is False


def test_what_is_left_out_exists(tool):
    for path in tool.LEFT_OUT:
        assert (TESTS / path).exists(), path
    for name in (*tool.DESELECTED, *tool.QUICK):
        path, _, test = name.partition('::')
        assert (TESTS / path).exists(), path
        if test:
            found = (TESTS / path).read_text()
            assert f'def {test.partition("[")[0]}(' in found, name
        if '[' in test:
            case = test.partition('[')[2].rstrip(']')
            assert (TOOLS.parent / 'configs' / case).is_file()


@pytest.mark.parametrize('args, selected', [
    (['-q'], ['-q', 'tests', '--ignore=tests/test_ops']),
    (['--quick'], ['tests/test_registry.py', '--ignore=tests/test_ops']),
    ([str(TESTS / 'test_docs.py')], [str(TESTS / 'test_docs.py')]),
], ids=['all', 'quick', 'own'])
def test_what_is_run(args, selected, tool, monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, 5, '', '')

    monkeypatch.setattr(tool, 'prepare', lambda env: False)
    monkeypatch.setattr(tool, 'report', lambda env, python: None)
    monkeypatch.setattr(tool.subprocess, 'run', run)
    assert tool.main(['--env', str(tmp_path), *args]) == 5  # pytest's status
    command, = commands
    assert command[:3] == [f'{tmp_path}/bin/python', '-m', 'pytest']
    assert set(selected) <= set(command)
    assert ('--ignore=tests/test_ops' in command) == (len(selected) > 1)
    assert sum(a.startswith('--deselect=tests/') for a in command) == len(
        tool.DESELECTED)
