"""Measure what is left of a teacher on the way to RPAttention.

For each seed it trains a teacher with its family's own attention on the
sample data, carries its weights to the RPAttention twin, calibrates them,
aligns them, fine-tunes from each of these, and trains the twin from random
weights for several times as long. Accuracies are those on held-out images.

Each step is kept in WORK_DIR; a second run does only what is missing. --doc
writes the table between the marks of a page; with --only-doc nothing is run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from quickstart import Failed, run_step

from mmrpa.transfer import carry_twin, start_student
from mmrpa.transfer.images import load_images, read_normalisation
from mmrpa.transfer.runs import (
    build_twins,
    find_backbone,
    load_backbone,
    merge_weights,
)
from mmrpa.weights import read_checkpoint, write_checkpoint
from mmrpa.whole_files import whole_file

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/mmpretrain/quickstart/rp-pvt-nano_1xb32_sample.py'
OWN = 'sr'
MARK = '<!-- transfer table: {} -->'
STARTS = {
    'convert': 'weights carried; anchors, Interact random; DWC zero',
    'calibrate': 'carried and calibrated',
    'align': 'carried, calibrated and aligned',
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--seeds', type=int, nargs='+', default=[0, 1, 2],
        help='of the trainings (default: %(default)s)')
    add('--teacher-epochs', type=int, default=5,
        help='training of the teacher (default: %(default)s)')
    add('--tune-epochs', type=int, default=1,
        help='fine-tuning (default: %(default)s)')
    add('--layer-epochs', type=int, default=1,
        help='alignment, layer by layer (default: %(default)s)')
    add('--feature-epochs', type=int, default=1,
        help='alignment, end to end (default: %(default)s)')
    add('--scratch-epochs', type=int, nargs='+', default=[1, 2, 5],
        help='trainings from random weights (default: %(default)s)')
    add('--data', type=Path, default=ROOT / 'data/sample/imagenet',
        help='what tools/make_sample_data.py wrote (default: %(default)s)')
    add('--work-dir', type=Path, default=ROOT / 'work_dirs/transfer_table',
        help='logs and results of the steps (default: %(default)s)')
    add('--out', type=Path, default=ROOT / 'docs/attention_transfer.json',
        help='all results (default: %(default)s)')
    add('--doc', type=Path, help='page to write the table into')
    add('--only-doc', action='store_true',
        help='write the page from --out, measure nothing')
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
        help='further options of all trainings and tests')
    return parser.parse_args(argv)


class Bench:
    """The steps for one seed, each kept once it is done.

    Args:
        args (Namespace): The command line.
        seed (int): Of all chance.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args = args
        self.seed = seed
        self.folder = args.work_dir / f'seed{seed}'
        self.results: Dict[str, Dict[str, float]] = {}

    def step(self, name: str, measure, *needed: Any) -> None:
        """Run ``measure(folder, *needed)`` unless its result is kept."""
        folder = self.folder / name
        path = folder / 'result.json'
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, measure(folder, *needed))
        self.results[name] = json.loads(path.read_text())

    def run(self) -> Dict[str, Dict[str, float]]:
        """All steps; returns accuracy and seconds by step."""
        args = self.args
        self.step('teacher', self.train, args.teacher_epochs, None, OWN)
        self.step('convert', self.convert, False)
        self.step('calibrate', self.convert, True)
        self.step('align', self.align)
        for start in STARTS:
            self.step(f'tune-{start}', self.train, args.tune_epochs,
                      self.folder / start / 'start.pth', 'rp')
        for epochs in args.scratch_epochs:
            self.step(f'scratch-{epochs}', self.train, epochs, None, 'rp')
        return self.results

    def options(self, **values: Any) -> List[str]:
        """Config values for a host's tool."""
        items: Dict[str, Any] = {'randomness.seed': self.seed}
        for split in ('train', 'val', 'test'):
            items[f'{split}_dataloader.dataset.data_root'] = self.args.data
        items.update(values)
        return ['--cfg-options', *(f'{k}={v}' for k, v in items.items()),
                *self.args.cfg_options]

    def train(self, folder: Path, epochs: int, start: Optional[Path],
              attention: str) -> Dict[str, float]:
        """One training with the validation at its end."""
        values = {
            'model.backbone.attention': attention,
            'train_cfg.max_epochs': epochs,
            'train_cfg.val_interval': epochs,
            'default_hooks.checkpoint.interval': epochs,
            'param_scheduler.1.T_max': epochs,
            'param_scheduler.1.end': epochs,
        }
        if start is not None:
            values['load_from'] = start
        seconds = self.tool(f'{folder.name}, training', [
            'tools/train.py', CONFIG, '--work-dir', str(folder),
            *self.options(**values)
        ], folder / 'train.log')
        scalars = sorted(folder.glob('*/vis_data/scalars.json'))[-1]
        last = json.loads(scalars.read_text().splitlines()[-1])
        return dict(top1=last['accuracy/top1'] / 100, seconds=seconds)

    def test(self, folder: Path, seconds: float) -> Dict[str, float]:
        """Test the weights that a step has made."""
        self.tool(f'{folder.name}, testing', [
            'tools/test.py', CONFIG, str(folder / 'start.pth'), '--work-dir',
            str(folder / 'test'), *self.options()
        ], folder / 'test.log')
        result = sorted((folder / 'test').glob('*/*.json'))[-1]
        return dict(top1=json.loads(result.read_text())['accuracy/top1'] / 100,
                    seconds=seconds)

    def teacher(self) -> Path:
        """The teacher's checkpoint."""
        name = f'epoch_{self.args.teacher_epochs}.pth'
        return self.folder / 'teacher' / name

    def convert(self, folder: Path, with_images: bool) -> Dict[str, float]:
        """Carry the teacher's weights, and calibrate them or not."""
        began = cpu_seconds()
        cfg = Config.fromfile(ROOT / CONFIG)
        cfg.merge_from_dict(parse_options(self.args.cfg_options))
        backbone, prefix = find_backbone(cfg)
        torch.manual_seed(self.seed)
        teacher, student = build_twins(backbone)
        weights = read_checkpoint(self.teacher()).state_dict
        found = load_backbone(teacher, weights, str(self.teacher()))
        if with_images:
            images = load_images(
                self.args.data / 'train', [backbone['img_size']] * 2,
                seed=self.seed, **read_normalisation(cfg))
            start_student(teacher, student, images, seed=self.seed)
        else:
            carry_twin(teacher, student)
            for module in student.modules():
                if getattr(module, 'dwc', None) is not None:
                    torch.nn.init.zeros_(module.dwc.weight)
                    torch.nn.init.zeros_(module.dwc.bias)
        write_checkpoint(folder / 'start.pth',
                         merge_weights(student, prefix, weights, found), {})
        return self.test(folder, cpu_seconds() - began)

    def align(self, folder: Path) -> Dict[str, float]:
        """Attention transfer by tools/align_attention.py."""
        args = self.args
        seconds = self.tool('align, training', [
            'tools/align_attention.py', CONFIG, str(self.teacher()),
            str(args.data / 'train'), '--out', str(folder / 'start.pth'),
            '--work-dir', str(folder / 'run'), '--resume', '--seed',
            str(self.seed), '--layer-epochs', str(args.layer_epochs),
            '--feature-epochs', str(args.feature_epochs),
            *(['--cfg-options', *args.cfg_options]
              if args.cfg_options else [])
        ], folder / 'align.log')
        return self.test(folder, seconds)

    def tool(self, title: str, command: List[str], log: Path) -> float:
        """Run a tool; returns the seconds of processor time it took."""
        began = cpu_seconds()
        run_step(f'seed {self.seed}, {title}', command, log)
        return cpu_seconds() - began


