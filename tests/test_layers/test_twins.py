"""The families' own attentions, one query and one cell at a time.

The oracle lists, for each query cell, which cells it may attend to and with
what bias, and does that attention alone, in float64.
"""

import pytest
import torch
import torch.nn.functional as F

from mmrpa.layers import (
    CrossShapedWindowAttention,
    DenseAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from mmrpa.layers.windows import pad_to_multiple, partition, unpartition


def attend_cells(q, k, v, num_heads, allowed):
    """``allowed(i)`` lists (key index, bias of each head) for query i."""
    channels = q.shape[-1]
    d = channels // num_heads
    rows = []
    for i in range(len(q)):
        cells = allowed(i)
        parts = []
        for h in range(num_heads):
            s = slice(h * d, (h + 1) * d)
            logits = torch.stack([
                (q[i, s] * k[j, s]).sum() * d**-0.5 + bias[h]
                for j, bias in cells
            ])
            weights = logits.softmax(0)
            parts.append(
                sum(w * v[j, s]
                    for w, (j, _) in zip(weights, cells, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def double_randomised(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer.double()


def same_with_gradients(layer, x, hw_shape, expected_function):
    """Outputs, input gradients and every parameter's gradient agree."""
    wanted = [x, *layer.parameters()]
    actual, expected = layer(x, hw_shape), expected_function()
    grad = torch.randn_like(actual)
    results = ([out, *torch.autograd.grad(out, wanted, grad)]
               for out in (actual, expected))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def test_dense_attends_to_everything():
    layer = double_randomised(DenseAttention(8, 2))
    x = torch.randn(1, 7, 8).double().requires_grad_()  # 2 x 3 and CLS

    def expected():
        q, k, v = layer.qkv(x)[0].chunk(3, dim=-1)
        zero = torch.zeros(2).double()
        out = attend_cells(q, k, v, 2, lambda i: [(j, zero) for j in range(7)])
        return layer.proj(out)[None]

    same_with_gradients(layer, x, (2, 3), expected)


@pytest.mark.parametrize('shift', [False, True], ids=['plain', 'shifted'])
@pytest.mark.parametrize('hw_shape', [(6, 6), (4, 5), (3, 7), (2, 3)])
def test_windows(shift, hw_shape):
    w = 3
    layer = double_randomised(WindowAttention(8, 2, w, shift))
    height, width = hw_shape
    x = torch.randn(1, height * width, 8).double().requires_grad_()
    # The padded map; its extra cells are ordinary tokens made of zeros.
    ph, pw = (-(-side // w) * w for side in hw_shape)
    shifts = [w // 2 if shift and side > w else 0 for side in (ph, pw)]

    def cell_window(y, x):
        # Cutting starts `shift` later, so the first window is a partial one.
        return ((y - shifts[0]) // w, (x - shifts[1]) // w)

    def expected():
        padded = F.pad(
            x.view(height, width, 8), (0, 0, 0, pw - width, 0, ph - height))
        q, k, v = layer.qkv(padded.view(-1, 8)).chunk(3, dim=-1)
        table = layer.relative_position_bias_table.view(2 * w - 1, 2 * w - 1,
                                                        2)

        def allowed(i):
            yi, xi = divmod(i, pw)
            return [(yj * pw + xj, table[yi - yj + w - 1, xi - xj + w - 1])
                    for yj in range(ph) for xj in range(pw)
                    if cell_window(yi, xi) == cell_window(yj, xj)]

        out = layer.proj(attend_cells(q, k, v, 2, allowed))
        out = out.view(ph, pw, 8)[:height, :width]
        return out.reshape(1, -1, 8)

    same_with_gradients(layer, x, hw_shape, expected)


def test_windows_of_a_batch_do_not_mix_images():
    layer = WindowAttention(8, 2, 3, shift=True).eval()
    x = torch.randn(3, 30, 8)
    torch.testing.assert_close(
        layer(x, (5, 6)), torch.cat([layer(i[None], (5, 6)) for i in x]))


@pytest.mark.parametrize('ratio,hw_shape', [(1, (2, 3)), (2, (4, 5)),
                                            (4, (3, 2))])
def test_spatial_reduction(ratio, hw_shape):
    layer = double_randomised(SpatialReductionAttention(8, 2, ratio))
    height, width = hw_shape
    x = torch.randn(1, height * width, 8).double().requires_grad_()

    def expected():
        grid, cells = x.view(height, width, 8), []
        for y in range(max(height // ratio, 1)):
            for z in range(max(width // ratio, 1)):
                block = torch.zeros(ratio, ratio, 8).double()
                part = grid[y * ratio:(y + 1) * ratio,
                            z * ratio:(z + 1) * ratio]
                block = F.pad(part, (0, 0, 0, ratio - part.shape[1], 0,
                                     ratio - part.shape[0]))
                if ratio == 1:
                    cells.append(block[0, 0])
                    continue
                cell = torch.einsum('yxc,ocyx->o', block, layer.sr.weight)
                cells.append(F.layer_norm(
                    cell + layer.sr.bias, (8, ), layer.norm.weight,
                    layer.norm.bias))
        k, v = layer.kv(torch.stack(cells)).chunk(2, dim=-1)
        zero = torch.zeros(2).double()
        out = attend_cells(
            layer.q(x[0]), k, v, 2,
            lambda i: [(j, zero) for j in range(len(cells))])
        return layer.proj(out)[None]

    same_with_gradients(layer, x, hw_shape, expected)


@pytest.mark.parametrize('split', [1, 2, None])
@pytest.mark.parametrize('hw_shape', [(4, 4), (3, 5)])
def test_cross_shaped_windows(split, hw_shape):
    layer = double_randomised(CrossShapedWindowAttention(8, 2, split))
    height, width = hw_shape
    x = torch.randn(1, height * width, 8).double().requires_grad_()
    step = split or 1
    ph, pw = (-(-side // step) * step for side in hw_shape)
    branches = 1 if split is None else 2

    def stripe(branch, y, x):
        if split is None:
            return 0
        return x // split if branch == 0 else y // split

    def expected():
        padded = F.pad(
            x.view(height, width, 8), (0, 0, 0, pw - width, 0, ph - height))
        qkv = layer.qkv(padded.view(-1, 8)).chunk(3, dim=-1)
        outs, zero = [], torch.zeros(2).double()
        for b in range(branches):
            part = slice(b * 8 // branches, (b + 1) * 8 // branches)
            q, k, v = (t[:, part] for t in qkv)

            def same(i, b=b):
                home = stripe(b, *divmod(i, pw))
                return [(j, zero) for j in range(ph * pw)
                        if stripe(b, *divmod(j, pw)) == home]

            out = attend_cells(q, k, v, 2 // branches, same)
            conv, local = layer.lepe[b], []
            for i in range(ph * pw):
                y, z = divmod(i, pw)
                cell = conv.bias
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        yy, zz = y + dy, z + dx
                        if (0 <= yy < ph and 0 <= zz < pw
                                and stripe(b, yy, zz) == stripe(b, y, z)):
                            weight = conv.weight[:, 0, dy + 1, dx + 1]
                            cell = cell + v[yy * pw + zz] * weight
                local.append(cell)
            outs.append(out + torch.stack(local))
        out = torch.cat(outs, dim=-1).view(ph, pw, 8)[:height, :width]
        return layer.proj(out.reshape(1, -1, 8))

    same_with_gradients(layer, x, hw_shape, expected)


def test_window_round_trip():
    x = torch.randn(2, 5, 7, 3)
    padded = pad_to_multiple(x, (2, 3))
    assert padded.shape == (2, 6, 9, 3)
    windows = partition(padded, (2, 3))
    assert windows.shape == (2 * 9, 6, 3)
    torch.testing.assert_close(windows[1].view(2, 3, 3), padded[0, :2, 3:6])
    torch.testing.assert_close(
        unpartition(windows, (2, 3), (6, 9))[:, :5, :7], x)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='window_size.*got 0'):
        WindowAttention(8, 2, 0)
    with pytest.raises(ValueError, match='even num_heads.*num_heads=1'):
        CrossShapedWindowAttention(8, 1, 2)
    with pytest.raises(ValueError, match='N=5 tokens'):
        SpatialReductionAttention(8, 2, 2)(torch.zeros(1, 5, 8), (2, 3))
