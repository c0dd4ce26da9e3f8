"""Depth-wise convolution of maps that lie channels last, in bands of rows.

torch's kernel for channels-last maps is by far its fastest, but it wants them
dense, and Q, K and V lie side by side. A band is copied where it has to be,
and stays in the cache until its result is used.
"""

from typing import Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

Cut = Tuple[slice, slice]
# Of the rows of a band. Between 1 and 8 MiB the time hardly changes on two
# cores; in one band a large map leaves the cache. A GPU wants to be filled.
CPU_BAND_BYTES = 2 * 2**20


def bands(maps: Tensor) -> Iterator[Cut]:
    """Images and rows of (B, H, W, C): several small images, or a band.

    Everything at once on devices other than the CPU.
    """
    batch, height, width, channels = maps.shape
    if maps.device.type != 'cpu':
        yield slice(0, batch), slice(0, height)
        return
    step = max(1, CPU_BAND_BYTES // (maps.itemsize * width * channels))
    images = max(1, step // height)
    for first in range(0, batch, images):
        for top in range(0, height, step):
            yield (slice(first, min(first + images, batch)),
                   slice(top, min(top + step, height)))


def _with_halo(maps: Tensor, rows: slice, size: int
               ) -> Tuple[Tensor, List[int]]:
    """What a band reads, (B, C, rows, W) dense, and the padding it lacks."""
    height, pad = maps.shape[1], size // 2
    top, bottom = rows.start - pad, rows.stop + pad
    if rows == slice(0, height):
        padding = [pad, pad]
    else:
        padding = [0, pad]
        maps = maps[:, max(top, 0):min(bottom, height)]
        if top < 0 or bottom > height:
            maps = F.pad(maps, (0, 0, 0, 0, max(-top, 0),
                                max(bottom - height, 0)))
    return _dense(maps), padding


def _dense(maps: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W), channels last."""
    return maps.permute(0, 3, 1, 2).contiguous(
        memory_format=torch.channels_last)


def convolve(maps: Tensor, weight: Tensor, bias: Optional[Tensor],
             rows: slice) -> Tensor:
    """A band of rows of a zero-padded depth-wise convolution.

    Args:
        maps (Tensor): (B, H, W, C), of any strides.
        weight (Tensor): (C, 1, size, size), size odd.
        bias (Tensor, optional): (C).
        rows (slice): The band.

    Returns:
        Tensor: (B, rows, W, C), a band of H rows where that is all of them.
    """
    source, padding = _with_halo(maps, rows, weight.shape[-1])
    return F.conv2d(source, weight, bias, padding=padding,
                    groups=len(weight)).permute(0, 2, 3, 1)


def convolve_input_gradient(grad: Tensor, weight: Tensor,
                            rows: slice) -> Tensor:
    """The gradient of a band of the input, from that of the output.

    A correlation with the same kernel the other way round. Arguments and
    result are as for :func:`convolve`.
    """
    return convolve(grad, weight.flip(2, 3), None, rows)


def kernel_gradient(maps: Tensor, grad: Tensor, weight: Tensor, bias: bool,
                    rows: slice) -> Tuple[Tensor, Optional[Tensor]]:
    """What a band of rows adds to the gradients of the weight and the bias.

    Args:
        maps (Tensor): The input, (B, H, W, C), of any strides.
        grad (Tensor): Of the band of the output, (B, rows, W, C).
        weight (Tensor): (C, 1, size, size), size odd.
        bias (bool): Whether there is one.
        rows (slice): The band.

    Returns:
        tuple[Tensor, Tensor | None]: (C, 1, size, size), and (C) or None.
    """
    source, padding = _with_halo(maps, rows, weight.shape[-1])
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _dense(grad), source, weight, [len(weight)] if bias else None, [1, 1],
        padding, [1, 1], False, [0, 0], len(weight), [False, True, bias])
    return grad_weight, grad_bias
