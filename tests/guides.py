"""Run the commands that a guide in docs/ shows, as its reader would.

Commands of a guide stand in blocks indented by four spaces, as in README.md;
what they print stands between fences (```). A test of a guide is::

    def test_guide(tmp_path):
        outputs = run_guide('docs/swap.md', tmp_path, skip=['dist_train.sh'])
        assert 'rp_swin_tiny' in outputs['python tools/...']
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_REACHABLE = ('tools', 'configs', 'docs')


def read_commands(text: str) -> list[str]:
    """The shell commands of a Markdown page, in order.

    Args:
        text (str): The page.

    Returns:
        list[str]: One item a command; lines that end in a backslash are
        joined with the next one. Fenced blocks, and lines that go on with a
        paragraph or a list, hold no commands.
    """
    commands: list[str] = []
    fenced = in_block = goes_on = False
    after_blank = True
    for line in text.splitlines():
        if line.lstrip().startswith('```'):
            fenced = not fenced
        indented = line.startswith('    ') and not fenced
        in_block = indented and (in_block or after_blank)
        after_blank = not line.strip() or (after_blank and in_block)
        if not in_block or not line.strip():
            continue
        part = line.strip()
        if goes_on:
            commands[-1] += ' ' + part.removesuffix('\\').rstrip()
        elif not part.startswith('#'):
            commands.append(part.removesuffix('\\').rstrip())
        goes_on = part.endswith('\\')
    return commands


def run_guide(path: str | os.PathLike, workdir: str | os.PathLike,
              env: Mapping[str, str] | None = None,
              skip: Iterable[str] = (),
              replace: Mapping[str, str] | None = None,
              timeout: float = 300) -> dict[str, str]:
    """Run a guide's commands one after the other in a folder of its own.

    ``tools``, ``configs`` and ``docs`` of the repository are
    reachable from the folder (by links, so a guide must not write there), and
    ``python`` is the interpreter that runs the test.

    Args:
        path (str | PathLike): The page, relative to the repository's root.
        workdir (str | PathLike): An existing folder, best an empty one.
        env (Mapping, optional): Environment variables to set.
        skip (iterable[str]): Commands that contain one of these texts are
            not run: a GPU's, a download's.
        replace (Mapping, optional): Texts to replace in the commands, such as
            a data set's path by a small one's.
        timeout (float): Seconds that each command may take.

    Returns:
        dict[str, str]: What each command printed to stdout and stderr, by the
        command as the guide shows it.

    Raises:
        AssertionError: A command failed (with all that it printed) or took
            too long, the page has no command to run, or an item of ``skip``
            or ``replace`` is in none.
    """
    workdir, skip, replace = Path(workdir), list(skip), dict(replace or {})
    commands = read_commands((ROOT / path).read_text(encoding='utf-8'))
    for text in [*skip, *replace]:
        assert any(text in command for command in commands), (
            f'no command of {path} contains {text!r}: {commands}')
    for name in _REACHABLE:
        if not (workdir / name).exists():
            (workdir / name).symlink_to(ROOT / name)
    folders = [str(Path(sys.executable).parent), os.environ.get('PATH', '')]
    environ = {
        'OMP_NUM_THREADS': '1', **os.environ, **(env or {}),
        'PATH': os.pathsep.join(folders),
        'PYTHONPATH': str(ROOT)
    }
    outputs = {}
    for command in commands:
        if not any(text in command for text in skip):
            outputs[command] = _run(
                command, replace, workdir, environ, timeout)
    assert outputs, f'{path} has no command to run'
    return outputs


def _run(command: str, replace: Mapping[str, str], workdir: Path,
         environ: Mapping[str, str], timeout: float) -> str:
    """Run one command; returns what it printed."""
    actual = command
    for old, new in replace.items():
        actual = actual.replace(old, new)
    try:
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', actual],
            cwd=workdir, env=environ, timeout=timeout, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        printed = (error.output or b'').decode(errors='replace')
        raise AssertionError(
            f'{actual!r} took over {timeout} s:\n{printed}') from error
    assert done.returncode == 0, (
        f'{actual!r} ended with {done.returncode}:\n{done.stdout}')
    return done.stdout
