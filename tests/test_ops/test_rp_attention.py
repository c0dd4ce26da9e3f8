"""The operator against loops in float64, and the properties of method.md."""

import oracle
import pytest
import torch

from mmrpa.ops import gather, interact, rp_attention

OPTIONS = {
    'default': {},
    'routing-tokens': dict(routing='tokens'),
    'sum': dict(reduction='sum'),
    'residual': dict(interact_residual=True),
    'scale': dict(scale=0.3),
}


def make_inputs(batch=2, heads=2, n=7, m=3, d=4, anchors='per_head',
                weight='grouped', proj=False, dtype=torch.float64):
    square = (heads, d, d) if weight == 'grouped' else (heads * d, ) * 2
    q, k, v = (torch.randn(batch, heads, n, d) for _ in range(3))
    tensors = [
        q, k, v,
        torch.randn(heads if anchors == 'per_head' else 1, m, d),
        torch.randn(3, *square)
    ]
    if proj:
        tensors.append(torch.randn(*square))
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(function, tensors, grad, **options):
    """Values and the gradients of all inputs."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    proj = tensors[5] if len(tensors) == 6 else None
    out = function(*tensors[:5], interact_proj=proj, **options)
    grads = torch.autograd.grad(out, tensors, grad.to(out.dtype))
    return [out, *grads]


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('weight', ['grouped', 'full'])
@pytest.mark.parametrize('anchors', ['per_head', 'shared'])
@pytest.mark.parametrize('proj', [False, True], ids=['no-proj', 'proj'])
def test_values_and_all_gradients_equal_loops(options, weight, anchors, proj):
    tensors = make_inputs(anchors=anchors, weight=weight, proj=proj)
    grad = torch.randn_like(tensors[0])
    actual = run(rp_attention, tensors, grad, **options)
    expected = run(oracle.rp_attention, tensors, grad, **options)
    assert len(actual) == 6 + proj
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('n,m', [(1, 1), (1, 5), (3, 16), (13, 1)])
def test_awkward_sizes_equal_loops(n, m):
    tensors = make_inputs(batch=1, n=n, m=m)
    grad = torch.randn_like(tensors[0])
    for a, e in zip(run(rp_attention, tensors, grad),
                    run(oracle.rp_attention, tensors, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 2e-5),
                                             (torch.bfloat16, 2e-2),
                                             (torch.float16, 3e-3)])
def test_lower_precision_stays_close_to_float64(dtype, tolerance):
    tensors = make_inputs(n=33, m=8, d=8, dtype=dtype)
    out = rp_attention(*tensors)
    expected = rp_attention(*(t.double() for t in tensors))
    assert out.dtype == dtype
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance


def test_autocast_does_not_lower_the_precision():
    tensors = make_inputs(n=33, m=8, d=8, dtype=torch.float32)
    expected = rp_attention(*tensors)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = rp_attention(*tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_permuting_tokens_permutes_the_output():
    q, k, v, *rest = make_inputs(n=19)
    order = torch.randperm(19)
    out = rp_attention(q, k, v, *rest)
    permuted = rp_attention(*(t[:, :, order] for t in (q, k, v)), *rest)
    torch.testing.assert_close(permuted, out[:, :, order])


def test_duplicating_tokens_keeps_the_representatives():
    _, k, v, anchors, _ = make_inputs(n=11)
    once = gather(k, v, anchors)
    twice = gather(
        torch.cat((k, k), dim=2), torch.cat((v, v), dim=2), anchors)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)
    doubled = gather(
        torch.cat((k, k), dim=2), torch.cat((v, v), dim=2), anchors,
        reduction='sum')
    summed = gather(k, v, anchors, reduction='sum')
    for a, b in zip(summed, doubled, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_one_hot_routing_gathers_every_token_unchanged():
    n = 6
    k = torch.eye(n).double().expand(1, 2, n, n)
    v = torch.randn(1, 2, n, n).double()
    anchors = 1000 * torch.eye(n).double().expand(2, n, n)
    k_rep, z = gather(k, v, anchors)
    torch.testing.assert_close(k_rep, k)
    torch.testing.assert_close(z, v)


def test_identical_representatives_interact_as_a_linear_map():
    z = torch.randn(2, 3, 1, 4).double().expand(2, 3, 5, 4)
    weight = torch.randn(3, 3, 4, 4).double()
    torch.testing.assert_close(
        interact(z, weight), torch.einsum('bhmd,hde->bhme', z, weight[2]))


def test_dead_representative_gives_zeros_and_finite_gradients():
    q, k, v, _, weight = make_inputs(n=9, m=2, dtype=torch.float32)
    k = k.detach().abs().requires_grad_()
    # exp(-400 * sum(k)) is 0 in float32, so nothing reaches the second one.
    anchors = torch.stack((torch.ones(2, 4), torch.full((2, 4), -400.)), 1)
    anchors.requires_grad_()
    k_rep, z = gather(k, v, anchors)
    assert k_rep[:, :, 1].abs().max() == 0 and z[:, :, 1].abs().max() == 0
    out = rp_attention(q, k, v, anchors, weight)
    out.square().sum().backward()
    for t in (out, q.grad, k.grad, v.grad, anchors.grad, weight.grad):
        assert t.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_million_tokens_on_one_representative_do_not_overflow(dtype):
    n, d = 10**6, 4
    k = torch.ones(1, 1, n, d, dtype=dtype)
    v = torch.full((1, 1, n, d), 3., dtype=dtype)
    anchors = torch.tensor([[[9.] * d, [-9.] * d]], dtype=dtype)
    weight = torch.eye(d, dtype=dtype).expand(3, 1, d, d)
    k_rep, z = gather(k.float(), v.float(), anchors.float())
    torch.testing.assert_close(k_rep[0, 0, 0], torch.ones(d))
    torch.testing.assert_close(z[0, 0, 0], torch.full((d, ), 3.))
    out = rp_attention(k, k, v, anchors, weight)
    assert out.isfinite().all()


def test_flops_grow_linearly_in_n():
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for n in (100, 400, 1600):
        with torch.device('meta'):
            inputs = make_inputs(n=n, m=16)
        with FlopCounterMode(display=False) as counter:
            rp_attention(*inputs)
        counts.append(counter.get_total_flops())
    # What does not depend on N is the same in all three.
    assert counts[2] - counts[1] == 4 * (counts[1] - counts[0])
    # 5 products of N x M x d: routing, two gathers, two of Distribute.
    assert counts[1] - counts[0] == 2 * 5 * 300 * 16 * 4 * 2 * 2


BAD = {
    'q-dims': (dict(q=(2, 7, 4)), ValueError, 'must share one shape'),
    'k-shape': (dict(k=(2, 2, 8, 4)), ValueError, r'\(2, 2, 8, 4\)'),
    'anchor-heads': (dict(anchors=(3, 3, 4)), ValueError, 'anchors must be'),
    'no-anchor': (dict(anchors=(2, 0, 4)), ValueError, 'M at least 1'),
    'weight': (dict(interact_weight=(2, 4, 4)), ValueError,
               'interact_weight must be'),
}


@pytest.mark.parametrize('shapes,error,match', BAD.values(), ids=BAD)
def test_bad_shapes_are_named(shapes, error, match):
    names = ('q', 'k', 'v', 'anchors', 'interact_weight')
    tensors = dict(zip(names, make_inputs(), strict=True))
    tensors.update({name: torch.zeros(shape)
                    for name, shape in shapes.items()})
    with pytest.raises(error, match=match):
        rp_attention(**tensors)


def test_bad_options_and_dtypes_are_named():
    tensors = make_inputs()
    with pytest.raises(ValueError, match="routing must be one of.*'rows'"):
        rp_attention(*tensors, routing='rows')
    with pytest.raises(ValueError, match="reduction must be one of.*'max'"):
        rp_attention(*tensors, reduction='max')
    with pytest.raises(ValueError, match='interact_proj must be'):
        rp_attention(*tensors, interact_proj=torch.zeros(3, 3))
    with pytest.raises(TypeError, match='k must be floating point'):
        rp_attention(tensors[0], tensors[1].long(), *tensors[2:])
