"""An environment with other packages on top of the tested set.

It has what is tested for itself, and links to the rest of what is installed
beside this interpreter: with the original packages that is 20 MB instead of
5 GB, and what it must not have cannot be imported by mistake.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SHARED, _STAMP = 'shared', 'stamp.json'
_OPERATORS = 'mmcv/_ext.*'


class OtherSetError(Exception):
    """A reason to stop that the user can act on; shown without traceback."""


@dataclass(frozen=True)
class Recipe:
    """How an environment differs from the tested set.

    Attributes:
        pip_args (tuple): What pip installs, with options for it.
        without (tuple): What the names of distributions begin with that are
            not linked. Those that pip installs come before linked ones.
        operators (bool): Whether the mmcv that pip installs gets the compiled
            operators of the tested set, which are for its torch and Python.
            They are not linked otherwise.
    """

    pip_args: tuple[str, ...]
    without: tuple[str, ...]
    operators: bool


def interpreter(env: Path) -> Path:
    """The environment's Python."""
    return env / 'bin' / 'python'


def prepare(env: Path, recipe: Recipe) -> bool:
    """Make ``env`` unless it is there and up to date.

    Args:
        env (Path): A folder that this function has made, or none.
        recipe (Recipe): What it shall hold.

    Returns:
        bool: Whether anything had to be done.

    Raises:
        OtherSetError: The tested set is not installed here, the folder holds
            something else, or pip could not install a package.
    """
    wanted = _wanted(recipe)
    if recipe.operators and not compiled_operators():
        raise OtherSetError('the fork of mmcv is not installed here, whose '
                            'compiled operators mmdet and mmseg need: run '
                            '`make setup` first')
    if _read_stamp(env) == wanted:
        return False
    if env.exists() and not (env / _STAMP).is_file():
        raise OtherSetError(f'{env} was not made by this tool; name another '
                            'folder with --env, or remove it')
    # Virtual environments hold their own path: it is made where it stays, and
    # counts once it has its stamp.
    shutil.rmtree(env, ignore_errors=True)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(env)
    fresh = dict(wanted, done=False)
    (env / _STAMP).write_text(json.dumps(fresh))
    # Before the links: pip would remove files of the tested set through them.
    _install(env, recipe.pip_args)
    site = _site_packages(env)
    _link_tested_set(env / _SHARED, recipe)
    (site / 'shared.pth').write_text(f'{env / _SHARED}\n')
    if recipe.operators:
        for extension in compiled_operators():
            (site / 'mmcv' / extension.name).symlink_to(extension)
    new = env / (_STAMP + '.new')
    new.write_text(json.dumps(wanted, indent=1))
    os.replace(new, env / _STAMP)
    return True


def compiled_operators() -> list[Path]:
    """The compiled operators of the fork of mmcv, if it is installed."""
    return sorted(_here().glob(_OPERATORS))


def _here() -> Path:
    return Path(sysconfig.get_paths()['purelib'])


def _site_packages(env: Path) -> Path:
    found, = (env / 'lib').glob('python*/site-packages')
    return found


def _wanted(recipe: Recipe) -> dict:
    """What an environment that is up to date was made from."""
    versions = sorted(
        f'{d.metadata["Name"]} {d.version}'
        for d in importlib.metadata.distributions(path=[str(_here())]))
    if not any(v.startswith('torch ') for v in versions):
        raise OtherSetError(f'{sys.executable} has no torch: run this with '
                            'the interpreter that `make setup` has made, '
                            '.venv/bin/python')
    text = '\n'.join([*versions, str(_here()), repr(recipe),
                      Path(__file__).read_text()])
    return dict(
        done=True, pip_args=list(recipe.pip_args),
        made_from=hashlib.sha256(text.encode()).hexdigest())


def _read_stamp(env: Path) -> dict | None:
    try:
        return json.loads((env / _STAMP).read_text())
    except (OSError, ValueError):
        return None


def _link_tested_set(shared: Path, recipe: Recipe) -> None:
    """Link what is installed here, but what the recipe leaves out, or mmrpa.

    mmrpa is linked from this folder instead.
    """
    here = _here()
    hidden = {here / '__pycache__', *compiled_operators()}
    for distribution in importlib.metadata.distributions(path=[str(here)]):
        if distribution.metadata['Name'].startswith(
                (*recipe.without, 'mmrpa')):
            hidden |= {here / file.parts[0]
                       for file in distribution.files or ()}
    # Files that Python runs at its start could bring a fork back.
    hidden |= set(here.glob('*.pth'))
    _link(here, shared, hidden)
    (shared / 'mmrpa').symlink_to(ROOT / 'mmrpa')


def _link(source: Path, target: Path, hidden: set[Path]) -> None:
    """Link ``source``, or all in it but what is hidden, from ``target``."""
    if source in hidden:
        return
    if any(path.is_relative_to(source) for path in hidden):
        target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name, hidden)
    else:
        target.symlink_to(source)


def _install(env: Path, pip_args: tuple[str, ...]) -> None:
    """Let this interpreter's pip install packages into an environment."""
    command = [sys.executable, '-m', 'pip', '--python', interpreter(env),
               'install', '--quiet', '--disable-pip-version-check', *pip_args]
    # A slow index is no reason to fail: pip gives up after 15 s by default.
    patient = {'PIP_DEFAULT_TIMEOUT': '120', **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=patient)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise OtherSetError('pip could not install the packages:\n'
                            + '\n'.join(lines[-5:]))
