"""From facts to findings: versions that installed packages refuse."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, NamedTuple

from .facts import OPENCV, normalise
from .findings import NOTE, TESTED, Finding, pin

_ABOUT = ('numpy', 'torch', 'setuptools', *OPENCV)
# Whose word counts. torchvision's torch is a rule of its own; what else lies
# in the environment may want anything, and mmrpa works without it.
_REQUIRERS = ('mmrpa', 'mmengine', 'mmcv', 'mmcv-full', 'mmcv-lite', 'mmdet',
              'mmsegmentation', 'mmpretrain', *TESTED, *OPENCV)


class Refusal(NamedTuple):
    """A line of ``pip check``: ``name`` needs ``needed`` within ``limits``."""

    name: str
    needed: str
    limits: str
    has: str

    def __str__(self) -> str:
        return (f'{self.name} refuses {self.needed} {self.has}: it needs '
                f'{self.needed}{self.limits}')


def _read(line: str) -> Refusal | None:
    found = re.match(r'(\S+) \S+ has requirement ([\w.-]+)(.*?), but you have '
                     r'\S+ (\S+?)\.?$', line)
    if not found:
        return None
    name, needed, limits, has = found.groups()
    return Refusal(name, normalise(needed), limits.split(';')[0].strip(' ()'),
                   has)


def find_refusals(facts: dict[str, Any]) -> Iterator[Finding]:
    """What ``pip check`` says of packages that this project is about."""
    ours: Dict[str, List[Refusal]] = {}
    others: Dict[str, List[Refusal]] = {}
    for refusal in filter(None, map(_read, facts['requirements'])):
        if refusal.needed in _ABOUT and refusal.name != 'torchvision':
            group = (ours if normalise(refusal.name) in _REQUIRERS else others)
            group.setdefault(refusal.needed, []).append(refusal)
    for needed, refusals in ours.items():
        yield Finding(f'requirement-{needed}', '; '.join(map(str, refusals)),
                      _command(needed, refusals))
    for needed, refusals in others.items():
        yield Finding(
            f'refused-{needed}', '; '.join(map(str, refusals)) + '. mmrpa and '
            f'the hosts need none of it, and another {needed} may break them',
            '', NOTE)


def _command(needed: str, refusals: List[Refusal]) -> str:
    """One for all: what pleases the first may not please the next."""
    limits = list(dict.fromkeys(part.strip() for refusal in refusals
                                for part in refusal.limits.split(',')))
    if sum(part.startswith('==') for part in limits) < 2:
        return f"pip install '{needed}{','.join(limits)}'"
    # No version is two; those of the tested set go together.
    names = [needed, *(normalise(refusal.name) for refusal in refusals)]
    return 'pip install --no-deps ' + ' '.join(
        pin(name) for name in dict.fromkeys(names) if name in TESTED)
