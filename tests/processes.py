"""Run a function in several processes that form a group over gloo."""

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import torch
from torch import distributed as dist
from torch import multiprocessing


def run_in_processes(function: Callable[..., Any],
                     *args: Any,
                     size: int = 2) -> list:
    """Call ``function(rank, *args)`` in ``size`` new processes of one group.

    A start costs seconds of imports: give it many checks at once.

    Args:
        function (Callable): Of a module that the processes can import by its
            name; it returns what ``torch.load(weights_only=True)`` reads.
        args: Its arguments after the rank; they are pickled.
        size (int): Number of processes.

    Returns:
        list: What it returned, by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: It failed in one of
            them; with the traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            _work, (size, folder, function, args), nprocs=size)
        return [torch.load(Path(folder, str(i))) for i in range(size)]


def _work(rank: int, size: int, folder: str, function: Callable,
          args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size),
                      LOCAL_RANK=str(rank))
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/group', rank=rank,
        world_size=size, timeout=timedelta(seconds=600))
    torch.save(function(rank, *args), Path(folder, str(rank)))
    dist.barrier()  # nobody leaves while another one still talks to it
    dist.destroy_process_group()
