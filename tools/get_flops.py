"""Print parameters, MACs and FLOPs of a config and of its twins."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmrpa.cfg_options import DictAction
from mmrpa.flops import (
    INPUT_SIZES,
    NUM_MASKS,
    NUM_PROPOSALS,
    count_model,
    count_twins,
)
from mmrpa.safe_loading import protect_process


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Parameters, multiply-adds (MACs) and FLOPs (two a MAC) '
        'of a config with an RPAttention backbone, beside its dense and local '
        'twins. Products of matrices and convolutions are counted, '
        'scaled_dot_product_attention included; norms, softmaxes and other '
        'element-wise work are not. Nothing is run: it takes seconds, a few '
        'hundred MB and no GPU.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels; default: ' +
        ', '.join(f'{h}x{w} for {host}'
                  for host, (h, w) in INPUT_SIZES.items()))
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        help='override config values, key=value')
    parser.add_argument(
        '--json', action='store_true', help='print JSON instead of a table')
    return parser.parse_args(argv)


def get_flops(config: str,
              shape: Optional[Sequence[int]] = None,
              cfg_options: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """Count one config file.

    Args:
        config (str): Path of the config.
        shape (sequence[int], optional): Height and width in pixels.
        cfg_options (dict, optional): Config values to override.

    Returns:
        dict: ``config``, ``input_shape`` (C, H, W), ``model`` and, by
        attention, ``backbones``.

    Raises:
        FileNotFoundError: No such config.
        TypeError: The backbone has an unknown argument.
        ValueError: It has no backbone of mmrpa, or an unknown scope.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(cfg_options or {})
    scope = cfg.get('default_scope')
    if scope not in INPUT_SIZES:
        raise ValueError(f'default_scope of {config} must be one of '
                         f'{tuple(INPUT_SIZES)}, got {scope!r}')
    backbone = cfg.get('model', {}).get('backbone', {})
    if not str(backbone.get('type')).startswith('mmrpa.'):
        raise ValueError('model.backbone.type must be one of mmrpa.RPDeiT, '
                         'mmrpa.RPPVT, mmrpa.RPSwin and mmrpa.RPCSWin, got '
                         f'{backbone.get("type")!r} in {config}')
    shape = tuple(shape or INPUT_SIZES[scope])
    init_default_scope(scope)
    return dict(
        config=config,
        input_shape=(backbone.get('in_channels', 3), *shape),
        model=count_model(cfg, shape)._asdict(),
        backbones={
            name: count._asdict()
            for name, count in count_twins(backbone, shape).items()
        },
        two_stage='roi_head' in cfg.model)


def format_table(report: Dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    rows = [('', 'params (M)', 'MACs (G)', 'FLOPs (G)', 'share')]

    def row(name: str, macs: int, params: Optional[int] = None,
            share: str = '') -> None:
        rows.append((name, '' if params is None else f'{params / 1e6:.2f}',
                     f'{macs / 1e9:.2f}', f'{2 * macs / 1e9:.2f}', share))

    row('whole model', report['model']['macs'], report['model']['params'])
    for name, count in report['backbones'].items():
        twin = name != 'as configured'
        title = (f'twin backbone, attention={name!r}'
                 if twin else 'backbone, as configured')
        row(title, count['macs'], count['params'])
        for key, text in (('attention', '  attention layers'),
                          ('mixing', '    without their projections')):
            row(text, count[key], share=f'{count[key] / count["macs"]:.1%}')
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = [
        '  '.join([r[0].ljust(widths[0])] +
                  [r[i].rjust(widths[i]) for i in range(1, 5)]).rstrip()
        for r in rows
    ]
    channels, height, width = report['input_shape']
    lines.insert(0, f'{Path(report["config"]).name}, one image of '
                 f'{channels}x{height}x{width} (C x H x W)')
    lines.append('1 MAC = 2 FLOPs; shares are of the backbone above them')
    if report['two_stage']:
        lines.append(f'RoI heads counted on {NUM_PROPOSALS} boxes and '
                     f'{NUM_MASKS} masks')
    return '\n'.join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
    try:
        report = get_flops(args.config, args.shape, args.cfg_options)
    except (FileNotFoundError, TypeError, ValueError) as error:
        print(f'get_flops: {error}', file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if args.json else format_table(report))
    return 0


if __name__ == '__main__':
    sys.exit(main())
