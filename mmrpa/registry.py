"""The registry nodes through which every MM host finds what mmrpa has.

``Registry.get('mmrpa.RPSwin')`` of any host imports this module, then the
``locations`` below, so a config needs no ``custom_imports``. mmengine swallows
an ImportError raised while *this* module is imported and reports an unrelated
assertion instead; hence nothing but mmengine may be imported here.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmrpa',
    locations=['mmrpa.backbones'])
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmrpa', locations=['mmrpa.hooks'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmrpa',
    locations=['mmrpa.optim'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmrpa',
    locations=['mmrpa.optim'])
