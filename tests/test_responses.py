"""Responses of queries against N x N oracles, and against what layers do."""

import pytest
import torch
from torch import nn

from mmrpa.layers import (
    CrossShapedWindowAttention,
    DenseAttention,
    RPAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from mmrpa.visualization import query_response

HW = (6, 5)
DIMS, HEADS, M = 8, 2, 3


def _inputs(num_cls=0, hw=HW):
    x = torch.randn(2, num_cls + hw[0] * hw[1], DIMS, dtype=torch.float64)
    return x, torch.arange(hw[0] * hw[1])


def _trained(layer):
    """Weights so large that rows are far from uniform; no tied zeros."""
    layer = layer.double().eval()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=1. if 'anchors' in name else 0.6)
    return layer


@pytest.mark.parametrize('num_cls', [0, 1])
@pytest.mark.parametrize('options', [
    dict(),
    dict(anchors='shared'),
    dict(routing='tokens'),
    dict(reduction='sum'),
], ids=str)
def test_rp_is_the_row_of_the_n_by_n_matrix(options, num_cls):
    layer = _trained(RPAttention(DIMS, HEADS, M, **options))
    x, queries = _inputs(num_cls)
    with torch.no_grad():
        maps = layer.query_response(x, HW, queries)
    assert maps.shape == (2, HEADS, 30, *HW)
    assert maps.dtype == torch.float64
    qkv = layer.qkv(x)
    d = DIMS // HEADS
    for b in range(2):
        for h in range(HEADS):
            q, k = (qkv[b, :, i * DIMS + h * d:i * DIMS + (h + 1) * d]
                    for i in (0, 1))
            anchors = layer.anchors[h if len(layer.anchors) > 1 else 0]
            logits = torch.stack(
                [torch.stack([k_j @ a for a in anchors]) for k_j in k])
            over_m = options.get('routing') != 'tokens'
            p = logits.softmax(1 if over_m else 0)  # N x M
            mass = p.sum(0)
            k_rep = torch.stack([(p[:, m, None] * k).sum(0) /
                                 (1 if 'reduction' in options else mass[m])
                                 for m in range(M)])
            s = (q @ k_rep.T / d**0.5).softmax(1)
            full = torch.einsum('nm,jm->nj', s, p / mass)  # N x N
            torch.testing.assert_close(
                full.sum(1), torch.ones(len(full), dtype=torch.float64))
            torch.testing.assert_close(maps[b, h].flatten(1),
                                       full[num_cls:, num_cls:])
    total = maps.sum((-2, -1))
    if num_cls:
        assert (total < 1).all()
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_rp_takes_a_map_and_few_queries():
    layer = _trained(RPAttention(DIMS, HEADS, M))
    x, queries = _inputs()
    as_map = x.transpose(1, 2).unflatten(-1, HW)
    full = layer.query_response(x, HW, queries)
    few = layer.query_response(as_map, None, torch.tensor([7, 29, 7]))
    torch.testing.assert_close(few, full[:, :, [7, 29, 7]])


def test_rp_in_half_precision_is_computed_in_float32():
    layer = RPAttention(DIMS, HEADS, M).eval()
    x = torch.randn(1, 30, DIMS)
    queries = torch.tensor([3])
    exact = layer.query_response(x, HW, queries)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = layer.query_response(x, HW, queries)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(1, HEADS, 1))
    torch.testing.assert_close(maps, exact, rtol=0.05, atol=1e-3)


TWINS = {
    'dense': (DenseAttention, dict()),
    'dense, cls': (DenseAttention, dict()),
    'sr': (SpatialReductionAttention, dict(sr_ratio=2)),
    'sr, kernel over the map': (SpatialReductionAttention, dict(sr_ratio=8)),
    'sr 1': (SpatialReductionAttention, dict(sr_ratio=1)),
    'window': (WindowAttention, dict(window_size=4)),
    'window, shifted': (WindowAttention, dict(window_size=4, shift=True)),
    'window, one': (WindowAttention, dict(window_size=7, shift=True)),
    'cross': (CrossShapedWindowAttention, dict(split_size=2)),
    'cross, whole': (CrossShapedWindowAttention, dict(split_size=None)),
}


