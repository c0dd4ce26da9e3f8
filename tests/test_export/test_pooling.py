"""Adaptive pooling as products of matrices, held to torch's own."""

import pytest
import torch
from torch import nn

from mmrpa.export.pooling import AdaptiveAvgPool, bin_weights, replace_pooling


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 3), (6, 6), (4, 5),
                                  (None, 3), (2, None)])
@pytest.mark.parametrize('shape', [(1, 1), (2, 3), (5, 13), (16, 12)])
def test_equals_torch(size, shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(AdaptiveAvgPool(size)(x),
                               nn.AdaptiveAvgPool2d(size)(x),
                               rtol=1e-12, atol=1e-12)


def test_weights_of_bins_that_overlap():
    """5 cells in 3 bins: 0 to 1, 1 to 3, 3 to 4."""
    assert bin_weights(3, 5, torch.ones(1, dtype=torch.float64)).tolist() == [
        [1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0],
        [0, 0, 0, 1 / 2, 1 / 2]]


def test_replaces_at_all_depths():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.ModuleList(
        [nn.Sequential(nn.AdaptiveAvgPool2d((None, 3)), nn.ReLU())]))
    assert replace_pooling(model) == 2
    assert model[0].output_size == (2, 2)
    assert model[1][0][0].output_size == (None, 3)
    assert replace_pooling(model) == 0
