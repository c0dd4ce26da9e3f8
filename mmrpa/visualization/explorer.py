"""A local web page on which the routing answers to clicks.

:class:`Explorer` computes, :func:`build_page` lays out. Nothing is taken from
the browser but an image and choices out of what the server offers.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import (
    Any,
    Dict,
    FrozenSet,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..preflight import ConfigError
from .colors import representative_colors
from .figures import (
    Panel,
    choose_head,
    picture_of,
    response_picture,
    segments_picture,
)
from .images import check_image
from .models import Place, RoutingModel, View
from .painting import overlay_single
from .predictions import TOP_SCORES, Prediction, Predictor

# Before gradio is imported: it asks for its settings only once.
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')

TITLE = 'Routing explorer'
# Views that are kept: each holds the inputs of all attention layers.
MAX_VIEWS = 8
PAGE_SIDE = 720
LOOPBACK = frozenset(('127.0.0.1', 'localhost', '::1'))
HEADS_MEAN = 'mean of all'
STYLES = {'heat map': 'heat', 'tokens': 'blocks'}
_STAR = np.array([230, 0, 0], np.uint8)


class Look(NamedTuple):
    """A view and what the model predicts for it."""

    view: View
    prediction: Prediction
    note: str


class Answer(NamedTuple):
    """What the page shows for a point.

    Attributes:
        image (ndarray): The image with the point in it.
        response (ndarray): What the token at the point reads.
        segment (ndarray): The representative that holds most of the token.
        segments (ndarray): All representatives of the head.
        text (str): The numbers of the point, in Markdown.
    """

    image: np.ndarray
    response: np.ndarray
    segment: np.ndarray
    segments: np.ndarray
    text: str


class Explorer:
    """The models, and what they have been shown last.

    Args:
        models (Mapping[str, RoutingModel]): By the name that the page shows.
        max_bytes (int): Greatest size of an image file.
        max_pixels (int): Greatest width times height of an image.
        score_thr (float): Least score of the detections that are drawn.

    Raises:
        ValueError: There is no model, or one has no RPAttention.
    """

    def __init__(self, models: Mapping[str, RoutingModel], max_bytes: int,
                 max_pixels: int, score_thr: float = 0.3) -> None:
        if not models:
            raise ValueError('models must hold one model at least')
        for name, model in models.items():
            if not model.rp_stages:
                raise ValueError(f'model {name!r} has no stage with '
                                 "RPAttention; set attention='rp' for one")
        self.models = dict(models)
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self._predictors = {name: Predictor(model, score_thr)
                            for name, model in models.items()}
        self._looks: 'OrderedDict[Tuple[str, str], Look]' = OrderedDict()
        # Models are not made for several threads, and a page has several.
        self._lock = threading.Lock()

    def stages(self, name: str) -> List[int]:
        """Numbers of a model's stages with RPAttention, from 1."""
        return [stage + 1 for stage in self.models[name].rp_stages]

    def heads(self, name: str, stage: int) -> List[Union[int, str]]:
        """Choices of heads for a stage, from 1, the mean of all first."""
        model = self.models[name]
        heads = model.layer(model.place(stage - 1)).num_heads
        return [HEADS_MEAN, *range(1, heads + 1)]

    def look(self, name: str, path: str) -> Look:
        """Show a model an image file, or remember that it was.

        Raises:
            ValueError: It is no image, or too large.
        """
        check_image(path, self.max_bytes, self.max_pixels)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        with self._lock:
            key = (name, digest)
            if key not in self._looks:
                view, note = self.models[name].look(path), ''
                try:
                    prediction = self._predictors[name](view)
                except ConfigError as error:
                    prediction, note = Prediction(), str(error)
                self._looks[key] = Look(view, prediction, note)
                while len(self._looks) > MAX_VIEWS:
                    self._looks.popitem(last=False)
            self._looks.move_to_end(key)
            return self._looks[key]

    def answer(self, name: str, path: str, stage: int,
               head: Union[int, str], style: str,
               point: Optional[Tuple[float, float]] = None) -> Answer:
        """Draw everything for a point.

        Args:
            name (str): Of the model.
            path (str): The image file.
            stage (int): From 1.
            head (int | str): From 1, or :data:`HEADS_MEAN`.
            style (str): One of :data:`STYLES`.
            point (tuple, optional): x and y, as parts of the image's width
                and height, from 0 to 1. The middle if left out.

        Raises:
            ValueError: The point is in a part that the network is not shown,
                or an argument is out of range.
        """
        view = self.look(name, path).view
        model = view.model
        place = model.place(stage - 1)
        heads = model.layer(place).num_heads
        if head != HEADS_MEAN and not 1 <= int(head) <= heads:
            raise ValueError(f'stage {stage} has heads 1 to {heads}, got '
                             f'{head}')
        height, width = view.image.shape[:2]
        fraction = point or _middle(view)
        pixel = (min(int(fraction[0] * width), width - 1),
                 min(int(fraction[1] * height), height - 1))
        with self._lock:
            maps = view.response(place, [pixel])[:, 0]
            shown = (choose_head([view], place) if head == HEADS_MEAN
                     else int(head) - 1)
            p = view.routing(place)[shown]
            segments = segments_picture(view, Panel(place, shown), PAGE_SIDE)
        response = maps.mean(0) if head == HEADS_MEAN else maps[shown]
        token = view.token(place, pixel)
        shares = p.flatten(1)[:, token]
        best = int(shares.argmax())
        pictures = (
            picture_of(view, PAGE_SIDE),
            response_picture(view, response, place, STYLES[style], PAGE_SIDE),
            _single(view, place, p[best], best, len(p)), segments)
        text = _describe(pixel, stage, head, shown, len(p), best,
                         float(shares[best]), float(p[best].mean()),
                         float(response.flatten()[token]), response.numel())
        return Answer(*(_star(picture, fraction) for picture in pictures),
                      text)


