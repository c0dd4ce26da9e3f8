"""Train the quickstart's detector in float32, bfloat16 and float16.

The second and third by `tools/train.py CONFIG --amp`, on whatever is there:
a GPU, or the CPU. All start from one classifier, with the same seed, data and
steps, and are tested in float32. Ends with status 1 if a training met a loss
that is not finite, an AP differs by more than --tolerance from float32's, or
float32 has no result or an AP of 0.
What has been trained in the work folder before is not trained again.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from make_sample_data import make_sample_data
from quickstart import PARTS, ROOT, Failed, read_metrics, run_step

from mmrpa.whole_files import whole_file

PRECISIONS = ('float32', 'bfloat16', 'float16')
CLASSIFIER, DETECTOR = PARTS[:2]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir', type=Path, default=ROOT / 'work_dirs/precision',
        help='logs and checkpoints (default: %(default)s)')
    parser.add_argument(
        '--classifier', type=Path,
        help='checkpoint to start from (default: train one)')
    parser.add_argument(
        '--precisions', nargs='+', choices=PRECISIONS, default=PRECISIONS,
        help='those to train now (default: all)')
    parser.add_argument(
        '--tolerance', type=float, default=0.1,
        help='relative difference of AP to accept (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.classifier is not None and not args.classifier.is_file():
        parser.error(f'--classifier {args.classifier} does not exist')
    if not args.tolerance >= 0:
        parser.error(f'--tolerance {args.tolerance} must be at least 0')
    return args


def train_classifier(work_dir: Path) -> Path:
    """The quickstart's classifier, trained once; returns its checkpoint."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        run_step('classifier, training',
                 ['tools/train.py', CLASSIFIER.config, '--work-dir',
                  str(work_dir)], work_dir / 'train.log')
    return Path(pointer.read_text().strip())


def train_detector(precision: str, classifier: Path, work_dir: Path) -> None:
    """Train and test in one precision; leaves ``result.json``."""
    options = ['--cfg-options',
               f'model.backbone.init_cfg.checkpoint={classifier}']
    if precision != 'float32':
        options += [f'optim_wrapper.dtype={precision}', '--amp']
    seconds = run_step(
        f'{precision}, training',
        ['tools/train.py', DETECTOR.config, '--work-dir', str(work_dir),
         *options], work_dir / 'train.log')
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    run_step(f'{precision}, testing',
             ['tools/test.py', DETECTOR.config, checkpoint, '--work-dir',
              str(work_dir / 'test')], work_dir / 'test.log')
    result = dict(
        metrics=read_metrics(DETECTOR, work_dir / 'test'),
        losses=read_losses(work_dir), train_s=seconds)
    with whole_file(work_dir / 'result.json') as part:
        part.write_text(json.dumps(result))


def read_losses(work_dir: Path) -> List[float]:
    """All training losses that the host has logged.

    Raises:
        Failed: There are none.
    """
    losses = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        records = (json.loads(line) for line in path.read_text().splitlines())
        losses += [r['loss'] for r in records if 'loss' in r]
    if not losses:
        raise Failed(f'the training left no loss in {work_dir}')
    return losses


def judge(results: Dict[str, dict], tolerance: float) -> List[str]:
    """What is wrong: a sentence each.

    Without a float32 result, or where that has an AP of 0, there is nothing
    to compare with, which is wrong too.
    """
    exact = results.get('float32', {}).get('metrics', {})
    wrong = []
    if not exact:
        wrong.append('float32: no result to compare with; train it by '
                     '--precisions float32')
    wrong += [f'float32: {title} is {value:.3f}, nothing to compare with'
              for title, value in exact.items() if not value > 0]
    for precision, result in results.items():
        bad = sum(not math.isfinite(loss) for loss in result['losses'])
        if bad:
            wrong.append(f'{precision}: {bad} of {len(result["losses"])} '
                         'logged losses are not finite')
        for title, goal in exact.items():
            value = result['metrics'][title]
            if goal > 0 and not abs(value - goal) <= tolerance * goal:
                wrong.append(f'{precision}: {title} is {value:.3f}, in '
                             f'float32 {goal:.3f}')
    return wrong


def format_table(results: Dict[str, dict]) -> str:
    """A row a precision, in Markdown."""
    titles = list(DETECTOR.metrics)
    rows = [['precision', *titles, 'last loss', 'training']]
    rows += [[precision, *(f'{r["metrics"][t]:.3f}' for t in titles),
              f'{r["losses"][-1]:.3f}', f'{r["train_s"]:.0f} s']
             for precision, r in results.items()]
    rows.insert(1, ['---'] * len(rows[0]))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    work_dir = args.work_dir.resolve()
    classifier = args.classifier and args.classifier.resolve()
    os.chdir(ROOT)  # the configs name data/sample
    try:
        make_sample_data(ROOT / 'data/sample')
        classifier = classifier or train_classifier(work_dir / 'classifier')
        for precision in args.precisions:
            if not (work_dir / precision / 'result.json').is_file():
                train_detector(precision, classifier, work_dir / precision)
    except Failed as error:
        print(f'compare_precision: {error}', file=sys.stderr)
        return 1
    paths = {p: work_dir / p / 'result.json' for p in PRECISIONS}
    results = {precision: json.loads(path.read_text())
               for precision, path in paths.items() if path.is_file()}
    print(format_table(results))
    wrong = judge(results, args.tolerance)
    for sentence in wrong:
        print(f'compare_precision: {sentence}', file=sys.stderr)
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
