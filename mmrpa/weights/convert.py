"""From canonical weights to a given backbone, tensor by tensor."""

import re
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from ..arguments import check_number, check_one_of
from ..layers.embed import resize_table
from .identify import (
    FAMILY_OF_ATTENTION,
    FAMILY_TITLES,
    describe_unknown,
    family_of,
    look_at,
)
from .report import Report
from .sources import Canonical, canonical, find_style

DWC_STARTS = ('zero', 'average', 'lepe', 'init')
MIN_CARRIED = 0.99
# Parameters that only RPAttention has.
_NEW = re.compile(r'.*\.attn\.(anchors|interact_weight|interact_proj|dwc\..*)')
# Parameters that belong to one kind of attention.
_OWN_ATTENTION = re.compile(
    r'.*\.attn\.(relative_position_bias_table|lepe\..*|sr\..*|norm\..*)')
_NORM = re.compile(r'norm\d+\.norm\.')
NO_BIAS = 'zeros, the source has no such bias'
_TABLE = ('.pos_embed', 'relative_position_bias_table')


class ConversionError(ValueError):
    """Weights that are not for this backbone.

    Args:
        message (str): Why, and what would fit.
        report (Report, optional): What could be carried.
    """

    def __init__(self, message: str, report: Optional[Report] = None) -> None:
        super().__init__(message)
        self.report = report


def convert(state_dict: Mapping[str, Tensor],
            backbone: nn.Module,
            *,
            dwc: str = 'zero',
            prefix: Optional[str] = None,
            min_carried: float = MIN_CARRIED
            ) -> Tuple[Dict[str, Tensor], Report]:
    """Give public weights the names and shapes of a backbone.

    All that the two share is carried exactly: a stage that keeps its family's
    own attention computes what the source computes. Position tables of
    another size are resized (bicubic). What only RPAttention has is new: the
    convolution starts as ``dwc`` says, anchors and Interact as the backbone
    initialises them, which leaves them out of the result.

    Args:
        state_dict (Mapping): Weights of DeiT, PVT (v1), Swin or CSWin by the
            names of their official repositories, timm, mmpretrain, mmdet or
            mmseg; or of an RP backbone of the same family.
        backbone (RPBackbone): What they are for. It is not changed.
        dwc (str): Start of the depth-wise convolution of RPAttention:
            ``'zero'``; ``'average'``, the mean of the neighbourhood;
            ``'lepe'``, from CSWin's own, weighted by how often a neighbour
            is inside the stripe; ``'init'``, random.
        prefix (str, optional): What stands before the backbone's names in
            ``state_dict``. Found by itself if left out.
        min_carried (float): Least :attr:`Report.carried_fraction`.

    Returns:
        tuple: Weights by the backbone's names, in the source's dtype, without
        the new parameters that start as the backbone initialises them; and
        the :class:`Report`.

    Raises:
        ConversionError: (a ValueError) The weights are of another family or
            size. The message says what they look like and what would fit.
        ValueError: Another argument is out of range.
    """
    check_one_of('dwc', dwc, DWC_STARTS)
    check_number('min_carried', min_carried, 0, 1)
    if not hasattr(backbone, 'own_attention'):
        raise TypeError('backbone must be an RP backbone, got '
                        f'{type(backbone).__name__}')
    if not isinstance(state_dict, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor)
            for name, value in state_dict.items()):
        raise TypeError('state_dict must have tensors by their names, got '
                        f'{_kinds(state_dict)}')
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f'prefix must be a string or None, got {prefix!r}')
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    try:
        found = find_style(state_dict, prefix)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if found is None:
        where = '' if prefix is None else f' under the prefix {prefix!r}'
        raise ConversionError(
            f'no weights of DeiT, PVT, Swin, CSWin or mmrpa{where}: '
            f'{describe_unknown(state_dict)}')
    weights = canonical(state_dict, *found)
    _check_family(weights, backbone, dwc)
    report = Report(
        type(backbone).__name__,
        f'{FAMILY_TITLES[family_of(weights.tensors)]}, names of '
        f'{weights.style.title}', weights.prefix,
        left_out=dict(weights.left_out),
        unexpected={k: v.numel() for k, v in weights.unexpected.items()})
    result = _fit(weights, backbone, report)
    _start_dwc(dwc, weights, backbone, result, report)
    if not report.carried or report.carried_fraction < min_carried:
        look = look_at(weights)
        raise ConversionError(
            f'only {report.carried_fraction:.1%} fits, which is less than '
            f'{min_carried:.1%} ({"; ".join(report.problems())}): the file '
            f'looks like {look} (names of {weights.style.title}); '
            f'{look.advice()}', report)
    return result, report


def _kinds(state_dict: Any) -> str:
    if not isinstance(state_dict, Mapping):
        return type(state_dict).__name__
    return next(f'{type(value).__name__} as {name!r}'
                for name, value in state_dict.items()
                if not (isinstance(name, str) and isinstance(value, Tensor)))


