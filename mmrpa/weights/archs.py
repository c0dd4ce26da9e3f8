"""The backbones by one name each, such as ``rp_swin_tiny``."""

import difflib
from typing import Any, Dict, Tuple

FAMILIES = ('RPDeiT', 'RPPVT', 'RPSwin', 'RPCSWin')


def known_archs() -> Dict[str, Tuple[type, str]]:
    """Backbone class and arch by the one name of both."""
    # Not at the top: backbones import this package to load weights.
    from .. import backbones
    classes = (getattr(backbones, name) for name in FAMILIES)
    return {
        f'rp_{cls.__name__[2:].lower()}_{arch}': (cls, arch)
        for cls in classes for arch in cls.arch_zoo
    }


def arch_names() -> Tuple[str, ...]:
    """All names that :func:`build_arch` knows."""
    return tuple(known_archs())


def build_arch(name: str, **options: Any):
    """Build a backbone by its name.

    Args:
        name (str): ``rp_deit_tiny``, ..., ``rp_cswin_base``.
        **options: Arguments of the backbone, which refuses unknown ones.

    Returns:
        RPBackbone: The backbone, newly initialised.

    Raises:
        TypeError: The backbone has no such argument.
        ValueError: No such name, or a value that does not fit.
    """
    archs = known_archs()
    if not isinstance(name, str):
        raise TypeError(f'name must be a string, got {name!r}')
    if name not in archs:
        close = difflib.get_close_matches(name, archs, n=1)
        hint = f'did you mean {close[0]!r}? ' if close else ''
        raise ValueError(f'unknown arch {name!r}; {hint}'
                         f'Known: {", ".join(archs)}')
    cls, arch = archs[name]
    return cls(**{'arch': arch, **options})
