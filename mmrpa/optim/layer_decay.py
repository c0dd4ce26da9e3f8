"""Layer-wise learning rate decay for whatever has an RP backbone in it."""

import difflib
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..arguments import check_number
from ..backbones import RPBackbone
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# Parameters of a backbone that are no weights of a linear map.
EMBEDDINGS = ('anchors', 'pos_embed', 'cls_token',
              'relative_position_bias_table')
OPTIONS = ('layer_decay_rate', 'custom_keys', 'norm_decay_mult',
           'bias_decay_mult', 'embed_decay_mult')
REST = 'output norms and all that is not the backbone'


@dataclass
class _Row:
    """One line of the printed table."""

    title: str
    lr: float
    scale: float
    decayed: int = 0
    exempt: int = 0


@dataclass
class _Groups:
    """Parameter groups by their settings, and the table of them."""

    groups: Dict[Tuple, Dict[str, Any]] = field(default_factory=dict)
    rows: Dict[Tuple, _Row] = field(default_factory=dict)
    custom: Set[str] = field(default_factory=set)
    frozen: int = 0


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Smaller learning rates for the earlier layers of RP backbones.

    A parameter at depth d of D (:meth:`RPBackbone.get_layer_depth`) learns at
    ``lr * layer_decay_rate ** (D - 1 - d)``: the stem slowest, output norms,
    neck and heads at ``lr``. Backbones are found wherever they are
    (``backbone``, ``detector.backbone``, a teacher and a student, ...).
    Norms, biases, anchors, class tokens and position tables are not decayed.
    The table of groups is printed once.

    Args:
        optim_wrapper_cfg (dict): The optimiser wrapper; its ``optimizer``
            needs ``lr``.
        paramwise_cfg (dict): ``layer_decay_rate`` (float): in (0, 1]; needed.
            ``custom_keys`` (dict): ``lr_mult``, ``decay_mult`` and other
            settings of the optimiser by a part of a parameter's name; the
            longest part that fits counts; ``lr_mult`` is in addition to the
            decay by depth, and only a ``decay_mult`` overrides the exemptions.
            ``norm_decay_mult``, ``bias_decay_mult``, ``embed_decay_mult``
            (float): factors on the weight decay of what is exempt; default 0.

    Raises:
        ValueError: An unknown key, a rate out of range, no ``lr``; or, when
            called, a model without an RP backbone or without any parameter
            to train.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmrpa.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.9))
    """

    def __init__(self,
                 optim_wrapper_cfg: dict,
                 paramwise_cfg: Optional[dict] = None) -> None:
        for name, value in (('optim_wrapper_cfg', optim_wrapper_cfg),
                            ('paramwise_cfg', paramwise_cfg)):
            if not isinstance(value, dict) and (name, value) != (
                    'paramwise_cfg', None):
                raise TypeError(f'{name} must be a dict, got {value!r}')
        if not isinstance(optim_wrapper_cfg.get('optimizer'), dict):
            raise TypeError('optim_wrapper_cfg needs a dict as optimizer, got '
                            f'{optim_wrapper_cfg.get("optimizer")!r}')
        custom = (paramwise_cfg or {}).get('custom_keys', {})
        if not isinstance(custom, dict) or not all(
                isinstance(options, dict) for options in custom.values()):
            raise TypeError('custom_keys of paramwise_cfg must have a dict by '
                            f'each name, got {custom!r}')
        decays = [n for n in OPTIONS[2:] if n in (paramwise_cfg or {})]
        if decays and optim_wrapper_cfg['optimizer'].get(
                'weight_decay') is None:
            raise ValueError(f'{decays[0]} of paramwise_cfg needs the '
                             'weight_decay of the optimizer')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for name in self.paramwise_cfg:
            if name not in OPTIONS:
                close = difflib.get_close_matches(name, OPTIONS, n=1,
                                                  cutoff=0.5)
                hint = f'; did you mean {close[0]!r}?' if close else ''
                raise ValueError(f'paramwise_cfg has an unknown key {name!r}'
                                 f'{hint} Allowed: {", ".join(OPTIONS)}')
        for name in ('norm_decay_mult', 'bias_decay_mult',
                     'embed_decay_mult'):
            check_number(f'{name} of paramwise_cfg',
                         self.paramwise_cfg.get(name, 0))
        for key, options in custom.items():
            wrong = [name for name in options if 'mul' in name
                     and name not in ('lr_mult', 'decay_mult')]
            if wrong:
                raise ValueError(f'custom_keys has {wrong[0]!r} under {key!r};'
                                 ' factors are lr_mult and decay_mult')
        self.rate = self.paramwise_cfg.get('layer_decay_rate')
        if (isinstance(self.rate, bool)
                or not isinstance(self.rate, (int, float))
                or not 0 < self.rate <= 1):
            raise ValueError('paramwise_cfg needs layer_decay_rate in (0, 1],'
                             f' got {self.rate!r}')
        if self.base_lr is None:
            raise ValueError('layer-wise decay needs the lr of the optimizer, '
                             f'got {dict(self.optimizer_cfg)}')

    def add_params(self,
                   params: List[dict],
                   module: nn.Module,
                   prefix: str = '',
                   is_dcn_module: Optional[int] = None) -> None:
        """Add the groups of all parameters of a model to ``params``.

        Args:
            params (list[dict]): Where to add them.
            module (nn.Module): The model.
            prefix (str): Not used: a model is taken as a whole.
            is_dcn_module (int, optional): Not used: there are no options for
                deformable convolutions.

        Raises:
            ValueError: No RP backbone in the model, or nothing to train.
        """
        backbones = {
            name + '.' * bool(name): child
            for name, child in module.named_modules()
            if isinstance(child, RPBackbone)
        }
        if not backbones:
            raise ValueError(
                'layer-wise decay needs an RPAttention backbone in the model, '
                f'and {type(module).__name__} has none; use '
                "constructor='DefaultOptimWrapperConstructor'")
        found = _Groups()
        for name, owner, param in _parameters(module):
            if param.requires_grad:
                self._add(found, backbones, name, owner, param)
            else:
                found.frozen += param.numel()
        if not found.groups:
            raise ValueError('all parameters of the model are frozen')
        params.extend(found.groups.values())
        unused = [key for key in self.paramwise_cfg.get('custom_keys', {})
                  if key not in found.custom]
        print_log(self._table(found, unused), logger='current')

    def _add(self, found: _Groups, backbones: Dict[str, RPBackbone],
             name: str, owner: nn.Module, param: nn.Parameter) -> None:
        prefix = max((p for p in backbones if name.startswith(p)), key=len,
                     default=None)
        depth, title, scale = -1, REST, 1.
        if prefix is not None:
            backbone = backbones[prefix]
            depth, count = backbone.get_layer_depth(name, prefix)
            scale = self.rate**(count - 1 - depth)
            if depth == count - 1:
                depth = -1
            else:
                title = prefix + _title(backbone, depth)
        custom = self._custom(name, found)
        scale *= custom.pop('lr_mult', 1.)
        decay = custom.pop('decay_mult', None)
        if decay is None:
            decay = self._decay_mult(name, owner, prefix is not None)
        settings = dict(lr=self.base_lr * scale, **custom)
        if self.base_wd is not None:
            settings['weight_decay'] = self.base_wd * decay
        key = tuple((k, repr(v)) for k, v in sorted(settings.items()))
        group = found.groups.setdefault(key, dict(params=[], **settings))
        group['params'].append(param)
        row = found.rows.setdefault(
            (depth if depth >= 0 else float('inf'), title, scale),
            _Row(title, settings['lr'], scale))
        if settings.get('weight_decay'):
            row.decayed += param.numel()
        else:
            row.exempt += param.numel()

    def _custom(self, name: str, found: _Groups) -> Dict[str, Any]:
        keys = self.paramwise_cfg.get('custom_keys', {})
        fitting = [key for key in sorted(keys) if key in name]
        if not fitting:
            return {}
        key = max(fitting, key=len)
        found.custom.add(key)
        return dict(keys[key])

    def _decay_mult(self, name: str, owner: nn.Module,
                    in_backbone: bool) -> float:
        last = name.rpartition('.')[2]
        if isinstance(owner, NORMS):
            return self.paramwise_cfg.get('norm_decay_mult', 0.)
        if last == 'bias' or last.endswith('_bias'):
            return self.paramwise_cfg.get('bias_decay_mult', 0.)
        if in_backbone and last in EMBEDDINGS:
            return self.paramwise_cfg.get('embed_decay_mult', 0.)
        return 1.

    def _table(self, found: _Groups, unused: List[str]) -> str:
        lines = [
            f'layer-wise learning rates, {len(found.groups)} groups, '
            f'layer_decay_rate={self.rate}, weight_decay={self.base_wd}:',
            f'{"lr":>10} {"lr scale":>9} {"decayed":>11} {"not decayed":>11}'
            '  parameters of'
        ]
        for _, row in sorted(found.rows.items()):
            lines.append(f'{row.lr:10.3e} {row.scale:9.4f} {row.decayed:11d} '
                         f'{row.exempt:11d}  {row.title}')
        if found.frozen:
            lines.append(f'{"frozen":>10} {"":9} {found.frozen:11d}')
        if unused:
            lines.append('custom_keys that no parameter has in its name: '
                         f'{", ".join(unused)}')
        return '\n'.join(lines)


def _parameters(
        model: nn.Module) -> Iterator[Tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter once, with its name and the module that owns it."""
    seen = set()
    for prefix, owner in model.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if param not in seen:
                seen.add(param)
                yield f'{prefix}.{name}' if prefix else name, owner, param


def _title(backbone: RPBackbone, depth: int) -> str:
    """What stands at a depth: ``'stem'`` or ``'stages.1.blocks.0'``."""
    if depth == 0:
        return 'stem'
    blocks = [(stage, block)
              for stage, count in enumerate(backbone.arch['depths'])
              for block in range(count)]
    return 'stages.{}.blocks.{}'.format(*blocks[depth - 1])
