"""Time a config's backbone against its twin and other libraries' own.

The peers: rp (the backbone as configured), naive (the same with
impl='naive'), projections (the same with nothing between qkv and proj: no
attention on the same projections can be faster), own (its twin: the same class
with the attention of its family), dense (the twin with dense attention), mmdet
(its Swin or PVT, built as its shipped configs do) and timm (swin_* as a
feature extractor, deit_* up to its last tokens). timm has neither PVT v1 nor
CSWin, mmdet has neither DeiT nor CSWin. Stochastic depth is off in all of
them.

Modes: forward, and forward with backward. bfloat16 and float16 mean autocast,
as the hosts' --amp. In each round every peer is timed once. Ratios are taken
round by round; their median and quartiles are reported, with every sample.
"""

import argparse
import sys
from importlib.util import find_spec
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import torch
from benchmarks import measure, reports
from benchmarks.attention import ChainedProjections
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmrpa.backbones.base import RPBackbone
from mmrpa.cfg_options import DictAction
from mmrpa.layers import RPAttention

SIZES = ('224x224', '512x512', '800x1344')
PEERS = ('rp', 'naive', 'projections', 'own', 'dense', 'mmdet', 'timm')
DEFAULT_PEERS = tuple(peer for peer in PEERS if peer != 'dense')
REFERENCE = 'own'


class NoSuchPeer(ValueError):
    """A library has no counterpart of a backbone."""


def build_mmdet(backbone: RPBackbone, cfg: Mapping[str, Any],
                hw_shape: Sequence[int]) -> nn.Module:
    """mmdet's Swin or PVT, as wide and as deep as an mmrpa backbone.

    Raises:
        NoSuchPeer: mmdet has no such backbone.
    """
    from mmdet.models.backbones import (
        PyramidVisionTransformer,
        SwinTransformer,
    )
    family, arch = type(backbone).__name__, backbone.arch
    common = dict(in_channels=backbone.in_channels, drop_path_rate=0.,
                  drop_rate=backbone.drop_rate, qkv_bias=backbone.qkv_bias,
                  num_heads=arch['num_heads'],
                  out_indices=backbone.out_indices)
    dims, ratios = arch['embed_dims'], arch['mlp_ratios']
    if family == 'RPSwin' and len(set(ratios)) == 1 and all(
            b == 2 * a for a, b in zip(dims, dims[1:], strict=False)):
        return SwinTransformer(
            embed_dims=dims[0], depths=arch['depths'],
            window_size=backbone.window_size, mlp_ratio=ratios[0],
            **common)
    # mmdet's PVT multiplies one width by the heads of each stage.
    width = dims[0] // arch['num_heads'][0]
    if family == 'RPPVT' and len(dims) == 4 and all(
            d == width * h
            for d, h in zip(dims, arch['num_heads'], strict=True)):
        return PyramidVisionTransformer(
            embed_dims=width, num_layers=arch['depths'], mlp_ratios=ratios,
            pretrain_img_size=backbone.img_size, **common)
    raise NoSuchPeer(f'mmdet has no counterpart of {family} with {arch}')


def build_timm(backbone: RPBackbone, cfg: Mapping[str, Any],
               hw_shape: Sequence[int]) -> nn.Module:
    """timm's model of the same name, without weights and without head.

    Raises:
        NoSuchPeer: timm has no such model.
    """
    import timm
    family, arch = type(backbone).__name__, cfg.get('arch', 'tiny')
    if not isinstance(arch, str) or family not in ('RPSwin', 'RPDeiT'):
        raise NoSuchPeer(f'timm has no counterpart of {family} {arch}')
    if family == 'RPSwin':
        return timm.create_model(
            f'swin_{arch}_patch4_window7_224', features_only=True,
            out_indices=backbone.out_indices, drop_path_rate=0.,
            img_size=tuple(hw_shape), strict_img_size=False)
    return timm.create_model(f'deit_{arch}_patch16_224', num_classes=0,
                             drop_path_rate=0., dynamic_img_size=True)


def build_mmrpa(attention: Optional[str]) -> Callable:
    """A function that builds the backbone, or its twin of an attention."""

    def build(backbone: RPBackbone, cfg: Mapping[str, Any],
              hw_shape: Sequence[int]) -> nn.Module:
        own = type(backbone).own_attention
        name = own if attention == 'own' else attention
        return MODELS.build(
            cfg if name is None else dict(cfg, attention=name))

    return build


def build_naive(backbone: RPBackbone, cfg: Mapping[str, Any],
                hw_shape: Sequence[int]) -> nn.Module:
    """The backbone with RPAttention written down as it is defined."""
    return MODELS.build(dict(
        cfg, rp_cfg=dict(cfg.get('rp_cfg') or {}, impl='naive')))


def build_projections(backbone: RPBackbone, cfg: Mapping[str, Any],
                      hw_shape: Sequence[int]) -> nn.Module:
    """The backbone with the projections of its RPAttention layers alone."""
    built = MODELS.build(cfg)
    for parent in list(built.modules()):
        for name, child in parent.named_children():
            if isinstance(child, RPAttention):
                setattr(parent, name, ChainedProjections(child.embed_dims))
    return built


