#!/usr/bin/env python3
"""Make .venv with the tested set of packages; ``make`` runs this first.

environment variables:
  MMRPA_CPU=1            ops for the CPU only, even where there is a GPU
                         (kept by later runs; MMRPA_CPU=0 asks for CUDA again)
  MMRPA_MMCV_WHEEL=FILE  install this mmcv wheel instead of finding one
  MMRPA_CACHE_DIR=DIR    where built mmcv wheels are kept
                         (default: ${XDG_CACHE_HOME:-~/.cache}/mmrpa)
  MAX_JOBS, CXX, CFLAGS  honoured when mmcv is compiled
  PIP_*                  pip's own configuration is honoured everywhere
"""
# Standard library only, and syntax that Python 3.6 parses: an old Python must
# get as far as the message that says it is too old.
import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import setup_parts as parts
from setup_parts import SetupError, query, say

ROOT = Path(__file__).resolve().parents[1]
STAGES = ('venv', 'build tools', 'torch', 'mmcv', 'hosts', 'mmrpa', 'check')
BUILD_TOOLS = ('pip>=23', 'setuptools>=77,<82', 'wheel', 'ninja')
GB_WITHOUT_TORCH, GB_WITH_TORCH, GB_WITH_PIP_CACHE = 8, 2, 12
# Short, because a missing network must be told at once, not after minutes.
PIP_PROBE = ('--timeout', '10', '--retries', '1')


