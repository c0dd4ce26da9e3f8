"""Inputs of 1e4: what decides whether half precision can give the result.

Not the inputs, but the gap between the two largest logits of a row. With
weights of the usual size, inputs of 1e4 have routing logits of 1e4, and logits
of 1e7 to 1e8 in Interact and Distribute, which float32 knows to about 4. A gap
far above what rounding changes is a clear winner: all bounds hold. So they do
where small weights bring logits back to 1. A gap below it is a tie, which
rounding decides: float64's result changes as much when its inputs are off by
one rounding, and torch's own attention is off by as much.
"""

import pytest
import torch
import torch.nn.functional as F
from operands import TRITON
from strained import (
    DIMS,
    DTYPES,
    FULL,
    HEADS,
    LAYER_LISTED,
    LISTED,
    SMALL,
    C,
    compare,
    compare_layer,
    layer_and_tokens,
    operands,
    run,
    run_layer,
)
from stress import (
    BOUNDS,
    CANCELS,
    PROJECTED,
    ROUNDING,
    VANISHES,
    largest_change,
    nudge,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrpa.ops import distribute, gather, interact, rp_attention

long = pytest.mark.long
SCALE = DIMS**-0.5
MAPS = [SMALL, pytest.param(FULL, marks=long)]


def heads_first(x):
    """(1, N, C) to (1, h, N, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def all_logits(qkv, anchors, weight):
    """Those of the three softmaxes, as (h, rows, M)."""
    q, k, v = (heads_first(x) for x in qkv.chunk(3, dim=-1))
    k_rep, z = gather(k, v, anchors)
    return dict(
        route=(k @ anchors.mT)[0],
        interact=(SCALE * (z @ weight[0]) @ (z @ weight[1]).mT)[0],
        distribute=(SCALE * q @ k_rep.mT)[0])


def logits_of(tensors):
    """``all_logits`` of the operator's arguments, in float64."""
    return all_logits(*(tensors[name].double() for name in (
        'qkv', 'anchors', 'interact_weight')))


def ties(qkv, anchors, weight, by):
    """How many rows of each softmax rounding could decide.

    Those whose gap between the two largest logits is not above 20, where the
    second's exp(-20) is below float32's rounding, and twice what the logits
    move at the most when Q, K and V are off by ``by`` of themselves.
    """
    exact = all_logits(qkv, anchors, weight)
    moved = [all_logits(nudge(qkv, by), anchors, weight) for _ in range(3)]
    found = {}
    for name, logits in exact.items():
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        doubt = max((m[name] - logits).abs().max() for m in moved)
        found[name] = (first - second <= 20 + 2 * doubt).sum().item()
    return found


def fill(tokens, hw_shape):
    """A map of the tokens, over and over: (1, H * W, C')."""
    return tokens[:, torch.arange(hw_shape[0] * hw_shape[1])
                  % tokens.shape[1]]


def without_ties(draw, hw_shape, by):
    """Draw weights and twelve tokens until nothing is left to rounding.

    Args:
        draw (callable): Returns weights, tokens (1, 12, C'), and Q, K and V,
            anchors and Wq', Wk', Wv' for a map of them.
        hw_shape (tuple[int, int]): The map that they are to fill.
        by (float): How far Q, K and V may be off.
    """
    for _ in range(300):
        weights, tokens, project = draw()
        if not any(any(ties(*project(fill(tokens, shape)), by).values())
                   for shape in dict.fromkeys((SMALL, hw_shape))):
            return weights, fill(tokens, hw_shape)
    raise AssertionError('no draw without ties')


FEW = 4  # representatives: there are fewer rows that may tie


@pytest.mark.parametrize('hw_shape', MAPS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_operator_where_winners_are_clear(dtype, hw_shape):

    def draw():
        tensors, _ = operands('large', (3, 4))
        tensors['anchors'] = tensors['anchors'][:, :FEW]
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
        weights = [tensors[n].double() for n in ('anchors', 'interact_weight')]
        return tensors, tensors['qkv'], lambda x: (x.double(), *weights)

    tensors, tensors['qkv'] = without_ties(draw, hw_shape, ROUNDING)
    exact = compare(tensors, torch.randn(1, len(tensors['qkv'][0]), C).to(
        dtype), dtype, ['naive', 'fused'], hw_shape, LISTED['winners'])
    assert exact['out'].abs().max() > 5e3
    # A one-hot softmax has no gradient; all else has one.
    for name, t in exact.items():
        assert (t.abs().max() < 1e-3) == (name in ('q', 'k', 'anchors')), name


@pytest.mark.parametrize('hw_shape', MAPS)
@pytest.mark.parametrize('mode', ['pure', 'autocast'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_layer_where_winners_are_clear(dtype, mode, hw_shape):

    def draw():
        layer, x, _ = layer_and_tokens('large', (3, 4))
        layer.anchors = torch.nn.Parameter(layer.anchors[:, :FEW].detach())
        layer = layer.to(dtype).double().requires_grad_(False)
        return layer, x.to(dtype).double(), lambda x: (
            layer.qkv(x), layer.anchors, layer.interact_weight)

    layer, x = without_ties(draw, hw_shape, torch.finfo(dtype).eps / 2)
    compare_layer(layer.requires_grad_(), x, torch.randn(x.shape), dtype,
                  [mode], ['naive', 'fused'], hw_shape,
                  LAYER_LISTED['winners'])


@pytest.mark.parametrize(('dtype', 'impl', 'hw_shape'), [
    *((dtype, impl, SMALL) for impl in ('naive', 'fused')
      for dtype in DTYPES),
    *(pytest.param(dtype, impl, FULL, marks=long)
      for impl in ('naive', 'fused') for dtype in DTYPES),
    *(pytest.param(dtype, *TRITON.values, (5, 7), marks=[*TRITON.marks, *more])
      for dtype, more in zip(DTYPES, ([], [long]), strict=True))])
def test_operator_with_logits_near_one(dtype, impl, hw_shape):
    """No softmax is one-hot or uniform: all gradients can be compared.

    Each with itself alone, as the anchors', a sum over all tokens, is by far
    the largest. Some of the others are below float16's smallest number.
    """
    tensors, grad = operands('large', hw_shape)
    tensors['anchors'] *= 2**-13
    weight = tensors['interact_weight']
    # Means of more tokens are smaller, so the factor depends on the map.
    weight[:2] *= logits_of(tensors)['interact'].abs().max()**-0.5
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    for name, logits in logits_of(tensors).items():
        size = logits.abs().max() * (2**-26 if name == 'distribute' else 1)
        assert 0.1 < size < 10, name
    listed = dict.fromkeys('qk', VANISHES) if dtype == torch.float16 else {}
    exact = compare(tensors, grad.to(dtype), dtype, [impl], hw_shape, listed,
                    scale=SCALE * 2**-26)
    assert exact['out'].abs().max() > 5e3
    assert all(t.abs().max() > 0 for t in exact.values())


def grad_of_queries(tensors, grad, v_rep_of):
    """Q's gradient in float64, (1, h, N, d), through V_rep = v_rep_of(Z)."""
    q, k, v = (heads_first(x).double()
               for x in tensors['qkv'].chunk(3, dim=-1))
    k_rep, z = gather(k, v, tensors['anchors'].double())
    q.requires_grad_()
    out = distribute(q, k_rep, v_rep_of(z), SCALE * 2**-26)
    return torch.autograd.grad(out, q, heads_first(grad).double())[0]


@pytest.mark.parametrize('hw_shape', MAPS)
@pytest.mark.parametrize('impl', ['naive', 'fused'])
def test_representatives_that_float32_cannot_tell_apart(impl, hw_shape):
    """Interact with logits near 0 gives every representative the same mean.

    With 66 800 tokens V_rep's rows differ by 5e-6 of themselves, which is
    less than a hundred roundings of float32, and Q's gradient comes of that
    difference alone. So float64 computes another one if nothing but V_rep is
    rounded, once, to float32; ours is off by no more than a few such
    roundings.
    """
    tensors, grad = operands('large', hw_shape)
    tensors['anchors'] *= 2**-13
    weight = tensors['interact_weight']
    weight[:2] *= 2**-13
    scale = SCALE * 2**-26
    compare(tensors, grad, torch.float32, [impl], hw_shape, dict(q=CANCELS),
            scale=scale)

    def in_float64(z):
        return interact(z, weight.double())

    exact = grad_of_queries(tensors, grad, in_float64)
    rounded = grad_of_queries(
        tensors, grad, lambda z: in_float64(z).float().double())
    change = (rounded - exact).norm()
    if hw_shape == FULL:
        assert change > 4e-3 * exact.norm()
    actual = heads_first(run(tensors, grad, impl, hw_shape, scale=scale)['q'])
    assert (actual - exact).norm() <= 8 * change

    # Rounding their differences changes nothing: they are what gets lost.
    def differences(z):
        v_rep = in_float64(z)
        return (v_rep - v_rep.mean(2, keepdim=True)).float().double()

    assert (grad_of_queries(tensors, grad, differences) - exact
            ).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize('hw_shape', MAPS)
@pytest.mark.parametrize('mode', ['pure', 'autocast'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_layer_with_logits_near_one(dtype, mode, hw_shape):
    layer, x, grad = layer_and_tokens('large', hw_shape)
    with torch.no_grad():
        layer.qkv.weight *= 2**-10
    # The routing's logits are up to 35 here: rounding K to bfloat16 moves
    # them by 0.1, and the gradient of anchors by more than 1 %.
    listed = dict(anchors=PROJECTED)
    if dtype == torch.float16:
        listed['x'] = VANISHES
    compare_layer(layer, x, grad, dtype, [mode], ['naive', 'fused'], hw_shape,
                  listed)


def tie_all(q, k_rep):
    """The queries moved to where their two largest logits are equal."""
    first, second = (SCALE * q @ k_rep.mT).topk(2, dim=-1).indices.split(
        1, dim=-1)
    apart = [k_rep.gather(2, i.expand(q.shape)) for i in (first, second)]
    apart = apart[0] - apart[1]
    return q - apart * ((q * apart).sum(-1, keepdim=True)
                        / apart.square().sum(-1, keepdim=True))


def gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return dict(zip(('out', 'q'), (
        out.detach(), torch.autograd.grad(out, leaves[0], grad.to(out.dtype))[
            0]), strict=True))


def test_ties_are_the_problems_and_not_ours():
    """Each token reads from two representatives with equal logits of 1e7.

    In float32 the output and Q's gradient are off by half and more of
    themselves: ours, and those of torch's attention from the exact
    representatives. The exact ones move by as much when inputs are off by one
    rounding.
    """
    tensors, _ = operands('large', (20, 20))
    q, k, v = (heads_first(x).double()
               for x in tensors['qkv'].chunk(3, dim=-1))
    anchors, weight = (tensors[n].double()
                       for n in ('anchors', 'interact_weight'))
    k_rep, z = gather(k, v, anchors)
    v_rep = interact(z, weight)
    q = tie_all(q, k_rep).float().double()
    inputs, grad = [q, k, v, anchors, weight], torch.randn(q.shape).double()

    def attend(*tensors):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*tensors)

    def errors(results):
        return {n: ((results[n] - e).norm() / e.norm()).item()
                for n, e in exact.items()}

    exact = gradients(lambda *t: rp_attention(*t, impl='naive'), inputs, grad)
    dense = gradients(attend, [q, k_rep, v_rep], grad)
    assert max(errors(dense).values()) < 1e-6
    torchs = errors(gradients(
        attend, [t.float() for t in (q, k_rep, v_rep)], grad))
    changes = largest_change(lambda: gradients(
        lambda *t: rp_attention(*t, impl='naive'),
        [nudge(t, ROUNDING) for t in inputs], grad), exact)
    changes = {n: changes[n] / e.norm().item() for n, e in exact.items()}
    for impl in ('naive', 'fused'):
        ours = errors(gradients(
            lambda *t, impl=impl: rp_attention(*t, impl=impl),
            [t.float() for t in inputs], grad))
        for name in exact:
            assert ours[name] > 10 * BOUNDS[torch.bfloat16]
            assert ours[name] < 2 * torchs[name]
            assert ours[name] < 8 * changes[name]


def test_a_layer_rounds_its_keys():
    """Random tokens have ties, which rounding Q, K and V to half decides.

    The layer agrees with float64 from the same rounded K (the large case of
    test_operator.py), but not from K as it was; float64 does not either.
    """
    layer, x, grad = layer_and_tokens('large', SMALL)
    layer.bfloat16().double().impl = 'naive'
    x, by = x.bfloat16().double(), torch.finfo(torch.bfloat16).eps / 2
    with torch.no_grad():
        qkv = layer.qkv(x)
        assert all(ties(qkv, layer.anchors, layer.interact_weight,
                        by).values())
    exact = run_layer(layer, x, grad.double(), SMALL)
    changes = largest_change(
        lambda: run_layer(layer, x, grad.double(), SMALL,
                          projected=nudge(qkv, by)), exact)
    layer.bfloat16()
    actual = run_layer(layer, x.bfloat16(), grad.bfloat16(), SMALL)
    for name in ('out', 'x', 'qkv.weight', 'anchors'):
        error = (actual[name].double() - exact[name]).norm()
        assert error > 3 * BOUNDS[torch.bfloat16] * exact[name].norm(), name
        assert error < 8 * changes[name], name
