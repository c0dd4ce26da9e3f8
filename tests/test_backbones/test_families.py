"""What is special about each family, and its size."""

from itertools import pairwise

import pytest
import torch
from zoo import build

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

# Parameters with a 1000-class head, in millions, of the publications.
PUBLISHED = {
    (RPDeiT, 'tiny'): 6.0,
    (RPDeiT, 'small'): 22.7,
    (RPDeiT, 'base'): 87.2,
    (RPPVT, 'tiny'): 11.6,
    (RPPVT, 'small'): 20.6,
    (RPPVT, 'medium'): 35.9,
    (RPPVT, 'large'): 48.7,
    (RPSwin, 'tiny'): 29,
    (RPSwin, 'small'): 50,
    (RPSwin, 'base'): 88,
    (RPCSWin, 'tiny'): 22,
    (RPCSWin, 'small'): 35,
    (RPCSWin, 'base'): 77,
}
ARCHS = {
    # embed_dims, depths, num_heads, mlp_ratios, written from the publications
    (RPDeiT, 'tiny'): ([192], [12], [3], [4]),
    (RPDeiT, 'small'): ([384], [12], [6], [4]),
    (RPDeiT, 'base'): ([768], [12], [12], [4]),
    (RPPVT, 'tiny'): ([64, 128, 320, 512], [2, 2, 2, 2], [1, 2, 5, 8],
                      [8, 8, 4, 4]),
    (RPPVT, 'small'): ([64, 128, 320, 512], [3, 4, 6, 3], [1, 2, 5, 8],
                       [8, 8, 4, 4]),
    (RPPVT, 'medium'): ([64, 128, 320, 512], [3, 4, 18, 3], [1, 2, 5, 8],
                        [8, 8, 4, 4]),
    (RPPVT, 'large'): ([64, 128, 320, 512], [3, 8, 27, 3], [1, 2, 5, 8],
                       [8, 8, 4, 4]),
    (RPSwin, 'tiny'): ([96, 192, 384, 768], [2, 2, 6, 2], [3, 6, 12, 24],
                       [4, 4, 4, 4]),
    (RPSwin, 'small'): ([96, 192, 384, 768], [2, 2, 18, 2], [3, 6, 12, 24],
                        [4, 4, 4, 4]),
    (RPSwin, 'base'): ([128, 256, 512, 1024], [2, 2, 18, 2], [4, 8, 16, 32],
                       [4, 4, 4, 4]),
    (RPCSWin, 'tiny'): ([64, 128, 256, 512], [1, 2, 21, 1], [2, 4, 8, 16],
                        [4, 4, 4, 4]),
    (RPCSWin, 'small'): ([64, 128, 256, 512], [2, 4, 32, 2], [2, 4, 8, 16],
                         [4, 4, 4, 4]),
    (RPCSWin, 'base'): ([96, 192, 384, 768], [2, 4, 32, 2], [4, 8, 16, 32],
                        [4, 4, 4, 4]),
}


def block_params(c, heads, m, ratio):
    """One block with RPAttention, counted on paper."""
    d = c // heads
    linear = 3 * c * c + 3 * c + c * c + c  # qkv, proj
    ours = heads * m * d + 3 * heads * d * d + 9 * c + c  # A, Interact, DWC
    ffn = 2 * ratio * c * c + ratio * c + c
    return linear + ours + ffn + 4 * c  # two LayerNorms


