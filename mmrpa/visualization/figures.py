"""Figures for papers: segments, and responses of query points."""

from pathlib import Path
from typing import Any, List, NamedTuple, Sequence, Tuple, Union

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from ..whole_files import whole_file
from .colors import representative_colors
from .models import Place, View
from .painting import overlay_blocks, overlay_heat, overlay_segments
from .recording import effective_representatives

# A panel's longer side and what is around it, in inches; text in points.
PANEL, GAP, TEXT = 1.7, 0.06, 8
BAR = 0.12
# Around a figure; half of it is for stars on the edge of an image.
MARGIN = 0.08
# The least height of a row, for the title that is written up its side.
ROW = 1.05
DPI = 300
# Pixels of the longer side of a picture: more than a panel has at this DPI.
PICTURE_SIDE = 600
# Heads of a row in a figure of all heads.
HEADS_A_ROW = 8
MEAN = 'mean'
AUTO = 'auto'
QUERY_COLOR = '#ff0000'
STYLE = {
    'font.size': TEXT,
    'axes.titlesize': TEXT,
    'axes.titlepad': 3,
    'pdf.fonttype': 42,
    'image.interpolation': 'antialiased',
}
# Titles take their size from what is set when they are written.
_STYLED = matplotlib.rc_context(STYLE)
_ATTENTION_TITLES = dict(
    RPAttention='RPAttention',
    DenseAttention='dense attention',
    SpatialReductionAttention='spatial reduction',
    WindowAttention='window attention',
    CrossShapedWindowAttention='cross-shaped windows')


class Panel(NamedTuple):
    """One head of one layer, head from 0."""

    place: Place
    head: int


def picture_of(view: View, side: int = PICTURE_SIDE) -> np.ndarray:
    """The view's image, its longer side ``side`` pixels, float in [0, 1].

    Small images are enlarged, so that what is drawn over them is fine.
    """
    height, width = view.image.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    resized = Image.fromarray(view.image).resize(size,
                                                 Image.Resampling.BICUBIC)
    return np.asarray(resized) / 255.


def segments_picture(view: View, panel: Panel, side: int = PICTURE_SIDE
                     ) -> np.ndarray:
    """One head's representatives as soft segments over the image.

    Colours go by the representatives' numbers: the same in all images.
    """
    picture = picture_of(view, side)
    size = picture.shape[:2]
    p = view.routing(panel.place)[panel.head]
    shares = view.to_picture(p, panel.place, size)
    return overlay_segments(picture, shares, representative_colors(len(p)),
                            view.geometry.seen(size))


def response_picture(view: View, response: Tensor, place: Place, style: str,
                     side: int = PICTURE_SIDE) -> np.ndarray:
    """A response (h', w') over the image, as ``'heat'`` or ``'blocks'``."""
    picture = picture_of(view, side)
    size = picture.shape[:2]
    mode, overlay = dict(heat=('smooth', overlay_heat),
                         blocks=('nearest', overlay_blocks))[style]
    values = view.to_picture(response[None], place, size, mode)[0]
    return overlay(picture, values, view.geometry.seen(size))


def choose_head(views: Sequence[View], place: Place) -> int:
    """The head that uses most of its representatives: it shows most."""
    used = [[effective_representatives(p[None, None]) for p in
             view.routing(place)] for view in views]
    return int(np.mean(used, axis=0).argmax())


@_STYLED
def draw_segments(views: Sequence[View], panels: Sequence[Panel]) -> Figure:
    """Images one under the other, each with its segments beside it.

    Under a segmentation is a bar of the representatives' shares of the image,
    with the numbers of the largest.
    """
    pictures = [picture_of(view) for view in views]
    titles = ['image']
    for panel in panels:
        p = torch.stack([
            torch.tensor(effective_representatives(
                view.routing(panel.place)[None, panel.head:panel.head + 1]))
            for view in views
        ])
        total = views[0].model.layer(panel.place).num_representatives
        titles.append(f'{_title(views[0], panel.place)}, head '
                      f'{panel.head + 1}\n{p.mean():.1f} of {total} in use')
    figure, axes = _grid(len(views), len(titles), pictures[0].shape, BAR + GAP)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for row, view, picture in zip(axes, views, pictures, strict=True):
        _show(row[0], picture)
        for axis, panel in zip(row[1:], panels, strict=True):
            _show(axis, segments_picture(view, panel))
            _share_bar(axis, view.routing(panel.place)[panel.head])
    return figure


