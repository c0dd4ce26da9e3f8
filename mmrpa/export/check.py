"""Does an exported program compute what the model computes?"""

from typing import Callable, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from .model import ExportModel

# Batch, height and width. All unequal, one and several images, multiples of
# all strides and not, wide and high.
CHECK_SIZES = ((1, 96, 64), (2, 75, 53), (3, 33, 130), (1, 128, 224),
               (2, 161, 47))
TOLERANCE = 1e-4
Size = Tuple[int, int, int]
Program = Callable[[Tensor], Sequence[Tensor]]


class CheckError(RuntimeError):
    """An exported program that does not compute what the model computes."""


class Checked(NamedTuple):
    """One size: the largest difference over the largest magnitude."""

    size: Size
    error: float


def check_program(program: Program, model: ExportModel,
                  sizes: Sequence[Size] = CHECK_SIZES) -> List[Checked]:
    """Compare a program with the model that it was made from.

    A difference may be ``TOLERANCE`` of an output's largest magnitude. A label
    may differ where the two classes' logits are that close.

    Args:
        program (callable): Images to a sequence of outputs.
        model (ExportModel): The model, as it was.
        sizes (sequence): (batch, height, width).

    Returns:
        list[Checked]: One a size.

    Raises:
        CheckError: A difference is larger, or a shape or dtype differs.
    """
    return [Checked(size, _compare(program, model, image, size))
            for size, image in _images(model, sizes)]


def _images(model: ExportModel, sizes: Sequence[Size]
            ) -> Iterator[Tuple[Size, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        image = torch.randn(batch, model.input_channels, height, width,
                            generator=generator)
        if model.normalize:
            image = (128 + 64 * image).clamp(0, 255).round()
        yield (batch, height, width), image


def _compare(program: Program, model: ExportModel, image: Tensor,
             size: Size) -> float:
    outputs = program(image)
    with torch.no_grad():
        expected = model(image)
        if len(outputs) != len(expected):
            raise CheckError(f'{len(outputs)} outputs, {len(expected)} '
                             'expected')
        labels = model.part == 'whole' and model.output == 'labels'
        errors = []
        for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            name = f'output {i} at batch x height x width {_times(size)}'
            if got.shape != want.shape or got.dtype != want.dtype:
                raise CheckError(
                    f'{name} is {got.dtype} {_times(got.shape)}, the model '
                    f'gives {want.dtype} {_times(want.shape)}')
            error = (_label_error(got, model, image) if labels else
                     _error(got, want))
            # Written so that NaN fails.
            if not error <= TOLERANCE:
                raise CheckError(f'{name} differs by {error:.1e}; at most '
                                 f'{TOLERANCE:.0e} is allowed')
            errors.append(error)
    return max(errors)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / _scale(want)).item()


def _scale(want: Tensor) -> Tensor:
    # Zeros are no magnitude; small logits of an untrained head are one.
    return want.abs().max().clamp(min=1e-6)


def _label_error(got: Tensor, model: ExportModel, image: Tensor) -> float:
    """By how much the chosen classes are worse than the best ones."""
    if model.normalize:
        image = (image - model.mean) / model.std
    logits = model.compute_logits(image)
    if model.threshold is not None:
        probability = logits[:, 0].sigmoid()
        wrong = (probability > model.threshold).long() != got
        loss = (probability - model.threshold).abs() * wrong
    else:
        if got.min() < 0 or got.max() >= logits.shape[1]:
            return float('inf')
        loss = logits.amax(1) - logits.gather(1, got.unsqueeze(1)).squeeze(1)
    return (loss.max() / _scale(logits)).item()


def _times(numbers: Sequence[int]) -> str:
    return 'x'.join(map(str, numbers))
