"""Fixtures for all tests."""

import importlib.util
import os
from collections.abc import Iterator

import interpreter_rounding
import pytest
import torch
from mmengine.utils import ManagerMixin

# Triton decides when it is imported, which mmrpa does after this, whether its
# kernels are for a GPU or for its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
    if importlib.util.find_spec('triton') is not None:
        interpreter_rounding.install()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test start from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_earlier_run() -> None:
    """Forget what mmengine keeps of earlier tests' runs.

    The host that was made the default one, and by their names, which are the
    second of the start, loggers, message hubs and visualizers. Those write to
    streams and folders that were closed and removed with their test.
    """
    for manager in _with_subclasses(ManagerMixin):
        manager._instance_dict.clear()


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


@pytest.fixture(autouse=True)
def own_torch_load_switches(monkeypatch) -> None:
    """Take back what a tool has told torch.load of this process."""
    for name in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD',
                 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        # Setting it first makes monkeypatch put back what there was before.
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)
