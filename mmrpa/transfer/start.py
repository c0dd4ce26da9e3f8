"""All that a student gets before it is trained."""

from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_int, check_one_of, check_tensor
from ..layers import CrossShapedWindowAttention, WindowAttention
from .calibrate import DWC_STARTS, calibrate
from .reduction import fit_reduced_kv
from .twin import attention_pairs, carry_twin, record_calls


def start_student(teacher: nn.Module,
                  student: nn.Module,
                  images: Tensor,
                  *,
                  dwc: Optional[str] = None,
                  carry: bool = True,
                  seed: int = 0,
                  log: Callable[[str], None] = print) -> None:
    """Carry, fit and calibrate: the best start without training.

    :func:`carry_twin`, then :func:`fit_reduced_kv`, then :func:`calibrate`,
    each of which tells what it did.

    Args:
        teacher (RPBackbone): The source.
        student (RPBackbone): Its twin, changed in place.
        images (Tensor): Preprocessed images (B, 3, H, W), 32 to 128.
        dwc (str, optional): As for :func:`calibrate`. By default, layer by
            layer: ``'keep'`` where the teacher has a convolution of V,
            ``'average'`` where it has windows smaller than the map, else
            ``'zero'``.
        carry (bool): False for a student that has the teacher's weights
            already, from ``mmrpa.weights.convert``.
        seed (int): Of k-means.
        log (callable): Takes one line of text.

    Raises:
        ValueError: They are no twins, or the images do not fit them.
    """
    check_tensor('images', images, 4, '(B, 3, H, W)')
    check_bool('carry', carry)
    check_int('seed', seed)
    # A module is callable, and would fail only after the work of carry.
    if not callable(log) or isinstance(log, nn.Module):
        raise TypeError('log must be a function that takes a line, got '
                        f'{type(log).__name__}')
    if dwc is not None:
        check_one_of('dwc', dwc, DWC_STARTS)
    starts = _dwc_starts(teacher, student, images) if dwc is None else dwc
    if carry:
        log(str(carry_twin(teacher, student)))
    for name, rest in fit_reduced_kv(teacher, student, images).items():
        log(f'{name}: K and V fitted to the reduced map, {rest:.0%} of their '
            'variance not explained')
    for report in calibrate(student, images, dwc=starts, seed=seed):
        log(str(report))


def _dwc_starts(teacher: nn.Module, student: nn.Module,
                images: Tensor) -> Dict[str, str]:
    """The convolution's start in each layer that differs."""
    pairs = attention_pairs(teacher, student)
    with torch.no_grad(), record_calls(
            teacher, [name for name, *_ in pairs]) as calls:
        teacher(images[:1])
    starts = {}
    for name, source, _ in pairs:
        (_, hw_shape), _ = calls[name]
        if isinstance(source, CrossShapedWindowAttention):
            starts[name] = 'keep'
        elif isinstance(source, WindowAttention) and max(
                hw_shape) > source.window_size:
            starts[name] = 'average'
        else:
            starts[name] = 'zero'
    return starts
