"""Fill params, MACs and FLOPs into the tables of configs/*/README.md."""

import argparse
import re
import sys
from pathlib import Path
from typing import Optional, Sequence

from get_flops import get_flops

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
# | [name](path) | params | MACs | FLOPs | accuracy |
ROW = re.compile(r'^(\| \[[^]]+\]\(([^)]+\.py)\) \|)[^|]*\|[^|]*\|[^|]*\|')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'readme',
        type=Path,
        nargs='*',
        default=sorted(CONFIGS.glob('*/README.md')),
        help='files to fill; all hosts if none is named')
    return parser.parse_args(argv)


def fill_row(line: str, folder: Path) -> str:
    """Fill one line of a README; what is no row of a config stays."""
    row = ROW.match(line)
    if row is None:
        return line
    model = get_flops(str(folder / row[2]))['model']
    cells = (model['params'] / 1e6, model['macs'] / 1e9,
             2 * model['macs'] / 1e9)
    filled = ' '.join(f'{cell:.1f} |' for cell in cells)
    return f'{row[1]} {filled}{line[row.end():]}'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    for path in parse_args(argv).readme:
        if not path.is_file():
            print(f'no such file: {path}', file=sys.stderr)
            return 2
        lines = path.read_text().splitlines()
        text = '\n'.join(fill_row(line, path.parent) for line in lines) + '\n'
        path.write_text(text)
        print(f'filled {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
