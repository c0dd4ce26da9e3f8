"""Every tool explains itself."""

import subprocess
import sys

import pytest
from helpers import TOOLS

# train.py, test.py and the shell scripts: test_dispatch.py and test_dist.py.
NAMES = sorted(
    path.name for path in TOOLS.glob('*.py')
    if path.stem not in ('train', 'test', 'setup_parts'))


@pytest.mark.parametrize('name', NAMES)
def test_help(name, tmp_path):
    done = subprocess.run([sys.executable, TOOLS / name, '--help'],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert 'usage:' in done.stdout
    assert len(done.stdout.splitlines()) > 4
    assert list(tmp_path.iterdir()) == []  # and does nothing else
