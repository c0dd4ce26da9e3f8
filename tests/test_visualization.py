"""Routing maps: recorded as computed, painted as said."""

import numpy as np
import pytest
import torch
from zoo import build

from mmrpa.layers import RPAttention
from mmrpa.visualization import (
    effective_representatives,
    paint_routing,
    record_inputs,
    record_routing,
    representative_colors,
)
from mmrpa.visualization.painting import (
    overlay_blocks,
    overlay_heat,
    overlay_segments,
    overlay_single,
    relative,
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


def test_colours_are_far_apart_and_enough():
    from mmrpa.visualization.colors import _to_lab
    colors = representative_colors(64)
    lab = _to_lab(colors)
    distance = torch.pdist(torch.from_numpy(lab)).min()
    assert distance > 15  # a just noticeable difference is about 2.3
    many = representative_colors(700)
    assert many.shape == (700, 3) and (many[:64] == colors).all()
    assert many.min() >= 0 and many.max() <= 1
    with pytest.raises(ValueError, match='at least 1, got 0'):
        representative_colors(0)


def test_lab_of_known_colours():
    from mmrpa.visualization.colors import _to_lab
    rgb = np.array([[1., 1, 1], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86],
                [53.39, 0, 0]]
    assert _to_lab(rgb) == pytest.approx(np.array(expected), abs=0.05)


def test_a_representative_has_one_colour_whatever_its_mass():
    colors = representative_colors(3)
    picture = np.full((4, 4, 3), 0.5)
    everywhere = np.ones((4, 4), bool)
    most, few = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    most[2] = 1
    few[1] = 1
    few[:, 0, 0] = torch.tensor([0., 0, 1])
    a = overlay_segments(picture, most, colors, everywhere)
    b = overlay_segments(picture, few, colors, everywhere)
    assert a[3, 3] == pytest.approx(0.78 * 0.75 * colors[2] + 0.22 * 0.5)
    # Of the borders, which are two pixels wide, the first row has one.
    assert b[3, 3] == pytest.approx(0.78 * 0.75 * colors[1] + 0.22 * 0.5)
    inner = overlay_segments(picture[:1, :1], few[:, :1, :1], colors,
                             everywhere[:1, :1])
    assert inner[0, 0] == pytest.approx(a[3, 3])
    default = paint_routing(few, (4, 4))
    assert default[0, 0] == pytest.approx(colors[1])  # second by mass
    fixed = paint_routing(few, (4, 4), colors)
    assert fixed[0, 0] == pytest.approx(colors[2])


def test_what_is_not_seen_is_grey():
    seen = np.ones((2, 2), bool)
    seen[1, 1] = False
    picture = np.random.default_rng(0).random((2, 2, 3))
    for out in (overlay_heat(picture, torch.ones(2, 2), seen),
                overlay_blocks(picture, torch.ones(2, 2), seen),
                overlay_single(picture, torch.ones(2, 2), (1, 0, 0), seen)):
        assert np.ptp(out[1, 1]) == pytest.approx(0)
        assert np.ptp(out[0, 0]) > 0.05


def test_an_even_response_is_not_painted_as_high():
    seen = np.ones((10, 10), bool)
    assert relative(torch.full((10, 10), 0.01), seen) == pytest.approx(1 / 3)
    one = torch.zeros(10, 10)
    one[2, 3] = 1
    assert relative(one, seen)[2, 3] == 1
    assert relative(one, seen).sum() == 1
    half = torch.cat((torch.full((2, 10), 0.05), torch.zeros(8, 10)))
    assert relative(half, seen).max() == 1
    assert not relative(torch.zeros(10, 10), seen).any()


def test_inputs_are_kept_for_later_questions():
    model = build('swin', attention=['rp', 'window', 'dense', 'rp']).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), record_inputs(model) as inputs, \
            record_routing(model) as maps:
        model(x)
    assert list(inputs) == [f'stages.{i}.blocks.{j}.attn'
                            for i, j in ((0, 0), (1, 0), (1, 1), (2, 0),
                                         (3, 0))]
    for name, routing in maps.items():
        later = model.get_submodule(name).routing_map(*inputs[name])
        assert torch.equal(later, routing)
    bare = torch.nn.ModuleDict(dict(attn=RPAttention(8, 2, 4)))
    x = torch.randn(2, 8, 3, 5)
    with record_inputs(bare) as inputs:
        bare.attn(x)
    assert inputs['attn'].hw_shape == (3, 5)
    assert torch.equal(inputs['attn'].x, x.flatten(2).transpose(1, 2))
