"""The names that public checkpoints use, and what they are here.

A style is one way of naming a family: its marks, two names that tell it from
all others, and rules from a name to ours. Names are facts read from the
official repositories, timm 1.0, mmpretrain 1.x, mmdet 3.x and mmseg 1.x.

The result is *canonical*: our names with a fused ``attn.qkv`` in every block,
whatever attention the source has.
"""

import re
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

Rule = Tuple[str, Callable[[re.Match], Optional[str]]]

# Inside a block; the first that matches counts.
_IN_BLOCK = tuple((re.compile(old), new) for old, new in (
    (r'(norm\d\..*)', r'\1'),
    (r'ln(\d\..*)', r'norm\1'),
    (r'attn\.w_msa\.(.*)', r'attn.\1'),
    (r'attn\.attn\.in_proj_(.*)', r'attn.qkv.\1'),
    (r'attn\.attn\.out_proj\.(.*)', r'attn.proj.\1'),
    (r'(?:attn\.gamma1\.weight|ls1\.gamma|gamma_1)', 'scale1'),
    (r'(?:ffn\.gamma2\.weight|ls2\.gamma|gamma_2)', 'scale2'),
    (r'(attn\..*)', r'\1'),
    (r'((?:qkv|proj)\..*)', r'attn.\1'),
    (r'attns\.(\d)\.get_v\.(.*)', r'attn.lepe.\1.\2'),
    (r'mlp\.fc1\.(.*)', r'ffn.0.\1'),
    (r'mlp\.fc2\.(.*)', r'ffn.3.\1'),
    (r'ffn\.layers\.0\.0\.(.*)', r'ffn.0.\1'),
    (r'ffn\.layers\.1\.(.*)', r'ffn.3.\1'),
    (r'ffn\.layers\.([03]\..*)', r'ffn.\1'),
    (r'(ffn\.[03]\..*)', r'\1'),
))
# Buffers that follow from the window size or the image size.
_BUFFERS = re.compile(r'.*(relative_position_index|attn_mask'
                      r'|atten_mask_matrix)$')
_HEADS = re.compile(r'(head|head_dist|fc_norm|pre_logits|cls_head|fc)\..*')


@dataclass(frozen=True)
class Style:
    """One way of naming the tensors of one family.

    Args:
        family (str): ``'deit'``, ``'pvt'``, ``'swin'``, ``'cswin'``, or
            ``'mmrpa'`` for this project's own checkpoints.
        title (str): Whose names they are, in words.
        marks (tuple[str, str]): Patterns of two names without the prefix.
        rules (tuple): Patterns of names and their canonical names; None is
            returned for what has no place in an RP backbone.
        unfold (bool): Patch merging orders its channels as nn.Unfold does.
    """

    family: str
    title: str
    marks: Tuple[str, str]
    rules: Tuple[Rule, ...]
    unfold: bool = False


def _block(m: re.Match, stage: int, block: int, rest: str) -> Optional[str]:
    for old, new in _IN_BLOCK:
        found = old.fullmatch(rest)
        if found:
            return f'stages.{stage}.blocks.{block}.{found.expand(new)}'
    return f'?{m[0]}'


def _final_norm(m: re.Match) -> str:
    return f'norm_final.norm.{m[1]}'


def _deit(blocks: str) -> Tuple[Rule, ...]:
    return (
        (r'patch_embed\.proj(?:ection)?\.(.*)',
         lambda m: f'stem.patch_embed.projection.{m[1]}'),
        (r'(cls_token|dist_token)', lambda m: f'stem.{m[1]}'),
        (r'pos_embed', lambda m: 'stem.pos_embed.pos_embed'),
        (blocks + r'\.(\d+)\.(.*)', lambda m: _block(m, int(m[1]), 0, m[2])),
        (r'(?:norm|ln1|norm1)\.(.*)', _final_norm),
    )


