"""DataCheckHook in a process of a group."""

from pathlib import Path
from types import SimpleNamespace

from mmengine.config import Config

from mmrpa.data_checks import DataError
from mmrpa.hooks import DataCheckHook


def check_in_turn(rank: int, configs: list[str], marker: str) -> list:
    """Let the hook check configs, one after the other.

    Returns:
        list: For each its error or '', and whether the first process had
        read the data when the hook was done.
    """
    return [check(rank, config, Path(f'{marker}{number}'))
            for number, config in enumerate(configs)]


def check(rank: int, config: str, marker: Path) -> list:
    hook = DataCheckHook()
    read = hook.read

    def read_and_tell(cfg, splits):
        assert rank == 0, 'only the first process reads'
        report = read(cfg, splits)
        marker.touch()
        return report

    hook.read = read_and_tell
    try:
        hook.before_train(SimpleNamespace(cfg=Config.fromfile(config)))
        error = ''
    except DataError as caught:
        error = str(caught)
    return [error, marker.exists()]


def check_and_fail(rank: int) -> str:
    """Let the check of the first process fail.

    Returns:
        str: What the hook raises.
    """
    hook = DataCheckHook()

    def read(cfg, splits):
        raise RecursionError('a mistake of the check')

    hook.read = read
    try:
        hook.before_train(SimpleNamespace(cfg=Config()))
    except RuntimeError as caught:
        return f'{type(caught).__name__}: {caught}'
    return ''