def _middle(view: View) -> Tuple[float, float]:
    """The middle of what the network is shown, as parts of the image."""
    left, top, right, bottom = view.geometry.seen_box()
    height, width = view.image.shape[:2]
    return (left + right) / 2 / width, (top + bottom) / 2 / height


def _single(view: View, place: Place, share: Any, best: int, num: int
            ) -> np.ndarray:
    picture = picture_of(view, PAGE_SIDE)
    size = picture.shape[:2]
    big = view.to_picture(share[None], place, size)[0]
    return overlay_single(picture, big, representative_colors(num)[best],
                          view.geometry.seen(size))


def _describe(pixel: Tuple[int, int], stage: int, head: Union[int, str],
              shown: int, num: int, best: int, share: float, mass: float,
              own: float, tokens: int) -> str:
    read = 'mean of all heads' if head == HEADS_MEAN else f'head {head}'
    return (
        f'Pixel **{pixel[0]}, {pixel[1]}**, stage {stage}. Response: {read}; '
        f'its own token gets {own * tokens:.2f} times the even share. '
        f'Segments: head {shown + 1}; representative **{best + 1}** of {num} '
        f'holds {share:.0%} of the token and {mass:.0%} of the image.')


def _star(picture: np.ndarray, fraction: Tuple[float, float]) -> np.ndarray:
    """A picture as uint8 with a cross in a ring at a point."""
    out = (picture * 255).round().astype(np.uint8)
    height, width = out.shape[:2]
    y, x = np.ogrid[:height, :width]
    dx = x + 0.5 - fraction[0] * width
    dy = y + 0.5 - fraction[1] * height
    radius = np.hypot(dx, dy)
    out[(radius < 11) & (radius > 6)] = 255
    out[(radius < 10) & (radius > 7)] = _STAR
    out[radius < 2.5] = _STAR
    return out