@_STYLED
def draw_all_heads(view: View, places: Sequence[Place]) -> Figure:
    """Every head of some layers, a row a layer (more where heads are many)."""
    rows: List[List[Panel]] = []
    for place in places:
        heads = range(len(view.routing(place)))
        rows += [[Panel(place, h) for h in heads[i:i + HEADS_A_ROW]]
                 for i in range(0, len(heads), HEADS_A_ROW)]
    columns = max(map(len, rows))
    figure, axes = _grid(len(rows), columns, picture_of(view).shape, 0.34, ROW)
    for row, panels in zip(axes, rows, strict=True):
        for axis in row[len(panels):]:
            axis.set_visible(False)
        row[0].set_ylabel(_title(view, panels[0].place))
        for axis, panel in zip(row, panels, strict=False):
            axis.set_title(f'head {panel.head + 1}')
            _show(axis, segments_picture(view, panel))
            _share_bar(axis, view.routing(panel.place)[panel.head])
    return figure


class Responses(NamedTuple):
    """Responses of one layer to all query points.

    Attributes:
        view (View): Of the model.
        place (Place): The layer.
        head (int | str): A head from 0, or ``'mean'`` of all.
        maps (Tensor): (Q, h', w').
    """

    view: View
    place: Place
    head: Union[int, str]
    maps: Tensor

    def title(self, with_head: bool = True) -> str:
        """The stage and kind of attention, and the head if it is one."""
        layer = self.view.model.layer(self.place)
        title = (f'{_title(self.view, self.place)}\n'
                 f'{_ATTENTION_TITLES[type(layer).__name__]}')
        if with_head and self.head != MEAN:
            title += f', head {self.head + 1}'
        return title


def respond(view: View, place: Place, points: List[Tuple[float, float]],
            head: Union[int, str] = MEAN) -> Responses:
    """Compute what the tokens at ``points`` read.

    Raises:
        ValueError: A point is outside of what the network is shown.
    """
    maps = view.response(place, points)
    return Responses(view, place, head,
                     maps.mean(0) if head == MEAN else maps[head])


@_STYLED
def draw_heat(rows: Sequence[Responses], points: List[Tuple[float, float]]
              ) -> Figure:
    """The image with its query points; beside it a heat map of each point.

    Args:
        rows (sequence[Responses]): Layers, one under the other.
        points (list): (x, y) in pixels of the image, one a column.
    """
    view = rows[0].view
    picture = picture_of(view)
    width, height = _panel_size(picture.shape)
    # Image, a gap for the rows' titles, heat maps, the scale.
    widths = [1.1 * width, 0.36, *[width] * len(points), 0.06]
    between = max(GAP, ROW - height)
    figure = _figure(sum(widths) + GAP * (len(widths) - 1),
                     len(rows) * (height + between) - between)
    grid = figure.add_gridspec(
        len(rows), len(widths), width_ratios=widths, hspace=between / height,
        wspace=GAP * len(widths) / sum(widths), left=0, right=1, bottom=0,
        top=1)
    main = _bare(figure.add_subplot(grid[:, 0]))
    _show(main, picture)
    main.set_title('image')
    for i, point in enumerate(points):
        _mark(main, view, point, f'Q{i + 1}', 60)
    for r, row in enumerate(rows):
        for i, point in enumerate(points):
            axis = _bare(figure.add_subplot(grid[r, i + 2]))
            _show(axis, response_picture(row.view, row.maps[i], row.place,
                                         'heat'))
            _mark(axis, view, point, '', 30)
            if r == 0:
                axis.set_title(f'Q{i + 1}')
            if i == 0:
                axis.set_ylabel(row.title(), labelpad=2)
    bar = figure.colorbar(
        ScalarMappable(cmap='turbo'), cax=figure.add_subplot(grid[:, -1]))
    bar.set_ticks([0.02, 0.98], labels=['low', 'high'])
    bar.ax.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)
    return figure


@_STYLED
def draw_blocks(columns: Sequence[Responses],
                points: List[Tuple[float, float]]) -> Figure:
    """A row a query point: the image with the token, and its responses.

    Args:
        columns (sequence[Responses]): Layers, one beside the other.
        points (list): (x, y) in pixels of the image, one a row.
    """
    view = columns[0].view
    picture = picture_of(view)
    figure, axes = _grid(len(points), len(columns) + 1, picture.shape, 0)
    axes[0, 0].set_title('image')
    for axis, column in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(column.title())
    one_grid = len({column.maps.shape for column in columns}) == 1
    for i, (row, point) in enumerate(zip(axes, points, strict=True)):
        _show(row[0], picture)
        if one_grid:
            _mark_token(row[0], view, columns[0].place, point)
        else:
            _mark(row[0], view, point, '', 30)
        row[0].set_ylabel(f'Q{i + 1}')
        for axis, column in zip(row[1:], columns, strict=True):
            _show(axis, response_picture(
                column.view, column.maps[i], column.place, 'blocks'))
            _mark_token(axis, column.view, column.place, point)
    return figure


