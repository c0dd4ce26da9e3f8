"""Saying in words what a file of weights looks like."""

import re
from dataclasses import dataclass
from typing import Dict, Mapping, Optional, Tuple

from torch import Tensor

from .archs import known_archs
from .sources import Canonical

FAMILY_TITLES = dict(deit='DeiT', pvt='PVT', swin='Swin', cswin='CSWin')
# An RP backbone is known by the attention it replaces.
FAMILY_OF_ATTENTION = dict(dense='deit', sr='pvt', window='swin',
                           cross='cswin')
# Others that people are likely to try, by a name that gives them away.
_OTHERS = (
    (r'block1\.0\.mlp\.dwconv\.', 'PVT v2, which is another network than PVT'),
    (r'layers\.0\.1\.0\.attn\.attn\.in_proj_weight',
     'PVT v2 or SegFormer, which are other networks than PVT'),
    (r'blocks\.0\.attn\.(w_msa\.)?(cpb_mlp|logit_scale)',
     'Swin V2, which is another network than Swin'),
    (r'features\.1\.0\.attn\.relative_position_bias_table',
     "torchvision's Swin; use the weights of the official repository, timm "
     'or mmpretrain'),
    (r'layer1\.0\.conv\d\.weight', 'a ResNet'),
    (r'(downsample_layers|stages)\.0\.0\.(weight|dwconv|depthwise_conv|'
     r'gamma)', 'a ConvNeXt'),
    (r'(embeddings|encoder\.layer)\.', 'a model of Hugging Face transformers; '
     'use the weights of the official repository, timm or mmpretrain'),
    (r'lora_', 'LoRA adapters, not a whole network'),
)


@dataclass
class Look:
    """The sizes of a network, read from its tensors.

    Args:
        family (str): ``'deit'``, ``'pvt'``, ``'swin'`` or ``'cswin'``.
        embed_dims (tuple[int]): One a stage.
        depths (tuple[int]): Blocks of each stage.
        mlp_ratios (tuple[float]): One a stage.
        num_heads (tuple[int | None]): One a stage, where a tensor tells.
        archs (tuple[str]): Names of the archs of this size.
    """

    family: str
    embed_dims: Tuple[int, ...]
    depths: Tuple[int, ...]
    mlp_ratios: Tuple[float, ...]
    num_heads: Tuple[Optional[int], ...]
    archs: Tuple[str, ...] = ()

    def __str__(self) -> str:
        title = FAMILY_TITLES[self.family]
        if self.family == 'deit':
            return (f'{title} with embed_dims {self.embed_dims[0]} and depth '
                    f'{len(self.depths)}')
        return (f'{title} with embed_dims {self.embed_dims} and depths '
                f'{self.depths}')

    def advice(self) -> str:
        """Which ``--arch`` to use."""
        if self.archs:
            return f'--arch {" or ".join(self.archs)} fits it'
        # What can not be read from tensors is left to the user.
        values = dict(embed_dims=self.embed_dims, depths=self.depths,
                      num_heads=self.num_heads, mlp_ratios=self.mlp_ratios)
        if self.family == 'deit':
            values = {key: value[:1] for key, value in values.items()}
            values['depths'] = (len(self.depths), )
        options = (f'arch.{key}=' + ','.join(
            '?' if one is None else f'{one:g}' for one in value)
            for key, value in values.items())
        return ('no arch has its size: describe it by --options ' +
                ' '.join(options))


def family_of(tensors: Mapping[str, Tensor]) -> str:
    """The family of canonical weights, from what only that family has."""
    if 'stem.patch_embed.projection.weight' in tensors:
        return 'deit'
    if any(re.fullmatch(r'stages\.\d+\.downsample\.reduction\..*', name)
           for name in tensors):
        return 'swin'
    if any(re.fullmatch(r'stages\.\d+\.pos_embed\..*', name)
           for name in tensors):
        return 'pvt'
    projection = tensors.get('stem.projection.weight')
    return ('cswin' if projection is not None
            and projection.shape[-1:] == (7, ) else 'swin')


def look_at(weights: Canonical) -> Look:
    """Read the sizes of a network from its weights."""
    tensors = weights.tensors
    family = family_of(tensors)
    dims: Dict[int, int] = {}
    blocks: Dict[int, int] = {}
    hidden: Dict[int, int] = {}
    heads: Dict[int, int] = {}
    for name, value in tensors.items():
        m = re.fullmatch(r'stages\.(\d+)\.blocks\.(\d+)\.(.*)', name)
        if not m or not value.dim():
            continue
        stage = int(m[1])
        blocks[stage] = max(blocks.get(stage, 0), int(m[2]) + 1)
        if m[3] == 'norm1.weight':
            dims[stage] = value.shape[0]
        elif m[3] == 'ffn.0.weight':
            hidden[stage] = value.shape[0]
        elif (m[3] == 'attn.relative_position_bias_table'
              and value.dim() == 2):
            heads[stage] = value.shape[1]
        elif m[3] == 'attn.interact_weight' and value.dim() == 4:
            heads[stage] = value.shape[1]
    stages = sorted(set(blocks) & set(dims) & set(hidden))
    look = Look(family, tuple(dims[i] for i in stages),
                tuple(blocks[i] for i in stages),
                tuple(hidden[i] / dims[i] for i in stages),
                tuple(heads.get(i) for i in stages))
    look.archs = _fitting(look)
    return look


def _fitting(look: Look) -> Tuple[str, ...]:
    names = []
    for name, (cls, arch) in known_archs().items():
        if FAMILY_OF_ATTENTION[cls.own_attention] != look.family:
            continue
        zoo = dict(cls.arch_zoo[arch])
        depth = zoo['depths']
        depths = (1, ) * depth if isinstance(depth, int) else depth
        wide = {key: _each(zoo[key], len(depths))
                for key in ('embed_dims', 'mlp_ratios')}
        if (tuple(depths) == look.depths
                and wide['embed_dims'] == look.embed_dims
                and wide['mlp_ratios'] == look.mlp_ratios):
            names.append(name)
    return tuple(names)


def _each(value, count: int) -> Tuple:
    return tuple(value) if isinstance(value, tuple) else (value, ) * count


def describe_unknown(state_dict: Mapping[str, Tensor]) -> str:
    """What weights look like that no style fits."""
    for pattern, title in _OTHERS:
        if any(re.search(pattern, name) for name in state_dict):
            return f'it looks like {title}'
    names = ', '.join(list(state_dict)[:3])
    return (f'its {len(state_dict)} tensors have names of another kind '
            f'({names}, ...)')