def cpu_seconds() -> float:
    """Processor time of this process and of those that it has waited for.

    Unlike time on the clock it does not depend on what else is running.
    """
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(
            resource.getrusage,
            (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def parse_options(options: Sequence[str]) -> Dict[str, Any]:
    """``key=value`` items as a dict, as the hosts read them."""
    from mmrpa.cfg_options import DictAction
    parser = argparse.ArgumentParser()
    parser.add_argument('--o', nargs='*', action=DictAction, default={})
    return dict(parser.parse_args(['--o', *options]).o)


def write_json(path: Path, content: Any) -> None:
    """Write a file wholly or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + '\n')


def format_table(report: Dict[str, Any]) -> str:
    """The results as a Markdown table, means over the seeds."""
    seeds = report['seeds']

    def mean(name: str, key: str) -> float:
        return statistics.mean(s[name][key] for s in seeds.values())

    names = list(next(iter(seeds.values())))
    teacher = mean('teacher', 'top1')
    lines = ["| start | training | CPU seconds | top-1 | of the teacher's |",
             '|---|---|---|---|---|']

    def row(start: str, training: str, names: Sequence[str]) -> None:
        seconds = sum(mean(name, 'seconds') for name in names)
        values = [s[names[-1]]['top1'] for s in seeds.values()]
        each = ', '.join(f'{value:.3f}' for value in values)
        top1 = statistics.mean(values)
        lines.append(f'| {start} | {training} | {seconds:.0f} | {top1:.3f} '
                     f'({each}) | {top1 / teacher:.0%} |')

    epochs = report['epochs']
    row(f'teacher, attention={OWN!r}', f'{epochs["teacher"]} epochs',
        ['teacher'])
    aligned = f'{epochs["layer"]} + {epochs["feature"]} epochs of alignment'
    for start, text in STARTS.items():
        row(text, aligned if start == 'align' else 'none', [start])
    tuned = f'{epochs["tune"]} of fine-tuning'
    for start, text in STARTS.items():
        training = f'{aligned}, {tuned}' if start == 'align' else tuned
        row(text, training, [start, f'tune-{start}'])
    for name in names:
        if name.startswith('scratch-'):
            row('random weights', f'{name[8:]} epochs', [name])
    return '\n'.join(lines)


def write_doc(page: Path, report: Dict[str, Any]) -> None:
    """Put the table between the marks of a page.

    Raises:
        Failed: The page has no marks.
    """
    text = page.read_text()
    start, end = MARK.format('start'), MARK.format('end')
    if text.count(start) != 1 or text.count(end) != 1:
        raise Failed(f'{page} needs one line {start!r} and one {end!r}')
    before, rest = text.split(start)
    text = (f'{before}{start}\n{format_table(report)}\n{end}'
            f'{rest.split(end)[1]}')
    with whole_file(page) as temporary:
        temporary.write_text(text)


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    """Run what is missing; returns the report.

    Raises:
        Failed: The work dir has results of other settings, or a step failed.
    """
    settings = dict(
        config=CONFIG,
        options=args.cfg_options,
        epochs=dict(
            teacher=args.teacher_epochs, tune=args.tune_epochs,
            layer=args.layer_epochs, feature=args.feature_epochs))
    kept = args.work_dir / 'settings.json'
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise Failed(f'{args.work_dir} has results of other settings '
                     f'({kept.name}); give another --work-dir')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write_json(kept, settings)
    return dict(
        **settings,
        threads=torch.get_num_threads(),
        seeds={str(seed): Bench(args, seed).run() for seed in args.seeds})


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    try:
        if args.only_doc:
            report = json.loads(args.out.read_text())
        else:
            if not (args.data / 'train').is_dir():
                raise Failed(f'no sample data in {args.data}; run python '
                             'tools/make_sample_data.py data/sample')
            args.data = args.data.resolve()
            args.work_dir = args.work_dir.resolve()
            report = measure(args)
            write_json(args.out, report)
        print(format_table(report))
        if args.doc is not None:
            write_doc(args.doc, report)
    except (Failed, OSError, ValueError,
            subprocess.SubprocessError) as error:
        print(f'transfer_table: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('transfer_table: interrupted; run it again to go on',
              file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
