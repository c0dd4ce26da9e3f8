"""Draw docs/images/architecture.png: python docs/draw_architecture.py"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK = '#22303c'
GATHER, INTERACT = '#2f6fb3', '#3f8f4f'
DISTRIBUTE, LOCAL = '#7a4fb0', '#b8860b'
SIZE = 9


def tint(color: str) -> str:
    """A pale version of a colour, for panels."""
    rgb = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    return '#' + ''.join(f'{255 - (255 - c) // 9:02x}' for c in rgb)


def box(axes, x, y, text, color=INK, width=1.3, height=0.62, fill='white'):
    """A rounded box centred at (x, y)."""
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                       boxstyle='round,pad=0,rounding_size=0.09',
                       linewidth=1.3, edgecolor=color, facecolor=fill,
                       zorder=3))
    axes.text(x, y, text, ha='center', va='center', fontsize=SIZE, color=INK,
              zorder=4, linespacing=1.35)


def panel(axes, x0, x1, y0, y1, title, color):
    """A tinted background with a title on top."""
    axes.add_patch(
        FancyBboxPatch((x0, y0), x1 - x0, y1 - y0,
                       boxstyle='round,pad=0,rounding_size=0.15', linewidth=0,
                       facecolor=tint(color), zorder=0))
    axes.text((x0 + x1) / 2, y1 - 0.26, title, ha='center', va='center',
              fontsize=SIZE + 2, color=color, weight='bold')


def arrow(axes, *points, text='', at=(0, 0)):
    """A line through points with a head at the end."""
    for start, end in pairwise(points):
        last = end == points[-1]
        axes.add_patch(
            FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, linewidth=1.2,
                            color=INK, mutation_scale=9, zorder=2,
                            arrowstyle='-|>' if last else '-'))
    if text:
        axes.text(*at, text, ha='center', va='center', fontsize=SIZE - 1.5,
                  color=INK, style='italic')


def main() -> None:
    """Draw and save the figure."""
    figure, axes = plt.subplots(figsize=(10.4, 4.1))
    axes.set_xlim(0, 14.6)
    axes.set_ylim(-0.15, 5.6)
    axes.axis('off')
    panel(axes, 2.75, 6.6, 0.95, 4.55, 'Gather', GATHER)
    panel(axes, 6.85, 9.75, 0.95, 3.05, 'Interact', INTERACT)
    panel(axes, 10.0, 12.05, 0.95, 5.5, 'Distribute', DISTRIBUTE)

    box(axes, 0.55, 3.2, 'tokens\n$N\\times C$', width=0.95, height=0.8)
    for y, name in ((4.9, 'Q'), (3.2, 'K'), (1.55, 'V')):
        box(axes, 2.0, y, f'${name}$', width=0.7)
        arrow(axes, (1.03, 3.2), (1.3, 3.2), (1.3, y), (1.65, y))

    box(axes, 4.0, 3.2, 'softmax$_M(K A^\\top)$\nrouting $P$', GATHER, 1.95,
        0.85)
    box(axes, 5.8, 3.2, '$P^\\top K$\n/ mass', GATHER, 0.95, 0.85)
    box(axes, 5.8, 1.55, '$P^\\top V$\n/ mass', GATHER, 0.95, 0.85)
    axes.text(4.0, 2.35, 'learned anchors $A$', ha='center', va='center',
              fontsize=SIZE - 1, color=GATHER, style='italic')
    arrow(axes, (2.35, 3.2), (3.02, 3.2))
    arrow(axes, (4.98, 3.2), (5.32, 3.2))
    arrow(axes, (5.15, 3.2), (5.15, 2.0), (5.15, 1.72), (5.32, 1.72))
    arrow(axes, (2.62, 3.2), (2.62, 4.0), (5.8, 4.0), (5.8, 3.63))
    arrow(axes, (2.35, 1.38), (5.32, 1.38))

    box(axes, 8.3, 1.55, 'self-attention of\n$M$ representatives',
        INTERACT, 2.5, 0.85)
    arrow(axes, (6.28, 1.55), (7.05, 1.55), text='$Z$', at=(6.72, 1.76))
    box(axes, 11.03, 2.75,
        'softmax$(Q K_{rep}^\\top$\n$/ \\sqrt{d}\\,)\\;V_{rep}$', DISTRIBUTE,
        1.8, 1.0)
    arrow(axes, (6.28, 3.2), (7.4, 3.2), (9.2, 3.2), (9.2, 2.95),
          (10.13, 2.95), text='$K_{rep}$   $M\\times d$', at=(7.75, 3.42))
    arrow(axes, (9.55, 1.55), (9.88, 1.55), (9.88, 2.5), (10.13, 2.5),
          text='$V_{rep}$', at=(9.92, 1.3))
    arrow(axes, (2.35, 4.9), (11.03, 4.9), (11.03, 3.25))

    box(axes, 8.3, 0.35, 'depth-wise convolution, $H\\times W$ grid',
        LOCAL, 4.4, 0.55, tint(LOCAL))
    arrow(axes, (2.5, 1.38), (2.5, 0.35), (6.1, 0.35))
    box(axes, 12.75, 2.75, '+', width=0.42, height=0.45)
    arrow(axes, (11.93, 2.75), (12.54, 2.75))
    arrow(axes, (10.5, 0.35), (12.75, 0.35), (12.75, 2.52))
    box(axes, 13.7, 2.75, 'proj', width=0.7)
    arrow(axes, (12.96, 2.75), (13.35, 2.75))
    arrow(axes, (14.05, 2.75), (14.5, 2.75))
    axes.text(2.62, 5.2, '$N$ tokens, $M\\ll N$ representatives, one head of '
              '$d$ channels; cost $O(NM)$', fontsize=SIZE - 1, color=INK,
              va='center')
    out = Path(__file__).parent / 'images' / 'architecture.png'
    figure.savefig(out, dpi=200, bbox_inches='tight', pad_inches=0.05)


if __name__ == '__main__':
    main()