def _swin(stages: str, shift: int) -> Tuple[Rule, ...]:
    """``shift`` 1: a stage's merging stands at the end of the one before."""
    return (
        (r'patch_embed\.proj(?:ection)?\.(.*)',
         lambda m: f'stem.projection.{m[1]}'),
        (r'patch_embed\.(norm\..*)', lambda m: f'stem.{m[1]}'),
        (stages + r'(\d+)\.downsample\.((?:norm|reduction)\..*)',
         lambda m: f'stages.{int(m[1]) + shift}.downsample.{m[2]}'),
        (stages + r'(\d+)\.blocks\.(\d+)\.(.*)',
         lambda m: _block(m, int(m[1]), int(m[2]), m[3])),
        (r'norm\.(.*)', _final_norm),
        (r'norm(\d)\.(.*)', lambda m: f'norm{m[1]}.norm.{m[2]}'),
    )


def _pvt_embed(m: re.Match, stage: int, rest: str) -> str:
    rest = rest.replace('proj.', 'projection.')
    return f'stages.{stage}.downsample.{rest}' if stage else f'stem.{rest}'


_PVT = (
    (r'patch_embed(\d)\.((?:proj|norm)\..*)',
     lambda m: _pvt_embed(m, int(m[1]) - 1, m[2])),
    (r'pos_embed(\d)',
     lambda m: f'stages.{int(m[1]) - 1}.pos_embed.pos_embed'),
    (r'cls_token', lambda m: 'stem.cls_token'),
    (r'block(\d)\.(\d+)\.(.*)',
     lambda m: _block(m, int(m[1]) - 1, int(m[2]), m[3])),
    (r'norm\.(.*)', _final_norm),
    (r'norm(\d)\.(.*)', lambda m: f'norm{int(m[1]) - 1}.norm.{m[2]}'),
)
# The position table is the first entry of a stage's list of blocks.
_PVT_MM = (
    (r'layers\.(\d)\.0\.projection\.(.*)',
     lambda m: _pvt_embed(m, int(m[1]), f'proj.{m[2]}')),
    (r'layers\.(\d)\.0\.(norm\..*)',
     lambda m: _pvt_embed(m, int(m[1]), m[2])),
    (r'layers\.(\d)\.1\.0\.pos_embed',
     lambda m: f'stages.{m[1]}.pos_embed.pos_embed'),
    (r'layers\.(\d)\.1\.(\d+)\.(.*)',
     lambda m: _block(m, int(m[1]), int(m[2]) - 1, m[3])),
    (r'layers\.(\d)\.2\.(.*)', lambda m: f'norm{m[1]}.norm.{m[2]}'),
)
_CSWIN = (
    (r'stage1_conv_embed\.0\.(.*)', lambda m: f'stem.projection.{m[1]}'),
    (r'stage1_conv_embed\.2\.(.*)', lambda m: f'stem.norm.{m[1]}'),
    (r'merge(\d)\.conv\.(.*)',
     lambda m: f'stages.{m[1]}.downsample.projection.{m[2]}'),
    (r'merge(\d)\.(norm\..*)', lambda m: f'stages.{m[1]}.downsample.{m[2]}'),
    (r'stage(\d)\.(\d+)\.(.*)',
     lambda m: _block(m, int(m[1]) - 1, int(m[2]), m[3])),
    (r'norm\.(.*)', _final_norm),
    (r'norm(\d)\.(.*)', lambda m: f'norm{int(m[1]) - 1}.norm.{m[2]}'),
)
_OWN = ((r'((?:stem|stages|norm\d+)\..*)', lambda m: m[1]), )

