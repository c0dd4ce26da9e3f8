"""Build a config's model and run one training step on random images."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope

from ..safe_loading import safe_reader
from .fields import walk
from .probe import build
from .report import type_name
from .synthetic import make_batch

_FIXED_SIZES = ('BatchFixedSizePad', )


@dataclass(frozen=True)
class Step:
    """What a training step gave.

    Attributes:
        loss (float): The sum of all losses.
        params (int): Parameters of the whole model.
        without_gradient (tuple[str]): Trainable parameters of the new
            backbone that took no part, which would stop DDP.
    """

    loss: float
    params: int
    without_gradient: tuple[str, ...]


class StepError(RuntimeError):
    """A loss or a gradient that is not finite, or missing."""


def run_step(cfg: Config, side: int = 128, weights: bool = True) -> Step:
    """Build the model on the CPU and run a forward and a backward.

    Args:
        cfg (Config): A whole config, from a swap.
        side (int): Height and width of the random images, in pixels; fixed
            sizes of the config's preprocessing become that.
        weights (bool): Load the checkpoints that the model names, such as a
            teacher's. False leaves them out.

    Returns:
        Step: Its figures.

    Raises:
        StepError: The loss or a gradient is not finite, or the backbone gets
            none.
    """
    values = cfg.to_dict()
    model_cfg = values['model']
    if 'data_preprocessor' in values:
        model_cfg.setdefault('data_preprocessor', values['data_preprocessor'])
    shrink(model_cfg, side)
    _use_plain_bn(model_cfg)
    if not weights:
        _without_checkpoints(model_cfg)
    scope = values['default_scope']
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(build(model_cfg, scope))
        with _quiet(), safe_reader():
            model.init_weights()
        _set_progress()
        model.train()
        batch = make_batch(values, side)
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
    if not math.isfinite(loss.item()):
        raise StepError(f'the loss is {loss.item()}')
    loss.backward()
    return _read(model, loss.item())


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out mmengine's two lines on each parameter.

    It writes them to the stream of each file handler as well, whatever the
    level: into the log of a training that has nothing to do with this model,
    or to None where something closed the handler (uvicorn does).
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    files = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
    logger.setLevel(logging.WARNING)
    for handler in files:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in files:
            logger.addHandler(handler)


def _set_progress() -> None:
    """Say what a Runner says first: some heads ask for the iteration."""
    hub = MessageHub.get_current_instance()
    for name, value in dict(iter=0, epoch=0, max_iters=1,
                            max_epochs=1).items():
        hub.update_info(name, value)


def _read(model: torch.nn.Module, loss: float) -> Step:
    """Look at the gradients."""
    without: list[str] = []
    seen = False
    for name, param in model.named_parameters():
        if param.grad is not None:
            if not torch.isfinite(param.grad).all():
                raise StepError(f'the gradient of {name} is not finite')
            seen = seen or 'backbone.' in name
        elif param.requires_grad and 'backbone.' in name:
            without.append(name)
    if not seen:
        raise StepError('the backbone got no gradient')
    params = sum(p.numel() for p in model.parameters())
    return Step(loss, params, tuple(without))


def shrink(model: dict[str, Any], side: int) -> None:
    """Let the preprocessing keep images of ``side`` x ``side`` as they are.

    Args:
        model (dict): The model's config, changed in place.
        side (int): Pixels.
    """
    for node in _preprocessors(model):
        if node.get('size') is not None:
            node['size'] = (side, side)
            node.pop('size_divisor', None)
        augments = node.get('batch_augments')
        if isinstance(augments, (list, tuple)):
            node['batch_augments'] = [
                dict(augment, size=(side, side)) for augment in augments
                if type_name(augment) in _FIXED_SIZES
            ]


def _preprocessors(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for node in (model, model.get('detector') or {}):
        part = node.get('data_preprocessor')
        while isinstance(part, dict):
            found.append(part)
            part = part.get('data_preprocessor')
    return found


def _use_plain_bn(model: dict[str, Any]) -> None:
    """BN for mmcv's synchronised one, which one process cannot build.

    torch's is reverted after building, as by mmengine's Runner.
    """
    for _, node in walk(model):
        if node.get('type') == 'MMSyncBN':
            node['type'] = 'BN'


def _without_checkpoints(model: dict[str, Any]) -> None:
    """Remove what would be downloaded: checkpoints of teachers and heads."""
    for _, node in walk(model):
        if type_name(node.get('init_cfg')) == 'Pretrained':
            del node['init_cfg']
        if node.get('teacher_ckpt'):
            node['teacher_ckpt'] = None
        if isinstance(node.get('pretrained'), str):
            node['pretrained'] = None
