"""Calibration against dense attention, loops and planted clusters."""

import math

import pytest
import torch
import torch.nn.functional as F
from zoo import attentions, build

from mmrpa.layers import DenseAttention, RPAttention
from mmrpa.transfer import calibrate
from mmrpa.transfer.kmeans import spherical_kmeans


class Single(torch.nn.Module):
    """One layer as a network, on tokens of a 6 x 8 map."""

    def __init__(self, **options):
        super().__init__()
        self.attn = RPAttention(16, 2, 6, **options)
        torch.nn.init.normal_(self.attn.qkv.weight, std=0.5)
        torch.nn.init.normal_(self.attn.qkv.bias, std=0.5)

    def forward(self, x):
        return self.attn(x, (6, 8))


def dense_twin(attn: RPAttention) -> DenseAttention:
    twin = DenseAttention(16, 2)
    twin.load_state_dict({k: v.clone() for k, v in attn.state_dict().items()
                          if k.startswith(('qkv', 'proj'))})
    return twin


def clustered_tokens() -> torch.Tensor:
    """Three images of six kinds of tokens, eight of each, hardly noisy."""
    kinds = torch.randn(6, 16)
    tokens = kinds.repeat(3, 8, 1)
    tokens = torch.stack([t[torch.randperm(48)] for t in tokens])
    return tokens + 0.01 * torch.randn(3, 48, 16)


def relative(a, b):
    return ((a - b).square().mean() / b.square().mean()).item()


# k-means.


def test_kmeans_finds_planted_directions():
    planted = F.normalize(torch.randn(2, 5, 12), dim=-1)
    labels = torch.arange(200) % 5
    points = planted[:, labels] * (1 + torch.rand(2, 200, 1))
    points += 0.02 * torch.randn(points.shape)
    found = spherical_kmeans(points, 5, torch.Generator().manual_seed(0))
    assert found.shape == (2, 5, 12)
    cosines = planted @ found.transpose(1, 2)
    assert (cosines.max(1).values > 0.99).all()
    assert (cosines.max(2).values > 0.99).all()


def test_kmeans_ends_at_means_of_members():
    points = torch.randn(1, 60, 4)
    centers = spherical_kmeans(
        points, 7, torch.Generator().manual_seed(1), max_iters=200)[0]
    sums = torch.zeros(7, 4)
    for point in points[0]:
        best = max(range(7), key=lambda m: (point @ centers[m]).item())
        sums[best] += point
    for total, center in zip(sums, centers, strict=True):
        torch.testing.assert_close(total / total.norm(), center)


def test_kmeans_of_equal_points_and_of_too_few():
    same = torch.ones(1, 9, 3)
    found = spherical_kmeans(same, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.full((1, 4, 3), 3**-0.5))
    with pytest.raises(ValueError, match=r'num_clusters=10.*\(1, 9, 3\)'):
        spherical_kmeans(same, 10, torch.Generator())


# One layer.


