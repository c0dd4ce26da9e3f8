"""Draw what tools/benchmark_attention.py --sweep measured.

For each JSON file one PNG of the same name: time against N, with the points
where another layer and RPAttention cross; what training keeps in memory
against N; and, where the file holds operators, the share of the floor that
they reach (the time to move their tensors once, over their own).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import matplotlib
import numpy as np
from benchmarks.measure import crossovers, is_rp
from benchmarks.reports import run_tool

matplotlib.use('Agg')  # no screen needed

from matplotlib import pyplot as plt  # noqa: E402

IMAGES = Path(__file__).resolve().parents[1] / 'docs/images'
INK, SIZE = '#22303c', 8
# Okabe and Ito's colours, which colour-blind people can tell apart.
STYLES = {
    'projections': ('its projections alone', '#8a8f94'),
    'dense': ('dense, SDPA', '#d55e00'),
    'sdpa': ('SDPA', '#d55e00'),
    'sr': ('spatial reduction', '#b8860b'),
    'window': ('windows', '#009e73'),
    'agent': ('pooled agents', '#b5608f'),
    'rp-naive': ('RPAttention, naive', '#56b4e9'),
}
RP_COLOR = '#0062a3'
Curves = Dict[str, List[Tuple[int, float]]]


class Panel(NamedTuple):
    """Curves, and by RP's name where it crosses the others."""

    title: str
    unit: str
    curves: Curves
    crossed: Dict[str, Dict[str, List[float]]]
    yscale: str = 'log'


def style(peer: str) -> Tuple[str, str]:
    """Label and colour of a peer."""
    return STYLES.get(peer, ('RPAttention', RP_COLOR) if is_rp(peer)
                      else (peer, INK))


def curves(records: Sequence[Dict[str, Any]],
           values: Callable[[Dict[str, Any]], Dict[str, float]]) -> Curves:
    """(N, value) of each peer, by rising N."""
    found: Curves = {}
    for record in sorted(records, key=lambda r: r['case']['tokens']):
        for peer, value in values(record).items():
            found.setdefault(peer, []).append((record['case']['tokens'],
                                               value))
    return found


def find_crossovers(records: Sequence[Dict[str, Any]], rp: str
                    ) -> Dict[str, List[float]]:
    """N where the median ratio of RP over each other peer crosses 1."""
    ratios = curves(records, lambda r: {
        key.split('/')[1]: value['median']
        for key, value in r['ratios'].items() if key.split('/')[0] == rp})
    return {peer: crossovers(*zip(*points, strict=True))
            for peer, points in ratios.items()}


def spread(positions: Sequence[float], gap: float) -> List[float]:
    """Move positions apart, in their order, until all gaps are kept."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for _ in range(200):
        for low, high in zip(order, order[1:], strict=False):
            short = gap - (moved[high] - moved[low])
            if short > 0:
                moved[low] -= short / 2
                moved[high] += short / 2
    return moved


def draw(axes, panel: Panel) -> None:
    """Curves over log N, each with its name at its right end."""
    found = panel.curves
    for peer, points in found.items():
        axes.plot(*zip(*points, strict=True), color=style(peer)[1],
                  marker='o', markersize=2.2,
                  linewidth=2 if is_rp(peer) and peer != 'rp-naive' else 1.2,
                  # Above a curve that it may lie on, and lets show through.
                  linestyle='--' if peer == 'dense' else '-',
                  zorder=4 if peer == 'dense' else 3 if is_rp(peer) else 2)
    axes.set_xscale('log')
    axes.set_yscale(panel.yscale)
    if panel.yscale == 'linear':
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=SIZE + 1, color=INK, loc='left')
    axes.set_xlabel('tokens N', fontsize=SIZE, color=INK)
    axes.set_ylabel(panel.unit, fontsize=SIZE, color=INK)
    axes.tick_params(labelsize=SIZE - 1, colors=INK, which='both')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(linewidth=0.3, color='#d5dade')
    axes.margins(x=0.04)
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform(points[-1]) for points in found.values()]
    places = spread([y for _, y in ends], 0.065)
    for (x, _), y, (peer, points) in zip(ends, places, found.items(),
                                         strict=True):
        label, color = style(peer)
        axes.annotate(label, points[-1], (max(x, 0.96) + 0.045, y),
                      textcoords='axes fraction', fontsize=SIZE - 0.5,
                      color=color, va='center', annotation_clip=False,
                      arrowprops=dict(arrowstyle='-', color=color,
                                      linewidth=0.4, shrinkA=1, shrinkB=2))


def mark_crossovers(axes, points: Sequence[Tuple[float, float]],
                    crossed: Dict[str, List[float]]) -> None:
    """Rings on RPAttention's curve where it meets the others."""
    log_n, log_ms = np.log(np.array(points).T)
    rings = sorted((size, style(peer)[1]) for peer, sizes in crossed.items()
                   for size in sizes)
    for i, (size, color) in enumerate(rings):
        place = size, np.exp(np.interp(np.log(size), log_n, log_ms))
        axes.plot(*place, 'o', markersize=6, markerfacecolor='white',
                  markeredgecolor=color, zorder=4)
        # Neighbours have theirs on different sides of the curve.
        axes.annotate(f'{size:,.0f}'.replace(',', ' '), place,
                      ((4, -10), (-4, 7))[i % 2], fontsize=SIZE - 0.5,
                      textcoords='offset points', color=color, zorder=5,
                      ha=('left', 'right')[i % 2])


