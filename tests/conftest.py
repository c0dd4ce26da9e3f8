"""Fixtures for all tests."""

import pytest
import torch
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test start from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope() -> None:
    """Forget the host that an earlier test has made the default."""
    DefaultScope._instance_dict.clear()
