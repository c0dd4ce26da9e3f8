"""Every arch in half precision, on what strains it."""

import copy

import pytest
import torch
from stress import BOUNDS, CASES, push_keys, strain
from zoo import SMALL, build

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin
from mmrpa.layers import RPAttention

long = pytest.mark.long
DTYPES = [torch.bfloat16, torch.float16]
ARCHS = [(cls, arch) for cls in (RPDeiT, RPPVT, RPSwin, RPCSWin)
         for arch in cls.arch_zoo]


def push_all(backbone, case):
    """``push_keys`` in all RPAttention layers."""
    for m in backbone.modules():
        if isinstance(m, RPAttention):
            with torch.no_grad():
                keys = m.qkv.bias.chunk(3)[1].view(m.num_heads, -1)
                push_keys(keys, m.anchors, case)


def images(case, height, width):
    x = torch.randn(1, 3 * height * width)
    if case == 'constant':
        return x[:, :3, None, None].expand(1, 3, height, width).clone()
    return strain(x, case).view(1, 3, height, width)


def run(backbone, x, grads, amp=None):
    backbone = copy.deepcopy(backbone)
    x = x.detach().requires_grad_()
    with torch.autocast('cpu', dtype=amp or torch.bfloat16,
                        enabled=amp is not None):
        outs = backbone(x)
    torch.autograd.backward(outs, [g.to(o.dtype) for g, o in
                                   zip(grads, outs, strict=True)])
    return [o.detach() for o in outs], {
        name: p.grad for name, p in backbone.named_parameters()
        if p.grad is not None}


def check(backbone, case, dtype, mode, size):
    """Finite outputs and gradients; outputs near float64's.

    Each block rounds what it adds and what comes out, and errors add up as
    their squares do: the bound is that of the operator times the square root
    of the number of blocks. An image of 1e-8 is below float16's smallest
    number after one convolution; there, finite is all that can be asked for.
    """
    push_all(backbone, case)
    backbone.to(dtype)
    x = images(case, *size).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(backbone).double()(x.double())
    grads = [torch.randn(e.shape) / 64 for e in exact]
    if mode == 'pure':
        outs, found = run(backbone, x, grads)
    else:
        outs, found = run(backbone.float(), x.float(), grads, dtype)
    if not (dtype == torch.float16 and case == 'tiny' and exceeds(
            backbone, x, grads)):
        for name, grad in found.items():
            assert grad.isfinite().all(), name
    blocks = sum(len(stage.blocks) for stage in backbone.stages)
    for i, (out, e) in enumerate(zip(outs, exact, strict=True)):
        assert out.isfinite().all()
        if dtype == torch.float16 and case == 'tiny':
            continue
        error = ((out.double() - e).norm() / e.norm()).item()
        assert error <= BOUNDS[dtype] * blocks**0.5, (i, error)


def exceeds(backbone, x, grads):
    """Whether float64's gradients are beyond float16.

    An image that is 0 in float16 has constant tokens, whose gradients each
    LayerNorm multiplies by 1 / sqrt(eps): a GradScaler skips such a step.
    """
    _, exact = run(copy.deepcopy(backbone).double(), x.double(), grads)
    return max(g.abs().max() for g in exact.values()) > 65504


@pytest.mark.parametrize(('dtype', 'mode'), [
    (torch.float16, 'pure'), *(pytest.param(*c, marks=long) for c in (
        (torch.float16, 'autocast'), (torch.bfloat16, 'pure'),
        (torch.bfloat16, 'autocast')))])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('family', SMALL)
def test_small(family, case, dtype, mode):
    check(build(family), case, dtype, mode, (64, 96))


@long
@pytest.mark.parametrize('mode', ['pure', 'autocast'])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(('cls', 'arch'), ARCHS)
def test_arch(cls, arch, case, dtype, mode):
    check(cls(arch, drop_path_rate=0.), case, dtype, mode, (64, 96))
