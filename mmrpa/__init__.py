"""RPAttention backbones for mmdet, mmsegmentation and mmpretrain.

Importing this package registers nothing and needs nothing: the hosts find
``type='mmrpa.RPSwin'`` through :mod:`mmrpa.registry`.
"""

__version__ = '0.1.0'
