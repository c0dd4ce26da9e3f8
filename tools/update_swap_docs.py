"""Write the tables of docs/swap.md from docs/swap-survey.json."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swap_survey.summary import FAMILIES

from mmrpa.whole_files import whole_file

DOCS = Path(__file__).resolve().parents[1] / 'docs'
BEGIN = '<!-- made by tools/update_swap_docs.py: do not edit -->'
END = '<!-- end -->'
Group = Mapping[str, Any]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write the tables of a page, between its two markers, '
        'from what tools/survey_swaps.py --summary wrote.')
    parser.add_argument(
        '--survey', type=Path, default=DOCS / 'swap-survey.json')
    parser.add_argument('--page', type=Path, default=DOCS / 'swap.md')
    return parser.parse_args(argv)


def _count(groups: Iterable[Group], *outcomes: str) -> tuple[int, int]:
    """Groups and configs of these outcomes, of all if none is named."""
    chosen = [g for g in groups if not outcomes or g['outcome'] in outcomes]
    return len(chosen), sum(g['configs'] for g in chosen)


def _row(*cells: object) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def _table(header: Sequence[str], rows: Iterable[str]) -> list[str]:
    return [_row(*header), _row(*['---'] * len(header)), *rows]


def _family_row(name: str, groups: Sequence[Group]) -> str:
    cells = [_count(groups, *outcome) for outcome in (
        ('ran', ), ('refused', ), ('failed', ), ('broken', ), ())]
    ran, total = cells[0], cells[-1]
    share = ' | '.join(f'{100 * a / b:.1f} %' if b else '-' for a, b in
                       zip(ran[::-1], total[::-1], strict=True))
    return _row(name, *(f'{configs} ({number})' for number, configs in cells),
                share)


def render(survey: Mapping[str, Any]) -> str:
    """The tables.

    Args:
        survey (Mapping): What ``survey_swaps.py --summary`` wrote.

    Returns:
        str: Markdown, without the markers.
    """
    readable = [g for g in survey['groups'] if g['outcome'] != 'unreadable']
    models = [g for g in readable if g['reason'] not in ('no model', )]
    named = [g for g in models if g['family'] in FAMILIES]
    header = ('old backbone', 'swapped and run', 'refused', 'failed',
              'fails as shipped, too', 'all', 'run, of configs',
              'run, of groups')
    rows = [_family_row(name, [g for g in models if g['family'] == name])
            for name in FAMILIES]
    rows += [_family_row('**these together**', named),
             _family_row('any other', [g for g in models
                                       if g['family'] not in FAMILIES]),
             _family_row('**all**', models)]
    versions = ', '.join(f'{k} {v}' for k, v in survey['versions'].items())
    unreadable = _count(survey['groups'], 'unreadable')[1]
    parts = sum(g['configs'] for g in readable if g['reason'] == 'no model')
    plain = _count([g for g in models if g['outcome'] == 'ran'
                    and g['arch'] == survey['settings']['plain_arch']])
    lines = [
        f'With `{survey["settings"]["arch"]}`; {plain[1]} configs '
        f'({plain[0]} groups) read several maps of one stride and got '
        f'`{survey["settings"]["plain_arch"]}`. {versions}, Python '
        f'{survey["python"]}, on a CPU.', '',
        f'Configs, and in parentheses groups. Not counted: {unreadable} '
        f'configs that the host itself cannot read, {parts} files that are '
        'parts of configs without a model.', '',
        *_table(header, rows), '', 'Refused:', '',
        *_table(('reason', 'configs (groups)', 'of the ten families',
                 'backbones or models, an example'),
                _reasons(models, 'refused'))
    ]
    for outcome, title in (
            ('failed', 'Failed:'),
            ('broken', 'Fails in this step as the host ships it, too; the '
             'error after the swap:')):
        if any(g['outcome'] == outcome for g in models):
            lines += ['', title, '', *_table(
                ('error', 'configs (groups)', 'of the ten families',
                 'an example'), _reasons(models, outcome))]
    loose = [g for g in models if g.get('without_gradient')]
    if loose:
        groups, configs = _count(loose)
        lines += ['', f'In {configs} ({groups}) of those that run, some '
                  'parameters of the backbone get no gradient in the step '
                  f'(for example `{loose[0]["example"]}`): distributed '
                  'training needs `find_unused_parameters=True` there.']
    return '\n'.join(lines)


def _reasons(groups: Sequence[Group], outcome: str) -> Iterable[str]:
    """A row a reason, the most frequent first."""
    reasons: dict[str, list[Group]] = {}
    for group in groups:
        if group['outcome'] == outcome:
            reasons.setdefault(_cell(group['reason']), []).append(group)
    ordered = sorted(reasons.items(),
                     key=lambda item: (-_count(item[1])[1], item[0]))
    for reason, found in ordered:
        number, configs = _count(found)
        families = [g for g in found if g['family'] in FAMILIES]
        yield _row(reason, f'{configs} ({number})', _count(families)[1],
                   f'`{found[0]["host"]}::{found[0]["example"]}`')


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table."""
    return text.replace('|', '/').replace('`', "'")[:160]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    for path in (args.survey, args.page):
        if not path.is_file():
            print(f'update_swap_docs: error: no such file: {path}',
                  file=sys.stderr)
            return 2
    text = args.page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f'update_swap_docs: error: {args.page} needs {BEGIN!r} and '
              f'{END!r}, once each', file=sys.stderr)
        return 2
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = render(json.loads(args.survey.read_text()))
    with whole_file(args.page) as draft:
        draft.write_text(f'{before}{BEGIN}\n\n{tables}\n\n{END}{after}')
    print(f'wrote {args.page}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
