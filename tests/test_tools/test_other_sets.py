"""Environments with other packages, and what runs in them."""

import json
import re
import subprocess
import sys

import pytest
from helpers import TOOLS, load_tool

TESTS = TOOLS.parent / 'tests'


@pytest.fixture
def tool():
    """That of the original packages."""
    return load_tool('test_originals')


@pytest.fixture
def torch_tool():
    return load_tool('test_torch')


@pytest.fixture
def environment(tool, monkeypatch, tmp_path):
    """Its module, over a folder with torch, a fork and mmrpa; no index."""
    module = sys.modules['other_sets.environment']
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

    def install(env, pip_args):
        assert not (env / 'shared').exists()  # pip would write through links
        installed.append(pip_args)
        for pin in (text for text in pip_args if '==' in text):
            name = pin.split('==')[0].removesuffix('-lite')
            package = module._site_packages(env) / name
            package.mkdir()
            (package / '__init__.py').write_text(f'origin = "{pin}"')

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


def test_it_has_torch_and_no_fork(tool, environment, tmp_path):
    env = tmp_path / 'env'
    assert environment.prepare(env, tool.RECIPE) is True
    assert origins(environment, env, 'torch', 'mmengine', 'mmcv') == [
        'tested torch', 'mmengine==0.10.7', 'mmcv-lite==2.1.0']
    shared = {p.name for p in (env / 'shared').iterdir()}
    assert shared == {'torch', 'torch-1.0.dist-info', 'mmrpa'}
    assert (env / 'shared/mmrpa').resolve() == TOOLS.parent / 'mmrpa'
    operators, = env.glob('lib/*/site-packages/mmcv/_ext.so')
    assert operators.read_text() == 'compiled'


def test_it_has_another_torch_and_no_operators(torch_tool, environment,
                                               tmp_path):
    env = tmp_path / 'env'
    recipe = torch_tool.make_plan('2.6.0').recipe
    assert environment.prepare(env, recipe) is True
    assert origins(environment, env, 'torch', 'mmengine', 'mmcv',
                   'torchvision') == [
        'torch==2.6.0', 'tested onedl-mmengine', 'tested onedl-mmcv',
        'torchvision==0.21.*']
    shared = {p.name for p in (env / 'shared').iterdir()}
    assert shared == {
        'mmengine', 'onedl_mmengine-1.0.dist-info', 'mmcv',
        'onedl_mmcv-1.0.dist-info', 'mmrpa'}
    assert not list((env / 'shared/mmcv').glob('_ext*'))
    assert (tmp_path / 'tested/mmcv/_ext.so').exists()


def test_it_is_made_once_and_again_when_the_tested_set_changes(
        tool, environment, tmp_path):
    env = tmp_path / 'env'
    assert environment.prepare(env, tool.RECIPE) is True
    assert environment.prepare(env, tool.RECIPE) is False
    assert len(environment.installed) == 1
    metadata, = (tmp_path / 'tested').glob('torch-*/METADATA')
    metadata.write_text('Name: torch\nVersion: 2.0\n')
    assert environment.prepare(env, tool.RECIPE) is True
    assert len(environment.installed) == 2


def test_an_interrupted_one_is_made_anew(tool, environment, monkeypatch,
                                         tmp_path):
    env = tmp_path / 'env'

    def interrupt(env, pip_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, '_install', interrupt)
        with pytest.raises(KeyboardInterrupt):
            environment.prepare(env, tool.RECIPE)
    assert environment.prepare(env, tool.RECIPE) is True
    assert origins(environment, env, 'mmengine') == ['mmengine==0.10.7']


def test_a_folder_of_others_is_kept(tool, environment, tmp_path):
    (tmp_path / 'mine').write_text('x')
    with pytest.raises(environment.OtherSetError, match='not made by this'):
        environment.prepare(tmp_path, tool.RECIPE)
    assert (tmp_path / 'mine').read_text() == 'x'


def test_python_without_torch_is_named(tool, environment, monkeypatch,
                                       tmp_path):
    monkeypatch.setattr(environment, '_here', lambda: tmp_path / 'nothing')
    with pytest.raises(environment.OtherSetError, match='has no torch'):
        environment.prepare(tmp_path / 'env', tool.RECIPE)


def test_pip_that_fails_is_quoted(tool, monkeypatch, tmp_path):
    module = sys.modules['other_sets.environment']
    recipe = module.Recipe(('no-such-package-of-mmrpa==0.0.1', ), (), False)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    env = tmp_path / 'env'
    with pytest.raises(module.OtherSetError, match='no-such-package'):
        module.prepare(env, recipe)
    assert json.loads((env / 'stamp.json').read_text())['done'] is False


def test_what_is_left_out_exists(tool, torch_tool):
    for path in tool.LEFT_OUT:
        assert (TESTS / path).exists(), path
    for name in (*tool.DESELECTED, *tool.QUICK, *torch_tool.TESTS):
        path, _, test = name.partition('::')
        assert (TESTS / path).exists(), path
        if test:
            found = (TESTS / path).read_text()
            assert f'def {test.partition("[")[0]}(' in found, name
        if '[' in test:
            case = test.partition('[')[2].rstrip(']')
            assert (TOOLS.parent / 'configs' / case).is_file()


def test_what_is_left_out_imports_no_host(tool):
    hosts = 'mmengine|mmcv|mmdet|mmseg|mmpretrain'
    host = re.compile(rf'^\s*(?:from|import) (?:{hosts})\b', re.M)
    files = [file for path in tool.LEFT_OUT for file in (
        [TESTS / path] if path.endswith('.py') else (TESTS / path).glob('*.py')
    )]
    assert len(files) > len(tool.LEFT_OUT)
    assert [file for file in files if host.search(file.read_text())] == []


