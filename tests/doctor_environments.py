"""Environments with something wrong in them: real files, real failures."""

import json
import os
import shlex
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
# Small ones that most commands are about.
OWNED = ('numpy', 'opencv-python-headless', 'pycocotools', 'setuptools',
         'torchvision', 'ninja', 'safetensors', 'onedl-mmcv', 'onedl-mmengine')
TESTED = Path(metadata.distribution('numpy').locate_file('')).resolve()


class Environment:
    """A virtual environment without packages, to put some into.

    Args:
        folder (Path): Where to make it.
    """

    def __init__(self, folder: Path) -> None:
        # Links: a copied interpreter would not find its library everywhere.
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / 'bin' / 'python'
        pip = self.python.with_name('pip')
        pip.write_text(f'#!/bin/sh\nexec {self.python} -m pip "$@"\n')
        pip.chmod(0o755)
        version = 'python{}.{}'.format(*sys.version_info)
        self.site = folder / 'lib' / version / 'site-packages'

    def add(self, name: str, version: str,
            files: Mapping[str, str] = {}, requires: Sequence[str] = ()
            ) -> 'Environment':
        """Lay down a distribution: its files, metadata and record."""
        info = self.site / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text('\n'.join(
            ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}',
             *(f'Requires-Dist: {text}' for text in requires)]) + '\n')
        for path, text in files.items():
            (self.site / path).parent.mkdir(parents=True, exist_ok=True)
            (self.site / path).write_text(text)
        (info / 'RECORD').write_text(''.join(f'{p},,\n' for p in files))
        return self

    def link_tested(self, without: Sequence[str] = (),
                    owned: Sequence[str] = ()) -> 'Environment':
        """Link what the tests run with.

        pip must not reach the tested environment. What it is to remove or
        replace are real folders here, with links to files in them; all else
        lies on the path, where pip sees it and leaves it alone.

        Args:
            without (sequence[str]): Distributions to leave out.
            owned (sequence[str]): Distributions that pip may change, besides
                ``OWNED``.
        """
        skipped = {entry for name in without for entry in _entries(name)}
        here = {entry for name in (*OWNED, *owned) for entry in _entries(name)}
        rest = self.python.parents[2] / 'rest'
        rest.mkdir()
        for path in TESTED.iterdir():
            if path.name in skipped:
                continue
            if path.name in here:
                _link(str(path), str(self.site / path.name))
            else:
                (rest / path.name).symlink_to(path)
        (self.site / 'rest.pth').write_text(f'{rest}\n')
        return self

    def cut(self, pattern: str, keep: Optional[int] = None) -> None:
        """Cut a file short, as a full disk or a broken download does.

        Args:
            pattern (str): Of its path.
            keep (int, optional): Bytes to keep; half of them by default.
        """
        path, = self.site.glob(pattern)
        content = path.read_bytes()
        path.unlink()  # a link to the tested environment
        path.write_bytes(content[:len(content) // 2 if keep is None else keep])

    def run(self, command: str, activated: bool = True,
            timeout: float = 600) -> str:
        """Run a shell command here, as a user would; it has to succeed."""
        done = subprocess.run(
            command, shell=True, cwd='/', env=self._environ(activated),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout)
        assert done.returncode == 0, f'{command}\n{done.stdout}'
        return done.stdout

    def install(self, *requirements: str) -> 'Environment':
        """Install real distributions from the package index."""
        self.run('pip install --no-deps --quiet ' +
                 ' '.join(map(shlex.quote, requirements)))
        return self

    def _environ(self, activated: bool) -> Dict[str, str]:
        environ = {key: value for key, value in os.environ.items()
                   if not key.startswith('PYTHON')}
        environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        if activated:
            environ['PATH'] = f'{self.python.parent}:{os.environ["PATH"]}'
        return environ

    def examine(self, *options: str, activated: bool = True
                ) -> subprocess.CompletedProcess:
        """Run the doctor there."""
        return subprocess.run(
            [self.python, '-m', 'mmrpa.doctor', *options], cwd='/',
            env=self._environ(activated), capture_output=True, text=True,
            timeout=900)

    def findings(self, activated: bool = True) -> Dict[str, Dict[str, Any]]:
        """What the doctor finds there, by code; its status has to agree."""
        done = self.examine('--json', activated=activated)
        assert not done.stderr, done.stderr
        found = {f['code']: f for f in json.loads(done.stdout)['findings']}
        problems = [f for f in found.values() if f['level'] == 'problem']
        assert done.returncode == int(bool(problems)), done.stdout
        return found


def _link(source: str, target: str) -> None:
    """A tree of real folders with links to files in them."""
    if not os.path.isdir(source):
        os.symlink(source, target)
        return
    os.mkdir(target)
    with os.scandir(source) as entries:
        for entry in entries:
            _link(entry.path, os.path.join(target, entry.name))


def _entries(name: str) -> set:
    """The top entries of site-packages that belong to a distribution."""
    files = metadata.distribution(name).files or []
    return {file.parts[0] for file in files if file.parts[0] != '..'}