def build_page(explorer: Explorer) -> Any:
    """Lay out the page.

    Args:
        explorer (Explorer): What computes.

    Returns:
        gradio.Blocks: For :func:`launch`.
    """
    import gradio as gr
    names = list(explorer.models)
    first = names[0]
    stages, stage_shown = explorer.stages(first), _usual(explorer, first)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True,
                   delete_cache=(3600, 3600)) as page:
        gr.Markdown(f'# {TITLE}\nDrop an image, then click into any of the '
                    'pictures.')
        state = gr.State({})
        with gr.Row():
            file = gr.File(label='Image', file_types=['image'], height=120,
                           elem_id='file')
            model = gr.Dropdown(names, value=first, label='Model',
                                elem_id='model')
            stage = gr.Dropdown(stages, value=stage_shown, label='Stage',
                                elem_id='stage')
            head = gr.Dropdown(explorer.heads(first, stage_shown),
                               value=HEADS_MEAN, label='Head', elem_id='head')
            style = gr.Radio(list(STYLES), value=next(iter(STYLES)),
                             label='Response as', elem_id='style')

        def picture(label: str, name: str, visible: bool = True):
            return gr.Image(label=label, interactive=False, format='png',
                            buttons=['download'], elem_id=name,
                            visible=visible)

        with gr.Row():
            pictures = [picture('The image', 'image'),
                        picture('Its response', 'response'),
                        picture("Its representative's segment", 'segment')]
        with gr.Row():
            pictures.append(picture('All segments', 'segments'))
            drawn = picture('Prediction', 'prediction')
            scores = gr.Label(label='Prediction', visible=False,
                              num_top_classes=TOP_SCORES, elem_id='scores')
            with gr.Column():
                text = gr.Markdown(elem_id='text')

        # The handlers are closures: gradio tells them by their arguments.

        def show(path, name, stage, head, style):
            if path is None:
                return [{}, '', *[None] * 4, gr.Image(None, visible=True),
                        gr.Label(visible=False)]
            look = _or_error(gr, explorer.look, name, path)
            if look.note:
                gr.Warning(look.note)
            prediction = look.prediction
            return [
                dict(path=path),
                *_draw(gr, explorer, name, path, stage, head, style, None),
                gr.Image(_enlarged(prediction.picture),
                         visible=prediction.scores is None),
                gr.Label(prediction.scores,
                         visible=prediction.scores is not None)
            ]

        def redraw(state, name, stage, head, style):
            if not state:
                return [''] + [None] * 4
            return _draw(gr, explorer, name, state['path'], stage, head,
                         style, state.get('point'))

        def click(state, name, stage, head, style, event: gr.SelectData):
            if not state:
                raise gr.Error('Drop an image first.', print_exception=False)
            view = _or_error(gr, explorer.look, name, state['path']).view
            height, width = picture_of(view, PAGE_SIDE).shape[:2]
            point = ((event.index[0] + 0.5) / width,
                     (event.index[1] + 0.5) / height)
            answer = _draw(gr, explorer, name, state['path'], stage, head,
                           style, point)
            return [dict(state, point=point), *answer]

        def new_model(name):
            shown = _usual(explorer, name)
            return (gr.Dropdown(explorer.stages(name), value=shown),
                    gr.Dropdown(explorer.heads(name, shown),
                                value=HEADS_MEAN))

        def new_stage(name, stage):
            # Head 3 of another stage is another head: begin with the mean.
            return gr.Dropdown(explorer.heads(name, stage), value=HEADS_MEAN)

        private = dict(api_visibility='private')
        choices = [model, stage, head, style]
        answers = [text, *pictures]
        everything = [state, *answers, drawn, scores]
        file.change(show, [file, *choices], everything, **private)
        model.input(new_model, model, [stage, head], **private).then(
            show, [file, *choices], everything, **private)
        stage.input(new_stage, [model, stage], head, **private).then(
            redraw, [state, *choices], answers, **private)
        for choice in (head, style):
            choice.input(redraw, [state, *choices], answers, **private)
        for shown in pictures:
            shown.select(click, [state, *choices], [state, *answers],
                           show_progress='hidden', **private)
    return page


