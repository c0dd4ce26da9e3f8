"""What is done with one config."""

import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Entries of a model's config that follow from the dataset, or that a training
# step does not read.
_OF_DATASET = ('num_classes', 'class_weight', 'num_things_classes',
               'num_stuff_classes', 'size', 'test_cfg', 'img_size',
               'seg_pad_val')
# Pixels: most models run on the small images; detectors that rank 900 tokens
# of an image, or convolve maps of stride 128 deformably, need larger ones.
SIDES = (128, 256, 512)


def _folder(host: str) -> Path:
    spec = find_spec(host)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f'survey_swaps: error: {host} is not installed')
    return Path(spec.submodule_search_locations[0], '.mim')


def list_configs(host: str) -> list[str]:
    """The configs that a host ships, relative to its folder of them."""
    root = _folder(host) / 'configs'
    return sorted(path.relative_to(root).as_posix()
                  for path in root.rglob('*.py')
                  if not {'_base_', 'common'} & set(path.parts))


def model_key(model: dict[str, Any]) -> str:
    """The same for models that differ in what a dataset decides alone."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(k): plain(v) for k, v in node.items()
                    if k not in _OF_DATASET}
        if isinstance(node, (list, tuple)):
            return [plain(v) for v in node]
        return node if isinstance(node, (int, float, type(None))) else str(
            node)

    text = json.dumps(plain(model), sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def _read(host: str, config: str) -> Any:
    from mmrpa.swap.writing import read_config
    os.chdir(_folder(host))  # where paths such as a teacher's config begin
    return read_config(f'{host}::{config}')


def run_swap_task(host: str, config: str, arch: str,
                  plain_arch: str) -> dict[str, Any]:
    """Swap a config.

    Returns:
        dict: ``outcome``: 'unreadable' (before anything of ours), 'refused'
        or 'swapped'; and what belongs to it.
    """
    from mmrpa.swap import SwapError, SwapRefused, swap
    from mmrpa.swap.report import type_name
    warnings.simplefilter('ignore')
    try:
        cfg = _read(host, config)
    except SwapError as error:
        return dict(outcome='unreadable', reason=str(error))
    model = cfg.get('model') or {}
    backbone = model.get('backbone') or (model.get('detector') or {}).get(
        'backbone') or {}
    result = dict(backbone=type_name(dict(backbone)), model=type_name(
        dict(model)), arch=arch)
    try:
        try:
            new, report = swap(cfg, arch)
        except SwapRefused as error:
            if error.reason != 'several maps of one stride':
                raise
            result['arch'] = plain_arch
            new, report = swap(cfg, plain_arch)
    except SwapRefused as error:
        return dict(result, outcome='refused', reason=error.reason,
                    detail=error.detail)
    values = new.to_dict()
    key = model_key(dict(model=values['model'],
                         pre=values.get('data_preprocessor'),
                         host=values['default_scope']))
    return dict(result, outcome='swapped', key=key,
                changes=len(report.changed))


def run_step_task(host: str, config: str, arch: str) -> dict[str, Any]:
    """Swap a config, write it, read it, and run a training step.

    Where that fails, the config as its host ships it is run in the same way.
    If the same error comes of it the swap is not to blame: 'broken'.
    """
    from mmrpa.swap import swap, write_config
    from mmrpa.swap.writing import read_config
    warnings.simplefilter('ignore')
    start = time.monotonic()
    original = _read(host, config)
    cfg, _ = swap(original, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'swapped.py')
        write_config(cfg, path)
        cfg = read_config(str(path))
    result = _try_step(cfg)
    if result['outcome'] == 'failed':
        control = _try_step(original)
        result['error_before'] = control.get('error')
        if result['error_before'] == result['error']:
            result['outcome'] = 'broken'
    return dict(result, seconds=round(time.monotonic() - start, 1))


def _try_step(cfg: Any) -> dict[str, Any]:
    """A training step at the first side at which one can be run."""
    from mmrpa.swap.check import run_step
    errors = []
    for side in SIDES:
        try:
            step = run_step(cfg, side, weights=False)
        except Exception as error:  # noqa: BLE001
            # Whatever a host raises is this task's result.
            errors.append(describe(error))
        else:
            return dict(
                outcome='ran', loss=step.loss, params=step.params, side=side,
                without_gradient=list(step.without_gradient[:3]))
    return dict(outcome='failed', error=errors[-1])


def describe(error: BaseException) -> str:
    """The error, and the last place in the code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    place = frames[-1] if frames else None
    text = f'{type(error).__name__}: {" ".join(str(error).split())[:400]}'
    if place is None:
        return text
    file = place.filename.rpartition('site-packages/')[2]
    return f'{text} ({file}:{place.lineno})'
