"""Let mmcv's compiled operators take half precision on the CPU.

On GPUs they do. On the CPU they are compiled for float32 and float64 alone,
so under autocast a detector would end in the first NMS or RoIAlign.
"""

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.autograd import Function

HALF = (torch.bfloat16, torch.float16)


def accept_half_on_cpu() -> None:
    """Make all of mmcv's operators compute half tensors on the CPU in float32.

    Results come back in the dtype of the input. Nothing changes for tensors
    of other dtypes or devices, without mmcv, or when called again.
    """
    if find_spec('mmcv') is None or find_spec('mmcv._ext') is None:
        return
    import_module('mmcv.ops')
    # Not by attribute: mmcv.ops.nms is a function there.
    modules = [module for name, module in sys.modules.items()
               if name.startswith('mmcv.ops.')]
    for module in modules:
        for operator in list(vars(module).values()):
            if isinstance(operator, type) and issubclass(operator, Function):
                _raise_half(operator, 'forward')
                _raise_half(operator, 'backward')


def _raise_half(operator: type, name: str) -> None:
    """Wrap one method of an operator, unless it is wrapped or inherited."""
    function = vars(operator).get(name)
    if (isinstance(function, staticmethod) and operator is not Function
            and not hasattr(function, 'mmrpa_half')):
        setattr(operator, name, staticmethod(_in_float32(function.__func__)))


def _in_float32(function: Callable) -> Callable:

    @functools.wraps(function)
    def call(ctx: Any, *args: Any) -> Any:
        dtype = next((a.dtype for a in args if _half(a)), None)
        if dtype is None:
            return function(ctx, *args)
        out = function(ctx, *(a.float() if _half(a) else a for a in args))
        return (tuple(_back(o, dtype) for o in out)
                if isinstance(out, tuple) else _back(out, dtype))

    call.mmrpa_half = True
    return call


def _half(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dtype in HALF
            and value.device.type == 'cpu')


def _back(value: Any, dtype: Optional[torch.dtype]) -> Any:
    """A float32 result in the dtype of the input."""
    return (value.to(dtype) if isinstance(value, Tensor)
            and value.dtype == torch.float32 else value)