def main(argv: Optional[Sequence[str]] = None,
         version: Sequence = sys.version_info, root: Path = ROOT) -> int:
    """Set up ``root``; return 0, 1 (said why) or 130 (interrupted)."""
    argparse.ArgumentParser(
        prog='setup_env.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    try:
        set_up(root, version)
        return 0
    except KeyboardInterrupt:
        print('\nset-up: interrupted; the same command goes on from here',
              file=sys.stderr)
        return 130
    except (SetupError, OSError) as error:
        print('set-up: error: {}'.format(error), file=sys.stderr)
        return 1


def set_up(root: Path, version: Sequence) -> None:
    """Bring ``root/.venv`` to the state that requirements.txt describes."""
    venv, wanted = root / '.venv', read_wanted(root)
    if left_to_do(venv, wanted):
        with parts.file_lock(root / '.venv.lock', 'set-up') as lock:
            # An earlier holder of the lock may have done the work meanwhile.
            todo = left_to_do(venv, wanted)
            if todo:
                Setup(root, wanted, lock).run(todo, version)
    say('ready ({})'.format(parts.read_stamp(venv)['summary']))


def left_to_do(venv: Path, wanted: Dict) -> Tuple[str, ...]:
    """Return the stages still to run, also after a GPU has appeared."""
    stamp = parts.read_stamp(venv)
    todo = plan(stamp, wanted)
    settled = todo or stamp['gpu'] or stamp['cpu'] == '1'
    if not settled and parts.has_gpu():
        return STAGES[STAGES.index('mmcv'):]
    return todo


# What is wanted, what is done, what is left to do.


def read_wanted(root: Path) -> Dict:
    """Return what the stamp of a finished set-up has to say."""
    text = (root / 'requirements.txt').read_text()
    cpu = os.environ.get('MMRPA_CPU', '')
    if cpu not in ('', '0', '1'):
        raise SetupError('MMRPA_CPU={!r}: use 1 (ops for the CPU only) or 0 '
                         '(CUDA where there is a GPU)'.format(cpu))
    wheel = os.environ.get('MMRPA_MMCV_WHEEL', '')
    if wheel and not os.path.isfile(wheel):
        raise SetupError('MMRPA_MMCV_WHEEL={}: there is no such file; name a '
                         'wheel, or unset it'.format(wheel))
    described = '\n'.join((text,) + BUILD_TOOLS)
    return {'root': str(root), 'cpu': cpu, 'wheel': wheel,
            'requirements': hashlib.sha256(described.encode()).hexdigest()}


def plan(stamp: Optional[Dict], wanted: Dict) -> Tuple[str, ...]:
    """Return the stages still to run, in order; () when all is done.

    ``cpu`` and ``wheel`` left empty mean: whatever an earlier run chose.
    """
    if stamp is None or stamp.get('root') != wanted['root']:
        return STAGES
    done = len(stamp.get('done', ()))
    if stamp.get('requirements') != wanted['requirements']:
        done = min(done, STAGES.index('build tools'))
    for choice in ('cpu', 'wheel'):
        if wanted[choice] and wanted[choice] != stamp.get(choice):
            done = min(done, STAGES.index('mmcv'))
    if not (Path(wanted['root']) / '.venv/bin/python').exists():
        done = 0
    return STAGES[done:]


# The set-up itself.


class Setup:
    """One run: the stages are methods, called in the order of STAGES."""

    def __init__(self, root: Path, wanted: Dict, lock: int) -> None:
        self.root, self.wanted, self.locks = root, wanted, (lock,)
        self.venv = root / '.venv'
        self.python = str(self.venv / 'bin' / 'python')
        self.log = self.venv / 'setup.log'
        self.pins = parts.read_pins((root / 'requirements.txt').read_text())
        self.mmcv = 'onedl-mmcv==' + self.pins['onedl-mmcv']
        self.stamp = {}  # type: Dict
        self.gpu = False

    def run(self, todo: Sequence[str], version: Sequence) -> None:
        """Check what can be checked first, then run the stages."""
        started = time.time()
        unusable = self.venv_problem()
        fresh = unusable is not None
        if fresh:
            parts.check_python(version)
            parts.check_venv_module(sys.executable)
            todo, self.stamp = STAGES, {}
            if self.venv.exists():
                say('removing .venv ({}) to make it again'.format(unusable))
                shutil.rmtree(str(self.venv))
        with_torch = bool(self.installed('torch'))
        shutil.rmtree(str(self.venv / 'tmp'), ignore_errors=True)
        parts.check_disk(self.root, GB_WITH_TORCH if with_torch
                   else GB_WITHOUT_TORCH)
        cpu = self.wanted['cpu'] or self.stamp.get('cpu', '')
        self.gpu = cpu != '1' and parts.has_gpu()
        if not self.gpu and cpu != '1' and shutil.which('nvidia-smi'):
            say('nvidia-smi lists no GPU: setting up for the CPU')
        problem = None
        if 'mmcv' in todo and not (self.installed('onedl_mmcv')
                                   or self.likely_wheels()):
            problem = parts.build_problem(
                sys.executable if fresh else self.python, self.gpu)
        if fresh:
            self.make_venv()
        todo = [stage for stage in todo if stage != 'venv']
        self.stamp.update(self.wanted, cpu=cpu, gpu=self.gpu,
                          done=list(STAGES[:-len(todo)]))
        parts.write_stamp(self.venv, self.stamp)
        self.remove_half_installed()
        if not with_torch:
            self.check_network()
        if problem and not self.download_prebuilt():
            raise SetupError(self.cannot_build(problem))
        for stage in todo:
            say('{} ({} of {})'.format(stage, STAGES.index(stage) + 1,
                                       len(STAGES)))
            getattr(self, 'stage_' + stage.replace(' ', '_'))()
            self.stamp['done'].append(stage)
            parts.write_stamp(self.venv, self.stamp)
        shutil.rmtree(str(self.venv / 'tmp'), ignore_errors=True)
        say('finished in {:.0f} s'.format(time.time() - started))

    def venv_problem(self) -> Optional[str]:
        """Say why .venv is to be made again; None if it can be used.

        Raises:
            SetupError: .venv is none of ours, and not ours to remove.
        """
        if not self.venv.exists():
            return 'absent'
        self.stamp = parts.read_stamp(self.venv) or {}
        ours = 'root' in self.stamp
        if not ours and not (self.venv / 'pyvenv.cfg').exists():
            # Killed between the first two steps of make_venv.
            if all(path.name == 'setup.json.new'
                   for path in self.venv.iterdir()):
                return 'empty'
            raise SetupError('{} is no virtual environment; move it out of '
                             'the way'.format(self.venv))
        found = query([self.python, '-c', 'import sys; '
                       'print("%d.%d.%d" % sys.version_info[:3])'])
        if found is None:
            return 'its Python does not start'
        if ours and self.stamp['root'] != str(self.root):
            return 'it was made for ' + self.stamp['root']
        if query([self.python, '-m', 'pip', '--version']) is None:
            if ours:
                return 'its pip does not start'
            raise SetupError('{} has no pip; add it ({} -m ensurepip) or '
                             'remove the folder'.format(self.venv,
                                                        self.python))
        if not parts.is_supported(list(map(int, found.split('.')))):
            raise SetupError('{} has Python {}, which is not supported; '
                             'remove it'.format(self.venv, found))
        if len(self.stamp.get('done', ())) < len(STAGES):
            say('going on with the unfinished .venv')
        return None

    def make_venv(self) -> None:
        """Make the environment; the stamp first, to know it as ours."""
        say('making .venv with {}'.format(sys.executable))
        self.venv.mkdir(exist_ok=True)
        self.stamp = {'root': str(self.root), 'done': []}
        parts.write_stamp(self.venv, self.stamp)
        self.call([sys.executable, '-m', 'venv', str(self.venv)], 'making '
                  '.venv')

    def check_network(self) -> None:
        """Ask pip itself, which knows the user's index and proxy."""
        probe = str(self.venv / 'tmp' / 'probe')
        try:
            self.call([self.python, '-m', 'pip', 'download', '--no-deps',
                       '--dest', probe, 'wheel'] + list(PIP_PROBE),
                      'asking pip for a small package')
        except SetupError as error:
            raise SetupError(
                'no network: pip cannot reach its package index (a proxy or '
                'an index to set in its configuration?)\n{}'.format(error)
            ) from None
        shutil.rmtree(probe, ignore_errors=True)

    def stage_build_tools(self) -> None:
        """Install what compiling mmcv without isolation needs."""
        self.pip('install', *BUILD_TOOLS)

    def stage_torch(self) -> None:
        """Install torch before all that compiles against it."""
        names = ('torch', 'torchvision', 'numpy')
        # Measured: 6.6 GB at the peak, and pip's cache would keep 2.6 more.
        free = shutil.disk_usage(str(self.venv)).free
        self.pip('install',
                 *['--no-cache-dir'] * (free < GB_WITH_PIP_CACHE * 1e9),
                 *['{}=={}'.format(name, self.pins[name]) for name in names])

    def stage_mmcv(self) -> None:
        """Install mmcv with compiled ops from the first source that works."""
        facts = self.torch_facts()
        ops = 'sm' + facts['capability'] if self.gpu else 'cpu'
        given, pin = self.wanted['wheel'], self.pins['onedl-mmcv']
        if given:
            problem = self.try_mmcv(Path(given))
            if problem:
                raise SetupError('MMRPA_MMCV_WHEEL={}: {}'.format(given,
                                                                  problem))
            return
        if self.installed('onedl_mmcv', pin) and self.ops_problem() is None:
            return
        folder = parts.cache_base() / parts.wheel_key(pin, facts, ops)
        with self.cache_lock(folder):
            cached = parts.find_wheel(folder)
            if cached:
                say('mmcv: taking the wheel in {}'.format(folder))
                problem = self.try_mmcv(cached)
                if problem is None:
                    return
                say('cached wheel does not work here ({}): making it again'
                    .format(problem))
            prebuilt = self.download_prebuilt()
            if prebuilt:
                problem = self.try_mmcv(prebuilt)
                if problem is None:
                    say('mmcv: took the prebuilt {}'.format(prebuilt.name))
                    return
                say('prebuilt {} does not fit: {}'.format(prebuilt.name,
                                                          problem))
            problem = self.try_mmcv(self.build_mmcv(folder, facts))
            if problem:
                raise SetupError('the mmcv built here does not work: {}'
                                 .format(problem))

    def stage_hosts(self) -> None:
        """Install the rest, with one OpenCV only (`pip check` minds that)."""
        self.pip('install', '-r', str(self.root / 'requirements.txt'))
        if self.installed('opencv_python'):
            # The hosts' needs bring in both builds of OpenCV, which overwrite
            # each other's files; the one with a GUI needs libGL on top.
            headless = 'opencv-python-headless'
            self.pip('uninstall', '-y', 'opencv-python')
            self.pip('install', '--force-reinstall', '--no-deps',
                     '{}=={}'.format(headless, self.pins[headless]))

    def stage_mmrpa(self) -> None:
        """Install this project in place; its dependencies are there."""
        self.pip('install', '--no-deps', '--no-build-isolation', '-e',
                 str(self.root))

    def stage_check(self) -> None:
        """Import all of it, run an op, and note the versions."""
        self.stamp['summary'] = self.call(
            [self.python, '-c', parts.CHECK_ALL], 'the self check')[-1]

    def torch_facts(self) -> Dict:
        """Ask the installed torch what a wheel key needs."""
        facts = json.loads(self.call([self.python, '-c', parts.TORCH_FACTS],
                                     'asking torch for its version')[-1])
        if self.gpu and facts['capability'] is None:
            raise SetupError(
                'nvidia-smi lists a GPU, but torch {} (CUDA {}) cannot use '
                'it; update the driver, or set MMRPA_CPU=1'.format(
                    facts['torch'], facts['cuda']))
        return facts

    def try_mmcv(self, wheel: Path) -> Optional[str]:
        """Install a wheel and run an op from it; return what went wrong."""
        problem = parts.wheel_problem(wheel)
        if problem:
            return problem
        try:
            self.pip('install', '--force-reinstall', '--no-deps', str(wheel))
        except SetupError as error:
            return str(error)
        return self.ops_problem()

    def ops_problem(self) -> Optional[str]:
        """Run an op of the installed mmcv; return what went wrong."""
        try:
            self.call([self.python, '-c', parts.TRY_OPS,
                       'cuda' if self.gpu else 'cpu'], 'trying the ops')
        except SetupError as error:
            return str(error)
        return None

    def likely_wheels(self) -> List[str]:
        """Return wheels that may fit, as far as known before torch is in."""
        if self.wanted['wheel']:
            return [self.wanted['wheel']]
        key = 'mmcv{}-cp3{}-*-torch{}*-{}'.format(
            self.pins['onedl-mmcv'], sys.version_info[1], self.pins['torch'],
            'sm*' if self.gpu else 'cpu')
        found = glob.glob(str(parts.cache_base() / key / '*.whl'))
        return [path for path in found
                if parts.wheel_problem(Path(path)) is None]

    def download_prebuilt(self) -> Optional[Path]:
        """Return a wheel that the user's pip configuration offers, if any."""
        folder = self.venv / 'tmp' / 'prebuilt'
        if not folder.is_dir():
            folder.mkdir(parents=True)
            with contextlib.suppress(SetupError):  # none offered: the rule
                self.call([self.python, '-m', 'pip', 'download', '--no-deps',
                           '--only-binary=onedl-mmcv', '--dest', str(folder),
                           self.mmcv] + list(PIP_PROBE), 'looking for a '
                          'prebuilt mmcv')
        return next(iter(folder.glob('*.whl')), None)

    def cannot_build(self, problem: str) -> str:
        """Return the message for: no wheel fits and none can be made."""
        return (
            'no ready mmcv wheel{} fits, and it cannot be compiled here: {}.\n'
            'Ways out: install what is missing; or name a wheel with '
            'MMRPA_MMCV_WHEEL=FILE, or its place with PIP_FIND_LINKS{}'
            .format(' with CUDA ops' if self.gpu else '', problem,
                    '; or set MMRPA_CPU=1 for CPU ops only' if self.gpu
                    else ''))

    @contextlib.contextmanager
    def cache_lock(self, folder: Path) -> Iterator[None]:
        """Keep set-ups of other folders out of one wheel's cache."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError('cannot write the wheel cache: {}; set '
                             'MMRPA_CACHE_DIR'.format(error)) from None
        with parts.file_lock(folder / 'lock', 'build of mmcv') as lock:
            before, self.locks = self.locks, self.locks + (lock,)
            yield
            self.locks = before

    def build_mmcv(self, folder: Path, facts: Dict) -> Path:
        """Compile mmcv into ``folder``, which gets whole wheels only."""
        problem = parts.build_problem(self.python, self.gpu)
        if not problem and self.gpu:
            release = re.search(r'release (\d+)', query(
                [parts.find_nvcc(), '--version']) or '')
            major = facts['cuda'].split('.')[0]
            if not release or release.group(1) != major:
                problem = 'nvcc is not of CUDA {}, which torch has'.format(
                    facts['cuda'])
        if problem:
            raise SetupError(self.cannot_build(problem))
        for stale in folder.glob('build-*'):
            shutil.rmtree(str(stale))
        jobs = os.environ.get('MAX_JOBS') or str(
            len(os.sched_getaffinity(0))
            if hasattr(os, 'sched_getaffinity') else os.cpu_count())
        env = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs,
               'FORCE_CUDA': '1' if self.gpu else '0',
               # No debug information: it doubles the time and the memory.
               'CFLAGS': os.environ.get('CFLAGS', '') + ' -g0 -O2'}
        if not self.gpu:
            env['CUDA_VISIBLE_DEVICES'] = ''  # mmcv builds for what it sees
        say('mmcv: no ready wheel for {} and torch {}, so its C++ sources are '
            'compiled, once, with {} jobs (about 10 minutes on 2 cores); kept '
            'in {}'.format(facts['python'], facts['torch'], jobs, folder))
        with tempfile.TemporaryDirectory(prefix='build-',
                                         dir=str(folder)) as made:
            self.call([self.python, '-m', 'pip', 'wheel', '-v', '--no-deps',
                       '--no-build-isolation', '--no-cache-dir',
                       '--no-binary=onedl-mmcv', '-w', made, self.mmcv],
                      'compiling mmcv', env)
            wheel = next(Path(made).glob('*.whl'))
            problem = parts.wheel_problem(wheel)
            if problem:
                raise SetupError('the new mmcv wheel is {}; see {}'.format(
                    problem, self.log))
            os.replace(str(wheel), str(folder / wheel.name))
        return folder / wheel.name

    def installed(self, name: str, version: str = '[0-9]*') -> List[str]:
        """Return the metadata folders of a distribution in .venv."""
        return glob.glob(str(self.venv / 'lib/python3*/site-packages' /
                             '{}-{}.dist-info'.format(name, version)))

    def remove_half_installed(self) -> None:
        """Make pip install again what a kill left half installed.

        pip writes RECORD last; '~name' is what it had moved out of the way.
        """
        site = str(self.venv / 'lib/python3*/site-packages')
        for path in glob.glob(site + '/*.dist-info') + glob.glob(site + '/~*'):
            if not os.path.isfile(os.path.join(path, 'RECORD')) or (
                    os.path.basename(path).startswith('~')):
                say('removing half-installed {}'.format(
                    os.path.basename(path)))
                if os.path.isdir(path):
                    shutil.rmtree(path)
                else:
                    os.remove(path)

    def pip(self, *args: str) -> None:
        """Run .venv's pip."""
        self.call([self.python, '-m', 'pip', *args], 'pip ' + args[0])

    def call(self, command: Sequence[str], what: str,
             env: Optional[Dict[str, str]] = None) -> List[str]:
        """Run a program with progress lines; return its last output lines."""
        scratch = self.venv / 'tmp'
        scratch.mkdir(exist_ok=True)
        environ = dict(os.environ)
        for name in ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX'):
            environ.pop(name, None)  # they would lead pip out of .venv
        environ.update(
            # Downloads of 3 GB: /tmp is often small; this disk was checked.
            TMPDIR=str(scratch), PIP_USER='0', PIP_NO_INPUT='1',
            PIP_DISABLE_PIP_VERSION_CHECK='1', PYTHONUNBUFFERED='1',
            PATH=str(self.venv / 'bin') + os.pathsep + os.environ['PATH'],
            **(env or {}))
        return parts.run_logged(command, what, self.log, environ, self.locks)


if __name__ == '__main__':
    # A plain kill is an interruption too: children are ended, locks released.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
