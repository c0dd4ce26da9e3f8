"""Embeddings, position tables, blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmrpa.layers import (
    FFN,
    DenseAttention,
    DropPath,
    PatchEmbed,
    PatchMerging,
    PositionEmbed,
    TransformerBlock,
    block,
)


@pytest.mark.parametrize('size', [(8, 12), (9, 13), (4, 4), (5, 7)])
def test_patch_embed_is_a_linear_map_of_each_patch(size):
    layer = PatchEmbed(3, 5, 4)
    x = torch.randn(2, 3, *size)
    tokens, hw_shape = layer(x)
    assert hw_shape == tuple(-(-side // 4) for side in size)
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    row, col = hw_shape[0] - 1, hw_shape[1] - 1
    patch = padded[:, :, row * 4:row * 4 + 4, col * 4:col * 4 + 4].flatten(1)
    torch.testing.assert_close(
        tokens[:, -1], patch @ layer.projection.weight.flatten(1).T)


@pytest.mark.parametrize('kernel,stride,padding', [(7, 4, 2), (3, 2, 1)])
def test_overlapping_patches_cover_ceil_of_the_size(kernel, stride, padding):
    layer = PatchEmbed(3, 5, stride, kernel, padding)
    for size in range(stride, 3 * stride + 1):
        assert layer(torch.zeros(1, 3, size, size))[1][0] == -(-size // stride)


def test_patch_merging_takes_the_official_order():
    layer = PatchMerging(1, 4)
    layer.norm = torch.nn.Identity()
    torch.nn.init.eye_(layer.reduction.weight)
    x = torch.arange(6.).view(1, 1, 2, 3)
    tokens, hw_shape = layer(x)
    assert hw_shape == (1, 2)
    assert tokens[0].tolist() == [[0, 3, 1, 4], [2, 5, 0, 0]]


@pytest.mark.parametrize('num_extra', [0, 1])
def test_position_table_is_resized_at_run_time_and_on_load(num_extra):
    layer = PositionEmbed(6, (4, 4), num_extra)
    extra = layer.pos_embed[:, :num_extra]
    grid = layer.pos_embed[:, num_extra:].view(1, 4, 4, 6)
    expected = torch.cat((extra, F.interpolate(
        grid.permute(0, 3, 1, 2), (3, 7), mode='bicubic').flatten(2).transpose(
            1, 2)), dim=1)
    x = torch.randn(2, num_extra + 21, 6)
    torch.testing.assert_close(layer(x, (3, 7)), x + expected)

    larger = PositionEmbed(6, (7, 7), num_extra)
    larger.load_state_dict(layer.state_dict())
    zeros = torch.zeros(1, num_extra + 49, 6)
    torch.testing.assert_close(larger(zeros, (7, 7)), layer(zeros, (7, 7)))


def test_position_table_that_is_not_square_is_refused():
    source = PositionEmbed(6, (2, 3))
    with pytest.raises(ValueError, match='6 grid rows.*img_size'):
        PositionEmbed(6, (4, 4)).load_state_dict(source.state_dict())


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 2, 3))
    assert set(out.unique().tolist()) == {0., torch.tensor(1 / 0.75).item()}
    assert (out.amin((1, 2)) == out.amax((1, 2))).all()
    assert abs(out.mean() - 1) < 0.03
    assert torch.equal(layer.eval()(out), out)
    with pytest.raises(ValueError, match='got 1.0'):
        DropPath(1.)


def test_block_is_pre_norm_residual():
    block = TransformerBlock(DenseAttention(8, 2), 8, 2, norm_eps=1e-3)
    x = torch.randn(2, 6, 8)

    def norm(t):
        mean = t.mean(-1, keepdim=True)
        variance = (t - mean).square().mean(-1, keepdim=True)
        return (t - mean) / (variance + 1e-3).sqrt()

    middle = x + block.attn(norm(x), (2, 3))
    expected = middle + block.ffn(norm(middle))
    torch.testing.assert_close(block(x, (2, 3)), expected)
    assert isinstance(block.ffn, FFN) and block.ffn[0].out_features == 16


@pytest.mark.parametrize('size', [1, 7 * 4 * 64, 10**9])
@pytest.mark.parametrize('shape', [(1, 1), (2, 9), (3, 14)], ids=str)
def test_ffn_in_pieces_equals_ffn_at_once(monkeypatch, size, shape):
    monkeypatch.setattr(block, 'PIECE_BYTES', size)
    layer = TransformerBlock(nn.Identity(), 16, 4).eval()
    layer.attn.forward = lambda x, hw_shape: x
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(*shape, 16)
    y = x + layer.norm1(x)
    expected = y + layer.ffn(layer.norm2(y))
    kept = x.clone()
    with torch.no_grad():
        actual = layer(x, (1, shape[1]))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize('name', ['norm2', 'ffn', 'ffn.0', 'ffn.3'])
def test_ffn_that_someone_listens_to_is_called_once(monkeypatch, name):
    monkeypatch.setattr(block, 'PIECE_BYTES', 1)
    layer = TransformerBlock(nn.Identity(), 16, 4).eval()
    layer.attn.forward = lambda x, hw_shape: x
    shapes = []
    layer.get_submodule(name).register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        layer(torch.randn(2, 9, 16), (1, 9))
    assert shapes == [(2, 9)]
