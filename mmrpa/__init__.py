"""RPAttention backbones for mmdet, mmsegmentation and mmpretrain.

Importing this package registers nothing and needs nothing: the hosts find
``type='mmrpa.RPSwin'`` through :mod:`mmrpa.registry`.
"""

__version__ = '0.1.0'
__all__ = ['swap_backbone']


def __getattr__(name: str) -> object:
    """Import on first use what needs torch and mmengine."""
    if name == 'swap_backbone':
        from .swap import swap_backbone
        return swap_backbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
