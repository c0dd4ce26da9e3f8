"""What became of every tensor when weights changed their names."""

from dataclasses import dataclass, field
from typing import Dict, List, Sequence, Tuple

Shape = Tuple[int, ...]


@dataclass
class Report:
    """What a conversion did.

    Args:
        backbone (str): Class of the backbone, e.g. ``'RPSwin'``.
        source (str): What the file holds, in words.
        prefix (str): What stood before the names in it.
        carried (dict[str, int]): Parameters by name in the backbone.
        resized (dict[str, tuple]): Of those carried: the shape before and
            after, by name in the backbone.
        new (dict[str, str]): What the source has not and how it starts, by
            name in the backbone: ``'init'`` as the backbone initialises it
            (such a tensor is not in the converted weights), anything else
            names the values that are.
        missing (dict[str, int]): What the source should have and has not.
        misshapen (dict[str, tuple]): Shapes in the file and in the backbone,
            of tensors that were not carried because of them.
        left_out (dict[str, str]): Why, by name in the file.
        unexpected (dict[str, int]): Parameters in the file that nothing here
            knows, by name in the file.
    """

    backbone: str
    source: str
    prefix: str = ''
    carried: Dict[str, int] = field(default_factory=dict)
    resized: Dict[str, Tuple[Shape, Shape]] = field(default_factory=dict)
    new: Dict[str, str] = field(default_factory=dict)
    missing: Dict[str, int] = field(default_factory=dict)
    misshapen: Dict[str, Tuple[Shape, Shape]] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)
    unexpected: Dict[str, int] = field(default_factory=dict)

    @property
    def absent(self) -> Dict[str, str]:
        """What a backbone has to bring along to load the result: ``'init'``
        by name in the backbone."""
        return dict.fromkeys(
            [name for name, start in self.new.items() if start == 'init'] +
            [*self.missing, *self.misshapen], 'init')

    @property
    def carried_fraction(self) -> float:
        """How much fits, by parameters or by tensors, whichever is less: of
        what the backbone shares with the source, the part that was carried,
        or of what the file has for a backbone, the part that was of use."""
        carried = sum(self.carried.values())
        given, own = (sum(_numel(shapes[i])
                          for shapes in self.misshapen.values())
                      for i in (0, 1))
        lost = sum(self.missing.values()) + own
        spare = sum(self.unexpected.values()) + given
        by_parameters = carried / max(carried + max(lost, spare), 1)
        spoilt = len(self.misshapen) + max(
            len(self.missing), len(self.unexpected))
        by_tensors = len(self.carried) / max(len(self.carried) + spoilt, 1)
        return min(by_parameters, by_tensors)

    def summary(self) -> str:
        """One line."""
        params = sum(self.carried.values())
        text = (f'{self.backbone} from {self.source}: '
                f'{len(self.carried)} tensors ({params / 1e6:.2f} M '
                f'parameters) carried, {len(self.resized)} of them resized, '
                f'{len(self.new)} new, {len(self.left_out)} left out, '
                f'{len(self.unexpected)} unexpected')
        for what, names in (('missing', self.missing), ('of another shape',
                                                        self.misshapen)):
            if names:
                text += f', {len(names)} {what}'
        return text

    def lines(self) -> List[str]:
        """The report for a terminal."""
        lines = [self.summary()]
        if self.prefix:
            lines.append(f"  names in the file start with '{self.prefix}'")
        for name, (before, after) in self.resized.items():
            lines.append(f'  resized: {name} {before} -> {after}')
        for how, names in _by_value(self.new).items():
            start = ('as the backbone initialises them'
                     if how == 'init' else how)
            lines.append(f'  new, start: {start}: {_some(names)}')
        for why, names in _by_value(self.left_out).items():
            lines.append(f'  left out, {why}: {_some(names)}')
        lines += [f'  WARNING: {problem}' for problem in self.problems()]
        return lines

    def problems(self) -> List[str]:
        """What was not carried though it should fit, one item a kind."""
        shapes = [f'{name} {given} for {own}'
                  for name, (given, own) in self.misshapen.items()]
        return [f'{len(names)} {what}: {_some(list(names))}'
                for what, names in (('not in the file', self.missing),
                                    ('of another shape', shapes),
                                    ('unexpected', self.unexpected)) if names]


def _numel(shape: Shape) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _by_value(names: Dict[str, str]) -> Dict[str, List[str]]:
    groups: Dict[str, List[str]] = {}
    for name, value in names.items():
        groups.setdefault(value, []).append(name)
    return groups


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
