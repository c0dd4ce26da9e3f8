"""A process that runs one task after the other, and may die of one."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from swap_survey.tasks import describe

# After so many tasks a fresh process takes over: hosts keep what they load.
_TASKS = 300


def _serve(connection: Connection, memory: float) -> None:
    """What the process does."""
    from mmrpa.safe_loading import protect_process
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    protect_process()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            result = function(*args)
        except Exception as error:  # noqa: BLE001
            # Whatever a host raises is this task's result.
            result = dict(outcome='failed', error=describe(error))
        connection.send(result)


class Worker:
    """Runs functions in a process with limits on time and memory.

    Args:
        memory (float): GiB of data that the process may hold.
        timeout (float): Seconds that a task may take.
    """

    def __init__(self, memory: float, timeout: float) -> None:
        self.memory = memory
        self.timeout = timeout
        self._context = multiprocessing.get_context('spawn')
        self._process: Any = None
        self._connection: Any = None
        self._left = 0

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, function: Callable[..., dict[str, Any]],
            *args: Any) -> dict[str, Any]:
        """The function's result, or a record of how it failed.

        Returns:
            dict: What the function returned; or ``outcome='failed'`` and
            ``error`` if it raised, took too long or ended the process.
        """
        if self._left == 0:
            self._stop()
            self._start()
        self._left -= 1
        self._connection.send((function, args))
        try:
            if self._connection.poll(self.timeout):
                return self._connection.recv()
            error = f'took over {self.timeout:g} s'
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            error = f'the process ended with {self._process.exitcode}'
        self._stop()
        return dict(outcome='failed', error=error)

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(other, self.memory), daemon=True)
        self._process.start()
        other.close()
        self._left = _TASKS

    def _stop(self) -> None:
        self._left = 0
        if self._process is None:
            return
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
