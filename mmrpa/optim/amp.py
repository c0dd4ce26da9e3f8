"""Automatic mixed precision on the CPU, which mmengine's wrapper refuses."""

from contextlib import contextmanager
from typing import Any, Iterator, Mapping, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from ..registry import OPTIM_WRAPPERS
from .half_operators import Float32Products, accept_half_on_cpu

DTYPES = ('bfloat16', 'float16')


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """What ``AmpOptimWrapper`` of mmengine is on GPUs, on the CPU.

    ``torch.autocast`` around the forward pass; for float16 a
    ``torch.amp.GradScaler``, which skips the steps whose gradients overflow.
    bfloat16 has the range of float32, so its gradients need no scale.
    ``tools/train.py CONFIG --amp`` takes this class where there is no GPU.
    Matrix products are computed in float32 from rounded operands, and rounded,
    which is what tensor cores do: few CPUs have fast ones in half precision.
    So it tells what a GPU's AMP will do to a training, and saves no time.

    Args:
        loss_scale (str | float | dict): ``'dynamic'``, a fixed scale, or the
            arguments of ``torch.amp.GradScaler``. Not used for bfloat16.
        dtype (str | torch.dtype, optional): ``'bfloat16'`` or ``'float16'``.
            Defaults to bfloat16, torch's own choice on the CPU.
        **kwargs: The arguments of mmengine's ``OptimWrapper``.

    Raises:
        ValueError: Another dtype, or a scale that is not a positive number.
        TypeError: ``loss_scale`` or ``dtype`` of a wrong type.
    """

    def __init__(self,
                 loss_scale: Union[str, float, Mapping[str, Any]] = 'dynamic',
                 dtype: Optional[Union[str, torch.dtype]] = None,
                 **kwargs: Any) -> None:
        if not isinstance(kwargs.get('optimizer'), Optimizer):
            raise TypeError('optimizer must be one of torch.optim, got '
                            f'{kwargs.get("optimizer")!r}')
        self.cast_dtype = _parse_dtype(dtype)
        self._fixed_scale, options = _parse_scale(loss_scale)
        super().__init__(**kwargs)
        accept_half_on_cpu()
        print_log(
            f'mixed precision on the CPU, in {self.cast_dtype}, shows what it '
            'does to a training, and saves no time',
            logger='current')
        options = {'enabled': self.cast_dtype == torch.float16, **options}
        try:
            self.loss_scaler = torch.amp.GradScaler('cpu', **options)
        except (AssertionError, TypeError) as error:
            raise TypeError(f'loss_scale={loss_scale!r}: {error}') from error

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of the scaled loss (); kwargs are Tensor.backward's."""
        with Float32Products():
            self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Undo the scale, clip, and step unless a gradient is not finite."""
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._fixed_scale)

    def state_dict(self) -> dict:
        """The optimiser's, and the scaler's as ``loss_scaler``."""
        return dict(
            super().state_dict(), loss_scaler=self.loss_scaler.state_dict())

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what either class, or a run in float32, has saved."""
        state_dict = dict(state_dict)
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.loss_scaler.is_enabled():
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no synchronising while gradients accumulate."""
        with super().optim_context(model), torch.autocast(
                'cpu', dtype=self.cast_dtype), Float32Products():
            yield


def _parse_dtype(dtype: Optional[Union[str, torch.dtype]]) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError('dtype must be a string or a torch.dtype, got '
                        f'{dtype!r}')
    name = str(dtype).removeprefix('torch.')
    if name not in DTYPES:
        raise ValueError(f'dtype must be one of {DTYPES} on the CPU, got '
                         f'{dtype!r}; float32 needs no --amp')
    return getattr(torch, name)


def _parse_scale(
    loss_scale: Union[str, float, Mapping[str, Any]]
) -> tuple[Optional[float], dict]:
    """The scale if it is fixed, and the arguments of GradScaler."""
    if loss_scale == 'dynamic':
        return None, {}
    if isinstance(loss_scale, Mapping):
        return None, dict(loss_scale)
    if isinstance(loss_scale, bool) or not isinstance(loss_scale,
                                                      (int, float)):
        raise TypeError("loss_scale must be 'dynamic', a number or a dict, "
                        f'got {loss_scale!r}')
    if not loss_scale > 0:
        raise ValueError(f'loss_scale must be above 0, got {loss_scale!r}')
    return float(loss_scale), dict(init_scale=float(loss_scale))
