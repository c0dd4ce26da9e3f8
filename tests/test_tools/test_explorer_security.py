"""What the server of the routing explorer takes from a browser."""

import http.client
import http.server
import os
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from helpers import TOOLS
from PIL import Image

from mmrpa.visualization.images import check_image
from mmrpa.visualization.models import RoutingModel

gradio = pytest.importorskip('gradio', reason='gradio is not installed')
httpx = pytest.importorskip('httpx', reason='gradio is not installed')

MAX_BYTES = 2**20


@pytest.fixture(scope='module')
def page(routing_models, tmp_path_factory):
    """The page, served; with ``address`` and the folder of ``uploads``."""
    from mmrpa.visualization.explorer import Explorer, build_page, launch
    uploads = tmp_path_factory.mktemp('uploads')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(uploads))
        config, checkpoint, _ = routing_models['mmseg']
        page = build_page(Explorer({'seg': RoutingModel(config, checkpoint)},
                                   MAX_BYTES, 10**6))
        _, address = launch(page, '127.0.0.1', None, MAX_BYTES, block=False)
        page.address, page.uploads = address.rstrip('/'), uploads
        yield page
        page.close(verbose=False)


@pytest.fixture
def client(page):
    with httpx.Client(base_url=page.address, trust_env=False,
                      timeout=30) as client:
        yield client


def call(client, page, function: str, data: list, session: str = ''):
    """Call a handler as a browser does; returns the last event's text."""
    index = next(i for i, fn in page.fns.items() if fn.name == function)
    session = session or uuid.uuid4().hex
    joined = client.post('/gradio_api/queue/join', json=dict(
        data=data, fn_index=index, session_hash=session, trigger_id=None,
        event_data=dict(index=[1, 1], value=None)))
    assert joined.status_code == 200, joined.text
    lines = client.get('/gradio_api/queue/data',
                       params=dict(session_hash=session)).text.splitlines()
    return next(line for line in lines if 'process_completed' in line)


def upload(client, path: Path) -> dict:
    with open(path, 'rb') as file:
        answer = client.post('/gradio_api/upload',
                             files=dict(files=(path.name, file)))
    return answer


def file_data(path) -> dict:
    return dict(path=str(path), orig_name='a.png', size=1,
                meta=dict(_type='gradio.FileData'))


CHOICES = ['seg', 3, 'mean of all', 'heat map']


def test_inputs_are_an_image_and_choices(page):
    """No path, config or checkpoint: nothing that takes text."""
    kinds = {type(component).__name__ for fn in page.fns.values()
             for component in fn.inputs}
    assert kinds == {'File', 'Dropdown', 'Radio', 'State'}
    for component in page.blocks.values():
        name = type(component).__name__
        assert name not in ('Textbox', 'Code', 'FileExplorer', 'UploadButton')
        if name == 'Dropdown':
            assert not component.allow_custom_value
        if name == 'File':
            assert component.file_types == ['image']
    info = page.get_api_info()
    assert info['named_endpoints'] == {} == info['unnamed_endpoints']


def test_an_upload_is_answered(client, page, photo):
    """The calls of this file do what those of a browser do."""
    path, = upload(client, photo).json()
    assert Path(path).is_relative_to(page.uploads)
    done = call(client, page, 'show', [file_data(path), *CHOICES])
    assert '"success":true' in done and 'representative' in done


