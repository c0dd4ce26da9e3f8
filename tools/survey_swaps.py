"""Swap the backbone of all configs that the installed hosts ship."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swap_survey.summary import summarise, write_summary
from swap_survey.tasks import list_configs, run_step_task, run_swap_task
from swap_survey.worker import Worker

from mmrpa.swap import NAMES

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
# 'broken': so is the config as the host ships it.
_FAILED = ('failed', 'broken')
Record = dict[str, Any]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Swap the backbone of every config that the installed '
        'mmdet, mmsegmentation and mmpretrain ship, then build each different '
        'model that comes of it and run a training step on two random images. '
        'Configs that differ in schedule, dataset or depth of the old '
        'backbone give the same model, and are run once. Results are appended '
        'to RESULTS as they come; the same command goes on where it was '
        'stopped.')
    parser.add_argument('results', type=Path, help='JSON lines to append to')
    parser.add_argument(
        '--hosts', nargs='+', choices=HOSTS, default=HOSTS, metavar='HOST')
    parser.add_argument(
        '--arch', default='rp_pvt_tiny', choices=NAMES, metavar='NAME',
        help='arch to swap in; default: %(default)s')
    parser.add_argument(
        '--plain-arch', default='rp_deit_tiny', choices=NAMES, metavar='NAME',
        help='arch for configs that read several maps of one stride, which '
        'no pyramid has; default: %(default)s')
    parser.add_argument(
        '--minutes', type=float, default=float('inf'),
        help='stop after so long; default: when all is done')
    parser.add_argument(
        '--timeout', type=float, default=180, metavar='SECONDS',
        help='for one config; default: %(default)s')
    parser.add_argument(
        '--memory', type=float, default=8, metavar='GIB',
        help='for the process that runs a config; default: %(default)s')
    parser.add_argument(
        '--retry', action='store_true',
        help='run again what failed, instead of going on')
    parser.add_argument(
        '--summary', type=Path, metavar='JSON',
        help='when all is done, write the groups and their outcomes to this '
        'file, from which tools/update_swap_docs.py makes a table')
    return parser.parse_args(argv)


class Survey:
    """The results so far, and what is still to do.

    Args:
        path (Path): The JSON lines.
        retry (bool): Forget what failed.
    """

    def __init__(self, path: Path, retry: bool) -> None:
        self.path = path
        self.swaps: dict[tuple[str, str], Record] = {}
        self.steps: dict[str, Record] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                self._keep(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that was being written at a stop
        if retry:
            self.swaps = {k: r for k, r in self.swaps.items()
                          if r['outcome'] not in _FAILED}
            self.steps = {k: r for k, r in self.steps.items()
                          if r['outcome'] not in _FAILED}

    def _keep(self, record: Record) -> None:
        if record['kind'] == 'swap':
            self.swaps[record['host'], record['config']] = record
        else:
            self.steps[record['key']] = record

    def add(self, record: Record) -> None:
        """Keep a result and write it down."""
        self._keep(record)
        with self.path.open('a') as file:
            file.write(json.dumps(record) + '\n')

    def waiting_steps(self) -> Iterator[Record]:
        """One swapped config of each model that has not been run."""
        seen = set(self.steps)
        for record in self.swaps.values():
            if record['outcome'] == 'swapped' and record['key'] not in seen:
                seen.add(record['key'])
                yield record


def run(args: argparse.Namespace) -> bool:
    """Do what is to do; returns whether nothing is left."""
    survey = Survey(args.results, args.retry)
    stop = time.monotonic() + 60 * args.minutes
    configs = [(host, config) for host in args.hosts
               for config in list_configs(host)]
    todo = [task for task in configs if task not in survey.swaps]
    with Worker(args.memory, args.timeout) as worker:
        for i, (host, config) in enumerate(todo):
            if time.monotonic() > stop:
                break
            result = worker.run(run_swap_task, host, config, args.arch,
                                args.plain_arch)
            survey.add(dict(kind='swap', host=host, config=config, **result))
            _show('swap', i, len(todo), config, result)
        waiting = list(survey.waiting_steps())
        for i, record in enumerate(waiting):
            if time.monotonic() > stop:
                break
            result = worker.run(run_step_task, record['host'],
                                record['config'], record['arch'])
            survey.add(dict(kind='step', key=record['key'],
                            host=record['host'], config=record['config'],
                            **result))
            _show('step', i, len(waiting), record['config'], result)
    done = len(survey.swaps) >= len(configs) and not any(
        survey.waiting_steps())
    outcomes = Counter(r['outcome'] for r in survey.swaps.values())
    outcomes.update(r['outcome'] for r in survey.steps.values())
    print(f'{len(survey.swaps)} of {len(configs)} configs swapped or refused, '
          f'{len(survey.steps)} models run: {dict(outcomes)}'
          + ('' if done else '; run again to go on'))
    if done and args.summary:
        write_summary(args.summary, summarise(
            survey.swaps.values(), survey.steps, args))
        print(f'wrote {args.summary}')
    return done


def _show(kind: str, index: int, total: int, config: str,
          result: Record) -> None:
    text = result.get('reason') or result.get('error') or ''
    print(f'[{kind} {index + 1}/{total}] {result["outcome"]}: {config} '
          f'{text.splitlines()[0][:150] if text else ""}'.rstrip(),
          flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code: 3 if there is more to do."""
    args = parse_args(argv)
    for path in filter(None, (args.results, args.summary)):
        if not path.parent.is_dir():
            print(f'survey_swaps: error: there is no folder '
                  f'{str(path.parent)!r}', file=sys.stderr)
            return 2
    return 0 if run(args) else 3


if __name__ == '__main__':
    sys.exit(main())
