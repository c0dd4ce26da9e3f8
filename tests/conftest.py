"""Fixtures for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test start from the same random numbers."""
    torch.manual_seed(0)