def get(page, path: str) -> tuple[int, bytes]:
    """Ask for a path as it is: httpx would resolve the dots in it."""
    host = page.address.removeprefix('http://')
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request('GET', path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# gradio's routes to files; the second is the former name of the first.
FILES = ['/gradio_api/file=', '/gradio_api/file/']
STATIC = '/static/'
# Relative paths start in the working folder or in gradio's.
UP = '../' * max(len(path.parts) for path in (
    Path.cwd(), Path(gradio.__file__) / 'templates/frontend/static'))
CLIMBS = [UP, UP.replace('.', '%2e'), UP.replace('/', '%2f'),
          UP.replace('.', '%2e').replace('/', '%2f')]


@pytest.mark.parametrize('route', FILES)
def test_uploads_are_served(route, client, page, photo):
    """By all kinds of paths that are refused below."""
    upload_path, = upload(client, photo).json()
    folder = Path(upload_path).parent
    below_root = upload_path.lstrip('/')
    for path in (upload_path, os.path.relpath(upload_path),
                 f'{folder}/../{folder.name}/{photo.name}',
                 f'{folder}/%2e%2e/{folder.name}/{photo.name}',
                 *(climb + below_root for climb in CLIMBS)):
        assert get(page, route + path) == (200, photo.read_bytes()), path


def test_files_of_gradio_are_served(page):
    static = Path(gradio.__file__).parent / 'templates/frontend/static'
    assert get(page, f'{STATIC}img/logo.svg') == (
        200, (static / 'img/logo.svg').read_bytes())


@pytest.mark.parametrize('path', [
    '/etc/passwd', '//etc/passwd', '/proc/self/environ', 'setup.cfg',
    '{cwd}/setup.cfg', '{checkpoint}', '{config}', '{photo}',
    '{uploads}/../secret', '{uploads}/%2e%2e/secret',
    *(f'{climb}etc/passwd' for climb in CLIMBS),
    UP.replace('.', '%252e') + 'etc/passwd'])
@pytest.mark.parametrize('route', [*FILES, STATIC])
def test_files_are_not_served(route, path, page, routing_models, photo,
                              monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    config, checkpoint, _ = routing_models['mmseg']
    (page.uploads.parent / 'secret').write_text('confidential')
    path = path.format(config=config, checkpoint=checkpoint, photo=photo,
                       uploads=page.uploads, cwd=TOOLS.parent)
    status, text = get(page, route + path)
    assert status in (403, 404), (status, text)
    assert b'root:' not in text and b'confidential' not in text


@pytest.mark.parametrize('address', [
    'https://example.com/a.png', 'HTTP://127.0.0.1/a.png',
    'https%3a%2f%2fexample.com/a.png', 'https:/%2Fexample.com/a.png',
    '../https://example.com/a.png'])
@pytest.mark.parametrize('route', [
    *FILES, '/gradio_api/proxy=', '/gradio_api/Proxy=', '/file=', '/file/'])
def test_addresses_are_not_asked_for(route, address, page):
    assert get(page, route + address) == (403, b'Forbidden')


@pytest.mark.parametrize('kind', ['passwd', 'image', 'state'])
def test_forged_paths_are_refused(kind, client, page, photo):
    """A file that was not uploaded, even if it is an image."""
    path = '/etc/passwd' if kind == 'passwd' else photo
    if kind == 'state':  # of a session, which is the server's own
        done = call(client, page, 'click', [dict(path=str(path)), *CHOICES])
        assert 'Drop an image first' in done
    else:
        done = call(client, page, 'show', [file_data(path), *CHOICES])
    assert '"success":false' in done and 'representative' not in done


def test_addresses_of_this_machine_are_not_fetched(client, page, photo):
    """An address in the place of an upload, to reach what listens here."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photo.read_bytes())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/a.png'
    try:
        assert httpx.get(url, trust_env=False).status_code == 200
        for data in (file_data(url), dict(file_data(photo), url=url)):
            done = call(client, page, 'show', [data, *CHOICES])
            assert '"success":false' in done
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ['/a.png']  # by this test itself


@pytest.mark.parametrize('choices', [
    ['../other', 3, 'mean of all', 'heat map'],
    ['seg', 99, 'mean of all', 'heat map'],
    ['seg', 3, '__class__', 'heat map'],
    ['seg', 3, 'mean of all', 'no style']])
def test_choices_are_those_offered(choices, client, page, photo):
    path, = upload(client, photo).json()
    done = call(client, page, 'show', [file_data(path), *choices])
    assert '"success":false' in done and 'representative' not in done


def test_uploads_are_limited(client, page, tmp_path):
    rng = np.random.default_rng(0)
    large = tmp_path / 'large.png'
    Image.fromarray(rng.integers(0, 255, (700, 700, 3), np.uint8)).save(large)
    assert large.stat().st_size > MAX_BYTES
    assert upload(client, large).status_code == 413
    bomb = tmp_path / 'bomb.png'  # 100 million pixels: PIL would only warn
    Image.new('1', (10000, 10000)).save(bomb)
    assert bomb.stat().st_size < MAX_BYTES
    path, = upload(client, bomb).json()
    done = call(client, page, 'show', [file_data(path), *CHOICES])
    assert '"success":false' in done
    assert '10000x10000 pixels; at most 1 million' in done


def test_names_of_others_are_not_answered(client):
    """A page of another site that resolves its name to 127.0.0.1."""
    port = client.base_url.port
    for host in (f'evil.example:{port}', '', '127.0.0.1.evil.example'):
        answer = client.get('/config', headers=dict(host=host))
        assert answer.status_code == 403, host
    for host in (f'localhost:{port}', f'127.0.0.1:{port}', f'[::1]:{port}'):
        answer = client.get('/config', headers=dict(host=host))
        assert answer.status_code == 200, host


def test_other_origins_are_not_allowed(client):
    answer = client.get('/config', headers=dict(origin='https://evil.example'))
    assert 'access-control-allow-origin' not in answer.headers


@pytest.mark.parametrize('kind', ['EPS', 'PCX', 'ICO', 'PDF'])
def test_rare_decoders_are_not_asked(kind, tmp_path):
    """PIL would start Ghostscript for EPS, whatever the file is called."""
    path = tmp_path / 'a.png'
    Image.new('RGB', (8, 8)).save(path, format=kind)
    with pytest.raises(ValueError, match='a.png is not an image, or of none'):
        check_image(path)
