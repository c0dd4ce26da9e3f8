"""FLOPs against a closed form, for every arch and every attention."""

import json

import pytest
from helpers import TOOLS, load_tool
from mmengine.config import Config

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin
from mmrpa.flops import count_backbone, count_model, count_twins
from mmrpa.ops import IMPLS

FAMILIES = dict(RPDeiT=RPDeiT, RPPVT=RPPVT, RPSwin=RPSwin, RPCSWin=RPCSWin)
NANO = (TOOLS.parent / 'configs/mmdet/quickstart'
        / 'mask-rcnn_rp-pvt-nano_fpn_1xb4_sample.py')
ARCHS = [(name, arch) for name, cls in FAMILIES.items()
         for arch in cls.arch_zoo]
# Deeper and wider ones are counted by the same code.
ALL_ARCHS = [pytest.param(*a, id='-'.join(a), marks=[] if a[1] == 'tiny' else
                          pytest.mark.long) for a in ARCHS]


def rp(n, c, heads, m, n_map):
    """Token mixing of RPAttention, multiply-adds, counted on paper."""
    d = c // heads
    return heads * (5 * n * m * d + 2 * m * m * d + 3 * m * d * d
                    ) + 9 * n_map * c


def dense(n, c):
    return 2 * n * n * c


def window(h, w, c):
    windows = -(-h // 7) * -(-w // 7)
    return windows * 2 * 49 * 49 * c, windows * 49


def reduced(h, w, c, ratio):
    n, m = h * w, (h // ratio) * (w // ratio)
    conv = m * ratio * ratio * c * c if ratio > 1 else 0
    return 2 * n * m * c + conv, m


def cross(h, w, c, split):
    if split is None:
        return 2 * (h * w)**2 * c + 9 * h * w * c, h * w
    ph, pw = (-(-s // split) * split for s in (h, w))
    pairs = ph * pw * split * (ph + pw)
    return 2 * pairs * c // 2 + 9 * ph * pw * c, ph * pw


def closed_form(name, arch, attention, hw_shape):
    """Total, attention layers, and their mixing, in multiply-adds."""
    a = FAMILIES[name].arch_zoo[arch] if isinstance(arch, str) else arch
    plain = name == 'RPDeiT'
    dims = [a['embed_dims']] if plain else a['embed_dims']
    depths = [a['depths']] if plain else a['depths']
    heads = [a['num_heads']] if plain else a['num_heads']
    ratios = a['mlp_ratios']
    total = attn = mixing = 0
    for i, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        stride = 16 if plain else 4 * 2**i
        h, w = (-(-s // stride) for s in hw_shape)
        cells = h * w
        if plain or i == 0:
            kernel = 16 if plain else (7 if name == 'RPCSWin' else 4)
            total += cells * kernel**2 * 3 * c
        elif name == 'RPSwin':
            total += cells * 4 * dims[i - 1] * c
        else:
            kernel = 3 if name == 'RPCSWin' else 2
            total += cells * kernel**2 * dims[i - 1] * c
        n = cells + plain  # the CLS token
        ratio = ratios if isinstance(ratios, int) else ratios[i]
        projected, kv = n, None
        if attention == 'rp':
            m = 64 if plain else (16, 32, 64, 64)[i]
            mix = rp(n, c, heads[i], m, cells)
        elif attention == 'dense':
            mix = dense(n, c)
        elif attention == 'window':
            mix, projected = window(h, w, c)
        elif attention == 'sr':
            mix, kv = reduced(h, w, c, (8, 4, 2, 1)[i])
        else:
            mix, projected = cross(h, w, c, (1, 2, 7, None)[i])
        # q, k and v of the padded tokens; the output of the real ones.
        linear = (3 * projected if kv is None else n + 2 * kv) * c * c
        linear += n * c * c
        mixing += depth * mix
        attn += depth * (mix + linear)
        total += depth * (mix + linear + 2 * ratio * n * c * c)
    return total, attn, mixing


@pytest.mark.parametrize('name,arch', ALL_ARCHS)
@pytest.mark.parametrize('hw_shape', [(270, 333)], ids=str)  # all must pad
def test_every_arch_and_twin_equals_the_closed_form(name, arch, hw_shape):
    cfg = dict(type=f'mmrpa.{name}', arch=arch)
    counts = count_twins(cfg, hw_shape)
    own = FAMILIES[name].own_attention
    assert list(counts) == list(
        dict.fromkeys(('as configured', own, 'dense')))
    for attention, count in counts.items():
        expected = closed_form(
            name, arch, 'rp' if attention == 'as configured' else attention,
            hw_shape)
        assert (count.macs, count.attention, count.mixing) == expected


@pytest.mark.parametrize('name,arch', ARCHS, ids=['-'.join(a) for a in ARCHS])
def test_every_impl_equals_the_closed_form(name, arch):
    # One block a stage: blocks of a stage are alike.
    arch = dict(FAMILIES[name].arch_zoo[arch])
    arch['depths'] = 1 if name == 'RPDeiT' else (1, 1, 1, 1)
    expected = closed_form(name, arch, 'rp', (270, 333))
    for impl in IMPLS[1:]:
        count = count_backbone(
            dict(type=f'mmrpa.{name}', arch=arch, rp_cfg=dict(impl=impl)),
            (270, 333))
        assert (count.macs, count.attention, count.mixing) == expected, impl


def test_parameters_are_those_of_the_backbone():
    count = count_backbone(dict(type='mmrpa.RPSwin', arch='tiny'), (64, 64))
    model = RPSwin('tiny')
    assert count.params == sum(p.numel() for p in model.parameters())


def test_whole_classifier_is_backbone_and_head():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='mmrpa.RPSwin', arch='tiny', out_indices=(3, )),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='LinearClsHead', num_classes=10, in_channels=768))))
    whole = count_model(cfg, (96, 64))
    backbone = count_backbone(cfg.model.backbone, (96, 64))
    assert whole.macs == backbone.macs + 768 * 10
    assert whole.params == backbone.params + 768 * 10 + 10


def test_tool_prints_what_was_counted(capsys):
    tool = load_tool('get_flops')
    path = str(NANO)
    assert tool.main([path, '--shape', '128', '96', '--json']) == 0
    out = capsys.readouterr().out
    report = json.loads(out[out.index('{'):])
    backbone = Config.fromfile(path).model.backbone
    expected = count_backbone(backbone, (128, 96))
    assert report['input_shape'] == [3, 128, 96]
    assert report['backbones']['as configured']['macs'] == expected.macs
    assert list(report['backbones']) == ['as configured', 'sr', 'dense']

    assert tool.main([path, '--shape', '128', '96']) == 0
    text = capsys.readouterr().out
    assert 'one image of 3x128x96 (C x H x W)' in text
    assert '1 MAC = 2 FLOPs' in text and 'on 1000 boxes and 100 masks' in text
    row, = (line.split() for line in text.splitlines()
            if line.startswith('backbone, as configured'))
    assert row[-2:] == [f'{expected.macs / 1e9:.2f}',
                        f'{2 * expected.macs / 1e9:.2f}']


def test_two_stage_detector_counts_its_heads():
    """RoI heads by hand: they must not be forgotten."""
    tool = load_tool('get_flops')
    path = str(NANO)
    small, large = (tool.get_flops(path, shape)['model']['macs']
                    for shape in ((64, 64), (128, 128)))
    # Two 3x3 convs of 7 x 7, one hidden layer, classes and one box.
    heads = 1000 * (2 * 49 * 9 * 64 * 64 + 49 * 64 * 256 + 256 * (6 + 4))
    # Two 3x3 convs of 14 x 14, a deconvolution to 28 x 28, the logits.
    heads += 100 * (2 * 196 * 9 * 64 * 64 + 784 * 64 * 64 + 784 * 64 * 5)
    backbones = [
        tool.get_flops(path, shape)['backbones']['as configured']['macs']
        for shape in ((64, 64), (128, 128))
    ]
    fpn_and_rpn = []
    for side in (64, 128):
        cells = [(side // s)**2 for s in (4, 8, 16, 32)]
        dims = (32, 64, 128, 160)
        lateral = sum(n * c * 64 for n, c in zip(cells, dims, strict=True))
        fpn_and_rpn.append(lateral + sum(cells) * (9 * 64 * 64 * 2 + 64 *
                                                   (3 + 12)))
    assert small == backbones[0] + fpn_and_rpn[0] + heads
    assert large == backbones[1] + fpn_and_rpn[1] + heads


def test_bad_input_is_named(tmp_path, capsys):
    tool = load_tool('get_flops')
    assert tool.main([str(tmp_path / 'no.py')]) == 2
    assert 'no.py' in capsys.readouterr().err
    other = tmp_path / 'other.py'
    other.write_text("default_scope = 'mmdet'\n"
                     "model = dict(backbone=dict(type='ResNet'))\n")
    assert tool.main([str(other)]) == 2
    assert "got 'ResNet'" in capsys.readouterr().err
    other.write_text("default_scope = 'mmocr'\nmodel = dict()\n")
    assert tool.main([str(other)]) == 2
    assert "got 'mmocr'" in capsys.readouterr().err
