"""Environments with something wrong in them: real files, real failures."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from mmrpa.doctor.commands import build_mmcv
from mmrpa.doctor.facts import normalise

ROOT = Path(__file__).resolve().parents[1]
# Small ones that most commands are about.
OWNED = ('numpy', 'opencv-python-headless', 'pycocotools', 'setuptools',
         'torchvision', 'ninja', 'safetensors', 'onedl-mmcv', 'onedl-mmengine')
# What compiles mmcv where neither original would refuse it.
BUILD = build_mmcv({'owners': {'mmdet': [], 'mmseg': []}})
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
        self.add_program('pip', f'exec {self.python} -m pip "$@"')
        version = 'python{}.{}'.format(*sys.version_info)
        self.site = folder / 'lib' / version / 'site-packages'

    def add_program(self, name: str, script: str) -> Path:
        """Put a shell script on PATH."""
        path = self.python.with_name(name)
        path.write_text(f'#!/bin/sh\n{script}\n')
        path.chmod(0o755)
        return path

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
            timeout: float = 3 * 3600) -> str:
        """Run a shell command here, as a user would; it has to succeed.

        Args:
            command (str): For the shell.
            activated (bool): The environment's programs are on PATH.
            timeout (float): Seconds. Beside other work, compiling mmcv took
                more than an hour on two cores.
        """
        done = subprocess.run(
            command, shell=True, cwd='/', env=self._environ(activated),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout)
        assert done.returncode == 0, f'{command}\n{done.stdout}'
        return done.stdout

    def install(self, *requirements: str, deps: bool = False
                ) -> 'Environment':
        """Install real distributions from the package index."""
        self.run(f'pip install {"" if deps else "--no-deps "}--quiet ' +
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

    def follow(self, found: Dict[str, Dict[str, Any]], code: str,
               activated: bool = True) -> List[str]:
        """Run the command of a finding, then that of the first problem left.

        Each has to succeed and to end its finding for good.

        Args:
            found (dict): As :meth:`findings` returns them.
            code (str): Of the finding to begin with.
            activated (bool): The environment's programs are on PATH.

        Returns:
            list[str]: The codes of the findings that were mended, in order.
        """
        done: List[str] = []
        while code:
            done.append(code)
            command = found[code]['command']
            print(f'{code}: {command}', flush=True)
            self.run(command, activated)
            found = self.findings(activated)
            assert not found.keys() & set(done), found
            code = next((name for name, finding in found.items()
                         if finding['level'] == 'problem'), '')
        return done

    def remove(self) -> None:
        """Delete it: pytest keeps what tests leave, and these are large."""
        shutil.rmtree(self.python.parents[1])


def torch_and_its_own() -> List[str]:
    """The distributions of torch, torchvision and what torch alone needs.

    These are the libraries of CUDA and the compiler for GPUs.
    """
    names = {normalise(dist.metadata['Name'])
             for dist in metadata.distributions()}
    return sorted(name for name in names
                  if name in ('torch', 'torchvision', 'triton')
                  or name.startswith(('nvidia-', 'cuda-')))


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
