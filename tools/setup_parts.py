"""Parts of tools/setup_env.py: checks, the wheel cache, running programs.

Standard library only, and syntax that Python 3.6 parses.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

OLDEST, TESTED, NEWEST = (3, 10), (3, 11), (3, 12)
PROGRESS_SECONDS = 5


class SetupError(Exception):
    """A reason to stop that the user can act on; shown without traceback."""


# Files that say what is wanted and what is done.


def read_stamp(venv: Path) -> Optional[Dict]:
    """Return what an earlier run recorded, None if there is nothing valid."""
    try:
        stamp = json.loads((venv / 'setup.json').read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def write_stamp(venv: Path, stamp: Dict) -> None:
    """Replace the stamp in one step, so that a kill leaves a valid one."""
    fresh = venv / 'setup.json.new'
    fresh.write_text(json.dumps(stamp, indent=1))
    os.replace(str(fresh), str(venv / 'setup.json'))


def read_pins(text: str) -> Dict[str, str]:
    """Return {name: version} of the plain ``name==version`` lines."""
    return dict(re.findall(r'^([\w-]+)==([\w.+]+)\s*$', text, re.M))


# The checks that need no network; each raises SetupError with a way out.


def is_supported(version: Sequence) -> bool:
    """Tell whether the tested set supports a Python version."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def check_python(version: Sequence, executable: str = sys.executable) -> None:
    """Refuse a Python that the tested set does not support."""
    if is_supported(version):
        return
    other = find_other_python()
    way_out = ('found {0}: run  make PYTHON={0} quickstart'.format(other)
               if other else
               'none is on PATH: install Python 3.11 with its venv module')
    raise SetupError(
        'Python {} ({}) is not supported; 3.{} to 3.{} is (tested: 3.{}); {}'
        .format('.'.join(map(str, version[:3])), executable, OLDEST[1],
                NEWEST[1], TESTED[1], way_out))


def find_other_python() -> Optional[str]:
    """Return the name of a supported python3.x on PATH that can make venvs."""
    for minor in (11, 12, 10):
        name = 'python3.{}'.format(minor)
        # Being on PATH is not enough: version managers leave dead shims.
        if shutil.which(name) and query(
                [name, '-c', 'import ensurepip, venv; print(1)']):
            return name
    return None


def check_venv_module(python: str) -> None:
    """Refuse a Python that cannot make virtual environments."""
    if not query([python, '-c', 'import ensurepip, venv; print(1)']):
        name = 'python3.{}'.format(sys.version_info[1])
        raise SetupError(
            '{} has no venv or ensurepip module, so it cannot make .venv; '
            'install it (Debian, Ubuntu: apt install {}-venv)'
            .format(python, name))


def check_disk(folder: Path, needed_gb: float) -> None:
    """Refuse to start what will not fit."""
    free_gb = shutil.disk_usage(str(folder)).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            '{:.1f} GB free in {}, {:g} GB needed; free some space or move '
            'the project to a larger disk'.format(free_gb, folder, needed_gb))


