"""The batch that a training has beside the one its learning rate is for."""

from collections.abc import Mapping
from typing import Any

from .findings import Findings


def check_batch(cfg: Mapping, world_size: int, findings: Findings) -> None:
    """Note an effective batch that is not auto_scale_lr.base_batch_size.

    mmengine scales the rate by batch_size x processes / base_batch_size; it
    does not count accumulative_counts.

    Args:
        cfg (Mapping): The config.
        world_size (int): Processes of the training.
        findings (Findings): Where to report.
    """
    scaling = cfg.get('auto_scale_lr')
    loader = cfg.get('train_dataloader')
    if not isinstance(scaling, Mapping) or not isinstance(loader, Mapping):
        return
    wrapper = cfg.get('optim_wrapper')
    wrapper = wrapper if isinstance(wrapper, Mapping) else {}
    numbers = {
        'auto_scale_lr.base_batch_size': scaling.get('base_batch_size'),
        'train_dataloader.batch_size': loader.get('batch_size'),
        'optim_wrapper.accumulative_counts': wrapper.get(
            'accumulative_counts', 1)
    }
    if any(value is None for value in numbers.values()):
        return  # no base is named, or a batch_sampler makes the batches
    wrong = [f'{key}={value!r}' for key, value in numbers.items()
             if type(value) is not int or value < 1]
    if wrong:
        findings.add('auto-scale-lr', 'auto_scale_lr', ', '.join(wrong))
        return
    base, images, accumulated = numbers.values()
    seen = images * world_size
    effective = seen * accumulated
    if effective == base and seen == base:
        return
    findings.note(
        'batch', '', f'{world_size} process(es) x batch_size {images} x '
        f'accumulative_counts {accumulated} = {effective} images a step, '
        f'the learning rate is for {base}. '
        + _rates(wrapper, seen / base, effective / base,
                 bool(scaling.get('enable', False))))


def _rates(wrapper: Mapping[str, Any], factor: float, wanted: float,
           enabled: bool) -> str:
    """What scaling gives, and what it should give."""
    optimizer = wrapper.get('optimizer')
    lr = optimizer.get('lr') if isinstance(optimizer, Mapping) else None
    if type(lr) not in (int, float):
        lr = None

    def rate(by: float) -> str:
        return f'x {by:g}' if lr is None else f'lr {lr * by:g}'

    given = 'lr x 1' if lr is None else f'lr {lr:g}'
    text = (f'auto_scale_lr.enable=True gives {rate(factor)}' if enabled else
            f'It stays at {given}; --auto-scale-lr would give {rate(factor)}')
    if factor != wanted:
        text += (', because mmengine does not count accumulative_counts: '
                 f'for {rate(wanted)} set it yourself')
    return text
