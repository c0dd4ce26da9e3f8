"""Scenes of the sample data: exact annotations, non-trivial content."""
import cv2
import numpy as np
import pytest
from helpers import load_tool
from pycocotools import mask as mask_utils

# Puts tools/ on the path, where sample_data is.
load_tool('make_sample_data')
from sample_data import scene as scenes  # noqa: E402
from sample_data.paint import Sprite  # noqa: E402

NAMES = ['cross', 'disc', 'square', 'star', 'triangle']
SIZE = 128


@pytest.fixture(scope='module')
def drawn() -> list:
    """90 scenes as the tool draws them, with what no file records."""
    result = []
    for seed in range(90):
        rng = np.random.default_rng(seed)
        classes = rng.integers(5, size=rng.integers(1, 5)).tolist()
        result.append((classes, scenes.make_scene(rng, SIZE, classes)))
    return result


@pytest.fixture(scope='module')
def annotations(drawn) -> list:
    return [a for _, scene in drawn for a in scene.annotations]


def _rasterised(polygons: list, size: int = SIZE) -> np.ndarray:
    flat = [np.ravel(p).tolist() for p in polygons]
    encoded = mask_utils.merge(mask_utils.frPyObjects(flat, size, size))
    return mask_utils.decode(encoded).astype(bool)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_polygons_give_the_masks(annotations):
    ious = [_iou(_rasterised(a.polygons), a.mask) for a in annotations]
    assert np.mean(ious) >= 0.97
    assert np.min(ious) >= 0.85


def test_boxes_are_tight(annotations):
    for annotation in annotations:
        x, y, w, h = annotation.bbox
        inside = annotation.mask[y:y + h, x:x + w]
        assert inside.sum() == annotation.mask.sum() == annotation.area
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()


def test_masks_are_disjoint_and_without_holes(drawn):
    for _, scene in drawn:
        taken = scene.unlabelled.astype(int)
        for annotation in scene.annotations:
            taken += annotation.mask
            # From outside every pixel that is not of the mask is reached.
            ground = np.pad(annotation.mask, 1).astype(np.uint8)
            cv2.floodFill(ground, None, (0, 0), 1, flags=8)
            assert ground.all()
        assert taken.max() == 1


def test_parts_too_small_to_name_are_unlabelled():
    layout = scenes._Layout(64)
    fine = scenes.SUPERSAMPLE
    # Object: whole area and the (x, y, w, h) of its visible parts.
    objects = {
        1: (400, [(0, 0, 9, 11)]),  # 99 of 400 pixels, under a quarter
        2: (400, [(20, 0, 10, 20), (40, 0, 1, 5)]),  # and a crumb of 5
        3: (39, [(0, 30, 3, 13)]),  # whole, but of 39 pixels
        4: (40, [(20, 30, 4, 10)]),
        5: (400, [(40, 30, 10, 10), (52, 30, 2, 3)]),  # a part of 6 is one
    }
    for k, (area, parts) in objects.items():
        sprite = Sprite('disc', np.zeros((64, 64), np.float32), np.zeros(2),
                        0., 20.)
        layout.placed.append(scenes._Placed(sprite, area))
        for x, y, w, h in np.array(parts) * fine:
            layout.ids[y:y + h, x:x + w] = k
    annotations, unlabelled = layout.annotate()
    assert [a.bbox for a in annotations] == [(20, 0, 10, 20), (20, 30, 4, 10),
                                             (40, 30, 14, 10)]
    assert [a.area for a in annotations] == [200, 40, 106]
    assert [len(a.polygons) for a in annotations] == [1, 1, 2]
    assert [a.visible_fraction for a in annotations] == [0.5, 1, 0.265]
    expected = np.zeros((64, 64), bool)
    expected[0:11, 0:9] = expected[0:5, 40] = expected[30:43, 0:3] = True
    np.testing.assert_array_equal(unlabelled, expected)


def test_front_objects_hide_those_behind():
    # A second square of nearly the same place: what is left of the first.
    for seed in range(40):
        scene = scenes.make_scene(np.random.default_rng(seed), SIZE, [2, 1],
                                  (0.4, 0.4))
        if len(scene.annotations) == 2:
            back, front = scene.annotations
            if back.visible_fraction < 0.7:
                break
    assert back.visible_fraction < 0.7 and front.visible_fraction > 0.7
    hue = cv2.cvtColor(scene.image, cv2.COLOR_BGR2HSV)[..., 0] * 2.
    assert np.median(hue[back.mask]) == pytest.approx(215, abs=20)
    assert abs((np.median(hue[front.mask]) - 5 + 180) % 360 - 180) < 20


def test_scales_span_the_range(annotations):
    scales = np.array([a.extent for a in annotations]) / SIZE
    assert 0.12 <= scales.min() < 0.13
    assert 0.5 < scales.max() <= 0.55
    # Seen from outside: boxes of whole objects have these sides.
    for annotation in annotations:
        longer = max(annotation.bbox[2:])
        assert longer <= annotation.extent + 2
        if annotation.visible_fraction > 0.99:
            assert longer >= 0.93 * annotation.extent - 2


def test_occlusion_is_common_and_few_objects_vanish(drawn, annotations):
    asked = sum(len(classes) for classes, _ in drawn)
    assert 0.95 * asked < len(annotations) <= asked
    visible = np.array([a.visible_fraction for a in annotations])
    assert visible.min() >= 0.25 and visible.max() < 1.1
    assert 0.15 < (visible < 0.9).mean() < 0.5
    assert (visible < 0.6).mean() > 0.03
    assert (visible > 0.99).mean() > 0.4
    assert all(scene.annotations for _, scene in drawn)


def test_hue_follows_the_class_and_backgrounds_are_pale(drawn):
    expected = dict(cross=285, disc=5, square=215, star=45, triangle=145)
    background_hues, checked = [], set()
    for _, scene in drawn:
        hsv = cv2.cvtColor(scene.image.astype(np.float32) / 255,
                           cv2.COLOR_BGR2HSV)
        ground = ~scene.unlabelled
        for annotation in scene.annotations:
            name = NAMES[annotation.class_index]
            checked.add(name)
            core = cv2.erode(annotation.mask.astype(np.uint8),
                             np.ones((3, 3), np.uint8)) > 0
            away = (hsv[core][:, 0] - expected[name] + 180) % 360 - 180
            assert abs(np.median(away)) < 25
            assert hsv[core][:, 1].mean() > 0.3
            ground = ground & ~annotation.mask
        assert hsv[ground][:, 1].mean() < 0.4
        background_hues.append(np.median(hsv[ground][:, 0]))
    assert checked == set(NAMES)
    # Hue anything: some backgrounds in every sixth of the circle.
    assert (np.histogram(background_hues, 6, (0, 360))[0] > 3).all()


def test_objects_and_backgrounds_have_texture(drawn):
    on_objects, on_ground = [], []
    for _, scene in drawn:
        grey = cv2.cvtColor(scene.image, cv2.COLOR_BGR2GRAY)
        ground = ~scene.unlabelled
        for annotation in scene.annotations:
            on_objects.append(grey[annotation.mask].std())
            ground = ground & ~annotation.mask
        on_ground.append(grey[ground].std())
    assert np.quantile(on_objects, 0.05) > 8
    assert np.quantile(on_ground, 0.05) > 5
    assert np.median(on_ground) < np.median(on_objects)