def panels(report: Dict[str, Any]) -> List[Panel]:
    """What there is to draw in a report; see the top of this file.

    Raises:
        ValueError: It holds nothing of several N.
    """
    rp = f'rp-{report["settings"].get("impls", [""])[0]}'
    groups: Dict[Tuple[str, str], List[Dict[str, Any]]] = {}
    for record in report['records']:
        if record.get('part') in ('layer', 'operator'):
            groups.setdefault((record['part'], record['mode']),
                              []).append(record)
    found = []
    for (part, mode), records in groups.items():
        if len({record['case']['tokens'] for record in records}) < 2:
            continue
        what = 'forward' if mode == 'forward' else 'forward and backward'
        if part == 'operator':
            found.append(Panel(f'Operator, {what}', 'share of the floor',
                               curves(records, floor_shares), {}, 'linear'))
            continue
        times = curves(records, lambda r: r['median_ms'])
        found.append(Panel(f'Time, {what}', 'milliseconds', times,
                           {rp: find_crossovers(records, rp)}))
        if mode == 'train':
            kept = curves(records, lambda r: {
                k: v / 1e6 for k, v in r['kept_bytes'].items()})
            found.append(Panel('Kept for backward', 'MB', kept, {}))
    if not found:
        raise ValueError('nothing of several N; measure it by '
                         'tools/benchmark_attention.py --sweep')
    return found


def floor_shares(record: Dict[str, Any]) -> Dict[str, float]:
    """The floor's time over that of each operator."""
    return {
        key.split('/')[0]: 1 / value['median']
        for key, value in record['ratios'].items() if key.endswith('/floor')
    }


def plot(report: Dict[str, Any], path: Path) -> None:
    """Draw one report, or raise ValueError; see :func:`panels`."""
    found = panels(report)
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False,
                                figsize=(4.4 * columns, 3.1 * rows))
    figure.subplots_adjust(wspace=0.85, hspace=0.4)
    for axis in axes.flat[len(found):]:
        axis.remove()
    for axis, panel in zip(axes.flat, found, strict=False):
        draw(axis, panel)
        for rp, crossed in panel.crossed.items():
            mark_crossovers(axis, panel.curves[rp], crossed)
    figure.savefig(path, dpi=150, bbox_inches='tight', pad_inches=0.05)
    plt.close(figure)


def body(argv: Sequence[str]) -> None:
    """Draw all files that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('json', type=Path, nargs='+')
    parser.add_argument('--out', type=Path, default=IMAGES,
                        help='folder of the pictures (default: docs/images)')
    args = parser.parse_args(argv)
    for path in (*args.json, args.out):
        if not path.exists():
            raise ValueError(f'{path} does not exist')
    for path in args.json:
        out = args.out / f'{path.stem}.png'
        try:
            plot(json.loads(path.read_text()), out)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        print(f'drawn {out}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool('plot_benchmarks', body, argv)


if __name__ == '__main__':
    sys.exit(main())
