"""The registry node through which every MM host finds mmrpa's models.

``Registry.get('mmrpa.RPSwin')`` of any host imports this module, then the
``locations`` below, so a config needs no ``custom_imports``. mmengine swallows
an ImportError raised while *this* module is imported and reports an unrelated
assertion instead; hence nothing but mmengine may be imported here.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmrpa',
    locations=['mmrpa.backbones'])
