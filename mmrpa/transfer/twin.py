"""From a backbone with its family's own attention to its RPAttention twin."""

from contextlib import contextmanager
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from ..layers import RPAttention


class Carried(NamedTuple):
    """What became of the parameters.

    Attributes:
        shared (tuple[str, ...]): Names in the student that were copied or
            rebuilt from the teacher.
        new (tuple[str, ...]): Names that the teacher has nothing for.
        left_out (tuple[str, ...]): The teacher's that the student has no
            place for.
    """

    shared: Tuple[str, ...]
    new: Tuple[str, ...]
    left_out: Tuple[str, ...]

    def __str__(self) -> str:
        return (f'{len(self.shared)} tensors carried from the teacher, '
                f'{len(self.new)} new, {len(self.left_out)} of the teacher '
                'left out')


def attention_pairs(teacher: nn.Module, student: nn.Module
                    ) -> List[Tuple[str, nn.Module, nn.Module]]:
    """The layers in which the two differ.

    Args:
        teacher (RPBackbone): The source.
        student (RPBackbone): The same, with RPAttention somewhere instead.

    Returns:
        list[tuple]: Name, the teacher's layer, the student's RPAttention.

    Raises:
        ValueError: They are no twins: another class, arch or depth, or the
            same attention everywhere.
    """
    check_backbones(teacher=teacher, student=student)
    if type(teacher) is not type(student) or teacher.arch != student.arch:
        raise ValueError(
            f'teacher and student must be one backbone but for attention, '
            f'got {type(teacher).__name__} {teacher.arch} and '
            f'{type(student).__name__} {student.arch}')
    # The smaller one decides where out_indices leave out the last stages.
    layers = dict(teacher.named_modules())
    pairs = [(name, layers[name], module)
             for name, module in student.named_modules()
             if isinstance(module, RPAttention) and name in layers
             and not isinstance(layers[name], RPAttention)]
    if not pairs:
        raise ValueError(
            f'teacher and student have the same attention in all layers: '
            f'{teacher.attention} and {student.attention}; the student '
            "needs 'rp' somewhere, the teacher something else there")
    return pairs


def check_backbones(**backbones: Any) -> None:
    """Raise TypeError unless all are RP backbones."""
    for name, value in backbones.items():
        if not (isinstance(value, nn.Module) and hasattr(value, 'attention')
                and hasattr(value, 'own_attention')):
            raise TypeError(f'{name} must be an RP backbone, got '
                            f'{type(value).__name__}')


def carry_twin(teacher: nn.Module, student: nn.Module) -> Carried:
    """Copy all that the twins share into the student.

    Outside of attention that is everything; inside, the q, k, v and output
    projections and, from CSWin's layers, LePE as the convolution of V.
    Spatial reductions and relative position tables have no place.

    Args:
        teacher (RPBackbone): The source.
        student (RPBackbone): Changed in place.

    Returns:
        Carried: Names.

    Raises:
        ValueError: See :func:`attention_pairs`.
    """
    check_backbones(teacher=teacher, student=student)
    given = dict(teacher.state_dict())
    for name, source, target in attention_pairs(teacher, student):
        state = {
            key: given.pop(f'{name}.{key}') for key in source.state_dict()
        }
        translated = _translate(
            state, target, getattr(source, 'split_size', None))
        given.update({f'{name}.{k}': v for k, v in translated.items()})
    own = student.state_dict()
    shared = tuple(key for key in own if key in given)
    with torch.no_grad():
        for key in shared:
            own[key].copy_(given[key])
    used = set(shared)
    return Carried(shared, tuple(key for key in own if key not in used),
                   tuple(key for key in given if key not in used))


def _translate(state: Dict[str, Tensor], target: RPAttention,
               split_size: Optional[int]) -> Dict[str, Tensor]:
    """One layer of the teacher in RPAttention's names."""
    state = dict(state)
    for kind in ('weight', 'bias'):
        if f'q.{kind}' in state:  # PVT: q beside kv
            state[f'qkv.{kind}'] = torch.cat(
                (state.pop(f'q.{kind}'), state.pop(f'kv.{kind}')))
        if f'lepe.0.{kind}' in state:  # CSWin: one for each direction
            size = 0 if target.dwc is None else target.dwc.kernel_size[0]
            parts = [state.pop(f'lepe.{i}.{kind}') for i in (0, 1)
                     if f'lepe.{i}.{kind}' in state]
            if kind == 'weight' and split_size is not None:
                parts = _across_stripes(parts, split_size)
            lepe = torch.cat(parts)
            if kind == 'weight' and size > lepe.shape[-1]:
                pad = (size - lepe.shape[-1]) // 2
                lepe = nn.functional.pad(lepe, (pad, ) * 4)
            # A smaller kernel has no place for it.
            state[f'dwc.{kind}' if size >= 3 else f'lepe.{kind}'] = lepe
    return state


def _across_stripes(kernels: List[Tensor], width: int) -> List[Tensor]:
    """Kernels inside stripes, vertical and horizontal, as such on a map.

    A neighbour across a stripe of that width is inside of it for a share of
    (width - 1) / width of the cells; for the others the teacher saw zeros.
    """
    share = torch.tensor([1 - 1 / width, 1., 1 - 1 / width])
    return [
        kernel * share.to(kernel).view(shape)
        for kernel, shape in zip(kernels, ((1, 1, 1, 3), (1, 1, 3, 1)),
                                 strict=True)
    ]


@contextmanager
def record_calls(backbone: nn.Module, names: Sequence[str]
                 ) -> Iterator[Dict[str, Tuple[tuple, Tensor]]]:
    """Record arguments and output of layers while the backbone runs."""
    calls: Dict[str, Tuple[tuple, Tensor]] = {}
    layers = dict(backbone.named_modules())

    def hook(name):

        def record(module, args, output):
            calls[name] = (args, output)

        return record

    handles = [
        layers[name].register_forward_hook(hook(name)) for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
