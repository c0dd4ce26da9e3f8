"""Teach RPAttention what the attention that it replaces did.

TEACHER are trained weights of the same config with its family's own attention
(--cfg-options model.backbone.attention=window for RPSwin, and so on). From
them and a folder of images without labels this makes weights for CONFIG: all
that both share is copied, anchors are set by k-means over keys, then the
attention layers alone learn, each layer by itself to return what the
teacher's layer returns, at last together to return what its stages return.
"""

import argparse
import contextlib
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from mmengine.device import get_device
from mmengine.dist import init_dist, is_main_process, master_only
from torch import distributed as dist

from mmrpa.cfg_options import DictAction
from mmrpa.elastic import end_with_launcher, restart_flags
from mmrpa.launch import load_config
from mmrpa.processes import find_started
from mmrpa.resume_search import has_checkpoints
from mmrpa.safe_loading import protect_process
from mmrpa.transfer import start_student
from mmrpa.transfer.align import AttentionTransfer, transfer_errors
from mmrpa.transfer.images import load_images, read_normalisation
from mmrpa.transfer.runs import (
    AMP_DTYPES,
    RECORD,
    Settings,
    build_preprocessor,
    build_runner,
    build_twins,
    differences,
    find_backbone,
    load_backbone,
    merge_weights,
    read_record,
)
from mmrpa.weights import read_checkpoint, write_checkpoint
from mmrpa.weights.files import check_output

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = Settings()
DEFAULT_SIZE = 224
# Images on which the errors before and after are measured.
NUM_MEASURED = 32


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', help='config of any host with an RPAttention backbone')
    add('teacher', help='weights of its twin: .pth or .safetensors')
    add('images', help='folder of images, with all folders below it')
    add('--out', required=True, help='weights to write: .pth or .safetensors')
    add('--work-dir', help='logs, and checkpoints to resume from (default: '
        'work_dirs/align_attention/NAME OF CONFIG)')
    add('--init', help='start from these weights of CONFIG instead of '
        "carrying and calibrating the teacher's")
    add('--layer-epochs', type=int, default=DEFAULTS.layer_epochs,
        help='passes over the images, layer by layer (default: %(default)s)')
    add('--feature-epochs', type=int, default=DEFAULTS.feature_epochs,
        help='passes after them, end to end (default: %(default)s)')
    add('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
        help='pixels of a view (default: img_size of the backbone if the '
        f'config has one, else {DEFAULT_SIZE})')
    add('--num-images', type=int, help='take that many images by chance')
    add('--batch-size', type=int, default=DEFAULTS.batch_size,
        help='images a step, in all processes together (default: '
        '%(default)s)')
    add('--num-workers', type=int, default=2,
        help='processes that read images (default: %(default)s)')
    add('--lr', type=float, default=DEFAULTS.lr,
        help='highest learning rate of AdamW (default: %(default)s)')
    add('--amp', choices=AMP_DTYPES, nargs='?', const=AMP_DTYPES[0],
        help='mixed precision (alone: %(const)s)')
    add('--dwc', choices=('zero', 'average', 'keep'),
        help='start of the convolution of V (default: keep for CSWin, which '
        'has one, average for windows smaller than the map, else zero)')
    add('--calibration-images', type=int, default=64,
        help='images for the start (default: %(default)s)')
    add('--seed', type=int, default=0, help='of all chance (default: 0)')
    add('--resume', action='store_true',
        help='go on from the last checkpoint in the work dir, if any')
    add('--launcher', choices=('none', 'pytorch', 'slurm'), default='none',
        help='set by tools/dist_align_attention.sh')
    add('--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    return parser.parse_args(argv)


def align(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        OSError: A file is not there, or cannot be written.
        ValueError: Something does not fit; the message says what.
    """
    out = check_output(args.out)
    try:
        cfg = load_config(args.config, args.cfg_options)
    except (SyntaxError, ImportError, AttributeError, NameError,
            KeyError) as error:
        raise ValueError(
            f'config {args.config} does not parse: {error}') from None
    backbone, prefix = find_backbone(cfg)
    normalisation = read_normalisation(cfg)
    size = args.size or [backbone.get('img_size', DEFAULT_SIZE)] * 2
    settings = Settings(
        args.layer_epochs, args.feature_epochs, tuple(size), args.num_images,
        args.batch_size, args.lr, args.amp, args.seed)
    work_dir = args.work_dir or str(
        Path('work_dirs', 'align_attention', Path(args.config).stem))
    record = dict(
        settings=asdict(settings), teacher=Path(args.teacher).name,
        init=args.init and Path(args.init).name, dwc=args.dwc,
        calibration_images=args.calibration_images,
        backbone=repr(sorted(backbone.items())))
    flags, note = restart_flags(args.config, {}, work_dir)
    if note is not None:
        say(note)
    resume = args.resume or bool(flags)
    before = check_resume(work_dir, record) if resume else None

    torch.manual_seed(args.seed)
    teacher, student = build_twins(backbone)
    weights = read_checkpoint(args.teacher).state_dict
    teacher_prefix = load_backbone(teacher, weights, args.teacher)
    images = load_images(args.images, size, args.calibration_images,
                         seed=args.seed, **normalisation)
    transfer = AttentionTransfer(teacher, student,
                                 build_preprocessor(normalisation))
    if before is None:
        if args.init:
            load_backbone(student, read_checkpoint(args.init).state_dict,
                          args.init)
        else:
            start_student(teacher, student, images, dwc=args.dwc,
                          seed=args.seed, log=say)
        before = transfer_errors(transfer, images[:NUM_MEASURED])
    runner = build_runner(transfer, args.images, work_dir, settings,
                          args.num_workers, args.launcher, resume,
                          dict(record, before=before))
    runner.train()

    after = transfer_errors(transfer,
                            images[:NUM_MEASURED].to(next(
                                student.parameters()).device))
    say(format_errors(before, after))
    if is_main_process():
        merged = merge_weights(student, prefix, weights, teacher_prefix)
        write_checkpoint(
            out, merged,
            dict(made_by='tools/align_attention.py', **record, before=before,
                 after=after))
    say(f'{len(runner.train_dataloader.dataset)} images, '
        f'{runner.iter} steps; weights for {args.config}: {out}')


def check_resume(work_dir: str,
                 record: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The errors that the run to resume began with, None if there is none.

    Raises:
        ValueError: That run had other settings, or does not say which.
    """
    if not has_checkpoints(work_dir):
        return None
    old = read_record(work_dir)
    if not old:
        raise ValueError(f'{work_dir} has checkpoints, but no {RECORD} that '
                         'says of which run; start anew in another '
                         '--work-dir')
    before = old.pop('before')
    settings = (old.pop('settings'), record['settings'])
    rest = {k: v for k, v in record.items() if k != 'settings'}
    found = [*differences(*settings), *differences(old, rest)]
    if found:
        raise ValueError(f'the run in {work_dir} had other settings: '
                         f'{"; ".join(found)}. Resume with the same ones, or '
                         'start anew in another --work-dir')
    return before


def format_errors(before: Dict[str, Dict[str, float]],
                  after: Dict[str, Dict[str, float]]) -> str:
    """A table of the relative errors, a line a stage."""
    lines = ['relative squared error   attention layers    stage output']
    for stage in before['features']:
        cells = [
            f'{errors[kind].get(stage, 0.):.4f}'
            for kind in ('layers', 'features') for errors in (before, after)
        ]
        lines.append('  {:<20}{:>10} -> {}{:>10} -> {}'.format(stage, *cells))
    return '\n'.join(lines)


@master_only
def say(text: str) -> None:
    """Print, in the first process alone."""
    print(text, flush=True)


@contextlib.contextmanager
def process_group(launcher: str) -> Iterator[None]:
    """The group of processes, which on CPUs mmengine cannot make.

    Raises:
        ValueError: Nobody has launched the processes, or there is no GPU for
            a launcher that needs one, or there are several processes and no
            launcher is named.
    """
    if launcher == 'none':
        started = find_started()
        if started is not None:
            raise ValueError(
                f'{started.variable}={started.size}: this is one of '
                f'{started.size} processes, but without --launcher each would '
                'learn all by itself, and all would write to one work dir and '
                'one --out. Use tools/dist_align_attention.sh. (If this '
                f'process is alone, unset {started.variable}.)')
        yield
        return
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ValueError('--launcher pytorch is for processes that torchrun '
                         'has started: use tools/dist_align_attention.sh')
    if launcher == 'pytorch':
        end_with_launcher()
    if get_device() != 'cpu':
        init_dist(launcher, backend='nccl')
    elif launcher == 'pytorch':
        dist.init_process_group('gloo')
    else:
        raise ValueError(f'--launcher {launcher} needs GPUs, and there is '
                         'none here; use tools/dist_align_attention.sh')
    try:
        yield
        dist.barrier()  # nobody leaves while another one still talks to it
    finally:
        dist.destroy_process_group()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
    try:
        with process_group(args.launcher):
            align(args)
    except (OSError, ModuleNotFoundError, TypeError, ValueError) as error:
        # A process that reads images passes its error on with a traceback.
        text = str(error).strip()
        if 'Traceback' in text:
            text = text.splitlines()[-1].split('Error: ', 1)[-1]
        print(f'align_attention: {text}', file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == '__main__':
    code = main()
    if code == 0 and 'RANK' in os.environ:
        # As in mmrpa/launch.py: C++ threads of DDP can outlive Python's
        # teardown, which then aborts a process that has done its work.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(code)