STYLES = (
    Style('mmrpa', 'mmrpa', (r'stages\.0\.blocks\.0\.ffn\.0\.weight',
                             r'stem\..*projection\.weight'), _OWN),
    Style('swin', 'mmdet, mmseg and mmpretrain',
          (r'stages\.0\.blocks\.0\.attn\.w_msa\.qkv\.weight',
           r'patch_embed\.projection\.weight'),
          _swin(r'stages\.', 1), unfold=True),
    Style('swin', 'the official repository',
          (r'layers\.0\.blocks\.0\.attn\.relative_position_bias_table',
           r'layers\.0\.downsample\.reduction\.weight'),
          _swin(r'layers\.', 1)),
    Style('swin', 'timm',
          (r'layers[._]0\.blocks\.0\.attn\.relative_position_bias_table',
           r'patch_embed\.proj\.weight'), _swin(r'layers[._]', 0)),
    Style('pvt', 'the official repository',
          (r'block1\.0\.attn\.q\.weight', r'pos_embed1'), _PVT),
    Style('pvt', 'mmdet',
          (r'layers\.0\.1\.1\.attn\.attn\.in_proj_weight',
           r'layers\.0\.1\.0\.pos_embed'), _PVT_MM),
    Style('cswin', 'the official repository',
          (r'stage1\.0\.attns\.0\.get_v\.weight',
           r'stage1_conv_embed\.0\.weight'), _CSWIN),
    Style('deit', 'the official repository and timm',
          (r'blocks\.0\.attn\.qkv\.weight', r'patch_embed\.proj\.weight'),
          _deit('blocks')),
    Style('deit', 'mmpretrain',
          (r'layers\.0\.attn\.qkv\.weight',
           r'patch_embed\.projection\.weight'), _deit('layers')),
    Style('deit', 'mmseg',
          (r'layers\.0\.attn\.attn\.in_proj_weight',
           r'patch_embed\.projection\.weight'), _deit('layers')),
)


@dataclass
class Canonical:
    """Weights under our names, before they meet a backbone.

    Args:
        style (Style): How they were named.
        prefix (str): What stood before the names.
        tensors (dict[str, Tensor]): By canonical name.
        origin (dict[str, str]): Canonical names to the names in the file.
        left_out (dict[str, str]): Why, by name in the file.
        unexpected (dict[str, Tensor]): What no rule knows.
    """

    style: Style
    prefix: str
    tensors: Dict[str, Tensor] = field(default_factory=dict)
    origin: Dict[str, str] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)
    unexpected: Dict[str, Tensor] = field(default_factory=dict)


def find_style(state_dict: Mapping[str, Tensor],
               prefix: Optional[str] = None
               ) -> Optional[Tuple[Style, str]]:
    """The naming style of weights and what stands before its names.

    Args:
        state_dict (Mapping): The weights.
        prefix (str, optional): Found by itself if left out.

    Returns:
        tuple | None: None for weights of another kind.

    Raises:
        ValueError: There are several backbones in the weights and no prefix
            says which one is meant.
    """
    for style in STYLES:
        prefixes = sorted(_prefixes(state_dict, style))
        if prefix is not None:
            prefixes = [found for found in prefixes if found == prefix]
        if len(prefixes) > 1:
            # As with whole files: averaged weights are what was evaluated.
            averaged = [found for found in prefixes
                        if re.search(r'(^|[._])ema[._]', found)]
            if len(averaged) != 1:
                raise ValueError(
                    f'there are {len(prefixes)} backbones in the file, under '
                    f'the prefixes {", ".join(map(repr, prefixes))}; say '
                    'which one by the prefix')
            prefixes = averaged
        if prefixes:
            return style, prefixes[0]
    return None


def _prefixes(state_dict: Mapping[str, Tensor], style: Style) -> List[str]:
    first, second = (re.compile(r'(|.*\.)' + mark) for mark in style.marks)
    found = [{m[1] for m in map(mark.fullmatch, state_dict) if m}
             for mark in (first, second)]
    return [prefix for prefix in found[0] & found[1]
            # "layers.0." is no prefix of "blocks.0": it is another style.
            if not re.search(r'(layers|stages|blocks)\W\d+\.$', prefix)]


