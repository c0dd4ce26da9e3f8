"""Fixtures for all tests."""

import os

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

# Triton decides when it is imported, which mmrpa does after this, whether its
# kernels are for a GPU or for its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test start from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope() -> None:
    """Forget the host that an earlier test has made the default."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def no_earlier_loggers() -> None:
    """Forget the loggers of earlier tests, whose streams are closed by now.

    mmengine keeps one for each name, with the standard output that pytest has
    put in place of the real one for the test that asked first; uvicorn closes
    every handler of the process when it starts.
    """
    MMLogger._instance_dict.clear()


@pytest.fixture(autouse=True)
def own_torch_load_switches(monkeypatch) -> None:
    """Take back what a tool has told torch.load of this process."""
    for name in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD',
                 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        # Setting it first makes monkeypatch put back what there was before.
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)
