"""The set-up: its pure parts, and each bad start produced for real."""

import ast
import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import setup_env  # noqa: E402
import setup_parts  # noqa: E402
from setup_parts import SetupError  # noqa: E402

import mmrpa  # noqa: E402

FACTS = {'python': 'cp311', 'platform': 'linux_x86_64',
         'torch': '2.11.0+cu130', 'cuda': '13.0'}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project folder with the set-up and without anything set up."""
    for variable in list(os.environ):
        if variable.startswith(('PIP_', 'MMRPA_')) or variable == 'CXX':
            monkeypatch.delenv(variable)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('MMRPA_CACHE_DIR', str(tmp_path / 'cache'))
    root = tmp_path / 'project'
    (root / 'tools').mkdir(parents=True)
    shutil.copy(ROOT / 'requirements.txt', root)
    for name in ('setup_env.py', 'setup_parts.py'):
        shutil.copy(ROOT / 'tools' / name, root / 'tools')
    return root


def make_program(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return str(path)


def make_wheel(path, names=('mmcv/__init__.py', 'mmcv/_ext.cpython.so')):
    """Write a zip file with the given members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names:
            archive.writestr(name, 'content of ' + name)
    return path


def start(tree):
    """Start the set-up of ``tree`` as a user does.

    A shell that runs the tests in the background has them ignore SIGINT, and
    children inherit that; a user's shell does not.
    """
    return subprocess.Popen(
        [sys.executable, 'tools/setup_env.py'], cwd=tree, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finished_stamp(tree, **changes):
    """Return the stamp of a finished set-up of ``tree``."""
    stamp = dict(setup_env.read_wanted(tree), done=list(setup_env.STAGES),
                 gpu=False, summary='Python 3.11.7')
    return dict(stamp, **changes)


# Pure parts.


@pytest.mark.parametrize('name', ['setup_env.py', 'setup_parts.py'],
                         ids=['env', 'parts'])
def test_old_pythons_can_parse(name):
    text = (ROOT / 'tools' / name).read_text()
    ast.parse(text, feature_version=(3, 6))
    assert 'from __future__' not in text  # annotations: Python 3.7


@pytest.mark.parametrize('change, first', [
    ({}, None),
    ({'root': '/elsewhere'}, 'venv'),
    ({'requirements': 'other'}, 'build tools'),
    ({'cpu': '0'}, 'mmcv'),
    ({'wheel': '/old.whl'}, 'mmcv'),
    ({'done': ['venv', 'build tools', 'torch']}, 'mmcv'),
], ids=['finished', 'moved', 'new_pins', 'cpu', 'wheel', 'interrupted'])
def test_plan(tree, monkeypatch, change, first):
    monkeypatch.setenv('MMRPA_CPU', '1')
    make_wheel(tree / 'own.whl')
    monkeypatch.setenv('MMRPA_MMCV_WHEEL', str(tree / 'own.whl'))
    make_program(tree / '.venv/bin/python', 'exit 0')
    todo = setup_env.plan(finished_stamp(tree, **change),
                          setup_env.read_wanted(tree))
    stages = ('venv', 'build tools', 'torch', 'mmcv', 'hosts', 'mmrpa',
              'check')
    assert todo == (stages[stages.index(first):] if first else ())


def test_plan_keeps_an_earlier_choice(tree):
    make_program(tree / '.venv/bin/python', 'exit 0')
    stamp = finished_stamp(tree, cpu='1', wheel='/a.whl')
    assert setup_env.plan(stamp, setup_env.read_wanted(tree)) == ()


def test_plan_starts_over_without_python(tree):
    stamp = finished_stamp(tree)
    assert setup_env.plan(stamp,
                          setup_env.read_wanted(tree)) == setup_env.STAGES


def test_new_gpu_reopens_mmcv(tree, monkeypatch):
    make_program(tree / '.venv/bin/python', 'exit 0')
    make_program(tree / 'bin/nvidia-smi', 'echo "GPU 0: H200"')
    wanted = setup_env.read_wanted(tree)
    setup_parts.write_stamp(tree / '.venv', finished_stamp(tree))
    monkeypatch.setenv('PATH', str(tree))
    assert setup_env.left_to_do(tree / '.venv', wanted) == ()
    monkeypatch.setenv('PATH', f'{tree}/bin:/usr/bin:/bin')
    assert setup_env.left_to_do(tree / '.venv', wanted)[0] == 'mmcv'
    setup_parts.write_stamp(tree / '.venv', finished_stamp(tree, cpu='1'))
    assert setup_env.left_to_do(tree / '.venv', wanted) == ()


def test_wheel_key_tells_all_apart():
    keys = {setup_parts.wheel_key('2.3.6', FACTS, 'cpu'),
            setup_parts.wheel_key('2.3.7', FACTS, 'cpu'),
            setup_parts.wheel_key('2.3.6', FACTS, 'sm90')}
    for name, value in (('python', 'cp312'), ('platform', 'linux_aarch64'),
                        ('torch', '2.11.0+cpu'), ('cuda', None)):
        keys.add(setup_parts.wheel_key('2.3.6', dict(FACTS, **{name: value}),
                                       'cpu'))
    assert len(keys) == 7
    assert not any('/' in key or ' ' in key for key in keys)


@pytest.mark.parametrize('variables, expected', [
    ({'MMRPA_CACHE_DIR': '/m', 'XDG_CACHE_HOME': '/x'}, '/m/wheels'),
    ({'MMRPA_CACHE_DIR': '', 'XDG_CACHE_HOME': '/x'}, '/x/mmrpa/wheels'),
    ({'MMRPA_CACHE_DIR': '', 'XDG_CACHE_HOME': '', 'HOME': '/h'},
     '/h/.cache/mmrpa/wheels'),
], ids=['own', 'xdg', 'home'])
def test_cache_base(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(setup_parts.cache_base()) == expected


@pytest.mark.parametrize('line, expected', [
    ('  [12/96] c++ -MMD -MF x.o.d', 'compiled 12 of 96 objects'),
    ('  Downloading torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl '
     '(530.6 MB)', 'downloading torch-2.11.0 (530.6 MB)'),
    ('Installing collected packages: a, b, c', 'unpacking 3 packages'),
    ('WARNING: Location is ignored: it is neither a file', None),
    ('     ---- 515.6/515.6 kB', None),
], ids=['ninja', 'download', 'install', 'warning', 'bar'])
def test_activity(line, expected):
    assert setup_parts.activity(line) == expected


@pytest.mark.parametrize('line, word', [
    ('OSError: [Errno 28] No space left on device', 'disk'),
    ("NewConnectionError('Connection refused')", 'network'),
    ('c++: fatal error: Killed signal terminated program cc1plus',
     'MAX_JOBS=1'),
], ids=['disk', 'network', 'memory'])
def test_failure_hint(line, word):
    assert word in setup_parts.failure_hint('before\n' + line + '\nafter')
    assert setup_parts.failure_hint('SyntaxError: invalid syntax') == ''


def test_pins_and_metadata_agree():
    pins = setup_parts.read_pins((ROOT / 'requirements.txt').read_text())
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / 'setup.cfg')
    # Anything more would put a second mmcv over the user's own.
    assert metadata['options']['install_requires'].split() == [
        f'torch>={".".join(map(str, mmrpa.OLDEST_TORCH))}']
    bounds = metadata['options.extras_require']['onedl'].split()
    assert len(bounds) == 5
    for bound in bounds:
        name, version = bound.split('>=')
        assert pins[name] == version
    for name in ('torch', 'torchvision', 'numpy', 'opencv-python-headless'):
        assert name in pins


# The wheel cache.


def test_wheel_problem(tmp_path):
    sound = make_wheel(tmp_path / 'sound.whl')
    assert setup_parts.wheel_problem(sound) is None
    no_ops = make_wheel(tmp_path / 'no_ops.whl', ['mmcv/__init__.py'])
    assert 'without compiled ops' in setup_parts.wheel_problem(no_ops)
    content = sound.read_bytes()
    cut = tmp_path / 'cut.whl'
    cut.write_bytes(content[:len(content) // 2])
    assert 'not a readable wheel' in setup_parts.wheel_problem(cut)
    flipped = tmp_path / 'flipped.whl'
    flipped.write_bytes(content.replace(b'content of mmcv/_ext',
                                        b'c0ntent of mmcv/_ext'))
    assert 'damaged at mmcv/_ext' in setup_parts.wheel_problem(flipped)


@pytest.mark.parametrize('cached, works, built', [
    ('sound', True, False),
    ('sound', False, True),
    ('broken', True, True),
    ('none', True, True),
], ids=['cached', 'cached_but_unfit', 'broken', 'not_cached'])
def test_mmcv_comes_from_cache_or_is_built(tree, monkeypatch, capsys, cached,
                                           works, built):
    folder = setup_parts.cache_base() / setup_parts.wheel_key('2.3.6', FACTS,
                                                              'cpu')
    wheel = folder / 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'
    if cached == 'sound':
        make_wheel(wheel)
    elif cached == 'broken':
        folder.mkdir(parents=True)
        wheel.write_bytes(b'PK, then the disk was full')
    setup = setup_env.Setup(tree, setup_env.read_wanted(tree), 0)
    monkeypatch.setattr(setup, 'torch_facts', lambda: FACTS)
    monkeypatch.setattr(setup, 'download_prebuilt', lambda: None)
    fresh = make_wheel(tree / 'fresh.whl')
    monkeypatch.setattr(setup, 'build_mmcv', lambda *args: fresh)
    tried = []

    def try_mmcv(path):
        tried.append(path)
        return None if works or path == fresh else 'undefined symbol'

    monkeypatch.setattr(setup, 'try_mmcv', try_mmcv)
    setup.stage_mmcv()
    assert (tried[-1] == fresh) == built
    said = capsys.readouterr().out
    assert ('not a readable wheel' in said) == (cached == 'broken')
    assert ('undefined symbol' in said) == (not works)
    assert setup.locks == (0,)  # the cache's lock was given back


def test_build_leaves_whole_wheels_only(tree, monkeypatch):
    folder = tree / 'cache'
    (folder / 'build-killed').mkdir(parents=True)
    setup = setup_env.Setup(tree, setup_env.read_wanted(tree), 0)
    monkeypatch.setattr(setup_parts, 'build_problem', lambda *args: None)
    monkeypatch.setenv('MAX_JOBS', '3')
    name = 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'
    members = ['mmcv/__init__.py']

    def call(command, what, env):
        assert env['MMCV_WITH_OPS'] == '1' and env['MAX_JOBS'] == '3'
        assert env['FORCE_CUDA'] == '0' and env['CUDA_VISIBLE_DEVICES'] == ''
        assert '--no-build-isolation' in command
        make_wheel(Path(command[command.index('-w') + 1]) / name, members)

    monkeypatch.setattr(setup, 'call', call)
    with pytest.raises(SetupError, match='without compiled ops'):
        setup.build_mmcv(folder, FACTS)
    assert list(folder.iterdir()) == []
    members.append('mmcv/_ext.so')
    assert setup.build_mmcv(folder, FACTS) == folder / name
    assert list(folder.iterdir()) == [folder / name]


def test_lock_is_held_until_the_last_child_ends(tmp_path, capsys):
    with setup_parts.file_lock(tmp_path / 'lock', 'set-up') as lock:
        child = subprocess.Popen(['sleep', '1'], pass_fds=[lock])
    started = time.time()
    with setup_parts.file_lock(tmp_path / 'lock', 'set-up'):
        assert child.wait(1) == 0
        assert time.time() - started > 0.5
    assert 'waiting for another set-up' in capsys.readouterr().out


# Running programs.


def test_run_logged_shows_progress_and_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_parts, 'PROGRESS_SECONDS', 0.2)
    log = tmp_path / 'log'
    with pytest.raises(SetupError) as caught:
        setup_parts.run_logged(
            ['sh', '-c', 'echo "[3/7] c++"; sleep 0.7; echo bad; exit 5'],
            'compiling', log, dict(os.environ), ())
    assert 'compiled 3 of 7 objects' in capsys.readouterr().out
    assert 'exit code 5' in str(caught.value)
    assert 'bad' in str(caught.value) and str(log) in str(caught.value)
    assert 'bad' in log.read_text()


def test_remove_half_installed(tree):
    site = tree / '.venv/lib/python3.11/site-packages'
    for name in ('whole-1.dist-info', 'half-1.dist-info', '~orch'):
        (site / name).mkdir(parents=True)
    (site / 'whole-1.dist-info/RECORD').write_text('')
    setup = setup_env.Setup(tree, setup_env.read_wanted(tree), 0)
    setup.remove_half_installed()
    assert [path.name for path in site.iterdir()] == ['whole-1.dist-info']


# Bad starts.


@pytest.mark.parametrize('version', [(3, 9, 18), (3, 13, 0)],
                         ids=['too_old', 'too_new'])
def test_wrong_python(tree, monkeypatch, capsys, version):
    make_program(tree / 'bin/python3.12', 'echo dead shim; exit 127')
    make_program(tree / 'bin/python3.11', 'echo 1')
    monkeypatch.setenv('PATH', str(tree / 'bin'))
    assert setup_env.main([], version, tree) == 1
    said = capsys.readouterr().err
    assert '.'.join(map(str, version)) in said
    assert 'make PYTHON=python3.11 quickstart' in said
    assert not (tree / '.venv').exists()
    (tree / 'bin/python3.11').unlink()
    assert setup_env.main([], version, tree) == 1
    assert 'none is on PATH' in capsys.readouterr().err


def test_no_venv_module(tmp_path):
    python = make_program(tmp_path / 'python3', 'exit 1')
    with pytest.raises(SetupError, match=r'apt install python3\.\d+-venv'):
        setup_parts.check_venv_module(python)
    setup_parts.check_venv_module(sys.executable)


def test_no_disk_space(tree, monkeypatch, capsys):
    usage = namedtuple('usage', 'total used free')(10**11, 10**11, 10**9)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    assert setup_env.main([], (3, 11, 7), tree) == 1
    assert '1.0 GB free' in capsys.readouterr().err
    assert not (tree / '.venv').exists()


def test_cannot_compile(tmp_path, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.delenv('CUDA_PATH', raising=False)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv('PATH', str(tmp_path))
        assert 'no C++ compiler' in setup_parts.build_problem(sys.executable,
                                                              False)
    python = make_program(tmp_path / 'python', f'echo {tmp_path}')
    monkeypatch.setenv('CXX', make_program(tmp_path / 'cxx', 'exit 0'))
    assert 'Python.h is missing' in setup_parts.build_problem(python, False)
    (tmp_path / 'Python.h').write_text('')
    assert setup_parts.build_problem(python, False) is None
    assert 'nvcc' in setup_parts.build_problem(python, True)
    make_program(tmp_path / 'bin/nvcc', 'exit 0')
    assert setup_parts.build_problem(python, True) is None
    monkeypatch.setenv('CXX', make_program(tmp_path / 'cxx',
                                           'echo no vector; exit 1'))
    assert 'no vector' in setup_parts.build_problem(python, False)


def test_gpu_that_torch_cannot_use(tree, monkeypatch):
    setup = setup_env.Setup(tree, setup_env.read_wanted(tree), 0)
    facts = json.dumps(dict(FACTS, capability=None))
    monkeypatch.setattr(setup, 'call', lambda *args: ['a warning', facts])
    assert setup.torch_facts()['cuda'] == '13.0'
    setup.gpu = True
    with pytest.raises(SetupError, match='update the driver.*MMRPA_CPU=1'):
        setup.torch_facts()


@pytest.mark.parametrize('name, value', [
    ('MMRPA_CPU', 'yes'), ('MMRPA_MMCV_WHEEL', '/no/such.whl'),
], ids=['cpu', 'wheel'])
def test_wrong_variables(tree, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert setup_env.main([], (3, 11, 7), tree) == 1
    said = capsys.readouterr().err
    assert name in said and value in said


def test_a_folder_that_is_no_venv_is_kept(tree, capsys):
    (tree / '.venv').mkdir()
    (tree / '.venv/thesis.txt').write_text('mine')
    assert setup_env.main([], (3, 11, 7), tree) == 1
    assert 'is no virtual environment' in capsys.readouterr().err
    assert (tree / '.venv/thesis.txt').read_text() == 'mine'


def test_broken_venv_is_made_again(tree, monkeypatch, capsys):
    make_program(tree / '.venv/bin/python', 'exit 1')
    setup_parts.write_stamp(tree / '.venv', finished_stamp(
        tree, done=['venv', 'build tools']))
    monkeypatch.setattr(setup_env, 'GB_WITHOUT_TORCH', 10**9)
    assert setup_env.main([], (3, 11, 7), tree) == 1
    said = capsys.readouterr()
    assert 'removing .venv (its Python does not start)' in said.out
    assert 'GB needed' in said.err
    assert not (tree / '.venv').exists()


def test_finished_set_up_says_one_line(tree):
    make_program(tree / '.venv/bin/python', 'exit 1')  # must not be needed
    setup_parts.write_stamp(tree / '.venv', finished_stamp(tree, cpu='1'))
    process = start(tree)
    said = process.communicate()[0]
    assert process.returncode == 0
    assert said == 'set-up: ready (Python 3.11.7)\n'


def test_no_network_then_no_compiler(tree, monkeypatch):
    """One half-made .venv goes through two bad starts, each told at once."""
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    process = start(tree)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert 'no network: pip cannot reach its package index' in said
    assert 'Traceback' not in said
    log = re.search(r'full output: (\S+)', said).group(1)
    assert '127.0.0.1' in Path(log).read_text()

    # Now pip finds small packages, but no wheel of mmcv.
    wheels = tree / 'wheels'
    wheels.mkdir()
    with zipfile.ZipFile(wheels / 'wheel-9-py3-none-any.whl', 'w') as file:
        file.writestr('wheel-9.dist-info/METADATA',
                      'Metadata-Version: 2.1\nName: wheel\nVersion: 9\n')
        file.writestr('wheel-9.dist-info/WHEEL',
                      'Wheel-Version: 1.0\nRoot-Is-Purelib: true\n'
                      'Tag: py3-none-any\n')
        file.writestr('wheel-9.dist-info/RECORD', '')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheels))
    monkeypatch.setenv('PATH', str(tree))
    process = start(tree)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert 'going on with the unfinished .venv' in said
    assert 'no C++ compiler' in said and 'MMRPA_MMCV_WHEEL' in said
    assert 'Traceback' not in said
    site = tree / '.venv/lib'
    assert not list(site.glob('python*/site-packages/torch'))


def test_interruption_then_second_run(tree, monkeypatch, capsys):
    process = start(tree)
    assert 'making .venv' in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=20)[0]
    finally:
        process.kill()  # a set-up that goes on would install gigabytes
    assert process.returncode == 130
    assert 'interrupted' in said and 'Traceback' not in said
    assert (tree / '.venv').exists()
    # The second run finds the half-made folder, and the lock free.
    monkeypatch.setattr(setup_env, 'GB_WITHOUT_TORCH', 10**9)
    assert setup_env.main([], (3, 11, 7), tree) == 1
    said = capsys.readouterr()
    assert 'removing .venv (its ' in said.out
    assert 'GB needed' in said.err


def test_help_names_the_variables(capsys):
    with pytest.raises(SystemExit) as caught:
        setup_env.main(['--help'])
    assert caught.value.code == 0
    assert 'MMRPA_MMCV_WHEEL' in capsys.readouterr().out
