"""The public networks that weights come from, small, with random weights.

timm, mmpretrain, mmdet and mmseg give true names and true arithmetic. Names
of official repositories that no installed library has are made from those by
the tables here, written from the repositories' sources and not from ours;
CSWin, which nobody has, is written out below.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List

import torch
from helpers import mmdet_models
from timm.models import deit as timm_deit
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

IMG = 128
DIMS = dict(embed_dims=(8, 16, 32, 64), depths=(2, 2, 2, 1),
            num_heads=(1, 2, 4, 4), mlp_ratios=4)
PVT_DIMS = dict(embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 2),
                num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 2, 2))
CSWIN_DIMS = dict(embed_dims=(8, 16, 32, 64), depths=(1, 2, 2, 1),
                  num_heads=(2, 2, 4, 4), mlp_ratios=2)


@dataclass
class Source:
    """A network in float64 whose maps after each stage are known.

    Args:
        state_dict (dict): Its weights by its own names.
        maps (list[Tensor]): (B, C, H, W) after each stage, before any output
            norm unless ``normed``.
        cls (type): The RP backbone of its family.
        options (dict): Arguments for a backbone of its size with the family's
            own attention.
        normed (list[Tensor]): Maps after output norms, by stage.
    """

    state_dict: Dict[str, Tensor]
    maps: List[Tensor]
    cls: type
    options: Dict[str, Any]
    normed: Dict[int, Tensor] = field(default_factory=dict)

    def twin(self, **options):
        """The backbone with the family's own attention, in float64."""
        return self.cls(**{**self.options, **options}).double().eval()


def images() -> Tensor:
    """The images that all maps are of."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, IMG, IMG, generator=generator).double()


def randomize(model: nn.Module) -> nn.Module:
    """All parameters random, norms and tables too, so that each one shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise * (param[0].numel()**-0.5 if param.dim() > 1 and
                                 param.shape[0] > 1 else 0.5))
    model.double().eval()
    return model  # not what eval() returns: the hosts' overrides return None


def _hooked(model: nn.Module, modules: List[nn.Module],
            to_map: Callable[[Any], Tensor]) -> List[Tensor]:
    maps: List[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: maps.append(to_map(out)))
        for m in modules
    ]
    with torch.no_grad():
        model(images())
    for hook in hooks:
        hook.remove()
    return maps


def _tokens_to_map(tokens: Tensor, skip: int = 0) -> Tensor:
    tokens = tokens[:, skip:]
    side = round(tokens.shape[1]**0.5)
    return tokens.transpose(1, 2).unflatten(-1, (side, side))


SWIN_OPTIONS = dict(arch=DIMS, window_size=4, attention='window',
                    norm_cfg=None)


def timm_swin() -> Source:
    """timm's Swin: merging at the start of a stage, maps (B, H, W, C)."""
    model = randomize(TimmSwin(
        img_size=IMG, embed_dim=8, depths=DIMS['depths'],
        num_heads=DIMS['num_heads'], window_size=4, num_classes=5))
    maps = _hooked(model, list(model.layers), lambda x: x.permute(0, 3, 1, 2))
    with torch.no_grad():
        last = model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return Source(model.state_dict(), maps, RPSwin, SWIN_OPTIONS, {3: last})


def official_swin() -> Source:
    """The same network by the names of microsoft/Swin-Transformer, whose
    merging stands at the end of a stage, and with its buffers."""
    source = timm_swin()
    state = {}
    for name, value in source.state_dict.items():
        name = re.sub(r'layers\.(\d)\.downsample',
                      lambda m: f'layers.{int(m[1]) - 1}.downsample', name)
        state[name.replace('head.fc', 'head')] = value
        if name.endswith('relative_position_bias_table'):
            block = name.rpartition('.')[0]
            state[f'{block}.relative_position_index'] = torch.zeros(16, 16)
            state[name.replace('attn.relative_position_bias_table',
                               'attn_mask')] = torch.zeros(4, 16, 16)
    source.state_dict = state
    return source


