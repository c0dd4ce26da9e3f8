"""Measure what RoutingStatsHook costs in a training of any config.

The config is trained for some steps, its data and all, with the hook in
place. Measured in this one run: the time inside of the hook, its listeners and
its report included, over the time of all steps.
"""

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmrpa.cfg_options import DictAction
from mmrpa.hooks import RoutingStatsHook
from mmrpa.safe_loading import protect_process
from mmrpa.visualization.models import read_config


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        '--steps', type=_positive, default=100,
        help='training steps (default: %(default)s)')
    parser.add_argument(
        '--interval', type=_positive, default=50,
        help='steps between two records (default: %(default)s; that of the '
        'hook is 500)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be at least 1')
    return int(text)


def _now() -> float:
    """Seconds, once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedHook(RoutingStatsHook):
    """The hook, and the seconds spent in it at each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: List[float] = []

    def before_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Start the account of a step."""
        start = _now()
        super().before_train_iter(*args, **kwargs)
        self.seconds.append(_now() - start)

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Add the report."""
        start = _now()
        super().after_train_iter(*args, **kwargs)
        self.seconds[-1] += _now() - start

    def _look(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = _now()
        stats = super()._look(*args, **kwargs)
        self.seconds[-1] += _now() - start
        return stats


class Clock(Hook):
    """Seconds from the start of a step to its end, all hooks included."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.times: List[float] = []

    def before_train(self, runner) -> None:
        """Start."""
        self.times = [_now()]

    def after_train_iter(self, runner, *args: Any, **kwargs: Any) -> None:
        """Stop, and start anew."""
        self.times.append(_now())


def measure(cfg: Any, steps: int, interval: int) -> Dict[str, float]:
    """Train a config with the hook.

    Args:
        cfg (Config): The config; it is changed.
        steps (int): Training steps.
        interval (int): Of the hook.

    Returns:
        dict: ``step_s``, the median step; ``record_s``, the mean time in the
        hook of a step that is recorded; ``share``, the time in the hook over
        the time of all steps.
    """
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=steps, val_interval=steps + 1)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.param_scheduler = None
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks = dict(checkpoint=None, logger=dict(
        type='LoggerHook', interval=interval))
    cfg.custom_hooks = []
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    runner = (RUNNERS.build(cfg) if 'runner_type' in cfg else
              Runner.from_cfg(cfg))
    hook, clock = TimedHook(interval=interval), Clock()
    runner.register_hook(hook)
    runner.register_hook(clock)
    runner.train()
    took = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    recorded = [s for i, s in enumerate(hook.seconds, start=1)
                if i % interval == 0]
    return dict(
        step_s=statistics.median(took),
        record_s=statistics.mean(recorded),
        share=sum(hook.seconds) / sum(took))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
    try:
        if args.steps < args.interval:
            raise ValueError(f'--steps {args.steps} must be at least '
                             f'--interval {args.interval}')
        cfg = read_config(args.config, args.cfg_options)
        with tempfile.TemporaryDirectory() as folder:
            cfg.work_dir = folder
            found = measure(cfg, args.steps, args.interval)
    except (OSError, ValueError) as error:
        print(f'benchmark_routing_stats: error: {error}', file=sys.stderr)
        return 1
    print(f'{args.steps} steps, recorded every {args.interval}: median step '
          f'{1e3 * found["step_s"]:.1f} ms, a record '
          f'{1e3 * found["record_s"]:.1f} ms, the hook takes '
          f'{found["share"]:.2%} of all steps')
    return 0


if __name__ == '__main__':
    sys.exit(main())
