"""The backbones that can be swapped in, by names such as rp_swin_tiny."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..weights.archs import known_archs
from .report import SwapError, SwapRefused

_ARCHS = known_archs()
NAMES = tuple(_ARCHS)
# Stochastic depth, as in configs/: for dense tasks mmdet's 12 epochs need
# less of it than mmseg's 160k iterations.
_DROP_PATH = {
    'mmdet': dict(swin=dict(tiny=0.2, small=0.3, base=0.3),
                  cswin=dict(tiny=0.2, small=0.3, base=0.5)),
    'mmseg': dict(swin=dict(tiny=0.3, small=0.3, base=0.3),
                  cswin=dict(tiny=0.3, small=0.4, base=0.5)),
    'mmpretrain': dict(swin=dict(tiny=0.2, small=0.3, base=0.5),
                       cswin=dict(tiny=0.2, small=0.4, base=0.5)),
}
_DROP_PATH_PVT = dict(tiny=0.1, small=0.1, medium=0.3, large=0.3)


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name (str): Such as ``'rp_swin_tiny'``.
        family (str): ``'deit'``, ``'pvt'``, ``'swin'`` or ``'cswin'``.
        size (str): A key of the family's ``arch_zoo``.
        channels (tuple[int]): Channels of each stage, of each block of DeiT.
        strides (tuple[int]): Image pixels a cell, of each of them.
    """

    name: str
    family: str
    size: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether all maps have one stride."""
        return len(set(self.strides)) == 1

    @property
    def title(self) -> str:
        """The type and arch, for messages."""
        return f'{self.type} {self.size}'

    @property
    def type(self) -> str:
        """The type that a config names."""
        return f'mmrpa.{_ARCHS[self.name][0].__name__}'

    def config(self, host: str, **options: object) -> dict:
        """The backbone's config, with what ``configs/`` sets for a host."""
        if self.family in _DROP_PATH[host]:
            rate = _DROP_PATH[host][self.family][self.size]
        elif self.family == 'pvt':
            rate = _DROP_PATH_PVT[self.size]
        else:
            rate = 0.1
        return dict(type=self.type, arch=self.size, drop_path_rate=rate,
                    **options)

    def blocks(self, count: int) -> tuple[int, ...]:
        """``count`` blocks of a plain backbone, evenly spaced, last one last.

        Raises:
            SwapRefused: There are not so many.
        """
        depth = len(self.strides)
        if count > depth:
            raise SwapRefused(
                'more maps than the plain backbone has blocks',
                f'{count} maps are read, {self.title} has {depth} blocks')
        return tuple(depth * (i + 1) // count - 1 for i in range(count))

    def stages(self, strides: Sequence[int]) -> tuple[int, ...]:
        """The stages of a pyramid that have these strides.

        Raises:
            SwapRefused: A stride that no stage has, or one twice.
        """
        odd = sorted(set(strides) - set(self.strides))
        if odd:
            raise SwapRefused(
                'odd stride',
                f'maps of stride {", ".join(map(str, odd))} are read; '
                f'{self.title} has {", ".join(map(str, self.strides))}')
        if len(set(strides)) != len(strides):
            raise SwapRefused(
                'several maps of one stride',
                f'maps of strides {tuple(strides)} are read, and a pyramid '
                'has one of each; rp_deit_* has one map a block')
        return tuple(self.strides.index(stride) for stride in strides)


def parse_arch(name: str) -> Arch:
    """Find an arch by name; hyphens are as good as underscores.

    Raises:
        SwapError: No such arch; the message suggests some.
    """
    plain = name.replace('-', '_').lower() if isinstance(name, str) else ''
    if plain not in NAMES:
        close = difflib.get_close_matches(plain, NAMES, n=2)
        hint = f' Did you mean {" or ".join(close)}?' if close else ''
        raise SwapError(f'no arch {name!r}.{hint} Archs: {", ".join(NAMES)}')
    cls, size = _ARCHS[plain]
    family = plain.split('_')[1]
    zoo = cls.arch_zoo[size]
    if family == 'deit':
        channels = (zoo['embed_dims'], ) * zoo['depths']
        strides = (cls.patch_size, ) * zoo['depths']
    else:
        channels = tuple(zoo['embed_dims'])
        strides = tuple(cls.patch_size * 2**i for i in range(len(channels)))
    return Arch(plain, family, size, channels, strides)
