"""From the lines of a survey to the groups that docs/swap.md counts."""

import argparse
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mmrpa.whole_files import whole_file

# Backbones by the type that a config names.
FAMILIES = {
    'ResNet': ('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNet_CIFAR',
               'DetectoRS_ResNet', 'TridentResNet'),
    'ResNeXt': ('ResNeXt', ),
    'Res2Net': ('Res2Net', ),
    'RegNet': ('RegNet', ),
    'HRNet': ('HRNet', ),
    'Swin': ('SwinTransformer', 'SwinTransformerV2'),
    'PVT': ('PyramidVisionTransformer', 'PyramidVisionTransformerV2'),
    'ConvNeXt': ('ConvNeXt', ),
    'MobileNet': ('MobileNetV2', 'MobileNetV3'),
    'ViT': ('VisionTransformer', 'DistilledVisionTransformer', 'DeiT3'),
}
Record = Mapping[str, Any]


def family_of(backbone: str) -> str:
    """The family of a backbone's type, 'other' if it is none of these."""
    return next((family for family, types in FAMILIES.items()
                 if backbone in types), 'other')


def summarise(swaps: Iterable[Record], steps: Mapping[str, Record],
              args: argparse.Namespace) -> dict[str, Any]:
    """Join configs with the run of their model, and group them.

    Returns:
        dict: ``settings``, ``versions`` and ``groups``: one item for configs
        of a host that share family and outcome: of those that were swapped,
        the model, else the reason.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for swap in swaps:
        outcome, reason = swap['outcome'], swap.get('reason', '')
        if outcome == 'swapped':
            step = steps[swap['key']]
            outcome, reason = step['outcome'], step.get('error', '')
        elif outcome == 'failed':
            reason = swap['error']
        elif outcome == 'unreadable':
            reason = 'the host itself cannot read it'
        family = family_of(swap.get('backbone', ''))
        key = (swap['host'], family, outcome, swap.get('key', ''),
               swap.get('model', '') if outcome != 'ran' else '', reason)
        group = groups.setdefault(key, dict(
            host=swap['host'], family=family, outcome=outcome, reason=reason,
            example=swap['config'], arch=swap.get('arch', ''), configs=0))
        group['configs'] += 1
        if outcome == 'ran':
            group['side'] = step['side']
            group['without_gradient'] = bool(step['without_gradient'])
    return dict(
        settings=dict(arch=args.arch, plain_arch=args.plain_arch,
                      timeout=args.timeout, memory=args.memory),
        versions={name: import_module(name).__version__ for name in
                  ('torch', 'mmcv', 'mmengine', 'mmdet', 'mmseg',
                   'mmpretrain')},
        python=platform.python_version(),
        groups=list(groups.values()))


def write_summary(path: Path, summary: Record) -> None:
    """Write the file at once."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(summary, indent=1) + '\n')