@pytest.mark.parametrize('options', [
    dict(), dict(anchors='shared'), dict(interact='full'),
    dict(interact_proj=True), dict(interact_residual=True),
    dict(dwc_kernel_size=0)
], ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default')
def test_on_few_kinds_of_tokens_it_becomes_dense_attention(options):
    network, x = Single(**options), clustered_tokens()
    expected = dense_twin(network.attn)(x, (6, 8))
    before = relative(network(x), expected)
    # One representative for each kind, each nearly for itself alone.
    report, = calibrate(network, x, entropy=0.02)
    assert report.alive == 1 or options.get('anchors') == 'shared'
    if options.get('anchors') != 'shared':
        assert relative(network(x), expected) < min(0.05, 0.1 * before)
    else:  # six centres for the twelve clusters of two heads
        assert relative(network(x), expected) < min(0.3, 0.5 * before)


def test_dense_attention_does_not_see_the_shift_of_the_keys():
    network, x = Single(), torch.randn(2, 48, 16)
    expected = dense_twin(network.attn)(x, (6, 8))
    calibrate(network, x)
    keys = network.attn.qkv(x)[..., 16:32]
    torch.testing.assert_close(keys.mean((0, 1)), torch.zeros(16), atol=1e-5,
                               rtol=0)
    torch.testing.assert_close(dense_twin(network.attn)(x, (6, 8)), expected)


@pytest.mark.parametrize('routing', ['representatives', 'tokens'])
@pytest.mark.parametrize('wanted', [0.2, 0.6])
def test_entropy_is_what_was_asked_for(routing, wanted):
    network, x = Single(routing=routing), torch.randn(2, 48, 16)
    report, = calibrate(network, x, entropy=wanted)
    p = network.attn.routing_map(x, (6, 8)).flatten(3).tolist()
    entropies = []
    for image in p:
        for head in image:  # (M, N)
            groups = zip(*head, strict=True) if routing.startswith(
                'rep') else head
            for group in groups:
                entropies.append(-sum(v * math.log(v) for v in group if v))
    largest = math.log(6 if routing.startswith('rep') else 48)
    measured = sum(entropies) / len(entropies) / largest
    assert measured == pytest.approx(report.entropy, abs=1e-4)
    assert measured == pytest.approx(wanted, abs=0.02)


def test_convolution_starts():
    x = torch.randn(2, 48, 16)
    network = Single()
    lepe = network.attn.dwc.weight.clone()
    calibrate(network, x, dwc='keep')
    assert torch.equal(network.attn.dwc.weight, lepe)
    calibrate(network, x, dwc='zero')
    assert not network.attn.dwc.weight.any()
    plain = network.attn.interact_weight[2].clone()
    calibrate(network, x, dwc='average')
    torch.testing.assert_close(network.attn.interact_weight[2], plain / 2)
    # Equal values stay what they are: both paths return weighted means.
    x = torch.randn(1, 1, 16).expand(1, 48, 16)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    v = network.attn.qkv(x)[..., 32:]
    torch.testing.assert_close(network(x)[:, inside.flatten()],
                               network.attn.proj(v)[:, inside.flatten()],
                               rtol=1e-3, atol=1e-3)


# A network.


@pytest.mark.parametrize('family', ['deit', 'pvt', 'swin', 'cswin'])
def test_later_layers_see_the_calibrated_ones_before_them(family):
    backbone = build(family).train()
    images = torch.randn(4, 3, 64, 48)
    frozen = backbone.stem.state_dict()
    reports = calibrate(backbone, images)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())
    layers = {name: module for name, module in backbone.named_modules()
              if isinstance(module, RPAttention)}
    assert [r.name for r in reports] == list(layers)
    for key, value in backbone.stem.state_dict().items():
        assert torch.equal(value, frozen[key])

    def check(layer, args):
        # Only on what the layer was calibrated on is the mean zero.
        channels = layer.embed_dims
        keys = layer.qkv(args[0])[..., channels:2 * channels]
        assert keys.mean((0, 1)).abs().max() < 1e-4 * keys.abs().max()

    for layer in layers.values():
        layer.register_forward_pre_hook(check)
    backbone.eval()
    with torch.no_grad():
        backbone(images)


def test_mixed_attention_and_seeds():
    images = torch.randn(4, 3, 64, 64)
    own = attentions('swin')[-1]
    backbone = build('swin', attention=[own, 'rp', own, own])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert [r.name for r in calibrate(backbone, images, seed=3)] == [
        'stages.1.blocks.0.attn', 'stages.1.blocks.1.attn']
    first = backbone.state_dict()
    changed = {k for k in first if not torch.equal(first[k], before[k])}
    assert all(k.startswith('stages.1.') and '.attn.' in k for k in changed)
    again = build('swin', attention=[own, 'rp', own, own])
    again.load_state_dict(before)
    calibrate(again, images, seed=3)
    for key, value in again.state_dict().items():
        assert torch.equal(value, first[key]), key


@pytest.mark.parametrize('options, message', [
    (dict(dwc='lepe'), r"dwc must be one of .*'keep'.*got 'lepe'"),
    (dict(dwc=dict(other='zero')), r'dwc of attn must be.*got None'),
    (dict(entropy=1.), r'entropy must be between 0 and 1, got 1\.0'),
])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Single(), torch.randn(2, 48, 16), **options)


def test_nothing_to_calibrate_or_nothing_to_calibrate_on():
    with pytest.raises(ValueError, match='RPDeiT has no RPAttention layer'):
        calibrate(build('deit', attention='dense'), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r'stages\.2\.blocks\.0\.attn has 5 '
                       r'representatives.*only 2 tokens.*more or larger'):
        calibrate(build('pvt'), torch.randn(1, 3, 16, 32))