DOCS = str(TESTS / 'test_docs.py')
SKIPPED = '--ignore=tests/test_ops'


@pytest.fixture
def running(tool, monkeypatch):
    """Its module, as if every environment were there."""
    module = sys.modules['other_sets.running']
    monkeypatch.setattr(module, 'prepare', lambda env, recipe: False)
    return module


@pytest.fixture
def run(tool, running, monkeypatch, tmp_path):
    """Run the tool from a folder without pytest: its command."""
    def run(*args, folder=TOOLS.parent):
        commands = []

        def note(command, **options):
            commands.append(list(map(str, command)))
            return subprocess.CompletedProcess(command, 5, '', '')

        monkeypatch.chdir(folder)
        monkeypatch.setattr(running.subprocess, 'run', note)
        assert tool.main(['--env', str(tmp_path), *args]) == 5  # pytest's
        command, = commands
        assert command[:3] == [f'{tmp_path}/bin/python', '-m', 'pytest']
        assert sum(a.startswith('--deselect=tests/') for a in command) == len(
            tool.DESELECTED)
        return command

    monkeypatch.setattr(running, 'report', lambda plan, env: None)
    return run


@pytest.mark.parametrize('args, selected', [
    (['-q'], ['-q', 'tests']),
    (['--quick'], ['tests/test_registry.py']),
    # Values of options, which are folders as well.
    (['--quick', '-k', 'configs'], ['-k', 'configs',
                                    'tests/test_registry.py']),
    (['--junitxml', 'docs'], ['docs', 'tests']),
    (['--ignore', 'tests/test_swap'], ['tests/test_swap', 'tests']),
    (['--durations', '5'], ['--durations', '5', 'tests']),
])
def test_what_is_run(args, selected, run):
    command = run(*args)
    assert set(selected) <= set(command)
    assert SKIPPED in command


@pytest.mark.parametrize('folder, arg, test', [
    ('.', DOCS, DOCS), ('.', 'tests/test_docs.py', DOCS),
    ('tests', 'test_docs.py', DOCS), ('tools', 'tests/test_docs.py', DOCS),
    ('tests', 'test_docs.py::test_x[a/b::c]', DOCS + '::test_x[a/b::c]'),
    ('tools', '../tests/test_ops', str(TESTS / 'test_ops'))])
def test_own_paths_are_run_alone_from_any_folder(folder, arg, test, run):
    for args in ([arg], ['-q', arg], ['--quick', arg, '-x']):
        command = run(*args, folder=TOOLS.parent / folder)
        assert [a for a in command if a.startswith(('tests', str(TESTS)))
                ] == [test]
        assert not any(a.startswith('--ignore') for a in command)


@pytest.mark.parametrize('path', ['tests/test_nothing.py', 'test_no.py::x'])
def test_path_that_is_not_there_is_an_error(path, tool, running, monkeypatch,
                                            capsys):
    monkeypatch.setattr(running, 'prepare',
                        lambda env, recipe: pytest.fail('too late'))
    assert tool.main([path]) == 1
    assert f'there is no {path.split("::")[0]!r} under' in (
        capsys.readouterr().err)


def test_packages_that_end_their_process_are_named(torch_tool, running,
                                                   monkeypatch, tmp_path):
    monkeypatch.setattr(
        running.subprocess, 'run', lambda command, **options:
        subprocess.CompletedProcess(command, -9, '', ''))
    with pytest.raises(torch_tool.OtherSetError, match='ended with status -9'):
        running.report(torch_tool.make_plan('2.6.0'), tmp_path)


@pytest.fixture
def answers(torch_tool, running, monkeypatch):
    """What each command says, in order, whose place the command takes."""
    said = []

    def answer(command, **options):
        status, text = said.pop(0)
        said.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, status, text)

    monkeypatch.setattr(running, 'report', lambda plan, env: None)
    monkeypatch.setattr(running.subprocess, 'run', answer)
    return said


def test_what_another_torch_runs_in(torch_tool, answers, capsys):
    answers.append((5, ''))
    assert torch_tool.main(['2.6.0', '-q']) == 5  # pytest's
    assert 'build/torch-2.6.0 is up to date' in capsys.readouterr().out
    command, = answers
    assert command[:3] == [f'{TOOLS.parent}/build/torch-2.6.0/bin/python',
                           '-m', 'pytest']
    assert {'-q', 'tests/test_ops', 'tests/test_registry.py'} < set(command)
    assert 'tests' not in command


@pytest.mark.parametrize('status, text, expected', [
    (1, 'File\nImportError: mmrpa needs torch 2.6 or later, this is 2.5.1', 0),
    (0, '', 1), (1, 'ImportError: libtorch.so', 1)])
def test_release_that_is_too_old_has_to_be_refused(
        status, text, expected, torch_tool, answers, capsys):
    answers.append((status, text))
    assert torch_tool.main(['2.5.1', '-q']) == expected
    said = capsys.readouterr()
    assert ('refused: ImportError: mmrpa needs' in said.out) == (not expected)
    assert ('does not refuse it, but says' in said.err) == bool(expected)
    command, = answers  # no tests
    assert command[1:] == ['-c', 'import mmrpa.layers']


@pytest.mark.parametrize('text', ['2.6', 'torch', '2.6.0 --pre'])
def test_what_is_no_release_is_refused(text, torch_tool, capsys):
    with pytest.raises(SystemExit):
        torch_tool.main([text])
    assert f'{text!r} is no release of torch' in capsys.readouterr().err
