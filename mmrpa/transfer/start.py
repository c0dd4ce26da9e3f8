"""All that a student gets before it is trained."""

from typing import Callable, Optional

from torch import Tensor, nn

from .calibrate import calibrate
from .reduction import fit_reduced_kv
from .twin import attention_pairs, carry_twin


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
        dwc (str, optional): As for :func:`calibrate`. By default ``'keep'``
            where the teacher has a convolution of V, else ``'zero'``.
        carry (bool): False for a student that has the teacher's weights
            already, from ``mmrpa.weights.convert``.
        seed (int): Of k-means.
        log (callable): Takes one line of text.

    Raises:
        ValueError: They are no twins, or the images do not fit them.
    """
    if dwc is None:
        has_conv = any(
            hasattr(source, 'lepe')
            for _, source, _ in attention_pairs(teacher, student))
        dwc = 'keep' if has_conv else 'zero'
    if carry:
        log(str(carry_twin(teacher, student)))
    for name, rest in fit_reduced_kv(teacher, student, images).items():
        log(f'{name}: K and V fitted to the reduced map, {rest:.0%} of their '
            'variance not explained')
    for report in calibrate(student, images, dwc=dwc, seed=seed):
        log(str(report))
