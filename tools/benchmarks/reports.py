"""What the benchmark tools write: how it was measured, on what, and the data.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from mmrpa.whole_files import whole_file


def machine_facts(device: str) -> Dict[str, Any]:
    """What the figures depend on, beside the settings."""
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        names = re.findall(r'^model name\s*:\s*(.+)$', info.read_text(), re.M)
        cpu = names[0] if names else cpu
    facts = dict(cpu=cpu, cores=len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count(),
                 threads=torch.get_num_threads(), torch=torch.__version__,
                 device=cpu)
    if device.startswith('cuda'):
        facts['device'] = torch.cuda.get_device_name(device)
    return facts


def code_version() -> Optional[str]:
    """The commit of this checkout, ``-dirty`` if it was changed since.

    None where that is not known: an archive, or a machine without git.
    """
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--exclude', '*'],
            cwd=Path(__file__).parent, check=True, capture_output=True,
            text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_report(tool: str, args: argparse.Namespace, argv: Sequence[str],
                records: List[Dict[str, Any]], **settings: Any
                ) -> Dict[str, Any]:
    """All that a JSON file holds: how it was made, on what, and the data."""
    shared = {
        name: getattr(args, name)
        for name in ('device', 'dtype', 'batch', 'mode', 'rounds', 'min_time',
                     'skip_over', 'allocator', 'flush_l2')
    }
    return dict(tool=tool,
                command=shlex.join(['python', f'tools/{tool}.py', *argv]),
                commit=code_version(), machine=machine_facts(args.device),
                settings=dict(shared, **settings), records=records)


def write_report(report: Dict[str, Any], out: Optional[Path]) -> None:
    """Write JSON; a file is whole or not there, whenever this is stopped."""
    text = json.dumps(report, indent=1) + '\n'
    # A line for each list of samples and each ratio, not for each number.
    text = re.sub(r'\[[^][{}"]*\]|\{\s*"q1"[^{}]*\}',
                  lambda m: ' '.join(m[0].split()), text)
    if out is None:
        sys.stdout.write(text)
        return
    with whole_file(out) as fresh:
        fresh.write_text(text)


def run_tool(name: str, body: Callable[[Sequence[str]], Optional[int]],
             argv: Optional[Sequence[str]]) -> int:
    """Run a tool's body; returns the exit code, 0 where the body gives none.

    A ValueError becomes one line and code 2, Ctrl-C a line and code 130.
    """
    try:
        return body(sys.argv[1:] if argv is None else list(argv)) or 0
    except ValueError as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{name}: stopped; nothing was written', file=sys.stderr)
        return 130
