"""Importing what may be broken, in another process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import Any

# Each step says what it found as a dict, or raises. They run in one process
# as long as that lives; a later step may use what an earlier one imported.
STEPS = {
    'numpy': """
import numpy
found = {'version': numpy.__version__}
""",
    'torch': """
import torch
cuda = torch.version.cuda
found = {'version': torch.__version__, 'cuda': cuda,
         'available': torch.cuda.is_available(),
         'archs': torch.cuda.get_arch_list() if cuda else []}
""",
    # On its own: a GPU that is busy or broken raises, and torch is not to
    # blame.
    'torch.cuda': """
import torch
found = {'capabilities': [list(torch.cuda.get_device_capability(i))
                          for i in range(torch.cuda.device_count())]}
""",
    'torch and numpy': """
import numpy, torch
assert torch.from_numpy(numpy.ones(2)).sum() == 2
found = {}
""",
    'cv2': """
import cv2
found = {'version': cv2.__version__}
""",
    'torchvision': """
import torch, torchvision
kept = torchvision.ops.nms(torch.tensor([[0., 0, 9, 9], [1, 0, 9, 9]]),
                           torch.tensor([0.9, 0.8]), 0.5)
assert kept.tolist() == [0], kept
found = {'version': torchvision.__version__}
""",
    'mmengine': """
import mmengine, mmengine.runner
found = {'version': mmengine.__version__}
""",
    'mmcv': """
import mmcv
found = {'version': mmcv.__version__}
""",
    'mmcv.ops': """
import torch, mmcv.ops
kept = mmcv.ops.nms(torch.tensor([[0., 0, 9, 9], [1, 0, 9, 9]]),
                    torch.tensor([0.9, 0.8]), iou_threshold=0.5)[1]
assert kept.tolist() == [0], kept
found = {'cuda': mmcv.ops.get_compiling_cuda_version()}
""",
    'pycocotools': """
import pycocotools.mask
found = {}
""",
    'mmdet': """
import mmdet.models, mmdet.datasets, mmdet.evaluation
found = {'version': mmdet.__version__}
""",
    'mmseg': """
import mmseg.models, mmseg.datasets, mmseg.evaluation
found = {'version': mmseg.__version__}
""",
    'mmpretrain': """
import mmpretrain.models, mmpretrain.datasets, mmpretrain.evaluation
found = {'version': mmpretrain.__version__}
""",
}
TIMEOUT = 600  # seconds; a cold disk takes minutes to give torch and mmdet
# Everything is caught here, and only here: what a foreign package raises while
# it is imported is what is asked for.
_RUNNER = """
import json, sys
steps, path = json.loads(sys.stdin.read())
with open(path, 'a') as out:
    def say(name, **result):
        out.write(json.dumps([name, result]) + '\\n')
        out.flush()
    for name, code in steps:
        say(name)
        scope = {}
        try:
            exec(code, scope)
        except BaseException as error:
            say(name, error=type(error).__name__ + ': ' + str(error),
                missing=getattr(error, 'name', None)
                if isinstance(error, ModuleNotFoundError) else None)
        else:
            say(name, found=scope['found'])
"""


def probe_all(steps: dict[str, str] | None = None,
              timeout: float = TIMEOUT) -> dict[str, dict[str, Any]]:
    """Run all steps, going on behind one that ends its process.

    Args:
        steps (dict, optional): Code by name; defaults to ``STEPS``.
        timeout (float): Seconds for each process.

    Returns:
        dict: For each step a dict with ``found``, what it found, or
        ``error``, one line, with ``missing``, the module that is not there, or
        None. Crashes and hanging imports are errors as well. ``stderr`` has
        what says that numpy is of another generation.
    """
    todo = list((STEPS if steps is None else steps).items())
    results: dict[str, dict[str, Any]] = {}
    while todo:
        said, ended = _run(todo, timeout)
        results.update(said)
        done = [name for name, result in said.items() if result]
        started = [name for name, result in said.items() if not result]
        # A process that could not even start blames its first step.
        if started or not done:
            name = (started or [todo[0][0]])[0]
            results[name] = {'error': ended, 'missing': None}
            done.append(name)
        todo = [step for step in todo if step[0] not in done]
    return {name: _clean(result) for name, result in results.items()}


def _run(steps: list, timeout: float) -> tuple[dict, str]:
    """What one process said of each step, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'said')
        try:
            done = subprocess.run(
                [sys.executable, '-c', _RUNNER],
                input=json.dumps([steps, path]), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors='replace',
                timeout=timeout)
            ended, errors = _ending(done.returncode), done.stderr
        except subprocess.TimeoutExpired:
            ended, errors = f'did not end within {timeout:g} s', ''
        said: dict[str, dict] = {}
        if os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                for line in file:
                    name, result = json.loads(line)
                    said[name] = result
    if 'compiled using NumPy 1.x' in errors:
        # torch goes on without numpy then, and says so on stderr only.
        for result in said.values():
            if 'error' in result:
                result['stderr'] = 'compiled using NumPy 1.x'
    return said, ended


def _ending(code: int) -> str:
    if code >= 0:
        return f'the process ended with status {code}'
    try:
        return f'the process crashed ({signal.Signals(-code).name})'
    except ValueError:
        return f'the process crashed (signal {-code})'


def _clean(result: dict[str, Any]) -> dict[str, Any]:
    if result.get('error'):
        lines = [line.strip() for line in result['error'].splitlines()]
        text = ' '.join(line for line in lines if line)
        result['error'] = without_paths(text)[:300]
    return result


# Where a folder begins: not within a word, an address or another path.
_ROOT = r'(?<![\w./:\\-])(?:file://)?(?:[A-Za-z]:[/\\]|(?:~\w*|\.{1,2})?/)'
# Names may have spaces in them, but a space and a slash begin the next path.
_PACKAGES = re.compile(_ROOT + r'(?:[\w./\\~+@-]| (?![/~]))*?'
                       r'(?<=[/\\])(site|dist)-packages')
_FOLDERS = re.compile(_ROOT + r'(?:[\w.+@-]+[/\\])+([\w.+@-]+)')
# No more of an error is read; a hostile one would take long.
_LONGEST = 4000


def without_paths(text: str) -> str:
    """Text without the folders of whoever runs it: it is to be pasted."""
    text = _PACKAGES.sub(r'\1-packages', text[:_LONGEST])
    return _FOLDERS.sub(r'\1', text)
