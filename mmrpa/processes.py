"""What the processes of one run share, and who of them does what."""

import os
from typing import NamedTuple

from mmrpa.preflight import ConfigError

# Of each launcher: which process this is, of how many.
_VARIABLES = (('pytorch', 'RANK', 'WORLD_SIZE'),
              ('slurm', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'),
              ('mpi', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'))


class Started(NamedTuple):
    """How this process was started.

    Attributes:
        launcher (str): Value for ``--launcher``.
        rank (int): Which process this is, from 0.
        size (int): How many there are, 2 or more.
        variable (str): The environment variable that says how many.
    """

    launcher: str
    rank: int
    size: int
    variable: str


def find_started() -> Started | None:
    """What the environment says of a start in several processes.

    Returns:
        Started | None: None if this process is alone.
    """
    for launcher, rank, size in _VARIABLES:
        count = int(os.environ.get(size) or 1)
        if os.environ.get(rank) and count > 1:
            return Started(launcher, int(os.environ[rank]), count, size)
    return None


def check_launcher(name: str, launcher: str) -> None:
    """Refuse several processes that would not know of each other.

    Each would do the whole work, and all would write to one folder.

    Args:
        name (str): 'train' or 'test'.
        launcher (str): Value of ``--launcher``.

    Raises:
        ConfigError: (a ValueError) ``launcher`` is 'none', and this is one of
            several processes.
    """
    started = find_started()
    if launcher != 'none' or started is None:
        return
    script = {
        'pytorch': f', or start it by tools/dist_{name}.sh',
        'slurm': f', or start it by tools/slurm_{name}.sh'
    }.get(started.launcher, '')
    raise ConfigError(
        f'{started.variable}={started.size}: this is one of {started.size} '
        f'processes, but without --launcher each would {name} all by itself, '
        'and all would write to one work_dir. Add --launcher '
        f'{started.launcher}{script}. (If this process is alone, unset '
        f'{started.variable}.)')


def note_drawing(flag: str) -> None:
    """Say, in the first process, that it alone draws its share of images.

    The visualizers of all hosts do nothing in the other processes.

    Args:
        flag (str): What asks for images: '--show' or '--show-dir'.
    """
    started = find_started()
    if started is not None and started.rank == 0:
        print(f'mmrpa: {flag}: the first of {started.size} processes alone '
              f'draws its images, one in {started.size}; tools/test.py in one '
              'process, without --launcher, draws all', flush=True)


def write_logs_once() -> None:
    """Let the first process alone write and move what is one for all.

    mmengine's LoggerHook does both in all processes at once. They write the
    metrics of a test to one JSON file, each with its own times: if two texts
    differ in length, the end of the longer one can stay behind the shorter
    one. With ``out_dir`` they copy the same logs to one place, and with
    ``keep_local=False`` remove them under each other's hands.
    """
    from mmengine.dist import is_main_process, master_only
    from mmengine.hooks import LoggerHook
    move = LoggerHook.after_run

    def after_run(hook, runner) -> None:
        if is_main_process():
            move(hook, runner)
        else:
            runner.visualizer.close()

    LoggerHook.after_test_epoch = master_only(LoggerHook.after_test_epoch)
    LoggerHook.after_run = after_run