@pytest.mark.parametrize('name', TWINS)
def test_a_twins_output_is_the_mean_of_values_under_its_response(name):
    """The layer's own forward is the oracle.

    With the identity for the output projection it puts out the mean of the
    values, weighted by the response; what is missing to 1 was read from the
    CLS token or from padding, whose value is the bias.
    """
    kind, options = TWINS[name]
    layer = _trained(kind(DIMS, HEADS, **options))
    num_cls = int('cls' in name)
    x, queries = _inputs(num_cls)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.eye(DIMS))
        layer.proj.bias.zero_()
        for lepe in getattr(layer, 'lepe', ()):  # local, not attention
            lepe.weight.zero_()
            lepe.bias.zero_()
        maps = query_response(layer, x, HW, queries)
        out = layer(x, HW)[:, num_cls:]
        values = _values(layer, x, num_cls)  # B, h, N, d
        padding = _padding_value(layer)  # h, d
    mean = torch.einsum('bhqn,bhnd->bqhd', maps.flatten(3), values)
    rest = 1 - maps.sum((-2, -1))  # B, h, Q
    if num_cls:
        v_cls = layer.qkv(x[:, :1])[..., 2 * DIMS:].unflatten(-1, (HEADS, -1))
        mean = mean + rest.transpose(1, 2)[..., None] * v_cls
    else:
        mean = mean + rest.transpose(1, 2)[..., None] * padding
    torch.testing.assert_close(mean.flatten(2), out)
    if 'window' not in name and name != 'cross' and not num_cls:
        torch.testing.assert_close(rest, torch.zeros_like(rest))
    assert (maps >= 0).all() and (rest > -1e-12).all()


def _values(layer, x, num_cls):
    """The value of each token of the map, (B, h, N, d)."""
    if isinstance(layer, SpatialReductionAttention):
        ratio = layer.sr_ratio
        v = layer.kv(layer.reduce(x, HW))[..., DIMS:]
        reduced = (max(HW[0] // ratio, 1), max(HW[1] // ratio, 1))
        v = v.unflatten(1, reduced)
        rows = torch.arange(HW[0]).div(ratio, rounding_mode='floor')
        cols = torch.arange(HW[1]).div(ratio, rounding_mode='floor')
        v = v[:, rows.clamp(max=reduced[0] - 1)]
        v = v[:, :, cols.clamp(max=reduced[1] - 1)].flatten(1, 2)
    else:
        v = layer.qkv(x)[:, num_cls:, 2 * DIMS:]
    return v.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _padding_value(layer):
    """The value of a token of zeros."""
    last = layer.kv if hasattr(layer, 'kv') else layer.qkv
    return last.bias[-DIMS:].unflatten(0, (HEADS, -1))


@pytest.mark.parametrize('name', TWINS)
def test_a_twins_few_queries_are_those_of_all(name):
    kind, options = TWINS[name]
    layer = _trained(kind(DIMS, HEADS, **options))
    x, queries = _inputs(int('cls' in name))
    full = query_response(layer, x, HW, queries)
    few = query_response(layer, x, HW, torch.tensor([29, 0]))
    torch.testing.assert_close(few, full[:, :, [29, 0]])


@pytest.mark.parametrize('queries, message', [
    (torch.tensor([30]), r'\[0, 29\] for a map of 6x5 tokens, got \[30\]'),
    (torch.tensor([2, -1]), r'got \[-1\]'),
    (torch.tensor([[1]]), r'integer indices \(Q\), got \(1, 1\)'),
    (torch.tensor([1.]), 'torch.float32'),
])
@pytest.mark.parametrize('kind', [RPAttention, DenseAttention])
def test_a_query_outside_of_the_map_is_an_error(kind, queries, message):
    layer = kind(DIMS, HEADS)
    with pytest.raises(ValueError, match=message):
        query_response(layer, torch.zeros(1, 30, DIMS), HW, queries)


def test_other_layers_have_no_response():
    with pytest.raises(TypeError, match='RPAttention.*got Linear'):
        query_response(nn.Linear(2, 2), torch.zeros(1, 4, 2), (2, 2),
                       torch.tensor([0]))
