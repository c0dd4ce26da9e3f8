"""Check the data that a config trains and tests on, file by file."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrpa.data_checks import Report, check_data
from mmrpa.data_checks.context import Options
from mmrpa.launch import load_config
from mmrpa.preflight import ConfigError
from mmrpa.whole_files import whole_file

_SPLITS = ('train', 'val', 'test')
# A config is Python: what usually goes wrong in it.
_CONFIG_ERRORS = (ConfigError, OSError, SyntaxError, ImportError, ValueError,
                  TypeError, KeyError, AttributeError, NameError,
                  RuntimeError)


def _number(least: int) -> type:
    """A type for argparse: an integer of at least ``least``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(
                f'{value} is too small: at least {least}')
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    from mmengine.config import DictAction
    parser = argparse.ArgumentParser(
        description='Read all images, annotations and label maps of a '
        'config, and report what is broken: the kinds are in '
        'docs/check_data.md. Exit code 0: nothing was found; 1: something '
        'was; 2: wrong usage.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--splits', nargs='+', choices=_SPLITS, default=_SPLITS,
        help='which dataloaders (default: all that the config has)')
    parser.add_argument(
        '--json', metavar='FILE', type=Path,
        help='write problems, notes and histograms of classes to FILE')
    parser.add_argument(
        '--max-images', metavar='N', type=_number(1),
        help='read at most N images of each dataset, spread evenly')
    parser.add_argument(
        '--workers', metavar='N', type=_number(0),
        default=min(8, os.cpu_count() or 1),
        help='threads that read, 0 for none (default: %(default)s)')
    parser.add_argument(
        '--world-size', metavar='N', type=_number(1),
        default=os.environ.get('WORLD_SIZE', '1'),
        help='processes of the training, for the effective batch '
        '(default: the variable WORLD_SIZE, or 1)')
    parser.add_argument(
        '--histogram', action='store_true',
        help='print the samples of each class')
    parser.add_argument(
        '--allow-subset', action='store_true',
        help='accept COCO files with categories that the config lacks')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    return parser


def _write_json(path: Path, report: Report, config: str) -> None:
    """Write the report whole or not at all."""
    text = json.dumps(dict(config=config, **report.record()), indent=2)
    with whole_file(path) as partial:
        partial.write_text(text + '\n', encoding='utf-8')


def _format_histograms(report: Report) -> list[str]:
    """A table for each dataset."""
    lines = []
    for where, histogram in report.histograms.items():
        lines.append(f'{where}: {histogram.total} images')
        width = max(map(len, histogram.samples), default=0)
        for name, number in histogram.samples.items():
            lines.append(f'  {name:{width}s} {number:12d} {histogram.unit}'
                         + ('' if histogram.unit == 'images' else
                            f' in {histogram.images[name]} images'))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ConfigError(f'--json {args.json}: there is no folder '
                              f'{args.json.absolute().parent}')
        cfg = load_config(args.config, args.cfg_options)
    except _CONFIG_ERRORS as error:
        print(f'check_data: {args.config}: {error}', file=sys.stderr)
        return 2
    # Some hosts print when they are imported; stdout is for the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = check_data(
            cfg, args.splits,
            Options(args.max_images, args.workers, progress=True),
            args.world_size, args.allow_subset)
    lines = list(report.findings.lines())
    if args.histogram:
        lines += _format_histograms(report)
    images = sum(h.total for h in report.histograms.values())
    lines.append(f'check_data: {report.num_problems or "no"} problem(s), '
                 f'{images} images in {len(report.histograms)} dataset(s)')
    print('\n'.join(lines))
    if args.json is not None:
        try:
            _write_json(args.json, report, args.config)
        except OSError as error:
            print(f'check_data: --json {args.json}: {error.strerror}',
                  file=sys.stderr)
            return 2
    return 1 if report.num_problems else 0


if __name__ == '__main__':
    sys.exit(main())
