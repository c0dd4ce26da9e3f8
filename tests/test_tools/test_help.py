"""Every tool explains itself."""

import os
import subprocess
import sys

from helpers import TOOLS

# train.py, test.py and the shell scripts: test_dispatch.py and test_dist.py.
NAMES = sorted(
    path.name for path in TOOLS.glob('*.py')
    if path.stem not in ('train', 'test', 'setup_parts'))

# Each tool in a process of its own, forked from one that has imported, once,
# what takes seconds. Each in a folder of its own, the current one's.
CODE = """
import os, runpy, sys, traceback
{heavy}

tools, *names = sys.argv[1:]
sys.path[0] = tools  # as it is for a script
for name in names:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        continue
    os.mkdir(name)
    for stream in (1, 2):
        file = os.open(name + '.%d' % stream, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
    os.chdir(name)
    sys.argv = [os.path.join(tools, name), '--help']
    status = 3  # of a tool that goes on after --help
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the seconds that torch takes to end
"""


HEAVY = 'import cv2, matplotlib.pyplot, mmengine.runner, torch'


def helps(names, tools, cwd, heavy=''):
    """Run tools with --help: yields name, status, both outputs, files left."""
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(heavy=heavy), tools, *names],
        cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, status = line.split()
        out, err = ((cwd / f'{name}.{stream}').read_text()
                    for stream in (1, 2))
        yield name, int(status), out, err, os.listdir(cwd / name)


def test_help(tmp_path):
    found = list(helps(NAMES, TOOLS, tmp_path, HEAVY))
    assert [name for name, *_ in found] == NAMES
    for name, status, out, err, files in found:
        assert status == 0, (name, err)
        assert 'usage:' in out, name
        assert len(out.splitlines()) > 4, name
        assert files == [], name  # and does nothing else


def test_what_is_no_help(tmp_path):
    """Of tools that fail, that ignore --help and that write files."""
    for name, code in dict(fails='import no_such_module', ignores='',
                           writes="open('file', 'w')").items():
        (tmp_path / name).write_text(code)
    names = ['fails', 'ignores', 'writes']
    cwd = tmp_path / 'cwd'
    cwd.mkdir()
    fails, ignores, writes = helps(names, tmp_path, cwd)
    assert (fails[1], ignores[1]) == (1, 3)
    assert 'no_such_module' in fails[3]
    assert writes[4] == ['file']