def _usual(explorer: Explorer, name: str) -> int:
    """The stage to begin with: maps neither of pixels nor of a few cells."""
    stages = explorer.stages(name)
    return stages[len(stages) // 2]


def _draw(gr: Any, explorer: Explorer, *args: Any) -> List[Any]:
    answer = _or_error(gr, explorer.answer, *args)
    return [answer.text, *answer[:4]]


def _enlarged(picture: Optional[np.ndarray]) -> Optional[np.ndarray]:
    """A small picture as large as the others of the page."""
    if picture is None or max(picture.shape) >= PAGE_SIDE:
        return picture
    factor = PAGE_SIDE / max(picture.shape[:2])
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    return np.asarray(Image.fromarray(picture).resize(size))


def _or_error(gr: Any, function: Any, *args: Any) -> Any:
    """Call a function; what is wrong with its input is shown on the page."""
    try:
        return function(*args)
    except (OSError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error


class _Guard:
    """Refuse what this page has no use for, before gradio answers.

    Gradio's app also fetches web addresses for a browser (``/file=https:..``,
    ``/file/https:..``, ``/proxy=..``). And a page of another site may reach
    this machine's addresses by a name of its own (DNS rebinding): what listens
    to this machine only answers to this machine's names only.

    Args:
        app: The ASGI app behind it.
        hosts (frozenset[str]): Names to answer to; empty for all.
    """

    def __init__(self, app: Any, hosts: FrozenSet[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope['type'] == 'http' and self.refuses(scope):
            start = dict(type='http.response.start', status=403, headers=[
                (b'content-type', b'text/plain')])
            await send(start)
            await send(dict(type='http.response.body', body=b'Forbidden'))
            return
        await self.app(scope, receive, send)

    def refuses(self, scope: Mapping[str, Any]) -> bool:
        """Whether a request is not answered."""
        host = dict(scope['headers']).get(b'host', b'').decode('latin-1')
        name = urlsplit(f'//{host}').hostname
        path = scope['path'].lower()
        return (bool(self.hosts) and name not in self.hosts
                or '/proxy=' in path or '://' in path)


def launch(page: Any, host: str, port: Optional[int], max_bytes: int,
           block: bool = True) -> Tuple[Any, str]:
    """Serve the page, to this machine only unless ``host`` says otherwise.

    Args:
        page (gradio.Blocks): Of :func:`build_page`.
        host (str): Address to listen on.
        port (int, optional): Port; by default the first free one from 7860.
        max_bytes (int): Greatest size of an upload.
        block (bool): Serve until interrupted.

    Returns:
        tuple: The server's app and its address.

    Raises:
        OSError: The port is taken, or the address is not this machine's.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    font = ('system-ui', 'sans-serif')  # nothing to be fetched
    guard = Middleware(_Guard, hosts=LOOPBACK if host in LOOPBACK
                       else frozenset())
    app, address, _ = page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False,
        quiet=True, prevent_thread_lock=True, footer_links=[], pwa=False,
        enable_monitoring=False, ssr_mode=False, mcp_server=False,
        app_kwargs=dict(middleware=[guard]),
        max_file_size=max_bytes,
        theme=gr.themes.Base(font=font, font_mono=('monospace', )))
    print(f'{TITLE}: {address} (Ctrl-C ends it)', flush=True)
    if block:
        page.block_thread()
    return app, address


def load_models(pairs: List[Tuple[str, str, str]], device: str
             ) -> Dict[str, RoutingModel]:
    """Load models by name.

    Args:
        pairs (list): (name, config, checkpoint) of each.
        device (str): Where to run them.

    Raises:
        ValueError: Two have one name, or one does not load.
    """
    models: Dict[str, RoutingModel] = {}
    for name, config, checkpoint in pairs:
        if name in models:
            raise ValueError(f'two models are called {name!r}')
        models[name] = RoutingModel(config, checkpoint, device=device)
    return models
