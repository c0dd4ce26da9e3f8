"""Export a trained model to ONNX or torch.export, and check the file."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from mmrpa.cfg_options import DictAction
from mmrpa.export import (
    CHECK_SIZES,
    FORMATS,
    OUTPUTS,
    PARTS,
    CheckError,
    ExportError,
    ExportModel,
    export_model,
)
from mmrpa.export.formats import OPSETS, SUFFIXES, check_arguments
from mmrpa.safe_loading import protect_process

RANDOM = 'random'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Export a model with an RPAttention backbone, for any '
        'batch, height and width. The file is compared with the model at five '
        'sizes, in onnxruntime or torch, before it gets its name. '
        'docs/export.md says what goes in and what comes out.')
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        'checkpoint', help=f"its weights; for a backbone also a backbone's; "
        f'{RANDOM!r} exports random ones')
    parser.add_argument(
        '-o', '--out', type=Path, metavar='FILE',
        help="file to write (default: the config's name and the format's "
        'suffix, in the working directory)')
    parser.add_argument(
        '--what', choices=PARTS,
        help='backbone alone, up to the neck, or the whole model (default: '
        'whole; neck for mmdet, whose heads are not exported)')
    parser.add_argument(
        '--output', choices=OUTPUTS, default='logits',
        help='of a whole model: logits, or the index of the best class '
        '(default: %(default)s)')
    parser.add_argument(
        '--normalize', action='store_true',
        help='put the normalisation into the file: it then takes pixels from '
        '0 to 255')
    parser.add_argument(
        '--format', choices=FORMATS, default='onnx', dest='file_format',
        help='default: %(default)s')
    parser.add_argument(
        '--opset', type=int, default=OPSETS[0],
        help=f'of ONNX, {OPSETS[0]} to {OPSETS[1]} (default: %(default)s)')
    parser.add_argument(
        '--sizes', type=_size, nargs='+', metavar='BxHxW',
        default=list(CHECK_SIZES), help='sizes to check at (default: ' +
        ' '.join('x'.join(map(str, size)) for size in CHECK_SIZES) + ')')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = Path(Path(args.config).stem + SUFFIXES[args.file_format])
    return args


def _size(text: str) -> Tuple[int, int, int]:
    if not re.fullmatch(r'\d+x\d+x\d+', text):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size: write batch, height and width as 2x64x96')
    batch, height, width = map(int, text.split('x'))
    return batch, height, width


def _about(args: argparse.Namespace) -> Dict[str, Any]:
    """Where the file comes from; names only, no folders."""
    return dict(config=Path(args.config).name,
                checkpoint=args.checkpoint if args.checkpoint == RANDOM else
                Path(args.checkpoint).name)


def run(args: argparse.Namespace) -> None:
    """Export and report.

    Raises:
        CheckError: The file computes something else than the model.
        ExportError: The model cannot be exported, or packages are missing.
        OSError: A config or checkpoint is missing, or the file cannot be
            written.
        ValueError: Something given does not fit.
    """
    check_arguments(args.out, args.file_format, args.opset, args.sizes)
    model = ExportModel(
        args.config,
        None if args.checkpoint == RANDOM else args.checkpoint,
        part=args.what, output=args.output, normalize=args.normalize,
        cfg_options=args.cfg_options)
    if model.windows:
        print('note: the config predicts in windows and averages them ('
              + ', '.join(f'{k}={v}' for k, v in model.windows.items()) +
              '); the file computes whole images. For the numbers of the '
              'host, give it such windows')
    started = time.time()
    print(f'exporting {args.config} ({model.part}), which can take minutes',
          flush=True)
    checked = export_model(model, args.out, file_format=args.file_format,
                           opset=args.opset, sizes=args.sizes,
                           about=_about(args))
    for size, error in checked:
        print(f'  {"x".join(map(str, size)):>12}  largest difference '
              f'{error:.1e}')
    print(f'wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB, '
          f'{time.time() - started:.0f} s)')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code: 1 if the export failed."""
    args = parse_args(argv)
    protect_process()
    try:
        run(args)
    except (CheckError, ExportError) as error:
        print(f'export_onnx: {error}; nothing was written', file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError) as error:
        print(f'export_onnx: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
