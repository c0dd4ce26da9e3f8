"""Convert public weights of DeiT, PVT, Swin or CSWin to an RP backbone's."""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmrpa.cfg_options import DictAction
from mmrpa.safe_loading import protect_process
from mmrpa.transfer import attention_pairs, start_student
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
        help='start of the depth-wise convolution of V: zero, average (of '
        "the neighbourhood), lepe (CSWin's own), init (random); default: "
        'zero, with --calibrate what suits the attention of the source')
    parser.add_argument(
        '--calibrate',
        metavar='DIR',
        help='a folder of images without labels: set what is new from them, '
        'so that the network starts close to its source')
    parser.add_argument(
        '--calibration-images',
        type=int,
        default=64,
        metavar='N',
        help='how many images of it to take; default: %(default)s')
    parser.add_argument(
        '--calibration-size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='their size in pixels; default: img_size of the backbone, 224 if '
        'it has none')
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
            dwc=args.dwc or default_dwc(args, backbone),
            prefix=args.prefix,
            min_carried=args.min_carried)
    except ValueError as error:
        raise ValueError(f'{args.src}: {error}') from None
    told = []
    if args.calibrate is not None:
        state_dict = calibrate_file(args, backbone, source.state_dict,
                                    state_dict, told)
        for name in report.new:
            if name in state_dict and '.attn.' in name:
                report.new[name] = 'from images'
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
    return [*lines, *told, f'wrote {out}']


def default_dwc(args: argparse.Namespace, backbone: nn.Module) -> str:
    """The start of the convolution where the command line names none."""
    own = args.calibrate is not None and backbone.own_attention == 'cross'
    return 'lepe' if own else 'zero'


def calibrate_file(args: argparse.Namespace, backbone: nn.Module,
                   source: Dict[str, Tensor], converted: Dict[str, Tensor],
                   told: List[str]) -> Dict[str, Tensor]:
    """Set what is new from the images that the command line names.

    Args:
        args (Namespace): The command line.
        backbone (RPBackbone): What was converted to; it is changed.
        source (dict[str, Tensor]): The weights as they were in the file.
        converted (dict[str, Tensor]): The converted ones.
        told (list[str]): Gets a line for each layer.

    Returns:
        dict[str, Tensor]: The converted ones with new values in all
        RPAttention layers.

    Raises:
        ValueError: The folder has no images, or one that cannot be read.
    """
    # Not at the top: torchvision is needed for nothing else here.
    from mmrpa.transfer.images import load_images, read_normalisation
    backbone.load_state_dict({**backbone.state_dict(), **converted})
    twin = build_target(
        args.arch, args.config,
        {**args.options, 'attention': backbone.own_attention})
    weights, _ = convert(source, twin, prefix=args.prefix,
                         min_carried=args.min_carried)
    twin.load_state_dict({**twin.state_dict(), **weights})
    normalisation = {}
    if args.config is not None:
        normalisation = read_normalisation(Config.fromfile(args.config))
    size = args.calibration_size or [getattr(backbone, 'img_size', 224)] * 2
    images = load_images(args.calibrate, size, args.calibration_images,
                         **normalisation)
    names = [name for name, *_ in attention_pairs(twin, backbone)]
    with torch.no_grad():
        start_student(
            twin, backbone, images, carry=False,
            dwc='keep' if args.dwc in ('lepe', 'init') else args.dwc,
            log=lambda line: told.append(f'  {line}'))
    return {
        **converted, **{
            name: value
            for name, value in backbone.state_dict().items()
            if name.startswith(tuple(f'{layer}.' for layer in names))
        }
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse_args(argv)
    protect_process()
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
