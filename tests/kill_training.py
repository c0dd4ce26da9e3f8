"""Kill a training in a process of its own, at a step of its choice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from helpers import TOOLS


def environment(**settings: str) -> dict[str, str]:
    """The variables for a tool on CPUs, without those of a launcher."""
    launchers = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'RANK',
                 'LOCAL_RANK', 'WORLD_SIZE', 'MAX_RESTARTS')
    paths = [str(TOOLS.parent), os.environ.get('PYTHONPATH', '')]
    return {
        **{k: v for k, v in os.environ.items() if k not in launchers},
        'PYTHONPATH': os.pathsep.join(p for p in paths if p),
        'PYTHON': sys.executable,
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
        **settings}


def start(arguments: Sequence[object], log: Path,
          **settings: str) -> subprocess.Popen:
    """Start a tool, in a session of its own.

    Args:
        arguments (sequence): The tool's name and its arguments.
        log (Path): Gets what it prints, after what is there.
        settings (str): Environment variables.
    """
    tool, *rest = map(str, arguments)
    program = [sys.executable] if tool.endswith('.py') else ['bash']
    with open(log, 'ab') as file:
        return subprocess.Popen(
            [*program, str(TOOLS / tool), *rest], cwd=log.parent,
            env=environment(**settings), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def read_losses(work_dir: Path) -> list[dict[int, float]]:
    """The losses by step of each run that logged to a folder, in order.

    The last line of a killed run may be cut off.
    """
    runs = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        losses = {}
        for line in path.read_text().splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if 'loss' in values:
                losses[values['step']] = values['loss']
        runs.append(losses)
    return runs


def wait_for(process: subprocess.Popen, ready, log: Path,
             timeout: float = 240) -> None:
    """Wait until ``ready()`` is true.

    Raises:
        AssertionError: The process has ended before, or it took too long.
    """
    end = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it has started, if it still runs.

    One that has died of an error leaves no group: the error is to be seen.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop_launcher(process: subprocess.Popen) -> None:
    """Let torchrun end its processes, which have sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            kill_all(process)


def kill_at(arguments: Sequence[object], work_dir: Path, log: Path,
            step: int) -> None:
    """Start a training, and SIGKILL it once it has logged a step."""
    earlier = set(work_dir.glob('*/vis_data/scalars.json'))

    def reached() -> bool:
        new = set(work_dir.glob('*/vis_data/scalars.json')) - earlier
        text = ''.join(path.read_text() for path in new)
        return any(f'"step": {s}' in text for s in (step, step + 1))

    process = start(arguments, log)
    try:
        wait_for(process, reached, log)
    finally:
        kill_all(process)
