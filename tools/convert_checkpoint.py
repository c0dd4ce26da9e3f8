"""Convert public weights of DeiT, PVT, Swin or CSWin to an RP backbone's."""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from mmengine.config import Config, DictAction

from mmrpa.weights import (
    DWC_STARTS,
    arch_names,
    build_arch,
    convert,
    read_checkpoint,
    write_checkpoint,
)
from mmrpa.weights.convert import MIN_CARRIED
from mmrpa.weights.files import SUFFIXES, check_output


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Convert public weights of DeiT, PVT (v1), Swin or CSWin '
        'to those of an RPAttention backbone. The names of the official '
        "repositories, timm, mmpretrain, mmdet and mmseg are known, prefixes "
        'and averaged weights are found, tables of positions are resized, and '
        'a report says what became of every tensor. Load the result by '
        "init_cfg=dict(type='Pretrained', checkpoint=OUT).")
    parser.add_argument('src', help='weights: .pth, .pt or .safetensors')
    parser.add_argument(
        'out', help='file to write, ending in ' + ', '.join(SUFFIXES))
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        '--arch',
        metavar='ARCH',
        help='backbone to convert to: rp_deit_tiny, rp_swin_base, ...')
    target.add_argument(
        '--config', help='config whose model.backbone to convert to')
    parser.add_argument(
        '--options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='arguments of the backbone, e.g. attention=rp,rp,window,window, '
        'img_size=384 or rp_cfg.anchors=shared')
    parser.add_argument(
        '--dwc',
        choices=DWC_STARTS,
        default='zero',
        help='start of the depth-wise convolution of V: zero, average (of '
        "the neighbourhood), lepe (CSWin's own), init (random); default: "
        '%(default)s')
    parser.add_argument(
        '--prefix',
        help="what stands before the backbone's names in SRC; default: found")
    parser.add_argument(
        '--key',
        help='where in SRC the weights are, e.g. model or model_ema; default: '
        'found, averaged weights first')
    parser.add_argument(
        '--min-carried',
        type=float,
        default=MIN_CARRIED,
        metavar='FRACTION',
        help='refuse if less of the shared parameters or tensors fits; '
        'default: '
        '%(default)s')
    return parser.parse_args(argv)


def build_target(arch: Optional[str], config: Optional[str],
                 options: Dict[str, Any]):
    """Build the backbone to convert to.

    Args:
        arch (str, optional): A name such as ``rp_swin_tiny``.
        config (str, optional): A config file, where ``arch`` is None.
        options (dict): Arguments of the backbone; they override the config's.

    Returns:
        RPBackbone: The backbone, without pretrained weights.

    Raises:
        FileNotFoundError: No such config.
        TypeError: The backbone has no such argument.
        ValueError: No such arch, or a config without a backbone of mmrpa.
    """
    if arch is not None:
        return build_arch(arch, **merge({}, options))
    try:
        cfg = Config.fromfile(config)
    except (SyntaxError, ImportError, AttributeError, NameError,
            KeyError) as error:
        raise ValueError(f'config {config} does not parse: {error}') from None
    backbone = find_backbone(cfg.get('model', {}))
    kind = str(backbone.get('type'))
    names = {name.split('_')[1]: name for name in arch_names()}
    family = kind.removeprefix('mmrpa.RP').lower()
    if not kind.startswith('mmrpa.') or family not in names:
        raise ValueError('the backbone of the config must be one of '
                         'mmrpa.RPDeiT, mmrpa.RPPVT, mmrpa.RPSwin and '
                         f'mmrpa.RPCSWin, got {backbone.get("type")!r} in '
                         f'{config}')
    settings = {k: v for k, v in backbone.items()
                if k not in ('type', 'init_cfg')}
    return build_arch(names[family], **merge(settings, options))


def merge(settings: Dict[str, Any], options: Dict[str, Any]) -> Dict[str, Any]:
    """Override settings by options such as ``rp_cfg.anchors``."""
    cfg = Config(settings)
    cfg.merge_from_dict(options)
    return cfg.to_dict()


def find_backbone(model: Dict[str, Any]) -> Dict[str, Any]:
    """The backbone of a model, or of the detector that a model wraps."""
    for node in (model, model.get('detector', {})):
        if node.get('backbone'):
            return node['backbone']
    return {}


def convert_file(args: argparse.Namespace) -> List[str]:
    """Do what the command line says.

    Returns:
        list[str]: The report.
    """
    out = check_output(args.out)
    if out.exists() and Path(args.src).exists() and out.samefile(args.src):
        raise ValueError(f'OUT is SRC ({out}); write to another file')
    backbone = build_target(args.arch, args.config, dict(args.options))
    source = read_checkpoint(args.src, args.key)
    try:
        state_dict, report = convert(
            source.state_dict,
            backbone,
            dwc=args.dwc,
            prefix=args.prefix,
            min_carried=args.min_carried)
    except ValueError as error:
        raise ValueError(f'{args.src}: {error}') from None
    arch = args.arch or args.config
    write_checkpoint(
        out, state_dict,
        dict(
            source=Path(args.src).name,
            source_format=report.source,
            source_key=source.key,
            source_prefix=report.prefix,
            backbone=report.backbone,
            arch=arch,
            attention=list(backbone.attention),
            new={**report.new, **report.absent}))
    lines = report.lines()
    if source.key:
        lines.insert(1, f"  weights in the file were under '{source.key}'")
    return [*lines, f'wrote {out}']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    try:
        lines = convert_file(args)
    except (OSError, ModuleNotFoundError, TypeError, ValueError) as error:
        text = ' '.join(str(error).split())
        print(f'convert_checkpoint: {text}', file=sys.stderr)
        return 2
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    sys.exit(main())
