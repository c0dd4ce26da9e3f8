"""Figures of any shape of image: nothing overlaps, nothing is cut off."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmrpa.layers import RPAttention
from mmrpa.visualization import figures
from mmrpa.visualization.geometry import Geometry
from mmrpa.visualization.models import Place, View
from mmrpa.visualization.recording import LayerInput

PLACES = [Place(0, 0), Place(1, 1)]


def _view(width, height):
    """A view of noise through layers with random weights."""
    torch.manual_seed(0)
    layers = {place: RPAttention(8, 2, 6) for place in PLACES}
    inputs = {}
    for place in PLACES:
        stride = 4 * 2**place.stage
        hw = (-(-height // stride), -(-width // stride))
        inputs[place] = LayerInput(torch.randn(1, hw[0] * hw[1], 8), hw)
    model = SimpleNamespace(
        layer=layers.__getitem__, stride=lambda stage: 4 * 2**stage,
        backbone=SimpleNamespace(
            stages=[SimpleNamespace(blocks=range(n)) for n in (1, 2)]))
    image = np.random.default_rng(0).integers(
        0, 255, (height, width, 3), dtype=np.uint8)
    geometry = Geometry((1., 1.), (0., 0.), (width, height), (width, height))
    return View(model, image, geometry, inputs, {})


def _texts(figure):
    """The boxes of all texts of a drawn figure, in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found = []
    for axis in figure.axes:
        texts = [axis.title, axis.yaxis.label, *axis.texts]
        texts += axis.get_yticklabels()
        for bar in axis.child_axes:
            texts += bar.texts
        found += [(text.get_text(), text.get_window_extent(renderer))
                  for text in texts
                  if text.get_text() and axis.get_visible()]
    return found


@pytest.mark.parametrize('size', [(240, 30), (30, 200)])
@pytest.mark.parametrize('kind', ['segments', 'heads', 'heat', 'blocks'])
def test_texts_do_not_overlap(kind, size, tmp_path):
    view = _view(*size)
    points = [(1, 1), (size[0] - 1, size[1] - 1), (size[0] // 2, 5)]
    rows = [figures.respond(view, place, points) for place in PLACES]
    figure = dict(
        segments=lambda: figures.draw_segments(
            [view, view], [figures.Panel(place, 1) for place in PLACES]),
        heads=lambda: figures.draw_all_heads(view, PLACES),
        heat=lambda: figures.draw_heat(rows, points),
        blocks=lambda: figures.draw_blocks(rows, points))[kind]()
    texts = _texts(figure)
    assert len(texts) >= 3
    for i, (text, box) in enumerate(texts):
        for other, other_box in texts[:i]:
            assert not box.overlaps(other_box), (text, other)
    if kind != 'heat':
        return
    figures.save(figure, tmp_path / 'figure.png')
    assert [path.name for path in tmp_path.iterdir()] == ['figure.png']
    with Image.open(tmp_path / 'figure.png') as picture:
        pixels = np.asarray(picture.convert('RGB'))
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert edge.min() == 255


def test_text_has_the_size_of_a_papers(tmp_path):
    figure = figures.draw_segments([_view(60, 60)],
                                   [figures.Panel(PLACES[0], 0)])
    assert figure.axes[0].title.get_fontsize() == 8
    assert figure.axes[1].title.get_text().startswith('stage 1, head 1\n')
    import matplotlib
    assert matplotlib.rcParams['axes.titlesize'] == 'large'  # as it was


def test_heads_are_averaged_or_chosen():
    view = _view(60, 60)
    points = [(3, 3), (40, 50)]
    maps = view.response(PLACES[1], points)
    mean = figures.respond(view, PLACES[1], points)
    torch.testing.assert_close(mean.maps, (maps[0] + maps[1]) / 2)
    one = figures.respond(view, PLACES[1], points, 1)
    torch.testing.assert_close(one.maps, maps[1])
    assert one.title() == 'stage 2 (block 2)\nRPAttention, head 2'
    assert mean.title() == 'stage 2 (block 2)\nRPAttention'


def test_the_head_in_use_is_chosen():
    view = _view(60, 60)
    layer = view.model.layer(PLACES[0])
    with torch.no_grad():
        layer.anchors[0] = 0  # even: all are in use
        layer.anchors[1] *= 100
    assert figures.choose_head([view], PLACES[0]) == 0
    with torch.no_grad():
        layer.anchors.copy_(layer.anchors.flip(0))
    assert figures.choose_head([view], PLACES[0]) == 1


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    figure = figures.draw_segments([_view(60, 60)],
                                   [figures.Panel(PLACES[0], 0)])
    path = tmp_path / 'figure.png'
    path.write_bytes(b'old')

    def fail(file, **kwargs):
        file.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        figures.save(figure, path)
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_image_is_enlarged_and_a_large_one_reduced():
    assert figures.picture_of(_view(60, 30), 120).shape == (60, 120, 3)
    assert figures.picture_of(_view(600, 300), 120).shape == (60, 120, 3)
    buffer = io.BytesIO()
    Image.fromarray(_view(60, 30).image).save(buffer, 'png')
    same = figures.picture_of(_view(60, 30), 60)
    assert (np.asarray(Image.open(buffer)) / 255 == same).all()
