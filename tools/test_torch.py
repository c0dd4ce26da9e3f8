"""Run the tests of mmrpa with another torch than the tested set's.

    python tools/test_torch.py 2.6.0

makes an environment of its own with that torch and its torchvision (6 GB), on
top of .venv, once, and runs in it the tests that need no compiled operators of
mmcv: those of .venv are for its torch. Of a release that mmrpa refuses, it
tests that. docs/environment.md says what was run.
"""

import argparse
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from other_sets.environment import ROOT, OtherSetError, Recipe, interpreter
from other_sets.running import Plan, make_parser, run

from mmrpa import OLDEST_TORCH
from mmrpa.doctor.rules import matching_torchvision

# Paths under tests/ that need neither mmdet.models nor mmseg.models, whose
# imports need mmcv's compiled operators: about 5 minutes of one core.
TESTS = (
    'test_ops', 'test_layers', 'test_backbones', 'test_optim', 'test_hooks',
    'test_registry.py', 'test_security.py',
    'test_reliability/test_safe_loading.py', 'test_weights', 'test_export')


def make_plan(release: str) -> Plan:
    """What is tested with a release, such as ``'2.6.0'``."""
    # Of what torch and torchvision ask for, what other packages limit.
    limited = tuple(f'{name}=={version(name)}'
                    for name in ('numpy', 'pillow', 'setuptools'))
    # pip's cache would keep 3 GB more, for one use.
    recipe = Recipe(('--no-cache-dir', f'torch=={release}',
                     matching_torchvision(release), *limited),
                    without=('torch', 'triton', 'nvidia-', 'cuda-'),
                    operators=False)
    return Plan(recipe, ('torch', 'torchvision', 'mmengine', 'mmcv',
                         'mmpretrain'), TESTS, {}, {})


def check_refusal(env: Path) -> None:
    """Raise OtherSetError if mmrpa can be imported with too old a torch."""
    done = subprocess.run(
        [interpreter(env), '-c', 'import mmrpa.layers'], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = (done.stdout.strip().splitlines() or ['nothing'])[-1]
    if not (done.returncode and said.startswith(
            'ImportError: mmrpa needs torch')):
        raise OtherSetError(f'mmrpa does not refuse it, but says: {said}')
    print(f'refused: {said}')


def _release(text: str) -> str:
    """Check an argument; what pip gets must be one release."""
    if not re.fullmatch(r'\d+\.\d+\.\d+', text):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no release of torch, such as 2.6.0')
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the tests; return pytest's exit status."""
    parser = make_parser(__doc__)
    parser.add_argument('release', type=_release, help='such as 2.6.0')
    parser.add_argument('--env', type=Path, metavar='DIR',
                        help='the environment (default: '
                        f'{ROOT}/build/torch-RELEASE)')
    args, pytest_args = parser.parse_known_args(argv)
    env = args.env or ROOT / 'build' / f'torch-{args.release}'
    refused = tuple(map(int, args.release.split('.'))) < OLDEST_TORCH
    try:
        status = run(make_plan(args.release), env,
                     args.only_prepare or refused, pytest_args)
        if refused:
            check_refusal(env)
        return status
    except OtherSetError as error:
        print(f'test_torch.py: error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
