"""The RPAttention layer against loops in float64."""

import math
import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import TOOLS
from operands import IMPLS

import mmrpa.layers.rp_attention as rp_attention_module
from mmrpa.layers import RPAttention

sys.path.append(str(TOOLS))

from benchmarks import measure  # noqa: E402

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


def expected_output(layer, x, hw_shape):
    """The layer written out apart from the implementation."""
    dwc = layer.dwc
    out = oracle.rp_attention_qkv(
        F.linear(x, layer.qkv.weight, layer.qkv.bias),
        layer.anchors,
        layer.interact_weight,
        num_heads=layer.num_heads,
        hw_shape=hw_shape,
        dwc_weight=None if dwc is None else dwc.weight,
        dwc_bias=None if dwc is None else dwc.bias,
        routing=layer.routing,
        reduction=layer.reduction,
        interact_proj=layer.interact_proj,
        interact_residual=layer.interact_residual)
    return F.linear(out, layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize('num_cls', [0, 1], ids=['map', 'cls'])
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize('impl', ['naive', 'fused'])
def test_values_and_all_gradients_equal_loops(impl, options, num_cls):
    layer = RPAttention(8, 2, 3, impl=impl, **options).double()
    for p in layer.parameters():  # biases too, which start at zero
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 6 + num_cls, 8).double().requires_grad_()
    wanted = [x, *layer.parameters()]
    grad = torch.randn_like(x)
    results = []
    for out in (layer(x, (2, 3)), expected_output(layer, x, (2, 3))):
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def layers_of_all_impls(**options):
    """One layer for each implementation, with the same parameters."""
    layers = {impl: RPAttention(32, 2, 3, impl=impl, **options)
              for impl in ('auto', 'naive', 'fused', 'triton')}
    for impl, layer in layers.items():
        layer.load_state_dict(layers['naive'].state_dict(), strict=True)
        assert layer.impl == impl and f'impl={impl!r}' in repr(layer)
    return layers


@pytest.mark.parametrize('impl', ['auto', *IMPLS])
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_impls_are_the_same_layer(impl, train):
    layers = layers_of_all_impls(interact_residual=True, proj_drop=0.5)
    cuda = impl == 'triton' and torch.cuda.is_available()
    x = torch.randn(2, 7, 32, device='cuda' if cuda else 'cpu')
    results = []
    for layer in (layers[impl], layers['naive']):
        torch.manual_seed(1)  # of dropout
        layer.to(x.device).train(train)
        leaf = x.clone().requires_grad_()
        out = layer(leaf, (2, 3))
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad
                                          for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_impl_reaches_the_operator_and_may_change(monkeypatch):
    seen = []

    def spy(qkv, *args, impl, **kwargs):
        seen.append(impl)
        return qkv[..., :32]

    monkeypatch.setattr(rp_attention_module, 'rp_attention_qkv', spy)
    layers = layers_of_all_impls()
    for layer in layers.values():
        layer(torch.randn(1, 6, 32), (2, 3))
    layers['auto'].impl = 'naive'
    layers['auto'](torch.randn(1, 32, 2, 3))
    assert seen == [*layers, 'naive']


# Memory. Sizes of the stages of a backbone, reduced.
MEMORY = [(784, 96, 16), (3136, 96, 16), (784, 192, 32), (196, 384, 64),
          (588, 384, 64), (3136, 32, 64)]


def kept(n, c, m, batch=2, **options):
    """Bytes kept for backward, parameters not counted."""
    layer = RPAttention(c, c // 32, m, **options)
    x = torch.randn(batch, n, c, requires_grad=True)
    return measure.kept_for_backward(layer, x, (n // 7, 7))


@pytest.mark.parametrize('n,c,m', MEMORY)
def test_backward_keeps_little_beside_x_qkv_and_output(n, c, m):
    limit = 1.25 * 5 * 2 * n * c * 4
    assert kept(n, c, m) <= limit
    assert kept(n, c, m, impl='naive') > limit


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('m', [16, 64])
def test_what_backward_keeps_is_linear_in_n(batch, m):
    small, middle, large = (kept(n, 96, m, batch)
                            for n in (1400, 2800, 5600))
    assert large - middle == 2 * (middle - small)
    # Few representatives, on the CPU: of tensors that grow with N, x and V.
    # Else x, q, k, v and the output.
    tensors = 2 if m == 16 else 5
    assert middle - small == 1400 * tensors * batch * 96 * 4
    # Three heads' K_rep, Z and mass, and P^T x.
    rest = 3 * m * (2 * 32 + 1) + (3 * m * 96 if m == 16 else 0)
    assert small - (middle - small) == batch * rest * 4


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


@pytest.mark.parametrize('look', [
    lambda layer, x: layer.routing_map(x, (2, 3)),
    lambda layer, x: layer.query_response(x, (2, 3), torch.tensor([1]))])
def test_a_look_leaves_nothing_in_the_cache_of_autocast(look):
    """Up to torch 2.9 the forward pass would find weights without a gradient.
    """
    layer, x = RPAttention(8, 2, 3), torch.randn(2, 6, 8)
    kept = []
    layer.qkv.register_forward_hook(
        lambda *args: kept.append(torch.is_autocast_cache_enabled()))
    grads = []
    for looks in (False, True):
        with torch.autocast('cpu', torch.bfloat16):
            if looks:
                with torch.no_grad():
                    look(layer, x)
            out = layer(x, (2, 3))
        grads.append(torch.autograd.grad(
            out.float().square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert kept == [True, False, True]


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
    for name in ('impl', 'anchors', 'routing', 'reduction', 'interact'):
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
