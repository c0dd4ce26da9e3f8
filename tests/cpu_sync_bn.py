"""torch's SyncBN on the CPU: its communication with kernels of our own.

torch has the five kernels that its SyncBatchNorm calls for GPUs only, and
refuses the CPU for their sake. Everything else of it, what is sent, to whom,
and what is made of it, is plain torch and runs on the CPU as well.
"""

from contextlib import ExitStack, contextmanager
from typing import Iterator, Optional, Tuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Two = Tuple[Tensor, Tensor]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _sums(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def _stats(x: Tensor, eps: float) -> Two:
    var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1,
                               correction=0)
    return mean, (var + eps).rsqrt()


def _gather_stats(x: Tensor, means: Tensor, invstds: Tensor,
                  running_mean: Optional[Tensor],
                  running_var: Optional[Tensor], momentum: float, eps: float,
                  counts: Tensor) -> Two:
    total = counts.sum()
    shares = (counts / total).unsqueeze(1)
    mean = (shares * means).sum(0)
    squares = invstds**-2 - eps + means**2
    var = (shares * squares).sum(0) - mean**2
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor,
               invstd: Tensor, eps: float) -> Tensor:
    weight, bias, mean, invstd = (
        _per_channel(t, x) for t in (weight, bias, mean, invstd))
    return (x - mean) * invstd * weight + bias


def _backward_reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor,
                     weight: Tensor, *wanted: bool
                     ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dy = _sums(grad)
    sum_dy_xmu = _sums(grad * (x - _per_channel(mean, x)))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def _backward(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor,
              weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor,
              counts: Tensor) -> Tensor:
    total = counts.sum()
    mean, sum_dy, slope, scale = (_per_channel(t, x) for t in (
        mean, sum_dy, invstd**2 * sum_dy_xmu, invstd * weight))
    return (grad - sum_dy / total - (x - mean) * slope / total) * scale


_forward_on_gpus = nn.SyncBatchNorm.forward


def _forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """SyncBN's own, with the one device that it takes by whatever name."""
    with mock.patch.object(torch._C, '_get_privateuse1_backend_name',
                           lambda: x.device.type):
        return _forward_on_gpus(norm, x)


@contextmanager
def sync_bn_on_cpu() -> Iterator[None]:
    """Let nn.SyncBatchNorm train on the CPU of this process."""
    with ExitStack() as stack:
        for name, kernel in dict(
                batch_norm_stats=_stats,
                batch_norm_gather_stats_with_counts=_gather_stats,
                batch_norm_elemt=_normalise,
                batch_norm_backward_reduce=_backward_reduce,
                batch_norm_backward_elemt=_backward).items():
            stack.enter_context(mock.patch.object(torch, name, kernel))
        # DDP does nothing there but refuse the CPU.
        stack.enter_context(mock.patch.object(
            DistributedDataParallel, '_passing_sync_batchnorm_handle'))
        stack.enter_context(mock.patch.object(
            nn.SyncBatchNorm, 'forward', _forward))
        yield