def build_problem(python: str, gpu: bool) -> Optional[str]:
    """Say why mmcv cannot be compiled here; None if it can."""
    cxx = shlex.split(os.environ.get('CXX') or 'c++')
    if shutil.which(cxx[0]) is None:
        return ('no C++ compiler ({} is not on PATH; Debian, Ubuntu: apt '
                'install build-essential; or set CXX)'.format(cxx[0]))
    include = query([python, '-c', 'import sysconfig; '
                     'print(sysconfig.get_paths()["include"])'])
    if not include or not os.path.isfile(os.path.join(include, 'Python.h')):
        return ('Python.h is missing in {} (Debian, Ubuntu: apt install '
                'python3-dev, with the dot version of your Python)'
                .format(include))
    trial = subprocess.run(
        cxx + ['-std=c++17', '-fsyntax-only', '-I', include, '-x', 'c++', '-'],
        input=b'#include <vector>\n#include <Python.h>\n',
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if trial.returncode:
        return '{} cannot compile C++17 with Python.h: {}'.format(
            cxx[0], trial.stdout.decode(errors='replace').strip()[-400:])
    if gpu and find_nvcc() is None:
        return ('nvcc, the CUDA compiler, is neither on PATH nor in CUDA_HOME '
                '(install the CUDA toolkit of the version that torch has)')
    return None


def find_nvcc() -> Optional[str]:
    """Return nvcc's path, looked up where torch looks for it."""
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    if home:
        return shutil.which(os.path.join(home, 'bin', 'nvcc'))
    return shutil.which('nvcc') or shutil.which('/usr/local/cuda/bin/nvcc')


def has_gpu() -> bool:
    """Tell whether NVIDIA's driver answers and lists a GPU."""
    return (shutil.which('nvidia-smi') is not None
            and 'GPU' in (query(['nvidia-smi', '-L']) or ''))


# The cache of built mmcv wheels.


def cache_base() -> Path:
    """Return the folder that holds one sub-folder a wheel key."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    base = os.environ.get('MMRPA_CACHE_DIR') or os.path.join(home, 'mmrpa')
    return Path(base).absolute() / 'wheels'


def wheel_key(mmcv: str, facts: Dict, ops: str) -> str:
    """Name all that a compiled mmcv depends on.

    Args:
        mmcv: its version.
        facts: ``python`` (tag), ``platform``, ``torch`` (version with local
            tag) and ``cuda`` (version that torch was built for, or None).
        ops: 'cpu', or the compute capability the CUDA ops are built for.
    """
    return 'mmcv{}-{}-{}-torch{}-cuda{}-{}'.format(
        mmcv, facts['python'], facts['platform'], facts['torch'],
        facts['cuda'] or 'none', ops)


def wheel_problem(path: Path) -> Optional[str]:
    """Say what is wrong with a wheel file of mmcv; None if nothing is."""
    try:
        with zipfile.ZipFile(str(path)) as archive:
            bad, names = archive.testzip(), archive.namelist()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return 'not a readable wheel ({})'.format(error)
    if bad:
        return 'damaged at {}'.format(bad)
    if not any(re.match(r'mmcv/_ext.*\.so$', name) for name in names):
        return 'built without compiled ops (no mmcv/_ext*.so in it)'
    return None


def find_wheel(folder: Path) -> Optional[Path]:
    """Return the sound wheel in ``folder``; remove a broken one and say so."""
    for path in sorted(folder.glob('onedl_mmcv-*.whl')):
        problem = wheel_problem(path)
        if problem is None:
            return path
        say('cached {} is {}: making it again'.format(path, problem))
        path.unlink()
    return None


@contextlib.contextmanager
def file_lock(path: Path, what: str) -> Iterator[int]:
    """Hold an exclusive lock; yield its descriptor, for children to share.

    The system releases it when the last process that shares it is gone: an
    installer that outlives its killed parent still keeps others out.
    """
    import fcntl  # not on Windows, where main() must still be able to speak
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(str(path), 'a') as file:
        started = said = time.time()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.time()
                if now - said >= PROGRESS_SECONDS or said == started:
                    say('waiting for another {} to end ({:.0f} s)'.format(
                        what, now - started))
                    said = max(now, started + 1e-3)
                time.sleep(0.2)
        yield file.fileno()


# Running programs.


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print('set-up: ' + text, flush=True)


def query(command: Sequence[str]) -> Optional[str]:
    """Return a short program's output, None if it fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode(errors='replace').strip()
    return text if done.returncode == 0 else None


def activity(line: str) -> Optional[str]:
    """Turn a line of pip's or ninja's output into a few words; else None."""
    step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
    if step:
        return 'compiled {} of {} objects'.format(*step.groups())
    step = re.match(r'\s*Installing collected packages: (.*)', line)
    if step:
        return 'unpacking {} packages'.format(len(step.group(1).split(',')))
    # A file name is shortened to its name and version.
    step = re.match(r'\s*(Downloading|Using cached) (?:\S*/)?'
                    r'([^-\s]+-[^-\s]+?)(?:-\S*|\.tar\.gz|\.zip)( \(.*\))?$',
                    line)
    if step:
        return '{} {}{}'.format(step.group(1).lower(), step.group(2),
                                step.group(3) or '')
    step = re.match(r'\s*Building wheels? for (\S+)', line)
    return 'building {}'.format(step.group(1)) if step else None


def failure_hint(text: str) -> str:
    """Return a line on the likely cause of a failed program, or ''."""
    causes = (
        (r'No space left on device|Disk quota', 'the disk is full'),
        (r'NewConnectionError|NameResolutionError|Connection refused|'
         r'Network is unreachable|ReadTimeout|ProxyError|Max retries',
         'pip cannot reach its package index: check network and proxy'),
        (r'Killed|signal terminated|cannot allocate memory',
         'out of memory: set MAX_JOBS=1 to compile one file at a time'),
    )
    for pattern, cause in causes:
        if re.search(pattern, text, re.I):
            return '\nlikely cause: ' + cause
    return ''


def run_logged(command: Sequence[str], what: str, log: Path,
               environ: Dict[str, str], locks: Sequence[int]) -> List[str]:
    """Run a program with a progress line every few seconds.

    Args:
        command: the program and its arguments.
        what: a few words for progress lines and messages.
        log: the file that its whole output is appended to.
        environ: its environment.
        locks: descriptors of held locks; the program shares them.

    Returns:
        The last lines of its output.

    Raises:
        SetupError: it fails; names the log and holds the last lines.
    """
    tail, state = deque(maxlen=15), {'activity': ''}
    with open(str(log), 'a') as file:
        file.write('\n$ {}\n'.format(' '.join(command)))
        file.flush()
        # A session of its own: we end it, with all its children.
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=locks)

        def read() -> None:
            for raw in process.stdout:
                line = raw.decode(errors='replace').rstrip()
                file.write(line + '\n')
                file.flush()
                tail.append(line)
                state['activity'] = activity(line) or state['activity']

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            wait_with_progress(process, what, state)
            reader.join()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            reader.join(5)
            raise
    if process.returncode:
        # Compilers' lines are long: one is to be read, not its arguments.
        shown = '\n  '.join(line[:300] for line in tail)
        raise SetupError('{} failed (exit code {}):\n  {}\nfull output: '
                         '{}{}'.format(what, process.returncode, shown, log,
                                       failure_hint('\n'.join(tail))))
    return list(tail)