def canonical(state_dict: Mapping[str, Tensor], style: Style,
              prefix: str) -> Canonical:
    """Rename weights to canonical names, without looking at a backbone."""
    result = Canonical(style, prefix)
    rules = [(re.compile(old), new) for old, new in style.rules]
    for source, value in state_dict.items():
        if not source.startswith(prefix):
            result.left_out[source] = 'outside of the backbone'
            continue
        name = source[len(prefix):]
        if _BUFFERS.fullmatch(name):
            result.left_out[source] = 'a buffer, computed anew'
            continue
        new = next((rule(m) for old, rule in rules
                    if (m := old.fullmatch(name))), None)
        if new is None and _HEADS.fullmatch(name):
            result.left_out[source] = 'a classifier'
        elif new is None or new.startswith('?') or new in result.tensors:
            result.unexpected[source] = value
        else:
            result.tensors[new] = value
            result.origin[new] = source
    _name_final_norm(result)
    _fuse_qkv(result)
    _fold_scales(result)
    _fix_layouts(result)
    return result


def _rename(result: Canonical, old: str, new: str, value: Tensor) -> None:
    del result.tensors[old]
    result.tensors[new] = value
    result.origin[new] = result.origin.pop(old)


def _name_final_norm(result: Canonical) -> None:
    stages = 1 + max((int(name.split('.')[1]) for name in result.tensors
                      if name.startswith('stages.')), default=0)
    for name in [n for n in result.tensors if n.startswith('norm_final.')]:
        new = name.replace('norm_final', f'norm{stages - 1}', 1)
        if new in result.tensors:  # a segmentor that was a classifier
            del result.tensors[name]
            result.left_out[result.origin.pop(name)] = 'a classifier'
        else:
            _rename(result, name, new, result.tensors[name])


def _fuse_qkv(result: Canonical) -> None:
    """PVT's q and kv to one qkv, in that order."""
    for name in [n for n in result.tensors if '.attn.kv.' in n]:
        q = name.replace('.attn.kv.', '.attn.q.')
        parts = [result.tensors.get(part) for part in (q, name)]
        # Shapes are any, until a backbone says which ones it needs.
        if parts[0] is not None and all(
                part.dim() and part.shape[1:] == parts[0].shape[1:]
                for part in parts):
            del result.tensors[q], result.origin[q]
            _rename(result, name, name.replace('.attn.kv.', '.attn.qkv.'),
                    torch.cat(parts))


def _fold_scales(result: Canonical) -> None:
    """DeiT III's LayerScale into the linear layer before it: the same
    function without the extra parameters."""
    for scale, layer in (('scale1', 'attn.proj'), ('scale2', 'ffn.3')):
        for name in [n for n in result.tensors if n.endswith('.' + scale)]:
            gamma = result.tensors.pop(name)
            result.left_out[result.origin.pop(name)] = (
                'LayerScale, multiplied into the layer before it')
            for part in ('weight', 'bias'):
                target = name.replace(scale, f'{layer}.{part}')
                value = result.tensors.get(target)
                if value is not None and value.shape[:1] == gamma.shape:
                    result.tensors[target] = value * gamma.view(
                        -1, *(1, ) * (value.dim() - 1))


def _fix_layouts(result: Canonical) -> None:
    for name, value in list(result.tensors.items()):
        if '.ffn.' in name and value.dim() == 4 and value.shape[2:] == (1, 1):
            # mmdet's PVT writes its linear layers as 1x1 convolutions.
            result.tensors[name] = value.flatten(1)
        if result.style.unfold and re.fullmatch(
                r'stages\.\d+\.downsample\.(norm|reduction)\..*',
                name) and value.dim() and value.shape[-1] % 4 == 0:
            result.tensors[name] = _from_unfold(value)


def _from_unfold(value: Tensor) -> Tensor:
    """(..., C * 4) with the 2 x 2 neighbours fastest, row by row, to
    (..., 4 * C) with the channels fastest, column by column."""
    split = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return split[..., [0, 2, 1, 3], :].flatten(-2)