def _check_family(weights: Canonical, backbone: nn.Module, dwc: str) -> None:
    wanted = FAMILY_OF_ATTENTION[backbone.own_attention]
    family = family_of(weights.tensors)
    if family != wanted:
        look = look_at(weights)
        raise ConversionError(
            f'{type(backbone).__name__} takes weights of '
            f'{FAMILY_TITLES[wanted]}, but the file looks like {look} (names '
            f'of {weights.style.title}); {look.advice()}')
    if dwc == 'lepe' and family != 'cswin':
        raise ValueError("dwc='lepe' is for CSWin's weights; for "
                         f"{FAMILY_TITLES[family]} use 'zero', 'average' or "
                         "'init'")


def _fit(weights: Canonical, backbone: nn.Module,
         report: Report) -> Dict[str, Tensor]:
    own = backbone.state_dict()
    tensors = dict(weights.tensors)
    _fit_positions(weights, backbone, tensors, report)
    _split_qkv(own, tensors)
    result = {}
    for name, target in own.items():
        value = tensors.pop(name, None)
        if value is not None and _is_another_norm(name, own, weights):
            tensors[name], value = value, None
        if value is None and _lacks_bias_alone(name, weights):
            if _has_no_such_bias(name, weights):
                # A layer without a bias is one whose bias is zero.
                result[name] = torch.zeros_like(target)
                report.new[name] = NO_BIAS
            else:
                report.missing[name] = target.numel()
            continue
        if value is None:
            _explain_absence(name, target, weights, report)
            continue
        before = tuple(value.shape)
        if name.endswith(_TABLE):
            value = _resized(name, value, target, backbone)
        if value.shape != target.shape:
            report.misshapen[name] = (before, tuple(target.shape))
            continue
        if before != tuple(value.shape):
            report.resized[name] = (before, tuple(value.shape))
        result[name] = value.detach().clone().contiguous()
        report.carried[name] = value.numel()
    for name, value in tensors.items():
        _explain_rest(name, value, weights, backbone, report)
    return result


def _lacks_bias_alone(name: str, weights: Canonical) -> bool:
    """Whether the weight that a bias belongs to is in the file."""
    if not name.endswith('.bias') or name in weights.tensors:
        return False
    weight = re.sub(r'\.attn\.(q|kv)\.bias$', '.attn.qkv.bias',
                    name).removesuffix('bias') + 'weight'
    return weight in weights.tensors


def _has_no_such_bias(name: str, weights: Canonical) -> bool:
    """Whether the source's code can build the network without a bias.

    What an option leaves out it leaves out in all blocks; a bias that only
    some have was lost.
    """
    kinds = {key.rpartition('.attn.')[2] for key in weights.tensors
             if '.attn.' in key}
    with_qkv = bool(kinds & {'qkv.bias', 'q.bias', 'kv.bias'})
    if name.endswith(('.attn.qkv.bias', '.attn.q.bias', '.attn.kv.bias')):
        return not with_qkv  # qkv_bias=False
    if name.endswith('.attn.proj.bias'):
        # nn.MultiheadAttention without a bias has none here, either.
        return not with_qkv and 'proj.bias' not in kinds and any(
            source.endswith('.in_proj_weight')
            for source in weights.origin.values())
    # patch_bias=False is the default of mmseg's ViT.
    return (weights.style.title == 'mmseg'
            and name == 'stem.patch_embed.projection.bias')


def _is_another_norm(name: str, own: Mapping[str, Tensor],
                     weights: Canonical) -> bool:
    """LayerNorm and BatchNorm call and shape what they learn alike, but only
    BatchNorm has running statistics."""
    if not _NORM.match(name):
        return False
    mean = f'{name.rpartition(".")[0]}.running_mean'
    return (mean in own) != (mean in weights.tensors)


def _fit_positions(weights: Canonical, backbone: nn.Module,
                   tensors: Dict[str, Tensor], report: Report) -> None:
    """Leave in position tables the rows that the backbone has, too."""
    tokens = [tensors.pop(f'stem.{kind}', None)
              for kind in ('cls_token', 'dist_token')]
    extra = sum(token is not None for token in tokens)
    deit = family_of(weights.tensors) == 'deit'
    with_cls = deit and backbone.with_cls_token
    if with_cls and tokens[0] is not None:
        tensors['stem.cls_token'] = tokens[0]
    for kind, token, why in (
        ('cls_token', tokens[0], 'the backbone has no class token'),
        ('dist_token', tokens[1], 'the token of distillation: the maps will '
         'differ from the source by its part in the attention')):
        if token is not None and f'stem.{kind}' not in tensors:
            report.left_out[weights.origin[f'stem.{kind}']] = why
    if not extra or weights.style.family == 'mmrpa' and with_cls:
        return
    last = max(int(name.split('.')[1]) for name in tensors
               if name.startswith('stages.'))
    name = ('stem.pos_embed.pos_embed'
            if deit else f'stages.{last}.pos_embed.pos_embed')
    table = tensors.get(name)
    if table is None or table.dim() != 3:
        return
    if _is_square(table.shape[1] - extra):
        first, grid = table[:, :extra], table[:, extra:]
    else:  # DeiT III's class token has no position
        first, grid = torch.zeros_like(table[:, :1]), table
    # The second row is that of the token of distillation.
    tensors[name] = (torch.cat((first[:, :1], grid), dim=1)
                     if with_cls else grid)


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5)**2 == count