def official_swin_detection() -> Source:
    """Swin-Transformer-Object-Detection: a norm after each stage."""
    source = official_swin()
    for i, dims in enumerate(DIMS['embed_dims']):
        norm = randomize(nn.LayerNorm(dims))
        for part, value in norm.state_dict().items():
            source.state_dict[f'norm{i}.{part}'] = value
        with torch.no_grad():
            out = norm(source.maps[i].permute(0, 2, 3, 1))
        source.normed[i] = out.permute(0, 3, 1, 2)
    for part in ('norm.weight', 'norm.bias', 'head.weight', 'head.bias'):
        del source.state_dict[part]
    return source


def _mm_swin(cls: type, **arch: Any) -> Source:
    model = randomize(cls(window_size=4, out_indices=(0, 1, 2, 3), **arch))
    with torch.no_grad():
        normed = dict(enumerate(model(images())))
    maps = _hooked(
        model, [stage.blocks[-1] for stage in model.stages], _tokens_to_map)
    return Source(model.state_dict(), maps, RPSwin, SWIN_OPTIONS, normed)


def mmpretrain_swin() -> Source:
    """mmpretrain's Swin."""
    from mmpretrain.models import SwinTransformer
    return _mm_swin(SwinTransformer, img_size=IMG, arch=dict(
        embed_dims=8, depths=DIMS['depths'], num_heads=DIMS['num_heads']))


def mmdet_swin() -> Source:
    """mmdet's Swin."""
    return _mm_swin(mmdet_models().SwinTransformer, embed_dims=8,
                    depths=DIMS['depths'], num_heads=DIMS['num_heads'])


def mmseg_swin() -> Source:
    """mmseg's Swin."""
    from mmseg.models.backbones import SwinTransformer
    return _mm_swin(SwinTransformer, embed_dims=8, depths=DIMS['depths'],
                    num_heads=DIMS['num_heads'])


DEIT_OPTIONS = dict(
    arch=dict(embed_dims=16, depths=3, num_heads=2, mlp_ratios=4),
    img_size=IMG, attention='dense', out_indices=(0, 1, 2), norm_cfg=None)
_TIMM_DEIT = dict(img_size=IMG, patch_size=16, embed_dim=16, depth=3,
                  num_heads=2, num_classes=5)


def _timm_deit(**options: Any) -> Source:
    model = randomize(TimmViT(**_TIMM_DEIT, **options))
    maps = _hooked(model, list(model.blocks),
                   lambda x: _tokens_to_map(x, skip=1))
    with torch.no_grad():
        last = _tokens_to_map(model.forward_features(images()), skip=1)
    return Source(model.state_dict(), maps, RPDeiT, DEIT_OPTIONS, {2: last})


def timm_deit_plain() -> Source:
    """DeiT, the same names in timm and in the official repository."""
    return _timm_deit()


def timm_deit3() -> Source:
    """DeiT III: LayerScale, and no position for the class token."""
    return _timm_deit(init_values=1e-4, no_embed_class=True)


def official_deit3() -> Source:
    """DeiT III by the names of facebookresearch/deit."""
    source = timm_deit3()
    source.state_dict = {
        re.sub(r'ls(\d)\.gamma', r'gamma_\1', name): value
        for name, value in source.state_dict.items()
    }
    return source


def timm_deit_distilled() -> Source:
    """Distilled DeiT; ``maps`` are of the network without the token."""
    model = timm_deit.VisionTransformerDistilled(**_TIMM_DEIT)
    state = randomize(model).state_dict()
    plain = TimmViT(**_TIMM_DEIT).double().eval()
    kept = {k: v for k, v in state.items() if 'dist' not in k}
    table = kept['pos_embed']
    kept['pos_embed'] = torch.cat((table[:, :1], table[:, 2:]), dim=1)
    plain.load_state_dict(kept)
    maps = _hooked(plain, list(plain.blocks),
                   lambda x: _tokens_to_map(x, skip=1))
    return Source(state, maps, RPDeiT, DEIT_OPTIONS)


def mmpretrain_deit() -> Source:
    """mmpretrain's ViT in DeiT's size; its last map is normed."""
    from mmpretrain.models import VisionTransformer
    model = randomize(VisionTransformer(
        arch=dict(embed_dims=16, num_layers=3, num_heads=2,
                  feedforward_channels=64),
        img_size=IMG, out_type='featmap', out_indices=[2]))
    maps = _hooked(model, list(model.layers),
                   lambda x: _tokens_to_map(x, skip=1))
    with torch.no_grad():
        last = model(images())[0]
    return Source(model.state_dict(), maps, RPDeiT, DEIT_OPTIONS, {2: last})


