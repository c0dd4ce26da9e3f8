"""Fixtures for all tests."""

import os

import pytest
import torch
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
