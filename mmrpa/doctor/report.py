"""The doctor's one screen."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any, Sequence

from .commands import FORKS
from .facts import OPENCV, gather_facts
from .findings import NOTE, Finding
from .rules import find_problems

_SHOWN = ('torch', 'torchvision', 'numpy', 'setuptools', 'ninja',
          'pycocotools', 'mmrpa')


def diagnose(facts: dict[str, Any] | None = None) -> list[Finding]:
    """What is wrong with this environment, causes first.

    Args:
        facts (dict, optional): As :func:`gather_facts` returns them, which is
            called otherwise.
    """
    return find_problems(gather_facts() if facts is None else facts)


def format_report(facts: dict[str, Any], found: Sequence[Finding]) -> str:
    """Versions and findings as text, to read and to paste."""
    lines = _versions(facts)
    problems = [finding for finding in found if finding.level != NOTE]
    notes = [finding for finding in found if finding.level == NOTE]
    for title, group in (('problem', problems), ('note', notes)):
        for i, finding in enumerate(group, start=1):
            text = f'{title} {i} of {len(group)}, {finding.code}: '
            lines += ['', *textwrap.wrap(text + finding.text, 79)]
            if finding.command:
                lines.append('    ' + finding.command)
    lines.append('')
    if not problems:
        lines.append('no problems')
    elif len(problems) == 1:
        lines.append('1 problem: run the command below it, then this again')
    else:
        lines.append(f'{len(problems)} problems: mend the first, then run '
                     'this again; others may follow from it')
    return '\n'.join(lines)


def _versions(facts: dict[str, Any]) -> list[str]:
    installed = facts['distributions']
    torch = facts['probes']['torch'].get('found')
    # Of each package the distributions that own it: fork or original.
    names = [name for package in FORKS
             for name in sorted(facts['owners'][package])]
    shown = [f'{name} {installed[name]}'
             for name in (*_SHOWN, *names, *OPENCV)
             if name in installed]
    cuda = 'unknown' if torch is None else torch['cuda'] or 'none, for CPUs'
    head = (f"Python {'.'.join(map(str, facts['python']))} on "
            f"{facts['platform']}; CUDA of torch: {cuda}; GPUs: "
            f"{', '.join(facts['gpus']) or 'none'}")
    return textwrap.wrap(head, 79) + textwrap.wrap(', '.join(shown), 79)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(
        prog='python -m mmrpa.doctor',
        description='Say what is wrong with this Python environment, and '
        'which command mends it. Changes nothing; takes as long as importing '
        'torch and the hosts. The exit status is 0 if nothing is wrong.')
    parser.add_argument('--json', action='store_true',
                        help='print facts and findings as JSON')
    args = parser.parse_args(argv)
    facts = gather_facts()
    found = diagnose(facts)
    if args.json:
        print(json.dumps({'findings': [f._asdict() for f in found],
                          'facts': facts}, indent=1, sort_keys=True))
    else:
        print(format_report(facts, found))
    return int(any(finding.level != NOTE for finding in found))
