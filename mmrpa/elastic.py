"""What ``--resume`` means, and processes that torchrun has started.

``MAX_RESTARTS=3 tools/dist_train.sh ...`` lets torchrun start all processes
again after one has died. They get the same arguments, so without more they
would begin from the beginning, or from the file of ``--resume FILE``.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# When dist_train.sh was started, in seconds since 1970; set by launchers.sh.
LAUNCHED = 'MMRPA_LAUNCHED'
_COUNT = 'TORCHELASTIC_RESTART_COUNT'
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """Let this process end when the torchrun that has started it does.

    torchrun ends its processes, unless it is killed with SIGKILL (by hand, or
    by a machine without memory). They have sessions of their own, so they
    would train on, and write to the folder of whoever starts it again.

    The system sends SIGTERM, as torchrun does. Nothing is changed in a
    process that torchrun has not started, and on other systems than Linux.
    """
    if sys.platform == 'linux' and _COUNT in os.environ:
        launcher = os.getppid()
        failed = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG,
                                         int(signal.SIGTERM))
        if failed:
            print('mmrpa: this system does not end the processes of a '
                  'launcher that is killed with SIGKILL', file=sys.stderr,
                  flush=True)
        if os.getppid() != launcher:  # it has ended before the call
            raise SystemExit(128 + signal.SIGTERM)


def means(arg: str, flag: str) -> bool:
    """Whether an argument is a flag, with ``=VALUE`` or not.

    Args:
        arg (str): The argument.
        flag (str): The flag, or what it may be shortened to. argparse has
            refused what is short for several flags.
    """
    name = arg.partition('=')[0]
    return len(name) > 2 and flag.startswith(name)


def restart_flags(config: str, cfg: Mapping,
                  work_dir: str | None) -> tuple[list[str], str | None]:
    """Flags that let a restarted training go on.

    It goes on from the last checkpoint if that was written since
    dist_train.sh was started: one that is older may be of another training
    in the same folder. Without one the training starts as it did at first.

    Args:
        config (str): The config file.
        cfg (Mapping): What is in it.
        work_dir (str | None): The argument of ``--work-dir``.

    Returns:
        tuple: Flags to add at the end, and what to tell the user; none and
        None if this is no restart.
    """
    count = int(os.environ.get(_COUNT) or 0)
    launched = os.environ.get(LAUNCHED)
    if count == 0 or launched is None:
        return [], None
    folder = _folder(config, cfg, work_dir)
    try:
        written = (folder / 'last_checkpoint').stat().st_mtime
    except FileNotFoundError:
        written = -1.
    if written - _clock_ahead(folder) < int(launched):
        return [], (f'restart {count}: no checkpoint was written to {folder} '
                    'since the start, so the training starts as it did then')
    # mmseg would go on from load_from, where that is set.
    return (['--resume', '--cfg-options', 'load_from=None'],
            f'restart {count}: the training goes on from the last checkpoint '
            f'in {folder}')


def settle_resume(argv: list[str], config: str, cfg: Mapping,
                  work_dir: str | None) -> tuple[list[str], str | None]:
    """Let a config's ``load_from`` not be in the way of ``--resume``.

    With ``--resume`` and no file, mmdet and mmpretrain forget ``load_from``,
    so a first start, with no checkpoint yet, begins from random weights.
    mmseg goes on from the file of ``load_from`` even if there are checkpoints.

    Args:
        argv (list[str]): The host's arguments; ``--resume`` without a file is
            among them.
        config (str): The config file.
        cfg (Mapping): What is in it; ``load_from`` is set.
        work_dir (str | None): The argument of ``--work-dir``.

    Returns:
        tuple: The arguments to use, and what to tell the user or None.
    """
    from mmrpa.resume_search import has_checkpoints
    folder = _folder(config, cfg, work_dir)
    if has_checkpoints(folder):
        return [*argv, '--cfg-options', 'load_from=None'], None
    kept = []
    for i, arg in enumerate(argv):
        value = arg == 'auto' and means(argv[i - 1], '--resume')
        if not (means(arg, '--resume') or value):
            kept.append(arg)
    if cfg.get('resume'):  # it would still make load_from a training's
        kept += ['--cfg-options', 'resume=False']
    return kept, (f'no checkpoint in {folder} to resume from: the training '
                  f'starts from load_from={cfg["load_from"]!r}')


def _clock_ahead(folder: Path) -> int:
    """Seconds by which the clock of a folder's file server is ahead of ours.

    Files get the server's time; the launch was timed here.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix='.clock_') as file:
            return round(os.stat(file.name).st_mtime - time.time())
    except OSError:  # no folder, or no right to write
        return 0


def _folder(config: str, cfg: Mapping, work_dir: str | None) -> Path:
    """The working directory, as the hosts' scripts choose it."""
    return Path(work_dir or cfg.get('work_dir')
                or Path('work_dirs', Path(config).stem))
