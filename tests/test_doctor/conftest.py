"""What the tests in spoiled environments share."""

import pytest
from doctor_environments import Environment


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without packages, deleted behind the test."""
    environment = Environment(tmp_path / 'env')
    yield environment
    environment.remove()
