"""Write a config with an RPAttention backbone in the place of its own."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmrpa.cfg_options import DictAction
from mmrpa.preflight import ConfigError
from mmrpa.safe_loading import protect_process
from mmrpa.swap import NAMES, SwapError, SwapRefused, swap, write_config
from mmrpa.swap.check import StepError, run_step
from mmrpa.swap.writing import check_file, read_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Replace the backbone of any mmdet, mmsegmentation or '
        'mmpretrain config by an RPAttention backbone, and write a complete '
        "config that runs with tools/train.py and with the host's own. Says "
        'what it changed and why, one line each. docs/swap.md is the guide.',
        epilog='Exit status: 0 written; 1 refused, or the step of --check '
        'failed; 2 bad input. In the last two cases nothing is written.')
    parser.add_argument(
        'config', help='config file of a host, or HOST::NAME for one that '
        'the installed host ships')
    parser.add_argument(
        '--arch', required=True, metavar='NAME',
        help='one of ' + ', '.join(NAMES))
    parser.add_argument(
        '-o', '--out', type=Path, metavar='FILE',
        help='file to write; default: <config>_<arch>.py in the working '
        'folder')
    parser.add_argument(
        '--overwrite', action='store_true',
        help='replace the file if it is there')
    parser.add_argument(
        '--check', action='store_true',
        help='before writing, build the model on the CPU and run one '
        'training step on random images')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override values of CONFIG first, key=value')
    return parser.parse_args(argv)


def check(cfg: Config) -> str:
    """Run a step; returns a line on it.

    Raises:
        StepError: It failed.
    """
    try:
        step = run_step(cfg)
    except (AssertionError, AttributeError, ImportError, LookupError, OSError,
            RuntimeError, TypeError, ValueError) as error:
        text = ' '.join(str(error).split())[:400]
        raise StepError('nothing is written, because the step of --check '
                        f'failed: {type(error).__name__}: {text}') from error
    text = (f'checked: builds with {step.params / 1e6:.1f} M parameters, '
            f'loss {step.loss:.4g} on random images')
    if step.without_gradient:
        text += (f'; {len(step.without_gradient)} parameters of the backbone '
                 f'got no gradient ({step.without_gradient[0]}, ...), so '
                 'distributed training needs find_unused_parameters=True')
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
    arch = args.arch.replace('-', '_').lower()
    out = args.out or Path(f'{Path(args.config).stem}_{arch}.py')
    try:
        check_file(out, args.config, args.overwrite)
        cfg, report = swap(read_config(args.config, args.cfg_options), arch)
        lines = report.lines()
        if args.check:
            lines.append(check(cfg))
        write_config(cfg, out)
    except (SwapRefused, StepError) as error:
        print(f'swap_backbone: {error}', file=sys.stderr)
        return 1
    except (ConfigError, OSError, SwapError) as error:
        print(f'swap_backbone: error: {error}', file=sys.stderr)
        return 2
    print('\n'.join([*lines, f'wrote    {out}']))
    return 0


if __name__ == '__main__':
    sys.exit(main())
