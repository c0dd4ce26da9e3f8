"""The RPAttention layer against loops in float64."""

import math
import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F

from mmrpa.layers import RPAttention

VARIANTS = {
    'default': {},
    'no-bias': dict(qkv_bias=False),
    'shared': dict(anchors='shared'),
    'tokens': dict(routing='tokens'),
    'sum': dict(reduction='sum'),
    'full': dict(interact='full'),
    'residual': dict(interact_residual=True),
    'interact-proj': dict(interact_proj=True),
    'full-proj': dict(interact='full', interact_proj=True),
    'dwc5': dict(dwc_kernel_size=5),
    'no-dwc': dict(dwc_kernel_size=0),
}


def depthwise(v, hw_shape, weight, bias):
    """Depth-wise convolution with zero padding, one cell at a time."""
    height, width = hw_shape
    pad = weight.shape[-1] // 2
    rows = []
    for y in range(height):
        for x in range(width):
            cell = bias
            for dy in range(-pad, pad + 1):
                for dx in range(-pad, pad + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        token = v[:, (y + dy) * width + x + dx]
                        cell = cell + token * weight[:, 0, dy + pad, dx + pad]
            rows.append(cell)
    return torch.stack(rows, dim=1)


def expected_output(layer, x, hw_shape, num_cls=0):
    """The layer written out apart from the implementation."""
    channels = x.shape[-1]
    bias = layer.qkv.bias
    q, k, v = (
        F.linear(x, layer.qkv.weight[i * channels:(i + 1) * channels],
                 None if bias is None else bias[i * channels:(i + 1) *
                                                channels])
        for i in range(3))

    def heads(t):
        return torch.stack(t.split(channels // layer.num_heads, dim=-1), 1)

    out = oracle.rp_attention(
        heads(q),
        heads(k),
        heads(v),
        layer.anchors,
        layer.interact_weight,
        routing=layer.routing,
        reduction=layer.reduction,
        interact_proj=layer.interact_proj,
        interact_residual=layer.interact_residual)
    out = torch.cat(list(out.unbind(1)), dim=-1)
    if layer.dwc is not None:
        local = depthwise(v[:, num_cls:], hw_shape, layer.dwc.weight,
                          layer.dwc.bias)
        out = torch.cat((out[:, :num_cls], out[:, num_cls:] + local), dim=1)
    return F.linear(out, layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize('num_cls', [0, 1], ids=['map', 'cls'])
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_values_and_all_gradients_equal_loops(options, num_cls):
    layer = RPAttention(8, 2, 3, **options).double()
    for p in layer.parameters():  # biases too, which start at zero
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 6 + num_cls, 8).double().requires_grad_()
    wanted = [x, *layer.parameters()]
    grad = torch.randn_like(x)
    results = []
    for out in (layer(x, (2, 3)), expected_output(layer, x, (2, 3), num_cls)):
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_map_and_tokens_are_the_same_function():
    layer = RPAttention(16, 2, 4)
    x = torch.randn(2, 16, 5, 7)
    out = layer(x)
    tokens = layer(x.flatten(2).transpose(1, 2), (5, 7))
    assert out.shape == x.shape and out.is_contiguous()
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize('dims,heads,m', [(32, 1, 16), (96, 3, 16),
                                          (192, 3, 64), (384, 12, 64),
                                          (768, 24, 64), (1024, 32, 64)])
def test_initial_routing_is_neither_uniform_nor_one_hot(dims, heads, m):
    layer = RPAttention(dims, heads, m)
    x = F.layer_norm(torch.randn(2, 300, dims), (dims, ))
    k = layer.qkv(x)[..., dims:2 * dims].unflatten(-1, (heads, -1))
    logits = torch.einsum('bnhd,hmd->bhnm', k, layer.anchors)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean() / math.log(m)
    assert 0.3 < entropy < 0.95


@pytest.mark.parametrize('num_cls', [0, 1], ids=['map', 'cls'])
def test_routing_map_is_the_routing_that_forward_uses(num_cls):
    layer = RPAttention(8, 2, 3)
    x = torch.randn(2, 6 + num_cls, 8)
    maps = layer.routing_map(x, (2, 3))
    assert maps.shape == (2, 2, 3, 2, 3)
    torch.testing.assert_close(maps.sum(2), torch.ones(2, 2, 2, 3))
    k = layer.qkv(x)[1, num_cls + 4, 8:16].view(2, 4)  # row 1, column 1
    for head in range(2):
        logits = torch.stack([(k[head] * a).sum()
                              for a in layer.anchors[head]])
        torch.testing.assert_close(maps[1, head, :, 1, 1], logits.softmax(0))


def test_needs_torch_alone():
    code = ('import sys\n'
            'class Block:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet",\n'
            '                                  "torchvision", "numpy"):\n'
            '            raise ImportError(name)\n'
            'import torch\n'
            'sys.meta_path.insert(0, Block())\n'
            'import mmrpa.ops, mmrpa.layers\n'
            'print("ok")\n')
    result = subprocess.run([sys.executable, '-c', code],
                            capture_output=True,
                            text=True)
    assert result.stdout.strip() == 'ok', result.stderr


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='embed_dims=10 and num_heads=3'):
        RPAttention(10, 3)
    with pytest.raises(ValueError, match='num_representatives.*got 0'):
        RPAttention(8, 2, 0)
    with pytest.raises(ValueError, match='dwc_kernel_size must be odd.*4'):
        RPAttention(8, 2, 4, dwc_kernel_size=4)
    for name in ('anchors', 'routing', 'reduction', 'interact'):
        with pytest.raises(ValueError, match=f"{name} must be one of.*'x'"):
            RPAttention(8, 2, 4, **{name: 'x'})


def test_bad_inputs_are_named():
    layer = RPAttention(8, 2, 4)
    with pytest.raises(ValueError, match=r'N=7 tokens.*\(2, 4\) asks for 8'):
        layer(torch.zeros(1, 7, 8), (2, 4))
    with pytest.raises(ValueError, match=r'hw_shape=\(H, W\) is needed'):
        layer(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r'x must be \(B, N, 8\)'):
        layer(torch.zeros(1, 8, 9), (2, 4))
    with pytest.raises(ValueError, match='leave hw_shape out'):
        layer(torch.zeros(1, 8, 2, 4), (4, 2))
