"""Running tests of mmrpa in an environment of its own."""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .environment import (
    ROOT,
    OtherSetError,
    Recipe,
    compiled_operators,
    interpreter,
    prepare,
)

# Options of pytest whose value, the next argument, may look like a test.
_WITH_VALUE = ('-c', '-k', '-m', '-o', '-p', '--basetemp', '--config-file',
               '--confcutdir', '--deselect', '--ignore', '--ignore-glob',
               '--junit-xml', '--junitxml', '--log-file', '--rootdir')


@dataclass(frozen=True)
class Plan:
    """What is tested, and by what.

    Attributes:
        recipe (Recipe): The environment.
        modules (tuple): Packages whose versions are printed first.
        tests (tuple): Paths under ``tests/``, '' for all, that are run if the
            user names none.
        left_out (dict): Paths under ``tests/`` that are not among them, and
            why.
        deselected (dict): Single tests that never run, by their names after
            ``tests/``, and why.
    """

    recipe: Recipe
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    left_out: dict[str, str]
    deselected: dict[str, str]


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the arguments that all such tools have."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog='All other arguments go to pytest; paths among them replace '
        'the tests that would be run.',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only-prepare', action='store_true',
                        help='make the environment and stop')
    return parser


def run(plan: Plan, env: Path, only_prepare: bool,
        pytest_args: list[str]) -> int:
    """Prepare, report and run; return pytest's exit status.

    Args:
        plan (Plan): What is tested.
        env (Path): The environment's folder.
        only_prepare (bool): Stop before the tests.
        pytest_args (list[str]): The user's.

    Raises:
        OtherSetError: As :func:`locate` and
            :func:`other_sets.environment.prepare`, or packages do not import.
    """
    env = env.resolve()
    pytest_args, own = locate(pytest_args)
    made = prepare(env, plan.recipe)
    print(f'{env} is', 'made' if made else 'up to date')
    report(plan, env)
    if only_prepare:
        return 0
    command = [interpreter(env), '-m', 'pytest', '-p', 'no:cacheprovider',
               *(f'--deselect=tests/{name}' for name in plan.deselected),
               *pytest_args]
    if not own:
        command += [f'tests/{path}'.rstrip('/') for path in plan.tests]
        command += [f'--ignore=tests/{path}' for path in plan.left_out]
    # Nothing of the tested set may come in by the environment's variables.
    variables = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def locate(args: list[str]) -> tuple[list[str], bool]:
    """Tests among arguments for pytest, as it finds them from our folder.

    Args:
        args (list[str]): Paths may be relative to the working folder, where
            they are looked for first, or to the project's.

    Returns:
        tuple: The arguments, and whether there is a test among them.

    Raises:
        OtherSetError: There is no such file or folder.
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
            raise OtherSetError(f'there is no {path!r} under {ROOT}/tests')
        own |= here is not None
        found.append(arg if here is None else '::'.join([str(here), *names]))
    return found, own


def report(plan: Plan, env: Path) -> None:
    """Print what is tested, and what is not."""
    code = (f'import {", ".join(plan.modules)}; '
            'print(*(f"  {m.__name__} {m.__version__} from {m.__path__[0]}" '
            f'for m in ({", ".join(plan.modules)},)), sep="\\n")')
    done = subprocess.run([interpreter(env), '-c', code], capture_output=True,
                          text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [
            f'the process ended with status {done.returncode}']
        raise OtherSetError(f'the packages in {env} cannot be imported:\n'
                            f'{said[-1]}')
    print(done.stdout, end='')
    print('  compiled operators of mmcv:', *(
        [f'{path.name} of the fork' for path in compiled_operators()]
        if plan.recipe.operators else ['none']))
    left_out = {**plan.left_out, **plan.deselected}
    if left_out:
        print('left out:')
    for name, reason in left_out.items():
        print(f'  {name}: {reason}')
    sys.stdout.flush()
