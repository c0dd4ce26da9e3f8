"""What tools/test.py checks once the host has built the model and the data.

mmengine loads what fits of a checkpoint, prints a line about the rest, and
tests a model of which parts are random.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from mmrpa.output_names import check_outputs
from mmrpa.weights.files import CheckpointError


@contextlib.contextmanager
def checked_tests() -> Iterator[None]:
    """Check each test that mmengine starts within the ``with`` block.

    Its runners load the weights before they read the first image; these have
    to fill the whole model then, and each image must get a file of its own.

    Raises:
        ConfigError: (a ValueError) See :func:`.check_outputs`.
        CheckpointError: (a ValueError) When the weights are loaded, in all
            processes: tensors of the model are not in the file, or have
            another shape there.
    """
    from mmengine.runner import Runner
    from mmengine.runner._flexible_runner import FlexibleRunner
    originals = {cls: cls.load_checkpoint for cls in (Runner, FlexibleRunner)}
    try:
        for cls, load in originals.items():
            cls.load_checkpoint = _checked(load)
        yield
    finally:
        for cls, load in originals.items():
            cls.load_checkpoint = load


def _checked(load: Callable) -> Callable:
    """``load_checkpoint`` of a runner, with the checks."""

    @functools.wraps(load)
    def checked_load(runner, filename, *args, **kwargs):
        check_outputs(runner)
        with _whole_weights(runner.model, filename):
            return load(runner, filename, *args, **kwargs)

    return checked_load


@contextlib.contextmanager
def _whole_weights(model: nn.Module, filename: str) -> Iterator[None]:
    """Raise CheckpointError if a load leaves tensors of the model as they are.

    The model itself tells what it lacks while it is loaded: many rename or
    make up keys of older files then, so names in the file prove nothing.
    """
    from mmengine.model import BaseTTAModel, is_model_wrapper
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    errors = []

    def begin(module, state_dict, prefix, metadata, strict, missing,
              unexpected, messages) -> None:
        nonlocal errors
        errors = messages  # filled while the rest of the model is loaded

    def end(module, incompatible) -> None:
        # torch and mmengine do without these, in files from before they were.
        missing = [key for key in incompatible.missing_keys
                   if 'num_batches_tracked' not in key]
        if missing or errors:
            raise CheckpointError(_explain(
                filename, missing, errors, len(module.state_dict())))

    handles = (model.register_load_state_dict_pre_hook(begin),
               model.register_load_state_dict_post_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain(filename: str, missing: Sequence[str], errors: Sequence[str],
             total: int) -> str:
    lacks = []
    if missing:
        lacks.append(f'{len(missing)} are missing ({_some(missing)})')
    if errors:
        lacks.append(f'{len(errors)} do not fit ({_some(errors)})')
    return (
        f'{filename} does not fill the model: of its {total} tensors '
        f'{" and ".join(lacks)}. Random numbers in their place would be '
        'tested. Name a checkpoint that a training of this config has '
        'written, with the same num_classes; weights of a backbone alone are '
        'for init_cfg or load_from of a training. --no-preflight tests all '
        'the same, as is right if a test uses none of these tensors (those '
        'of auxiliary_head)')


def _some(texts: Sequence[str]) -> str:
    return '; '.join(texts[:3]) + ('; ...' if len(texts) > 3 else '')
