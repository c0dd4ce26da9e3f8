"""Train, test and draw a nano RP backbone in all three hosts, in minutes.

What `make quickstart` runs once the environment is there: sample data, a
classifier in mmpretrain, a Mask R-CNN in mmdet and a UperNet in mmseg that
start from it, each trained by tools/train.py and tested by tools/test.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from make_sample_data import make_sample_data

ROOT = Path(__file__).resolve().parents[1]
PROGRESS_SECONDS = 5
# 'Epoch(train)  [2][70/150]' of mmdet and mmpretrain, 'Iter(train) [ 70/400]'
# of mmseg.
PROGRESS = re.compile(
    r'(?:Epoch\(train\)\s+\[(\d+)\]|Iter\(train\)\s*)\s*\[\s*(\d+)/(\d+)\]'
    r'.*?eta: (\S+).*?loss: (\S+)')


class Part(NamedTuple):
    """One training: what it is, and which metrics it is judged by."""

    name: str
    host: str
    config: str
    metrics: Dict[str, str]  # title in the table -> name in the host's JSON
    percent: bool


PARTS = (
    Part('classifier', 'mmpretrain',
         'configs/mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py',
         {'top-1': 'accuracy/top1'}, True),
    Part(
        'detector', 'mmdet', 'configs/mmdet/quickstart/'
        'mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py', {
            'box mAP': 'coco/bbox_mAP',
            'box AP50': 'coco/bbox_mAP_50',
            'mask mAP': 'coco/segm_mAP'
        }, False),
    Part(
        'segmentor', 'mmseg', 'configs/mmseg/quickstart/'
        'rp-pvt-nano_upernet_1xb8-300_sample-128x128.py', {'mIoU': 'mIoU'},
        True),
)


class Failed(RuntimeError):
    """A step ended with an error; the message says which and where to look."""


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs/quickstart',
        help='logs, checkpoints and figures (default: %(default)s)')
    return parser.parse_args(argv)


def run_step(title: str, command: List[str], log: Path) -> float:
    """Run one command with a progress line every few seconds.

    Args:
        title (str): What to call it.
        command (list[str]): Arguments behind the Python interpreter.
        log (Path): Where its whole output goes.

    Returns:
        float: Seconds that it took.

    Raises:
        Failed: It ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, 'w') as out:
        process = subprocess.Popen([sys.executable, *command],
                                   cwd=ROOT,
                                   stdout=out,
                                   stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                _wait(process, PROGRESS_SECONDS)
                print(
                    f'  {title}: {time.monotonic() - start:4.0f} s'
                    f'{read_progress(log.read_text(errors="replace"))}',
                    flush=True)
        finally:
            if process.poll() is None:  # Ctrl-C: leave nothing running
                process.terminate()
                process.wait()
    if process.returncode:
        tail = log.read_text(errors='replace').splitlines()[-15:]
        raise Failed('\n'.join(tail) +
                     f'\n{title} failed with exit code {process.returncode}; '
                     f'the last lines are above, all of them in {log}')
    return time.monotonic() - start


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass  # still at work: time for the next progress line


def read_progress(text: str) -> str:
    """The last progress in a host's log, as ', step 70/450, eta ..., loss'."""
    found = PROGRESS.findall(text)
    if not found:
        return ''
    epoch, step, steps, eta, loss = found[-1]
    where = f'epoch {epoch}, step' if epoch else 'step'
    return f', {where} {step}/{steps}, eta {eta}, loss {loss}'


def read_metrics(part: Part, work_dir: Path) -> Dict[str, float]:
    """The metrics that the host's test wrote, as fractions.

    Raises:
        Failed: There are none.
    """
    files = sorted(work_dir.glob('*/*.json'), key=lambda p: p.stat().st_mtime)
    for path in reversed(files):
        values = json.loads(path.read_text())
        if all(name in values for name in part.metrics.values()):
            scale = 0.01 if part.percent else 1
            return {
                title: scale * values[name]
                for title, name in part.metrics.items()
            }
    raise Failed(f'tools/test.py left no {tuple(part.metrics.values())} in '
                 f'{work_dir}')


def train_and_test(part: Part, work_dir: Path,
                   classifier: Optional[Path]) -> Dict[str, object]:
    """Train and test one part.

    Args:
        part (Part): Which.
        work_dir (Path): Its own folder.
        classifier (Path, optional): Checkpoint that the backbone starts from.

    Returns:
        dict: ``checkpoint``, ``train_s``, ``test_s`` and ``metrics``.
    """
    options = [] if classifier is None else [
        '--cfg-options', f'model.backbone.init_cfg.checkpoint={classifier}'
    ]
    train_s = run_step(
        f'{part.name}, training',
        ['tools/train.py', part.config, '--work-dir',
         str(work_dir), *options], work_dir / 'train.log')
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    test_s = run_step(
        f'{part.name}, testing',
        ['tools/test.py', part.config,
         str(checkpoint), '--work-dir',
         str(work_dir / 'test')], work_dir / 'test.log')
    return dict(
        checkpoint=checkpoint,
        train_s=train_s,
        test_s=test_s,
        metrics=read_metrics(part, work_dir / 'test'))


def format_table(results: Dict[str, Dict[str, object]]) -> str:
    """One line a metric, and the times."""
    lines = [f'{"":<12}{"host":<12}{"metric":<10}{"held out":>9}'
             f'{"training":>11}{"test":>8}']
    for part in PARTS:
        result = results[part.name]
        times = f'{result["train_s"]:>9.0f} s{result["test_s"]:>6.0f} s'
        label = f'{part.name:<12}{part.host:<12}'
        for title, value in result['metrics'].items():
            lines.append(f'{label}{title:<10}{value:>9.3f}{times}')
            label, times = ' ' * 24, ''
    return '\n'.join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    start = time.monotonic()
    work_dir = args.work_dir.resolve()
    os.chdir(ROOT)  # the configs name data/sample
    try:
        make_sample_data(ROOT / 'data/sample')
        results: Dict[str, Dict[str, object]] = {}
        for part in PARTS:
            classifier = results.get('classifier', {}).get('checkpoint')
            results[part.name] = train_and_test(part, work_dir / part.name,
                                                classifier)
        run_step('figures', [
            'tools/quickstart_figures.py',
            *(str(value) for part in PARTS[1:]
              for value in (part.config, results[part.name]['checkpoint'])),
            str(work_dir)
        ], work_dir / 'figures.log')
    except Failed as error:
        print(f'quickstart: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('quickstart: interrupted; run it again to start over',
              file=sys.stderr)
        return 130
    print(f'\n{format_table(results)}\n\n'
          f'{time.monotonic() - start:.0f} s in all. Figures, logs and '
          f'checkpoints: {work_dir}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