def mmseg_deit() -> Source:
    """mmseg's ViT in DeiT's size, as its DeiT configs use it."""
    from mmseg.models.backbones import VisionTransformer
    model = randomize(VisionTransformer(
        img_size=(IMG, IMG), patch_size=16, embed_dims=16, num_layers=3,
        num_heads=2, out_indices=(0, 1, 2), final_norm=True,
        patch_bias=True, norm_cfg=dict(type='LN', eps=1e-6)))
    maps = _hooked(model, list(model.layers),
                   lambda x: _tokens_to_map(x, skip=1))
    with torch.no_grad():
        last = model(images())[-1]
    return Source(model.state_dict(), maps, RPDeiT, DEIT_OPTIONS, {2: last})


PVT_OPTIONS = dict(arch=PVT_DIMS, img_size=IMG, attention='sr', norm_cfg=None)


def mmdet_pvt() -> Source:
    """mmdet's PVT, with the epsilon of the official norms: mmdet gives its
    1e-6 to those of patches and reductions, too."""
    model = mmdet_models().PyramidVisionTransformer(
        pretrain_img_size=IMG, embed_dims=8, num_layers=PVT_DIMS['depths'],
        num_heads=PVT_DIMS['num_heads'], mlp_ratios=PVT_DIMS['mlp_ratios'])
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and re.search(
                r'layers\.\d\.0\.norm|attn\.norm', name):
            module.eps = 1e-5
    randomize(model)
    with torch.no_grad():
        maps = list(model(images()))
    return Source(model.state_dict(), maps, RPPVT, PVT_OPTIONS)


def official_pvt() -> Source:
    """The same network by the names of whai362/PVT, with what a classifier
    has besides: a class token with a position, a norm and a head."""
    source = mmdet_pvt()
    state: Dict[str, Tensor] = {}
    for name, value in source.state_dict.items():
        _, i, part, *rest = name.split('.')
        stage, tail = int(i) + 1, '.'.join(rest)
        if part == '0':
            tail = tail.replace('projection', 'proj')
            state[f'patch_embed{stage}.{tail}'] = value
        elif rest[1] == 'pos_embed':
            state[f'pos_embed{stage}'] = value
        else:
            block = f'block{stage}.{int(rest[0]) - 1}'
            tail = '.'.join(rest[1:])
            if 'in_proj' in tail:
                kind = tail.rpartition('_')[2]
                c = value.shape[0] // 3
                state[f'{block}.attn.q.{kind}'] = value[:c]
                state[f'{block}.attn.kv.{kind}'] = value[c:]
                continue
            tail = tail.replace('attn.attn.out_proj', 'attn.proj')
            if value.dim() == 4 and tail.startswith('ffn'):
                value = value.flatten(1)
            tail = tail.replace('ffn.layers.0', 'mlp.fc1')
            state[f'{block}.{tail.replace("ffn.layers.3", "mlp.fc2")}'] = value
    last = PVT_DIMS['embed_dims'][-1]
    state['pos_embed4'] = torch.cat(
        (torch.full((1, 1, last), 7.).double(), state['pos_embed4']), dim=1)
    state['cls_token'] = torch.full((1, 1, last), 7.).double()
    state['head.weight'] = torch.zeros(5, last)
    norm = randomize(nn.LayerNorm(last, eps=1e-6))
    for part, value in norm.state_dict().items():
        state[f'norm.{part}'] = value
    with torch.no_grad():
        out = norm(source.maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    source.state_dict, source.normed = state, {3: out}
    return source


CSWIN_OPTIONS = dict(arch=CSWIN_DIMS, split_sizes=(1, 2, 4, None),
                     attention='cross', norm_cfg=None)


class _LePE(nn.Module):

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.get_v = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)


