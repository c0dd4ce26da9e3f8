"""An environment with the original packages on top of the tested set.

It holds links to everything that is installed beside this interpreter, torch
above all, except the forks: 20 MB instead of 5 GB, and no fork can be imported
by mistake.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Pure Python, all of them. mmcv-lite is mmcv without its compiled operators;
# mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv 2.2.0.
PINS = ('mmengine==0.10.7', 'mmcv-lite==2.1.0', 'mmpretrain==1.2.0',
        'mmdet==3.3.0', 'mmsegmentation==1.2.2')
# What the original packages stand in for, and mmrpa, which is linked.
_LEFT_OUT = ('onedl-', 'mmrpa')
_SHARED, _STAMP = 'shared', 'stamp.json'


class OriginalsError(Exception):
    """A reason to stop that the user can act on; shown without traceback."""


def interpreter(env: Path) -> Path:
    """The environment's Python."""
    return env / 'bin' / 'python'


def prepare(env: Path) -> bool:
    """Make ``env`` unless it is there and up to date.

    Args:
        env (Path): A folder that this function has made, or none.

    Returns:
        bool: Whether anything had to be done.

    Raises:
        OriginalsError: The tested set is not installed here, the folder holds
            something else, or pip could not install a package.
    """
    wanted = _wanted()
    if _read_stamp(env) == wanted:
        return False
    if env.exists() and not (env / _STAMP).is_file():
        raise OriginalsError(f'{env} was not made by this tool; name another '
                             'folder with --env, or remove it')
    # Virtual environments hold their own path: it is made where it stays, and
    # counts once it has its stamp.
    shutil.rmtree(env, ignore_errors=True)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(env)
    fresh = dict(wanted, done=False)
    (env / _STAMP).write_text(json.dumps(fresh))
    site = _site_packages(env)
    _link_tested_set(env / _SHARED)
    (site / 'shared.pth').write_text(f'{env / _SHARED}\n')
    _install(env)
    for extension in compiled_operators():
        (site / 'mmcv' / extension.name).symlink_to(extension)
    new = env / (_STAMP + '.new')
    new.write_text(json.dumps(wanted, indent=1))
    os.replace(new, env / _STAMP)
    return True


def compiled_operators() -> list[Path]:
    """The compiled operators of the fork of mmcv, if it is installed."""
    return sorted(_here().glob('mmcv/_ext.*'))


def _here() -> Path:
    return Path(sysconfig.get_paths()['purelib'])


def _site_packages(env: Path) -> Path:
    found, = (env / 'lib').glob('python*/site-packages')
    return found


def _wanted() -> dict:
    """What an environment that is up to date was made from."""
    versions = sorted(
        f'{d.metadata["Name"]} {d.version}'
        for d in importlib.metadata.distributions(path=[str(_here())]))
    if not any(v.startswith('torch ') for v in versions):
        raise OriginalsError(f'{sys.executable} has no torch: run this with '
                             'the interpreter that `make setup` has made, '
                             '.venv/bin/python')
    text = '\n'.join([*versions, str(_here()), Path(__file__).read_text()])
    return dict(
        done=True, pins=list(PINS),
        made_from=hashlib.sha256(text.encode()).hexdigest())


def _read_stamp(env: Path) -> dict | None:
    try:
        return json.loads((env / _STAMP).read_text())
    except (OSError, ValueError):
        return None


def _link_tested_set(shared: Path) -> None:
    """Link what is installed here, but neither the forks nor ``mmrpa``."""
    hidden = {'__pycache__'}
    for distribution in importlib.metadata.distributions(path=[str(_here())]):
        if distribution.metadata['Name'].startswith(_LEFT_OUT):
            hidden |= {file.parts[0] for file in distribution.files or ()}
    shared.mkdir()
    for path in _here().iterdir():
        # Files that Python runs at its start could bring a fork back.
        if path.name not in hidden and path.suffix != '.pth':
            (shared / path.name).symlink_to(path)
    (shared / 'mmrpa').symlink_to(ROOT / 'mmrpa')


def _install(env: Path) -> None:
    """Install the pins, without what they ask for.

    All of that is in the tested set, but for opencv-python, which must not be
    installed over opencv-python-headless.
    """
    command = [sys.executable, '-m', 'pip', '--python', interpreter(env),
               'install', '--quiet', '--disable-pip-version-check',
               '--no-deps', *PINS]
    # A slow index is no reason to fail: pip gives up after 15 s by default.
    patient = {'PIP_DEFAULT_TIMEOUT': '120', **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=patient)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise OriginalsError('pip could not install the original packages:\n'
                             + '\n'.join(lines[-5:]))