def save(figure: Figure, path: Union[str, Path]) -> None:
    """Write a figure, tightly cropped, wholly or not at all."""
    path = Path(path)
    with whole_file(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI,
                       bbox_inches='tight', pad_inches=MARGIN)


# The parts of a figure.


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: no pyplot, no screen, nothing global."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _grid(rows: int, columns: int, shape: Tuple[int, ...], below: float,
          least: float = 0.) -> Tuple[Figure, np.ndarray]:
    """Axes of a picture's shape with ``below`` inches under each row.

    Rows are at least ``least`` inches apart.
    """
    width, height = _panel_size(shape)
    between = max(GAP + below, least - height)
    figure = _figure(columns * (width + GAP) - GAP,
                     rows * (height + between) - between)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw=dict(wspace=GAP / width, hspace=between / height,
                         left=0, right=1, bottom=0, top=1))
    for axis in axes.flat:
        _bare(axis)
    return figure, axes


def _panel_size(shape: Tuple[int, ...]) -> Tuple[float, float]:
    height, width = shape[:2]
    # No thinner than this, or titles would not fit over it.
    width = PANEL * min(1., max(width / height, 0.85))
    return width, min(PANEL, width * shape[0] / shape[1])


def _bare(axis: Any) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


def _show(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture)
    axis.set_anchor('N')


def _title(view: View, place: Place) -> str:
    blocks = len(view.model.backbone.stages[place.stage].blocks)
    title = f'stage {place.stage + 1}'
    return title if blocks == 1 else f'{title} (block {place.block + 1})'


def _share_bar(axis: Any, p: Tensor) -> None:
    """The representatives' shares of an image as one stacked bar."""
    shares = p.mean((1, 2)).numpy()
    colors = representative_colors(len(shares))
    shape = axis.images[0].get_array().shape
    width, height = _panel_size(shape)
    width = min(width, height * shape[1] / shape[0])
    shown = width * shape[0] / shape[1]
    bar = axis.inset_axes([0, -(GAP / 2 + BAR) / shown, 1, BAR / shown])
    start = 0.
    for m in np.argsort(-shares, kind='stable'):
        bar.barh(0, shares[m], 1, left=start, color=colors[m], linewidth=0)
        # What a number of this many digits takes, in inches.
        if shares[m] * width > 0.06 + 0.05 * len(str(m + 1)):
            dark = colors[m] @ np.array([0.299, 0.587, 0.114]) < 0.5
            bar.text(start + shares[m] / 2, -0.04, str(m + 1), ha='center',
                     va='center_baseline', fontsize=5,
                     color='white' if dark else 'black')
        start += shares[m]
    bar.set_xlim(0, start)
    bar.set_ylim(-0.5, 0.5)
    bar.axis('off')


def _mark(axis: Any, view: View, point: Tuple[float, float], text: str,
          area: float) -> None:
    """A star at a pixel of the image."""
    x, y = _on_picture(axis, view, point)
    axis.scatter([x], [y], s=area, marker='*', c=QUERY_COLOR,
                 edgecolors='white', linewidths=0.6, clip_on=False, zorder=3)
    if text:
        # To the inside of the image, where no title is.
        left = x > 0.8 * axis.get_xlim()[1]
        below = y < 0.5 * axis.get_ylim()[0]
        note = axis.annotate(
            text, (x, y), (-5 if left else 5, -4 if below else 4),
            textcoords='offset points', color=QUERY_COLOR, weight='bold',
            fontsize=TEXT, ha='right' if left else 'left',
            va='top' if below else 'bottom')
        note.set_path_effects([withStroke(linewidth=1.5, foreground='white')])


def _mark_token(axis: Any, view: View, place: Place,
                point: Tuple[float, float]) -> None:
    """The token that holds a pixel."""
    geometry, stride = view.geometry, view.model.stride(place.stage)
    columns = view.inputs[place].hw_shape[1]
    token = view.token(place, point)
    corner, size = [], []
    factor = (axis.get_xlim()[1] + 0.5) / view.image.shape[1]
    for i, cell in enumerate((token % columns, token // columns)):
        ends = [geometry.offset[i] + geometry.scale[i] * stride * (cell + e)
                for e in (0, 1)]
        corner.append(min(ends) * factor - 0.5)
        size.append(abs(ends[1] - ends[0]) * factor)
    axis.add_patch(Rectangle(corner, *size, facecolor=QUERY_COLOR,
                             edgecolor='white', linewidth=0.4))


def _on_picture(axis: Any, view: View, point: Tuple[float, float]
                ) -> Tuple[float, float]:
    factor = (axis.get_xlim()[1] + 0.5) / view.image.shape[1]
    return tuple((value + 0.5) * factor - 0.5 for value in point)