class _Mlp(nn.Module):

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden)
        self.fc2 = nn.Linear(hidden, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _CSWinBlock(nn.Module):
    """One block on maps (B, H, W, C), stripe by stripe, head by head."""

    def __init__(self, dims: int, heads: int, split) -> None:
        super().__init__()
        branches = 1 if split is None else 2
        self.heads, self.split = heads // branches, split
        self.norm1, self.norm2 = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)
        self.attns = nn.ModuleList(
            _LePE(dims // branches) for _ in range(branches))
        self.mlp = _Mlp(dims, int(dims * CSWIN_DIMS['mlp_ratios']))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        height, width, dims = x.shape[1:]
        part = dims // len(self.attns)
        out = torch.zeros_like(x)
        for i, branch in enumerate(self.attns):
            here = slice(i * part, (i + 1) * part)
            step = self.split or height
            for start in range(0, height, step):
                cells = slice(start, start + step)
                # The first branch's stripes are columns, the other's rows.
                where = ((slice(None), slice(None), cells, here)
                         if len(self.attns) == 2 and i == 0 else
                         (slice(None), cells, slice(None), here))
                out[where] = self._stripe(q[where], k[where], v[where],
                                          branch.get_v)
        x = x + self.proj(out)
        return x + self.mlp(self.norm2(x))

    def _stripe(self, q: Tensor, k: Tensor, v: Tensor,
                conv: nn.Conv2d) -> Tensor:
        local = conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = q.shape[-1] // self.heads
        outs = []
        for head in range(self.heads):
            a, b, c = (t[..., head * size:(head + 1) * size].flatten(1, 2)
                       for t in (q, k, v))
            weights = (a @ b.transpose(1, 2) / size**0.5).softmax(dim=-1)
            outs.append(weights @ c)
        return torch.cat(outs, dim=-1).view(v.shape) + local


class _Merge(nn.Module):

    def __init__(self, dims: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dims, out, 3, 2, 1)
        self.norm = nn.LayerNorm(out)


class CSWin(nn.Module):
    """CSWin by the names of microsoft/CSWin-Transformer."""

    def __init__(self) -> None:
        super().__init__()
        dims = CSWIN_DIMS['embed_dims']
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(3, dims[0], 7, 4, 2), nn.Identity(),
            nn.LayerNorm(dims[0]))
        for i in range(4):
            self.add_module(f'stage{i + 1}', nn.ModuleList(
                _CSWinBlock(dims[i], CSWIN_DIMS['num_heads'][i],
                            CSWIN_OPTIONS['split_sizes'][i])
                for _ in range(CSWIN_DIMS['depths'][i])))
            if i < 3:
                self.add_module(f'merge{i + 1}', _Merge(*dims[i:i + 2]))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], 5)

    def forward(self, x: Tensor) -> List[Tensor]:
        conv, _, norm = self.stage1_conv_embed
        x = norm(conv(x).permute(0, 2, 3, 1))
        maps = []
        for i in range(1, 5):
            for block in getattr(self, f'stage{i}'):
                x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
            if i < 4:
                merge = getattr(self, f'merge{i}')
                x = merge.conv(maps[-1]).permute(0, 2, 3, 1)
                x = merge.norm(x)
        return maps


def official_cswin() -> Source:
    """CSWin's classifier."""
    model = randomize(CSWin())
    with torch.no_grad():
        maps = model(images())
        last = model.norm(maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return Source(model.state_dict(), maps, RPCSWin, CSWIN_OPTIONS, {3: last})


def official_cswin_segmentation() -> Source:
    """CSWin's segmentor: norm1 to norm4, one after each stage."""
    source = official_cswin()
    state = source.state_dict
    state = {k: v for k, v in state.items()
             if k.split('.')[0] not in ('norm', 'head')}
    for i, dims in enumerate(CSWIN_DIMS['embed_dims']):
        norm = randomize(nn.LayerNorm(dims))
        state.update((f'norm{i + 1}.{k}', v)
                     for k, v in norm.state_dict().items())
        with torch.no_grad():
            out = norm(source.maps[i].permute(0, 2, 3, 1))
        source.normed[i] = out.permute(0, 3, 1, 2)
    source.state_dict = state
    return source


SOURCES: Dict[str, Callable[[], Source]] = {
    f.__name__: f for f in (
        timm_swin, official_swin, official_swin_detection, mmpretrain_swin,
        mmdet_swin, mmseg_swin, timm_deit_plain, timm_deit3, official_deit3,
        timm_deit_distilled, mmpretrain_deit, mmseg_deit, mmdet_pvt,
        official_pvt, official_cswin, official_cswin_segmentation)
}


@functools.lru_cache(maxsize=None)
def source_of(name: str) -> Source:
    """One of ``SOURCES``, built once."""
    return SOURCES[name]()