def _split_qkv(own: Mapping[str, Tensor], tensors: Dict[str, Tensor]) -> None:
    """Give stages with spatial reduction their q and kv."""
    for name in [n for n in tensors if '.attn.qkv.' in n]:
        q, kv = (name.replace('.attn.qkv.', f'.attn.{part}.')
                 for part in ('q', 'kv'))
        if q in own:
            value = tensors.pop(name)
            dims = value.shape[0] // 3
            tensors[q], tensors[kv] = value[:dims], value[dims:]


def _resized(name: str, value: Tensor, target: Tensor,
             backbone: nn.Module) -> Tensor:
    """A table at the size of the backbone's, if it can be."""
    if value.dim() != target.dim() or value.shape[-1] != target.shape[-1]:
        return value
    module = backbone.get_submodule(name.rpartition('.')[0])
    try:
        if name.endswith('.pos_embed'):
            return resize_table(value, module.hw_shape, name,
                                module.num_extra)
        side = 2 * module.window_size - 1
        return resize_table(value.unsqueeze(0), (side, side), name).squeeze(0)
    except ValueError:
        return value  # reported as misshapen


def _explain_absence(name: str, target: Tensor, weights: Canonical,
                     report: Report) -> None:
    own_source = weights.style.family == 'mmrpa'
    if (_NEW.fullmatch(name) or _NORM.match(name) or
            own_source and _OWN_ATTENTION.fullmatch(name)):
        report.new[name] = 'init'
    else:
        report.missing[name] = target.numel()


def _explain_rest(name: str, value: Tensor, weights: Canonical,
                  backbone: nn.Module, report: Report) -> None:
    source = weights.origin.get(name, name)
    m = re.match(r'stages\.(\d+)\.(?:blocks\.(\d+)\.)?', name)
    depths = backbone.arch['depths']
    if _NORM.match(name):
        report.left_out[source] = 'the backbone has no such output norm'
    elif m is None or int(m[1]) >= len(depths) or (
            m[2] is not None and int(m[2]) >= depths[int(m[1])]):
        report.unexpected[source] = value.numel()
    elif int(m[1]) >= len(backbone.stages):
        report.left_out[source] = 'of a stage that out_indices leaves out'
    elif _OWN_ATTENTION.fullmatch(name) or _NEW.fullmatch(name):
        report.left_out[source] = 'of an attention that the stage has not'
    else:
        report.unexpected[source] = value.numel()


def _start_dwc(dwc: str, weights: Canonical, backbone: nn.Module,
               result: Dict[str, Tensor], report: Report) -> None:
    own = backbone.state_dict()
    for name in [n for n in report.new if '.attn.dwc.' in n]:
        target = own[name]
        if dwc == 'init':
            continue
        if dwc == 'lepe':
            value = _from_lepe(name, weights.tensors, backbone, target)
        else:
            value = torch.zeros_like(target)
            if dwc == 'average' and name.endswith('weight'):
                value += 1 / target[0, 0].numel()
        result[name] = value
        report.new[name] = dict(
            zero='zeros', average='the local average',
            lepe="CSWin's own convolution of V")[dwc]


def _from_lepe(name: str, tensors: Mapping[str, Tensor], backbone: nn.Module,
               target: Tensor) -> Tensor:
    """CSWin's convolution inside stripes as one on the whole map.

    A neighbour across a stripe of width w is inside the stripe for (w - 1) / w
    of the cells, and outside of it the source saw a zero.
    """
    stage = int(name.split('.')[1])
    block, part = name.split('.dwc.')
    pieces = [tensors[n] for n in sorted(tensors)
              if n.startswith(f'{block}.lepe.') and n.endswith(part)]
    if not pieces or sum(p.shape[0] for p in pieces) != target.shape[0]:
        raise ConversionError(f'dwc="lepe": the file has no convolution of V '
                              f'for {block}')
    if part == 'weight':
        if target.shape[-1] != 3:
            raise ValueError('dwc="lepe" needs rp_cfg dwc_kernel_size=3, got '
                             f'{target.shape[-1]}')
        width = backbone.split_sizes[stage]
        if len(pieces) == 2 and width is not None:
            inside = torch.tensor([1 - 1 / width, 1., 1 - 1 / width])
            pieces = [piece * inside.to(piece).view(shape) for piece, shape in
                      zip(pieces, ((1, 1, 1, 3), (1, 1, 3, 1)), strict=True)]
    return torch.cat(pieces)
