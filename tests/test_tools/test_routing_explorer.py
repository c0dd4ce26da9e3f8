"""The routing explorer: what it computes, refuses, and shows in a browser."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from helpers import TOOLS, load_tool
from PIL import Image

from mmrpa.visualization.models import Place, RoutingModel
from mmrpa.visualization.predictions import Predictor

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
         '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync',
         # A page that needs another host cannot work here.
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1')
SECONDS = 60


@pytest.fixture(scope='module')
def explorer(routing_models):
    from mmrpa.visualization.explorer import Explorer
    models = {host: RoutingModel(config, checkpoint)
              for host, (config, checkpoint, _) in routing_models.items()}
    return Explorer(models, 2**20, 10**6, score_thr=0.)


def test_choices_are_those_of_the_models(explorer):
    assert explorer.stages('mmdet') == [1, 2, 3, 4]
    assert explorer.heads('mmdet', 1) == ['mean of all', 1]
    assert explorer.heads('mmdet', 4) == ['mean of all', 1, 2]


@pytest.mark.parametrize('host, point', [
    ('mmdet', (0.62, 0.42)),
    ('mmseg', (0.1, 0.9)),
])
def test_an_answer_is_that_of_the_layer(host, point, explorer, photo):
    answer = explorer.answer(host, photo, 3, 2, 'tokens', point)
    view = explorer.look(host, photo).view
    place = Place(2, 0)
    pixel = (int(point[0] * 150), int(point[1] * 97))
    token = view.token(place, pixel)
    p = view.routing(place)[1].flatten(1)
    best = int(p[:, token].argmax())
    response = view.response(place, [pixel])[1, 0]
    assert f'representative **{best + 1}** of 4' in answer.text
    assert f'**{pixel[0]}, {pixel[1]}**' in answer.text
    assert f'holds {p[best, token]:.0%} of the token' in answer.text
    own = response.flatten()[token] * response.numel()
    assert f'{own:.2f} times the even share' in answer.text
    for picture in answer[:4]:
        assert picture.shape == (466, 720, 3)
        assert picture.dtype == np.uint8
        # The point is marked where it was asked for.
        center = picture[int(point[1] * 466), int(point[0] * 720)]
        assert center.tolist() == [230, 0, 0]
    # The segment is coloured as far as the representative holds the tokens.
    share = view.to_picture(p[best].view(1, *view.inputs[place].hw_shape),
                            place, (466, 720))[0].flatten().numpy()
    chroma = np.ptp(answer.segment.astype(int), axis=2).flatten()
    assert best > 0  # the first colour is a grey
    assert np.corrcoef(share, chroma)[0, 1] > 0.6


def test_the_middle_is_asked_for_first_and_looks_are_kept(explorer, photo):
    first = explorer.look('mmpretrain', photo)
    assert explorer.look('mmpretrain', photo) is first
    answer = explorer.answer('mmpretrain', photo, 1, 'mean of all',
                             'heat map')
    assert re.search(r'Pixel \*\*(74|75), (48|49)\*\*', answer.text)
    with pytest.raises(ValueError, match='crops away'):
        explorer.answer('mmpretrain', photo, 1, 1, 'heat map', (0.01, 0.5))
    with pytest.raises(ValueError, match='heads 1 to 1, got 2'):
        explorer.answer('mmdet', photo, 1, 2, 'heat map')


def test_predictions_are_those_of_the_model(explorer, photo):
    look = explorer.look('mmpretrain', photo)
    assert look.prediction.picture is None
    model = look.view.model
    with torch.no_grad():
        result = model.model.test_step(look.view.data)[0]
    assert look.prediction.scores == {
        name: pytest.approx(float(score), abs=1e-6) for name, score in
        zip(('dot', 'bar'), result.pred_score, strict=True)}
    look = explorer.look('mmseg', photo)
    assert look.prediction.scores is None
    assert look.prediction.picture.shape == (97, 150, 3)
    with torch.no_grad():
        labels = look.view.model.model.test_step(
            look.view.data)[0].pred_sem_seg.data[0]
    red = labels.numpy() == 1  # its palette: black and red
    assert 0 < red.sum() < red.size or red.all() or not red.any()
    channels = look.prediction.picture.astype(int)
    excess = channels[..., 0] - channels[..., 2]
    if red.any():
        assert np.median(excess[red]) > 60
    if not red.all():
        assert np.median(excess[~red]) < 60
    look = explorer.look('mmdet', photo)
    assert look.prediction.picture.shape == (97, 150, 3)
    assert (look.prediction.picture != look.view.image).any()  # boxes


def test_no_box_below_the_threshold(routing_models, photo):
    model = RoutingModel(*routing_models['mmdet'][:2])
    view = model.look(photo)
    picture = Predictor(model, score_thr=1.)(view).picture
    assert (picture == view.image).all()


def test_images_are_checked_before_they_are_decoded(explorer, tmp_path,
                                                    photo):
    text = tmp_path / 'page.png'
    text.write_text('<html>')
    huge = tmp_path / 'huge.png'
    Image.new('1', (14000, 14000)).save(huge)  # 196 Mpx in 30 kB
    assert huge.stat().st_size < 2**20
    large = tmp_path / 'large.png'
    Image.new('1', (5000, 2000)).save(large)
    heavy = tmp_path / 'heavy.bmp'
    Image.new('RGB', (700, 600)).save(heavy)
    cut = tmp_path / 'cut.png'
    cut.write_bytes(photo.read_bytes()[:5000])
    for path, message in (
        (text, 'page.png is not an image'),
        (huge, 'huge.png is too large: .*196000000 pixels'),
        (large, 'large.png has 5000x2000 pixels; at most 1 million'),
        (heavy, r'heavy.bmp has 1.2 MiB; at most 1.0 MiB'),
        (cut, 'cut.png is a damaged image'),
    ):
        with pytest.raises(ValueError, match=message):
            explorer.look('mmdet', path)
    with pytest.raises(FileNotFoundError):
        explorer.look('mmdet', tmp_path / 'none.png')


def test_bad_models(routing_models, tmp_path, capsys):
    tool = load_tool('routing_explorer')
    config, checkpoint, twin = map(str, routing_models['mmdet'])
    for args, message in (
        ([config, twin], 'does not fit'),
        ([str(tmp_path / 'no.py'), checkpoint], 'does not exist'),
        ([config, checkpoint, '--model', 'mmdet', config, checkpoint],
         "two models are called 'mmdet'"),
    ):
        assert tool.main(args) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith('routing_explorer: error:') and message in line
    with pytest.raises(SystemExit) as error:
        tool.main([config, checkpoint, '--max-megapixels', '-1'])
    assert error.value.code == 2


# In a browser.


@pytest.fixture(scope='module')
def server(routing_models):
    """The tool, serving two models; its address."""
    pytest.importorskip('gradio', reason='gradio is not installed')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    det, seg = routing_models['mmdet'], routing_models['mmseg']
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / 'routing_explorer.py'), *map(
            str, det[:2]), '--model', 'segmentor', *map(str, seg[:2]),
         '--port', str(port), '--max-megapixels', '1', '--device', 'cpu'],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep
             .join([str(TOOLS.parent), os.environ.get('PYTHONPATH', '')])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    reader = threading.Thread(
        target=lambda: lines.extend(iter(process.stdout.readline, '')))
    reader.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not any('Routing explorer:' in line for line in lines):
            assert process.poll() is None, ''.join(lines)
            assert time.monotonic() < deadline, ''.join(lines)
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        process.terminate()
        process.wait()
        reader.join()


@pytest.fixture
def page(tmp_path):
    """A page of a new headless Chromium that knows no other host."""
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='playwright is not installed')
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f'none of {", ".join(BROWSERS)} is on PATH')
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / 'profile'), executable_path=browser, args=FLAGS)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        page.hosts = set()
        page.on('request',
                lambda request: page.hosts.add(urlparse(request.url).hostname))
        yield page
        context.close()


def _pixels(page, name):
    """The picture that an <img> of the page shows, as an array."""
    source = page.get_attribute(f'#{name} img', 'src')
    return np.asarray(Image.open(io.BytesIO(
        page.request.get(source).body())).convert('RGB')).astype(int)


def _wait(page, pattern):
    """Wait for the text of a point; the pictures come along with it."""
    page.wait_for_function(
        'pattern => new RegExp(pattern).test('
        "document.querySelector('#text').innerText)", arg=pattern)


def _source(page, name):
    return page.get_attribute(f'#{name} img', 'src')


def _wait_for_others(page, sources):
    """Wait until all of these pictures have been replaced."""
    for name, source in sources.items():
        page.wait_for_function(
            '([name, source]) => document.querySelector(`#${name} img`)?.src '
            '!= source', arg=[name, source])


def _choose(page, name, value):
    page.click(f'#{name} input')
    page.get_by_role('option', name=value, exact=True).click()


def test_in_a_browser(server, page, photo, tmp_path):
    page.goto(server)
    page.wait_for_function("() => document.title == 'Routing explorer'")
    upload = '#file input[type=file]'
    page.wait_for_selector(upload, state='attached')
    page.set_input_files(upload, str(photo))
    for name in ('image', 'response', 'segment', 'segments', 'prediction'):
        page.wait_for_selector(f'#{name} img')
    _wait(page, 'Pixel 75, 48, stage 3')

    # A head that the next stage does not have.
    _choose(page, 'head', '2')
    _wait(page, 'Response: head 2')

    # A click is answered for the pixel under it, and the pictures change.
    sources = {'segments': _source(page, 'segments')}
    _choose(page, 'stage', '1')
    _wait(page, 'Pixel 75, 48, stage 1')
    _wait_for_others(page, sources)
    assert page.get_by_text('Error', exact=True).count() == 0
    shown = ('image', 'response', 'segment', 'segments')
    sources = {name: _source(page, name) for name in shown}
    before = {name: _pixels(page, name) for name in shown}
    box = page.locator('#image img').bounding_box()
    page.mouse.click(box['x'] + 0.605 * box['width'],
                     box['y'] + 0.42 * box['height'])
    _wait(page, r'Pixel (90|91), (40|41), stage 1')
    _wait_for_others(page, sources)
    after = {name: _pixels(page, name) for name in shown}
    star = after['image'][int(0.42 * 466), int(0.605 * 720)]
    assert star.tolist() == [230, 0, 0]
    # Not by the star alone, which covers less than 1000 pixels.
    changed = (np.abs(after['response'] - before['response']).max(2) > 8).sum()
    assert changed > 5000
    assert (after['segments'] != before['segments']).any(2).sum() < 2000

    # Another model: its own stages, its own prediction.
    boxes = _pixels(page, 'prediction')
    sources = {'prediction': _source(page, 'prediction')}
    _choose(page, 'model', 'segmentor')
    _wait(page, 'stage 3')
    _wait_for_others(page, sources)
    painted = _pixels(page, 'prediction')
    assert painted.shape == boxes.shape and (painted != boxes).any()

    # What is no image, or too large, is refused in words.
    fake = tmp_path / 'fake.png'
    fake.write_text('no image')
    bomb = tmp_path / 'bomb.png'
    Image.new('1', (5000, 5000)).save(bomb)
    for path, words in ((fake, 'fake.png is not an image'),
                        (bomb, '5000x5000 pixels; at most 1 million')):
        page.click('#file button[aria-label="Clear"]')
        page.wait_for_selector(upload, state='attached')
        page.set_input_files(upload, str(path))
        page.get_by_text(words).first.wait_for()
    assert page.hosts <= {'127.0.0.1', None}, page.hosts


def test_listens_to_this_machine_only(server):
    """The port is open on loopback and on no other address."""
    port = urlparse(server).port
    with socket.create_connection(('127.0.0.1', port), timeout=5):
        pass
    with pytest.raises(OSError):
        socket.create_connection(('127.0.0.2', port), timeout=5)
