"""Explore the routing of trained models on a local web page.

Drop an image, choose model, stage and head, and click a pixel: its response,
its representative's segment and the model's prediction appear beside it. The
page is served to this machine only and needs no internet.
"""

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional, Sequence, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--model', nargs=3, action='append', default=[],
        metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='a further model to choose from; may be given several times')
    parser.add_argument(
        '--host', default='127.0.0.1',
        help='address to listen on (default: %(default)s, this machine only; '
        'whoever can reach another address can use the page)')
    parser.add_argument(
        '--port', type=int,
        help='port (default: the first free one from 7860)')
    parser.add_argument(
        '--max-megapixels', type=_positive, default=25.,
        help='refuse larger images (default: %(default)s)')
    parser.add_argument(
        '--max-megabytes', type=_positive, default=20.,
        help='refuse larger files (default: %(default)s)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3,
        help='least score of the detections that are drawn (default: '
        '%(default)s)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: a GPU if there is '
        'one)')
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text!r} must be more than 0')
    return value


def _models(args: argparse.Namespace) -> List[Tuple[str, str, str]]:
    first = (Path(args.config).stem, args.config, args.checkpoint)
    return [first, *map(tuple, args.model)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    if find_spec('gradio') is None:
        print("routing_explorer: error: gradio is not installed: pip install "
              "'.[explorer]'", file=sys.stderr)
        return 1
    import torch

    from mmrpa.safe_loading import protect_process
    from mmrpa.visualization.explorer import (
        Explorer,
        build_page,
        launch,
        load_models,
    )
    protect_process()
    max_bytes = int(args.max_megabytes * 2**20)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        explorer = Explorer(
            load_models(_models(args), device), max_bytes,
            int(args.max_megapixels * 1e6), args.score_thr)
        # What was uploaded is this user's alone, and goes with the server.
        with tempfile.TemporaryDirectory(prefix='routing_explorer.') as folder:
            os.environ['GRADIO_TEMP_DIR'] = folder
            launch(build_page(explorer), args.host, args.port, max_bytes)
    except (OSError, ValueError) as error:
        print(f'routing_explorer: error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