BUILDERS = dict(rp=build_mmrpa(None), naive=build_naive,
                projections=build_projections, own=build_mmrpa('own'),
                dense=build_mmrpa('dense'), mmdet=build_mmdet,
                timm=build_timm)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        ValueError: A value that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='with a backbone of mmrpa')
    parser.add_argument('--sizes', nargs='+', default=SIZES, metavar='HxW',
                        help=f'of the images; default: {" ".join(SIZES)}')
    parser.add_argument('--peers', nargs='+',
                        help=f'out of {", ".join(PEERS)}; default: those of '
                        f'{", ".join(DEFAULT_PEERS)} that exist for the '
                        'backbone (the JSON names the others)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        default={}, help='override config values, key=value')
    measure.add_arguments(parser)
    args = parser.parse_args(argv)
    measure.check_arguments(args)
    args.sizes = [measure.parse_sizes('--sizes', s, 'HxW') for s in args.sizes]
    measure.check_known('--peers', args.peers or (), PEERS)
    for library in ('mmdet', 'timm'):
        if (library in (args.peers or DEFAULT_PEERS)
                and find_spec(library) is None):
            raise ValueError(f'{library} is not installed; pip install '
                             f'{library}, or leave it out of --peers')
    return args


def read_backbone(config: str, cfg_options: Mapping[str, Any]
                  ) -> Dict[str, Any]:
    """The config of a backbone, without weights and stochastic depth.

    Raises:
        ValueError: No such file, or no backbone of mmrpa in it.
    """
    try:
        cfg = Config.fromfile(config)
    except FileNotFoundError as error:
        raise ValueError(f'no such config: {config}') from error
    cfg.merge_from_dict(cfg_options)
    backbone = cfg.get('model', {}).get('backbone', {})
    if not str(backbone.get('type')).startswith('mmrpa.'):
        raise ValueError('model.backbone.type must be one of mmrpa, got '
                         f'{backbone.get("type")!r} in {config}')
    return dict(backbone.to_dict(), init_cfg=None, drop_path_rate=0.)


def build_peers(cfg: Mapping[str, Any], hw_shape: Sequence[int],
                peers: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Build all peers for images of a size.

    Args:
        cfg (Mapping): The backbone's config.
        hw_shape (sequence[int]): Height and width in pixels.
        peers (sequence[str], optional): Which; an absent one is an error.
            None: the default ones, less those that do not exist.

    Returns:
        dict: By name, the module, or the reason (str) why there is none. The
        reference is always there.

    Raises:
        ValueError: A peer that was asked for does not exist, or the config
            cannot be built.
    """
    try:
        backbone = MODELS.build(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f'the backbone cannot be built: {error}') from error
    built: Dict[str, Any] = {}
    for name in dict.fromkeys((*(peers or DEFAULT_PEERS), REFERENCE)):
        try:
            built[name] = BUILDERS[name](backbone, cfg, hw_shape)
        except NoSuchPeer as error:
            if peers is not None:
                raise
            built[name] = str(error)
    return built


def benchmark(cfg: Mapping[str, Any], hw_shape: Sequence[int], mode: str,
              args: argparse.Namespace, timer: measure.Timer
              ) -> Dict[str, Any]:
    """Measure one image size in one mode; returns a record for the JSON."""
    built = build_peers(cfg, hw_shape, args.peers)
    # They are in the JSON, and body has said so.
    absent = {k: v for k, v in built.items() if isinstance(v, str)}
    modules = {k: v.to(args.device) for k, v in built.items()
               if k not in absent}
    for module in modules.values():
        module.train(mode == 'train')  # mmdet's Swin does not return itself
    images = torch.randn(args.batch, cfg.get('in_channels', 3), *hw_shape,
                         device=args.device)
    dtype = getattr(torch, args.dtype)

    def run(module: nn.Module) -> Callable:
        # timm's classifiers have their features behind a name of their own.
        forward = getattr(module, 'forward_features', module)

        def call(x: torch.Tensor) -> Any:
            with torch.autocast(images.device.type, dtype,
                                enabled=dtype != torch.float32):
                return forward(x)

        return call

    calls = {name: (run(module), (images, ), module.parameters())
             for name, module in modules.items()}
    record = measure.compare(calls, mode, REFERENCE, args, timer,
                             f'{hw_shape[0]}x{hw_shape[1]}')
    record['left_out'].update(absent)
    record.update(
        case=dict(height=hw_shape[0], width=hw_shape[1]),
        params={name: sum(p.numel() for p in module.parameters())
                for name, module in modules.items()})
    return record


def body(argv: Sequence[str]) -> None:
    """Measure all sizes and write the report."""
    args = parse_args(argv)
    cfg = read_backbone(args.config, args.cfg_options)
    # Built once before all else, so that errors come at once.
    for name, peer in build_peers(cfg, args.sizes[0], args.peers).items():
        if isinstance(peer, str):
            print(f'  {name}: left out, {peer}', file=sys.stderr)
    timer = measure.Timer(args.device, args.flush_l2)
    records: List[Dict[str, Any]] = [
        benchmark(cfg, size, mode, args, timer)
        for mode in measure.MODES[args.mode] for size in args.sizes
    ]
    reports.write_report(
        reports.make_report('benchmark_backbones', args, argv, records,
                            config=args.config, backbone=cfg), args.out)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    return reports.run_tool('benchmark_backbones', body, argv)


if __name__ == '__main__':
    sys.exit(main())
