"""Run the tests of mmrpa against the original OpenMMLab packages.

The tested set has the onedl-* forks. This makes an environment of its own with
the originals (mmengine 0.10.7, mmcv-lite 2.1.0, mmpretrain 1.2.0, mmdet 3.3.0,
mmsegmentation 1.2.2) on top of the torch of the tested set, once, and runs in
it all tests that touch one of them. docs/originals.md says what that shows,
and what not.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from originals.environment import (
    ROOT,
    OriginalsError,
    compiled_operators,
    interpreter,
    prepare,
)

# Each path under tests/ that is left out, and why.
LEFT_OUT = {
    'test_ops': 'torch alone, no host',
    'test_layers': 'torch alone, no host',
    'test_geometry.py': 'torch alone, no host',
    'test_guides.py': 'files of the project, no host',
    'test_tools/test_setup_env.py': 'installs the tested set, no host',
    'test_tools/test_sample_scenes.py': 'numpy and OpenCV, no host',
}
# Single tests, by their name after tests/. The first two train the
# quickstart's segmentor; see docs/originals.md.
_CLASS_WEIGHTS = ('mmsegmentation 1.2.2 cannot have class weights and ignored '
                  'pixels at once')
DESELECTED = {
    'test_configs.py::test_one_step_and_one_prediction[mmseg/quickstart/'
    'rp-pvt-nano_upernet_1xb8-300_sample-128x128.py]': _CLASS_WEIGHTS,
    'test_reliability/test_killed.py::test_one_kill': _CLASS_WEIGHTS,
    'test_doctor/test_crafted.py::test_tested_environment_has_no_problems':
    'of the tested set, this is another',
    'test_tools/test_test_originals.py::test_pip_that_fails_is_quoted':
    'makes such an environment, from the tested set',
}
# Meant for continuous integration: about 4 minutes of one core.
QUICK = (
    'test_registry.py', 'test_backbones/test_checkpoint.py', 'test_optim',
    'test_hooks', 'test_weights/test_convert.py',
    'test_weights/test_files.py', 'test_weights/test_runner.py',
    'test_tools/test_dispatch.py',
    'test_tools/test_dist.py::test_two_processes_train_and_test_a_detector',
    'test_tools/test_dist.py::test_one_process_trains_and_tests_a_segmentor')


# Options of pytest whose value, the next argument, may look like a test.
_WITH_VALUE = ('-c', '-k', '-m', '-o', '-p', '--basetemp', '--config-file',
               '--confcutdir', '--deselect', '--ignore', '--ignore-glob',
               '--junit-xml', '--junitxml', '--log-file', '--rootdir')


def parse_args(argv: list[str] | None = None) -> tuple:
    """Read the command line: our arguments, and those for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='All other arguments go to pytest; paths among them replace '
        'the tests that would be run.',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--env', type=Path, metavar='DIR',
                        default=ROOT / 'build' / 'originals',
                        help='the environment (default: %(default)s)')
    parser.add_argument('--quick', action='store_true',
                        help='only the tests that depend most on the hosts')
    parser.add_argument('--only-prepare', action='store_true',
                        help='make the environment and stop')
    return parser.parse_known_args(argv)


def select(quick: bool) -> list[str]:
    """Arguments for pytest: paths, and those left out of them."""
    args = [f'tests/{path}' for path in QUICK] if quick else ['tests']
    return args + [f'--ignore=tests/{path}' for path in LEFT_OUT]


def locate(args: list[str]) -> tuple[list[str], bool]:
    """Tests among arguments for pytest, as it finds them from our folder.

    Args:
        args (list[str]): Paths may be relative to the working folder, where
            they are looked for first, or to the project's.

    Returns:
        tuple: The arguments, and whether there is a test among them.

    Raises:
        OriginalsError: There is no such file or folder.
    """
    found, own = [], False
    for before, arg in zip(['', *args], args, strict=False):
        path, *names = arg.split('::')
        named = path.endswith('.py') or path.split(os.sep)[0] == 'tests'
        if before in _WITH_VALUE or arg.startswith('-'):
            found.append(arg)
            continue
        here = next((place for place in (Path(path).resolve(),
                                         (ROOT / path).resolve())
                     if place.exists()
                     and place.is_relative_to(ROOT / 'tests')), None)
        if here is None and named:
            raise OriginalsError(f'there is no {path!r} under {ROOT}/tests')
        own |= here is not None
        found.append(arg if here is None else '::'.join([str(here), *names]))
    return found, own


def report(env: Path, python: Path) -> None:
    """Print what is tested, and what is not."""
    code = ('import mmengine, mmcv, mmpretrain, mmdet, mmseg, torch; '
            'print(*(f"  {m.__name__} {m.__version__} from {m.__path__[0]}" '
            'for m in (mmengine, mmcv, mmpretrain, mmdet, mmseg, torch)), '
            'sep="\\n")')
    done = subprocess.run([python, '-c', code], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [
            f'the process ended with status {done.returncode}']
        raise OriginalsError(f'the packages in {env} cannot be imported:\n'
                             f'{said[-1]}')
    print(done.stdout, end='')
    print('  compiled operators of mmcv:', *(
        f'{path.name} of the fork' for path in compiled_operators()))
    print('left out:')
    for name, reason in {**LEFT_OUT, **DESELECTED}.items():
        print(f'  {name}: {reason}')
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Prepare, report and run; return pytest's exit status."""
    args, pytest_args = parse_args(argv)
    env = args.env.resolve()
    try:
        pytest_args, own = locate(pytest_args)
        if not compiled_operators():
            raise OriginalsError('the fork of mmcv is not installed here, '
                                 'whose compiled operators mmdet and mmseg '
                                 'need: run `make setup` first')
        made = prepare(env)
        print(f'{env} is', 'made' if made else 'up to date')
        report(env, interpreter(env))
    except OriginalsError as error:
        print(f'test_originals.py: error: {error}', file=sys.stderr)
        return 1
    if args.only_prepare:
        return 0
    command = [interpreter(env), '-m', 'pytest', '-p', 'no:cacheprovider',
               *(f'--deselect=tests/{name}' for name in DESELECTED),
               *pytest_args, *([] if own else select(args.quick))]
    # Nothing of the tested set may come in by the environment's variables.
    variables = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == '__main__':
    sys.exit(main())