def closed_form(cls, dims, depths, heads, ratios):
    """Parameters of the classification backbone (last output only)."""
    ms = [64] if cls is RPDeiT else [16, 32, 64, 64]
    total = sum(n * block_params(c, h, m, r)
                for c, n, h, m, r in zip(
                    dims, depths, heads, ms, ratios, strict=True))
    c0 = dims[0]
    if cls is RPDeiT:
        stem = 16 * 16 * 3 * c0 + c0 + c0 + 197 * c0
    else:
        kernel = 7 if cls is RPCSWin else 4
        stem = kernel * kernel * 3 * c0 + c0 + 2 * c0
    downs = 0
    for a, b in pairwise(dims):
        if cls is RPSwin:
            downs += 2 * 4 * a + 4 * a * b
        else:
            kernel = 3 if cls is RPCSWin else 2
            downs += kernel * kernel * a * b + b + 2 * b
    tables = sum((56 // 2**i)**2 * c
                 for i, c in enumerate(dims)) if cls is RPPVT else 0
    return total + stem + downs + tables + 2 * dims[-1]


@pytest.mark.parametrize('cls,arch', PUBLISHED,
                         ids=[f'{c.__name__}-{a}' for c, a in PUBLISHED])
def test_parameter_counts(cls, arch):
    with torch.device('meta'):
        model = cls(arch, out_indices=(-1, ))
    count = sum(p.numel() for p in model.parameters())
    assert count == closed_form(cls, *ARCHS[cls, arch])
    with_head = count + 1000 * (model.out_channels[-1] + 1)
    assert with_head / 1e6 == pytest.approx(PUBLISHED[cls, arch], rel=0.08)


@pytest.mark.parametrize('with_cls', [True, False], ids=['cls', 'no-cls'])
def test_deit_output_types(with_cls):
    maps = build('deit', with_cls_token=with_cls, out_indices=(1, 3))
    x = torch.randn(2, 3, 64, 32)
    grid = maps(x)
    pooled = build('deit', with_cls_token=with_cls, out_indices=(1, 3),
                   out_type='avg_featmap')
    pooled.load_state_dict(maps.state_dict())
    for vector, m in zip(pooled(x), grid, strict=True):
        assert vector.shape == (2, 16)
        torch.testing.assert_close(vector, m.mean((2, 3)))
    if not with_cls:
        with pytest.raises(ValueError, match='needs with_cls_token=True'):
            build('deit', with_cls_token=False, out_type='cls_token')
        return
    cls_out = build('deit', out_indices=(1, 3), out_type='cls_token')
    cls_out.load_state_dict(maps.state_dict())
    captured = []
    cls_out.stages[3].register_forward_hook(
        lambda module, args, out: captured.append(out[0]))
    vector = cls_out(x)[1]
    tokens = captured[0]
    assert tokens.shape == (2, 4 * 2 + 1, 16)
    torch.testing.assert_close(vector, cls_out.norm3.norm(tokens[:, 0]))


def test_a_classifier_of_the_cls_token_trains_all_but_the_last_dwc():
    model = build('deit', out_indices=(-1, ), out_type='cls_token')
    model(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
    untrained = [name for name, p in model.named_parameters()
                 if not p.grad.any()]
    assert not model.stages[3].blocks[0].attn.dwc.weight.any()
    assert untrained == [f'stages.3.blocks.0.attn.dwc.{part}'
                         for part in ('weight', 'bias')]


@pytest.mark.parametrize('cls,arch,attention,count', [
    (RPSwin, 'tiny', 'window', 28288354),
    (RPDeiT, 'tiny', 'dense', 5717416),
    (RPDeiT, 'small', 'dense', 22050664),
    (RPDeiT, 'base', 'dense', 86567656),
])
def test_twins_have_the_published_sizes(cls, arch, attention, count):
    """With a 1000-class head; the counts of the official repositories."""
    with torch.device('meta'):
        model = cls(arch, attention=attention, out_indices=(-1, ))
    own = sum(p.numel() for p in model.parameters())
    assert own + 1000 * (model.out_channels[-1] + 1) == count


def test_deit_rejects_other_values():
    with pytest.raises(ValueError, match="out_type must be one of.*'raw'"):
        build('deit', out_type='raw')
    with pytest.raises(ValueError, match="'depths'.*one number.*1, 1"):
        build('deit', arch=dict(embed_dims=16, depths=(1, 1), num_heads=2,
                                mlp_ratios=2))
    with pytest.raises(ValueError, match='img_size must be at least 16'):
        build('deit', img_size=8)


def test_swin_shifts_every_second_block():
    model = RPSwin(
        dict(embed_dims=(8, 16), depths=(2, 3), num_heads=(2, 2),
             mlp_ratios=2),
        attention='window',
        num_representatives=4,
        out_indices=(0, 1))
    shifts = [[b.attn.shift_size for b in s.blocks] for s in model.stages]
    assert shifts == [[0, 3], [0, 3, 0]]


def test_pvt_reduces_by_8_4_2_1():
    model = build('pvt', attention='sr')
    assert [s.blocks[0].attn.sr_ratio for s in model.stages] == [8, 4, 2, 1]


def test_cswin_stripes_grow():
    model = RPCSWin('tiny', attention='cross')
    splits = [s.blocks[0].attn.split_size for s in model.stages]
    assert splits == [1, 2, 7, None]
