"""Routing maps: recorded as computed, painted as said."""

import pytest
import torch
from zoo import build

from mmrpa.layers import RPAttention
from mmrpa.visualization import (
    effective_representatives,
    paint_routing,
    record_routing,
    representative_colors,
)


@pytest.mark.parametrize('family', ['deit', 'swin'])
def test_every_layer_is_recorded_as_it_runs(family):
    model = build(family, attention=['rp', 'dense', 'rp', 'rp']).eval()
    x = torch.randn(2, 3, 64, 96)
    inputs = {}
    name = 'stages.0.blocks.0.attn'
    model.get_submodule(name).register_forward_hook(
        lambda module, args, out: inputs.update({name: args}))
    before = model(x)
    with record_routing(model) as maps:
        after = model(x)
    assert list(maps) == [f'stages.{i}.blocks.0.attn' for i in (0, 2, 3)]
    stride = model.strides[0]
    assert maps[name].shape[-2:] == (64 // stride, 96 // stride)
    expected = model.get_submodule(name).routing_map(*inputs[name])
    torch.testing.assert_close(maps[name], expected)
    for a, b in zip(before, after, strict=True):  # recording changes nothing
        assert torch.equal(a, b)
    maps.clear()
    model(x)
    assert not maps  # and ends with the block


@pytest.mark.parametrize('how', ['keyword', 'map'])
def test_a_bare_layer_is_recorded_however_it_is_called(how):
    model = torch.nn.ModuleDict(dict(attn=RPAttention(8, 2, 4)))
    x = torch.randn(2, 8, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    with record_routing(model) as maps:
        if how == 'map':
            model.attn(x)
        else:
            model.attn(tokens, hw_shape=(3, 5))
    torch.testing.assert_close(maps['attn'],
                               model.attn.routing_map(tokens, (3, 5)))


def test_a_pixel_has_the_mixed_colours_of_its_representatives():
    colors = representative_colors(3)
    routing = torch.zeros(3, 2, 2)
    routing[1] = 1  # most of the mass: the first colour
    routing[:, 0, 0] = torch.tensor([0.5, 0.5, 0.])
    picture = paint_routing(routing, (2, 2))
    assert picture.shape == (2, 2, 3)
    assert picture[1, 1] == pytest.approx(colors[0])
    assert picture[0, 0] == pytest.approx((colors[0] + colors[1]) / 2)


def test_colours_are_stable_and_differ():
    colors = representative_colors(64)
    assert (representative_colors(16) == colors[:16]).all()
    assert len({tuple(c.round(2)) for c in colors}) == 64


def test_effective_representatives_counts_those_in_use():
    one = torch.zeros(1, 1, 8, 2, 2)
    one[:, :, 3] = 1
    assert effective_representatives(one) == pytest.approx(1)
    assert effective_representatives(
        torch.full((2, 3, 8, 2, 2), 1 / 8)) == pytest.approx(8)
    halves = torch.zeros(1, 1, 8, 2, 2)
    halves[:, :, 0, 0] = halves[:, :, 1, 1] = 1  # a row each
    assert effective_representatives(halves) == pytest.approx(2)
    both = torch.cat((one, halves), dim=1)
    assert effective_representatives(both) == pytest.approx(1.5)
