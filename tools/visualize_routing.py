"""Draw what the representatives of an RP backbone stand for and give back.

For every image one figure of the representatives as soft segments over it,
or, with --points, of what the tokens at these pixels read from all others.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch

from mmrpa.cfg_options import DictAction
from mmrpa.safe_loading import protect_process
from mmrpa.visualization.figures import (
    AUTO,
    MEAN,
    Panel,
    choose_head,
    draw_all_heads,
    draw_blocks,
    draw_heat,
    draw_segments,
    respond,
    save,
)
from mmrpa.visualization.models import Place, RoutingModel, View

ALL = 'all'
# Rows of a figure of many images; more go to a further figure.
IMAGES_A_FIGURE = 6
Point = Tuple[float, float]
Drawn = Iterator[Tuple[str, Any]]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/routing'),
        help='folder for the figures (default: %(default)s)')
    parser.add_argument(
        '--points', nargs='+', type=_point, metavar='X,Y',
        help='query pixels of the images; draws responses, not segments')
    parser.add_argument(
        '--style', choices=('heat', 'blocks', 'both'), default='both',
        help='responses as heat maps, as blocks of tokens, or both '
        '(default: %(default)s)')
    parser.add_argument(
        '--twin', metavar='CHECKPOINT',
        help="draw the responses of this one as well: the same config with "
        "the family's own attention")
    parser.add_argument(
        '--twin-attention', default='own', metavar='NAME',
        help="the twin's attention: 'dense', or the family's own, 'sr', "
        "'window' or 'cross' (default: the family's own)")
    parser.add_argument(
        '--stage', type=_number(ALL), default=ALL, metavar='N|all',
        help='stage, counted from 1 (default: all with RPAttention)')
    parser.add_argument(
        '--block', type=_number('last'), default='last', metavar='N|last',
        help='block of the stage, counted from 1 (default: the last)')
    parser.add_argument(
        '--head', type=_number(AUTO, ALL, MEAN), default=AUTO,
        metavar='N|auto|all|mean',
        help="head, counted from 1. 'auto': for segments the head that uses "
        "most representatives, for responses 'mean', the mean of all heads; "
        "'all' draws a grid (default: auto)")
    parser.add_argument(
        '--format', choices=('png', 'pdf'), default='png',
        help='of the figures (default: %(default)s)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: a GPU if there is '
        'one)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    args = parser.parse_args(argv)
    if args.points is None and (args.twin or args.head == MEAN):
        parser.error('--twin and --head mean are about responses: give '
                     '--points')
    if args.points is not None and args.head == ALL and args.stage == ALL:
        parser.error('--head all with --points needs one --stage')
    return args


def _point(text: str) -> Tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no point: write X,Y in pixels, such as 120,80'
        ) from None
    return x, y


def _number(*words: str) -> Any:
    """Parse a number from 1, to one from 0, or one of some words."""

    def parse(text: str) -> Any:
        if text in words:
            return text
        if text.isdigit() and int(text) >= 1:
            return int(text) - 1
        raise argparse.ArgumentTypeError(
            f'{text!r} must be a number from 1 or {" or ".join(words)}')

    return parse


def run(args: argparse.Namespace) -> List[Path]:
    """Draw all figures; returns their paths.

    Raises:
        FileNotFoundError: A config, checkpoint or image is missing.
        ValueError: Something given does not fit; nothing was written.
    """
    common = dict(
        device=args.device or ('cuda' if torch.cuda.is_available() else 'cpu'),
        cfg_options=args.cfg_options)
    model = RoutingModel(args.config, args.checkpoint, **common)
    twin = None if args.twin is None else RoutingModel(
        args.config, args.twin, attention=args.twin_attention, **common)
    draw = _segments if args.points is None else _responses
    # All is drawn before anything is written.
    figures = list(draw(args, model, twin))
    args.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures:
        paths.append(args.out / f'{name}.{args.format}')
        save(figure, paths[-1])
    return paths


def _places(args: argparse.Namespace, model: RoutingModel) -> List[Place]:
    """The layers that are asked for; the default has RPAttention only."""
    block = -1 if args.block == 'last' else args.block
    stages = model.rp_stages
    if not stages:
        raise ValueError(f'{args.config}: no stage of its backbone has '
                         "RPAttention; set attention='rp' for one")
    if args.stage == ALL:
        return [model.place(stage, block) for stage in stages]
    place = model.place(args.stage, block)
    if args.points is None and place.stage not in stages:
        raise ValueError(
            f'--stage {args.stage + 1} has no representatives; those with '
            f'RPAttention are {", ".join(str(s + 1) for s in stages)}')
    return [place]


def _check_head(args: argparse.Namespace, model: RoutingModel,
                place: Place) -> None:
    heads = model.layer(place).num_heads
    if isinstance(args.head, int) and args.head >= heads:
        raise ValueError(f'--head {args.head + 1}: stage {place.stage + 1} '
                         f'has heads 1 to {heads}')


def _segments(args: argparse.Namespace, model: RoutingModel, _: None
              ) -> Drawn:
    places = _places(args, model)
    for place in places:
        _check_head(args, model, place)
    views = [model.look(path) for path in args.images]
    names = _names(args.images)
    if args.head == ALL:
        for name, view in zip(names, views, strict=True):
            yield f'{name}_heads', draw_all_heads(view, places)
        return
    panels = [Panel(place, choose_head(views, place)
                    if args.head == AUTO else args.head) for place in places]
    if len(views) == 1:
        yield f'{names[0]}_segments', draw_segments(views, panels)
        return
    for i in range(0, len(views), IMAGES_A_FIGURE):
        number = f'_{i // IMAGES_A_FIGURE + 1}' if (
            len(views) > IMAGES_A_FIGURE) else ''
        yield f'segments{number}', draw_segments(
            views[i:i + IMAGES_A_FIGURE], panels)


def _responses(args: argparse.Namespace, model: RoutingModel,
               twin: Optional[RoutingModel]) -> Drawn:
    places = _places(args, model)
    for place in places:
        _check_head(args, model, place)
    models = [model] if twin is None else [twin, model]
    heads = [MEAN if args.head == AUTO else args.head]
    if args.head == ALL:
        heads = list(range(model.layer(places[0]).num_heads))
    for name, path in zip(_names(args.images), args.images, strict=True):
        views: List[View] = [one.look(path) for one in models]
        found = [respond(view, place, args.points, head) for place in places
                 for head in heads for view in views]
        if args.style in ('heat', 'both'):
            yield f'{name}_heat', draw_heat(found, args.points)
        if args.style in ('blocks', 'both'):
            yield f'{name}_blocks', draw_blocks(found, args.points)


def _names(images: Sequence[str]) -> List[str]:
    """A name for each image's figures: its own, with a number if needed."""
    stems = [Path(path).stem for path in images]
    return [stem if stems.count(stem) == 1 else f'{stem}_{i + 1}'
            for i, stem in enumerate(stems)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
    try:
        paths = run(args)
    except (OSError, ValueError) as error:
        print(f'visualize_routing: error: {error}', file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
