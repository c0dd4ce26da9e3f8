"""RPAttention backbones for mmdet, mmsegmentation and mmpretrain.

Importing this package registers nothing and needs nothing: the hosts find
``type='mmrpa.RPSwin'`` through :mod:`mmrpa.registry`.
"""

__version__ = '0.1.0'
# What each release of torch brought that mmrpa cannot do without, by its
# sources: 2.4 custom operators with gradients (torch.library.custom_op) and
# is_autocast_enabled(device_type); 2.6 stand-ins by name for what weights_only
# refuses (safe_globals), without which no training could be resumed, and a
# weights_only that keeps code out (CVE-2025-32434). setup.cfg has the same.
OLDEST_TORCH = (2, 6)
__all__ = ['swap_backbone']


def __getattr__(name: str) -> object:
    """Import on first use what needs torch and mmengine."""
    if name == 'swap_backbone':
        from .swap import swap_backbone
        return swap_backbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
