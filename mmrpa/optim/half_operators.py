"""Half precision on CPUs that were not made for it.

Two things that GPUs have: mmcv's compiled operators take half tensors, and
matrix products are fast. On the CPU the former know float32 and float64 alone,
so under autocast a detector would end in the first NMS or RoIAlign, and
without AVX512-BF16, AMX or the like the latter take up to 60 times as long.
"""

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm,
            _aten.convolution, _aten.convolution_backward)


class Float32Products(TorchDispatchMode):
    """Compute products of half tensors on the CPU in float32.

    From the rounded operands, with a rounded result, as tensor cores do: no
    half precision is left out but that of intermediate sums.

    Attributes:
        operators (tuple): Which of torch's operators (overload packets).
    """

    operators = PRODUCTS

    def __torch_dispatch__(self,
                           func: Any,
                           types: Sequence[type],
                           args: Sequence[Any] = (),
                           kwargs: Optional[Mapping[str, Any]] = None) -> Any:
        """See :class:`torch.utils._python_dispatch.TorchDispatchMode`."""
        kwargs = kwargs or {}
        if func.overloadpacket not in self.operators:
            return func(*args, **kwargs)
        return _call(func, *args, **kwargs)


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
    def call(*args: Any) -> Any:
        return _call(function, *args)

    call.mmrpa_half = True
    return call


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call with half tensors raised; results in the dtype of the first."""
    dtype = next((a.dtype for a in args if _half(a)), None)
    if dtype is None:
        return function(*args, **kwargs)
    out = function(*(a.float() if _half(a) else a for a in args), **kwargs)
    return (tuple(_back(o, dtype) for o in out)
            if isinstance(out, tuple) else _back(out, dtype))


def _half(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dtype in HALF
            and value.device.type == 'cpu')


def _back(value: Any, dtype: Optional[torch.dtype]) -> Any:
    """A float32 result in the dtype of the input."""
    return (value.to(dtype) if isinstance(value, Tensor)
            and value.dtype == torch.float32 else value)