def wait_with_progress(process: subprocess.Popen, what: str,
                       state: Dict[str, str]) -> None:
    """Wait for a program's end with a line every few seconds."""
    started = time.time()
    while True:
        try:
            process.wait(PROGRESS_SECONDS)
            return
        except subprocess.TimeoutExpired:
            minutes, seconds = divmod(int(time.time() - started), 60)
            say('{:3d}:{:02d}  {}: {}'.format(minutes, seconds, what,
                                              state['activity']))


# Programs that run inside .venv.

TORCH_FACTS = """
import json, sys, sysconfig, torch
usable = torch.cuda.is_available()
print(json.dumps({
    'torch': torch.__version__, 'cuda': torch.version.cuda,
    'capability': '%d%d' % torch.cuda.get_device_capability()
                  if usable else None,
    'python': 'cp%d%d' % sys.version_info[:2],
    'platform': sysconfig.get_platform().replace('-', '_')}))
"""

# The extension alone: mmcv itself imports packages that come a stage later.
TRY_OPS = """
import glob, importlib.util, sys, sysconfig, torch
path, = glob.glob(sysconfig.get_path('platlib') + '/mmcv/_ext*.so')
spec = importlib.util.spec_from_file_location('_ext', path)
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
for device in {'cpu', sys.argv[1]}:
    boxes = torch.tensor([[0., 0, 9, 9], [1, 0, 9, 9], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = ops.nms(boxes.to(device), scores.to(device), iou_threshold=0.5,
                   offset=0)
    assert kept.tolist() == [0, 2], (device, kept)
"""

CHECK_ALL = """
import sys, cv2, torch, torchvision, mmengine, mmcv.ops
import mmdet.models, mmdet.evaluation, mmseg.models, mmpretrain.models, mmrpa
kept = mmcv.ops.nms(torch.tensor([[0., 0, 9, 9], [1, 0, 9, 9]]),
                    torch.tensor([0.9, 0.8]), iou_threshold=0.5)[1]
assert kept.tolist() == [0], kept
print('Python %d.%d.%d, torch %s, mmcv %s, mmdet %s, mmseg %s, mmpretrain %s' %
      (*sys.version_info[:3], torch.__version__, mmcv.__version__,
       mmdet.__version__, mmseg.__version__, mmpretrain.__version__))
"""
