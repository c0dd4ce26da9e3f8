"""Environments with something wrong in them: real files, real failures."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
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
                    copied: Sequence[str] = ()) -> 'Environment':
        """Link what the tests run with, except for some distributions.

        Args:
            without (sequence[str]): Distributions to leave out.
            copied (sequence[str]): Import names that something will be
                installed over: copies, so that the real ones stay whole.
        """
        skipped = {entry for name in without for entry in _entries(name)}
        for path in TESTED.iterdir():
            target = self.site / path.name
            if path.name in skipped or target.exists():
                continue
            if path.name in copied:
                shutil.copytree(path, target)
            else:
                target.symlink_to(path)
        return self

    def install(self, *requirements: str) -> 'Environment':
        """Unpack real distributions from the package index over this one."""
        staging = self.site.parent / 'staging'
        subprocess.run(
            [sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet',
             '--no-cache-dir', '--no-compile', '--target', staging,
             *requirements], check=True)
        for path in staging.iterdir():
            target = self.site / path.name
            # Through a link this would overwrite the tested environment.
            assert not target.is_symlink(), path.name
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy(path, target)
        shutil.rmtree(staging)
        return self

    def examine(self, *options: str, folder: str = '/'
                ) -> subprocess.CompletedProcess:
        """Run the doctor there."""
        environ = {key: value for key, value in os.environ.items()
                   if not key.startswith('PYTHON')}
        return subprocess.run(
            [self.python, '-m', 'mmrpa.doctor', *options], cwd=folder,
            env={**environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
            capture_output=True, text=True, timeout=900)

    def findings(self) -> Dict[str, Dict[str, Any]]:
        """What the doctor finds there, by code; its status has to agree."""
        done = self.examine('--json')
        assert not done.stderr, done.stderr
        found = {f['code']: f for f in json.loads(done.stdout)['findings']}
        problems = [f for f in found.values() if f['level'] == 'problem']
        assert done.returncode == int(bool(problems)), done.stdout
        return found


def _entries(name: str) -> set:
    """The top entries of site-packages that belong to a distribution."""
    files = metadata.distribution(name).files or []
    return {file.parts[0] for file in files if file.parts[0] != '..'}
