"""PVT's keys and values come from a reduced map; RPAttention's from tokens.

The kv projection of a spatial-reduction layer expects what its strided
convolution and norm return. On plain tokens it gives noise, so it cannot be
copied. But it can be fitted.
"""

from typing import Dict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_tensor
from ..layers import SpatialReductionAttention
from .twin import attention_pairs, record_calls

# Weight of the penalty, over the mean variance of a channel.
RIDGE = 1e-2


def fit_reduced_kv(teacher: nn.Module, student: nn.Module,
                   images: Tensor) -> Dict[str, float]:
    """Fit K and V of tokens to those of the teacher's reduced maps.

    For each layer whose teacher has ``sr_ratio`` over 1: a linear map from
    the mean of the tokens of a cell to the cell's K and V, by ridge
    regression over all cells of the images, becomes the student's projection.
    As it is linear, the mean K of the tokens is then about the cell's K.

    Args:
        teacher (RPBackbone): An RPPVT with ``'sr'`` layers.
        student (RPBackbone): Its twin, changed in place.
        images (Tensor): Preprocessed images (B, 3, H, W).

    Returns:
        dict[str, float]: By layer, the share of the variance of K and V that
        the fit does not explain. Empty if nothing had to be fitted.

    Raises:
        ValueError: They are no twins.
    """
    check_tensor('images', images, 4, '(B, C, H, W)')
    reduced = [
        (name, source, target)
        for name, source, target in attention_pairs(teacher, student)
        if isinstance(source, SpatialReductionAttention) and source.sr
    ]
    if not reduced:
        return {}
    with torch.no_grad():
        with record_calls(teacher, [name for name, *_ in reduced]) as calls:
            teacher(images)
        return {
            name: _fit(source, target, *calls[name][0])
            for name, source, target in reduced
        }


def _fit(source: SpatialReductionAttention, target: nn.Module, x: Tensor,
         hw_shape: tuple) -> float:
    ratio, channels = source.sr_ratio, source.embed_dims
    grid = x.transpose(1, 2).unflatten(-1, hw_shape)
    # As in the layer itself: only maps smaller than the kernel are padded.
    grid = F.pad(grid, (0, max(ratio - hw_shape[1], 0), 0,
                        max(ratio - hw_shape[0], 0)))
    cells = source.norm(source.sr(grid).flatten(2).transpose(1, 2))
    wanted = source.kv(cells).flatten(0, 1).double()  # (n, 2C)
    means = F.avg_pool2d(grid, ratio).flatten(2).transpose(1, 2)
    means = means.flatten(0, 1).double()  # (n, C)

    center, offset = means.mean(0), wanted.mean(0)
    means, wanted = means - center, wanted - offset
    moments = means.T @ means / len(means)
    penalty = RIDGE * moments.diagonal().mean().clamp(min=1e-12)
    moments.diagonal().add_(penalty)
    weight = torch.linalg.solve(moments, means.T @ wanted / len(means))
    target.qkv.weight[channels:] = weight.T.to(target.qkv.weight)
    if target.qkv.bias is not None:
        target.qkv.bias[channels:] = (offset - center @ weight).to(
            target.qkv.bias)
    rest = (wanted - means @ weight).square().sum()
    return (rest / wanted.square().sum().clamp(min=1e-12)).item()
