"""Alignment: an independent look at where pixels go."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from mmrpa.preflight import ConfigError
from mmrpa.visualization.geometry import Geometry, trace

LINEAR, CUBIC = cv2.INTER_LINEAR, cv2.INTER_CUBIC


def resize(width, height, how=LINEAR):
    return lambda image: cv2.resize(image, (width, height), interpolation=how)


def pad(image, value=0):
    return cv2.copyMakeBorder(image, 0, 9, 0, 30, cv2.BORDER_CONSTANT,
                              value=(value, ) * 3)


@pytest.mark.parametrize('how', [LINEAR, CUBIC, cv2.INTER_AREA])
@pytest.mark.parametrize('size, out', [
    ((640, 427), (1333, 800)),
    ((97, 61), (224, 224)),
    ((1200, 900), (128, 96)),
    ((5000, 120), (1333, 32)),
    ((4, 300), (4, 300)),
])
def test_a_resized_image_is_placed_exactly(size, out, how):
    found = trace(lambda x: pad(resize(*out, how)(x)), size)
    assert found.content == out
    assert found.scale == pytest.approx(
        (size[0] / out[0], size[1] / out[1]), rel=1e-9)
    assert found.offset == (0, 0)
    assert found.seen_box() == pytest.approx((0, 0, *size))
    flipped = trace(lambda x: pad(resize(*out, how)(x)[:, ::-1]), size)
    assert flipped.scale == pytest.approx(
        (-size[0] / out[0], size[1] / out[1]), rel=1e-9)
    assert flipped.offset == (size[0], 0)


def test_a_crop_is_placed_to_better_than_a_pixel():
    def crop(image):
        return resize(341, 256)(image)[16:240, 58:282]

    found = trace(crop, (640, 480))
    unit = 640 / 341
    assert found.content == (224, 224)
    assert found.scale == pytest.approx((unit, 480 / 256), abs=1e-3)
    assert found.offset == pytest.approx((58 * unit, 16 * 480 / 256), abs=0.3)


@pytest.mark.parametrize('transform', [
    lambda x: np.rot90(x),
    lambda x: cv2.copyMakeBorder(x, 0, 0, 7, 0, cv2.BORDER_CONSTANT),
    lambda x: cv2.warpAffine(
        x, cv2.getRotationMatrix2D((30, 30), 20, 1), (64, 64)),
    lambda x: np.concatenate((x, x), axis=1),
    lambda x: x // 2,
])
def test_what_cannot_be_aligned_is_an_error(transform):
    with pytest.raises(ConfigError, match='cannot be aligned'):
        trace(transform, (90, 60))


def test_tokens_of_pixels():
    # Twice as large, cropped by 10 network pixels on the left, padded.
    found = Geometry((0.5, 0.5), (5., 0.), (180, 120), (95, 60))
    assert found.token_at((5, 0), 16, 12) == 0
    assert found.token_at((13, 0), 16, 12) == 1  # 2 * (13.5 - 5) = 17
    assert found.token_at((12, 59), 16, 12) == 7 * 12
    with pytest.raises(ValueError, match=r'2,0 is in a part.*5, 0, 95, 60'):
        found.token_at((2, 0), 16, 12)
    for point in ((95, 0), (0, 60), (-1, 3)):
        with pytest.raises(ValueError, match='outside.*95x60'):
            found.token_at(point, 16, 12)


def test_linear_sampling_is_that_of_interpolate():
    found = Geometry((1., 1.), (0., 0.), (64, 48), (64, 48))
    maps = torch.rand(2, 6, 8)
    sampled = found.sample(maps, 8, (96, 128))
    expected = nn.functional.interpolate(
        maps[None], size=(96, 128), mode='bilinear', align_corners=False)[0]
    torch.testing.assert_close(sampled, expected)
    blocks = found.sample(maps, 8, (48, 64), 'nearest')
    assert torch.equal(blocks, maps.repeat_interleave(8, 1)
                       .repeat_interleave(8, 2))


def test_padding_is_cropped_away():
    # 40 of 48 columns are image: 2.5 of 3 tokens.
    found = Geometry((2., 2.), (0., 0.), (40, 32), (80, 64))
    maps = torch.tensor([[[1., 2, 3], [1, 2, 3]]])
    row = found.sample(maps, 16, (64, 80), 'nearest')[0, 0]
    assert row.tolist() == [1] * 32 + [2] * 32 + [3] * 16
    assert found.seen((64, 80)).all()


def test_smooth_sampling_is_a_cubic_b_spline():
    found = Geometry((1., 1.), (0., 0.), (35, 35), (35, 35))
    delta = torch.zeros(1, 7, 7)
    delta[0, 3, 3] = 1
    smooth = found.sample(delta, 5, (35, 35), 'smooth')[0]
    centers = smooth[2::5, 2::5]  # of the tokens
    expected = torch.outer(*[torch.tensor([0, 0, 1, 4, 1, 0, 0]) / 6] * 2)
    torch.testing.assert_close(centers, expected)
    assert smooth.min() >= 0
    torch.testing.assert_close(smooth.sum(), torch.tensor(25.))
    flat = found.sample(torch.ones(1, 7, 7), 5, (50, 41), 'smooth')
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_a_crop_fades_what_is_not_seen():
    found = Geometry((1., 1.), (10., 0.), (20, 20), (40, 20))
    seen = found.seen((20, 40))
    assert seen[:, 10:30].all()
    assert not seen[:, :9].any() and not seen[:, 31:].any()
